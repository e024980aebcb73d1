"""Any frozen teacher, asked in one place: images of the student's size -> features and importance on the student's grid.

Towers are open_clip's (clip.py) and timm's: the release's ablation has DINO and SLIP in CLIP's place
(main_pretrain.py, --use_clip_dino, --use_clip_slip).
"""

from pathlib import Path

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from milan.core.errors import UserError
from milan.data import transforms
from milan.params import Compute, TinyClip
from milan.teacher.clip import (
    OTHER_TEACHER,
    ClipTower,
    Tower,
    build_tiny,
    build_visual,
    mean_attention,
    misfits_said,
    read_config,
)
from milan.training.device import autocast, resolve_precision
from milan.training.weights import load_state, load_weights


class TimmTower(Tower):
    """A vision transformer of timm's. Its features are the tokens after the final norm, for there is no projection:
    D is its width. Registers and other tokens between the class token and the patches count neither as features nor in
    the importance."""

    def __init__(self, visual: nn.Module):
        if fault := unlike_vit(visual):
            raise UserError(f"The teacher must be a vision transformer of timm's (such as vit_base_patch16_224): {fault}.")
        embedding = visual.patch_embed
        super().__init__(visual, embedding.img_size, embedding.grid_size, visual.embed_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vit, first = self.visual, self.visual.num_prefix_tokens
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        *blocks, last = vit.blocks
        for block in blocks:
            tokens = block(tokens)
        importance = vit_cls_attention(last, tokens)[:, first:]
        tokens = vit.norm(last(tokens))
        return torch.cat([tokens[:, :1], tokens[:, first:]], dim=1), importance


def unlike_vit(visual: nn.Module) -> str | None:
    """Why a model of timm's cannot be read as a ViT with a class token; None when it can."""
    if not isinstance(visual, VisionTransformer):
        return f"{type(visual).__name__} is of another family"
    if not visual.has_class_token:
        return "this one has no class token, whose attention is the importance"
    if isinstance(visual.norm, nn.Identity):
        return "this one sums up an image by the mean of its patches, and norms that alone"
    if type(visual.blocks[-1]) is not Block or type(visual.blocks[-1].attn) is not Attention:
        return "this one has blocks of another kind"
    return None


def vit_cls_attention(block: Block, tokens: Tensor) -> Tensor:
    """Attention of the class token over all tokens, (B, L), mean over heads."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(tokens)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    query, keys, _ = qkv.permute(2, 0, 3, 1, 4)
    return mean_attention(attention.q_norm(query[:, :, :1]), attention.k_norm(keys))


def build_tower(config: dict) -> Tower:
    """The tower that a teacher.json describes, its weights not loaded. Raises UserError when it is none for MILAN."""
    if config["kind"] == "timm":
        return TimmTower(timm.create_model(config["model"], num_classes=0))
    if config["kind"] == "open_clip":
        return ClipTower(build_visual(**config["model"]))
    sizes = (config["image_size"], config["patch_size"], len(config["token_ids"]))
    return ClipTower(build_tiny(TinyClip(**config["tiny"]), *sizes).visual)


def load_tower(folder: Path, compute: Compute, device: torch.device) -> Tower:
    """The frozen image tower on its device, in the recipe's precision."""
    config, weights = read_config(folder), load_weights(Path(folder) / "teacher.safetensors")
    with misfits_said(folder):
        tower = build_tower(config)
    image_tower = {name: tensor for name, tensor in weights.items() if name.startswith("visual.")}
    load_state(tower, image_tower, folder / "teacher.safetensors", OTHER_TEACHER)
    return tower.eval().requires_grad_(False).to(device).lowered(resolve_precision(compute, device))


@torch.inference_mode()
def look(tower: Tower, images: Tensor, compute: Compute, normalisation: str, grid: int) -> tuple[Tensor, Tensor]:
    """What the teacher makes of the student's crops, uint8 (B, 3, H, W): features (B, 1 + grid**2, D) and importance
    (B, grid**2), in the recipe's precision, on the student's grid of patches.

    A tower for another size sees the crops resized to its own (bicubic, antialiased)."""
    images = transforms.resize(images, tower.size)
    with autocast(resolve_precision(compute, images.device), images.device):
        features, importance = tower(transforms.normalise(images, normalisation))
    return on_grid(features, importance, tower.grid, grid)


def on_grid(features: Tensor, importance: Tensor, source: int, target: int) -> tuple[Tensor, Tensor]:
    """Features (B, 1 + source**2, D) and importance (B, source**2) of one grid over an image, on another grid over the same
    image: bilinearly between patch centres, in float32. The class token stays as it is, and so does the sum of an
    image's importance. On the same grid nothing is touched."""
    if source == target:
        return features, importance

    def moved(rows: Tensor) -> Tensor:
        maps = rows.float().transpose(1, 2).unflatten(2, (source, source))
        return nn.functional.interpolate(maps, size=(target, target), mode="bilinear").flatten(2).transpose(1, 2)

    weights = moved(importance.unsqueeze(2)).squeeze(2)
    share = weights / weights.sum(dim=1, keepdim=True)
    return torch.cat([features[:, :1].float(), moved(features[:, 1:])], dim=1), share * importance.sum(dim=1, keepdim=True)
