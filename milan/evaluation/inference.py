"""Run a model over a whole data set. Every sample is used once, for any number of processes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from milan.core.progress import track
from milan.data import transforms
from milan.training import distributed
from milan.training.loop import ignore_stop_signals


def rank_batches(dataset: Dataset, batch_size: int, device: torch.device, name: str | None, workers: int = 0) -> Iterator[dict]:
    """Yield batches of this rank's samples (every world_size-th one), on the device; rank 0 shows progress under `name`, where
    there is one."""
    samples = Subset(dataset, range(distributed.rank(), len(dataset), distributed.world_size()))
    loader = DataLoader(samples, batch_size=batch_size, num_workers=workers, worker_init_fn=ignore_stop_signals)
    for batch in track(loader, name, len(loader)) if name and distributed.rank() == 0 else loader:
        yield {key: value.to(device) for key, value in batch.items()}


@torch.inference_mode()
def model_outputs(
    model: Callable[..., Tensor],
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    name: str | None,
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
    return gather_rows(outputs, len(dataset)), gather_rows(labels, len(dataset))


def gather_rows(own: list[Tensor], total: int) -> Tensor:
    """Join the rows of all ranks, of which each holds every world_size-th one, in parts, into (total, ...) in order."""
    rows = torch.cat(own) if own else torch.empty(0)
    if distributed.world_size() == 1:
        return rows
    parts: list = [None] * distributed.world_size()
    torch.distributed.all_gather_object(parts, rows)
    whole = parts[0].new_empty(total, *parts[0].shape[1:])
    for rank, part in enumerate(parts[:total]):
        whole[rank :: len(parts)] = part
    return whole
