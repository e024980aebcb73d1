"""The one training loop: order of the data, precision, accumulation, resume, progress.

The unit of work is the micro-batch. A global batch is batch_size / micro_batch of them, dealt to the
processes in turn, and all that is random inside one follows from its number; so an epoch sees the same data
and the same draws for any number of processes, and results agree to float rounding.
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
from milan.training.device import autocast, resolve_precision
from milan.training.resume import SavedState

CURVE_POINTS = 100
CHECK_STEPS = 10  # between two looks at the loss, which make the host wait for the device


@dataclass(frozen=True)
class Order:
    """Which samples make up which micro-batch: a function of the seed alone."""

    n: int
    batch_size: int
    micro_batch: int
    epochs: float
    seed: int

    def __post_init__(self):
        if self.n < self.batch_size:
            raise UserError(
                f"A global batch of {self.batch_size} needs at least as many samples, and the data set has {self.n}: "
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
        return self.batch_size // self.micro_batch

    def keys(self, start_step: int, rank: int, world: int) -> Iterator[list[tuple[int, int]]]:
        """Micro-batches of one process, as lists of (epoch, sample index), from a step onwards."""
        epoch_of_order = None
        for step in range(start_step, self.total_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != epoch_of_order:
                order, epoch_of_order = seeding.permutation(self.n, self.seed, "shuffle", epoch).tolist(), epoch
            for micro in range(rank, self.micro_batches, world):
                first = place * self.batch_size + micro * self.micro_batch
                yield [(epoch, index) for index in order[first : first + self.micro_batch]]


class KeyedBatches:
    """A batch sampler over Order.keys."""

    def __init__(self, order: Order, start_step: int, rank: int, world: int):
        self.arguments = order, start_step, rank, world

    def __iter__(self):
        order, *rest = self.arguments
        return order.keys(*rest)


def deaf(_: int) -> None:
    """For a loader's worker: a signal to the whole group must not end it before its process has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def unlogged(point: dict) -> None:
    pass


@dataclass(frozen=True)
class FitSettings:
    """What a training run is given besides its model and data."""

    name: str
    training: Training
    compute: Compute
    runtime: Runtime
    seed: int
    saved: SavedState
    log: Callable[[dict], None] = unlogged
    schedule: Callable[..., float] = optim.lr_at
    micro_batch: int | None = None


def fit(
    model: nn.Module, dataset: Dataset, optimizer: torch.optim.Optimizer, run: FitSettings, to_inputs: Callable[[dict], tuple]
) -> list[dict]:
    """Train model, whose forward(*to_inputs(batch)) is the loss, and return the curve: a point every few steps
    {"step", "epoch", "loss", "lr"}. Continues from run.saved when it holds a state.

    Raises UserError on a non-finite loss, naming the step and the last good save."""
    return Loop(model, dataset, optimizer, run, to_inputs).train()


