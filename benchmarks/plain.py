"""The published algorithm as it reads, for comparison: attention matrices written out, the seen tokens' keys and values
computed anew in every decoder block, image order restored before the loss, AdamW a tensor at a time, eager mode."""

from functools import partial

import torch
from torch import Tensor, nn

from milan.params import Model

layer_norm = partial(nn.LayerNorm, eps=1e-6)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.q, self.kv, self.proj = heads, nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, dim = queries.shape
        query = self.q(queries).view(batch, length, self.heads, -1).transpose(1, 2)
        key, value = self.kv(keys).view(batch, keys.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, length, dim)), weights


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, activation: type[nn.Module] = nn.GELU):
        super().__init__()
        self.norm1, self.attention, self.norm2 = layer_norm(dim), Attention(dim, heads), layer_norm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), activation(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, prompt: Tensor | None = None) -> tuple[Tensor, Tensor]:
        normed = self.norm1(tokens)
        keys = normed if prompt is None else torch.cat([prompt, normed], dim=1)
        mixed, weights = self.attention(normed, keys)
        tokens = tokens + mixed
        return tokens + self.mlp(self.norm2(tokens)), weights


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Tower(nn.Module):
    """Patches, class token, positions and blocks."""

    def __init__(self, model: Model, activation: type[nn.Module] = nn.GELU):
        super().__init__()
        dim, heads = model.encoder.embed_dim, model.encoder.num_heads
        self.patches = nn.Conv2d(3, dim, model.patch_size, model.patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 1 + model.n_patches, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, activation) for _ in range(model.encoder.depth))
        self.norm = layer_norm(dim)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]
        if kept is not None:
            tokens = gather(tokens, kept)
        tokens = torch.cat([(self.cls + self.positions[:, :1]).expand(len(images), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens, weights = block(tokens)
        return self.norm(tokens), weights


class Teacher(nn.Module):
    """Features of all tokens, and the last block's attention of the class token."""

    def __init__(self, model: Model, feature_dim: int):
        super().__init__()
        self.tower, self.projection = Tower(model, QuickGELU), nn.Linear(model.encoder.embed_dim, feature_dim, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens, weights = self.tower(images)
        return self.projection(tokens), weights[:, :, 0, 1:].mean(dim=1)


class Milan(nn.Module):
    """Semantic mask by multinomial, encoder, prompting decoder, and the loss over all tokens in image order."""

    def __init__(self, model: Model, feature_dim: int, mask_ratio: float = 0.75):
        super().__init__()
        dim, self.n, self.kept = model.decoder.embed_dim, model.n_patches, int(model.n_patches * (1 - mask_ratio))
        self.encoder, self.embed = Tower(model), nn.Linear(model.encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, 1 + model.n_patches, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, model.decoder.num_heads) for _ in range(model.decoder.depth))
        self.norm, self.predict = layer_norm(dim), nn.Linear(dim, feature_dim)

    def forward(self, images: Tensor, features: Tensor, importance: Tensor) -> Tensor:
        return self.loss(images, features, torch.multinomial(importance.float(), self.n))

    def loss(self, images: Tensor, features: Tensor, order: Tensor) -> Tensor:
        """order (B, N): patches, the visible ones first."""
        restore = order.argsort(dim=1)
        latent = self.embed(self.encoder(images, order[:, : self.kept])[0])
        blank = self.mask_token.expand(len(images), self.n - self.kept, -1)
        patches = gather(torch.cat([latent[:, 1:], blank.to(latent.dtype)], dim=1), restore) + self.positions[:, 1:]
        shuffled = gather(patches, order)
        seen = torch.cat([latent[:, :1] + self.positions[:, :1], shuffled[:, : self.kept]], dim=1)
        hidden = shuffled[:, self.kept :]
        for block in self.blocks:
            hidden, _ = block(hidden, seen)
        tokens = torch.cat([seen[:, :1], gather(torch.cat([seen[:, 1:], hidden], dim=1), restore)], dim=1)
        predictions = self.predict(self.norm(tokens))
        predictions, targets = (t / t.norm(dim=2, keepdim=True) for t in (predictions, features))
        return (2 - 2 * (predictions * targets).sum(dim=-1)).mean()


def gather(tokens: Tensor, indices: Tensor) -> Tensor:
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
