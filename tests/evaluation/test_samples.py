"""A share of the labels: the images drawn, what is refused, and what linear evaluation does with them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from milan.core.errors import UserError
from milan.core.validation import validate
from milan.data import records, seeding
from milan.data.records import Records
from milan.evaluation.samples import balanced_subset, refuse_few_labels
from milan.params import Params
from stages import linear_eval
from tests.conftest import write_split
from tests.segmentation.test_dense import png

LABELS = [0] * 10 + [1] * 20 + [2] * 3
CPU = torch.device("cpu")


def test_the_subset_is_the_first_of_each_class_in_a_drawn_order():
    """A tenth of 10, 20 and 3 images is 1, 2 and 0.3, for which one is taken."""
    order = seeding.permutation(33, 5, "subset").tolist()
    members = [[index for index in order if LABELS[index] == label] for label in range(3)]
    assert balanced_subset(LABELS, 0.1, 5) == sorted([members[0][0], *members[1][:2], members[2][0]])
    assert balanced_subset(LABELS, 0.1, 6) != balanced_subset(LABELS, 0.1, 5)
    assert set(balanced_subset(LABELS, 0.1, 5)) < set(balanced_subset(LABELS, 0.5, 5))  # a larger share has the smaller one
    assert balanced_subset(LABELS, 1.0, 5) is None


def test_less_than_an_image_of_a_class_and_less_than_a_batch_are_refused():
    names = ["ape", "bee", "cat"]
    refuse_few_labels("linear_eval.labels", LABELS, names, 0.2, 7)  # 2, 4 and 1
    with pytest.raises(UserError, match=r"linear_eval.labels 0.1 is less than one image of 1 of 3 classes .*: cat \(3\)\. Take a"):
        refuse_few_labels("linear_eval.labels", LABELS, names, 0.1, 1)
    with pytest.raises(UserError, match=r"labels 0.2 leaves 7 of 33 training images, fewer than linear_eval.batch_size 8\."):
        refuse_few_labels("linear_eval.labels", LABELS, names, 0.2, 8)


@pytest.fixture
def few(tree, workplace) -> tuple[Params, Records, Records]:
    """A recipe with half of the labels, and 12 training and 3 validation images of one grey level each, of 3 classes."""
    tree["runtime"]["processes"] = 1
    tree["linear_eval"] |= {"labels": 0.5, "batch_size": 4, "micro_batch": 2, "views": 1}
    splits = {}
    for split, count in (("train", 12), ("val", 3)):
        rows = [
            {"image": png(np.full((48, 48, 3), 10 * i, dtype=np.uint8)), "name": f"{split}/{i}.png", "label": i % 3} for i in range(count)
        ]
        splits[split] = write_split(Path("images"), split, rows, 5)
    records.write_manifest(Path("images"), splits=splits, classes=["ape", "bee", "cat, tabby"])
    return validate(Params, tree, "p"), Records(Path("images"), "train"), Records(Path("images"), "val")


def grey_level(images: torch.Tensor) -> torch.Tensor:
    """Return the number of each image, (B, 1), from its grey level."""
    return ((images[:, :1, 0, 0] * 0.229 + 0.485) * 25.5).round()


def test_layer_and_neighbours_see_the_drawn_images_alone(few):
    params, train, val = few
    subset = balanced_subset([i % 3 for i in range(12)], 0.5, 0)
    assert linear_eval.labels_in_use(params, train) == subset and len(subset) == 6
    samples, inputs = linear_eval.training_data(params, 3, train, subset, grey_level, CPU)
    features, labels = inputs({name: torch.stack([samples[0, i][name] for i in range(6)]) for name in ("features", "label")})
    assert len(samples) == 6 and features[:, 0].tolist() == subset and labels.tolist() == [i % 3 for i in subset]
    neighbours, labels = linear_eval.central_features(params, train, grey_level, CPU, subset)
    assert neighbours[:, 0].tolist() == subset and labels.tolist() == [i % 3 for i in subset]
    assert linear_eval.central_features(params, val, grey_level, CPU)[0][:, 0].tolist() == [0, 1, 2]


def test_the_list_names_the_images(few):
    params, train, _ = few
    lines = linear_eval.listing(train, [1, 5]).decode().splitlines()
    assert lines == ["index,image,class", "1,train/1.png,bee", '5,train/5.png,"cat, tabby"']


def test_all_labels_draw_nothing(few, tree):
    tree["linear_eval"]["labels"] = 1.0
    assert linear_eval.labels_in_use(validate(Params, tree, "p"), few[1]) is None
