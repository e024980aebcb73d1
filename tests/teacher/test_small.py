"""The small CLIP as a released teacher: one file that describes its own model, which another recipe names by path and digest."""

import hashlib
import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from milan.core.errors import UserError
from milan.core.files import read_json
from milan.core.validation import validate
from milan.data import records
from milan.params import Params, Pretrained, Teacher
from milan.teacher import released
from milan.teacher.class_text import Wording, read_class_text
from milan.teacher.clip import Tokenizer, build_tiny, embed_classes, load_teacher, save_teacher, tiny_config
from milan.training.weights import load_weights
from stages import teacher as stage
from tests.conftest import ROOT, composed

WORDING = Wording(["red disc", "blue ring"], ["a photo of a {}", "a {}"])
CAPTIONS = ["a photo of a red disc", "a photo of a blue ring"]
EVIDENCE = ROOT / "reports/evidence/demo_teacher"


@pytest.fixture
def trained(tmp_path, tree):
    """Return the folder of a small CLIP as the stage that trains one leaves it, with its tokenizer and model."""
    params = validate(Params, tree, "params.yaml")
    tokenizer = Tokenizer.of_corpus(CAPTIONS, 20)
    torch.manual_seed(3)
    model = build_tiny(params.teacher.tiny, 48, 8, len(tokenizer)).eval().requires_grad_(False)
    save_teacher(tmp_path / "trained", model, tiny_config(params.teacher.tiny, params.model, tokenizer.ids.tolist(), "small"))
    return tmp_path / "trained", model, tokenizer


def given(path, digest: str | None = None) -> Pretrained:
    return Pretrained("milan", None, None, str(path), digest or hashlib.sha256(path.read_bytes()).hexdigest())


def test_one_file_makes_the_whole_teacher_again(trained, tmp_path):
    folder, model, tokenizer = trained
    (tmp_path / "alone.safetensors").write_bytes((folder / "teacher.safetensors").read_bytes())
    released.fetch_teacher(given(tmp_path / "alone.safetensors"), tmp_path / "fetched", WORDING)
    for file in ("teacher.safetensors", "teacher.json"):
        assert (tmp_path / "fetched" / file).read_bytes() == (folder / file).read_bytes()
    text = read_class_text(tmp_path / "fetched")
    assert text.names == WORDING.names
    torch.testing.assert_close(text.embeddings, embed_classes(model, tokenizer, WORDING))
    again, its_tokenizer, _ = load_teacher(tmp_path / "fetched")
    assert torch.equal(again.encode_text(its_tokenizer(CAPTIONS)), model.encode_text(tokenizer(CAPTIONS)))


def test_another_digest_is_refused(trained, tmp_path):
    path = trained[0] / "teacher.safetensors"
    with pytest.raises(UserError, match=r"has SHA-256 [0-9a-f]{64}, the recipe \(teacher\.pretrained\.sha256\) says abab"):
        released.fetch_teacher(given(path, "ab" * 32), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_file_that_describes_no_small_clip_is_refused(trained, tmp_path):
    weights = load_weights(trained[0] / "teacher.safetensors")
    for name, metadata in {"bare": None, "other": {"milan": json.dumps({"variant": "milan"})}}.items():
        save_file(weights, tmp_path / f"{name}.safetensors", metadata)
        with pytest.raises(UserError, match="digest|describes no small CLIP"):
            released.fetch_teacher(given(tmp_path / f"{name}.safetensors"), tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("world, data, said", [("large", None, "the large built-in world"), ("small", "/own", "the images of /own")])
def test_a_teacher_of_other_drawings_is_refused(world, data, said, trained, tmp_path, tree):
    tree["teacher"] |= {"tiny": None, "pretrained": vars(given(trained[0] / "teacher.safetensors"))}
    tree["prepare_imagenet"]["world"], tree["data"]["imagenet"] = world, data
    records.write_manifest(tmp_path / "records", splits={}, wnids=["n1"], classes=["disc"])
    with pytest.raises(UserError, match=f"a teacher of the small built-in world and knows nothing of {said}.*scale=demo_teacher"):
        stage.fetch(validate(Params, tree, "params.yaml"), tmp_path / "records", tmp_path / "fetched")


def test_the_demo_s_teacher_is_the_one_that_its_recipe_trained():
    demo, trained = composed("demo")["teacher"], validate(Params, composed("demo_teacher"), "demo_teacher").teacher
    path = ROOT / demo["pretrained"]["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == demo["pretrained"]["sha256"]
    config = released.load_small(path)[1]
    assert config["tiny"] == vars(trained.tiny) and config["world"] == composed("demo")["prepare_imagenet"]["world"]
    recipe = yaml.safe_load((EVIDENCE / "params.yaml").read_text())
    assert validate(Teacher, recipe["teacher"], "teacher") == trained
    assert read_json(EVIDENCE / "teacher.json")["teacher/zero_shot_top1"] == 97.35
