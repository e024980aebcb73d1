"""Which kinds of kernels does a step spend its time in, and how far from the peak is each product?

    python -m benchmarks.kernels                   # pretraining online, in the device's best precision
    python -m benchmarks.kernels --banked --precision fp32
    python -m benchmarks.kernels --task UPerNet --no-compile    # or fine-tuning

Profiles a step (torch.profiler) after warming up and adds up the time that kernels themselves take (on a GPU the
device's time, on a CPU the operators' own), sorted into kinds by their names. Then matrix products and attention by their
shapes, with the rate of each and the milliseconds that it loses against the peak; and the longest kernels and operators.
"""

import re
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.step import batch_of, our_step
from benchmarks.tasks import FINETUNING, UPERNET, finetuning, segmentation
from milan.params import Model
from milan.training.device import DTYPES, choose_attention

KINDS = {  # the first that fits a kernel's name
    "norms and sums, compiled": r"^triton_(per|red)",
    "elementwise, compiled": r"^triton",
    "bookkeeping": r"^autograd::|backward0$|^optimizer|^aten::(t|view|transpose|permute|expand|reshape|select|slice|as_strided|empty.*)$",
    "optimizer": r"adam|multi_tensor_apply",
    "attention": r"attention|flash|fmha|sdpa",
    "convolution": r"conv|im2col|implicit",
    "matrix products": r"mm\b|gemm|addmm|matmul|cutlass|nvjet|xmma|splitk",
    "norms and softmax": r"norm|softmax|welford",
    "copies": r"copy|cat|gather|index|scatter|memcpy|memset|fill|zero|contiguous|clone",
    "elementwise": r"elementwise|vectorized|add|mul|div|sub|gelu|sigmoid|reduce|sum|mean|rsqrt|pow|neg",
    "the rest": r"",
}
ANNOTATION = r"optimizer\.|## |torch-compiled|compiledfunction|profilerstep"  # spans over kernels, which have their own time
ATTENTION = r"aten::_(scaled_dot_product|flash|efficient|cudnn).*(forward|backward|attention)"
LONGEST = 40
BATCHES = {"pretraining": (256, 8), FINETUNING: (128, 8), UPERNET: (16, 2)}  # images on a GPU and on a CPU
SIDES = {224: 512, 48: 64}  # pixels of a scene, by the model's image size


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


