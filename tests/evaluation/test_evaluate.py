"""Evaluation: scores worked out by hand, and every sample once and in its place for any number of processes."""

import math

import pytest
import torch

from milan.evaluation import evaluate
from tests.training.test_loop import launched


def test_top_1_and_top_5_by_hand():
    """Six classes; the labels stand at places 1, 2, 5 and 6 of their rows."""
    row = torch.tensor([0.1, 0.6, 0.5, 0.4, 0.3, 0.2])  # best to worst: 1 2 3 4 5 0
    found = dict(evaluate.accuracy(row.expand(4, -1), torch.tensor([1, 2, 5, 0]), "here"))
    assert found == {"here/top1": 25.0, "here/top5": 75.0}


def test_fewer_than_five_classes():
    found = dict(evaluate.accuracy(torch.tensor([[1.0, 2], [1, 2], [2, 1]]), torch.tensor([1, 0, 1]), "p"))
    assert found["p/top1"] == pytest.approx(100 / 3) and found["p/top5"] == 100


ANGLES = torch.tensor([0.0, 0.1, 0.3, 1.5, 1.6])
POINTS = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1) * torch.tensor([[1.0], [5], [0.1], [3], [9]])  # lengths do not count
LABELS = torch.tensor([0, 0, 1, 1, 1])
CPU = torch.device("cpu")


@pytest.mark.parametrize("k, temperature, expected", [
    (1, 0.07, 1),  # the nearest of 0.21 is the 1 at 0.3
    (3, 0.07, 0),  # votes relative to exp(1 / T): 0.842 + 0.806 for 0, 0.944 for 1
    (4, 0.07, 0),  # the one at 1.5 adds nearly nothing
    (5, 100.0, 1),  # all count alike: two for 0, three for 1
    (20, 100.0, 1),  # more neighbours than there are
])  # fmt: skip
def test_nearest_neighbours_by_hand(k, temperature, expected):
    test = torch.tensor([[math.cos(0.21), math.sin(0.21)]]) * torch.tensor([[7.0], [0.2], [1]])
    assert evaluate.knn_top1(POINTS, LABELS, test, torch.full((3,), expected), CPU, k, temperature) == 100
    assert evaluate.knn_top1(
        POINTS, LABELS, test, torch.tensor([1 - expected] * 2 + [expected]), CPU, k, temperature
    ) == pytest.approx(100 / 3)


class Numbered:
    """Item index -> an image of one pixel value, label 100 + index."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.full((3, 2, 2), index, dtype=torch.uint8), "label": torch.tensor(100 + index)}


def read(n: int, batch_size: int) -> dict:
    seen = []

    def pixel(images: torch.Tensor) -> torch.Tensor:
        """Undo normalise on one value: red is (x / 255 - 0.485) / 0.229."""
        seen.append(len(images))
        return ((images[:, 0, 0, 0] * 0.229 + 0.485) * 255)[:, None]

    found, labels = evaluate.outputs(pixel, Numbered(n), batch_size, torch.device("cpu"), "reading")
    return {"found": found[:, 0].tolist(), "labels": labels.tolist(), "seen": sum(seen)}


@pytest.mark.parametrize("processes, n", [(1, 7), (2, 7), (3, 7), (2, 1)])
def test_every_sample_once_and_in_order(workplace, processes, n):
    result = launched(processes, read, n, 2)
    assert result["found"] == pytest.approx(list(range(n)), abs=1e-3)
    assert result["labels"] == [100 + i for i in range(n)]
    assert result["seen"] == len(range(0, n, processes))


def read_with_labels(n: int) -> dict:
    """What is asked for besides comes with its own image."""
    device = torch.device("cpu")
    found, _ = evaluate.outputs(lambda images, labels: labels[:, None], Numbered(n), 2, device, "reading", also=("label",))
    return {"found": found[:, 0].tolist()}


@pytest.mark.parametrize("processes", [1, 2])
def test_what_else_of_a_batch_is_asked_for(workplace, processes):
    assert launched(processes, read_with_labels, 5)["found"] == [100, 101, 102, 103, 104]


def test_the_smallest_temperature_is_the_nearest_neighbour_alone():
    """Votes of exp(1 / 1e-6) would be beyond all floats."""
    assert evaluate.knn_top1(POINTS, LABELS, POINTS, LABELS, CPU, k=3, temperature=1e-6) == 100


def nearest(n: int) -> dict:
    """n test images, of which all but the first are one of the points, with its label."""
    angles, labels = torch.cat([torch.tensor([0.29]), ANGLES[:n]])[:n], torch.cat([torch.tensor([0]), LABELS])[:n]
    return {"top1": evaluate.knn_top1(POINTS, LABELS, torch.stack([angles.cos(), angles.sin()], dim=1), labels, CPU, k=1)}


@pytest.mark.parametrize("processes, n", [(1, 4), (2, 4), (3, 4), (2, 1)])
def test_processes_share_the_nearest_neighbours(workplace, processes, n):
    """The first, at 0.29, is nearest to a 1 and labelled 0."""
    assert launched(processes, nearest, n)["top1"] == 100 * (n - 1) / n


def test_nearest_neighbours_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(evaluate, "SIMILARITIES", 10)  # two rows of five points
    labels = torch.tensor([0, 0, 1, 1, 0])
    assert evaluate.knn_top1(POINTS, LABELS, POINTS, labels, CPU, k=1) == 80


def test_confused_pairs_are_actual_and_predicted_in_order():
    predicted, labels = torch.tensor([1, 1, 0]), torch.tensor([0, 1, 2])
    assert evaluate.confused(predicted, labels).tolist() == [[0, 1], [1, 1], [2, 0]]


def test_of_many_classes_the_worst_are_kept_and_of_many_images_an_even_choice():
    """Class k of 60 has k mistakes, taken for class 59 (of 59 for 0): the 20 worst are 40 to 59."""
    labels = torch.arange(60).repeat_interleave(60)
    predicted = torch.where(torch.arange(60).repeat(60) < labels, 59, labels)
    predicted[(labels == 59) & (predicted == 59)] = 0
    pairs = evaluate.confused(predicted, labels)
    assert sorted(set(pairs[:, 0].tolist())) == list(range(40, 59)) and len(pairs) == 19 * 60
    assert set(pairs[:, 1].tolist()) == set(range(40, 60))
    assert evaluate.confused(predicted, labels, rows=600).tolist() == pairs[::2].tolist()
