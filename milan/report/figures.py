"""What the notebooks share: where results lie, the figure images, the trained models, and grids of small pictures."""

import json
import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from milan.core.errors import UserError
from milan.data import transforms
from milan.data.records import Records, chunks
from milan.method import masking
from milan.method.encoder import Encoder, load_encoder
from milan.method.model import MaskedPretraining, in_image_order, load_pretrained
from milan.params import Params, read_params
from milan.report import plots
from milan.report.plots import plt
from milan.segmentation import inference, miou, upernet
from milan.segmentation.scenes import decode_scene, resize_scene
from milan.training.device import autocast, resolve_precision, set_up
from milan.training.weights import load_into, load_weights

FOLDERS = "MILAN_FIGURES"  # set by the figures stage: {"params", "outs", "metrics", "curves", "published", "figures"}
UNKNOWN = (0.15, 0.15, 0.15)
DRAWS = 1000  # of a mask, for the keep probabilities
PIXELS_ON_CPU = 2_000_000  # of scenes to segment; a GPU takes them all, up to SCENES
SCENES = 500
LARGEST_CELL = 1.5  # inches of a small picture
GAP = 0.05  # between them, of their size


@dataclass
class Project:
    """The active recipe and its results. From the figures stage, or from params.yaml when a notebook is run by hand."""

    params: Params
    folders: dict[str, Path]

    @classmethod
    def open(cls) -> "Project":
        given = json.loads(os.environ.get(FOLDERS, "{}"))
        p = read_params(given.get("params", "params.yaml"))
        usual = {"outs": f"outs/{p.scale}", "metrics": f"reports/metrics/{p.scale}", "curves": f"reports/curves/{p.scale}"}
        usual |= {"published": p.report.published, "figures": "reports/figures"}
        project = cls(p, {name: Path(given.get(name, path)) for name, path in usual.items()})
        project.device = set_up(p.compute)
        return project

    def save(self, figure: Figure, name: str) -> Image:
        """Write the figure as <name>.png; a cell that ends with this shows the very file."""
        path = plots.save(figure, self.folders["figures"] / f"{name}.png")
        return Image(data=path.read_bytes(), width=round(100 * figure.get_figwidth()))

    def path(self, *parts: str) -> Path:
        path = self.folders["outs"].joinpath(*parts)
        if not path.exists():
            raise UserError(f"{path} is missing: run `dvc repro`, which makes it, or `dvc pull`, which fetches it.")
        return path

    def weights(self, stage: str, variant: str, file: str) -> Path:
        """Of the first seed."""
        return self.path(stage, f"{variant}-{self.params.seeds[0]}", f"{file}.safetensors")

    @property
    def student(self) -> str | None:
        """The variant whose predictions are CLIP features: MILAN, or the last other one."""
        found = [v for v in self.params.variants if self.params.pretrain.ablation[v].target == "clip"]
        return ("milan" if "milan" in found else found[-1]) if found and not self.params.pretrain.weights else None

    def encoder(self, variant: str) -> Encoder:
        return load_encoder(self.weights("pretrain", variant, "encoder"), self.params.model).to(self.device).eval()

    def pretrained(self, variant: str, feature_dim: int) -> MaskedPretraining:
        """Encoder and decoder as pretraining left them."""
        p, folder = self.params, self.weights("pretrain", variant, "decoder").parent
        model = load_pretrained(folder, p.model, p.pretrain.ablation[variant], p.pretrain.mask_ratio, feature_dim)
        return model.to(self.device).eval()

    def trained_segmenter(self, variant: str, classes: int) -> upernet.Segmenter:
        m, e, s = self.params.model, self.params.model.encoder, self.params.segment
        sizes = (s.crop_size, m.patch_size, e.embed_dim, e.depth, e.num_heads, classes, s.channels, s.aux_channels, s.out_blocks)
        model = upernet.Segmenter(*sizes, norm="batch")
        load_into(model, self.weights("segment", variant, "segmenter"))
        return model.to(self.device).eval()


