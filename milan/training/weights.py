"""Weights as safetensors, those of strangers' files, and the resumable state of a training run.

The state lives outside DVC's outs, in .scratch/<stage>-<fingerprint>/: DVC deletes outs before a run. A killed
run with the same fingerprint continues from it and ends in the same bytes; another recipe starts afresh.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from milan.core.errors import UserError
from milan.core.files import OTHER_DIGEST, damaged, write_whole


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
