"""The monitor of pretraining on flat colours, whose class tokens, neighbours and singular values are worked out by hand."""

import io
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from milan.core.validation import validate
from milan.data.records import Records, write_manifest
from milan.evaluation import monitor
from milan.params import Params
from tests.conftest import write_split
from tests.training.test_loop import launched

CPU = torch.device("cpu")
RED, GREEN = (255, 0, 0), (0, 255, 0)
IMAGES = {"train": [(RED, 0), (GREEN, 1), (RED, 0), (RED, 0), (GREEN, 1)], "val": [(RED, 0), (GREEN, 1), (GREEN, 0)]}
SHARES = [math.sqrt(3) / (math.sqrt(3) + math.sqrt(2)), math.sqrt(2) / (math.sqrt(3) + math.sqrt(2))]  # of three red, two green
RANKME = math.exp(-sum(share * math.log(share) for share in SHARES))


def flat(colour: tuple[int, int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (20, 30), colour).save(data, "PNG")
    return data.getvalue()


def write_records(labelled: bool = True) -> None:
    splits = {}
    for split, images in IMAGES.items():
        rows = [
            {"image": flat(colour), "name": f"{split}{number}", **({"label": label} if labelled else {})}
            for number, (colour, label) in enumerate(images)
        ]
        splits[split] = write_split(Path("records"), split, rows, 10)
    write_manifest(Path("records"), splits=splits, classes=["red", "green"] if labelled else [])


class MeanColour(nn.Module):
    """An encoder whose class token is the mean colour (B, 3), from 0 to 1; the other token misleads."""

    def forward(self, images: Tensor) -> Tensor:
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        colours = images.mean(dim=(2, 3)) * deviation + mean
        return torch.stack([colours, torch.ones_like(colours)], dim=1)


def look(params: Params) -> dict:
    return monitor.Monitor(MeanColour(), Path("records"), params, CPU)()


@pytest.fixture
def params(workplace, tree) -> Params:
    return validate(Params, tree, "params.yaml")


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_values_by_hand_for_any_number_of_processes(params, processes):
    """Of three validation images the last is green and labelled red. Four processes are more than there are of these."""
    write_records()
    values = launched(processes, look, params)
    assert values["knn_top1"] == pytest.approx(200 / 3)
    assert values["rankme"] == pytest.approx(RANKME, rel=1e-5)


def test_images_without_labels_have_a_rank_alone(params):
    write_records(labelled=False)
    assert look(params) == {"rankme": pytest.approx(RANKME, rel=1e-5)}


def test_the_images_are_a_fixed_draw(workplace, monkeypatch):
    write_records()
    monkeypatch.setattr(monitor, "IMAGES", {"train": 3, "val": 1000})
    train, val = Records("records", "train"), Records("records", "val")
    chosen = monitor.fixed_indices(train)
    assert monitor.fixed_indices(train) == chosen == sorted(set(chosen)) and len(chosen) == 3 and set(chosen) <= set(range(5))
    assert monitor.fixed_indices(val) == [0, 1, 2]
