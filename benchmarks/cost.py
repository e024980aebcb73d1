"""What does an image cost, by the size of the micro-batch and by the size of the image?

    python -m benchmarks.cost
    python -m benchmarks.cost --batches 64 128 256 512 --sizes 224 --precision bf16

One pretraining step (ours, teacher inside unless --banked) for every batch size at the model's own image size, then for
every image size at the first batch size.
"""

import dataclasses

import torch

from benchmarks import measure
from benchmarks.step import batch_of, flops, our_step
from milan.params import Model


def row_of(model: Model, batch_size: int, precision: str, args, device: torch.device) -> dict:
    """Time and memory of one size. Sizes follow one another: together they would not fit."""
    step = our_step(model, precision, device, not args.banked, measure.compute(args).compile)
    batch = batch_of(model, batch_size, device, precision)
    times = measure.in_a_row(device)
    seconds = measure.in_turn({"step": lambda: step(batch)}, args.repeats, device, warm=2, times=times)["step"]
    teacher, student = flops(model, device)
    each, took = student + (0 if args.banked else teacher), measure.median(seconds)
    row = {
        "case": f"{batch_size} x {model.image_size} px",
        "images/s": batch_size / took,
        "ms an image": 1000 * took / batch_size,
    }
    row |= {"± %": measure.spread(seconds), "TFLOP/s": batch_size * each / took / 1e12, "GFLOP an image": each / 1e9}
    kept = measure.weight(step.student, step.teacher, step.optimizer)
    return row | {"peak GB": measure.peak_memory(lambda: step(batch), device, kept)}


def main() -> None:
    parser = measure.arguments(__doc__, repeats=5)
    measure.step_arguments(parser)
    gpu = torch.cuda.is_available()
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256] if gpu else [4, 8, 16])
    parser.add_argument("--sizes", type=int, nargs="*", default=[160, 224, 320] if gpu else [160, 224], help="sides in pixels")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, model = torch.device(args.device), measure.MODELS[args.model]
    precision = measure.precision(args)
    sizes = [(model, batch) for batch in args.batches]
    sizes += [(dataclasses.replace(model, image_size=s), args.batches[0]) for s in args.sizes if s != model.image_size]
    rows = [row_of(sized, batch, precision, args, device) for sized, batch in sizes]
    about = {**measure.machine(device), "model": args.model, "precision": precision, "teacher": "no" if args.banked else "inside"}
    measure.show("Cost of an image", rows, about, args.json)


if __name__ == "__main__":
    main()
