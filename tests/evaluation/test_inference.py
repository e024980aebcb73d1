"""Model outputs: every sample once and in order, for any number of processes."""

import pytest
import torch

from milan.evaluation.inference import model_outputs
from tests.training.test_loop import launched

CPU = torch.device("cpu")


class NumberedImages:
    """Item index: an image whose every pixel is index, and the label 100 + index."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.full((3, 2, 2), index, dtype=torch.uint8), "label": torch.tensor(100 + index)}


def read_pixels(n: int, batch_size: int) -> dict:
    batch_sizes = []

    def red_value(images: torch.Tensor) -> torch.Tensor:
        """Undo normalise on one value: red is (x / 255 - 0.485) / 0.229."""
        batch_sizes.append(len(images))
        return ((images[:, 0, 0, 0] * 0.229 + 0.485) * 255)[:, None]

    outputs, labels = model_outputs(red_value, NumberedImages(n), batch_size, CPU, "reading")
    return {"outputs": outputs[:, 0].tolist(), "labels": labels.tolist(), "samples": sum(batch_sizes)}


@pytest.mark.parametrize("processes, n", [(1, 7), (2, 7), (3, 7), (2, 1)])
def test_every_sample_once_and_in_order(workplace, processes, n):
    result = launched(processes, read_pixels, n, 2)
    assert result["outputs"] == pytest.approx(list(range(n)), abs=1e-3)
    assert result["labels"] == [100 + i for i in range(n)]
    assert result["samples"] == len(range(0, n, processes))


def return_labels(n: int) -> dict:
    outputs, _ = model_outputs(lambda images, labels: labels[:, None], NumberedImages(n), 2, CPU, "reading", extra_keys=("label",))
    return {"outputs": outputs[:, 0].tolist()}


@pytest.mark.parametrize("processes", [1, 2])
def test_extra_batch_entries_belong_to_their_images(workplace, processes):
    assert launched(processes, return_labels, 5)["outputs"] == [100, 101, 102, 103, 104]
