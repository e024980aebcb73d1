"""Read weight files of other origin: tensors and plain values only. No code in such a file is ever run."""

import argparse
import re
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from milan.core.errors import UserError


def read_foreign(path: Path):
    """Load a .safetensors file, or a pickle of tensors and plain values (.pth, .pt), on the CPU, without running code in it.

    Raises UserError when it cannot be read, is damaged, is a program, is compressed, or holds anything else."""
    require_file(path)
    if is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript archive, which is a program, and is not opened. Give the same weights as safetensors "
            "(OpenAI's CLIP: open_clip_model.safetensors, Hugging Face: timm/vit_base_patch16_clip_224.openai). A teacher's is "
            "opened when the recipe names it: set teacher.pretrained.sha256 to the digest that its publisher gives."
        )
    refuse_compressed(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and (changed := zipfile.ZipFile(path).testzip()):  # torch.load compares no CRC-32
            raise UserError(
                f"{path} is damaged: {changed} in it has another CRC-32 than was written. Download or write it again."
            )
        # The releases of MAE, MILAN, DINO and SLIP contain their command line as a Namespace, which holds plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds for foreign files
        raise refusal(path, error) from None


def require_file(path: Path) -> None:
    """Raise UserError unless path is a file that can be opened."""
    try:
        if path.is_file():
            return path.open("rb").close()
        fault = "is a folder" if path.is_dir() else "is no file"
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    raise UserError(f"{path} {fault}. Give the path of a checkpoint (.pth, .pt or .safetensors) that you may read.")


def is_torchscript(path: Path) -> bool:
    """Return whether a file is a TorchScript archive: a zip with a constants.pkl, which torch.save does not write."""
    return any(member.filename.endswith("constants.pkl") for member in members(path))


def refuse_compressed(path: Path) -> None:
    """Raise UserError for a zip that declares more bytes than it has: torch would unpack it, whatever the size."""
    size = sum(member.file_size for member in members(path))
    if size > path.stat().st_size:
        raise UserError(
            f"{path} is compressed, to be unpacked to {size:,} bytes, and a checkpoint of torch.save is not. It is not opened; "
            "write it again with torch.save(model.state_dict(), file)."
        )


def members(path: Path) -> list[zipfile.ZipInfo]:
    """Return the members of a checkpoint that is a zip; none of any other file."""
    if path.suffix == ".safetensors":
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception:  # no zip, or a damaged one, which raises many kinds: torch.load, called next, refuses it
        return []


def refusal(path: Path, error: Exception) -> UserError:
    """Return the error for a file that torch or safetensors refused: torch's own message recommends weights_only=False."""
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
    """Raise UserError naming the first tensor with which a model cannot compute.

    path: origin of the weights, for the error."""
    for name, tensor in weights.items():
        if fault := fault_of(tensor):
            raise UserError(
                f"{path}: {name} {fault}. Expected: dense tensors of finite floating-point numbers. Fetch or save it again."
            )


def fault_of(tensor: torch.Tensor) -> str | None:
    """Return why a tensor is no dense tensor of finite floating-point numbers, or None where it is one."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return "is sparse or nested"
    if tensor.is_meta:
        return "has a shape and no values (a meta tensor)"
    if not tensor.is_floating_point():
        return f"is {str(tensor.dtype).removeprefix('torch.')}"
    if not tensor.float().isfinite().all():  # as the float32 that it becomes: isfinite takes no float8
        return "holds values that are no finite numbers (its training had broken down, perhaps)"
    return None
