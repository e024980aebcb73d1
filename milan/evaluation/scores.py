"""Scores of an evaluation: top-1 and top-5 accuracy, a training's best, nearest neighbours, RankMe, pairs for a confusion matrix.

Scores are yielded as (name, value); the caller stores them.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from milan.training import distributed

MAX_SIMILARITIES = 2**28  # held in memory at a time: 1 GiB in float32


def accuracy(logits: Tensor, labels: Tensor, prefix: str) -> Iterator[tuple[str, float]]:
    """Yield (prefix/top1, %) and (prefix/top5, %) of logits (n, C) and labels (n,)."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    yield f"{prefix}/top1", 100 * hits[:, 0].double().mean().item()
    yield f"{prefix}/top5", 100 * hits.any(dim=1).double().mean().item()


def best_top1(curve: list[dict], prefix: str) -> Iterator[tuple[str, float]]:
    """Yield (prefix/best_top1, %), the largest val/top1 in a training's curve; nothing where no point of it has one."""
    if tops := [point["val/top1"] for point in curve if "val/top1" in point]:
        yield f"{prefix}/best_top1", max(tops)


def is_chance(top1: float, classes: int, images: int) -> bool:
    """Return whether a top-1 in % over so many images is that of guessing, or less, up to two standard errors."""
    guess = 1 / classes
    return top1 <= 100 * (guess + 2 * math.sqrt(guess * (1 - guess) / images))


@torch.inference_mode()
def knn_top1(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    device: torch.device,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Return k-nearest-neighbour accuracy in %, with votes that weigh exp(cosine / temperature) (arXiv 1805.01978).

    Features (n, D) are normalised here. Every rank passes all features, classifies its share of the test images, and gets
    the result for all of them."""
    train, train_labels = nn.functional.normalize(train.float(), dim=1).to(device), train_labels.to(device)
    classes, correct = int(train_labels.max()) + 1, torch.zeros(1, dtype=torch.int64, device=device)
    own = slice(distributed.rank(), None, distributed.world_size())
    rows = max(1, MAX_SIMILARITIES // len(train))
    for features, labels in zip(test[own].split(rows), test_labels[own].split(rows), strict=True):
        unit = nn.functional.normalize(features.float(), dim=1).to(device)
        similarity, neighbours = (unit @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(unit), classes, device=device)
        # Votes are relative to the nearest neighbour's, so that no temperature overflows.
        votes.scatter_add_(1, train_labels[neighbours], ((similarity - similarity[:, :1]) / temperature).exp())
        correct += (votes.argmax(dim=1) == labels.to(device)).sum()
    return 100 * distributed.total(correct).item() / len(test)


def rankme(features: Tensor) -> float:
    """Return RankMe of features (n, D), a smooth rank: the exponential of the entropy of their singular values, which are
    divided by their sum (arXiv 2210.02885, without its epsilon: 0 log 0 is 0). It lies between 1, where all features are
    multiples of one, and min(n, D). NaN where a feature is not finite, or all are 0."""
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(features.double())
    return torch.special.entr(values / values.sum()).sum().exp().item()


def confusion_pairs(predicted: Tensor, labels: Tensor, max_classes: int = 50, max_rows: int = 5000) -> Tensor:
    """Return (m, 2) pairs of actual and predicted class, for a confusion matrix small enough to read and to keep in git.

    predicted, labels: (n,). With more than max_classes classes, only images are kept whose actual and predicted class are
    both among the 20 classes with the most mistakes. With more than max_rows images, every second, third, ... is kept."""
    pairs = torch.stack([labels, predicted], dim=1)
    if labels.max() >= max_classes:
        mistakes = torch.bincount(labels[predicted != labels], minlength=int(pairs.max()) + 1)
        worst = mistakes.argsort(descending=True, stable=True)[:20]
        pairs = pairs[torch.isin(pairs, worst).all(dim=1)]
    return pairs[:: max(1, -(-len(pairs) // max_rows))]
