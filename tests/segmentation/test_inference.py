"""Sliding-window inference: overlapping windows, images smaller than the window."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from milan.data import transforms
from milan.segmentation.inference import predict, slide_logits


class PixelModel:
    """A model whose logits are the average of every 2x2 pixels and twice that; it keeps its windows."""

    def __init__(self):
        self.windows = []

    def __call__(self, images):
        self.windows.append(images)
        pooled = nn.functional.avg_pool2d(images[:, :1], 2)
        return torch.cat([pooled, 2 * pooled], dim=1), None


@pytest.mark.parametrize("height, width, windows", [(8, 8, 1), (8, 13, 2), (19, 13, 4 * 2), (9, 20, 2 * 4)])
def test_slide_logits_agree_where_windows_overlap(height, width, windows):
    model = PixelModel()
    image = torch.full((1, 3, height, width), 3.0)
    logits = slide_logits(model, image, window=8, stride=5, num_classes=2)
    assert logits.shape == (1, 2, height, width)
    assert torch.allclose(logits[0, 0], torch.tensor(3.0))
    assert torch.allclose(logits[0, 1], torch.tensor(6.0))
    assert len(model.windows) == windows
    assert all(window.shape == (1, 3, 8, 8) for window in model.windows)


def test_slide_logits_average_by_count():
    """Window k has the logit k everywhere; width 9, window 4, stride 3 give windows at 0, 3 and, shifted inside, 5."""
    values = iter([0.0, 1.0, 2.0])
    logits = slide_logits(lambda _: (torch.full((1, 1, 2, 2), next(values)), None), torch.zeros(1, 3, 4, 9), 4, 3, 1)
    assert logits[0, 0, 0].tolist() == [0, 0, 0, 0.5, 1, 1.5, 1.5, 2, 2]
    assert logits[0, 0].unique(dim=0).shape == (1, 9)


def test_slide_logits_of_a_small_image():
    model = PixelModel()
    logits = slide_logits(model, torch.full((1, 3, 5, 6), 3.0), window=8, stride=8, num_classes=2)
    assert logits.shape == (1, 2, 5, 6)
    (window,) = model.windows
    assert window[..., :5, :6].eq(3).all()
    assert window.sum() == 3 * 3 * 5 * 6
    with pytest.raises(ValueError, match="gaps"):
        slide_logits(model, torch.zeros(1, 3, 8, 8), window=4, stride=5, num_classes=2)


HALVES = torch.tensor([250, 5], dtype=torch.uint8).repeat_interleave(4).expand(1, 3, 8, 8)  # bright left, dark right


def settings(scales: list[float], flip: bool) -> SimpleNamespace:
    return SimpleNamespace(crop_size=8, stride=8, resize=[16, 8], scales=scales, flip=flip)


def test_probabilities_are_averaged_over_scales():
    """Class 1 leads by 9, -4 and -4: its probabilities 0.9999, 0.018 and 0.018 have the mean 0.345, though the mean lead is
    above 0. The side is 8, 12 and 16 px, which one and twice four windows of 8 px cover."""
    leads = iter([9.0] + [-4.0] * 8)

    def model(_):
        return torch.tensor([0, next(leads)]).reshape(1, 2, 1, 1), None

    assert predict(model, HALVES, (1, 1), settings([1.0, 1.5, 2.0], False), 2).item() == 0
    assert next(leads, None) is None
    leads = iter([9.0])
    assert predict(model, HALVES, (1, 1), settings([1.0], False), 2).item() == 1


def test_mirrored_scenes_are_mirrored_back():
    """A model of single pixels answers 0 where they are bright, for the mirrored image too."""
    seen = []

    def model(images):
        seen.append(images)
        return torch.cat([images[:, :1], torch.zeros_like(images[:, :1])], dim=1), None

    predicted = predict(model, torch.cat([HALVES, HALVES.flip(-1)]), (8, 8), settings([1.0], True), 2)
    assert predicted[0].tolist() == [[0] * 4 + [1] * 4] * 8 and predicted[1].tolist() == [[1] * 4 + [0] * 4] * 8
    assert len(seen) == 2 and seen[1].equal(seen[0].flip(-1)) and not seen[1].equal(seen[0])


def test_no_scene_is_made_smaller_than_the_window():
    seen = []

    def model(images):
        seen.append(images)
        return torch.zeros(1, 2, 1, 1), None

    predict(model, HALVES, (8, 8), settings([0.5, 2.0], False), 2)
    assert len(seen) == 1 + 4 and seen[0].equal(transforms.normalise(HALVES))
