"""The small CLIP as a released teacher: one file that describes its own model, which another recipe names by path and digest."""

import hashlib
import json
import time
from argparse import Namespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from milan.core.errors import UserError
from milan.core.files import read_json
from milan.core.validation import validate
from milan.params import Params, Pretrained, Teacher
from milan.stage import Stage, refuse_what_is_not_there
from milan.teacher import released
from milan.teacher.class_text import Wording, read_class_text
from milan.teacher.clip import Tokenizer, build_tiny, embed_classes, load_teacher, read_config, save_teacher, tiny_config
from milan.training.weights import load_weights, weights_digest
from tests.conftest import ROOT, change, composed

WORDING = Wording(["red disc", "blue ring"], ["a photo of a {}", "a {}"])
CAPTIONS = ["a photo of a red disc", "a photo of a blue ring"]
EVIDENCE = ROOT / "reports/evidence/demo_teacher"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, trained_teacher_tree):
    """Return the folder of a small CLIP as the stage that trains one leaves it, with its tokenizer and model."""
    params, folder = validate(Params, trained_teacher_tree, "params.yaml"), tmp_path_factory.mktemp("teacher")
    tokenizer = Tokenizer.of_corpus(CAPTIONS, 20)
    torch.manual_seed(3)
    model = build_tiny(params.teacher.tiny, 48, 8, len(tokenizer)).eval().requires_grad_(False)
    save_teacher(folder, model, tiny_config(params.teacher.tiny, params.model, tokenizer.ids.tolist(), "small"))
    return folder, model, tokenizer


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


def described(path, config: dict, weights: dict | None = None) -> str:
    """Write a small CLIP's file with another description, whose tensors are whole; return its path."""
    weights = weights or load_weights(path)
    about = {"teacher": config, "sha256": weights_digest(weights)}
    save_file(weights, other := path.with_name("other.safetensors"), {"milan": json.dumps(about)})
    return str(other)


@pytest.mark.parametrize("taught, world, data, said", [
    ("small", "small", None, None),
    (None, "large", None, None),
    (None, "small", "/own", None),
    ("small", "large", None, "the large built-in world"),
    ("small", "small", "/own", "the images of /own"),
])  # fmt: skip
def test_a_teacher_of_other_drawings_is_refused_by_the_first_stage(taught, world, data, said, trained, tree, monkeypatch):
    """A file without a digest, and no tensor of it is read."""
    monkeypatch.chdir(ROOT)
    file = described(trained[0] / "teacher.safetensors", {**read_config(trained[0]), "world": taught})
    tree["teacher"] |= {"tiny": None, "pretrained": vars(Pretrained("milan", None, None, file, None))}
    tree["prepare_imagenet"]["world"], tree["data"]["imagenet"] = world, data

    def first_stage() -> None:
        refuse_what_is_not_there(Stage("prepare_imagenet", Namespace(), validate(Params, tree, "params.yaml")))

    if said is None:
        return first_stage()
    with pytest.raises(UserError, match=f"a teacher of the small built-in world and knows nothing of {said}.*scale=demo_teacher"):
        first_stage()
    tree["pretrain"]["weights"] = file  # a released student is only evaluated, without a teacher
    first_stage()


MEND = r"Fetch or copy it again \(`git checkout -- \S+other.safetensors` restores a file that git keeps\)\.$"


