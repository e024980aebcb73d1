"""What others call the same weights: names and shapes only, no files (those are interop's).

The common tongue is the official one of MAE and MILAN, in which the encoder's names are timm's own. Every
translation has its inverse, and gives back the same bits.
"""

from pathlib import Path

import torch
from torch import Tensor

from milan.core.errors import UserError

State = dict[str, Tensor]

# (mmpretrain, official) beginnings of names; read from left to right or from right to left, the first match counts.
BEGINNINGS = (
    ("neck.ln1.", "decoder_norm."),
    ("neck.mask_token", "mask_token"),
    ("neck.decoder_", "decoder_"),
    ("backbone.ln1.", "norm."),
    ("backbone.layers.", "blocks."),
    ("backbone.patch_embed.projection.", "patch_embed.proj."),
    ("backbone.pos_embed", "pos_embed"),
    ("backbone.cls_token", "cls_token"),
)
BLOCK_PARTS = ((".ln1.", ".norm1."), (".ln2.", ".norm2."), (".ffn.layers.0.0.", ".mlp.fc1."), (".ffn.layers.1.", ".mlp.fc2."))

# (openai, timm) names of the image tower: whole names, and parts of a block's.
CLIP_NAMES = (
    ("visual.class_embedding", "cls_token"),
    ("visual.positional_embedding", "pos_embed"),
    ("visual.conv1.weight", "patch_embed.proj.weight"),
    ("visual.proj", "head.weight"),
    ("visual.ln_pre.", "norm_pre."),
    ("visual.ln_post.", "norm."),
    ("visual.transformer.resblocks.", "blocks."),
)
CLIP_PARTS = (
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)

DECODER = ("decoder_", "mask_token")
# What full checkpoints hold beside the encoder and the decoder: heads, teachers, preprocessors.
ASIDE = ("head.", "target_generator.", "data_preprocessor.", "clip_model.", "teacher.")


def translate(name: str, beginnings, parts, source: int) -> str | None:
    """The name in the other column of the tables, or None; source 0 reads from left to right, 1 back."""
    for pair in beginnings:
        if name.startswith(pair[source]):
            name = pair[1 - source] + name[len(pair[source]) :]
            break
    else:
        return None
    for pair in parts:
        name = name.replace(pair[source], pair[1 - source])
    return name


def renamed(state: State, beginnings, parts, source: int, path: str | Path) -> State:
    """All keys translated; UserError with those that have no translation."""
    names = {name: translate(name, beginnings, parts, source) for name in state}
    unknown = [name for name, translated in names.items() if translated is None]
    if unknown:
        raise UserError(
            f"{path}: unexpected keys, which have no counterpart: {', '.join(unknown)}. Save the model's own weights alone."
        )
    return {translated: state[name] for name, translated in names.items()}


def from_mmpretrain(state: State, path: str | Path) -> State:
    """backbone.* and neck.* -> official names; what is known and no part of the model is left out."""
    return renamed({name: t for name, t in state.items() if not name.startswith(ASIDE)}, BEGINNINGS, BLOCK_PARTS, 0, path)


def to_mmpretrain(state: State) -> State:
    """Official names -> backbone.* and neck.*."""
    return renamed(state, BEGINNINGS, BLOCK_PARTS, 1, "The checkpoint")


def is_clip(state: State) -> bool:
    """OpenAI's layout of a CLIP, or timm's of its image tower."""
    return "norm_pre.weight" in state or any(name.startswith("visual.") for name in state)


def clip_to_timm(state: State, path: str | Path) -> State:
    """The image tower of an OpenAI CLIP -> timm's vit_*_clip_quickgelu_*, num_classes = the feature width.

    timm's classifier has a bias and CLIP's projection has none: it is written as zeros."""
    tower = renamed({n: t for n, t in state.items() if n.startswith("visual.")}, CLIP_NAMES, CLIP_PARTS, 0, path)
    need(tower, {"cls_token": 1, "pos_embed": 2, "head.weight": 2}, path)
    head = tower["head.weight"].T.contiguous()
    tables = {"cls_token": tower["cls_token"][None, None], "pos_embed": tower["pos_embed"][None]}
    return {**tower, **tables, "head.weight": head, "head.bias": torch.zeros_like(head[:, 0])}


def clip_from_timm(state: State, path: str | Path) -> State:
    """The inverse of clip_to_timm."""
    need(state, {"cls_token": 3, "pos_embed": 3, "head.weight": 2}, path)
    tables = {
        "cls_token": state["cls_token"][0, 0],
        "pos_embed": state["pos_embed"][0],
        "head.weight": state["head.weight"].T.contiguous(),
    }
    tower = {name: t for name, t in {**state, **tables}.items() if name != "head.bias"}
    return renamed(tower, CLIP_NAMES, CLIP_PARTS, 1, path)


def need(state: State, dimensions: dict[str, int], path: str | Path) -> None:
    """Raises UserError unless the state has these tensors, with so many dimensions and none of size zero."""
    missing = [name for name in dimensions if name not in state]
    if missing:
        raise UserError(f"{path}: missing keys: {', '.join(missing)} (in timm's names). It is no whole model; fetch it again.")
    for name, count in dimensions.items():
        if state[name].ndim != count or not all(state[name].shape):
            shape = list(state[name].shape)
            raise UserError(
                f"{path}: {name} (in timm's names) is {shape}, not {count} sizes above 0. It is no ViT; fetch it again."
            )


def depth(state: State, beginning: str) -> int:
    """Number of blocks: of different numbers that follow `beginning`."""
    return len({name[len(beginning) :].split(".")[0] for name in state if name.startswith(beginning)})


def split(state: State) -> tuple[State, State]:
    """(encoder, decoder) of official names; heads and teachers are set aside."""
    decoder = {name: tensor for name, tensor in state.items() if name.startswith(DECODER)}
    encoder = {name: tensor for name, tensor in state.items() if not name.startswith(DECODER + ASIDE)}
    return encoder, decoder
