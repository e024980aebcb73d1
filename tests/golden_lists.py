"""Check the golden JSON files: parameter groups, names, and the recipe. Each check yields rows (what, error, allowed, note); the
error of a list is the number of entries that differ."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from milan import params
from milan.convert import layouts
from milan.method import model as pretraining
from milan.method.encoder import build_vit
from milan.method.pos_embed import sincos_pos_embed
from milan.training import optim
from tests.golden_cases import official

Rows = Iterator[tuple]
TINY = 16  # width of the models: groups and names depend only on the number of blocks


def count(what: str, differing: Iterable[str], of: int) -> tuple:
    differing = sorted(differing)
    return what, len(differing), 0, f"of {of}" + (f"; differ: {', '.join(differing[:8])}" if differing else "")


def tiny(depth: int, decoder_depth: int = 1) -> params.Model:
    return params.Model("golden", 4, 2, params.TransformerSize(TINY, depth, 1), params.TransformerSize(TINY, decoder_depth, 1))


def blocks(names: Iterable[str], beginning: str) -> int:
    return 1 + max(int(name.removeprefix(beginning).split(".")[0]) for name in names if name.startswith(beginning))


def finetune_groups(content: dict) -> Rows:
    """File E: rate scale and decay of every parameter of a fine-tuned ViT, and its parameter groups."""
    depth = blocks(content["params"], "blocks.")
    model = build_vit(tiny(depth), num_classes=2, global_pool="avg")
    groups = optim.layer_decay_groups(
        model, content["weight_decay"], content["layer_decay"], lambda name: optim.vit_layer_id(name, depth), depth
    )
    ours = {name: group for group in groups for name in group["names"]}
    differing = {
        name
        for name in set(ours) | set(content["params"])
        if name not in ours or name not in content["params"] or not same_group(ours[name], content["params"][name])
    }
    yield count("scale and decay of every parameter", differing, len(content["params"]))
    # Compared without order: it has no effect, and timm 1 registers fc_norm before the head.
    spelled = [sorted(spell(g["lr_scale"], g["weight_decay"], n) for g, n in each) for each in pairs(groups, content["groups_in_order"])]
    yield count("groups", set(spelled[0]) ^ set(spelled[1]), content["n_groups"])
    yield "number of groups", abs(len(groups) - content["n_groups"]), 0
    yield from optimizer_rows(optim.adamw(groups, content["optimizer"]["betas"]), content["optimizer"])


def pairs(ours: list[dict], theirs: list[dict]) -> tuple[list, list]:
    return [(g, len(g["params"])) for g in ours], [(g, g["n_params"]) for g in theirs]


def spell(scale: float, decay: float, parameters: int) -> str:
    return f"{parameters} x scale {scale:.10g} decay {decay:g}"


def same_group(ours: dict, theirs: dict) -> bool:
    return abs(ours["lr_scale"] / theirs["lr_scale"] - 1) < 1e-12 and ours["weight_decay"] == theirs["weight_decay"]


def optimizer_rows(optimizer: torch.optim.Optimizer, stated: dict) -> Rows:
    yield "optimizer", float(type(optimizer) is not torch.optim.AdamW or not stated["name"].endswith(".AdamW")), 0, stated["name"]
    yield "optimizer eps", abs(optimizer.defaults["eps"] - stated["eps"]), 0
    yield "optimizer betas", max(abs(a - b) for a, b in zip(optimizer.defaults["betas"], stated["betas"], strict=True)), 0


def decay_lists(content: dict) -> Rows:
    """File G: the parameters of the pretraining models with weight decay, without it, and frozen."""
    for name, lists in content["models"].items():
        every = [parameter for names in lists.values() for parameter in names]
        kind = "prompt" if any(".attn.kv." in parameter for parameter in every) else "mae"
        size = tiny(blocks(every, "blocks."), blocks(every, "decoder_blocks."))
        model = pretraining.MaskedPretraining(size, params.AblationRow("clip", kind, "random"), 0.5, TINY)
        for key, ours in grouped(model).items():
            yield count(f"{name}: {key}", ours ^ set(lists[key]), len(lists[key]))


def grouped(model: nn.Module) -> dict[str, set[str]]:
    names = {parameter: official(name) for name, parameter in model.named_parameters()}
    groups = [{names[p] for p in group["params"]} for group in optim.decay_groups(model, 0.05)]
    return {"no_decay": groups[0], "decay": groups[1], "frozen": set(names.values()) - groups[0] - groups[1]}


def mmpretrain_names(content: dict) -> Rows:
    """File K: every name mapped there and back with its tensor unchanged, and the distance of the position tables."""
    for part in ("backbone", "neck"):
        theirs = {entry["mmpretrain"]: torch.empty(entry["shape"], device="meta") for entry in content[part]}
        names = {entry["mmpretrain"]: entry["official"] for entry in content[part]}
        ours = layouts.from_mmpretrain(theirs, part)
        wrong = {name for name, tensor in theirs.items() if ours.get(names[name]) is not tensor}
        yield count(f"{part} -> official", wrong, len(names))
        back = layouts.to_mmpretrain({official: theirs[name] for name, official in names.items()})
        yield count(f"official -> {part}", {name for name, tensor in theirs.items() if back.get(name) is not tensor}, len(names))
    for part, entries, table in (("backbone", "backbone", "pos_embed"), ("decoder", "neck", "decoder_pos_embed")):
        shape = next(entry["shape"] for entry in content[entries] if entry["official"] == table)
        yield f"{part}: halves swapped", abs(swap_distance(shape) - content["sincos_max_diff"][f"{part}_pos_embed"]), 1e-5


def swap_distance(shape: list[int]) -> float:
    """Return the largest difference between our position table and the one with its halves swapped."""
    table = sincos_pos_embed(shape[2], round((shape[1] - 1) ** 0.5))
    return (table - torch.cat(table.chunk(2, dim=2)[::-1], dim=2)).abs().max().item()


def recipe(content: dict) -> Rows:
    """File J. Imported here because it alone needs the stages and hydra."""
    from tests import golden_recipe

    return golden_recipe.recipe(content)


KINDS: dict[str, Callable[[dict], Rows]] = {
    "groups_in_order": finetune_groups,
    "models": decay_lists,
    "backbone": mmpretrain_names,
    "transforms": recipe,
}
