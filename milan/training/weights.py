"""Weights as safetensors with a digest of their values, and the one function that loads a state dict into a model."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from milan.core.described import read_about
from milan.core.errors import UserError, listed
from milan.core.files import OTHER_DIGEST, damaged, write_whole

OTHER_MODEL = "Were the pretrained weights made with another model section of params.yaml?"


def save_weights(path: Path, weights: dict[str, torch.Tensor], **about: str | int) -> None:
    """Write weights as safetensors, whole or not at all. Equal weights give equal bytes. Raises UserError on a full disk
    and, before it writes, where a number is not finite.

    about: described in the file's metadata, with the digest of the weights, as JSON under the one key "milan" (safetensors
    writes several keys in random order)."""
    # Cloned, because safetensors refuses tensors that share memory, such as tied weights of a released checkpoint.
    layout = torch.contiguous_format
    tensors = {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in sorted(weights.items())}
    if broken := [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise UserError(f"{path} is not written, since not all its numbers are finite: {listed(broken)}.")
    metadata = json.dumps({**about, "sha256": weights_digest(tensors)}, sort_keys=True)
    write_whole(path, safetensors_bytes(tensors, {"milan": metadata}))


def weights_digest(weights: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256, in hex, of all names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Load a file that a stage wrote, on the CPU. Raises UserError when it is missing or when even one bit has changed."""
    if not Path(path).exists():
        raise UserError(f"{path} is missing: run `dvc repro`, which makes it, or `dvc pull`, which fetches it.")
    return checked_weights(path, damaged)


def checked_weights(path: Path, fault: Callable[[Path, str], UserError]) -> dict[str, torch.Tensor]:
    """Load a file that save_weights wrote, on the CPU. Raises fault(path, reason) when even one bit of a tensor has changed."""
    about = read_about(path, fault)
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise fault(path, f"it cannot be read ({str(error)[:200]})") from None
    if about.get("sha256") != weights_digest(weights):
        raise fault(path, OTHER_DIGEST)
    return weights


def load_into(module: nn.Module, path: Path) -> None:
    """Load the weights that a stage wrote into a model of the recipe's sizes. Raises UserError where they do not fit."""
    advice = "It was made by another recipe than params.yaml: run `dvc repro`, which makes it anew."
    load_state(module, load_weights(path), path, advice)


def load_state(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    source: str | Path,
    advice: str,
    new: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> None:
    """Load a whole state dict. Raises UserError naming the keys that are missing, unexpected or misshapen.

    source: origin of the state, and advice: how to mend a misfit, both for the error. new: parameters whose name contains one
    of these may be missing and keep their values. unused: keys that begin with one of these are ignored. A module on the
    meta device takes over the state's tensors."""
    given = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    expected = module.state_dict()
    if problems := misfits(given, {name: tensor.shape for name, tensor in expected.items()}, new):
        raise UserError(f"{source} does not fit the model. {problems}. {advice}")
    module.load_state_dict(given, strict=False, assign=any(tensor.is_meta for tensor in expected.values()))


def misfits(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], new: tuple[str, ...] = ()) -> str:
    """Name the missing, unexpected and misshapen keys of a state dict, the first ten of each kind; "" where it fits.

    new: keys that contain one of these may be missing."""
    problems = {
        "missing": [name for name in expected if name not in state and not any(part in name for part in new)],
        "unexpected": [name for name in state if name not in expected],
        "misshapen": [
            f"{name} is {list(state[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if name in state and state[name].shape != shape
        ],
    }
    return "; ".join(f"{kind}: {listed(names, most=10)}" for kind, names in problems.items() if names)
