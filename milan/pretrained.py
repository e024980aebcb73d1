"""A released CLIP as the teacher: by open_clip name and tag, or from a local file; digest verified."""

from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file

from milan.clip import save_teacher
from milan.errors import UserError
from milan.files import file_digest
from milan.params import Pretrained


def fetch_teacher(source: Pretrained, folder: Path) -> None:
    """Write the released model into folder as teacher.safetensors and teacher.json."""
    config = open_clip.get_model_config(source.model)
    if config is None:
        known = ", ".join(name for name in open_clip.list_models() if name.startswith("ViT"))
        raise UserError(f"teacher.pretrained.model {source.model!r} is unknown to open_clip. It knows {known}.")
    path = Path(source.file) if source.file else download(source)
    verify(path, source.sha256)
    model = CLIP(**{k: v for k, v in config.items() if k in CLIP.__init__.__code__.co_varnames})
    load_state(model, read_state(path), path)
    save_teacher(folder, model, {"kind": "open_clip", "name": source.model, "model": config})


def download(source: Pretrained) -> Path:
    """The tag's weights from open_clip's hub, or its cache when they lie there."""
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(source.model, source.tag)))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"The weights {source.model} / {source.tag} are neither in the cache nor to be had from the hub "
            f"({type(error).__name__}). Fetch them elsewhere and set teacher.pretrained.file."
        ) from None


def verify(path: Path, sha256: str | None) -> None:
    if not path.exists():
        raise UserError(f"teacher.pretrained.file {path} does not exist.")
    if sha256 and file_digest(path) != sha256.lower():
        raise UserError(f"{path} has SHA-256 {file_digest(path)}, the recipe (teacher.pretrained.sha256) says {sha256}: fetch it again.")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """State dict of a safetensors file, an OpenAI TorchScript archive or a plain checkpoint; no pickled code runs."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.jit.load(path, map_location="cpu").state_dict() if is_torchscript(path) else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign files
        raise UserError(f"{path} is no checkpoint that can be read without running code from it ({str(error)[:200]}).") from None
    state = state.get("state_dict", state)
    return {name.removeprefix("module."): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def is_torchscript(path: Path) -> bool:
    import zipfile

    return zipfile.is_zipfile(path) and any(name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist())


def load_state(model: CLIP, state: dict, path: Path) -> None:
    wanted = model.state_dict()
    state = {k: v.float() for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    misshapen = [f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in wanted.items() if k in state and state[k].shape != v.shape]
    if missing or unexpected or misshapen:
        raise UserError(f"{path} does not fit the model. Missing: {missing or 'none'}. Unexpected: {unexpected or 'none'}. Misshapen: {misshapen or 'none'}.")
    model.load_state_dict(state)


