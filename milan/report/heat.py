"""Heat maps of text: how similar each patch is to the text of the image's class, by the teacher's features or the student's."""

import textwrap

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from milan.report import drawing
from milan.report.project import Project
from milan.teacher.class_text import ClassText, read_class_text

ON_OBJECT = 0.5  # smallest share of a patch on the object for which it counts as the object's


def class_text(project: Project) -> ClassText | None:
    """Read the teacher's text embeddings of the classes; None for a teacher without text."""
    return read_class_text(project.path("teacher"))


def text_maps(features: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Return for each patch its cosine with the text of the image's class, less the mean of its cosines with all texts: (n, N).

    features: (n, 1+N, D), class token first; embeddings: (K, D), of unit length; labels: (n,). The mean is subtracted
    because it does not show where the object is: all texts share words ("a photo of"), and some patches are near to any text."""
    queries = embeddings[labels] - embeddings.mean(dim=0)
    return (nn.functional.normalize(features[:, 1:], dim=-1) @ queries.unsqueeze(2)).squeeze(2)


def object_auc(maps: Tensor, cover: Tensor) -> float:
    """Return in % how often a patch on the object is hotter than one of the background (area under the ROC curve).

    maps: (n, N); cover: (n, N) share of each patch on the object. The share of such pairs is averaged over the images, and
    ties count half: 50 is chance, and below 50 the object is the colder part. NaN when no image has such a pair."""
    shares = []
    for heat, share_on_object in zip(maps, cover, strict=True):
        differences = heat[share_on_object >= ON_OBJECT][:, None] - heat[share_on_object == 0]
        if differences.numel():
            shares.append(((differences > 0).double() + 0.5 * (differences == 0)).mean())
    return 100 * torch.stack(shares).mean().item() if shares else float("nan")


def show_maps(axes: list[Axes], maps: Tensor) -> None:
    """Show a row of maps (k, N), each with its own scale from its coldest patch to its hottest."""
    for axis, heat in zip(axes, maps, strict=True):
        drawn = drawing.show(axis, drawing.patches_to_grid(heat), cmap="cividis")
    drawing.draw_scale(axes[-1], drawn, "coldest", "hottest")


def set_title(axis: Axes, name: str) -> None:
    """Write a class's name above its picture, wrapped to its width."""
    axis.set_title(textwrap.fill(name, 11, max_lines=3, placeholder=" …", break_long_words=False), fontsize=9)