@dataclass
class FigureImages:
    """The fixed validation images that the figures look at, with what the teacher made of them."""

    images: Tensor  # uint8 (n, 3, S, S)
    features: Tensor  # float32 (n, 1+N, D)
    importance: Tensor  # float32 (n, N)
    labels: Tensor  # (n,)
    cover: Tensor  # (n, N) share of each patch on the object, NaN where that is not known
    classes: list[str]

    @classmethod
    def read(cls, project: Project, most: int = 256) -> "FigureImages":
        if project.params.no_teacher:
            raise UserError("This figure needs the teacher, and with pretrain.weights and a released teacher none is fetched.")
        found = load_weights(project.path("targets", "figure_images.safetensors"))
        chosen = spread(len(found["index"]), most)
        val = Records(project.path("imagenet"), "val")
        records = [val[i] for i in found["index"][chosen].tolist()]
        cover = torch.stack([patch_cover(record.get("mask"), project.params.model.grid) for record in records])
        labels = torch.tensor([record["label"] for record in records])
        images, features, importance = (found[name][chosen] for name in ("images", "features", "importance"))
        return cls(images, features.float(), importance, labels, cover, val.manifest["classes"])

    def masks(self, visible_of: str, n_visible: int) -> Tensor:
        """(n, K) visible patches by `random` or `semantic` sampling, from the same noise."""
        noise = torch.stack([masking.gumbel(0, 0, i, self.importance.shape[1]) for i in range(len(self.images))])
        return masking.sample_visible(noise, n_visible, self.importance if visible_of == "semantic" else None)


def spread(n: int, most: int) -> Tensor:
    """Up to `most` of n indices, evenly spread."""
    return torch.linspace(0, n - 1, min(n, most)).round().long().unique()


def patch_cover(mask: bytes | None, grid: int) -> Tensor:
    if mask is None:
        return torch.full((grid * grid,), float("nan"))
    known = (transforms.decode_annotation(mask) > 127).float()[None, None]
    return nn.functional.adaptive_avg_pool2d(known, grid).flatten()


def keep_probability(importance: Tensor, n_visible: int, seed: int = 0) -> Tensor:
    """(n, N) share of DRAWS semantic aware masks that keep each patch visible."""
    n = importance.shape[1]
    noise = masking.gumbel(seed, 0, 0, DRAWS * n).view(DRAWS, n)
    kept = [masking.sample_visible(noise, n_visible, row.expand(DRAWS, n)).flatten().bincount(minlength=n) for row in importance]
    return torch.stack(kept) / DRAWS


@torch.inference_mode()
def predictions(project: Project, model: MaskedPretraining, images: Tensor, visible: Tensor, batch: int = 32) -> Tensor:
    """(n, 1+N, D) what the decoder says of all tokens, in image order, seeing the visible patches alone."""
    parts = []
    for some, seen in zip(images.split(batch), visible.split(batch), strict=True):
        masked = masking.complement(seen, model.n_patches)
        order = (seen.to(project.device), masked.to(project.device))
        predicted = model.predict(transforms.normalise(some.to(project.device)), *order)
        parts.append(in_image_order(predicted, *order).float().cpu())
    return torch.cat(parts)


@torch.inference_mode()
def encode(project: Project, variant: str, images: Tensor, batch: int = 32) -> Tensor:
    """(n, 1+N, D) tokens of the whole image by a variant's encoder."""
    encoder = project.encoder(variant)
    return torch.cat([encoder(transforms.normalise(some.to(project.device))).float().cpu() for some in images.split(batch)])


