"""Read, write and convert checkpoints in the layouts of the official MILAN and MAE releases, mmpretrain / mmselfsup, OpenAI's
CLIP and timm; read Hugging Face's ViTMAE; write ViTDet's backbone. Tensors are only renamed and reshaped: a round trip gives
back the same bits.

    python -m milan.convert IN OUT --to timm|official|mmpretrain|openai|vitdet [--decoder FILE] [--take NAME]

Every conversion goes through the official layout, in which the encoder has timm's names:

    official     {"model": ...} .pth      cls_token, blocks.0.attn.qkv.weight, ..., decoder_embed.weight, ...
    mmpretrain   {"state_dict": ...} .pth backbone.layers.0.attn.qkv.weight, ..., neck.decoder_embed.weight, ...
    openai       state dict .pth          visual.transformer.resblocks.0.attn.in_proj_weight, ... (a CLIP, no MILAN)
    timm         .safetensors             the encoder alone, or the image tower of a CLIP
    vitdet       {"model": ...} .pth      the encoder without class token and final norm, for detectron2 and mmdetection

Prefixes that others' programs put before the names (module., _orig_mod., model., encoder., backbone.) are taken off. Of a file
with several sets of weights (model, model_ema) --take names the one to read.

Position embeddings are copied, never computed again: mmpretrain's table has its halves swapped.
"""

import argparse
import io
import math
import shlex
import sys
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from milan.convert import layouts
from milan.convert.layouts import State, depth, split_decoder
from milan.core.errors import UserError, listed
from milan.core.files import write_whole
from milan.core.validation import validate
from milan.method.decoder import DECODERS
from milan.method.encoder import build_vit
from milan.params import Model, TransformerSize
from milan.training import foreign, weights

NO_DECODER = TransformerSize(4, 1, 1)  # the smallest, where only the encoder of a model counts
CLIP_INTEGERS = ("input_resolution", "context_length", "vocab_size")


def read_encoder(path: str | Path, model: Model) -> State:
    """Read the encoder of a checkpoint in any layout, under timm's names, for a ViT of the recipe's size.

    Raises UserError for a CLIP, for a fine-tuned classifier, and with the list of missing, unexpected and misshapen keys or the
    tensor that is no weights."""
    state = read(path)
    if layouts.is_clip(state):
        raise UserError(f"{path} is a CLIP checkpoint: a teacher, no student. Set teacher.pretrained.file to it instead.")
    encoder, _ = split_decoder(state)
    refuse_classifier(encoder, path)
    check(encoder, encoder_shapes(model), path)
    foreign.check_weights(encoder, path)
    return encoder


def read(path: str | Path, take: str | None = None) -> State:
    """Read all weights of a checkpoint under official names; a CLIP keeps its own. What is taken off or left out is printed.

    take: the set of weights to read, where the file holds several, or the prefix of its names ("student."). Raises UserError
    where it is needed and not given."""
    of_names = take is not None and take.endswith(".")
    state = load(Path(path), None if of_names else take)
    if not layouts.is_clip(state):
        prefix = take if of_names else None
        state = layouts.take_off(chosen(layouts.prefixes_of(state, prefix), prefix, path), state, path)
        state = layouts.without_wrappers(state, path)
    if layouts.is_clip(state):
        return state
    tell_left_out([name for name in state if name.startswith(layouts.OTHER_PARTS)], path)
    if layouts.is_huggingface(state):
        return layouts.from_huggingface(state, path)
    return layouts.from_mmpretrain(state, path) if any(name.startswith("backbone.") for name in state) else state


def tell_left_out(names: list[str], path: str | Path) -> None:
    """Print which heads, teachers and preprocessors are left out."""
    if names:
        head = any(name.endswith(".weight") and name.startswith(("head.", "fc.", "classifier.")) for name in names)
        labels = " A classifier's head: the encoder may have seen labels." if head else ""
        print(f"{path}: {len(names)} tensors of other parts are left out: {listed(names)}.{labels}", flush=True)


