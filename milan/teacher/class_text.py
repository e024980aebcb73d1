"""Text embeddings of the class names by the teacher's text tower: unit vectors in the space of the student's predictions.

The teacher stage computes them while it holds the whole CLIP, and writes class_text.safetensors ("embeddings", (K, D)) and
class_text.json (names and prompts). A teacher without a text tower, and images without labels, have neither file.
"""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from milan.core.files import read_json, write_json
from milan.training.weights import load_weights, save_weights

FILE = "class_text.safetensors"


class Wording(NamedTuple):
    """The texts of the classes: each name in each of the prompts."""

    names: list[str]  # of the classes, in the order of the labels
    prompts: list[str]  # with {} in place of the name


class ClassText(NamedTuple):
    """The text embeddings of the classes."""

    names: list[str]
    embeddings: Tensor  # (K, D) float32, unit rows


def save_class_text(folder: Path, wording: Wording, embeddings: Tensor) -> None:
    """Write class_text.safetensors and class_text.json. embeddings: (K, D)."""
    save_weights(folder / FILE, {"embeddings": embeddings})
    write_json(folder / "class_text.json", {"names": list(wording.names), "prompts": list(wording.prompts)})


def read_class_text(folder: Path) -> ClassText | None:
    """Read the class texts of a teacher; None when it has none. Raises UserError when a file is damaged."""
    if not (Path(folder) / FILE).exists():
        return None
    wording = read_json(Path(folder) / "class_text.json", names=list)
    return ClassText(wording["names"], load_weights(Path(folder) / FILE)["embeddings"])
