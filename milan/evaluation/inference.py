"""Run a model over a whole data set. Every sample is used once, for any number of processes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from milan.core.progress import track
from milan.data import transforms
from milan.training import distributed


def rank_batches(dataset: Dataset, batch_size: int, device: torch.device, name: str, workers: int = 0) -> Iterator[dict]:
    """Yield batches of this rank's samples (every world_size-th one), on the device; rank 0 shows progress under `name`."""
    samples = Subset(dataset, range(distributed.rank(), len(dataset), distributed.world_size()))
    loader = DataLoader(samples, batch_size=batch_size, num_workers=workers)
    for batch in track(loader, name, len(loader)) if distributed.rank() == 0 else loader:
        yield {key: value.to(device) for key, value in batch.items()}


@torch.inference_mode()
def model_outputs(
    model: Callable[..., Tensor],
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    name: str,
    workers: int = 0,
    extra_keys: tuple[str, ...] = (),
    prepare: Callable[[Tensor], Tensor] = transforms.normalise,
) -> tuple[Tensor, Tensor]:
    """Return a model's outputs for all n samples, (n, ...) float32, and their labels (n,): in order, on the CPU, on every rank.

    model: called with the images (B, 3, H, W) that `prepare` makes of uint8 ones, and the batch entries named by extra_keys."""
    outputs, labels = [], []
    for batch in rank_batches(dataset, batch_size, device, name, workers):
        extra = (batch[key] for key in extra_keys)
        outputs.append(model(prepare(batch["image"]), *extra).float().cpu())
        labels.append(batch["label"].cpu())
    return tuple(gather_rows(torch.cat(parts) if parts else torch.empty(0), len(dataset)) for parts in (outputs, labels))


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """Join the rows of all ranks, of which each holds every world_size-th one, into (total, ...) in order."""
    if distributed.world_size() == 1:
        return rows
    parts: list = [None] * distributed.world_size()
    torch.distributed.all_gather_object(parts, rows)
    whole = parts[0].new_empty(total, *parts[0].shape[1:])
    for rank, part in enumerate(parts[:total]):
        whole[rank :: len(parts)] = part
    return whole
