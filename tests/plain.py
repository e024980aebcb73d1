"""A second, plain implementation of the method that imports nothing of milan: float64 functions of a dict of weights.

It makes golden folders of any seed and size, on which tests run the golden command (tests/test_golden.py)."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


def normal(seed: int, name: str, shape) -> np.ndarray:
    return np.random.default_rng(np.random.PCG64(zlib.crc32(f"{seed}:{name}".encode()))).standard_normal(tuple(shape)).astype("float32")


def weights(seed: int, shapes: dict[str, tuple]) -> Weights:
    def one(name, shape):
        mean = 1 if len(shape) == 1 and name.endswith(".weight") else 0
        return torch.from_numpy(np.asarray(np.float32(mean) + np.float32(0.02) * normal(seed, name, shape))).double()

    return {name: one(name, shape) for name, shape in shapes.items()}


def table(dim: int, grid: int) -> Tensor:
    """Return the sin-cos position table (1 + N, D) by its definition, in the precision of float32."""
    rows = [[0.0] * dim]
    for y in range(grid):
        for x in range(grid):
            angles = [[place / 10000 ** (4 * k / dim) for k in range(dim // 4)] for place in (x, y)]
            rows.append([f(a) for line in angles for f in (math.sin, math.cos) for a in line])
    return torch.tensor(rows, dtype=torch.float32).double()


def block_shapes(prefix: str, dim: int, attention: dict[str, int]) -> dict[str, tuple]:
    """Return the shapes of a transformer block. attention: {matrix: rows}, such as {"qkv": 3 D, "proj": D}."""
    matrices = {f"attn.{name}": (rows, dim) for name, rows in attention.items()} | {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    shapes = {f"{prefix}.norm{i}.{kind}": (dim,) for i in (1, 2) for kind in ("weight", "bias")}
    for name, shape in matrices.items():
        shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
    return shapes


def vit_shapes(c: dict, norm: str) -> dict[str, tuple]:
    d, n = c["embed_dim"], (c["img_size"] // c["patch_size"]) ** 2
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + n, d), f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    shapes |= {"patch_embed.proj.weight": (d, 3, c["patch_size"], c["patch_size"]), "patch_embed.proj.bias": (d,)}
    for i in range(c["depth"]):
        shapes |= block_shapes(f"blocks.{i}", d, {"qkv": 3 * d, "proj": d})
    return shapes


def milan_shapes(c: dict, prompting: bool, out: int) -> dict[str, tuple]:
    d, e, n = c["embed_dim"], c["decoder_embed_dim"], (c["img_size"] // c["patch_size"]) ** 2
    attention = {"q": e, "kv": 2 * e, "proj": e} if prompting else {"qkv": 3 * e, "proj": e}
    shapes = {**vit_shapes(c, "norm"), "mask_token": (1, 1, e), "decoder_pos_embed": (1, 1 + n, e)}
    shapes |= {"decoder_norm.weight": (e,), "decoder_norm.bias": (e,)}
    shapes |= {"decoder_embed.weight": (e, d), "decoder_embed.bias": (e,), "decoder_pred.weight": (out, e), "decoder_pred.bias": (out,)}
    for i in range(c["decoder_depth"]):
        shapes |= block_shapes(f"decoder_blocks.{i}", e, attention)
    return shapes


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x: Tensor, w: Weights, name: str, eps: float = 1e-6) -> Tensor:
    deviation = x - x.mean(-1, keepdim=True)
    return deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return mixed (B, T, D) and attention (B, T, S) averaged over heads, computed one head at a time."""
    mixed, seen = [], []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        attention = (a @ b.transpose(1, 2) / math.sqrt(a.shape[-1])).softmax(-1)
        mixed.append(attention @ c)
        seen.append(attention)
    return torch.cat(mixed, -1), torch.stack(seen).mean(0)


