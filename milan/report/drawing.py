"""Draw grids of small pictures: images, maps and masks, with frames, scales, legends and colours."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from milan.method import masking
from milan.report import plots
from milan.report.plots import plt

HIDDEN_GREY = (0.15, 0.15, 0.15)  # of patches that are not visible
LARGEST_CELL = 1.5  # inches, side of a small picture
GAP = 0.05  # between pictures, as a share of their size


class PrincipalColours:
    """Show the first three principal components of unit-length patch features as red, green and blue."""

    def __init__(self, features: Tensor):
        """Compute the components, and the range of their values, from features (n, N, D)."""
        rows = nn.functional.normalize(features, dim=-1).flatten(0, 1).double()
        self.mean = rows.mean(dim=0)
        vectors = torch.linalg.eigh((rows - self.mean).T @ (rows - self.mean)).eigenvectors.flip(1)[:, :3]
        # The sign of an eigenvector is arbitrary; the largest entry is made positive.
        self.axes = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
        shades = (rows - self.mean) @ self.axes
        sample = shades[:: max(1, len(shades) // 100_000)]
        self.low, self.high = (torch.quantile(sample, share, dim=0) for share in (0.02, 0.98))

    def __call__(self, features: Tensor) -> np.ndarray:
        """Return the colours (G, G, 3) in 0..1 of features (N, D)."""
        rows = nn.functional.normalize(features, dim=-1).double()
        shades = (((rows - self.mean) @ self.axes - self.low) / (self.high - self.low)).clamp(0, 1)
        return patches_to_grid(shades).float().numpy()


def class_colours(classes: int) -> np.ndarray:
    """Return colours (classes + 1, 3); the built-in world's stuff is pale, its things are strong; the last is unlabelled."""
    named = ["#DDDDDD", "#BBD9EE", "#F3E2B8", "#C9E3C2", "#E4C9DC", "#B3B3B3"]
    named += [plots.BLUE, plots.ORANGE, plots.VERMILION, plots.GREEN, plots.BLACK, "#7B3FA0", "#8C1C13", "#F0E442"]
    shades = [plt.matplotlib.colors.to_rgb(c) for c in named[:classes]]
    for k in range(len(shades), classes):  # hues a golden ratio apart, for many classes
        shades.append(tuple(plt.matplotlib.colors.hsv_to_rgb(((k * 0.618034) % 1, 0.35 + 0.25 * (k % 3), 0.95 - 0.15 * (k % 4)))))
    return np.array([*shades, (1, 1, 1)])


def picture_grid(rows: list[str], columns: int, label: float = 1.2, right: float = 0.02, top: float = 0.02, below: float = 0.02):
    """Return (figure, axes (rows, columns)) for small square pictures, with the rows' names at the left.

    label, right, top, below: inches left free at the left, right, top and foot."""
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
    """Show a tensor, uint8 (3, H, W), or an array (H, W) or (H, W, 3)."""
    if isinstance(picture, Tensor) and picture.ndim == 3 and picture.shape[0] == 3:
        picture = picture.permute(1, 2, 0)
    return axis.imshow(np.asarray(picture), **options)


def patches_to_grid(rows: Tensor) -> Tensor:
    """Reshape patches (N, ...) to (G, G, ...)."""
    side = round(len(rows) ** 0.5)
    return rows.reshape(side, side, *rows.shape[1:])


def masked_image(image: Tensor, visible: Tensor, n_patches: int) -> np.ndarray:
    """Return an image, uint8 (3, S, S), as (S, S, 3) in 0..1 with all patches but the visible ones (K,) greyed out."""
    visible_grid = 1 - patches_to_grid(masking.mask_of(visible[None], n_patches)[0])
    visible_pixels = nn.functional.interpolate(visible_grid[None, None], size=image.shape[1:], mode="nearest")[0, 0].bool()
    return np.where(visible_pixels.numpy()[..., None], image.permute(1, 2, 0).numpy() / 255, HIDDEN_GREY)


def mark_patches(axis: Axes, visible: Tensor, grid: int) -> None:
    """Draw a dot on each visible patch (K,) of a map."""
    rows, columns = divmod(visible.numpy(), grid)
    axis.plot(columns, rows, "o", color="white", mec="black", mew=0.6, ms=3 if grid < 10 else 1.5)


def draw_frame(axis: Axes, colour: str, style: str = "-") -> None:
    """Draw a border around a picture."""
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set(visible=True, color=colour, linewidth=2.5, linestyle=style)


def draw_scale(axis: Axes, drawn, low: str, high: str) -> None:
    """Draw a slim colour scale at the right of a row of maps, with words at its ends."""
    bar = axis.inset_axes((1.1, 0.1, 0.08, 0.8))
    plt.colorbar(drawn, cax=bar)
    bar.set_yticks([])
    for height, text in ((0, low), (1, high)):
        bar.text(1.4, height, text, transform=bar.transAxes, ha="left", va="center", fontsize=9)


def axes_below(figure: Figure, inches: float, left: float = 0.6) -> Axes:
    """Add axes of this height at the foot of a grid that has room for them."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, 0.5 / height, 1 - (left + 0.15) / width, inches / height))


def add_legend(figure: Figure, colours: dict[str, np.ndarray]) -> None:
    """Add a legend {name: colour} at the foot of the figure, which grows to hold it."""
    handles = [plt.Rectangle((0, 0), 1, 1, fc=colour, ec=plots.GREY, lw=0.5) for colour in colours.values()]
    width, height = figure.get_size_inches()
    columns = max(2, int(width / 1.2))
    room = 0.22 * -(-len(handles) // columns) + 0.15
    top, bottom = (edge * height + room for edge in (figure.subplotpars.top, figure.subplotpars.bottom))
    figure.set_figheight(height + room)
    figure.subplots_adjust(top=top / (height + room), bottom=bottom / (height + room))
    figure.legend(handles, colours.keys(), loc="lower center", ncols=columns, fontsize=9.5, columnspacing=1, handlelength=1.5)
