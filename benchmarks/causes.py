"""What does each change to the compiled step bring, side by side?

    python -m benchmarks.causes
    python -m benchmarks.causes --banked
    python -m benchmarks.causes --cases float8 "replayed as a graph"

Times whole steps in turn: as the library does them, and with each of the cases: the teacher eager, its patches convolved, or
the teacher in float8, and how far each of these teachers' targets are from those in float32; on a GPU also teacher and student
compiled in torch's mode reduce-overhead, which replays CUDA graphs, and teacher, forward and backward replayed as one CUDA
graph of our own. A table is written before and after the graph of our own. A CPU runs the others eagerly, as a rehearsal.
"""

import copy

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.float8 import Float8Tower
from benchmarks.step import Batch, Step, batch_of, our_step
from benchmarks.teacher import deviations, pictures
from milan.training.device import autocast

OURS, OVERHEAD, GRAPH = "ours", "reduce-overhead", "replayed as a graph"
TEACHERS = ("teacher eager", "patches convolved", "float8")


def behind(step: Step, tower: nn.Module, compiled: bool) -> Step:
    """The same student behind another teacher."""
    teacher = torch.compile(tower) if compiled else tower
    return Step(teacher, step.call, step.student, step.optimizer, step.precision, step.device)


def convolved(tower: nn.Module) -> nn.Module:
    """A copy whose patches are embedded by a convolution."""
    tower = copy.deepcopy(tower)
    tower.visual.conv1.__class__ = nn.Conv2d
    return tower


def other_tower(name: str, tower: nn.Module) -> nn.Module:
    """The tower of a case of TEACHERS."""
    if name == "float8":
        return Float8Tower(copy.deepcopy(tower)).eval().requires_grad_(False)
    return convolved(tower) if name == "patches convolved" else tower


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
        trained = [p for group in step.optimizer.param_groups for p in group["params"]]
        self.grads = [(parameter, parameter.grad) for parameter in trained]

    def __call__(self) -> None:
        for parameter, grad in self.grads:  # other cases of the same student set them to None
            parameter.grad = grad
        self.graph.replay()
        self.step.update()


def main() -> None:
    parser = measure.arguments(__doc__, repeats=5)
    measure.step_arguments(parser)
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 8)
    parser.add_argument("--cases", nargs="*", choices=[*TEACHERS, OVERHEAD, GRAPH], help="beside ours (default: all that there are)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, model, precision = torch.device(args.device), measure.MODELS[args.model], measure.precision(args)
    compiled, online = measure.compute(args).compile, not args.banked
    possible = [*(TEACHERS if online else ()), *((OVERHEAD, GRAPH) if device.type == "cuda" else ())]
    names = [name for name in possible if args.cases is None or name in args.cases]
    if online:
        images = pictures(min(args.batch, 64), model.image_size, device)
        with torch.inference_mode():
            targets = our_step(model, "fp32", device, True, False).teacher(images)
    torch.set_float32_matmul_precision("high")  # as training does
    batch = batch_of(model, args.batch, device, precision)
    ours = our_step(model, precision, device, online, compiled)
    steps, more = {OURS: ours}, {}
    if online:
        tower = getattr(ours.teacher, "_orig_mod", ours.teacher)
        towers = {OURS: tower, **{name: other_tower(name, tower) for name in names if name in TEACHERS}}
        more = {"Targets beside float32's": far(towers, images, targets, precision)}
        steps |= {name: behind(ours, towers[name], compiled and name != "teacher eager") for name in towers if name != OURS}
    if OVERHEAD in names:
        steps[OVERHEAD] = our_step(model, precision, device, online, compiled, "reduce-overhead")
    cases = {name: lambda step=step: step(batch) for name, step in steps.items()}
    about = {**measure.machine(device), "model": args.model, "batch": args.batch, "precision": precision}
    about |= {"teacher": "inside" if online else "no", "compiled": "yes" if compiled else "no"}
    compare(cases, args, device, about, more)
    if GRAPH in names:
        cases[GRAPH] = Replayed(ours, batch)
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
