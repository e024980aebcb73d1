"""Translate state dicts between layouts: names and shapes only, no files (interop.py has those).

Every translation goes to or from the official names of MAE and MILAN, in which the encoder has timm's names. Each has an
inverse that gives back the same bits.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from milan.core.errors import UserError, listed

State = dict[str, Tensor]

# (mmpretrain, official) prefixes of names, translated in either direction; the first match counts.
PREFIXES = (
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

# (openai, timm) names of the image tower: prefixes, and parts of the names in a block.
CLIP_PREFIXES = (
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

# (Hugging Face's ViTMAE, official); query, key and value are three tensors there.
HF_PREFIXES = (
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("vit.encoder.layer.", "blocks."),
    ("vit.layernorm.", "norm."),
    ("decoder.mask_token", "mask_token"),
    ("decoder.decoder_layers.", "decoder_blocks."),
    ("decoder.decoder_", "decoder_"),
)
HF_PARTS = (
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.output.dense.", ".attn.proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)

DECODER = ("decoder_", "mask_token")
# Prefixes of other parts of full checkpoints: heads, teachers, preprocessors.
OTHER_PARTS = (
    *("head.", "fc.", "classifier.", "vit.pooler.", "pooler."),
    *("target_generator.", "data_preprocessor.", "clip_model.", "teacher."),
)
# What FSDP, activation checkpointing and torch.compile put into the middle of names, before the module that they wrap.
WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
# The class token in each layout, under which the wrapper's prefix stands: OpenAI, Hugging Face, mmpretrain, official and timm.
ANCHORS = ("visual.class_embedding", "vit.embeddings.cls_token", "embeddings.cls_token", "backbone.cls_token", "cls_token")


def prefixes_of(state: State, take: str | None) -> list[str]:
    """Return what stands before the names of an encoder, such as "module." or "": one prefix for each encoder in the state.

    take: the prefix that is asked for; only then may it be that of a teacher."""
    others = tuple(part for part in OTHER_PARTS if part != take)
    for anchor in ANCHORS:
        before = [name.removesuffix(anchor) for name in state if name.endswith(anchor) and not name.startswith(others)]
        before = [prefix for prefix in before if prefix == "" or prefix.endswith(".")]
        if anchor.startswith("backbone."):  # others than mmpretrain call their wrapper backbone, too
            before = [prefix for prefix in before if any(name.startswith(f"{prefix}backbone.layers.") for name in state)]
        if before:
            return sorted(before)
    return [""]


def take_off(prefix: str, state: State, path: str | Path) -> State:
    """Return the tensors whose names begin with a prefix, without it, and print what that leaves out."""
    if not prefix:
        return state
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    others = [name for name in state if not name.startswith(prefix)]
    left = f"; {len(others)} tensors without it are left out: {listed(others)}" if others else ""
    print(f"{path}: the prefix {prefix} is taken off {len(inner)} names{left}.", flush=True)
    return inner


def without_wrappers(state: State, path: str | Path) -> State:
    """Take the names of wrappers out of the middle of names, and print how many names had one."""
    wrapped = [name for name in state if WRAPPERS.search(name)]
    if wrapped:
        print(f"{path}: wrappers are taken out of {len(wrapped)} names: {listed(wrapped)}.", flush=True)
    return {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}


def translate(name: str, prefixes, parts, source: int) -> str | None:
    """Translate a name from column `source` (0 or 1) of the tables to the other column; None when no prefix matches."""
    for pair in prefixes:
        if name.startswith(pair[source]):
            name = pair[1 - source] + name[len(pair[source]) :]
            break
    else:
        return None
    for pair in parts:
        name = name.replace(pair[source], pair[1 - source])
    return name


def rename(state: State, prefixes, parts, source: int, path: str | Path) -> State:
    """Translate all keys of a state dict. Raises UserError that names the keys without a translation."""
    names = {name: translate(name, prefixes, parts, source) for name in state}
    unknown = [name for name, translated in names.items() if translated is None]
    if unknown:
        raise UserError(
            f"{path}: unexpected keys, which have no counterpart: {listed(unknown)}. Save the model's own weights alone."
        )
    return {translated: state[name] for name, translated in names.items()}


def from_mmpretrain(state: State, path: str | Path) -> State:
    """Translate mmpretrain's names (backbone.*, neck.*) to official ones. Heads, teachers and preprocessors are left out."""
    model = {name: tensor for name, tensor in state.items() if not name.startswith(OTHER_PARTS)}
    return rename(model, PREFIXES, BLOCK_PARTS, 0, path)