def vit_block(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    q, k, v = linear(layer_norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv").chunk(3, -1)
    x = x + linear(attend(q, k, v, heads)[0], w, f"{name}.attn.proj")
    return x + mlp(layer_norm(x, w, f"{name}.norm2"), w, name)


def prompting_block(hidden: Tensor, seen: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    normed = layer_norm(hidden, w, f"{name}.norm1")
    k, v = linear(torch.cat([seen, normed], 1), w, f"{name}.attn.kv").chunk(2, -1)
    hidden = hidden + linear(attend(linear(normed, w, f"{name}.attn.q"), k, v, heads)[0], w, f"{name}.attn.proj")
    return hidden + mlp(layer_norm(hidden, w, f"{name}.norm2"), w, name)


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    return linear(F.gelu(linear(x, w, f"{name}.mlp.fc1")), w, f"{name}.mlp.fc2")


def patches_of(images: Tensor, p: int) -> Tensor:
    """Cut images into patches (B, N, 3, p, p), row by row."""
    side = images.shape[-1] // p
    return torch.stack([images[:, :, p * y : p * y + p, p * x : p * x + p] for y in range(side) for x in range(side)], 1)


def pretrain(w: Weights, c: dict, images: Tensor, ids: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
    """Compute a forward pass of MILAN (weights with attn.kv) or MAE, one image at a time."""
    n = ids.shape[1]
    k = int(n * (1 - c["mask_ratio"]))
    outs = []
    for row in range(len(images)):
        outs.append(
            pretrain_one(
                w, c, images[row : row + 1], ids[row, :k], sorted(ids[row, k:].tolist()), None if teacher is None else teacher[row]
            )
        )
    tensors = {key: torch.cat([out[key] for out in outs]) for key in outs[0]}
    return {**tensors, "loss": tensors["loss_per_token"].mean()}


def pretrain_one(w: Weights, c: dict, image: Tensor, kept: Tensor, hidden_ids: list[int], teacher: Tensor | None) -> dict[str, Tensor]:
    patches = patches_of(image, c["patch_size"])
    x = patches.flatten(2) @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"] + w["pos_embed"][:, 1:]
    x = torch.cat([w["cls_token"] + w["pos_embed"][:, :1], x[:, kept]], 1)
    for i in range(c["depth"]):
        x = vit_block(x, w, f"blocks.{i}", c["num_heads"])
    latent = layer_norm(x, w, "norm")
    places = torch.cat([torch.zeros(1, dtype=torch.long), kept + 1])
    seen = linear(latent, w, "decoder_embed") + w["decoder_pos_embed"][:, places]
    hidden = w["mask_token"] + w["decoder_pos_embed"][:, [i + 1 for i in hidden_ids]]
    for i in range(c["decoder_depth"]):
        name = f"decoder_blocks.{i}"
        if f"{name}.attn.kv.weight" in w:
            hidden = prompting_block(hidden, seen, w, name, c["decoder_num_heads"])
        else:
            both = vit_block(torch.cat([seen, hidden], 1), w, name, c["decoder_num_heads"])
            seen, hidden = both[:, : len(places)], both[:, len(places) :]
    order = torch.cat([places, torch.tensor(hidden_ids) + 1]).argsort()
    pred = linear(layer_norm(torch.cat([seen, hidden], 1)[:, order], w, "decoder_norm"), w, "decoder_pred")
    if teacher is not None:
        return {"latent": latent, "pred": pred, "loss_per_token": 2 - 2 * F.cosine_similarity(pred, teacher[None], dim=-1)}
    target = patches.permute(0, 1, 3, 4, 2).flatten(2)[:, hidden_ids]
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (pred[:, [i + 1 for i in hidden_ids]] - target).square().mean(-1)
    return {"latent": latent, "pred": pred[:, 1:], "loss_per_token": error}


def vit(w: Weights, c: dict, images: Tensor) -> Tensor:
    """Return all tokens after the last block: (B, 1 + N, D)."""
    x = patches_of(images, c["patch_size"]).flatten(2) @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(c["depth"]):
        x = vit_block(x, w, f"blocks.{i}", c["num_heads"])
    return x


def clip_shapes(c: dict) -> dict[str, tuple]:
    d, n, text = c["width"], (c["image"] // c["patch"]) ** 2, c["text"]
    shapes = {
        "visual.class_embedding": (d,),
        "visual.positional_embedding": (1 + n, d),
        "visual.proj": (d, c["embed_dim"]),
        "logit_scale": (),
    }
    shapes |= {"visual.conv1.weight": (d, 3, c["patch"], c["patch"]), "positional_embedding": (text["context_length"], text["width"])}
    shapes |= {"text_projection": (text["width"], c["embed_dim"]), "token_embedding.weight": (text["vocab_size"], text["width"])}
    for name, dim in (("visual.ln_pre", d), ("visual.ln_post", d), ("ln_final", text["width"])):
        shapes |= {f"{name}.{kind}": (dim,) for kind in ("weight", "bias")}
    for tower, dim, layers in (("visual.transformer", d, c["layers"]), ("transformer", text["width"], text["layers"])):
        for i in range(layers):
            name = f"{tower}.resblocks.{i}"
            shapes |= {f"{name}.attn.in_proj_weight": (3 * dim, dim), f"{name}.attn.in_proj_bias": (3 * dim,)}
            shapes |= {f"{name}.{norm}.{kind}": (dim,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
            for part, shape in (("attn.out_proj", (dim, dim)), ("mlp.c_fc", (4 * dim, dim)), ("mlp.c_proj", (dim, 4 * dim))):
                shapes |= {f"{name}.{part}.weight": shape, f"{name}.{part}.bias": shape[:1]}
    return shapes


def clip(w: Weights, c: dict, images: Tensor) -> dict[str, Tensor]:
    """Return the features of all tokens and the last block's attention."""
    x = patches_of(images, c["patch"]).flatten(2) @ w["visual.conv1.weight"].flatten(1).T
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + w["visual.positional_embedding"]
    x = layer_norm(x, w, "visual.ln_pre", 1e-5)
    for i in range(c["layers"]):
        name = f"visual.transformer.resblocks.{i}"
        qkv = layer_norm(x, w, f"{name}.ln_1", 1e-5) @ w[f"{name}.attn.in_proj_weight"].T + w[f"{name}.attn.in_proj_bias"]
        mixed, attention = attend(*qkv.chunk(3, -1), c["heads"])
        x = x + linear(mixed, w, f"{name}.attn.out_proj")
        hidden = linear(layer_norm(x, w, f"{name}.ln_2", 1e-5), w, f"{name}.mlp.c_fc")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), w, f"{name}.mlp.c_proj")
    features = layer_norm(x, w, "visual.ln_post", 1e-5) @ w["visual.proj"]
    importance = attention[:, 0, 1:]
    return {"features": features, "attention": attention, "importance": importance, "importance_sum": importance.sum(1)}


def write(folder: Path, seed: int, cases: dict[str, tuple[dict, dict]]) -> None:
    """Write a golden folder of cases {name: (entry without file and tensors, {tensor: array})}; "pred" is stored as a slice."""
    folder.mkdir()
    manifest: dict = {"seed": seed, "cases": {}}
    for name, (entry, values) in cases.items():
        tensors, arrays = {}, {}
        for key, value in values.items():
            value = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
            value = value.astype("float32") if value.dtype == np.float64 else value
            sliced = key == "pred"
            tensors[key] = {"shape": list(value.shape), "stored": "[:, 1::2, ::3]" if sliced else "full"}
            arrays[f"{key}__slice" if sliced else key] = value[:, 1::2, ::3] if sliced else value
            if sliced:
                tensors[key]["stats"] = {"mean": float(value.mean()), "std": float(value.std()), "l2": float(np.linalg.norm(value))}
        np.savez(folder / f"{name}.npz", **arrays)
        manifest["cases"][name] = {**entry, "file": f"{name}.npz", "tensors": tensors}
    (folder / "manifest.json").write_text(json.dumps(manifest))
