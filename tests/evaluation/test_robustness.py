"""Scores of robustness by hand: the mean corruption error, and predictions among the classes of a set."""

import pytest
import torch

from milan.data.corruptions import ALEXNET_ERROR, EXTRA, split_name
from milan.evaluation.robustness import predicted_labels, scores


def toy() -> dict[str, float]:
    """Top-1 of a model that errs on noise and brightness alone, and on all of the extra corruptions."""
    top1 = {split_name(name, severity): 100.0 for name in ALEXNET_ERROR for severity in "12345"}
    top1 |= {split_name("gaussian_noise", str(1 + level)): 100 - error for level, error in enumerate((40, 50, 60, 70, 80))}
    top1 |= {split_name("brightness", severity): 100 - 56.4592 / 2 for severity in "12345"}
    return top1 | {split_name(name, severity): 20.0 * i for i, name in enumerate(EXTRA) for severity in "12345"}


def test_mean_corruption_error_by_hand():
    """Noise: 60 % of errors by AlexNet's 88.6428 %, so 67.6874; brightness: half of AlexNet's; 13 corruptions: 0."""
    values = dict(scores(toy(), classes=1000))
    assert values["mce"] == pytest.approx((67.6874 + 50) / 15, abs=1e-4)
    assert values["gaussian_noise_top1"] == pytest.approx(40) and values["snow_top1"] == 100
    assert values["corrupted_top1"] == pytest.approx((40 + 71.7704 + 13 * 100) / 15)
    assert values["corrupted_extra_top1"] == pytest.approx((0 + 20 + 40 + 60) / 4), "apart from the 15"


def test_without_alexnet_s_classes_or_corruptions_there_is_no_mce():
    assert "mce" not in dict(scores(toy(), classes=20))
    some = {split_name("contrast", "1"): 30.0, split_name("contrast", "2"): 10.0, split_name("pixelate", "1"): 50.0}
    assert dict(scores(some, classes=1000)) == {"contrast_top1": 20.0, "pixelate_top1": 50.0, "corrupted_top1": 35.0}


def test_sets_that_are_not_corrupted_keep_their_top1():
    assert dict(scores({"imagenet_a": 35.9, "imagenet_v2": 70.0}, classes=1000)) == {"imagenet_a_top1": 35.9, "imagenet_v2_top1": 70.0}


def test_the_prediction_is_the_best_of_the_set_s_200_of_1000_classes():
    """The largest logit belongs to class 1, which the set does not have; each head has its own prediction."""
    labels = torch.arange(0, 1000, 5)
    first, second = torch.zeros(2, 1000), torch.zeros(2, 1000)
    first[:, 1], first[0, 5], first[1, 995], first[:, 15] = 9.0, 3.0, 2.0, 1.0
    second[:, 999], second[0, 10], second[1, 0] = 9.0, 0.1, 0.1
    predicted = predicted_labels({"finetune": lambda _: first, "linear": lambda _: second}, torch.zeros(2, 3, 4, 4), labels)
    assert predicted.tolist() == [[5, 10], [995, 0]]
