"""Heat maps of text: how near each patch, as the teacher has it or as the student predicts it, is to the words for its class."""

import textwrap

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from milan.report import figures
from milan.teacher.class_text import ClassText, read_class_text

ON_OBJECT = 0.5  # share of a patch from which it counts as the object's


def class_text(project: figures.Project) -> ClassText | None:
    return read_class_text(project.path("teacher"))


def text_maps(features: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    """features (n, 1+N, D), class token first, unit embeddings (K, D) of the classes, labels (n,) -> (n, N): each patch's
    cosine with the text of the image's class, less the mean of its cosines with the texts of all classes: what all have in
    common ("a photo of") says nothing of where the object is, and some patches are near to any text."""
    queries = embeddings[labels] - embeddings.mean(dim=0)
    return (nn.functional.normalize(features[:, 1:], dim=-1) @ queries.unsqueeze(2)).squeeze(2)


def found(maps: Tensor, cover: Tensor) -> float:
    """In %, how often a patch of the object is hotter than one of the background: mean over the images of the share of such
    pairs, ties counting half (the area under the ROC curve). 50 is chance; less, and the object is the colder. NaN without
    any pair. maps (n, N); cover (n, N): share of each patch on the object."""
    shares = []
    for heat, on in zip(maps, cover, strict=True):
        pairs = heat[on >= ON_OBJECT][:, None] - heat[on == 0]
        if pairs.numel():
            shares.append(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())
    return 100 * torch.stack(shares).mean().item() if shares else float("nan")


def show(axes: list[Axes], maps: Tensor) -> None:
    """A row of maps (k, N), each in a scale of its own, from its coldest patch to its hottest."""
    for axis, heat in zip(axes, maps, strict=True):
        drawn = figures.show(axis, figures.as_grid(heat), cmap="cividis")
    figures.colourbar(axes[-1], drawn, "coldest", "hottest")


def title(axis: Axes, name: str) -> None:
    """A class's name above its picture, in lines that are as narrow."""
    axis.set_title(textwrap.fill(name, 11, max_lines=3, placeholder=" …", break_long_words=False), fontsize=9)
