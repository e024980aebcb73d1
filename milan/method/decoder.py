"""The two decoders: MILAN's prompting decoder and MAE's. Both take the encoder's tokens and predict all tokens.

Shapes: B images, N patches, K of them visible, E encoder width, D decoder width.
"""

from functools import partial

import torch
from timm.layers import Mlp, use_fused_attn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from milan.method import masking
from milan.method.encoder import initialise_linears
from milan.method.pos_embed import sincos_pos_embed

layer_norm = partial(nn.LayerNorm, eps=1e-6)


class Decoder(nn.Module):
    """The parts that both decoders share: projection, mask token, positions, final norm and prediction.

    A subclass gives make_block(dim, num_heads) and run_blocks."""

    def __init__(self, encoder_dim: int, dim: int, depth: int, num_heads: int, grid: int, out_dim: int):
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(dim, grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(self.make_block(dim, num_heads) for _ in range(depth))
        self.decoder_norm = layer_norm(dim)
        self.decoder_pred = nn.Linear(dim, out_dim)
        initialise_linears(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict all tokens: (B, 1+N, out_dim), in the order class token, visible patches, masked patches.

        latent: (B, 1+K, E) from the encoder. visible (B, K) and masked (B, N-K): patch indices. Image order is not restored:
        attention does not depend on it, and gathering the targets once is cheaper than unshuffling tokens."""
        positions = self.decoder_pos_embed.expand(len(latent), -1, -1)
        class_position, patch_positions = positions[:, :1], positions[:, 1:]
        seen_positions = torch.cat([class_position, masking.gather(patch_positions, visible)], dim=1)
        seen = self.decoder_embed(latent) + seen_positions
        hidden = self.mask_token + masking.gather(patch_positions, masked)
        return self.decoder_pred(self.decoder_norm(self.run_blocks(seen, hidden.to(seen.dtype))))

    def run_blocks(self, seen: Tensor, hidden: Tensor) -> Tensor:
        """Run the blocks on the encoder's tokens (B, 1+K, D) and the mask tokens (B, N-K, D): (B, 1+N, D)."""
        raise NotImplementedError


class PromptingAttention(nn.Module):
    """Attention with queries from the mask tokens, and keys and values from the fixed prompt and the mask tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.fused = num_heads, use_fused_attn()
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, prompt_keys: Tensor, prompt_values: Tensor) -> Tensor:
        """Attend from mask tokens (B, N-K, D) to prompt keys and values (B, heads, 1+K, D/heads) and themselves:
        (B, N-K, D)."""
        batch, length, dim = hidden.shape
        query = self.q(hidden).view(batch, length, self.num_heads, -1).transpose(1, 2)
        keys, values = self.kv(hidden).view(batch, length, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        keys = torch.cat([prompt_keys, keys], dim=2)
        values = torch.cat([prompt_values, values], dim=2)
        if self.fused:
            mixed = nn.functional.scaled_dot_product_attention(query, keys, values)
        else:
            mixed = (query * query.shape[-1] ** -0.5 @ keys.transpose(-2, -1)).softmax(dim=-1) @ values
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class PromptingBlock(nn.Module):
    """A transformer block that updates the mask tokens alone. Shapes as in PromptingAttention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = PromptingAttention(dim, num_heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, hidden: Tensor, prompt_keys: Tensor, prompt_values: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), prompt_keys, prompt_values)
        return hidden + self.mlp(self.norm2(hidden))


class PromptingDecoder(Decoder):
    """MILAN's decoder (models_milan.py): the encoder's tokens are a fixed prompt, and only mask tokens are updated."""

    make_block = PromptingBlock

    def run_blocks(self, seen: Tensor, hidden: Tensor) -> Tensor:
        if not hidden.shape[1]:  # nothing is masked, and attention kernels refuse to have no queries
            return seen
        for block, (keys, values) in zip(self.decoder_blocks, self.project_prompt(seen), strict=True):
            hidden = block(hidden, keys, values)
        return torch.cat([seen, hidden], dim=1)

    def project_prompt(self, seen: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the prompt's keys and values (B, heads, 1+K, D/heads) for each block, by one matrix product: the prompt
        never changes, and the release does not normalise it."""
        weight = torch.cat([block.attn.kv.weight for block in self.decoder_blocks])
        bias = torch.cat([block.attn.kv.bias for block in self.decoder_blocks])
        batch, length, dim = seen.shape
        heads = self.decoder_blocks[0].attn.num_heads
        projected = nn.functional.linear(seen, weight, bias)
        projected = projected.view(batch, length, len(self.decoder_blocks), 2, heads, dim // heads).permute(2, 3, 0, 4, 1, 5)
        return [(keys, values) for keys, values in projected]


class MAEDecoder(Decoder):
    """MAE's decoder (He et al. 2021): all tokens, the encoder's and the mask tokens, go through plain ViT blocks."""

    make_block = staticmethod(partial(Block, qkv_bias=True, norm_layer=layer_norm))

    def run_blocks(self, seen: Tensor, hidden: Tensor) -> Tensor:
        tokens = torch.cat([seen, hidden], dim=1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return tokens


DECODERS = {"prompt": PromptingDecoder, "mae": MAEDecoder}
