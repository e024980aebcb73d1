"""The small CLIP that is trained here: open_clip's model at toy size, its tokenizer, and a teacher's files on disk."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from milan.core.errors import UserError
from milan.core.files import read_checked, write_checked
from milan.core.progress import track
from milan.core.validation import Int, Section, validate
from milan.params import Ascending, Distinct, Few, Model, TinyClip, World
from milan.teacher.class_text import Wording
from milan.training.weights import load_state, load_weights, save_weights

# The smallest towers that open_clip builds, in place of the one that is not wanted.
NO_TEXT = CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
NO_VISION = CLIPVisionCfg(layers=1, width=1, head_width=1, patch_size=1, image_size=1)
OTHER_TEACHER = "teacher.json beside it describes another model: delete the folder and run `dvc repro`, which makes it again."

TokenId = Annotated[Int, Field(ge=0, lt=49408)]  # of open_clip's vocabulary


@dataclass(frozen=True)
class SmallClip(Section):
    """The teacher.json of a small CLIP."""

    kind: Literal["tiny"]
    tiny: TinyClip
    image_size: Few
    patch_size: Few
    token_ids: Annotated[list[TokenId], Strict(), Field(min_length=1), Ascending, Distinct]  # of the corpus
    world: World | None  # the built-in world of its captions; None for captions of other images

    def conflicts(self) -> Iterator[str]:
        if self.image_size % self.patch_size:
            yield f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}"


def build_tiny(config: TinyClip, image_size: int, patch_size: int, vocabulary: int) -> CLIP:
    """Build open_clip's CLIP at toy size. vocabulary: number of token ids.

    With `conv_stem` a small convolutional stem on the same grid replaces the patch embedding, which does not learn shape
    from the built-in world in minutes (Xiao et al. 2021)."""
    vision = CLIPVisionCfg(
        layers=config.layers, width=config.width, head_width=config.head_width, patch_size=patch_size, image_size=image_size
    )
    text = CLIPTextCfg(
        context_length=config.context_length,
        vocab_size=vocabulary,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
    )
    model = CLIP(config.embed_dim, vision_cfg=vision, text_cfg=text)
    if config.conv_stem:
        model.visual.conv1 = conv_stem(config.width, patch_size)
    return model


def conv_stem(width: int, patch_size: int) -> nn.Sequential:
    """Build a stem, (B, 3, H, W) -> (B, width, H/patch, W/patch): 3x3 convolutions of stride 2, then one of 1x1.

    It has GroupNorm, not BatchNorm: the features of a sample must not depend on other samples or on the number of processes.
    Raises UserError when the patch size is no power of two."""
    halvings = patch_size.bit_length() - 1
    if 2**halvings != patch_size:
        raise UserError(f"teacher.tiny.conv_stem needs a patch size that is a power of two, not {patch_size}; set it to false.")
    layers: list[nn.Module] = []
    channels = 3
    for step in range(halvings):
        out_channels = max(width >> (halvings - 1 - step), 32)
        layers += [nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)]
        layers += [nn.GroupNorm(8, out_channels), nn.ReLU()]
        channels = out_channels
    return nn.Sequential(*layers, nn.Conv2d(channels, width, 1))


class Tokenizer:
    """open_clip's byte-pair tokenizer, optionally with the ids of a corpus renumbered in order: a text tower for fifty words
    needs no table of 49,408. Ids outside the corpus become padding (id 0)."""

    def __init__(self, context_length: int, ids: list[int] | None = None):
        """ids: the ids of a corpus, ascending; None keeps the whole vocabulary."""
        self.bpe = open_clip.SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.ids = torch.tensor(ids) if ids is not None else None

    @classmethod
    def of_corpus(cls, captions: list[str], context_length: int) -> "Tokenizer":
        """Build a tokenizer for the ids that occur in these captions."""
        ids = cls(context_length).bpe(sorted(set(captions))).unique()
        return cls(context_length, sorted({0, *ids.tolist()}))

    def __len__(self) -> int:
        return len(self.ids) if self.ids is not None else self.bpe.vocab_size

    def __call__(self, texts: list[str]) -> Tensor:
        """Return the tokens of texts, (B, context_length) int64. End-of-text has the highest id, as open_clip's pooling
        expects."""
        tokens = self.bpe(texts)
        if self.ids is None:
            return tokens
        positions = torch.searchsorted(self.ids, tokens).clamp_max(len(self.ids) - 1)
        return torch.where(self.ids[positions] == tokens, positions, torch.zeros_like(positions))


def save_no_teacher(folder: Path) -> None:
    """Write the teacher.json of a recipe without a teacher, which only evaluates a released student."""
    write_checked(folder / "teacher.json", {"kind": "none"})


def save_teacher(folder: Path, model: nn.Module, config: dict) -> None:
    """Write teacher.safetensors (the image tower under `visual.`, and the text tower of a small CLIP) and teacher.json, from
    which the model is built again.

    A small CLIP's teacher.safetensors holds teacher.json too, so this one file can be given to others: another recipe takes
    it as its teacher.pretrained.file, with library milan."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"teacher": config} if config["kind"] == "tiny" else {}
    save_weights(folder / "teacher.safetensors", model.state_dict(), **about)
    write_checked(folder / "teacher.json", config)


