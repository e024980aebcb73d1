"""The two decoders: MILAN's prompting decoder and MAE's. Both take what the encoder saw and predict all tokens."""

from functools import partial

import torch
from timm.layers import Mlp, use_fused_attn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from milan import masking
from milan.encoder import initialise_linears
from milan.pos_embed import sincos_pos_embed

layer_norm = partial(nn.LayerNorm, eps=1e-6)


class Decoder(nn.Module):
    """What the decoders share: projection, mask token, positions, final norm and prediction.

    forward: latent (B, 1+K, E) from the encoder, visible (B, K), masked (B, N-K) -> predictions, in the order
    (class token, visible patches, masked patches): (B, 1+N, out_dim). Image order is not restored: attention
    does not care about it, and gathering the targets once is cheaper than unshuffling tokens."""

    def __init__(self, encoder_dim: int, dim: int, depth: int, num_heads: int, grid: int, out_dim: int):
        super().__init__()
        self.decoder_embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(dim, grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(self.block(dim, num_heads) for _ in range(depth))
        self.decoder_norm = layer_norm(dim)
        self.decoder_pred = nn.Linear(dim, out_dim)
        initialise_linears(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        positions = self.decoder_pos_embed.expand(len(latent), -1, -1)
        seen = torch.cat([positions[:, :1], masking.gather(positions[:, 1:], visible)], dim=1)
        seen = self.decoder_embed(latent) + seen
        hidden = self.mask_token + masking.gather(positions[:, 1:], masked)
        return self.decoder_pred(self.decoder_norm(self.complete(seen, hidden.to(seen.dtype))))


class PromptingDecoder(Decoder):
    """MILAN's own (models_milan.py): the encoder's tokens are a fixed prompt; only mask tokens are updated."""

    block = staticmethod(lambda dim, heads: PromptingBlock(dim, heads))

    def complete(self, seen: Tensor, hidden: Tensor) -> Tensor:
        if not hidden.shape[1]:  # nothing is masked, so nothing is updated; attention kernels refuse to have no queries
            return seen
        for block, (keys, values) in zip(self.decoder_blocks, self.prompts(seen), strict=True):
            hidden = block(hidden, keys, values)
        return torch.cat([seen, hidden], dim=1)

    def prompts(self, seen: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the seen tokens for every block, by one matrix product: they never change, and
        the release does not normalise them."""
        weight = torch.cat([block.attn.kv.weight for block in self.decoder_blocks])
        bias = torch.cat([block.attn.kv.bias for block in self.decoder_blocks])
        batch, length, dim = seen.shape
        heads = self.decoder_blocks[0].attn.num_heads
        kv = nn.functional.linear(seen, weight, bias).view(batch, length, len(self.decoder_blocks), 2, heads, dim // heads)
        # Unbound at once: indexed, each part's gradient would be a tensor of all of them, zero elsewhere.
        parts = kv.permute(2, 3, 0, 4, 1, 5).flatten(0, 1).unbind()
        return list(zip(parts[::2], parts[1::2], strict=True))


class PromptingAttention(nn.Module):
    """Queries from the mask tokens; keys and values from the fixed prompt and the mask tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.fused = num_heads, use_fused_attn()
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, prompt_keys: Tensor, prompt_values: Tensor) -> Tensor:
        """hidden (B, M, D), prompt keys and values (B, heads, 1+K, D/heads) -> (B, M, D)."""
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
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = PromptingAttention(dim, num_heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, hidden: Tensor, prompt_keys: Tensor, prompt_values: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), prompt_keys, prompt_values)
        return hidden + self.mlp(self.norm2(hidden))


class MAEDecoder(Decoder):
    """He et al. 2021: all tokens, seen and masked, go through plain ViT blocks."""

    block = staticmethod(lambda dim, heads: Block(dim, heads, qkv_bias=True, norm_layer=layer_norm))

    def complete(self, seen: Tensor, hidden: Tensor) -> Tensor:
        tokens = torch.cat([seen, hidden], dim=1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return tokens


DECODERS = {"prompt": PromptingDecoder, "mae": MAEDecoder}
