"""Weights in other people's layouts: the official MILAN and MAE releases, mmpretrain / mmselfsup, OpenAI's CLIP,
timm. Reading, writing and converting only rename and reshape: a round trip gives back the same bits.

    python -m milan.convert.interop convert IN OUT --to timm|official|mmpretrain|openai [--decoder FILE]

The common tongue is the official one, in which the encoder's names are timm's own:

    official     {"model": ...} .pth      cls_token, blocks.0.attn.qkv.weight, ..., decoder_embed.weight, ...
    mmpretrain   {"state_dict": ...} .pth backbone.layers.0.attn.qkv.weight, ..., neck.decoder_embed.weight, ...
    openai       state dict .pth          visual.transformer.resblocks.0.attn.in_proj_weight, ... (a CLIP, no MILAN)
    timm         .safetensors             the encoder alone, or the image tower of a CLIP

Position embeddings are carried over, never drawn anew: mmpretrain's table has its halves swapped.
"""

import argparse
import io
import math
import sys
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from milan.convert import layouts
from milan.convert.layouts import State, depth, split
from milan.core.errors import UserError
from milan.core.files import write_whole
from milan.method.decoder import DECODERS
from milan.method.encoder import build_vit
from milan.params import Model, TransformerSize
from milan.training import foreign, weights

CLIP_INTEGERS = ("input_resolution", "context_length", "vocab_size")


def read_encoder(path: str | Path, model: Model) -> State:
    """The encoder of a checkpoint in any layout, under timm's names, for a ViT of the recipe's size.

    Raises UserError with the exact list of missing, unexpected and misshapen keys."""
    state = read(path)
    if layouts.is_clip(state):
        raise UserError(f"{path} is a CLIP checkpoint: a teacher, no student. Name it under teacher.pretrained.file instead.")
    encoder, _ = split(state)
    check(encoder, encoder_shapes(model), path)
    foreign.check_weights(encoder, path)
    return encoder


def read(path: str | Path) -> State:
    """All weights of a checkpoint under official names (a CLIP's stay as they are)."""
    state = load(Path(path))
    return layouts.from_mmpretrain(state, path) if any(name.startswith("backbone.") for name in state) else state


def load(path: Path) -> State:
    """Tensors of a .safetensors file or of a pickle, unwrapped; no code in the file is ever run."""
    content = foreign.read_foreign(path)
    return content if path.suffix == ".safetensors" else unwrap(content, path)


def unwrap(content, path: Path) -> State:
    """The state dict inside {"model": ...} (official, MAE), {"state_dict": ...} (mmpretrain), or bare."""
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict: expected tensors by name, bare or under 'model' or 'state_dict'.")
    state = {name: value for name, value in content.items() if name not in CLIP_INTEGERS}
    strange = [str(name) for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise UserError(f"{path}: not tensors by name: {', '.join(strange)}. Save the model's state dict alone.")
    return state


def encoder_shapes(model: Model) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build_vit(model).state_dict().items()}


def decoder_shapes(decoder: State, encoder_dim: int, grid: int) -> dict[str, torch.Size]:
    """Of a whole decoder with this one's kind, depth and widths (4 where the tensor that tells is missing)."""
    kind = "prompt" if any(".attn.kv." in name for name in decoder) else "mae"
    known = {name: len(tensor) for name, tensor in decoder.items() if tensor.ndim}
    dim, out_dim = known.get("decoder_embed.weight", 4), known.get("decoder_pred.weight", 4)
    with torch.device("meta"):
        whole = DECODERS[kind](encoder_dim, dim, depth(decoder, "decoder_blocks."), 1, grid, out_dim)
    return {name: tensor.shape for name, tensor in whole.state_dict().items()}


def clip_shapes(tower: State, path: str | Path) -> dict[str, torch.Size]:
    """Of a whole image tower with this one's widths and depth, in timm's names."""
    need_vit(tower, {"patch_embed.proj.weight": 4, "pos_embed": 3, "head.weight": 2}, path)
    (width, _, _, patch), (_, rows, _) = tower["patch_embed.proj.weight"].shape, tower["pos_embed"].shape
    size = {"img_size": math.isqrt(rows - 1) * patch, "patch_size": patch, "embed_dim": width}
    with torch.device("meta"):
        whole = VisionTransformer(
            **size, depth=depth(tower, "blocks."), num_heads=1, num_classes=len(tower["head.weight"]), pre_norm=True
        )
    return {name: tensor.shape for name, tensor in whole.state_dict().items()}


def need_vit(state: State, dimensions: dict[str, int], path: str | Path) -> None:
    """Raises UserError unless what tells a ViT's sizes is there."""
    layouts.need(state, dimensions, path)
    if not depth(state, "blocks."):
        raise UserError(f"{path} holds no ViT: it has no blocks.* (in timm's names). It is no whole model; fetch it again.")


def check(state: State, expected: dict[str, torch.Size], where: str | Path) -> None:
    """Refuse a state dict with missing, unexpected or misshapen keys, naming each."""
    if found := weights.misfits(state, expected):
        raise UserError(f"{where} does not fit the model. {found}. Give a checkpoint of this size, or set `model` to its size.")


