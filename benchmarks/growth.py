"""How does cost grow with size? Nothing may grow faster than linearly, and the trainer's memory hardly at all.

    python -m benchmarks.growth
    python -m benchmarks.growth --only records --images 10000 100000 1000000

Records of images of one pixel: packing them, packing again (all shards are kept), opening every shard, the first batch of an
epoch, one in the middle of an epoch as a continued run has it, and the memory that a trainer's process adds for all of these.
A target bank of four patches: writing, opening, reading. The report: reading the results of five variants with many seeds. MLflow:
starting and ending a stage's run in a store that holds many. The exponent is that of cost ~ size ** exponent between two sizes:
1 is linear, 0 constant.
"""

import gc
import io
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from benchmarks import measure
from milan.data import records
from milan.data.records import Records
from milan.ingest.packing import Packing
from milan.method import target_bank
from milan.training.loop import Order

SHARD, BATCH, READ = 10_000, 64, 200  # images of a shard and of a batch; records or views that are read
VARIANTS = ("scratch", "mae", "clip_target", "prompt_decoder", "milan")
Costs = Iterator[tuple[str, float]]  # what, and its seconds or MB


@dataclass(frozen=True)
class Pixel:
    """An image of one pixel, in place of a file (milan/ingest/archives.py)."""

    number: int
    data: bytes

    def read(self) -> bytes:
        return self.data

    def identity(self) -> list:
        return [self.number]


def seconds(function: Callable) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def of_records(folder: Path, images: int) -> Costs:
    data = io.BytesIO()
    Image.new("RGB", (1, 1)).save(data, "JPEG")
    items = [{"image": Pixel(k, data.getvalue()), "name": f"{k}.jpg", "label": k % 100} for k in range(images)]
    packing = Packing(folder, SHARD, 1)
    yield "packing, s", seconds(lambda: packing.pack({"train": items}))
    yield "packing again, s", seconds(lambda: packing.pack({"train": items}))
    records.write_manifest(folder, splits=packing.pack({"train": items}), wnids=[], classes=[str(k) for k in range(100)])
    yield from in_a_child(train, folder, images)


def train(folder: Path, images: int) -> list[tuple[str, float]]:
    """Do what a training does with its records before and between steps."""
    order, before = Order(images, BATCH, BATCH, 1, 0), memory()
    train = Records(folder, "train")
    opening = seconds(lambda: [train.columns(number) for number in range(len(train.shards))])
    batches = order.keys(0, 0, 1)
    first = seconds(lambda: next(batches))
    reading = seconds(lambda: [train[index] for index in spread(images)])
    gc.collect()
    added = memory() - before
    middle = seconds(lambda: next(order.keys(order.total_steps // 2, 0, 1)))
    costs = {
        "opening, s": opening,
        "first batch, s": first,
        "a batch in the middle, s": middle,
        "reading 200 records, s": reading,
    }
    return [*costs.items(), ("memory of a trainer, MB", added)]


def spread(images: int) -> list[int]:
    """Return READ indices over all shards."""
    return torch.linspace(0, images - 1, READ).long().tolist()


def memory() -> float:
    """Return the MB of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("Anonymous:"))


def in_a_child(function: Callable, *arguments) -> list[tuple[str, float]]:
    with ProcessPoolExecutor(1, get_context("fork")) as child:
        return child.submit(function, *arguments).result()


def of_bank(folder: Path, images: int) -> Costs:
    shapes = {"features": (5, 4), "importance": (4,), "boxes": (5,)}

    def write() -> None:
        for number, start in enumerate(range(0, images, SHARD)):
            size = min(SHARD, images - start)
            arrays = {name: np.ones((size, 1, *shape), target_bank.ARRAYS[name][0]) for name, shape in shapes.items()}
            target_bank.write_shard(folder, number, arrays)
        target_bank.finish(folder, views=1, shard_images=SHARD, feature_dim=4, images=images)

    yield "writing, s", seconds(write)
    yield "content digest, s", seconds(lambda: target_bank.content_digest(folder))
    bank = target_bank.Bank(folder)
    yield "reading 200 views, s", seconds(lambda: [bank[0, index] for index in spread(images)])


def of_report(folder: Path, seeds: int) -> Costs:
    from milan.report import results

    for stage, _ in results.MEASURES.values():
        (folder / stage).mkdir(exist_ok=True, parents=True)
        metrics = json.dumps({name: 1.5 for of, name in results.MEASURES.values() if of == stage})
        for variant in VARIANTS:
            for seed in range(seeds):
                (folder / stage / f"{variant}-{seed}.json").write_text(metrics)
    params = SimpleNamespace(variants=VARIANTS, seeds=range(seeds))
    yield "reading, s", seconds(lambda: results.summarise(results.read_runs(folder, params)))
    yield "edited runs, s", seconds(lambda: results.edited_runs(folder))


def of_mlflow(folder: Path, stage_runs: int) -> Costs:
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    from milan.tracking import runs
    from milan.tracking.sender import Sender

    def run(number: int) -> None:
        sender = Sender(None, None, live=False)
        tags = {"stage": "pretrain", "scale": "demo", "git_revision": "none", "dvc:outs/a": str(number)}
        sender.send([{"kind": "start", "name": f"pretrain {number % 20}", "experiment": "demo", "pipeline": f"p{number // 29}",
                      "tags": tags, "time": number}])  # fmt: skip
        values = {f"train/{step}": 1.0 for step in range(10)}
        sender.send([{"kind": "metrics", "time": number, "step": 0, "values": values}])
        sender.send([{"kind": "end", "status": "FINISHED", "time": number, "last": False}])

    for number in range(stage_runs):
        run(number)
    yield "a run more, s", seconds(lambda: [run(stage_runs + k) for k in range(5)]) / 5
    client = Sender(None, None, live=False).client
    experiment = client.get_experiment_by_name("demo").experiment_id
    search = seconds(lambda: [runs.find_stage_run(client, experiment, "pretrain 3", {"outs/a": "none"}) for _ in range(5)]) / 5
    yield "searching a stage's run, s", search


PARTS = {"records": of_records, "bank": of_bank, "report": of_report, "mlflow": of_mlflow}


def main() -> None:
    parser = measure.arguments(__doc__, repeats=1)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="of records and bank")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 100, 1000], help="of the report")
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 100, 1000], help="of MLflow")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for part in args.only:
        sizes = {"report": args.seeds, "mlflow": args.runs}.get(part, args.images)
        costs: dict[str, list[float]] = {}
        for size in sizes:
            rounds: dict[str, list[float]] = {}
            for _ in range(args.repeats):
                folder = Path(tempfile.mkdtemp())
                for name, cost in PARTS[part](folder, size):
                    rounds.setdefault(name, []).append(cost)
                shutil.rmtree(folder)
            for name, values in rounds.items():
                costs.setdefault(name, []).append(measure.median(values))
        for name, values in costs.items():
            row = {"case": f"{part}: {name}", "sizes": " / ".join(f"{size:,}" for size in sizes[:-1]), "largest size": sizes[-1]}
            row["cost"] = " / ".join(f"{value:.3g}" for value in values)
            rows.append(row | {"exponent": exponent(sizes[-2:], values[-2:])})
    measure.show("Cost by size", rows, measure.machine(torch.device("cpu")), args.json)


def exponent(sizes: list[int], costs: list[float]) -> float | None:
    """Return the slope between the two largest sizes, of their logarithms."""
    if len(sizes) < 2 or min(costs) <= 0:
        return None
    return math.log(costs[1] / costs[0]) / math.log(sizes[1] / sizes[0])


if __name__ == "__main__":
    main()
