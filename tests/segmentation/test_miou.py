"""Scores and label conversion worked out by hand."""

import numpy as np
import pytest
import torch

from milan.segmentation.miou import confusion, reduce_zero_label, scores


def test_miou_by_hand():
    label = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 255]])
    pred = torch.tensor([[0, 0, 1, 1], [1, 3, 0, 2]])
    counts = confusion(pred, label, num_classes=4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert counts.dtype == torch.int64
    result = scores(counts)  # IoU 2/3, 2/4, absent (predicted on an ignored pixel only), 0/1
    assert result["class_iou"] == [pytest.approx(200 / 3), 50.0, None, 0.0]
    assert result["miou"] == pytest.approx((200 / 3 + 50 + 0) / 3)
    assert result["mean_accuracy"] == pytest.approx(200 / 3)
    assert result["pixel_accuracy"] == pytest.approx(400 / 6)


def test_confusion_matrices_add():
    torch.manual_seed(0)
    pred, label = torch.randint(4, (6, 9, 9)), torch.randint(4, (6, 9, 9))
    label[:, 0] = 255
    parts = [confusion(*part, num_classes=4) for part in zip(pred.split(2), label.split(2), strict=True)]
    assert sum(parts).equal(confusion(pred, label, num_classes=4))


def test_confusion_refuses_values_that_are_no_class():
    with pytest.raises(ValueError, match="label 4 outside the 4 classes"):
        confusion(torch.tensor([0, 1]), torch.tensor([4, 1]), num_classes=4)
    with pytest.raises(ValueError, match="prediction 7 outside"):
        confusion(torch.tensor([7, 7]), torch.tensor([255, 1]), num_classes=4)
    with pytest.raises(ValueError, match="no labelled pixel"):
        scores(torch.zeros(4, 4, dtype=torch.int64))


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_reduce_zero_label(make):
    annotation = (
        make([[0, 1, 150], [255, 2, 0]]).astype("uint8") if make is np.array else make([[0, 1, 150], [255, 2, 0]])
    )
    labels = reduce_zero_label(annotation, num_classes=150)
    assert labels.tolist() == [[255, 0, 149], [255, 1, 255]]
    assert labels.dtype == torch.uint8
    assert annotation.tolist() == [[0, 1, 150], [255, 2, 0]]


@pytest.mark.parametrize("invalid", [151, 254, -1])
def test_reduce_zero_label_names_an_invalid_label(invalid):
    with pytest.raises(ValueError, match=f"label {invalid} "):
        reduce_zero_label(torch.tensor([[0, 255, 1, invalid]]), num_classes=150)
