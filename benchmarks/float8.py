"""The frozen CLIP teacher with its linear layers in float8: every row of the input and every row of the weights has a scale
of its own, products are added up in float32 and given out in bfloat16; norms, activations and attention stay as they are.
A benchmark's: the library has it not, for targets move (benchmarks/teacher.py says how far)."""

import torch
from torch import Tensor, nn

from milan.teacher.towers import ClipTower, mean_attention

KIND, LARGEST = torch.float8_e4m3fn, 448.0


def scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(R, C) -> the rows in float8, and the scale of each, (R, 1)."""
    rows = rows.float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (rows / scale).to(KIND), scale


class Float8Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        matrix, scale = scaled(weight.detach())
        self.register_buffer("matrix", matrix)
        self.register_buffer("scale", scale.t().contiguous())
        self.register_buffer("bias", bias.detach().bfloat16())

    def forward(self, tokens: Tensor) -> Tensor:
        rows, scale = scaled(tokens.flatten(0, -2))
        out = torch._scaled_mm(rows, self.matrix.t(), scale, self.scale, self.bias, out_dtype=torch.bfloat16, use_fast_accum=True)
        return out.unflatten(0, tokens.shape[:-1])


class Float8Tower(ClipTower):
    """Made of a tower, whose matrices it replaces."""

    def __init__(self, tower: ClipTower):
        super().__init__(tower.visual)
        blocks = self.visual.transformer.resblocks
        self.projections = nn.ModuleList(Float8Linear(b.attn.in_proj_weight, b.attn.in_proj_bias) for b in blocks)
        for block in blocks:
            block.attn.out_proj = Float8Linear(block.attn.out_proj.weight, block.attn.out_proj.bias)
            for name in ("c_fc", "c_proj"):
                layer = getattr(block.mlp, name)
                setattr(block.mlp, name, Float8Linear(layer.weight, layer.bias))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.visual._embeds(images)
        for block, project in zip(self.visual.transformer.resblocks, self.projections, strict=True):
            heads = project(block.ln_1(tokens)).unflatten(2, (3, block.attn.num_heads, -1))
            query, keys, values = heads.permute(2, 0, 3, 1, 4).unbind()
            mixed = nn.functional.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
            tokens = tokens + block.attn.out_proj(mixed)
            tokens = tokens + block.mlp(block.ln_2(tokens))
        importance = mean_attention(query[:, :, :1], keys)[:, 1:]
        return self.visual.ln_post(tokens) @ self.visual.proj.to(tokens.dtype), importance
