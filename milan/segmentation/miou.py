"""Mean intersection over union, and the labels it is counted on.

Everything follows from one confusion matrix; matrices of batches and processes simply add.
"""

import torch
from torch import Tensor

IGNORE = 255


def reduce_zero_label(annotation, num_classes: int) -> Tensor:
    """ADE20K's file labels as training labels, (..., H, W) integers -> uint8 of the same shape.

    In the files 0 is "other" and 1..num_classes are the classes; here 0 becomes 255 (ignored),
    the classes become 0..num_classes - 1, and 255 stays 255. Takes an array or a tensor.
    """
    annotation = torch.as_tensor(annotation).long()
    if num_classes >= IGNORE:
        raise ValueError(f"{num_classes} classes leave no room for {IGNORE}, the ignored label")
    ignored = (annotation == 0) | (annotation == IGNORE)
    strange = annotation[~ignored & ((annotation < 0) | (annotation > num_classes))]
    if len(strange):
        raise ValueError(f"label {int(strange[0])} in an annotation of {num_classes} classes")
    return torch.where(ignored, IGNORE, annotation - 1).to(torch.uint8)


def confusion(pred: Tensor, label: Tensor, num_classes: int, ignore_index: int = IGNORE) -> Tensor:
    """Count pixels by (true class, predicted class): (num_classes, num_classes) int64.

    pred, label: integers of one shape; pixels whose label is ignore_index are not counted.
    """
    counted = label != ignore_index
    pred, label = pred[counted].long(), label[counted].long()
    for name, values in (("prediction", pred), ("label", label)):
        strange = values[(values < 0) | (values >= num_classes)]
        if len(strange):
            raise ValueError(f"{name} {int(strange[0])} outside the {num_classes} classes")
    counts = torch.bincount(label * num_classes + pred, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def scores(confusion: Tensor) -> dict[str, float | list[float | None]]:
    """What ADE20K is judged by, in percent, from a confusion matrix (rows truth).

    miou: mean of class_iou over the classes that occur in truth or prediction; mean_accuracy: mean
    recall over the classes that occur in truth; pixel_accuracy: share of pixels that are right;
    class_iou: one number a class, None for a class that occurs in neither (mmseg's nan).
    """
    counts = confusion.double().cpu()
    if not counts.sum():
        raise ValueError("no labelled pixel was counted")
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = 100 * right / (true + predicted - right)  # 0 / 0 = nan: the class does not occur
    return {
        "miou": iou.nanmean().item(),
        "mean_accuracy": (100 * right / true).nanmean().item(),
        "pixel_accuracy": (100 * right.sum() / counts.sum()).item(),
        "class_iou": [None if value != value else value for value in iou.tolist()],
    }
