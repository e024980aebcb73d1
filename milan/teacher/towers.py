"""Frozen image towers that give MILAN's targets: features of every token, and the importance of every patch.

open_clip's and timm's own models do the work. A tower reads two things from them that they do not return: the features of
every token, and the class-token attention of the last block (reference: clip_demo.py). The release's ablation has DINO and
SLIP, which are timm's, in place of CLIP (main_pretrain.py, --use_clip_dino, --use_clip_slip).
"""

import open_clip.transformer
import torch
from open_clip.model import convert_weights_to_lp
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from milan.core.errors import UserError
from milan.data.patches import PatchConvolution
from milan.training.device import DTYPES


class Tower(nn.Module):
    """A frozen image tower: ClipTower or TimmTower.

    size: side of the images it takes, in pixels. grid: patches on a side (N = grid x grid). feature_dim: width D of its
    features. forward: normalised images (B, 3, size, size) -> features (B, 1+N, D), class token first, and importance (B, N)
    float32. The importance is the attention of the last block from the class token to each patch: mean over heads after the
    softmax, without the keys that are no patch, not renormalised."""

    def __init__(self, visual: nn.Module, size: tuple[int, int], grid: tuple[int, int], feature_dim: int):
        super().__init__()
        if size[0] != size[1] or grid[0] != grid[1]:
            raise UserError(f"The teacher must take square images, and this one takes {size[0]} x {size[1]} pixels.")
        self.visual, self.size, self.grid, self.feature_dim = visual, size[0], grid[0], feature_dim

    def lowered(self, precision: str) -> "Tower":
        """Convert the matrices to the precision to which autocast would cast them at every call; norms and embeddings stay
        in float32. Returns the tower."""
        if precision != "fp32":
            convert_weights_to_lp(self, DTYPES[precision])
        return self


class ClipTower(Tower):
    """open_clip's vision transformer. Its features are projected, as the class token's are for the contrast with text."""

    def __init__(self, visual: nn.Module):
        if fault := clip_fault(visual):
            raise UserError(f"The teacher must be a CLIP vision transformer with a class token (such as ViT-B-16): {fault}.")
        super().__init__(visual, visual.image_size, visual.grid_size, visual.proj.shape[1])
        if type(visual.conv1) is nn.Conv2d:  # and not the small CLIP's stem
            visual.conv1.__class__ = PatchConvolution

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.visual._embeds(images)
        for block in self.visual.transformer.resblocks:
            query, keys, values = queries_keys_values(block, tokens)
            mixed = nn.functional.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
            tokens = tokens + block.ls_1(block.attn.out_proj(mixed))
            tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        importance = mean_attention(query[:, :, :1], keys)[:, 1:]
        return self.visual.ln_post(tokens) @ self.visual.proj.to(tokens.dtype), importance


class TimmTower(Tower):
    """timm's vision transformer. It has no projection: its features are the tokens after the final norm, and D is its width.

    Registers and other tokens between the class token and the patches count neither as features nor in the importance."""

    def __init__(self, visual: nn.Module):
        if fault := vit_fault(visual):
            raise UserError(f"The teacher must be a vision transformer of timm's (such as vit_base_patch16_224): {fault}.")
        embedding = visual.patch_embed
        super().__init__(visual, embedding.img_size, embedding.grid_size, visual.embed_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vit, first_patch = self.visual, self.visual.num_prefix_tokens
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        *blocks, last = vit.blocks
        for block in blocks:
            tokens = block(tokens)
        importance = class_attention(last, tokens)[:, first_patch:]
        tokens = vit.norm(last(tokens))
        return torch.cat([tokens[:, :1], tokens[:, first_patch:]], dim=1), importance


def clip_fault(visual: nn.Module) -> str | None:
    """Return why an image tower cannot be read as OpenAI's CLIP; None when it can."""
    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        return f"{type(visual).__name__} has no class token"
    if visual.attn_pool is not None:
        return "this one pools an image by attention queries, not by its class token"
    if visual.pool_type != "tok":
        return "this one pools an image by the mean of its patches, and its class token was not trained"
    if any(type(block) is not open_clip.transformer.ResidualAttentionBlock for block in visual.transformer.resblocks):
        return "this one has blocks of another kind"
    return None


def vit_fault(visual: nn.Module) -> str | None:
    """Return why a model of timm's cannot be read as a ViT with a class token; None when it can."""
    if not isinstance(visual, VisionTransformer):
        return f"{type(visual).__name__} is of another family"
    if not visual.has_class_token:
        return "this one has no class token, whose attention is the importance"
    if isinstance(visual.norm, nn.Identity):
        return "this one pools an image by the mean of its patches, and normalises that mean alone"
    if type(visual.blocks[-1]) is not Block or type(visual.blocks[-1].attn) is not Attention:
        return "this one has blocks of another kind"
    return None


def queries_keys_values(block: nn.Module, tokens: Tensor) -> Tensor:
    """Project tokens (B, L, D) to queries, keys and values of a block of open_clip's, by one product: (3, B, heads, L,
    D/heads).

    nn.MultiheadAttention, which holds the weights, is fast only outside autocast; this is fast in every precision and also
    gives the importance."""
    batch, length, _ = tokens.shape
    projected = nn.functional.linear(block.ln_1(tokens), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return projected.view(batch, length, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)


def class_attention(block: Block, tokens: Tensor) -> Tensor:
    """Return the attention of a block of timm's from the class token to tokens (B, L, D): (B, L), mean over heads."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(tokens)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    query, keys, _ = qkv.permute(2, 0, 3, 1, 4)
    return mean_attention(attention.q_norm(query[:, :, :1]), attention.k_norm(keys))


def mean_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Return the attention of one query (B, heads, 1, d) over keys (B, heads, L, d), mean over heads: (B, L).

    float32 under any autocast; the full attention matrix is never computed."""
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ keys.float().transpose(-2, -1) * query.shape[-1] ** -0.5
    return logits.softmax(dim=-1).mean(dim=1).squeeze(1)