def rows_of(events: Iterable[tuple[str, float, int]], steps: int) -> list[dict]:
    """events (kernel, seconds, calls) of several steps -> a row a kind, the longest first."""
    events = [event for event in events if event[1] > 0]
    whole = sum(seconds for _, seconds, _ in events)
    rows = []
    for kind in KINDS:
        mine = [event for event in events if kind_of(event[0]) == kind]
        if mine:
            seconds, calls = sum(event[1] for event in mine), sum(event[2] for event in mine)
            longest = max(mine, key=lambda event: event[1])[0]
            row = {"case": kind, "ms a step": 1000 * seconds / steps, "%": 100 * seconds / whole, "calls": calls // steps}
            rows.append(row | {"longest": longest[:60]})
    return sorted(rows, key=lambda row: -row["ms a step"])


def product(name: str, shapes: list) -> tuple[str, float] | None:
    """A matrix product's shape in words and its floating-point operations; None for another operator."""
    if name not in ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm"):
        return None
    *batch, m, k = shapes[1 if name == "aten::addmm" else 0]
    n = shapes[2 if name == "aten::addmm" else 1][-1]
    words = " x ".join(str(size) for size in (*batch, m, k, n))
    return words, 2.0 * m * k * n * (batch[0] if batch else 1)


def in_words(shapes: list) -> str:
    """The shapes of an operator's first inputs."""
    return " ".join("x".join(map(str, shape)) for shape in shapes[:3] if shape)


def shapes_of(events: Iterable[tuple[str, list, float, int]], steps: int, peak: float) -> list[dict]:
    """events (operator, shapes, seconds, calls) of several steps -> a row a shape, what loses most first. peak: TFLOP/s."""
    rows = []
    for name, shapes, seconds, calls in events:
        found = product(name, shapes)
        if seconds <= 0 or not (found or re.match(ATTENTION, name)):
            continue
        row = {"operator": name.removeprefix("aten::"), "m x k x n": found[0] if found else in_words(shapes)}
        row |= {"calls": calls // steps, "ms a step": 1000 * seconds / steps}
        if found:
            rate = found[1] * calls / seconds / 1e12
            row |= {"TFLOP/s": rate, "% of peak": 100 * rate / peak, "lost ms": row["ms a step"] * max(0.0, 1 - rate / peak)}
        rows.append(row)
    return sorted(rows, key=lambda row: -row.get("lost ms", row["ms a step"]))


def on_the_gpu(event) -> bool:
    """Whether a profiled event is a kernel or a copy there."""
    if getattr(event, "is_user_annotation", False) or re.match(ANNOTATION, event.key.lower()):
        return False
    return event.device_type == torch.autograd.DeviceType.CUDA


def operators(events: Iterable[tuple[str, list, float, int]], steps: int) -> list[dict]:
    """events (operator, shapes, seconds, calls) of several steps -> a row each, the longest first."""
    rows = []
    for name, shapes, seconds, calls in sorted(events, key=lambda event: -event[2])[:LONGEST]:
        rows.append({"operator": name, "shapes": in_words(shapes), "calls": calls // steps, "ms a step": 1000 * seconds / steps})
    return rows


def step_of(args, model: Model, precision: str, device: torch.device) -> Callable[[], object]:
    """A step of the task asked for, on one batch."""
    compiled = measure.compute(args).compile
    if args.task == "pretraining":
        step, batch = our_step(model, precision, device, not args.banked, compiled), batch_of(model, args.batch, device, precision)
        return lambda: step(batch)
    torch.set_float32_matmul_precision("high")  # as training does
    choose_attention(precision, device)
    if args.task == FINETUNING:
        task = finetuning(model, args.batch, precision, device)
    else:
        task = segmentation(model, args.batch, SIDES[model.image_size], precision, device)
    return task.compiled() if compiled else task


def main() -> None:
    parser = measure.arguments(__doc__, repeats=3)
    measure.step_arguments(parser)
    parser.add_argument("--task", choices=BATCHES, default="pretraining")
    parser.add_argument("--batch", type=int, help="images (default: 256, 128 or 16 by the task, on a CPU 8, 8 or 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, model = torch.device(args.device), measure.MODELS[args.model]
    precision, cuda = measure.precision(args), device.type == "cuda"
    args.batch = args.batch or BATCHES[args.task][not cuda]
    peak = measure.matmul_peak(device, DTYPES[precision])
    step = step_of(args, model, precision, device)
    times = measure.in_a_row(device)
    seconds = measure.in_turn({"step": step}, args.repeats, device, warm=3, times=times)["step"]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(args.repeats):
            step()
        measure.wait(device)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    averages = [event for event in profiler.key_averages() if not cuda or on_the_gpu(event)]
    events = [(event.key, getattr(event, own) / 1e6, event.count) for event in averages]
    rows = rows_of(events, args.repeats)
    grouped = [event for event in profiler.key_averages(group_by_input_shape=True) if event.input_shapes]
    shaped = [(event.key, event.input_shapes, getattr(event, own) / 1e6, event.count) for event in grouped]
    longest = [
        {"kernel": name[:110], "ms a step": 1000 * took / args.repeats, "calls": calls // args.repeats}
        for name, took, calls in sorted(events, key=lambda event: -event[1])[:LONGEST]
    ]
    about = {**measure.machine(device), "model": args.model, "task": args.task, "batch": args.batch, "precision": precision}
    about |= {"teacher": "no" if args.banked else "inside"} if args.task == "pretraining" else {}
    about |= {"matmul TFLOP/s": f"{peak:.3g}", "ms a step unprofiled": f"{1000 * measure.median(seconds):.4g}"}
    about["ms a step in kernels"] = f"{sum(row['ms a step'] for row in rows):.4g}"
    more = {"Matrix products and attention by shape": shapes_of(shaped, args.repeats, peak)}
    more |= {"The longest kernels": longest, "The longest operators": operators(shaped, args.repeats)}
    measure.show("Where a step's time goes", rows, about, args.json, **{title: table for title, table in more.items() if table})


if __name__ == "__main__":
    main()
