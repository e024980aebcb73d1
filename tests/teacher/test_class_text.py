"""The texts of the classes: whose names are asked in which words, and what a released text tower makes of them."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file

from milan.core.errors import UserError
from milan.params import Pretrained
from milan.teacher import released
from milan.teacher.class_text import FILE, Wording, read_class_text, save_class_text
from milan.teacher.wording import wording_of
from tests import layouts

NAME = "ViT-golden-text"
CONFIG = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 30, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
ASKED = Wording(["tench", "red kite"], ["a photo of a {}.", "art of the {}."])


def test_imagenet_s_classes_are_asked_by_openai_s_names_in_the_order_of_wordnet_ids():
    wnids = layouts.WNIDS  # n01440764, n01443537, n02099601
    found = wording_of({"wnids": wnids, "classes": wnids})
    assert found.names == layouts.IMAGENET_NAMES  # places 0, 1 and 207
    assert len(found.prompts) == 80 and found.prompts[0] == "a bad photo of a {}."
    backwards = wording_of({"wnids": wnids[::-1], "classes": layouts.WORDS[::-1]})
    assert backwards.names == layouts.IMAGENET_NAMES[::-1]


def test_other_classes_are_asked_by_their_own_names():
    found = wording_of({"wnids": ["fire_truck", "n01440764"], "classes": ["fire_truck", "n01440764"]})
    assert found.names == ["fire truck", "n01440764"] and len(found.prompts) == 7
    assert "a photo of the large {}." in found.prompts
    assert wording_of({"wnids": ["x1", "x2"], "classes": ["cat", "dog"]}).names == ["cat", "dog"]


def test_images_without_labels_are_asked_nothing():
    assert wording_of({"wnids": [], "classes": []}) is None


def test_what_was_asked_is_kept_and_what_is_damaged_is_named(tmp_path):
    assert read_class_text(tmp_path) is None
    save_class_text(tmp_path, ASKED, torch.eye(2, 5))
    found = read_class_text(tmp_path)
    assert found.names == ["tench", "red kite"] and found.embeddings.equal(torch.eye(2, 5))
    assert json.loads((tmp_path / "class_text.json").read_text())["prompts"] == ASKED.prompts
    (tmp_path / "class_text.json").write_text("{}")
    with pytest.raises(UserError, match=r"class_text\.json is damaged"):
        read_class_text(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> CLIP:
    path = tmp_path_factory.mktemp("config") / f"{NAME}.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    return CLIP(**CONFIG).eval()


def fetched(state: dict, folder, wording: Wording | None = ASKED):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "given.safetensors")
    released.fetch_teacher(
        Pretrained("open_clip", NAME, None, str(folder / "given.safetensors"), None), folder / "teacher", wording
    )
    return folder / "teacher"


def test_a_released_text_tower_is_asked_before_it_is_dropped(whole, tmp_path):
    """Row k is the unit mean of the unit features, by open_clip's own model, of name k in the prompts."""
    folder = fetched(whole.state_dict(), tmp_path)
    assert all(name.startswith("visual.") for name in load_file(folder / "teacher.safetensors"))
    found = read_class_text(folder)
    assert found.names == ASKED.names
    for row, texts in zip(
        found.embeddings,
        (["a photo of a tench.", "art of the tench."], ["a photo of a red kite.", "art of the red kite."]),
        strict=True,
    ):
        with torch.no_grad():
            features = whole.encode_text(open_clip.SimpleTokenizer(context_length=30)(texts)).double().numpy()
        mean = (features / np.linalg.norm(features, axis=1, keepdims=True)).mean(axis=0)
        assert row.tolist() == pytest.approx((mean / np.linalg.norm(mean)).tolist(), abs=1e-5)


def test_the_context_holds_the_longest_text_and_never_more_than_the_tower_s():
    """Begin, a, photo, of, a, red, kite, full stop, end."""
    assert 9 <= released.longest(ASKED, 77) <= 14 and released.longest(ASKED, 6) == 6


def test_a_text_tower_of_another_kind_is_not_asked(whole, tmp_path, monkeypatch, capsys):
    other = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "no_causal_mask": True}}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: other)
    assert read_class_text(fetched(whole.state_dict(), tmp_path)) is None
    assert "has no text tower of OpenAI's kind" in capsys.readouterr().out


def broken(state: dict, lacking: str) -> dict:
    if lacking == "all":
        return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    if lacking == "one":
        return {name: tensor for name, tensor in state.items() if name != "ln_final.bias"}
    if lacking == "other words":
        return {**state, "token_embedding.weight": torch.zeros(20, 16)}
    if lacking == "a place":
        return {**state, "positional_embedding": torch.zeros(())}
    if lacking == "a table":
        return {**state, "token_embedding.weight": torch.zeros(())}
    return {**state, "ln_final.bias": torch.full((16,), float("nan"))}


SAID = {
    "all": "has no text tower of OpenAI's kind",
    "one": "missing: ln_final.bias",
    "other words": "has no text tower of OpenAI's kind",
    "a place": "misshapen: positional_embedding is []",
    "a table": "has no text tower of OpenAI's kind",
    "sense": "ln_final.bias holds values that are no finite numbers",
}


@pytest.mark.parametrize("lacking", SAID)
def test_an_image_tower_is_all_that_a_teacher_needs(whole, tmp_path, lacking, capsys):
    folder = fetched(broken(whole.state_dict(), lacking), tmp_path)
    assert (folder / "teacher.safetensors").exists() and not (folder / FILE).exists() and read_class_text(folder) is None
    said = capsys.readouterr().out
    assert "No zero-shot accuracies and no text heat maps with this teacher: " in said and SAID[lacking] in said


def test_without_labels_no_text_is_asked_for_and_nothing_is_said(whole, tmp_path, capsys):
    assert not (fetched(whole.state_dict(), tmp_path, None) / FILE).exists()
    assert "zero-shot" not in capsys.readouterr().out
