"""Read strangers' weight files: tensors and plain values only; nothing in a file is ever run."""

import argparse
import re
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from milan.core.errors import UserError


def read_foreign(path: Path):
    """What a stranger's .safetensors file, or pickle of tensors and plain values, holds, on the CPU; no code in it is run.

    Raises UserError when it cannot be read, is damaged, or holds anything else."""
    require_file(path)
    if is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript archive, which is a program, and is not opened. Give the same weights as safetensors "
            "(OpenAI's CLIP: open_clip_model.safetensors, Hugging Face: timm/vit_base_patch16_clip_224.openai). A teacher's is "
            "opened when the recipe names it: set teacher.pretrained.sha256 to the digest that its publisher gives."
        )
    refuse_bomb(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and (changed := zipfile.ZipFile(path).testzip()):  # torch.load looks at no CRC-32
            raise UserError(
                f"{path} is damaged: {changed} in it has another CRC-32 than was written. Download or write it again."
            )
        # Releases of MAE, MILAN, DINO and SLIP carry their command line along; a Namespace is a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds for foreign files
        raise refusal(path, error) from None


def require_file(path: Path) -> None:
    """Raises UserError unless path is a file that can be opened."""
    try:
        if path.is_file():
            return path.open("rb").close()
        fault = "is a folder" if path.is_dir() else "is no file"
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    raise UserError(f"{path} {fault}. Give the path of a checkpoint (.pth, .pt or .safetensors) that you may read.")


def is_torchscript(path: Path) -> bool:
    return any(member.filename.endswith("constants.pkl") for member in members(path))


def refuse_bomb(path: Path) -> None:
    """Raises UserError for a zip that says that it unpacks to more than itself; torch would unpack it, whatever the size."""
    size = sum(member.file_size for member in members(path))
    if size > path.stat().st_size:
        raise UserError(
            f"{path} is compressed, to be unpacked to {size:,} bytes, and a checkpoint of torch.save is not. It is not opened; "
            "write it again with torch.save(model.state_dict(), file)."
        )


def members(path: Path) -> list[zipfile.ZipInfo]:
    """Of a checkpoint that is a zip; none of any other file."""
    if path.suffix == ".safetensors":
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception:  # no zip, or a damaged one, which raises many kinds: torch, asked next, opens no program either
        return []


def refusal(path: Path, error: Exception) -> UserError:
    """In our words: torch's own would send the reader to weights_only=False."""
    wanted = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class) (\S+)", str(error))
    if not wanted:
        return UserError(
            f"{path} is no checkpoint of plain tensors, or is damaged: expected safetensors (in a file so named) or a pickle "
            "(.pth, .pt) as torch.save(model.state_dict(), file) writes it. Nothing in it was run. Download or write it again."
        )
    return UserError(
        f"{path} is refused: as a pickle it wants to load {next(filter(None, wanted.groups()))}, and a pickle can run any code. "
        "Nothing in it was run. If you trust its origin, load it there and save the tensors alone: "
        "torch.save({'model': model.state_dict()}, file)."
    )


def check_weights(weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raises UserError that names the first tensor of strange weights with which a model cannot compute."""
    for name, tensor in weights.items():
        if fault := unfit(tensor):
            raise UserError(
                f"{path}: {name} {fault}. Expected: dense tensors of finite floating-point numbers. Fetch or save it again."
            )


def unfit(tensor: torch.Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.is_nested:
        return "is sparse or nested"
    if tensor.is_meta:
        return "has a shape and no values (a meta tensor)"
    if not tensor.is_floating_point():
        return f"is {str(tensor.dtype).removeprefix('torch.')}"
    if not tensor.float().isfinite().all():  # as the float32 that it will be: isfinite knows no float8
        return "holds values that are no finite numbers (its training had broken down, perhaps)"
    return None