def check_whole(encoder: State, decoder: State, path: str | Path, decoder_path: str | Path) -> None:
    """Refuse a MILAN or MAE checkpoint that is not complete by its own measure."""
    need_vit(encoder, {"pos_embed": 3, "patch_embed.proj.weight": 4}, path)
    (_, rows, width), (*_, patch) = encoder["pos_embed"].shape, encoder["patch_embed.proj.weight"].shape
    grid = math.isqrt(max(rows - 1, 1))
    try:
        tower = TransformerSize(width, depth(encoder, "blocks."), 1)
        check(encoder, encoder_shapes(Model("checkpoint", grid * patch, patch, tower, tower)), path)
        if decoder:
            check(decoder, decoder_shapes(decoder, width, grid), decoder_path)
    except ValueError as error:
        raise UserError(f"{path} holds a model that cannot be built here: {error}.") from None
    foreign.check_weights(encoder, path)
    foreign.check_weights(decoder, decoder_path)


def convert(source: Path, target: Path, layout: str, decoder_file: Path | None = None) -> str:
    """Write `source` as `target` in another layout; says what was written. With layout timm the decoder goes to
    `decoder_file`; with the others it comes from there when `source` is an encoder alone."""
    suffixes = (".safetensors",) if layout == "timm" else (".pth", ".pt")
    if target.suffix not in suffixes:
        raise UserError(f"{target}: the {layout} layout is written as {' or '.join(suffixes)}; rename OUT.")
    if decoder_file and layout == "timm" and (decoder_file.suffix not in suffixes or decoder_file == target):
        raise UserError(f"{decoder_file}: the decoder is written as a .safetensors of its own; rename it.")
    state = read(source)
    if layouts.is_clip(state):
        return convert_clip(state, target, layout, source)
    if layout == "openai":
        raise UserError(f"{source} is no CLIP, so it has no openai layout; choose timm, official or mmpretrain.")
    encoder, decoder = split(state)
    origin = source
    if decoder_file and bool(decoder) != (layout == "timm"):
        raise UserError(f"{source} {'already has a' if decoder else 'has no'} decoder; leave out --decoder.")
    if decoder_file and layout != "timm":
        origin, decoder = decoder_file, decoder_of(decoder_file)
    check_whole(encoder, decoder, source, origin)
    return write(encoder, decoder, target, layout, decoder_file)


def decoder_of(path: Path) -> State:
    """Raises UserError when there is none in the file."""
    decoder = split(read(path))[1]
    if not decoder:
        raise UserError(
            f"{path} holds no decoder tensors (decoder_*, mask_token): give --decoder the file that it was written to."
        )
    return decoder


def write(encoder: State, decoder: State, target: Path, layout: str, decoder_file: Path | None) -> str:
    said = f"{target}: {len(encoder)} encoder tensors"
    if layout != "timm":
        state = {**encoder, **decoder}
        save_pth(target, {"model": state} if layout == "official" else {"state_dict": layouts.to_mmpretrain(state)})
        return f"{said}, {len(decoder)} decoder tensors"
    if decoder_file:  # first: where OUT is, all is
        weights.save_weights(decoder_file, decoder, format="pt")
    weights.save_weights(target, encoder, format="pt")
    if decoder_file:
        return f"{said}; {decoder_file}: {len(decoder)} decoder tensors"
    return said + (f" ({len(decoder)} decoder tensors left out; --decoder FILE keeps them)" if decoder else "")


def convert_clip(state: State, target: Path, layout: str, source: Path) -> str:
    """A CLIP between OpenAI's and timm's layout; timm's has the image tower alone."""
    if layout not in ("timm", "openai"):
        raise UserError(f"{source} is a CLIP checkpoint, which has no {layout} layout; choose timm or openai.")
    in_timm = "norm_pre.weight" in state
    tower = state if in_timm else layouts.clip_to_timm(state, source)
    check(tower, clip_shapes(tower, source), source)
    foreign.check_weights(tower, source)
    if layout == "timm":
        weights.save_weights(target, tower, format="pt")
        return f"{target}: {len(tower)} tensors of a CLIP's image tower"
    save_pth(target, layouts.clip_from_timm(state, source) if in_timm else state)
    return f"{target}: a CLIP" + (", its image tower alone" if in_timm else "")


def save_pth(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m milan.convert.interop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = parser.add_subparsers(required=True).add_parser("convert", help="write a checkpoint in another layout")
    command.add_argument("source", type=Path, metavar="IN", help="a .pth, .pt or .safetensors file in any of the layouts")
    command.add_argument("target", type=Path, metavar="OUT", help="the file to write")
    command.add_argument("--to", required=True, choices=("timm", "official", "mmpretrain", "openai"), dest="layout")
    command.add_argument("--decoder", type=Path, metavar="FILE", dest="decoder_file", help="the decoder's own .safetensors")
    try:
        print(convert(**vars(parser.parse_args(arguments))))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:  # of writing: what cannot be read is a UserError
        where = error.filename2 or error.filename
        print(f"error: {where}: {error.strerror}. Give the path of a file in a folder that you may write to.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