def refuse_classifier(encoder: State, path: str | Path) -> None:
    """Raise UserError for a classifier that was fine-tuned with mean pooling (MAE's models_vit.py with global_pool): it has a
    new norm behind the pool, and no encoder's own."""
    if "fc_norm.weight" in encoder and "norm.weight" not in encoder:
        raise UserError(
            f"{path} is a classifier fine-tuned with mean pooling: it has fc_norm in place of the encoder's norm. Give the "
            "pretrained checkpoint that it was fine-tuned from (MAE's: mae_pretrain_vit_base.pth)."
        )


def load(path: Path, take: str | None = None) -> State:
    """Read the state dict of a .safetensors file or a pickle; no code in the file is run. Raises UserError for any other
    file, and where it holds several sets of weights of which `take` names none."""
    return unwrap(foreign.read_foreign(path), path, take)


def unwrap(content, path: Path, take: str | None = None) -> State:
    """Return the state dict of a checkpoint: {"model": ...} (official, MAE), {"state_dict": ...} (mmpretrain), under another
    name, or bare. Raises UserError when it holds none, several of which `take` names none, or anything but tensors by name."""
    sets = weight_sets(content)
    encoders = {name: weights for name, weights in sets.items() if has_encoder(weights)} or sets
    if not sets:
        raise UserError(f"{path} holds no state dict: expected tensors by name, bare or under 'model' or 'state_dict'.")
    content = encoders[chosen(list(encoders), take, path)]
    state = {name: value for name, value in content.items() if name not in CLIP_INTEGERS}
    strange = [str(name) for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise UserError(f"{path}: not tensors by name: {listed(strange)}. Save the model's state dict alone.")
    return state


def weight_sets(content, name: str = "", deeper: int = 2) -> dict[str, dict]:
    """Return the dicts with tensors in a checkpoint, by the dotted name of their place; "" is the checkpoint itself."""
    if not isinstance(content, dict):
        return {}
    if any(isinstance(value, Tensor) for value in content.values()):
        return {name: content}
    inner = content.items() if deeper else ()
    parts = (weight_sets(value, f"{name}.{key}".removeprefix("."), deeper - 1) for key, value in inner)
    return {place: weights for part in parts for place, weights in part.items()}


def has_encoder(weights: dict) -> bool:
    """Return whether one of the tensors is a ViT's class token or position embedding."""
    ends = ("cls_token", "class_embedding", "pos_embed", "position_embeddings")
    return any(isinstance(name, str) and name.endswith(ends) for name in weights)


def chosen(names: list[str], take: str | None, path: str | Path) -> str:
    """Return the one name, or the one that is taken. Raises UserError that asks for the choice, or names the others."""
    if take is not None and take not in names:
        raise UserError(f"{path} holds no weights under {take}; it has {listed([name or 'its own' for name in names])}.")
    if take is None and len(names) > 1:
        raise UserError(
            f"{path} holds several sets of weights: {listed(names)}. Say which: python -m milan.convert {shlex.quote(str(path))} "
            f"OUT.pth --to official --take {names[-1]}, and give OUT.pth."
        )
    return names[0] if take is None else take


def encoder_shapes(model: Model) -> dict[str, torch.Size]:
    """Return the shapes of an encoder of these sizes, under timm's names."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build_vit(model).state_dict().items()}


def sizes_of(encoder: State, path: str | Path, num_heads: int = 1, decoder: TransformerSize = NO_DECODER) -> Model:
    """Return the sizes that an encoder's tensors have. They do not tell the number of heads, nor the decoder, which are given.

    Raises UserError where a tensor that tells a size is missing or misshapen, or the sizes do not go together."""
    require_vit(encoder, {"pos_embed": 3, "patch_embed.proj.weight": 4}, path)
    (_, rows, width), (*_, patch) = encoder["pos_embed"].shape, encoder["patch_embed.proj.weight"].shape
    grid = math.isqrt(max(rows - 1, 1))
    tower = {"embed_dim": width, "depth": depth(encoder, "blocks."), "num_heads": num_heads}
    size = {"name": "checkpoint", "image_size": grid * patch, "patch_size": patch, "encoder": tower}
    return validate(Model, {**size, "decoder": decoder}, f"{path} holds a model that cannot be built here")


def decoder_kind(decoder: State) -> str:
    """Return which of DECODERS the tensors are of: only the prompting decoder has queries of their own."""
    return "prompt" if any(".attn.kv." in name for name in decoder) else "mae"


def decoder_shapes(decoder: State, encoder_dim: int, grid: int) -> dict[str, torch.Size]:
    """Return the shapes of a complete decoder with the kind, depth and widths of this one; a width is 4 where the tensor that
    gives it is missing."""
    rows = {name: len(tensor) for name, tensor in decoder.items() if tensor.ndim}
    dim, out_dim = rows.get("decoder_embed.weight", 4), rows.get("decoder_pred.weight", 4)
    with torch.device("meta"):
        complete = DECODERS[decoder_kind(decoder)](encoder_dim, dim, depth(decoder, "decoder_blocks."), 1, grid, out_dim)
    return {name: tensor.shape for name, tensor in complete.state_dict().items()}


def clip_shapes(tower: State, path: str | Path) -> dict[str, torch.Size]:
    """Return the shapes of a complete image tower with the widths and depth of this one, under timm's names. Raises UserError
    where a tensor that gives them is missing or misshapen."""
    require_vit(tower, {"patch_embed.proj.weight": 4, "pos_embed": 3, "head.weight": 2}, path)
    (width, _, _, patch), (_, rows, _) = tower["patch_embed.proj.weight"].shape, tower["pos_embed"].shape
    size = {"img_size": math.isqrt(rows - 1) * patch, "patch_size": patch, "embed_dim": width}
    with torch.device("meta"):
        complete = VisionTransformer(
            **size, depth=depth(tower, "blocks."), num_heads=1, num_classes=len(tower["head.weight"]), pre_norm=True
        )
    return {name: tensor.shape for name, tensor in complete.state_dict().items()}


def require_vit(state: State, dimensions: dict[str, int], path: str | Path) -> None:
    """Raise UserError unless a state dict holds blocks and, with so many dimensions, the tensors that give a ViT's sizes."""
    layouts.require(state, dimensions, path)
    if not depth(state, "blocks."):
        raise UserError(f"{path} holds no ViT: it has no blocks.* (in timm's names). It is no complete model; fetch it again.")


def check(state: State, expected: dict[str, torch.Size], where: str | Path) -> None:
    """Raise UserError that names the missing, unexpected and misshapen keys of a state dict, if it has any."""
    if misfits := weights.misfits(state, expected):
        raise UserError(f"{where} does not fit the model. {misfits}. Give a checkpoint of this size, or set `model` to its size.")


def check_complete(encoder: State, decoder: State, path: str | Path, decoder_path: str | Path) -> None:
    """Raise UserError unless a MILAN or MAE checkpoint is a complete model of the sizes that its own tensors have."""
    try:
        model = sizes_of(encoder, path)
        check(encoder, encoder_shapes(model), path)
        if decoder:
            check(decoder, decoder_shapes(decoder, model.encoder.embed_dim, model.grid), decoder_path)
    except ValueError as error:
        raise UserError(f"{path} holds a model that cannot be built here: {error}.") from None
    foreign.check_weights(encoder, path)
    foreign.check_weights(decoder, decoder_path)


def convert(source: Path, target: Path, layout: str, decoder_file: Path | None = None, take: str | None = None) -> str:
    """Write `source` as `target` in another layout, and return a line that describes the result.

    take: the set of weights to read, where `source` holds several. decoder_file: with layout timm the file to write the
    decoder to; with the others the file to read it from when `source` is an encoder alone. Raises UserError for a source, a layout or a
    file name that does not fit."""
    suffixes = (".safetensors",) if layout == "timm" else (".pth", ".pt")
    if target.suffix not in suffixes:
        raise UserError(f"{target}: the {layout} layout is written as {' or '.join(suffixes)}; rename OUT.")
    if decoder_file and layout == "vitdet":
        raise UserError(f"{target}: the vitdet layout has no decoder; leave out --decoder.")
    if decoder_file and layout == "timm" and (decoder_file.suffix not in suffixes or decoder_file == target):
        raise UserError(f"{decoder_file}: the decoder is written as a .safetensors of its own; rename it.")
    state = read(source, take)
    if layouts.is_clip(state):
        return convert_clip(state, target, layout, source)
    if layout == "openai":
        raise UserError(f"{source} is no CLIP, so it has no openai layout; choose timm, official or mmpretrain.")
    encoder, decoder = split_decoder(state)
    refuse_classifier(encoder, source)
    decoder_source = source
    if decoder_file and bool(decoder) != (layout == "timm"):
        raise UserError(f"{source} {'already has a' if decoder else 'has no'} decoder; leave out --decoder.")
    if decoder_file and layout != "timm":
        decoder_source, decoder = decoder_file, read_decoder(decoder_file)
    check_complete(encoder, decoder, source, decoder_source)
    return write(encoder, decoder, target, layout, decoder_file)


def read_decoder(path: Path) -> State:
    """Read the decoder of a checkpoint. Raises UserError when it has none."""
    _, decoder = split_decoder(read(path))
    if not decoder:
        raise UserError(
            f"{path} holds no decoder tensors (decoder_*, mask_token): give --decoder the file that it was written to."
        )
    return decoder


def write(encoder: State, decoder: State, target: Path, layout: str, decoder_file: Path | None) -> str:
    """Write encoder and decoder in a layout, and return a line that describes the result."""
    if layout == "vitdet":
        backbone = layouts.to_vitdet(encoder)
        save_pth(target, {"model": backbone})
        return f"{target}: {len(backbone)} tensors of ViTDet's backbone, which has no class token and no final norm"
    summary = f"{target}: {len(encoder)} encoder tensors"
    if layout != "timm":
        state = {**encoder, **decoder}
        save_pth(target, {"model": state} if layout == "official" else {"state_dict": layouts.to_mmpretrain(state)})
        return f"{summary}, {len(decoder)} decoder tensors"
    if decoder_file:  # before OUT, so that OUT exists only once all is written
        weights.save_weights(decoder_file, decoder, format="pt")
    weights.save_weights(target, encoder, format="pt")
    if decoder_file:
        return f"{summary}; {decoder_file}: {len(decoder)} decoder tensors"
    return summary + (f" ({len(decoder)} decoder tensors left out; --decoder FILE keeps them)" if decoder else "")


def convert_clip(state: State, target: Path, layout: str, source: Path) -> str:
    """Write a CLIP in timm's layout (the image tower alone) or OpenAI's, and return a line that describes the result."""
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
    """Write content as torch.save does, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m milan.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="IN", help="a .pth, .pt or .safetensors file in any of the layouts")
    parser.add_argument("target", type=Path, metavar="OUT", help="the file to write")
    parser.add_argument("--to", required=True, choices=("timm", "official", "mmpretrain", "openai", "vitdet"), dest="layout")
    parser.add_argument("--decoder", type=Path, metavar="FILE", dest="decoder_file", help="the decoder's own .safetensors")
    parser.add_argument("--take", metavar="NAME", help="the set of weights to read, such as model_ema, where IN holds several")
    try:
        print(convert(**vars(parser.parse_args(arguments))))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:  # from writing; a file that cannot be read is a UserError
        where = error.filename2 or error.filename
        print(f"error: {where}: {error.strerror}. Give the path of a file in a folder that you may write to.", file=sys.stderr)
        return 1
    return 0
