"""How does the training loop scale with processes?

    python -m benchmarks.scaling                        # 1 and 2 processes on a CPU, 1, 2, 4 .. GPUs
    python -m benchmarks.scaling --processes 1 8 --batch 256

Runs the pretraining loop itself (milan/training/loop.py: DistributedDataParallel over gloo or nccl, the teacher inside unless
--banked) on random images, a micro-batch of --batch for every process, and times the steps after the first few.
Efficiency is the rate a process over that of the first row. A process has --threads threads. The loop looks at its loss
at every step here (so few make a curve), and not every ten: on a GPU a little slower than a long run.
"""

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks import measure
from benchmarks.step import FEATURES, MILAN, our_teacher
from milan.core.identity import Identity
from milan.data import transforms
from milan.method.model import MaskedPretraining
from milan.params import Compute, Model, Runtime, Training
from milan.training import distributed, loop, optim
from milan.training.device import autocast, resolve_compute, set_up
from milan.training.resume import SavedState

WARM = 3  # steps before the clock starts


class Images(Dataset):
    """One random image, its targets where there is a bank, over and over: what is timed is the loop, not the loading."""

    def __init__(self, model: Model, length: int, banked: bool):
        self.length = length
        side, n = model.image_size, model.n_patches
        self.sample = {"image": torch.randint(0, 256, (3, side, side), dtype=torch.uint8), "noise": torch.rand(n)}
        if banked:
            self.sample |= {"features": torch.randn(1 + n, FEATURES).half(), "importance": torch.rand(n)}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        return self.sample


class Clock:
    """The training loop's to_inputs, which also notes when step WARM begins, and when step WARM + steps does: after the last
    one the loop saves, which takes seconds."""

    def __init__(self, teacher: nn.Module | None, precision: str, device: torch.device, steps: int):
        self.teacher, self.precision, self.device = teacher, precision, device
        self.asked, self.noted, self.times = 0, (WARM, WARM + steps), []

    def __call__(self, batch: dict[str, Tensor]) -> tuple:
        if self.asked in self.noted:
            measure.wait(self.device)
            self.times.append(time.perf_counter())
        self.asked += 1
        images = transforms.normalise(batch["image"])
        if self.teacher is None:
            return images, batch["noise"], batch["features"], batch["importance"]
        with torch.inference_mode(), autocast(self.precision, self.device):
            return images, batch["noise"], *self.teacher(images)

    def seconds(self) -> float:
        began, ended = self.times
        return ended - began


@dataclass(frozen=True)
class Place:
    """What distributed.launch asks of a recipe."""

    compute: Compute
    runtime: Runtime

    @property
    def world_size(self) -> int:
        return self.runtime.processes


def train(p: Place, model: Model, batch: int, steps: int, banked: bool, saved: SavedState) -> dict:
    """Images a second of all processes together."""
    device = set_up(p.compute)
    precision, whole = p.compute.precision, batch * p.world_size
    student = MaskedPretraining(model, MILAN, 0.75, FEATURES).to(device)
    optimizer = optim.adamw(optim.decay_groups(student, 0.05), (0.9, 0.95))
    teacher = None if banked else our_teacher(model, precision, device)
    if teacher and p.compute.compile:
        teacher.compile()  # as stages/pretrain.py does
    clock = Clock(teacher, precision, device, steps)
    training = Training(
        epochs=WARM + steps + 1,
        warmup_epochs=0,
        batch_size=whole,
        micro_batch=batch,
        lr=1e-5,
        min_lr=0,
        weight_decay=0,
        clip_grad=None,
    )
    run = loop.FitSettings("scaling", training, p.compute, p.runtime, 0, saved)
    loop.fit(student, Images(model, whole, banked), optimizer, run, clock)
    return {"rate": steps * whole / clock.seconds()}


def counts() -> list[int]:
    """1, 2, 4 .. up to the GPUs, or to the cores but at most four."""
    most = torch.cuda.device_count() or min(4, os.cpu_count() or 1)
    return [2**k for k in range(most.bit_length())]


def main() -> None:
    parser = measure.arguments(__doc__, repeats=1)
    measure.step_arguments(parser)
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 4, help="images a process")
    parser.add_argument("--processes", type=int, nargs="+", default=counts())
    parser.add_argument("--steps", type=int, default=20 if torch.cuda.is_available() else 4, help="timed")
    parser.set_defaults(threads=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rates: dict[int, list[float]] = {n: [] for n in args.processes}
    for _ in range(args.repeats):
        for n in args.processes:
            workers = 4 if args.device != "cpu" else 0
            saved = SavedState("benchmark", Identity({"started": str(time.time_ns())}), {})
            place = Place(resolve_compute(measure.compute(args), measure.MODELS[args.model]), Runtime(processes=n, workers=workers, save_seconds=1e9))
            arguments = measure.MODELS[args.model], args.batch, args.steps, args.banked, saved
            rates[n].append(distributed.launch(train, place, *arguments)["rate"])
            saved.clean()
    first, rows = args.processes[0], []
    for n, found in rates.items():
        rate = measure.median(found)
        row = {"case": f"{n} processes" if n > 1 else "1 process", "images/s": rate, "images/s and process": rate / n}
        rows.append(
            row | {"efficiency %": 100 * (rate / n) / (measure.median(rates[first]) / first), "± %": measure.spread(found)}
        )
    about = {
        **measure.machine(torch.device(args.device)),
        "model": args.model,
        "images a process": args.batch,
        "steps": args.steps,
    }
    measure.show("The training loop by processes", rows, about, args.json)


if __name__ == "__main__":
    main()