def is_huggingface(state: State) -> bool:
    """Return whether the names are those of Hugging Face's ViTMAE or ViT, with or without `vit.`."""
    return "vit.embeddings.cls_token" in state or "embeddings.cls_token" in state


def from_huggingface(state: State, path: str | Path) -> State:
    """Translate the names of Hugging Face's ViTMAE to official ones, and join query, key and value. Classifiers and poolers are
    left out."""
    model = {name: tensor for name, tensor in state.items() if not name.startswith(OTHER_PARTS)}
    if "embeddings.cls_token" in model:  # a ViTMAEModel alone
        model = {name if name.startswith("decoder.") else f"vit.{name}": tensor for name, tensor in model.items()}
    joined = {}
    for name, tensor in model.items():
        block, _, part = name.partition(".attention.attention.")
        kind = part.rpartition(".")[2]
        names = [f"{block}.attention.attention.{which}.{kind}" for which in ("query", "key", "value")]
        if name not in names or not all(other in model for other in names):
            joined[name] = tensor
        elif name == names[0]:
            joined[f"{block}.attn.qkv.{kind}"] = torch.cat([model[other] for other in names])
    return rename(joined, HF_PREFIXES, HF_PARTS, 0, path)


def to_mmpretrain(state: State) -> State:
    """Translate official names to mmpretrain's (backbone.*, neck.*)."""
    return rename(state, PREFIXES, BLOCK_PARTS, 1, "The checkpoint")


def to_vitdet(encoder: State) -> State:
    """Leave out what the backbone of ViTDet does not have: the class token and the final norm. The other names are the same in
    detectron2 (modeling/backbone/vit.py) and mmdetection (projects/ViTDet). Both expect the class token's row in pos_embed."""
    return {name: tensor for name, tensor in encoder.items() if not name.startswith(("cls_token", "norm."))}


def is_clip(state: State) -> bool:
    """Return whether the weights are a CLIP's, in OpenAI's layout, or its image tower's, in timm's."""
    return "norm_pre.weight" in state or any(name.startswith("visual.") for name in state)


def clip_to_timm(state: State, path: str | Path) -> State:
    """Translate the image tower of an OpenAI CLIP to timm's vit_*_clip_quickgelu_* with num_classes = the feature width.

    timm's classifier has a bias and CLIP's projection has none, so the bias is zeros. Raises UserError for unknown,
    missing or misshapen keys."""
    visual = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    tower = rename(visual, CLIP_PREFIXES, CLIP_PARTS, 0, path)
    require(tower, {"cls_token": 1, "pos_embed": 2, "head.weight": 2}, path)
    head = tower["head.weight"].T.contiguous()
    tables = {"cls_token": tower["cls_token"][None, None], "pos_embed": tower["pos_embed"][None]}
    return {**tower, **tables, "head.weight": head, "head.bias": torch.zeros_like(head[:, 0])}


def clip_from_timm(state: State, path: str | Path) -> State:
    """Translate an image tower from timm's layout to OpenAI's: the inverse of clip_to_timm."""
    require(state, {"cls_token": 3, "pos_embed": 3, "head.weight": 2}, path)
    tables = {
        "cls_token": state["cls_token"][0, 0],
        "pos_embed": state["pos_embed"][0],
        "head.weight": state["head.weight"].T.contiguous(),
    }
    tower = {name: tensor for name, tensor in {**state, **tables}.items() if name != "head.bias"}
    return rename(tower, CLIP_PREFIXES, CLIP_PARTS, 1, path)


def require(state: State, dimensions: dict[str, int], path: str | Path) -> None:
    """Raise UserError unless the state has these tensors, each with this number of dimensions and none of size zero."""
    missing = [name for name in dimensions if name not in state]
    if missing:
        raise UserError(
            f"{path}: missing keys: {listed(missing)} (in timm's names). It is no complete ViT in a layout that is "
            "read here (python -m milan.convert --help); fetch it again, or convert it."
        )
    for name, count in dimensions.items():
        if state[name].ndim != count or not all(state[name].shape):
            shape = list(state[name].shape)
            raise UserError(
                f"{path}: {name} (in timm's names) is {shape}, not {count} sizes above 0. It is no ViT; fetch it again."
            )


def depth(state: State, prefix: str) -> int:
    """Count the blocks of a state dict: the different numbers that follow `prefix`."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def split_decoder(state: State) -> tuple[State, State]:
    """Return (encoder, decoder) of a state dict under official names. Heads and teachers are left out."""
    decoder = {name: tensor for name, tensor in state.items() if name.startswith(DECODER)}
    encoder = {name: tensor for name, tensor in state.items() if not name.startswith(DECODER + OTHER_PARTS)}
    return encoder, decoder
