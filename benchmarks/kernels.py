"""Which kinds of kernels does a pretraining step spend its time in?

    python -m benchmarks.kernels                   # online, in the device's best precision
    python -m benchmarks.kernels --banked --precision fp32

Profiles a step (torch.profiler) after warming up and adds up the time that kernels themselves take (on a GPU the
device's time, on a CPU the operators' own), sorted into kinds by their names.
"""

import re
from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.step import batch_of, our_step

KINDS = {  # the first that fits a kernel's name
    "bookkeeping": r"^autograd::|backward0$|^optimizer|^aten::(t|view|transpose|permute|expand|reshape|select|slice|as_strided|empty.*)$",
    "optimizer": r"adam|multi_tensor_apply",
    "attention": r"attention|flash|fmha",
    "convolution": r"conv|im2col|implicit",
    "matrix products": r"mm\b|gemm|addmm|matmul|cutlass|nvjet|xmma|splitk",
    "norms and softmax": r"norm|softmax|welford",
    "copies": r"copy|cat|gather|index|scatter|memcpy|memset|fill|zero|contiguous|clone",
    "elementwise": r"triton|elementwise|vectorized|add|mul|div|sub|gelu|sigmoid|reduce|sum|mean|rsqrt|pow|neg",
    "the rest": r"",
}


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


def main() -> None:
    parser = measure.arguments(__doc__, repeats=3)
    measure.step_arguments(parser)
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, model = torch.device(args.device), measure.MODELS[args.model]
    precision, cuda = measure.precision(args), device.type == "cuda"
    step = our_step(model, precision, device, not args.banked, measure.compute(args).compile)
    batch = batch_of(model, args.batch, device)
    seconds = measure.in_turn({"step": lambda: step(batch)}, args.repeats, device, warm=2)["step"]
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(args.repeats):
            step(batch)
        measure.wait(device)
    averages = [event for event in profiler.key_averages() if not cuda or event.device_type == torch.autograd.DeviceType.CUDA]
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = rows_of([(event.key, getattr(event, own) / 1e6, event.count) for event in averages], args.repeats)
    about = {**measure.machine(device), "model": args.model, "batch": args.batch, "precision": precision}
    about |= {"teacher": "no" if args.banked else "inside", "ms a step unprofiled": f"{1000 * measure.median(seconds):.4g}"}
    measure.show("Where a step's time goes", rows, about, args.json)


if __name__ == "__main__":
    main()