class Loop:
    def __init__(self, model, dataset, optimizer, run: FitSettings, to_inputs):
        self.model, self.optimizer, self.run, self.to_inputs = model, optimizer, run, to_inputs
        self.device = next(model.parameters()).device
        self.precision = resolve_precision(run.compute, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        t = run.training
        self.order = Order(len(dataset), t.batch_size, run.micro_batch or t.micro_batch, t.epochs, run.seed)
        self.world, self.rank = distributed.world_size(), distributed.rank()
        if self.order.micro_batches % self.world:
            raise UserError(
                f"batch_size {t.batch_size} makes {self.order.micro_batches} micro-batches of {self.order.micro_batch}, "
                f"which {self.world} processes cannot share evenly: change micro_batch or runtime.processes."
            )
        self.accumulation = self.order.micro_batches // self.world
        self.dataset, self.step, self.curve, self.checked = dataset, 0, [], []
        self.asked_to_stop = False

    def train(self) -> list[dict]:
        self.resume()
        self.running = RunningStatistics(self.model)
        self.forward = self.wrapped()
        with self.stop_on_signals():
            self.steps()
        self.model.eval()
        return self.curve

    def wrapped(self) -> nn.Module:
        model = torch.compile(self.model) if self.run.compute.compile else self.model
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are constant, or a batch norm's, which RunningStatistics keeps alike.
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def loader(self) -> DataLoader:
        sampler = KeyedBatches(self.order, self.step, self.rank, self.world)
        workers = self.run.runtime.workers
        cuda = self.device.type == "cuda"
        return DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=cuda,
            persistent_workers=workers > 0,
            worker_init_fn=deaf,
        )

    def steps(self) -> None:
        self.model.train()
        progress = Progress(self.run.name, self.order.total_steps, self.step, shown=self.rank == 0)
        losses, self.saved_at, first = [], time.monotonic(), self.step
        batches = iter(self.loader())
        while self.step < self.order.total_steps:
            losses.append(self.one_step(batches))
            self.step += 1
            if self.is_check():
                asked_to_stop = self.check(losses)
                losses = []
                self.save_when_due(asked_to_stop)
            progress.update(1, **({"loss": self.shown_loss()} if self.curve or self.checked else {}))
        progress.close()
        if self.rank == 0 and self.step > first:
            rate = (self.step - first) * self.order.batch_size / (time.monotonic() - progress.began)
            self.run.log({"step": self.step, "images_per_second": rate})

    def shown_loss(self) -> float:
        return self.checked[-1] if self.checked else self.curve[-1]["loss"]

    def is_check(self) -> bool:
        return self.step % CHECK_STEPS == 0 or self.closes_point()

    def closes_point(self) -> bool:
        total = self.order.total_steps
        return self.step % math.ceil(total / CURVE_POINTS) == 0 or self.step == total

    def one_step(self, batches: Iterator[dict]) -> Tensor:
        """One optimizer step over this process's share of the global batch; its mean loss, detached."""
        self.lr = self.lr_now()
        optim.set_lr(self.optimizer, self.lr)
        losses = []
        for micro in range(self.accumulation):
            batch = self.to_device(next(batches))
            seeding.seed_globals(self.run.seed, "step", self.step, micro * self.world + self.rank)
            inputs = self.to_inputs(batch)
            last = micro == self.accumulation - 1
            wait = contextlib.nullcontext() if last or self.world == 1 else self.forward.no_sync()
            with wait:
                with autocast(self.precision, self.device):
                    loss = self.forward(*inputs)
                self.scaler.scale(loss / self.accumulation).backward()
            self.running.note()
            losses.append(loss.detach())
        self.running.update(self.order.micro_batches)
        self.update()
        return torch.stack(losses).mean()

    def update(self) -> None:
        if self.run.training.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.run.training.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def lr_now(self) -> float:
        t = self.run.training
        epoch = self.step / self.order.steps_per_epoch
        return self.run.schedule(epoch, lr=t.lr, min_lr=t.min_lr, warmup_epochs=t.warmup_epochs, epochs=t.epochs)

    def to_device(self, batch: dict) -> dict:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def check(self, losses: list[Tensor]) -> bool:
        """Look at the losses since the last check, the only place where the host waits for the device; and tell whether
        any process was asked to stop."""
        mean = torch.stack(losses).mean()
        loss, asked = distributed.mean(torch.stack([mean, torch.full_like(mean, self.asked_to_stop)])).tolist()
        if not math.isfinite(loss):
            self.stop_on_non_finite(loss)
        self.checked.append(loss)
        if self.closes_point():
            self.point(sum(self.checked) / len(self.checked))
        return asked > 0

    def point(self, loss: float) -> None:
        epoch = round(self.step / self.order.steps_per_epoch, 4)
        self.curve.append({"step": self.step, "epoch": epoch, "loss": loss, "lr": self.lr})
        self.checked = []
        if self.rank == 0:
            self.run.log(self.curve[-1])

    def stop_on_non_finite(self, loss: float) -> None:
        raise UserError(
            f"{self.run.name}: the loss became {loss} at or shortly before step {self.step} of {self.order.total_steps} "
            f"(learning rate {self.lr:.3g}); {self.run.saved.kept()}. Lower this stage's lr, set clip_grad, or use compute.precision=bf16 or fp32."
        )

    def save_when_due(self, asked_to_stop: bool) -> None:
        """The last step is saved too, so that an evaluation that is interrupted needs no step again."""
        due = time.monotonic() - self.saved_at >= self.run.runtime.save_seconds
        if self.rank == 0 and (due or asked_to_stop or self.step == self.order.total_steps):
            self.run.saved.save(self.step, self.state())
            self.saved_at = time.monotonic()
        if asked_to_stop:
            distributed.barrier()  # nobody leaves before the state is saved: the first to leave ends the others
            if self.rank == 0:
                print(f"{self.run.name}: stopped by a signal at step {self.step}; saved.", flush=True)
            raise Preempted

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
        newest = distributed.from_rank_0(self.run.saved.newest() if self.rank == 0 else None)
        if newest is None:
            return
        if self.rank == 0:
            self.run.saved.note_edits()
        state = self.run.saved.read(newest, self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.curve, self.checked = state["step"], state["curve"], state["checked"]
        if self.rank == 0:
            print(
                f"{self.run.name}: continuing from step {self.step} of {self.order.total_steps} ({self.run.saved.folder})",
                flush=True,
            )

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        def note(*_):
            self.asked_to_stop = True

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, note) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
