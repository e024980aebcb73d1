"""How fast is one pretraining step, and where does its time go?

    python -m benchmarks.step                 # on a CPU about ten minutes, on a GPU two
    python -m benchmarks.step --batch 512     # a larger micro-batch

Compares, side by side on random images that lie on the device: the algorithm as published in plain eager PyTorch
(benchmarks/plain.py), ours with the teacher inside, and ours from the target bank, on a CPU in float32 and bfloat16, on a
GPU in bfloat16. A GPU, or --compile, adds compiled cases, after a table of the eager ones. A step is teacher, forward,
backward and AdamW. Beside the speed: how far loss and gradient norm of the first step, from the same weights, are from our
own in float32. A case that does not fit the GPU's memory is left out. Needs torch and timm, and open_clip for the teacher:
without it, `ours online` runs with the plain teacher, and says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, plain
from milan.method.model import MaskedPretraining
from milan.params import AblationRow, Model
from milan.training import optim
from milan.training.device import DTYPES, autocast, choose_attention

FEATURES = 512
MILAN = AblationRow(target="clip", decoder="prompt", masking="semantic")


@dataclass
class Batch:
    images: Tensor
    noise: Tensor
    features: Tensor
    importance: Tensor


class Step:
    """One way to do a step: teacher (None: targets are at hand), student, optimizer, precision."""

    def __init__(
        self, teacher: nn.Module | None, call: Callable, student: nn.Module, optimizer, precision: str, device: torch.device
    ):
        self.teacher, self.call, self.student, self.optimizer = teacher, call, student, optimizer
        self.precision, self.device = precision, device

    def look(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.teacher is None:
            return batch.features, batch.importance
        with torch.inference_mode(), autocast(self.precision, self.device):
            return self.teacher(batch.images)

    def loss(self, batch: Batch, targets: tuple[Tensor, Tensor]) -> Tensor:
        # Tensors made in inference mode cannot be saved for backward.
        targets = [t.clone() if t.is_inference() else t for t in targets]
        with autocast(self.precision, self.device):
            return self.call(batch, *targets)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, batch: Batch) -> None:
        self.loss(batch, self.look(batch)).backward()
        self.update()


def plain_step(model: Model, precision: str, device: torch.device) -> Step:
    student = plain.Milan(model, FEATURES).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, foreach=False)
    teacher = plain.Teacher(model, FEATURES).to(device).eval()
    return Step(teacher, lambda b, f, i: student(b.images, f, i), student, optimizer, precision, device)


def our_step(model: Model, precision: str, device: torch.device, online: bool, compiled: bool, mode: str = "default") -> Step:
    """mode: of torch.compile."""
    choose_attention(precision, device)
    torch.manual_seed(0)
    student = MaskedPretraining(model, MILAN, 0.75, FEATURES).to(device)
    optimizer = optim.adamw(optim.decay_groups(student, 0.05), (0.9, 0.95))
    optim.set_lr(optimizer, 1e-5)
    call, teacher = student, our_teacher(model, precision, device) if online else None
    if compiled:
        call, teacher = torch.compile(student, mode=mode), torch.compile(teacher, mode=mode) if teacher else None
    return Step(teacher, lambda b, f, i: call(b.images, b.noise, f, i), student, optimizer, precision, device)


def without_teacher(step: Step) -> Step:
    """The same student, compiled once, on targets that are at hand."""
    return Step(None, step.call, step.student, step.optimizer, step.precision, step.device)


def our_teacher(model: Model, precision: str, device: torch.device) -> nn.Module:
    """A CLIP of the student's encoder's size, with random weights: speed does not depend on them."""
    try:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        from milan.teacher.towers import ClipTower
    except ImportError:
        print("open_clip is not installed: `ours online` runs with the plain teacher")
        return plain.Teacher(model, FEATURES).to(device).eval()
    e = model.encoder
    size = {"image_size": model.image_size, "patch_size": model.patch_size, "head_width": e.embed_dim // e.num_heads}
    vision = CLIPVisionCfg(layers=e.depth, width=e.embed_dim, **size)
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=64, heads=1, layers=1)
    return (
        ClipTower(CLIP(FEATURES, vision, text, quick_gelu=True).visual).to(device).eval().requires_grad_(False).lowered(precision)
    )


def batch_of(model: Model, size: int, device: torch.device, precision: str = "fp32") -> Batch:
    """precision: of the features. A bank's are float16; a teacher's in bfloat16 are as wide, and compile no second student."""
    torch.manual_seed(0)
    images = torch.randn(size, 3, model.image_size, model.image_size, device=device)
    noise, importance = torch.randn(size, model.n_patches, device=device), torch.rand(size, model.n_patches, device=device)
    features = torch.randn(size, 1 + model.n_patches, FEATURES, device=device).to(DTYPES[precision])
    return Batch(images, noise, features, importance)


def flops(model: Model, device: torch.device) -> tuple[float, float]:
    """FLOPs of one image by torch's counter: (teacher, student's forward and backward), as our code runs them."""
    step, batch = our_step(model, "fp32", device, True, False), batch_of(model, 1, device)
    with FlopCounterMode(display=False) as teacher:
        targets = step.look(batch)
    with FlopCounterMode(display=False) as student:
        step.loss(batch, targets).backward()
    return teacher.get_total_flops(), student.get_total_flops()


def first(step: Step, batch: Batch) -> tuple[float, float]:
    """Loss and gradient norm before any update."""
    loss = step.loss(batch, step.look(batch))
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in step.student.parameters() if p.grad is not None])
    step.optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


def off(found: tuple[float, float], exact: tuple[float, float] | None) -> dict[str, float | None]:
    """In %; None where there is nothing to compare with."""
    percent = [100 * abs(a / b - 1) for a, b in zip(found, exact, strict=True)] if exact else [None, None]
    return dict(zip(("loss off %", "gradient norm off %"), percent, strict=True))


def split(step: Step, batch: Batch, repeats: int) -> dict[str, float]:
    """Seconds of the parts of a step: medians, each part on its own."""
    targets = step.look(batch)
    loss: list[Tensor] = [step.loss(batch, targets)]
    loss[0].backward()

    def forward() -> None:
        loss[0] = step.loss(batch, targets)

    parts = {"forward": forward, "backward": lambda: loss[0].backward(), "optimizer": step.update}
    if step.teacher is not None:
        parts = {"teacher": lambda: step.look(batch), **parts}
    return {name: measure.median(seconds) for name, seconds in measure.in_turn(parts, repeats, step.device).items()}


def eager_steps(args, model: Model, device: torch.device) -> dict[str, Step]:
    steps = {}
    for precision in () if args.no_eager else args.precisions:
        steps[f"plain online {precision}"] = plain_step(model, precision, device)
        steps[f"ours online {precision}"] = our_step(model, precision, device, True, False)
        steps[f"ours banked {precision}"] = our_step(model, precision, device, False, False)
    return steps


def compiled_steps(args, model: Model, device: torch.device) -> dict[str, Step]:
    if args.no_compile or not (args.compile or device.type == "cuda"):
        return {}
    last = args.precisions[-1]
    online = our_step(model, last, device, True, True)
    return {f"ours online {last} compiled": online, f"ours banked {last} compiled": without_teacher(online)}


class Comparison:
    """Steps on one batch, and what is known of them."""

    def __init__(self, args, model: Model, device: torch.device):
        self.args, self.device = args, device
        self.batch = batch_of(model, args.batch, device, args.precisions[-1])
        self.teacher, self.student = flops(model, device)
        self.peaks = {p: measure.matmul_peak(device, DTYPES[p]) for p in args.precisions}
        kinds = () if args.no_eager else ("online", "banked")
        self.exact = {kind: self.exactly(model, kind == "online") for kind in kinds}
        torch.set_float32_matmul_precision("high")  # as training does
        self.steps: dict[str, Step] = {}
        self.firsts: dict[str, tuple[float, float]] = {}

    def exactly(self, model: Model, online: bool) -> tuple[float, float] | None:
        """First loss and gradient norm in float32; None where they do not fit the memory."""
        try:
            return first(our_step(model, "fp32", self.device, online, False), self.batch)
        except torch.OutOfMemoryError:
            return None

    def add(self, steps: dict[str, Step]) -> None:
        """Look at all of them before any makes a step: compiled ones share a student."""
        for name, step in steps.items():
            try:
                self.firsts[name] = first(step, self.batch)
                self.steps[name] = step
            except torch.OutOfMemoryError:
                print(f"{name}: does not fit the memory at batch {self.args.batch}", flush=True)
                step.optimizer.zero_grad(set_to_none=True)

    def rows(self) -> list[dict]:
        cases = {name: lambda step=step: step(self.batch) for name, step in self.steps.items()}
        seconds = measure.in_turn(cases, self.args.repeats, self.device, warm=2, times=measure.in_a_row(self.device))
        return [self.row(name, step, seconds) for name, step in self.steps.items()]

    def row(self, name: str, step: Step, seconds: dict[str, list[float]]) -> dict:
        took, kind, plain_name = measure.median(seconds[name]), name.split()[1], f"plain online {step.precision}"
        arithmetic = self.args.batch * (self.student + (self.teacher if kind == "online" else 0)) / took / 1e12
        base = measure.median(seconds[plain_name]) / took if plain_name in seconds else None
        row = {"case": name, "images/s": self.args.batch / took, "against plain": base, "± %": measure.spread(seconds[name])}
        row |= {"TFLOP/s": arithmetic, "% of matmul peak": 100 * arithmetic / self.peaks[step.precision]}
        kept = measure.weight(step.student, step.teacher, step.optimizer)
        row["peak GB"] = measure.peak_memory(lambda: step(self.batch), self.device, kept)
        row |= off(self.firsts[name], None if "plain" in name else self.exact.get(kind))
        parts = split(step, self.batch, self.args.repeats)
        return row | {f"{part} ms": 1000 * parts[part] if part in parts else None for part in PARTS}

    def about(self) -> dict:
        about = {**measure.machine(self.device), "batch": self.args.batch, "repeats": self.args.repeats}
        about |= {"GFLOP teacher": f"{self.teacher / 1e9:.1f}", "GFLOP student": f"{self.student / 1e9:.1f}"}
        about |= {f"matmul TFLOP/s {p}": f"{peak:.3g}" for p, peak in self.peaks.items()}
        return about | {"copy GB/s": f"{measure.copy_peak(self.device):.4g}"}


PARTS = ("teacher", "forward", "backward", "optimizer")


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = measure.arguments(__doc__, repeats=5)
    parser.add_argument("--model", choices=measure.MODELS, default="vit_b16")
    parser.add_argument("--batch", type=int, default=256 if gpu else 16, help="images (default: %(default)s)")
    parser.add_argument(
        "--precisions", nargs="+", default=["bf16"] if gpu else ["fp32", "bf16"], choices=["fp32", "bf16", "fp16"]
    )
    parser.add_argument("--compile", action="store_true", help="compiled cases, in the last precision, on a CPU too")
    parser.add_argument("--no-eager", action="store_true", help="compiled cases alone, not compared with float32")
    parser.add_argument("--no-compile", action="store_true", help="leave them out on a GPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, model = torch.device(args.device), measure.MODELS[args.model]
    compared = Comparison(args, model, device)
    about = {"model": args.model, **compared.about()}
    for steps in (eager_steps(args, model, device), compiled_steps(args, model, device)):
        if steps:
            compared.add(steps)
            measure.show("One pretraining step", compared.rows(), about, args.json)


if __name__ == "__main__":
    main()
