"""How fast are the steps of fine-tuning and of segmentation (UPerNet)?

    python -m benchmarks.tasks
    python -m benchmarks.tasks --only UPerNet --search    # cuDNN's own search for the fastest convolution
    python -m benchmarks.tasks --model tiny --batch 2 --scenes 2 --no-compile

Times forward, backward and AdamW on random images that lie on the device, with the published recipes' mixing, drop path,
layer-wise groups and widths: fine-tuning at the model's own size, UPerNet at 512 pixels and 150 classes, its convolutions in
channels-last as stages/segment.py has them, and UPerNet again with its maps resized by torch's own kernel, where a GPU takes
matrix products. A GPU adds compiled fine-tuning, after a table of the eager cases, and compiled UPerNet where asked: it takes
minutes. Needs timm.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from milan.evaluation.classifier import FinetuneLoss, build_classifier
from milan.method.encoder import Encoder
from milan.params import Model
from milan.segmentation import upernet
from milan.training import optim
from milan.training.device import DTYPES, autocast, choose_attention
from stages.segment import SegmentLoss

FINETUNE = SimpleNamespace(pooling="mean", drop_path=0.1, label_smoothing=0.1, mixup=0.8, cutmix=1.0)
CLASSES, SCENE_CLASSES = 1000, 150
FINETUNING, UPERNET = "fine-tuning", "UPerNet"


class Task:
    """A module whose forward is the loss, its optimizer, one batch."""

    def __init__(self, module: nn.Module, optimizer, inputs: tuple[Tensor, ...], precision: str, call: Callable | None = None):
        self.module, self.optimizer, self.inputs, self.precision = module, optimizer, inputs, precision
        self.call, self.device = call if call is not None else module, inputs[0].device

    def __call__(self) -> None:
        with autocast(self.precision, self.device):
            loss = self.call(*self.inputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def compiled(self) -> "Task":
        return Task(self.module, self.optimizer, self.inputs, self.precision, torch.compile(self.module))

    def flops(self) -> float:
        """Of forward and backward."""
        with FlopCounterMode(display=False) as counter, autocast(self.precision, self.device):
            self.module(*self.inputs).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def weight(self) -> int:
        return measure.weight(self.module, self.optimizer)


class ResizedByTorch(Task):
    """The same task with F.interpolate wherever the segmenter resizes maps."""

    def __call__(self) -> None:
        with patch.object(upernet, "resize_maps", partial(F.interpolate, mode="bilinear")):
            super().__call__()


def finetuning(model: Model, batch: int, precision: str, device: torch.device) -> Task:
    vit = build_classifier(model, FINETUNE, CLASSES, Encoder(model).vit.state_dict()).to(device).train()
    depth = len(vit.blocks)
    groups = optim.layer_decay_groups(vit, 0.05, 0.65, partial(optim.vit_layer_id, depth=depth), depth)
    images = torch.randn(batch, 3, model.image_size, model.image_size, device=device)
    labels = torch.randint(0, CLASSES, (batch,), device=device)
    return Task(FinetuneLoss(vit, FINETUNE, CLASSES), optim.adamw(groups, (0.9, 0.999)), (images, labels), precision)


def segmentation(model: Model, scenes: int, side: int, precision: str, device: torch.device) -> Task:
    e, norm = model.encoder, "sync" if device.type == "cuda" else "batch"
    blocks = [(k + 1) * e.depth // 4 - 1 for k in range(4)]
    widths = (768, 256) if e.embed_dim == 768 else (32, 16)
    sizes = (side, model.patch_size, e.embed_dim, e.depth, e.num_heads, SCENE_CLASSES, *widths, blocks)
    net = upernet.Segmenter(*sizes, norm=norm).train().to(device, memory_format=torch.channels_last)
    layer = upernet.encoder_layer_ids(net).__getitem__
    groups = optim.layer_decay_groups(net, 0.05, 0.65, layer, e.depth)
    images = torch.randn(scenes, 3, side, side, device=device)
    labels = torch.randint(0, SCENE_CLASSES, (scenes, side, side), device=device)
    return Task(SegmentLoss(net), optim.adamw(groups, (0.9, 0.999)), (images, labels), precision)


def rows_of(tasks: dict[str, Task], flops: dict[str, float], peak: float, args, device: torch.device) -> list[dict]:
    seconds = measure.in_turn(tasks, args.repeats, device, warm=2, times=measure.in_a_row(device))
    rows = []
    for name, task in tasks.items():
        kind, took, images = name.split(",")[0], measure.median(seconds[name]), len(task.inputs[0])
        rate = flops[kind] / took / 1e12
        row = {"case": name, "images": images, "images/s": images / took, "ms a step": 1000 * took}
        row |= {"against the first": measure.median(seconds[kind]) / took, "± %": measure.spread(seconds[name])}
        row |= {"TFLOP/s": rate, "% of matmul peak": 100 * rate / peak}
        rows.append(row | {"peak GB": measure.peak_memory(task, device, task.weight())})
    return rows


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = measure.arguments(__doc__, repeats=5)
    measure.step_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=(FINETUNING, UPERNET), default=[FINETUNING, UPERNET], help="default: both")
    parser.add_argument("--batch", type=int, default=128 if gpu else 8, help="images of fine-tuning (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=16 if gpu else 2, help="of UPerNet (default: %(default)s)")
    parser.add_argument("--side", type=int, default=512 if gpu else 64, help="pixels of a scene (default: %(default)s)")
    parser.add_argument("--compile-upernet", action="store_true", help="on a GPU, minutes")
    parser.add_argument("--search", action="store_true", help="let cuDNN time its algorithms for each convolution")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = args.search
    torch.set_float32_matmul_precision("high")  # as training does
    device, model, precision = torch.device(args.device), measure.MODELS[args.model], measure.precision(args)
    choose_attention(precision, device)
    peak = measure.matmul_peak(device, DTYPES[precision])
    tasks: dict[str, Task] = {}
    if FINETUNING in args.only:
        tasks[FINETUNING] = finetuning(model, args.batch, precision, device)
    if UPERNET in args.only:
        tasks[UPERNET] = task = segmentation(model, args.scenes, args.side, precision, device)
        tasks[f"{UPERNET}, resized by torch"] = ResizedByTorch(task.module, task.optimizer, task.inputs, precision)
    flops = {name: tasks[name].flops() for name in args.only}
    about = {**measure.machine(device), "model": args.model, "precision": precision, "matmul TFLOP/s": f"{peak:.3g}"}
    about |= {"cuDNN's search": "yes" if args.search else "no"}
    about |= {f"GFLOP an image, {name}": f"{flops[name] / len(tasks[name].inputs[0]) / 1e9:.4g}" for name in args.only}
    measure.show("A step of fine-tuning and of segmentation", rows_of(tasks, flops, peak, args, device), about, args.json)
    if measure.compute(args).compile:
        for name in (name for name in args.only if name == FINETUNING or args.compile_upernet):
            tasks[f"{name}, compiled"] = tasks[name].compiled()
            rows = rows_of(tasks, flops, peak, args, device)
            measure.show("A step of fine-tuning and of segmentation", rows, about, args.json)


if __name__ == "__main__":
    main()
