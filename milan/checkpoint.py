"""Weights as safetensors, those of strangers' files, and the resumable state of a training run.

The state lives outside DVC's outs, in .scratch/<stage>-<fingerprint>/: DVC deletes outs before a run. A killed
run with the same fingerprint continues from it and ends in the same bytes; another recipe starts afresh.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import socket
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from milan.code import code_digest
from milan.errors import UserError
from milan.files import OTHER_DIGEST, SCRATCH, damaged, fingerprint, write_whole


def save_weights(path: Path, weights: dict[str, torch.Tensor], **about: str | int) -> None:
    """safetensors, with `about` and the weights' digest as JSON under the metadata key "milan"; equal weights give equal
    bytes (one key, because safetensors writes several in random order)."""
    # Cloned, because safetensors refuses tensors that share memory, as tied ones of a stranger's file do.
    plain = torch.contiguous_format
    tensors = {name: tensor.detach().cpu().clone(memory_format=plain) for name, tensor in sorted(weights.items())}
    about = {**about, "sha256": weights_digest(tensors)}
    write_whole(path, safetensors_bytes(tensors, {"milan": json.dumps(about, sort_keys=True)}))


def weights_digest(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that a stage wrote, on the CPU. Raises UserError when it is missing or damaged, be it by a
    bit."""
    try:
        with safe_open(path, "pt") as file:
            about, weights = json.loads((file.metadata() or {}).get("milan", "{}")), load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro`, which makes it, or `dvc pull`, which fetches it.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, f"it cannot be read ({error})") from None
    if not isinstance(about, dict) or about.get("sha256") != weights_digest(weights):
        raise damaged(path, OTHER_DIGEST)
    return weights


def load_into(module: nn.Module, path: Path) -> None:
    """Give a model of the recipe's sizes the weights that a stage wrote. Raises UserError when they are of other sizes."""
    weights = load_weights(path)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} was made by another recipe than params.yaml ({why}). Run `dvc repro`, which makes it anew."
        ) from None


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


class Scratch:
    """The resumable state of one run: the last two saves, each with its digest."""

    def __init__(self, name: str, recipe: str):
        """name: the stage's; recipe: its fingerprint. Edited code does not continue an older run's state."""
        self.folder = SCRATCH / f"{name}-{fingerprint(recipe, code_digest())}"

    def saves(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.pt"), reverse=True)

    def save(self, step: int, state: dict) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        try:
            write_whole(self.folder / f"state-{step:09d}.pt", hashlib.sha256(data).digest() + data)
        except UserError as error:
            raise UserError(f"{error} This was the state of step {step}; {self.kept()}.") from None
        for old in self.saves()[2:]:
            old.unlink(missing_ok=True)

    def kept(self) -> str:
        """What there is to continue from, in words."""
        saves = self.saves()
        return f"the last good state is {saves[0]}" if saves else "no state had been saved yet"

    def newest(self) -> Path | None:
        """The newest state that is whole, or None; damaged ones are named and passed over."""
        for path in self.saves():
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                return path
            print(f"{path} is damaged (its digest does not match); falling back to the save before it.", file=sys.stderr)
        return None

    def read(self, path: Path, map_location: str | torch.device = "cpu") -> dict:
        try:
            return torch.load(io.BytesIO(path.read_bytes()[32:]), map_location=map_location, weights_only=True)
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing on {socket.gethostname()}: all nodes need this folder as one shared folder, {Path.cwd()}."
            ) from None
        except (OSError, torch.OutOfMemoryError):
            raise
        except Exception:  # torch raises many kinds for what it did not write itself
            raise UserError(
                f"{path} is refused: it holds other things than tensors and plain values. Nothing in it was run. Delete "
                f"{self.folder} and run again, which starts afresh."
            ) from None

    def load(self) -> dict | None:
        """The newest state that is whole, on the CPU."""
        path = self.newest()
        return self.read(path) if path else None

    def clean(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
