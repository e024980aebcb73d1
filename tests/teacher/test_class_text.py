"""Class texts: names and prompts for each set of classes, and their embeddings by a released text tower."""

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
WORDING = Wording(["tench", "red kite"], ["a photo of a {}.", "art of the {}."])


def test_imagenet_classes_get_openai_names_in_the_order_of_wordnet_ids():
    wnids = layouts.WNIDS  # n01440764, n01443537, n02099601
    wording = wording_of({"wnids": wnids, "classes": wnids})
    assert wording.names == layouts.IMAGENET_NAMES  # classes 0, 1 and 207
    assert len(wording.prompts) == 80 and wording.prompts[0] == "a bad photo of a {}."
    backwards = wording_of({"wnids": wnids[::-1], "classes": layouts.WORDS[::-1]})
    assert backwards.names == layouts.IMAGENET_NAMES[::-1]


def test_other_classes_keep_their_own_names():
    wording = wording_of({"wnids": ["fire_truck", "n01440764"], "classes": ["fire_truck", "n01440764"]})
    assert wording.names == ["fire truck", "n01440764"] and len(wording.prompts) == 7
    assert "a photo of the large {}." in wording.prompts
    assert wording_of({"wnids": ["x1", "x2"], "classes": ["cat", "dog"]}).names == ["cat", "dog"]


def test_images_without_labels_have_no_wording():
    assert wording_of({"wnids": [], "classes": []}) is None


def test_class_texts_come_back_and_a_damaged_file_is_named(tmp_path):
    assert read_class_text(tmp_path) is None
    save_class_text(tmp_path, WORDING, torch.eye(2, 5))
    class_text = read_class_text(tmp_path)
    assert class_text.names == ["tench", "red kite"] and class_text.embeddings.equal(torch.eye(2, 5))
    assert json.loads((tmp_path / "class_text.json").read_text())["prompts"] == WORDING.prompts
    (tmp_path / "class_text.json").write_text("{}")
    with pytest.raises(UserError, match=r"class_text\.json is damaged"):
        read_class_text(tmp_path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> CLIP:
    path = tmp_path_factory.mktemp("config") / f"{NAME}.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    return CLIP(**CONFIG).eval()


def fetch(state: dict, folder, wording: Wording | None = WORDING):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "given.safetensors")
    released.fetch_teacher(
        Pretrained("open_clip", NAME, None, str(folder / "given.safetensors"), None), folder / "teacher", wording
    )
    return folder / "teacher"


def test_a_released_text_tower_embeds_the_classes_and_is_not_kept(clip, tmp_path):
    """Row k is the unit mean of the unit features that open_clip's own model gives for name k in the prompts."""
    folder = fetch(clip.state_dict(), tmp_path)
    assert all(name.startswith("visual.") for name in load_file(folder / "teacher.safetensors"))
    class_text = read_class_text(folder)
    assert class_text.names == WORDING.names
    for row, texts in zip(
        class_text.embeddings,
        (["a photo of a tench.", "art of the tench."], ["a photo of a red kite.", "art of the red kite."]),
        strict=True,
    ):
        with torch.no_grad():
            features = clip.encode_text(open_clip.SimpleTokenizer(context_length=30)(texts)).double().numpy()
        mean = (features / np.linalg.norm(features, axis=1, keepdims=True)).mean(axis=0)
        assert row.tolist() == pytest.approx((mean / np.linalg.norm(mean)).tolist(), abs=1e-5)


def test_the_context_holds_the_longest_text_within_the_tower_s_own():
    """The longest has nine tokens: begin, a, photo, of, a, red, kite, full stop, end."""
    assert 9 <= released.longest_text(WORDING, 77) <= 14 and released.longest_text(WORDING, 6) == 6


def test_a_text_tower_of_another_kind_is_not_used(clip, tmp_path, monkeypatch, capsys):
    other = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "no_causal_mask": True}}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: other)
    assert read_class_text(fetch(clip.state_dict(), tmp_path)) is None
    assert "has no text tower of OpenAI's kind" in capsys.readouterr().out


def broken(state: dict, fault: str) -> dict:
    """Return a CLIP's weights with one of the faults of MESSAGES."""
    if fault == "no text tower":
        return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    if fault == "a missing key":
        return {name: tensor for name, tensor in state.items() if name != "ln_final.bias"}
    if fault == "another vocabulary":
        return {**state, "token_embedding.weight": torch.zeros(20, 16)}
    if fault == "positions of no shape":
        return {**state, "positional_embedding": torch.zeros(())}
    if fault == "embedding of no shape":
        return {**state, "token_embedding.weight": torch.zeros(())}
    return {**state, "ln_final.bias": torch.full((16,), float("nan"))}


MESSAGES = {
    "no text tower": "has no text tower of OpenAI's kind",
    "a missing key": "missing: ln_final.bias",
    "another vocabulary": "has no text tower of OpenAI's kind",
    "positions of no shape": "misshapen: positional_embedding is []",
    "embedding of no shape": "has no text tower of OpenAI's kind",
    "no finite numbers": "ln_final.bias holds values that are no finite numbers",
}


@pytest.mark.parametrize("fault", MESSAGES)
def test_a_teacher_needs_no_text_tower(clip, tmp_path, fault, capsys):
    folder = fetch(broken(clip.state_dict(), fault), tmp_path)
    assert (folder / "teacher.safetensors").exists() and not (folder / FILE).exists() and read_class_text(folder) is None
    output = capsys.readouterr().out
    assert "No zero-shot accuracies and no text heat maps with this teacher: " in output and MESSAGES[fault] in output


def test_without_labels_there_are_no_class_texts_and_no_message(clip, tmp_path, capsys):
    assert not (fetch(clip.state_dict(), tmp_path, None) / FILE).exists()
    assert "zero-shot" not in capsys.readouterr().out
