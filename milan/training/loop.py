"""The one training loop: order of the samples, precision, gradient accumulation, resume, progress.

The unit of work is the micro-batch. A batch is batch_size / micro_batch of them, dealt to the processes in turn. Every random
draw follows from the micro-batch's number in the step, so any number of processes sees the same samples and the same draws,
and their results agree to float rounding.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from milan.core.errors import Preempted, UserError
from milan.core.progress import Progress
from milan.data import seeding
from milan.params import Compute, Runtime, Training
from milan.training import distributed, optim
from milan.training.batch_norm import RunningStatistics
from milan.training.device import autocast
from milan.training.resume import SavedState

CURVE_POINTS = 100
CHECK_STEPS = 10  # steps between two readings of the loss: each makes the host wait for the device
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Order:
    """The samples of every micro-batch: a function of the seed alone. Raises UserError where n < batch_size.

    n: samples in the data set. An epoch is a permutation of them, cut into whole batches; the rest is left out of it."""

    n: int
    batch_size: int
    micro_batch: int
    epochs: float
    seed: int

    def __post_init__(self):
        if self.n < self.batch_size:
            raise UserError(
                f"A batch of {self.batch_size} needs at least as many samples, and the data set has {self.n}: "
                "lower batch_size in this stage's section of params.yaml."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.n // self.batch_size

    @property
    def total_steps(self) -> int:
        return max(1, round(self.epochs * self.steps_per_epoch))

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches in a batch."""
        return self.batch_size // self.micro_batch

    def keys(self, start_step: int, rank: int, world_size: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the micro-batches of one process from a step onwards, each a list of (epoch, sample index)."""
        permuted_epoch = None
        for step in range(start_step, self.total_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != permuted_epoch:
                indices, permuted_epoch = seeding.permutation(self.n, self.seed, "shuffle", epoch), epoch
            for number in range(rank, self.micro_batches, world_size):
                first = batch * self.batch_size + number * self.micro_batch
                yield [(epoch, index) for index in indices[first : first + self.micro_batch].tolist()]


def ignore_stop_signals(_worker: int) -> None:
    """Let a data loader's worker outlive a signal to the whole process group, until its process has saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def discard(point: dict) -> None:
    """Log nothing."""


@dataclass(frozen=True)
class FitSettings:
    """The settings of one training.

    name: shown in messages. log: called on rank 0 with each point of the curve, and at the end with the images per second.
    schedule: the learning rate of an epoch (milan/training/optim.py). micro_batch: takes the place of training.micro_batch.
    monitor: called on every rank, with the model in evaluation mode, every monitor_epochs epochs and after the last step (0:
    never); it returns further values of the curve's point {name: value}, and must leave the model as it is."""

    name: str
    training: Training
    compute: Compute
    runtime: Runtime
    seed: int
    saved: SavedState
    log: Callable[[dict], None] = discard
    schedule: Callable[..., float] = optim.lr_at
    micro_batch: int | None = None
    monitor: Callable[[], dict[str, float]] | None = None
    monitor_epochs: float = 0


def fit(
    model: nn.Module,
    dataset: Dataset,
    optimizer: torch.optim.Optimizer,
    settings: FitSettings,
    to_inputs: Callable[[dict], tuple],
) -> list[dict]:
    """Train a model and return the curve: points {"step", "epoch", "loss", "lr"}, at most CURVE_POINTS and those of the
    monitor, which have its values too.

    model: model(*to_inputs(batch)) is the loss, a scalar. dataset: its items (epoch, sample index) are dicts of tensors, and
    a batch is such a dict on the model's device. Continues from settings.saved where that holds a state. Every process calls
    fit with the same arguments.

    Raises UserError on a loss or weights that are not finite, naming the step and the last good save, and where the
    micro-batches cannot be shared evenly by the processes; Preempted after a signal, once the state is saved."""
    return Loop(model, dataset, optimizer, settings, to_inputs).train()


class Loop:
    """One call of fit. Read train, steps, one_step and add_gradient in this order: they are the algorithm."""

    def __init__(self, model, dataset, optimizer, settings: FitSettings, to_inputs):
        self.model, self.dataset, self.optimizer, self.settings, self.to_inputs = model, dataset, optimizer, settings, to_inputs
        self.device = next(model.parameters()).device
        self.precision = settings.compute.precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        training = settings.training
        self.order = Order(
            len(dataset), training.batch_size, settings.micro_batch or training.micro_batch, training.epochs, settings.seed
        )
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        if self.order.micro_batches % self.world_size:
            raise UserError(
                f"batch_size {training.batch_size} makes {self.order.micro_batches} micro-batches of {self.order.micro_batch}, "
                f"which {self.world_size} processes cannot share evenly: change micro_batch or runtime.processes."
            )
        self.accumulation = self.order.micro_batches // self.world_size  # micro-batches of this process in a step
        self.step, self.curve = 0, []
        self.checked = []  # the mean losses of the checks since the curve's last point
        self.asked_to_stop = False

    # The algorithm

    def train(self) -> list[dict]:
        """Continue from the saved state, take the steps that remain, and return the curve."""
        self.resume()
        self.statistics = RunningStatistics(self.model)
        self.forward = self.wrapped_model()
        with self.stop_on_signals():
            self.steps()
        self.model.eval()
        return self.curve

    def steps(self) -> None:
        """Take every remaining step, checking and saving at intervals."""
        self.model.train()
        progress = Progress(self.settings.name, self.order.total_steps, self.step, shown=self.rank == 0)
        losses, began, first = [], time.monotonic(), self.step
        self.saved_at = began
        batches = iter(self.loader())
        while self.step < self.order.total_steps:
            losses.append(self.one_step(batches))
            self.step += 1
            if self.step % CHECK_STEPS == 0 or self.ends_point():
                asked_to_stop = self.check(losses)
                losses = []
                self.save_when_due(asked_to_stop)
            progress.update(1, **self.latest_loss())
        progress.close()
        if self.rank == 0 and self.step > first:
            images = (self.step - first) * self.order.batch_size
            self.settings.log({"step": self.step, "images_per_second": images / (time.monotonic() - began)})

    def one_step(self, batches: Iterator[dict]) -> Tensor:
        """Take one optimizer step. Return the mean loss of this process's micro-batches, detached."""
        self.lr = self.scheduled_lr()
        optim.set_lr(self.optimizer, self.lr)
        losses = [self.add_gradient(next(batches), number) for number in range(self.accumulation)]
        self.statistics.update(self.order.micro_batches)
        self.update_weights()
        return torch.stack(losses).mean()

    def add_gradient(self, batch: dict, number: int) -> Tensor:
        """Add the gradient of this process's micro-batch of this number in the step. Return its loss, detached."""
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        seeding.seed_globals(self.settings.seed, "step", self.step, number * self.world_size + self.rank)
        inputs = self.to_inputs(batch)
        synchronises = self.world_size == 1 or number == self.accumulation - 1  # the processes exchange gradients once a step
        with contextlib.nullcontext() if synchronises else self.forward.no_sync():
            with autocast(self.precision, self.device):
                loss = self.forward(*inputs)
            self.scaler.scale(loss / self.accumulation).backward()
        self.statistics.note()
        return loss.detach()

    def update_weights(self) -> None:
        if self.settings.training.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.training.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def scheduled_lr(self) -> float:
        training, epoch = self.settings.training, self.step / self.order.steps_per_epoch
        return self.settings.schedule(
            epoch, lr=training.lr, min_lr=training.min_lr, warmup_epochs=training.warmup_epochs, epochs=training.epochs
        )

    # Its parts

    def wrapped_model(self) -> nn.Module:
        """Return the model compiled and distributed, as the settings ask."""
        model = torch.compile(self.model) if self.settings.compute.compile else self.model
        if self.world_size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        # No buffer needs a broadcast: they are constant, or belong to a batch norm, whose RunningStatistics are equal anyway.
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def loader(self) -> DataLoader:
        """Return this process's micro-batches from the current step onwards."""
        return DataLoader(
            self.dataset,
            batch_sampler=self.order.keys(self.step, self.rank, self.world_size),
            num_workers=self.settings.runtime.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_stop_signals,
        )

    # The loss and the curve

    def ends_point(self) -> bool:
        """Return whether the current step is the last of a point of the curve."""
        total = self.order.total_steps
        return self.step % math.ceil(total / CURVE_POINTS) == 0 or self.step == total or self.is_monitored()

    def is_monitored(self) -> bool:
        """Return whether the monitor looks at the model after the current step."""
        if self.settings.monitor is None or not self.settings.monitor_epochs:
            return False
        every = max(1, round(self.settings.monitor_epochs * self.order.steps_per_epoch))
        return self.step % every == 0 or self.step == self.order.total_steps

    def check(self, losses: list[Tensor]) -> bool:
        """Read the mean loss of the steps since the last check over all processes: only here the host waits for the device.

        Return whether any process was asked to stop. Raises UserError where the loss is not finite."""
        mean = torch.stack(losses).mean()
        loss, asked = distributed.mean(torch.stack([mean, torch.full_like(mean, self.asked_to_stop)])).tolist()
        if not math.isfinite(loss):
            raise self.diverged(f"the loss became {loss} at or shortly before step {self.step}")
        self.checked.append(loss)
        if self.ends_point():
            self.add_point(sum(self.checked) / len(self.checked))
        return asked > 0

    def add_point(self, loss: float) -> None:
        """Add a point to the curve and log it."""
        epoch = round(self.step / self.order.steps_per_epoch, 4)
        self.curve.append({"step": self.step, "epoch": epoch, "loss": loss, "lr": self.lr, **self.monitored()})
        self.checked = []
        if self.rank == 0:
            self.settings.log(self.curve[-1])

    def monitored(self) -> dict[str, float]:
        """Return what the monitor sees, where it looks at the model after the current step."""
        if not self.is_monitored():
            return {}
        self.model.eval()
        values = self.settings.monitor()
        self.model.train()
        return values

    def latest_loss(self) -> dict[str, float]:
        """Return the loss to show beside the progress, once there is one."""
        losses = self.checked or [point["loss"] for point in self.curve[-1:]]
        return {"loss": losses[-1]} if losses else {}

    # Saving and resuming

    def save_when_due(self, asked_to_stop: bool) -> None:
        """Save every save_seconds, when asked to stop, which then raises Preempted, and after the last step, so that an
        interrupted evaluation repeats no step. Raises UserError instead where the state is not finite."""
        due = time.monotonic() - self.saved_at >= self.settings.runtime.save_seconds
        if self.rank == 0 and (due or asked_to_stop or self.step == self.order.total_steps):
            self.refuse_broken_weights()
            self.settings.saved.save(self.step, self.state())
            self.saved_at = time.monotonic()
        if asked_to_stop:
            distributed.barrier()  # no process leaves before the state is saved: the first to leave ends the others
            self.say(f"stopped by a signal at step {self.step}; saved.")
            raise Preempted

    def refuse_broken_weights(self) -> None:
        """Raise UserError where a number of the model or the optimizer is not finite: the update after a finite loss may do that.

        The largest number of all is one reduction and one wait for the device."""
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.model.state_dict().values(), *moments]
        numbers = [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]
        if not nn.utils.get_total_norm(numbers, math.inf).isfinite():
            raise self.diverged(f"the weights or the optimizer's moments are not finite after step {self.step}")

    def diverged(self, what: str) -> UserError:
        return UserError(
            f"{self.settings.name}: {what} of {self.order.total_steps} (learning rate {self.lr:.3g}); "
            f"{self.settings.saved.kept()}. Lower this stage's lr, set clip_grad, or use compute.precision=bf16 or fp32."
        )

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "curve": self.curve,
            "checked": self.checked,
        }

    def resume(self) -> None:
        """Load the newest save that rank 0 sees, where there is one."""
        saved = self.settings.saved
        newest = distributed.from_rank_0(saved.newest() if self.rank == 0 else None)
        if newest is None:
            return
        if self.rank == 0:
            saved.note_edits()
        state = saved.read(newest, self.device)
        for name in ("model", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.curve, self.checked = state["step"], state["curve"], state["checked"]
        self.say(f"continuing from step {self.step} of {self.order.total_steps} ({saved.folder})")

    def say(self, message: str) -> None:
        if self.rank == 0:
            print(f"{self.settings.name}: {message}", flush=True)

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into a request to stop at the next check."""

        def ask_to_stop(*_):
            self.asked_to_stop = True

        before = [signal.signal(number, ask_to_stop) for number in STOP_SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(STOP_SIGNALS, before, strict=True):
                signal.signal(number, handler)