def read_config(folder: Path) -> dict:
    """Read teacher.json. Raises UserError when the recipe had no teacher."""
    config = read_checked(Path(folder) / "teacher.json", kind=str)
    if config["kind"] == "none":
        raise UserError(
            f"{folder} holds no teacher: pretrain.weights was set when it was made. Set it to null and run `dvc repro`."
        )
    if config["kind"] == "tiny":
        return asdict(validate(SmallClip, config, f"{folder}/teacher.json"))
    return config


@contextlib.contextmanager
def explain_misfits(folder: Path) -> Iterator[None]:
    """Turn the errors that torch and open_clip raise over a bad teacher.json into a UserError that names the folder."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, AssertionError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(
            f"{folder}: teacher.json and teacher.safetensors make no teacher ({reason}). Delete it and run `dvc repro` again."
        ) from None


def tiny_config(tiny: TinyClip, model: Model, token_ids: list[int], world: str | None) -> dict:
    """Return the teacher.json of a small CLIP for students of this size (SmallClip)."""
    return asdict(SmallClip("tiny", tiny, model.image_size, model.patch_size, token_ids, world))


def load_teacher(folder: Path) -> tuple[CLIP, Tokenizer, dict]:
    """Load both towers of a small CLIP, frozen and in evaluation mode, with tokenizer and teacher.json.

    Raises UserError for other teachers, whose text tower is not kept, and for files that do not fit each other."""
    config = read_config(folder)
    if config["kind"] != "tiny":
        raise UserError(f"{folder} holds an image tower and no text tower: it gives features of images alone.")
    weights = load_weights(Path(folder) / "teacher.safetensors")
    with explain_misfits(folder):
        model, tokenizer = build_towers(config)
    load_state(model, weights, Path(folder) / "teacher.safetensors", OTHER_TEACHER)
    return model.eval().requires_grad_(False), tokenizer, config


def build_towers(config: dict) -> tuple[CLIP, Tokenizer]:
    """Build the small CLIP that a teacher.json describes, without its weights, and its tokenizer."""
    tokenizer = Tokenizer(config["tiny"]["context_length"], config["token_ids"])
    return build_tiny(TinyClip(**config["tiny"]), config["image_size"], config["patch_size"], len(tokenizer)), tokenizer


def embed_classes(model: CLIP, tokenizer: Tokenizer, wording: Wording, shown: bool = False) -> Tensor:
    """Return the text embedding of each class, (K, D) float32 on the CPU: the unit mean of the unit text features of its name
    in the prompts. shown: whether to show progress."""
    rows, device = [], model.token_embedding.weight.device
    with torch.no_grad():
        for name in track(wording.names, "texts of the classes", len(wording.names)) if shown else wording.names:
            tokens = tokenizer([prompt.format(name) for prompt in wording.prompts]).to(device)
            features = model.encode_text(tokens, normalize=True)
            rows.append(nn.functional.normalize(features.mean(dim=0), dim=0).float().cpu())
    return torch.stack(rows)
