"""The attentive probe: one cross-attention block with a learned query on a frozen encoder's tokens, then a linear layer.

V-JEPA's classifier (arXiv 2404.08471; AttentiveClassifier of facebookresearch/jepa, src/models/attentive_pooler.py).
"""

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn


class AttentiveHead(nn.Module):
    """LayerNorm of the tokens, attention of one learned query to them, LayerNorm and MLP with a residual, and a linear layer.

    V-JEPA adds the query to what it attends to; here the bias of the attention's output projection is that constant. Weights
    start as N(0, 0.02), those of the attention's and the MLP's last layer divided by the square root of 2; biases as 0."""

    def __init__(self, dim: int, num_heads: int, classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pool = AttentionPoolLatent(dim, num_heads=num_heads, norm_layer=nn.LayerNorm)
        self.linear = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.pool.latent, std=0.02)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02 / 2**0.5 if name in ("pool.proj", "pool.mlp.fc2") else 0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, classes) of tokens (B, 1+N, D)."""
        return self.linear(self.pool(self.norm(tokens)))
