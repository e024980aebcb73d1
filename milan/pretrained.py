"""A released CLIP as the teacher: by open_clip name and tag, or from a local file; digest verified.

No code of a file runs that the recipe has not named by its digest: pickles are read with weights_only, and a
TorchScript archive, as OpenAI publishes, which PyTorch says to treat as a program (its SECURITY.md), is opened only
when its SHA-256 is teacher.pretrained.sha256.
"""

import zipfile
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file

from milan.clip import save_teacher
from milan.errors import UserError
from milan.files import file_digest
from milan.params import Pretrained

INTEGERS = ("input_resolution", "context_length", "vocab_size")  # OpenAI's files carry them among the weights


def fetch_teacher(source: Pretrained, folder: Path) -> None:
    """Write the released model into folder as teacher.safetensors and teacher.json."""
    config = open_clip.get_model_config(source.model)
    if config is None:
        known = ", ".join(name for name in open_clip.list_models() if name.startswith("ViT"))
        raise UserError(f"teacher.pretrained.model {source.model!r} is unknown to open_clip. It knows {known}.")
    config = {name: value for name, value in config.items() if name in CLIP.__init__.__code__.co_varnames}
    path = Path(source.file) if source.file else download(source)
    verify(path, source.sha256)
    model = CLIP(**config)
    load_state(model, read_state(path, named=bool(source.sha256)), path)
    save_teacher(folder, model, {"kind": "open_clip", "name": source.model, "model": config})


def download(source: Pretrained) -> Path:
    """The tag's weights, from the network or open_clip's cache. A digest names the file of the original publisher;
    the hub, which open_clip prefers, has the same weights in a file of other bytes."""
    release = open_clip.get_pretrained_cfg(source.model, source.tag)
    if not release:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(source.model)) or "none"
        raise UserError(f"teacher.pretrained.tag {source.tag!r} is unknown for {source.model}. open_clip knows {known}.")
    try:
        return Path(open_clip.download_pretrained(release, prefer_hf_hub=source.sha256 is None))
    except Exception as error:  # the clients of hub and network raise many kinds
        raise UserError(
            f"The weights {source.model} / {source.tag} are neither in the cache nor to be had from the network "
            f"({type(error).__name__}). Fetch them elsewhere and set teacher.pretrained.file."
        ) from None


def verify(path: Path, sha256: str | None) -> None:
    if not path.is_file():
        raise UserError(f"teacher.pretrained.file {path} is no file.")
    if sha256 and (found := file_digest(path)) != sha256.lower():
        raise UserError(
            f"{path} has SHA-256 {found}, the recipe (teacher.pretrained.sha256) says {sha256}: fetch it again, "
            "or, if it is another file that you trust, set teacher.pretrained.sha256 to what it has."
        )


def read_state(path: Path, named: bool) -> dict[str, torch.Tensor]:
    """State dict of a safetensors file, a plain checkpoint or, when the recipe has named it by its digest, an OpenAI
    TorchScript archive."""
    if is_torchscript(path) and not named:
        raise UserError(
            f"{path} is a TorchScript archive, which is a program, and is not opened unless the recipe names it: set "
            "teacher.pretrained.sha256 to the digest that its publisher gives, or give the same weights as safetensors."
        )
    try:
        state = read_tensors(path)
    except Exception as error:  # torch and safetensors raise many kinds for foreign files
        raise UserError(f"{path} is no checkpoint that can be read without running code from it ({str(error)[:200]}).") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict: expected tensors by name, bare or under 'state_dict'.")
    return {name.removeprefix("module."): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def read_tensors(path: Path):
    if path.suffix == ".safetensors":
        return load_file(path)
    if is_torchscript(path):
        return torch.jit.load(path, map_location="cpu").state_dict()
    return torch.load(path, map_location="cpu", weights_only=True)


def is_torchscript(path: Path) -> bool:
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def load_state(model: CLIP, state: dict, path: Path) -> None:
    """Load, or refuse with the exact list of missing, unexpected and misshapen keys."""
    wanted = model.state_dict()
    state = {name: tensor.float() for name, tensor in state.items() if name not in INTEGERS}
    found = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "misshapen": [
            f"{name} is {list(state[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(found.values()):
        lists = "; ".join(f"{word}: {', '.join(names)}" for word, names in found.items() if names)
        raise UserError(f"{path} does not fit teacher.pretrained.model. {lists}.")
    model.load_state_dict(state)
