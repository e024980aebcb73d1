"""Sliding-window inference: overlapping windows, images smaller than the window."""

import pytest
import torch
from torch import nn

from milan.segmentation.inference import slide_logits


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
