"""How many images a second does one core load, and does that keep up with the step?

    python -m benchmarks.loader

Compares, on JPEG files of 500 x 400 pixels drawn for the purpose: torchvision's ImageFolder with PIL transforms as the
release has them (random resized crop to 224, bicubic, flip, to float, normalise), and our records with uint8 tensors,
which the device normalises a batch at a time: once with that, and once without, which is what a loader's worker does.
One process on one core. Then a DataLoader with --workers, as training has it, normalising included. On a GPU also nvJPEG,
decoding alone, and how far its pixels are from ours.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as pil
from torchvision.io import decode_jpeg

from benchmarks import measure
from milan.data import records, transforms
from milan.data.records import Records
from milan.ingest import imagenet
from milan.ingest.archives import list_files
from milan.ingest.packing import Packing
from milan.method.samples import PretrainSamples

SIZE, SCALE, BATCH = 224, [0.2, 1.0], 20


def draw(root: Path, images: int, width: int, height: int) -> None:
    """Smooth colours under fine noise, which make files of ImageNet's size (about 100 kB)."""
    random = np.random.default_rng(0)
    for i in range(images):
        coarse = Image.fromarray(random.integers(0, 256, (8, 10, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        noisy = np.asarray(coarse) + random.normal(0, 12, (height, width, 3))
        folder = root / "train" / f"n{i % 2:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.JPEG", quality=90)


def published(root: Path) -> datasets.ImageFolder:
    crop = pil.RandomResizedCrop(SIZE, SCALE, interpolation=pil.InterpolationMode.BICUBIC)
    to_float = [pil.ToTensor(), pil.Normalize(*transforms.IMAGENET)]
    return datasets.ImageFolder(root / "train", pil.Compose([crop, pil.RandomHorizontalFlip(), *to_float]))


def pack(root: Path, packed: Path) -> Records:
    """What was drawn, as records."""
    packed.mkdir()
    folders = sorted(folder.name for folder in (root / "train").iterdir())
    items = imagenet.image_folder(list_files(root), "train", folders)
    splits = Packing(packed, shard_images=10_000, processes=1).pack({"train": items})
    records.write_manifest(packed, splits=splits, wnids=[], classes=[], source="benchmark")
    return Records(packed, "train")


class Keys:
    """A batch sampler: one epoch after another over the same records."""

    def __init__(self, records: int, batch: int, batches: int):
        self.records, self.batch, self.batches = records, batch, batches

    def __iter__(self):
        for number in range(self.batches):
            places = range(number * self.batch, (number + 1) * self.batch)
            yield [divmod(place, self.records) for place in places]


def by_workers(samples: PretrainSamples, workers: int, batch: int, device: torch.device) -> list[float]:
    """Images a second of `workers` processes, in three parts of as many batches as there are workers; what they had made
    ready before the clock started is left out."""
    keys = Keys(len(samples), batch, 5 * workers + 1)
    loader = DataLoader(samples, batch_sampler=keys, num_workers=workers, pin_memory=device.type == "cuda")
    rates, began = [], 0.0
    for number, found in enumerate(loader, start=1):
        transforms.normalise(found["image"].to(device, non_blocking=True))
        if number % workers == 0:
            measure.wait(device)
            now = time.perf_counter()
            if 2 <= number // workers <= 4:
                rates.append(workers * batch / (now - began))
            began = now
    return rates


def main() -> None:
    parser = measure.arguments(__doc__, repeats=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() if torch.cuda.is_available() else 0, help="%(default)s")
    parser.add_argument("--batch", type=int, default=256, help="of the workers (default: %(default)s)")
    parser.add_argument("--images", type=int, default=200, help="in a round (default: %(default)s)")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root, args.images, args.width, args.height)
        theirs, mine = published(root), PretrainSamples(pack(root, root / "records"), 0, SIZE, 196, SCALE, None)

        batches = torch.arange(args.images).split(BATCH)

        def theirs_once() -> None:
            for batch in batches:
                torch.stack([theirs[i][0] for i in batch.tolist()]).to(device)

        def worker_once(then=lambda images: None) -> None:
            for batch in batches:
                then(torch.stack([mine[0, i]["image"] for i in batch.tolist()]))

        def mine_once() -> None:
            worker_once(lambda images: transforms.normalise(images.to(device)))

        def decode_once() -> None:
            for i in range(args.images):
                transforms.decode(mine.records[i]["image"])

        cases = {"ImageFolder, PIL": theirs_once, "records, tensors": mine_once}
        cases |= {"of which a worker's part": worker_once, "of which decoding": decode_once}
        about = measure.machine(device)
        if device.type == "cuda":

            def on_the_gpu(indices: torch.Tensor) -> list[torch.Tensor]:
                files = [torch.frombuffer(bytearray(mine.records[i]["image"]), dtype=torch.uint8) for i in indices.tolist()]
                return decode_jpeg(files, device=device)

            cases["nvJPEG, decoding alone"] = lambda: on_the_gpu(torch.arange(args.images))
            ours = [transforms.decode(mine.records[i]["image"]) for i in batches[0].tolist()]
            pairs = zip(on_the_gpu(batches[0]), ours)
            differences = [(gpu.cpu().float() - cpu.float()).abs().mean().item() for gpu, cpu in pairs]
            about["nvJPEG's mean difference in grey levels"] = round(sum(differences) / len(ours), 3)
        seconds = measure.in_turn(cases, args.repeats, device)
        rates = by_workers(mine, args.workers, args.batch, device) if args.workers else []
        size = sum(path.stat().st_size for path in root.rglob("*.JPEG")) / args.images
    base = measure.median(seconds["ImageFolder, PIL"])
    rows = []
    for name, values in seconds.items():
        took = measure.median(values)
        row = {"case": name, "images/s": args.images / took, "ms an image": 1000 * took / args.images}
        rows.append(row | {"against ImageFolder": base / took, "± %": measure.spread(values)})
    if rates:
        rate = measure.median(rates)
        row = {"case": f"records, {args.workers} workers", "images/s": rate, "ms an image": 1000 / rate}
        rows.append(row | {"against ImageFolder": rate * base / args.images, "± %": measure.spread(rates)})
    about |= {
        "pixels": f"{args.width} x {args.height}",
        "kB an image": round(size / 1000),
        "images": args.images,
        "batch": BATCH,
    }
    measure.show("Loading", rows, about, args.json)


if __name__ == "__main__":
    main()
