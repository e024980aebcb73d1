"""Read what the notebooks need: the active recipe, trained models, and the figure images with the teacher's features."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from IPython.display import Image
from matplotlib.figure import Figure
from torch import Tensor

from milan.core.errors import UserError
from milan.data.evaluation_view import object_cover
from milan.data.records import Records
from milan.method import masking
from milan.method.encoder import Encoder, load_encoder
from milan.method.model import MaskedPretraining, load_pretrained
from milan.params import Params, read_params
from milan.report import plots
from milan.segmentation.upernet import Segmenter
from milan.training.device import resolve_params, set_up
from milan.training.weights import load_into, load_weights

FOLDERS = "MILAN_FIGURES"  # variable set by the figures stage: {"params", "outs", "metrics", "curves", "published", "figures"}


@dataclass
class Project:
    """The active recipe, the folders of its results, and the device to compute on."""

    params: Params
    folders: dict[str, Path]
    device: torch.device

    @classmethod
    def open(cls) -> "Project":
        """Read recipe and folders from the figures stage, or from params.yaml when a notebook is run by hand."""
        given = json.loads(os.environ.get(FOLDERS, "{}"))
        params = resolve_params(read_params(given.get("params", "params.yaml")))
        folders = {
            "outs": f"outs/{params.data.name}",
            "metrics": f"reports/metrics/{params.data.name}",
            "curves": f"reports/curves/{params.data.name}",
            "published": params.report.published,
            "figures": "reports/figures",
        }
        return cls(params, {name: Path(given.get(name, path)) for name, path in folders.items()}, set_up(params.compute))

    def save(self, figure: Figure, name: str) -> Image:
        """Write the figure as <name>.png and return that file's image, for a notebook cell to show."""
        path = plots.save(figure, self.folders["figures"] / f"{name}.png")
        return Image(data=path.read_bytes(), width=round(100 * figure.get_figwidth()))

    def path(self, *parts: str) -> Path:
        """Return a path inside outs/<data.name>. Raises UserError when it is missing."""
        path = self.folders["outs"].joinpath(*parts)
        if not path.exists():
            raise UserError(f"{path} is missing: run `dvc repro`, which makes it, or `dvc pull`, which fetches it.")
        return path

    def weights(self, stage: str, variant: str, file: str) -> Path:
        """Return the path of a stage's weights, of the first seed."""
        return self.path(stage, f"{variant}-{self.params.seeds[0]}", f"{file}.safetensors")

    @property
    def student(self) -> str | None:
        """The variant whose predictions are shown: milan, else the last one that predicts CLIP features; None without any."""
        pretrain = self.params.pretrain
        variants = [variant for variant in self.params.variants if pretrain.ablation[variant].target == "clip"]
        if not variants or pretrain.weights:
            return None
        return "milan" if "milan" in variants else variants[-1]

    def encoder(self, variant: str) -> Encoder:
        """Load the pretrained encoder, in eval mode."""
        return load_encoder(self.weights("pretrain", variant, "encoder"), self.params.model).to(self.device).eval()

    def pretrained_model(self, variant: str, feature_dim: int) -> MaskedPretraining:
        """Load encoder and decoder as pretraining left them, in eval mode."""
        pretrain, folder = self.params.pretrain, self.weights("pretrain", variant, "decoder").parent
        model = load_pretrained(folder, self.params.model, pretrain.ablation[variant], pretrain.mask_ratio, feature_dim)
        return model.to(self.device).eval()

    def segmenter(self, variant: str, classes: int) -> Segmenter:
        """Load the trained segmenter, in eval mode."""
        model, settings = self.params.model, self.params.segment
        sizes = (settings.crop_size, model.patch_size, model.encoder.embed_dim, model.encoder.depth, model.encoder.num_heads)
        heads = (classes, settings.channels, settings.aux_channels, settings.out_blocks)
        segmenter = Segmenter(*sizes, *heads, norm="batch")
        load_into(segmenter, self.weights("segment", variant, "segmenter"))
        return segmenter.to(self.device).eval()


@dataclass
class FigureImages:
    """The fixed validation images of the figures, with the teacher's features and importance."""

    images: Tensor  # uint8 (n, 3, S, S)
    features: Tensor  # float32 (n, 1+N, D)
    importance: Tensor  # float32 (n, N)
    labels: Tensor  # (n,)
    cover: Tensor  # (n, N) share of each patch that lies on the object, NaN where no mask is known
    classes: list[str]

    @classmethod
    def read(cls, project: Project, most: int = 256) -> "FigureImages":
        """Read up to `most` images, evenly chosen. Raises UserError when the recipe has no teacher."""
        if project.params.no_teacher:
            raise UserError("This figure needs the teacher, and with pretrain.weights and a released teacher none is fetched.")
        stored = load_weights(project.path("targets", "figure_images.safetensors"))
        chosen = spread(len(stored["index"]), most)
        val = Records(project.path("imagenet"), "val")
        records = [val[i] for i in stored["index"][chosen].tolist()]
        cover = torch.stack([patch_cover(record.get("mask"), project.params) for record in records])
        labels = torch.tensor([record["label"] for record in records])
        images, features, importance = (stored[name][chosen] for name in ("images", "features", "importance"))
        return cls(images, features.float(), importance, labels, cover, val.manifest["classes"])

    def visible_patches(self, masking_name: str, n_visible: int) -> Tensor:
        """Draw the indices (n, n_visible) of visible patches by `random` or `semantic` masking, from the same noise."""
        noise = torch.stack([masking.gumbel(0, 0, i, self.importance.shape[1]) for i in range(len(self.images))])
        return masking.sample_visible(noise, n_visible, self.importance if masking_name == "semantic" else None)


def spread(n: int, most: int) -> Tensor:
    """Return up to `most` of n indices, evenly spread."""
    return torch.linspace(0, n - 1, min(n, most)).round().long().unique()


def patch_cover(mask: bytes | None, params: Params) -> Tensor:
    """Return the share of each patch (N,) of a figure image that lies on the object of its encoded mask; NaN without a mask."""
    if mask is None:
        return torch.full((params.model.n_patches,), float("nan"))
    return object_cover(mask, params.linear_eval.resize, params.model.image_size, params.model.grid)
