"""Parameter groups, optimizers, and the learning rate as a function of the fractional epoch."""

import math
from collections.abc import Callable, Iterable

import torch
from timm.optim import Lars
from torch import nn


def lr_at(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Return the rate at a fractional epoch: linear warm-up from 0, then half a cosine to min_lr (util/lr_sched.py of MAE and
    MILAN)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def poly_lr_at(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Return the rate at a fractional epoch: linear warm-up from 1e-6 of the rate, then linear to min_lr (mmsegmentation's MAE
    configuration: poly with power 1)."""
    decayed = min_lr + (lr - min_lr) * (1 - epoch / epochs)
    return decayed * (1e-6 + (1 - 1e-6) * epoch / warmup_epochs) if epoch < warmup_epochs else decayed


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every parameter group, times the group's lr_scale where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Return whether a parameter has weight decay: matrices and tokens have, biases and other one-dimensional parameters have not
    (timm 0.3.2's add_weight_decay as the release calls it: cls_token and mask_token decay)."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two groups of the trainable parameters: without and with weight decay."""
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": weight_decay}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[decays(name, parameter)]["params"].append(parameter)
    return groups


def vit_layer_id(name: str, depth: int) -> int:
    """Return the layer of a parameter of a ViT: 0 for embeddings, i + 1 for block i, depth + 1 for what follows the blocks
    (util/lr_decay.py of MAE)."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def layer_decay_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float,
    layer_id: Callable[[str], int],
    depth: int,
    no_decay: Iterable[str] = ("cls_token", "pos_embed"),
) -> list[dict]:
    """Group the trainable parameters by layer and weight decay; a layer's lr_scale is layer_decay ** (depth + 1 - layer).

    layer_id: parameter name -> layer, 0 to depth + 1. no_decay: parameters that have no weight decay beside the
    one-dimensional ones (util/lr_decay.py of MAE). A group also lists the names of its parameters."""
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = parameter.ndim > 1 and name not in no_decay
        layer = layer_id(name)
        scale = layer_decay ** (depth + 1 - layer)
        group = groups.setdefault(
            (layer, decay),
            {"params": [], "names": [], "lr_scale": scale, "weight_decay": weight_decay if decay else 0.0},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def adamw(groups: list[dict], betas: Iterable[float]) -> torch.optim.AdamW:
    """Return a fused AdamW (one kernel a step, on GPU and CPU). Its rate is 0 until set_lr sets it."""
    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(betas), fused=True)


def lars(model: nn.Module, momentum: float, weight_decay: float) -> Lars:
    """Return LARS: trust scaling and weight decay for matrices, neither for one-dimensional parameters (util/lars.py of MAE).
    Its rate is 0 until set_lr sets it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "always_adapt": True},
        {"params": vectors, "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=0.0, momentum=momentum, trust_coeff=0.001)
