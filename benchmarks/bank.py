"""From how many epochs on does a bank of V views pay, and what does it weigh?

    python -m benchmarks.bank
    python -m benchmarks.bank --model tiny --images 64 --batch 16

On JPEG files drawn for the purpose, times the three things that differ, loading included: a step with the teacher inside
on new crops, a step on a bank's views, and the extraction of a view. With V views and E epochs the bank saves
E x (online - banked) and costs V x extraction, so it pays from E = V x extraction / (online - banked) epochs on. Speed
alone: what fixed views cost in quality is another question.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import loader, measure
from benchmarks.step import FEATURES, Batch, our_step
from milan.data import seeding, transforms
from milan.data.records import Records
from milan.method import target_bank
from milan.method.samples import BankViews, PretrainSamples
from milan.params import Model

SCALE, IMAGENET = [0.2, 1.0], 1_281_167


def random_bank(folder: Path, packed: Records, model: Model, views: int) -> target_bank.Bank:
    """A bank whose features say nothing, of the right size and with true boxes."""
    n, tokens = len(packed), 1 + model.n_patches
    heights = [transforms.decode(packed[i]["image"]).shape[1:] for i in range(n)]
    boxes = [[target_bank.view_box(0, v, i, *heights[i], SCALE) for v in range(views)] for i in range(n)]
    arrays = {
        "features": torch.randn(n, views, tokens, FEATURES).half(),
        "importance": torch.rand(n, views, model.n_patches),
        "boxes": torch.tensor(boxes, dtype=torch.int32),
    }
    target_bank.write_shard(folder, 0, {name: array.numpy() for name, array in arrays.items()})
    target_bank.finish(folder, views=views, shard_images=n, feature_dim=FEATURES, images=n)
    return target_bank.Bank(folder)


class Cases:
    """The three things to time, each on one batch of images loaded anew."""

    def __init__(self, root: Path, model: Model, args, device: torch.device):
        loader.draw(root, args.images, 500, 400)
        self.packed, self.model = loader.pack(root, root / "records"), model
        self.batch, self.device, self.epoch = args.batch, device, 0
        made = lambda online: our_step(model, measure.precision(args), device, online, measure.compute(args).compile)  # noqa: E731
        self.with_teacher, self.without = made(True), made(False)
        bank = random_bank(root / "bank", self.packed, model, args.views)
        size = self.packed, 0, model.image_size, model.n_patches, SCALE
        self.new_crops, self.from_bank = PretrainSamples(*size, None), PretrainSamples(*size, bank)
        span = range(len(self.packed))
        self.views = BankViews(self.packed, span, args.views, 0, model.image_size, SCALE)

    def load(self, samples) -> dict[str, Tensor]:
        self.epoch += 1
        order = seeding.permutation(len(self.packed), self.epoch, "shuffle")[: self.batch].tolist()
        keys = order if samples is self.views else [(self.epoch, i) for i in order]
        batch = torch.utils.data.default_collate([samples[key] for key in keys])
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def online(self) -> None:
        batch = self.load(self.new_crops)
        self.with_teacher(Batch(transforms.normalise(batch["image"]), batch["noise"], None, None))

    def banked(self) -> None:
        batch = self.load(self.from_bank)
        self.without(Batch(transforms.normalise(batch["image"]), batch["noise"], batch["features"], batch["importance"]))

    def extraction(self) -> None:
        images = transforms.normalise(self.load(self.views)["image"])
        features, importance = self.with_teacher.look(Batch(images, None, None, None))
        features.half().cpu(), importance.cpu()


def main() -> None:
    parser = measure.arguments(__doc__, repeats=5)
    measure.step_arguments(parser)
    parser.add_argument("--images", type=int, default=256, help="on disk (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 8)
    parser.add_argument("--views", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, model = torch.device(args.device), measure.MODELS[args.model]
    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(Path(folder), model, args, device)
        timed = {"online": cases.online, "banked": cases.banked, "extraction of a view": cases.extraction}
        seconds = measure.in_turn(timed, args.repeats, device, warm=2)
    took = {name: measure.median(values) / args.batch for name, values in seconds.items()}
    rows = [
        {
            "case": name,
            "images/s": 1 / each,
            "ms an image": 1000 * each,
            "against online": took["online"] / each,
            "± %": measure.spread(seconds[name]),
        }
        for name, each in took.items()
    ]
    saved, size = took["online"] - took["banked"], target_bank.bank_bytes(1, 1, model.n_patches, FEATURES)
    about = {**measure.machine(device), "model": args.model, "precision": measure.precision(args), "batch": args.batch}
    about |= {"kB a view": round(size / 1000), "GB a view of ImageNet": round(size * IMAGENET / 1e9)}
    about["epochs a view before it pays"] = f"{took['extraction of a view'] / saved:.2g}" if saved > 0 else "never"
    measure.show("Pretraining from a bank, loading included (one process)", rows, about, args.json)


if __name__ == "__main__":
    main()
