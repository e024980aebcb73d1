"""Evaluations yield (name, value); the caller stores. Every sample counts once, for any number of processes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from milan.core.progress import track
from milan.data import transforms
from milan.training import distributed

SIMILARITIES = 2**28  # held at a time: 1 GiB in float32


def share_of(dataset: Dataset) -> Subset:
    """This process's samples: every world_size-th one, none twice."""
    return Subset(dataset, range(distributed.rank(), len(dataset), distributed.world_size()))


def batches(dataset: Dataset, batch_size: int, device: torch.device, name: str, workers: int = 0) -> Iterator[dict]:
    """Batches of this process's share, on the device, with progress."""
    loader = DataLoader(share_of(dataset), batch_size=batch_size, num_workers=workers)
    shown = track(loader, name, len(loader)) if distributed.rank() == 0 else loader
    for batch in shown:
        yield {key: value.to(device) for key, value in batch.items()}


@torch.inference_mode()
def outputs(
    logits_of: Callable[..., Tensor],
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    name: str,
    workers: int = 0,
    also: tuple[str, ...] = (),
):
    """(n, C) float32 outputs of normalised images and (n,) labels, in order, on the CPU; every process gets all.

    also: what else of a batch logits_of is given, behind the images."""
    found, labels = [], []
    for batch in batches(dataset, batch_size, device, name, workers):
        rest = (batch[key] for key in also)
        found.append(logits_of(transforms.normalise(batch["image"]), *rest).float().cpu())
        labels.append(batch["label"].cpu())
    return tuple(gathered(torch.cat(parts) if parts else torch.empty(0), len(dataset)) for parts in (found, labels))


def gathered(part: Tensor, n: int) -> Tensor:
    """The parts of all processes, each holding every world_size-th row, in order."""
    if distributed.world_size() == 1:
        return part
    parts: list = [None] * distributed.world_size()
    torch.distributed.all_gather_object(parts, part)
    whole = parts[0].new_empty(n, *parts[0].shape[1:])
    for rank, rows in enumerate(parts[:n]):
        whole[rank :: len(parts)] = rows
    return whole


def accuracy(logits: Tensor, labels: Tensor, prefix: str) -> Iterator[tuple[str, float]]:
    """(prefix/top1, %) and (prefix/top5, %) of logits (n, C) and labels (n,)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    yield f"{prefix}/top1", 100 * ranked[:, 0].double().mean().item()
    yield f"{prefix}/top5", 100 * ranked.any(dim=1).double().mean().item()


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
    """Weighted k-nearest-neighbour accuracy in % on L2-normalised features (Wu et al. 2018: votes exp(cos / T)).

    Every process is given all features and judges its share of the test images; every process gets the result."""
    train, train_labels = nn.functional.normalize(train.float(), dim=1).to(device), train_labels.to(device)
    classes, right = int(train_labels.max()) + 1, torch.zeros(1, dtype=torch.int64, device=device)
    mine = slice(distributed.rank(), None, distributed.world_size())
    rows = max(1, SIMILARITIES // len(train))
    for features, labels in zip(test[mine].split(rows), test_labels[mine].split(rows), strict=True):
        unit = nn.functional.normalize(features.float(), dim=1).to(device)
        similarity, neighbours = (unit @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(unit), classes, device=device)
        # Relative to the nearest neighbour's vote, so that no temperature overflows.
        votes.scatter_add_(1, train_labels[neighbours], ((similarity - similarity[:, :1]) / temperature).exp())
        right += (votes.argmax(dim=1) == labels.to(device)).sum()
    return 100 * distributed.total(right).item() / len(test)


def confused(predicted: Tensor, labels: Tensor, classes: int = 50, rows: int = 5000) -> Tensor:
    """(n, 2) pairs of actual and predicted class (n,), for a confusion matrix that is small enough to read and to keep
    in git. Of more classes than `classes`, the images of the 20 with the most mistakes that were taken for one of the
    same 20; of more images than `rows`, every second, every third, ... one."""
    pairs = torch.stack([labels, predicted], dim=1)
    if labels.max() >= classes:
        mistakes = torch.bincount(labels[predicted != labels], minlength=int(pairs.max()) + 1)
        worst = mistakes.argsort(descending=True, stable=True)[:20]
        pairs = pairs[torch.isin(pairs, worst).all(dim=1)]
    return pairs[:: max(1, -(-len(pairs) // rows))]
