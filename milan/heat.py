"""Heat maps of text: how near each patch, as the teacher has it or as the student predicts it, is to the words for its class."""

import textwrap

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from milan import figures
from milan.class_text import ClassText, read_class_text

ON_OBJECT = 0.5  # share of a patch from which it counts as the object's


def class_text(project: figures.Project) -> ClassText | None:
    return read_class_text(project.path("teacher"))


def whole(n: int, n_patches: int) -> Tensor:
    """(n, N): every patch of n images is visible."""
    return torch.arange(n_patches).expand(n, -1)


def text_maps(features: Tensor, queries: Tensor) -> Tensor:
    """features (n, 1+N, D), class token first, queries (n, D) one an image -> (n, N) cosines of the patches."""
    patches = nn.functional.normalize(features[:, 1:], dim=-1)
    return (patches @ nn.functional.normalize(queries, dim=-1).unsqueeze(2)).squeeze(2)


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


def show(axes: list[Axes], maps: Tensor, shades: Tensor) -> None:
    """A row of maps (k, N) in one scale, that of the middle 96 % of the shades (any shape), with its two ends at the right."""
    low, high = (torch.quantile(shades.flatten()[:: max(1, shades.numel() // 100_000)], q).item() for q in (0.02, 0.98))
    for axis, heat in zip(axes, maps, strict=True):
        drawn = figures.show(axis, figures.as_grid(heat), cmap="cividis", vmin=low, vmax=high)
    figures.colourbar(axes[-1], drawn, f"{low:.2f}", f"{high:.2f}")


def title(axis: Axes, name: str) -> None:
    """A class's name above its picture, in lines that are as narrow."""
    axis.set_title(textwrap.fill(name, 11, max_lines=3, placeholder=" …", break_long_words=False), fontsize=9)
