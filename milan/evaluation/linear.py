"""Linear evaluation: batch norm without parameters and one linear layer, trained on frozen features."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from milan.data import seeding


class LinearHead(nn.Module):
    """Batch norm (not affine, eps 1e-6) and a linear layer (weights N(0, 0.01)), as in main_linprobe.py of MAE and MILAN."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, classes) of features (B, D)."""
        return self.linear(self.norm(features))


class ProbeLoss(nn.Module):
    """The loss of a head on frozen features, which carry no gradient. loss: of logits and labels."""

    def __init__(self, head: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy):
        super().__init__()
        self.head, self.loss = head, loss

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of features (B, D, ...) and labels (B, ...)."""
        return self.loss(self.head(features.float()).float(), labels)


class FeatureViews(Dataset):
    """Features of V fixed views: item (epoch, index) is {"features", "label"}; epoch e uses view e mod V.

    views: V pairs of features (n, ...) and labels (n, ...)."""

    def __init__(self, views: list[tuple[Tensor, Tensor]]):
        self.views = views

    def __len__(self) -> int:
        return len(self.views[0][1])

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        features, labels = self.views[epoch % len(self.views)]
        return {"features": features[index], "label": labels[index]}


def probe_top1(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, epochs: int = 40) -> float:
    """Return top-1 in % of a linear probe trained with Adam (batches of 256) on features (n, D) held in memory."""
    seeding.seed_globals(0, "probe")
    head = LinearHead(train.shape[1], int(train_labels.max()) + 1)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for epoch in range(epochs):
        for chosen in seeding.permutation(len(train), 0, "probe", epoch).split(256):
            if len(chosen) > 1:
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(train[chosen]), train_labels[chosen]).backward()
                optimizer.step()
    with torch.inference_mode():
        return 100 * (head.eval()(test).argmax(dim=1) == test_labels).float().mean().item()
