"""Robustness: top-1 on sets of other images of the training classes, and the mean corruption error of ImageNet-C."""

from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

import torch
from torch import Tensor

from milan.data.corruptions import ALEXNET_ERROR, EXTRA, IMAGENET_CLASSES, parts_of

Head = Callable[[Tensor], Tensor]  # from normalised images (B, 3, S, S) to logits (B, classes)


def predicted_labels(heads: Mapping[str, Head], images: Tensor, labels: Tensor) -> Tensor:
    """Return the label that each head gives each image, (B, heads): the one of the largest logit among `labels` (K,), those of
    the set's classes. So its authors score ImageNet-A and -R, which have 200 of the 1,000 classes (eval.py of
    hendrycks/natural-adv-examples and hendrycks/imagenet-r)."""
    return torch.stack([labels[head(images)[:, labels].argmax(dim=1)] for head in heads.values()], dim=1)


def scores(top1: Mapping[str, float], classes: int) -> Iterator[tuple[str, float]]:
    """Yield (name, value in %) of one head. top1: its top-1 in % on each split; classes: that it tells apart.

    <set>_top1 for each set that is not corrupted; <corruption>_top1, the mean over severities; corrupted_top1, the mean over
    the corruptions that count in mCE; corrupted_extra_top1, over the others. For ImageNet's classes and all 15 corruptions also
    mce: the mean over corruptions of error by AlexNet's error (arXiv 1903.12261), lower is better."""
    severities: dict[str, list[float]] = {}
    for split, value in top1.items():
        name, corruption = parts_of(split)
        if corruption:
            severities.setdefault(corruption, []).append(value)
        else:
            yield f"{name}_top1", value
    means = {corruption: fmean(values) for corruption, values in severities.items()}
    yield from ((f"{corruption}_top1", value) for corruption, value in means.items())
    standard = {name: means[name] for name in ALEXNET_ERROR if name in means}
    if standard:
        yield "corrupted_top1", fmean(standard.values())
    if extra := [means[name] for name in EXTRA if name in means]:
        yield "corrupted_extra_top1", fmean(extra)
    if classes == IMAGENET_CLASSES and len(standard) == len(ALEXNET_ERROR):
        yield "mce", fmean((100 - value) / ALEXNET_ERROR[name] for name, value in standard.items())
