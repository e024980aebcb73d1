"""Weights: equal bytes for equal values, every flipped byte detected, keys that do not fit named."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from milan.core.errors import UserError
from milan.training.weights import load_into, load_weights, save_weights


def test_weights_of_another_recipe_are_refused_and_named(tmp_path):
    save_weights(tmp_path / "w", torch.nn.Linear(2, 3).state_dict())
    fitting = torch.nn.Linear(2, 3)
    load_into(fitting, tmp_path / "w")
    assert fitting.weight.tolist() == load_file(tmp_path / "w")["weight"].tolist()
    with pytest.raises(UserError, match=r"w does not fit the model. misshapen: weight is \[3, 2\], not \[4, 2\], bias .*made by another recipe.*dvc repro"):
        load_into(torch.nn.Linear(2, 4), tmp_path / "w")


def test_equal_weights_give_equal_bytes_and_metadata_is_kept(tmp_path):
    one, two = torch.arange(6.0).view(2, 3), torch.ones(2)
    save_weights(tmp_path / "a", {"x": one, "y": two}, made="f", seed=3)
    save_weights(tmp_path / "b", {"y": two.clone(), "x": one.T.contiguous().T}, seed=3, made="f")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "b", "pt") as file:
        (about,) = map(json.loads, file.metadata().values())
        assert about.pop("sha256") == hashlib.sha256(
            b"x torch.float32 [2, 3] " + struct.pack("<6f", *range(6)) + b"y torch.float32 [2] " + struct.pack("<2f", 1, 1)
        ).hexdigest()
        assert list(file.metadata()) == ["milan"] and about == {"made": "f", "seed": 3}
        assert file.get_tensor("x").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_not_written(tmp_path, number):
    weights = {"good": torch.ones(3), "bad": torch.tensor([1, number]), "worse": torch.full((2,), number).half(), "n": torch.tensor(3)}
    with pytest.raises(UserError, match="w is not written, since not all its numbers are finite: bad, worse"):
        save_weights(tmp_path / "w", weights)
    assert list(tmp_path.iterdir()) == []


def test_any_flipped_byte_of_weights_is_found_and_the_file_named(tmp_path):
    path, weights = tmp_path / "w.safetensors", {"x": torch.arange(6.0).view(2, 3), "n": torch.tensor(3), "b": torch.tensor([True])}
    save_weights(path, weights, seed=3)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            loaded = load_weights(path)
            assert loaded.keys() == weights.keys() and all(loaded[name].equal(weights[name]) for name in weights)
            # Undetected: only whitespace, and the description, which is not part of the digest.
            assert whole[place : place + 1] in b"seed3" or not whole[place : place + 1].strip()
        except UserError as error:
            assert str(path) in str(error) and "is damaged" in str(error)
    path.write_bytes(whole)
    assert load_weights(path)["n"] == 3
