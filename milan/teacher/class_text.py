"""What the teacher's text tower makes of the names of the classes: unit vectors in the space of the student's predictions.

The teacher stage asks once, while the whole CLIP is at hand, and writes class_text.safetensors, "embeddings" (K, D), and
class_text.json, which says what was asked. A teacher without a text tower, and images without labels, have neither.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from milan.core.files import read_json, write_json
from milan.training.weights import load_weights, save_weights

FILE = "class_text.safetensors"


class Wording(NamedTuple):
    """What a text tower is asked: each name in each of the prompts, which hold a {} for it."""

    names: list[str]  # of the classes, in the order of the labels
    prompts: list[str]


class ClassText(NamedTuple):
    names: list[str]
    embeddings: Tensor  # (K, D) float32, unit rows


def save_class_text(folder: Path, wording: Wording, embeddings: Tensor) -> None:
    save_weights(folder / FILE, {"embeddings": embeddings})
    write_json(folder / "class_text.json", {"names": list(wording.names), "prompts": list(wording.prompts)})


def read_class_text(folder: Path) -> ClassText | None:
    """None when this teacher was not asked. Raises UserError when a file is damaged."""
    if not (Path(folder) / FILE).exists():
        return None
    said = read_json(Path(folder) / "class_text.json", names=list)
    return ClassText(said["names"], load_weights(Path(folder) / FILE)["embeddings"])
