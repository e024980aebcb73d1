"""The running statistics of batch norms, the same for any number of processes, and what synchronised ones see."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from milan.training import distributed


class RunningStatistics:
    """One update of the running statistics for each optimizer step.

    Each micro-batch of the step, whichever process computes it, updates the statistics that the step began with; the step's
    statistics are the mean of these updates. (By itself a batch norm makes one update for each micro-batch of its own
    process, and processes differ.)

    Call note() after each micro-batch and update() after the last."""

    def __init__(self, model: nn.Module):
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.values = [value for norm in self.norms for value in (norm.running_mean, norm.running_var)]
        self.counts = [norm.num_batches_tracked for norm in self.norms]
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the statistics that a step begins with."""
        self.before = [value.clone() for value in self.values]
        self.sums = [torch.zeros_like(value) for value in self.values]

    @torch.no_grad()
    def note(self) -> None:
        """Add what this micro-batch made of the statistics, and set them back."""
        for value, before, total in zip(self.values, self.before, self.sums, strict=True):
            total += value
            value.copy_(before)
        for count in self.counts:
            count.sub_(1)

    @torch.no_grad()
    def update(self, micro_batches: int) -> None:
        """Set the step's statistics. micro_batches: of all processes in this step."""
        if not self.norms:
            return
        mean = distributed.total(torch.cat(self.sums)) / micro_batches
        for value, part in zip(self.values, mean.split([len(value) for value in self.values]), strict=True):
            value.copy_(part)
        for count in self.counts:
            count.add_(1)
        self.begin()


def say_what_it_sees(stage: str, batch_size: int, micro_batch: int) -> None:
    """Say over how many images batch norm computes its statistics where that is not the whole batch, as published.

    On GPUs this is the only thing, besides rounding, that depends on the number of processes."""
    world = distributed.world_size()
    if distributed.rank() == 0 and micro_batch * world != batch_size:
        mend = f"-S {stage}.micro_batch={batch_size // world}" if batch_size % world == 0 else "another number of processes"
        print(
            f"{stage}: batch norm sees {micro_batch} x {world} images at a time, as published the whole batch of {batch_size}: "
            f"for that, {mend}.",
            flush=True,
        )
