"""Heat maps of text: how much each patch adds to an image's similarity with the text of its class, by RISE.

RISE (Petsiuk, Das and Saenko, BMVC 2018) hides most of an image at random, many times, and gives each patch the mean score of
the masks that keep it. It asks nothing of a model but its answer, so teacher and student are shown by one method, and hiding
patches is what a MILAN student was trained with.
"""

import textwrap
from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from milan.data import transforms
from milan.method import masking
from milan.method.model import MaskedPretraining
from milan.report import drawing
from milan.report.project import FigureImages, Project, spread
from milan.teacher.class_text import ClassText, read_class_text
from milan.teacher.frozen import compute_targets, load_tower

MASKS = 64  # of each image
MOST_JUDGED = 100  # images over which object_auc is taken
ON_OBJECT = 0.5  # smallest share of a patch on the object for which it counts as the object's


def class_text(project: Project) -> ClassText | None:
    """Read the teacher's text embeddings of the classes; None for a teacher without text."""
    return read_class_text(project.path("teacher"))


def images_to_ask(examples: FigureImages, chosen: list[int]) -> Tensor:
    """Return the indices of the images to draw maps of: those that are shown, and up to MOST_JUDGED with a known outline."""
    known = torch.nonzero(~examples.cover.isnan().any(dim=1)).flatten()
    judged = known[spread(len(known), MOST_JUDGED)] if len(known) else known
    return torch.cat([torch.tensor(chosen), judged]).unique()


@torch.inference_mode()
def text_maps(
    class_tokens: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    n_patches: int,
    n_visible: int,
    masks: int = MASKS,
) -> Tensor:
    """Return for each patch the mean score of the masks that keep it: (n, N). A score is the cosine of the predicted class
    token with the text of the image's class, less the mean of its cosines with all texts.

    class_tokens: from images, uint8 (n, 3, S, S), and visible patches (n, K) to class tokens (n, D); embeddings: (C, D), of
    unit length; labels: (n,). The masks are random, and the same for every model."""
    queries = embeddings[labels] - embeddings.mean(dim=0)
    scores, counts = torch.zeros(2, len(images), n_patches)
    for number in range(masks):
        noise = torch.stack([masking.gumbel(0, number, i, n_patches, purpose="heat map") for i in range(len(images))])
        visible = masking.sample_visible(noise, n_visible)
        kept = 1 - masking.mask_of(visible, n_patches)
        tokens = nn.functional.normalize(class_tokens(images, visible).float().cpu(), dim=1)
        scores += kept * (tokens * queries).sum(dim=1, keepdim=True)
        counts += kept
    return scores / counts.clamp_min(1)


def student_tokens(project: Project, model: MaskedPretraining) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function from images and visible patches to the class token that the student predicts."""

    def class_tokens(images: Tensor, visible: Tensor) -> Tensor:
        order = (visible.to(project.device), masking.complement(visible, model.n_patches).to(project.device))
        return model.predict(transforms.normalise(images.to(project.device)), *order)[:, 0]

    return class_tokens


def teacher_tokens(project: Project) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function from images and visible patches to the teacher's class token of the image with the other patches in
    its mean colour."""
    params = project.params
    tower = load_tower(project.path("teacher"), params.compute, project.device)
    settings = (params.compute, params.extract_targets.normalisation, params.model.grid)

    def class_tokens(images: Tensor, visible: Tensor) -> Tensor:
        return compute_targets(tower, hide(images, visible, params.model.grid).to(project.device), *settings)[0][:, 0]

    return class_tokens


def hide(images: Tensor, visible: Tensor, grid: int) -> Tensor:
    """Return images, uint8 (n, 3, S, S), with the patches that are not visible (n, K) in the image's mean colour."""
    hidden = masking.mask_of(visible, grid**2).unflatten(1, (1, grid, grid))
    hidden = nn.functional.interpolate(hidden, size=images.shape[2:], mode="nearest").bool()
    return torch.where(hidden, images.float().mean(dim=(2, 3), keepdim=True).round().to(torch.uint8), images)


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
