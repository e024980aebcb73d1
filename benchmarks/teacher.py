"""How fast is the teacher, and what does low precision do to its targets?

    python -m benchmarks.teacher                          # random weights
    python -m benchmarks.teacher --weights outs/paper/teacher

Images a second by precision (on a GPU the last of them compiled too, with --compile all), and beside float32 eager: the
cosine of the features, the rank correlation and the total variation of the importance, and how many of the patches that
stay visible under the same noise are the same. --weights is a folder that the teacher stage wrote. Needs torch, timm and open_clip.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.step import our_teacher
from milan.method import masking
from milan.training.device import autocast

MASK_RATIO = 0.75


def pictures(count: int, size: int, device: torch.device) -> Tensor:
    """(B, 3, S, S): smooth colours under fine noise, normalised."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 7, 7, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    return (smooth + 0.2 * torch.randn(count, 3, size, size, generator=generator)).to(device)


def tower(name: str, weights: Path | None, device: torch.device) -> tuple[nn.Module, int]:
    """The teacher in float32, and the side of its images."""
    if weights is None:
        torch.manual_seed(0)
        return our_teacher(measure.MODELS[name], "fp32", device), measure.MODELS[name].image_size
    from milan.teacher.clip import load_teacher
    from milan.teacher.towers import ClipTower

    visual = load_teacher(weights)[0].visual
    return ClipTower(visual).to(device), visual.image_size[0]


def deviations(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Targets (features (B, 1+N, D), importance (B, N)) beside those of float32."""
    (features, importance), (exact_features, exact_importance) = ([t.float() for t in pair] for pair in (found, exact))
    cosine = nn.functional.cosine_similarity(features, exact_features, dim=-1)
    shares, exact_shares = (i / i.sum(dim=1, keepdim=True) for i in (importance, exact_importance))
    noise = torch.stack([masking.gumbel(0, 0, i, importance.shape[1]) for i in range(len(importance))]).to(importance.device)
    kept = masking.n_visible(importance.shape[1], MASK_RATIO)
    seen, exact_seen = (
        masking.mask_of(masking.sample_visible(noise, kept, i), i.shape[1]) for i in (importance, exact_importance)
    )
    return {
        "cosine": cosine.mean().item(),
        "lowest cosine": cosine.min().item(),
        "rank correlation": rank_correlation(importance, exact_importance),
        "total variation": ((shares - exact_shares).abs().sum(dim=1) / 2).mean().item(),
        "% same visible": 100 - 100 * ((seen != exact_seen).sum() / 2 / (kept * len(seen))).item(),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, mean over rows."""
    ranks = [t.argsort(dim=1).argsort(dim=1).double() for t in (a, b)]
    a, b = ((r - r.mean(dim=1, keepdim=True)) / r.std(dim=1, keepdim=True, correction=0) for r in ranks)
    return (a * b).mean().item()


class Case:
    """One way to ask the teacher."""

    def __init__(self, teacher: nn.Module, precision: str, device: torch.device, compiled: bool):
        self.precision, self.device = precision, device
        self.teacher = copy.deepcopy(teacher)
        if hasattr(self.teacher, "lowered"):  # the plain rendering, where open_clip is not installed, is not
            self.teacher = self.teacher.lowered(precision)
        self.call = torch.compile(self.teacher) if compiled else self.teacher

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self.precision, self.device):
            return self.call(images)


def main() -> None:
    parser = measure.arguments(__doc__, repeats=5)
    parser.add_argument("--model", choices=measure.MODELS, default="vit_b16", help="with random weights")
    parser.add_argument("--weights", type=Path, help="a folder that the teacher stage wrote")
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 16)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--compile", action="store_true", help="compiled cases on a CPU too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    teacher, size = tower(args.model, args.weights, device)
    images, exact = pictures(args.batch, size, device), Case(teacher, "fp32", device, False)
    targets, cases = exact(images), {}
    for precision in args.precisions:
        cases[precision] = Case(teacher, precision, device, False)
        if args.compile or device.type == "cuda" and precision == args.precisions[-1]:
            cases[f"{precision} compiled"] = Case(teacher, precision, device, True)
    timed = {name: lambda case=case: case(images) for name, case in cases.items()}
    seconds = measure.in_turn(timed, args.repeats, device, warm=2, times=measure.in_a_row(device))
    base = measure.median(next(iter(seconds.values())))
    rows = []
    for name, case in cases.items():
        took = measure.median(seconds[name])
        row = {"case": name, "images/s": args.batch / took, f"against {args.precisions[0]}": base / took}
        rows.append(row | {"± %": measure.spread(seconds[name]), **deviations(case(images), targets)})
    about = {**measure.machine(device), "teacher": args.weights or f"{args.model}, random weights", "batch": args.batch}
    measure.show("The teacher", rows, about, args.json)


if __name__ == "__main__":
    main()