class Colours:
    """The first three principal components of unit-length patch features as red, green and blue."""

    def __init__(self, features: Tensor):
        """features (n, N, D): what the components and their range are taken from."""
        rows = nn.functional.normalize(features, dim=-1).flatten(0, 1).double()
        self.mean = rows.mean(dim=0)
        vectors = torch.linalg.eigh((rows - self.mean).T @ (rows - self.mean)).eigenvectors.flip(1)[:, :3]
        # Eigenvectors have no sign of their own: the largest entry is made positive.
        self.axes = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
        shades = (rows - self.mean) @ self.axes
        self.low, self.high = (torch.quantile(shades[:: max(1, len(shades) // 100_000)], q, dim=0) for q in (0.02, 0.98))

    def __call__(self, features: Tensor) -> np.ndarray:
        """(N, D) -> (G, G, 3) in 0..1."""
        rows = nn.functional.normalize(features, dim=-1).double()
        shades = (((rows - self.mean) @ self.axes - self.low) / (self.high - self.low)).clamp(0, 1)
        return as_grid(shades).float().numpy()


def neighbours(features: Tensor, k: int) -> Tensor:
    """(n, k) indices of the images most alike by cosine, itself left out, or of all others when they are fewer; features
    (n, D)."""
    unit = nn.functional.normalize(features, dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).topk(min(k, len(unit) - 1), dim=1).indices


@torch.inference_mode()
def segment(project: Project, variant: str, scenes: list[tuple[Tensor, Tensor]], classes: int) -> list[Tensor]:
    """Predicted labels (H, W) of each (image, labels), as the segment stage judges them."""
    model, found = project.trained_segmenter(variant, classes), []
    precision = resolve_precision(project.params.compute, project.device)
    for _, alike in groupby(scenes, key=lambda scene: scene[0].shape):
        for some in chunks(alike, 50):
            images = torch.stack(
                [resize_scene(image, None, project.params.segment.resize, 1.0)[0] for image, _ in some]
            )
            with autocast(precision, project.device):
                logits = scene_logits(project, model, transforms.normalise(images.to(project.device)), classes)
            found += upernet.resize_maps(logits, some[0][1].shape).argmax(dim=1).cpu()
    return found


def scene_logits(project: Project, model: upernet.Segmenter, images: Tensor, classes: int) -> Tensor:
    s = project.params.segment
    if images.shape[2:] == (s.crop_size, s.crop_size):  # one window an image: a whole batch at once
        return upernet.resize_maps(model(images)[0].float(), images.shape[2:])
    return torch.cat([inference.slide_logits(model, image[None], s.crop_size, s.stride, classes) for image in images])


def scenes_to_judge(project: Project, val: Records) -> list[tuple[Tensor, Tensor]]:
    """(image, labels) of all validation scenes, or of as many as this machine can segment in a short while."""
    each = project.params.segment.crop_size**2
    most = SCENES if project.device.type == "cuda" else min(SCENES, max(8, PIXELS_ON_CPU // each))
    return [decode_scene(val[i], len(val.manifest["classes"])) for i in spread(len(val), most).tolist()]


def class_iou(predicted: list[Tensor], scenes: list[tuple[Tensor, Tensor]], classes: int) -> list[float]:
    """IoU of each class in %, NaN for a class that occurs nowhere."""
    counts = sum(miou.confusion(p, labels, classes) for p, (_, labels) in zip(predicted, scenes, strict=True))
    return [float("nan") if value is None else value for value in miou.scores(counts)["class_iou"]]


def class_colours(classes: int) -> np.ndarray:
    """(classes + 1, 3): stuff pale, things strong, as far as the built-in world goes; the last is `unlabelled`."""
    known = ["#DDDDDD", "#BBD9EE", "#F3E2B8", "#C9E3C2", "#E4C9DC", "#B3B3B3"]
    known += [plots.BLUE, plots.ORANGE, plots.VERMILION, plots.GREEN, plots.BLACK, "#7B3FA0", "#8C1C13", "#F0E442"]
    shades = [plt.matplotlib.colors.to_rgb(c) for c in known[:classes]]
    for k in range(len(shades), classes):  # more classes than eyes can tell apart: hues a golden ratio apart
        shades.append(tuple(plt.matplotlib.colors.hsv_to_rgb(((k * 0.618034) % 1, 0.35 + 0.25 * (k % 3), 0.95 - 0.15 * (k % 4)))))
    return np.array([*shades, (1, 1, 1)])


def grid_of(rows: list[str], columns: int, label: float = 1.2, right: float = 0.02, top: float = 0.02, below: float = 0.02):
    """(figure, axes (rows, columns)) for small square pictures, the rows' names at the left.

    label, right, top, below: inches kept free on the four sides."""
    cell = min((plots.WIDTH - label - right) / columns, LARGEST_CELL)
    width, height = label + columns * cell + right, top + len(rows) * cell + below
    figure, axes = plt.subplots(len(rows), columns, figsize=(width, height), squeeze=False, layout="none")
    figure.subplots_adjust(label / width, below / height, 1 - right / width, 1 - top / height, wspace=GAP, hspace=GAP)
    for row, name in zip(axes, rows, strict=True):
        row[0].text(-0.1, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=10)
        for axis in row:
            axis.set_axis_off()
    return figure, axes


def show(axis: Axes, picture, **options):
    """uint8 (3, H, W) tensor, or an array (H, W[, 3])."""
    if isinstance(picture, Tensor) and picture.ndim == 3 and picture.shape[0] == 3:
        picture = picture.permute(1, 2, 0)
    return axis.imshow(np.asarray(picture), **options)


def as_grid(rows: Tensor) -> Tensor:
    """(N, ...) patches -> (G, G, ...)."""
    side = round(len(rows) ** 0.5)
    return rows.reshape(side, side, *rows.shape[1:])


def masked(image: Tensor, visible: Tensor, n_patches: int) -> np.ndarray:
    """The image with the patches that are not visible greyed out."""
    kept = 1 - as_grid(masking.mask_of(visible[None], n_patches)[0])
    wide = nn.functional.interpolate(kept[None, None], size=image.shape[1:], mode="nearest")[0, 0].bool().numpy()
    return np.where(wide[..., None], image.permute(1, 2, 0).numpy() / 255, UNKNOWN)


def dots(axis: Axes, visible: Tensor, grid: int) -> None:
    """A dot on each patch of a map that is visible, (K,) indices."""
    rows, columns = divmod(visible.numpy(), grid)
    axis.plot(columns, rows, "o", color="white", mec="black", mew=0.6, ms=3 if grid < 10 else 1.5)


def frame(axis: Axes, colour: str, style: str = "-") -> None:
    """A border around a picture."""
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set(visible=True, color=colour, linewidth=2.5, linestyle=style)


def colourbar(axis: Axes, drawn, low: str, high: str) -> None:
    """A slim scale at the right of a row of maps."""
    bar = axis.inset_axes((1.1, 0.1, 0.08, 0.8))
    plt.colorbar(drawn, cax=bar)
    bar.set_yticks([])
    for place, text in ((0, low), (1, high)):
        bar.text(1.4, place, text, transform=bar.transAxes, ha="left", va="center", fontsize=9)


def below(figure: Figure, inches: float, left: float = 0.6) -> Axes:
    """Axes of this height at the foot of a grid that kept room for it."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 0.5 / height, 1 - (left + 0.15) / width, inches / height))


def legend(figure: Figure, colours: dict[str, np.ndarray]) -> None:
    """Patches of colour with names; the figure grows at its foot to hold them."""
    handles = [plt.Rectangle((0, 0), 1, 1, fc=colour, ec=plots.GREY, lw=0.5) for colour in colours.values()]
    width, height = figure.get_size_inches()
    columns = max(2, int(width / 1.2))
    room = 0.22 * -(-len(handles) // columns) + 0.15
    top, bottom = (edge * height + room for edge in (figure.subplotpars.top, figure.subplotpars.bottom))
    figure.set_figheight(height + room)
    figure.subplots_adjust(top=top / (height + room), bottom=bottom / (height + room))
    figure.legend(handles, colours.keys(), loc="lower center", ncols=columns, fontsize=9.5, columnspacing=1, handlelength=1.5)
