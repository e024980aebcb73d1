"""Scores worked out by hand: accuracies, nearest neighbours for any number of processes, RankMe, confusion pairs."""

import math

import numpy
import pytest
import torch

from milan.evaluation import scores
from tests.training.test_loop import launched


def test_top_1_and_top_5_by_hand():
    """Six classes; the labels rank 1st, 2nd, 5th and 6th in their rows."""
    row = torch.tensor([0.1, 0.6, 0.5, 0.4, 0.3, 0.2])  # best to worst: 1 2 3 4 5 0
    assert dict(scores.accuracy(row.expand(4, -1), torch.tensor([1, 2, 5, 0]), "here")) == {"here/top1": 25.0, "here/top5": 75.0}


def test_accuracy_of_fewer_than_five_classes():
    values = dict(scores.accuracy(torch.tensor([[1.0, 2], [1, 2], [2, 1]]), torch.tensor([1, 0, 1]), "p"))
    assert values["p/top1"] == pytest.approx(100 / 3) and values["p/top5"] == 100


def test_the_best_of_a_training_by_hand():
    curve = [{"loss": 2.0}, {"loss": 1.5, "val/top1": 40.0}, {"loss": 1.0, "val/top1": 50.5}, {"loss": 0.9, "val/top1": 45.0}]
    assert dict(scores.best_top1(curve, "here")) == {"here/best_top1": 50.5}
    assert dict(scores.best_top1(curve[:1], "here")) == {}


def test_chance_by_hand():
    """Four classes, 300 images: a standard error is sqrt(0.25 * 0.75 / 300) = 2.5 %, and two above 25 % are 30 %."""
    assert scores.is_chance(29.9, 4, 300) and not scores.is_chance(30.1, 4, 300) and scores.is_chance(0, 4, 300)


ANGLES = torch.tensor([0.0, 0.1, 0.3, 1.5, 1.6])
POINTS = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1) * torch.tensor([[1.0], [5], [0.1], [3], [9]])  # lengths must not matter
LABELS = torch.tensor([0, 0, 1, 1, 1])
CPU = torch.device("cpu")


@pytest.mark.parametrize("k, temperature, expected", [
    (1, 0.07, 1),  # the neighbour nearest to 0.21 is the one at 0.3, of class 1
    (3, 0.07, 0),  # votes, relative to exp(1 / temperature): 0.842 + 0.806 for class 0, 0.944 for class 1
    (4, 0.07, 0),  # the neighbour at 1.5 adds nearly nothing
    (5, 100.0, 1),  # all votes are nearly equal: two for class 0, three for class 1
    (20, 100.0, 1),  # k exceeds the number of training images
])  # fmt: skip
def test_nearest_neighbours_by_hand(k, temperature, expected):
    test = torch.tensor([[math.cos(0.21), math.sin(0.21)]]) * torch.tensor([[7.0], [0.2], [1]])
    assert scores.knn_top1(POINTS, LABELS, test, torch.full((3,), expected), CPU, k, temperature) == 100
    assert scores.knn_top1(
        POINTS, LABELS, test, torch.tensor([1 - expected] * 2 + [expected]), CPU, k, temperature
    ) == pytest.approx(100 / 3)


def test_a_tiny_temperature_does_not_overflow():
    """exp(1 / 1e-6) is beyond all floats; the nearest neighbour alone decides."""
    assert scores.knn_top1(POINTS, LABELS, POINTS, LABELS, CPU, k=3, temperature=1e-6) == 100


def knn_of_test_images(n: int) -> dict:
    """Score n test images: the first at 0.29 is nearest to a point of class 1 but labelled 0, the others are points."""
    angles, labels = torch.cat([torch.tensor([0.29]), ANGLES[:n]])[:n], torch.cat([torch.tensor([0]), LABELS])[:n]
    return {"top1": scores.knn_top1(POINTS, LABELS, torch.stack([angles.cos(), angles.sin()], dim=1), labels, CPU, k=1)}


@pytest.mark.parametrize("processes, n", [(1, 4), (2, 4), (3, 4), (2, 1)])
def test_nearest_neighbours_for_any_number_of_processes(workplace, processes, n):
    assert launched(processes, knn_of_test_images, n)["top1"] == 100 * (n - 1) / n


def test_nearest_neighbours_in_parts_of_a_few_rows(monkeypatch):
    monkeypatch.setattr(scores, "MAX_SIMILARITIES", 10)  # two rows of five points
    labels = torch.tensor([0, 0, 1, 1, 0])
    assert scores.knn_top1(POINTS, LABELS, POINTS, labels, CPU, k=1) == 80


def test_rankme_by_hand():
    """Singular values 3 and 1 are shares of 3/4 and 1/4, whatever the scale and the axes."""
    expected = (4 / 3) ** (3 / 4) * 4 ** (1 / 4)
    turn = torch.tensor([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])
    features = torch.tensor([[3.0, 0], [0, 1], [0, 0]])
    assert scores.rankme(features) == pytest.approx(expected)
    assert scores.rankme(100 * features @ turn) == pytest.approx(expected, rel=1e-6)
    assert scores.rankme(torch.eye(7, 9)) == pytest.approx(7)
    assert scores.rankme(torch.tensor([[1.0, 2], [2, 4], [-3, -6]])) == pytest.approx(1)  # multiples of one


def test_rankme_is_what_numpy_says():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + torch.arange(6)
    shares = numpy.linalg.svd(features.double().numpy(), compute_uv=False)
    shares /= shares.sum()
    assert scores.rankme(features) == pytest.approx(numpy.exp(-(shares * numpy.log(shares)).sum()), rel=1e-9)


def test_rankme_of_a_broken_encoder_is_no_number():
    assert math.isnan(scores.rankme(torch.tensor([[1.0, math.inf], [0, 1]])))
    assert math.isnan(scores.rankme(torch.zeros(3, 2)))


def test_confusion_pairs_are_actual_and_predicted_in_order():
    predicted, labels = torch.tensor([1, 1, 0]), torch.tensor([0, 1, 2])
    assert scores.confusion_pairs(predicted, labels).tolist() == [[0, 1], [1, 1], [2, 0]]


def test_confusion_pairs_keep_the_worst_classes_and_evenly_chosen_images():
    """Class k of 60 has k mistakes, all taken for class 59 (those of class 59 for 0): the 20 worst are 40 to 59."""
    labels = torch.arange(60).repeat_interleave(60)
    predicted = torch.where(torch.arange(60).repeat(60) < labels, 59, labels)
    predicted[(labels == 59) & (predicted == 59)] = 0
    pairs = scores.confusion_pairs(predicted, labels)
    assert sorted(set(pairs[:, 0].tolist())) == list(range(40, 59)) and len(pairs) == 19 * 60
    assert set(pairs[:, 1].tolist()) == set(range(40, 60))
    assert scores.confusion_pairs(predicted, labels, max_rows=600).tolist() == pairs[::2].tolist()
