"""Mean intersection over union, and the conversion of ADE20K's labels that it needs.

All scores follow from one confusion matrix; the matrices of batches and ranks are added.
"""

import torch
from torch import Tensor

IGNORE = 255


def reduce_zero_label(annotation, num_classes: int) -> Tensor:
    """Convert ADE20K's file labels, an array or tensor (..., H, W) of integers, to training labels, uint8 of the same shape.

    In the files 0 means "other" and 1..num_classes are the classes. 0 becomes 255 (ignored), the classes become
    0..num_classes - 1, and 255 stays 255. Raises ValueError naming a label outside this range.
    """
    annotation = torch.as_tensor(annotation).long()
    if num_classes >= IGNORE:
        raise ValueError(f"{num_classes} classes leave no room for {IGNORE}, the ignored label")
    ignored = (annotation == 0) | (annotation == IGNORE)
    invalid = annotation[~ignored & ((annotation < 0) | (annotation > num_classes))]
    if len(invalid):
        raise ValueError(f"label {int(invalid[0])} in an annotation of {num_classes} classes")
    return torch.where(ignored, IGNORE, annotation - 1).to(torch.uint8)


def confusion(pred: Tensor, label: Tensor, num_classes: int, ignore_index: int = IGNORE) -> Tensor:
    """Count pixels by true class (rows) and predicted class (columns): (num_classes, num_classes) int64.

    pred, label: integers of the same shape; pixels whose label is ignore_index are not counted.
    Raises ValueError naming a value that is no class.
    """
    counted = label != ignore_index
    pred, label = pred[counted].long(), label[counted].long()
    for name, values in (("prediction", pred), ("label", label)):
        invalid = values[(values < 0) | (values >= num_classes)]
        if len(invalid):
            raise ValueError(f"{name} {int(invalid[0])} outside the {num_classes} classes")
    counts = torch.bincount(label * num_classes + pred, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def class_pixels(label: Tensor, num_classes: int, ignore_index: int = IGNORE) -> Tensor:
    """Count the pixels of each class: (num_classes,) int64; pixels whose label is ignore_index are not counted."""
    return confusion(label, label, num_classes, ignore_index).diagonal()


def constant_answer(train_pixels: Tensor, val_pixels: Tensor) -> dict[str, float | list[float | None]]:
    """Return the scores on the validation pixels of one answer everywhere: the most frequent class of training.

    train_pixels, val_pixels: (num_classes,) counts; of equally frequent classes the first."""
    counts = torch.zeros(len(val_pixels), len(val_pixels), dtype=torch.int64)
    counts[:, train_pixels.argmax()] = val_pixels
    return scores(counts)


def scores(confusion: Tensor) -> dict[str, float | list[float | None]]:
    """Return ADE20K's scores in percent, from a confusion matrix whose rows are the true classes.

    class_iou: one number per class, None for a class that occurs neither in truth nor in prediction (mmseg's nan);
    miou: mean of class_iou over the other classes; mean_accuracy: mean recall over the classes that occur in truth;
    pixel_accuracy: share of correct pixels. Raises ValueError when no pixel was counted.
    """
    counts = confusion.double().cpu()
    if not counts.sum():
        raise ValueError("no labelled pixel was counted")
    correct, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = 100 * correct / (true + predicted - correct)  # 0 / 0 = nan: the class does not occur
    return {
        "miou": iou.nanmean().item(),
        "mean_accuracy": (100 * correct / true).nanmean().item(),
        "pixel_accuracy": (100 * correct.sum() / counts.sum()).item(),
        "class_iou": [None if value != value else value for value in iou.tolist()],
    }
