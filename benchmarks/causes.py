"""What does each change to the compiled step bring, side by side?

    python -m benchmarks.causes

Times whole steps in turn: as the library does them; with the teacher eager; with the teacher's patches convolved; with the
teacher in float8; and as the library does them, replayed as a CUDA graph with the optimizer behind it. Then how far each
teacher's targets are from those in float32. A CPU runs them eagerly, as a rehearsal.
"""

import copy

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.float8 import Float8Tower
from benchmarks.step import Batch, Step, batch_of, our_step
from benchmarks.teacher import deviations, pictures
from milan.training.device import autocast

OURS = "ours, compiled"


def behind(step: Step, tower: nn.Module, compiled: bool) -> Step:
    """The same student behind another teacher."""
    teacher = torch.compile(tower) if compiled else tower
    return Step(teacher, step.call, step.student, step.optimizer, step.precision, step.device)


def convolved(tower: nn.Module) -> nn.Module:
    """A copy whose patches are embedded by a convolution."""
    tower = copy.deepcopy(tower)
    tower.visual.conv1.__class__ = nn.Conv2d
    return tower


class Replayed:
    """Teacher, forward and backward as one CUDA graph, and the optimizer behind it."""

    def __init__(self, step: Step, batch: Batch):
        self.step = step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step.loss(batch, step.look(batch)).backward()
        self.grads = [p.grad for group in step.optimizer.param_groups for p in group["params"]]

    def __call__(self) -> None:
        self.graph.replay()
        self.step.optimizer.step()


def main() -> None:
    parser = measure.arguments(__doc__, repeats=5)
    measure.step_arguments(parser)
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, model, precision = torch.device(args.device), measure.MODELS[args.model], measure.precision(args)
    images = pictures(min(args.batch, 64), model.image_size, device)
    with torch.inference_mode():
        targets = our_step(model, "fp32", device, True, False).teacher(images)
    torch.set_float32_matmul_precision("high")  # as training does
    compiled, batch = measure.compute(args).compile, batch_of(model, args.batch, device, precision)
    ours = our_step(model, precision, device, True, compiled)
    tower = getattr(ours.teacher, "_orig_mod", ours.teacher)
    towers = {OURS: tower, "patches convolved": convolved(tower)}
    towers["float8"] = Float8Tower(copy.deepcopy(tower)).eval().requires_grad_(False)
    steps = {OURS: ours, "teacher eager": behind(ours, tower, False)}
    steps |= {name: behind(ours, towers[name], compiled) for name in ("patches convolved", "float8")}
    cases = {name: lambda step=step: step(batch) for name, step in steps.items()}
    about = {**measure.machine(device), "model": args.model, "batch": args.batch, "precision": precision}
    more = {"Targets beside float32's": far(towers, images, targets, precision)}
    compare(cases, args, device, about, more)
    if device.type == "cuda":
        cases["replayed as a graph"] = Replayed(ours, batch)
        compare(cases, args, device, about, more)


def far(towers: dict[str, nn.Module], images: Tensor, targets: tuple[Tensor, Tensor], precision: str) -> list[dict]:
    with torch.inference_mode(), autocast(precision, images.device):
        return [{"case": name, **deviations(tower(images), targets)} for name, tower in towers.items()]


def compare(cases: dict, args, device: torch.device, about: dict, more: dict) -> None:
    seconds = measure.in_turn(cases, args.repeats, device, warm=2, times=measure.in_a_row(device))
    rows, base = [], measure.median(seconds[OURS])
    for name, values in seconds.items():
        took = measure.median(values)
        row = {"case": name, "images/s": args.batch / took, "ms a step": 1000 * took, "against ours": base / took}
        rows.append(row | {"± %": measure.spread(values)})
    measure.show("Causes", rows, about, args.json, **more)


if __name__ == "__main__":
    main()