@pytest.mark.parametrize("key, value, said", [
    ("image_size", "a word", "image_size: 'a word' is no number"),
    ("image_size", 10**400, "image_size: a whole number of 1329 bits"),
    ("image_size", 10**9, "image_size: 1000000000 must be at most 65536"),
    ("image_size", 50, "image_size 50 is no multiple of patch_size 8"),
    ("image_size", 96, r"misshapen: visual.positional_embedding is \[37, 128\], not \[145, 128\]"),
    ("patch_size", 0, "patch_size: 0 must be above 0"),
    ("token_ids", None, "token_ids: expected list, found None"),
    ("token_ids", {"0": 1}, "token_ids: expected list"),
    ("token_ids", [], "token_ids: an empty list"),
    ("token_ids", [0, "x"], r"token_ids\[1\]: 'x' is no number"),
    ("token_ids", [0, 49408], r"token_ids\[1\]: 49408 must be below 49408"),
    ("token_ids", [5, 0], "token_ids: .* must not fall"),
    ("token_ids", [0, 1], r"misshapen: token_embedding.weight is \[\d+, 96\], not \[2, 96\]"),
    ("world", "mars", "world: 'mars' is not one of small, large"),
    ("more", 1, "unknown key 'more'"),
    ("tiny", [1], "tiny: expected a section"),
    ("tiny.layers", 60_000, "3 blocks in visual.transformer, not 60000"),
    ("tiny.text_layers", 60_000, "1 blocks in transformer, not 60000"),
    ("tiny.width", 65_504, "misshapen: .*65504"),
    ("tiny.width", 100, "width 100 is no multiple of head_width 32"),
    ("tiny.context_length", 60_000, r"positional_embedding is \[20, 96\], not \[60000, 96\]"),
    ("tiny.conv_stem", False, "missing: visual.conv1.weight; unexpected: visual.conv1.0.weight"),
], ids=lambda value: str(value)[:20])  # fmt: skip
def test_a_description_that_makes_no_teacher_is_refused_before_anything_is_built(key, value, said, trained, monkeypatch):
    """The file is named, its fault, and what to do about it; never DVC's cache, which does not hold it."""
    change(config := read_config(trained[0]), key, value)
    source = Pretrained("milan", None, None, described(trained[0] / "teacher.safetensors", config), None)
    monkeypatch.setattr(released, "build_towers", lambda *_: pytest.fail("it was built"))
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"^{source.file} is damaged: its header describes (no|another) teacher.*{said}.*{MEND}"):
        released.fetch_teacher(source, trained[0] / "never")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("damage, said", [
    (lambda data: data[:100], "it cannot be read"),
    (lambda data: b"", "it cannot be read"),
    (lambda data: b"\xff" * 8 + data[8:], "it cannot be read"),
    (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "the digest is not"),
    (lambda data: data.replace(rb"{\"sha256", rb"[\"sha256", 1), "it cannot be read"),
    (lambda data: b"no weights at all, but a text", "it cannot be read"),
])  # fmt: skip
def test_a_damaged_file_without_a_digest_is_named_with_its_mend(damage, said, trained):
    path = trained[0] / "teacher.safetensors"
    other = trained[0] / "other.safetensors"
    other.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"^{other} is damaged: {said}.*{MEND}"):
        released.fetch_teacher(Pretrained("milan", None, None, str(other), None), trained[0] / "never")


def test_weights_that_are_no_numbers_are_refused(trained):
    path = trained[0] / "teacher.safetensors"
    weights = load_weights(path)
    weights["visual.proj"][0, 0] = float("nan")
    source = Pretrained("milan", None, None, described(path, read_config(trained[0]), weights), None)
    with pytest.raises(UserError, match=f"{source.file}: visual.proj holds values that are no finite numbers"):
        released.fetch_teacher(source, trained[0] / "never")


def test_the_demo_s_teacher_is_the_one_that_its_recipe_trained():
    demo, trained = composed("demo")["teacher"], validate(Params, composed("demo_teacher"), "demo_teacher").teacher
    path = ROOT / demo["pretrained"]["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == demo["pretrained"]["sha256"]
    config = released.load_small(path)[1]
    assert config["tiny"] == vars(trained.tiny) and config["world"] == composed("demo")["prepare_imagenet"]["world"]
    recipe = yaml.safe_load((EVIDENCE / "params.yaml").read_text())
    assert validate(Teacher, recipe["teacher"], "teacher") == trained
    assert read_json(EVIDENCE / "teacher.json")["teacher/zero_shot_top1"] == 97.35
