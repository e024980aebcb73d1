"""The built-in world: bytes are reproducible; labels, captions and masks are true; folders are written whole or not at all."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from milan.core.errors import UserError
from milan.ingest.world import drawing, writing
from milan.params import PrepareAde20k, PrepareImagenet
from tests.conftest import ROOT

SIZE = 48


@pytest.fixture(scope="module")
def scenes() -> list[drawing.Scene]:
    return [drawing.object_scene(drawing.SMALL, 3, "test", i, SIZE) for i in range(1200)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_scene_is_a_function_of_seed_purpose_and_index(scenes):
    again = drawing.object_scene(drawing.SMALL, 3, "test", 41, SIZE)
    assert np.array_equal(again.image, scenes[41].image) and np.array_equal(again.mask, scenes[41].mask)
    assert again.caption == scenes[41].caption
    assert len({scene.image.tobytes() for scene in scenes}) == len(scenes)
    for other in ((4, "test", 41), (3, "val", 41), (3, "test", 61)):
        assert not np.array_equal(drawing.object_scene(drawing.SMALL, *other, SIZE).image, again.image)
    first, second = drawing.stuff_scene(drawing.SMALL, 3, "test", 7, SIZE), drawing.stuff_scene(drawing.SMALL, 3, "test", 7, SIZE)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_classes_are_exactly_balanced_and_in_the_order_of_their_wnids(scenes):
    for world, classes in ((drawing.SMALL, 20), (drawing.LARGE, 48)):
        assert len(set(world.classes)) == classes and list(world.wnids) == sorted(set(world.wnids))
    assert set(Counter(scene.label for scene in scenes).values()) == {1200 // 20}


def test_a_recipe_can_name_every_world():
    for section in (PrepareImagenet, PrepareAde20k):
        assert get_args(get_type_hints(section)["world"]) == tuple(drawing.WORLDS)


def test_the_large_world_contains_the_small_one():
    assert set(drawing.SMALL.classes) < set(drawing.LARGE.classes)
    assert drawing.LARGE.scene_classes[: len(drawing.SMALL.scene_classes)] == drawing.SMALL.scene_classes
    assert set(drawing.LARGE.shapes) == set(drawing._INSIDE) and set(drawing.LARGE.fills) == set(drawing._DARK)
    scene = drawing.object_scene(drawing.LARGE, 3, "test", 48 + 31, SIZE)
    assert scene.label == 31 and drawing.LARGE.classes[31] == "dotted star" and "dotted star" in scene.caption
    values = {int(value) for i in range(60) for value in np.unique(drawing.stuff_scene(drawing.LARGE, 2, "test", i, SIZE)[1])}
    assert values == set(range(15))


def test_a_star_ends_at_its_corners():
    tip, notch = 1.0, 0.5
    for corner in range(10):
        radius, angle = (notch if corner % 2 else tip), corner * np.pi / 5
        point = np.array([np.sin(angle), -np.cos(angle)])  # the first tip is up, and y points down
        assert drawing._in_star(*(0.98 * radius * point), tip, notch) and not drawing._in_star(*(1.02 * radius * point), tip, notch)
    middle = (np.array([0, -tip]) + notch * np.array([np.sin(np.pi / 5), -np.cos(np.pi / 5)])) / 2  # of an edge
    assert drawing._in_star(*(0.98 * middle), tip, notch) and not drawing._in_star(*(1.02 * middle), tip, notch)


def test_every_caption_names_its_class_in_few_words(scenes):
    vocabulary = {word for scene in scenes for word in scene.caption.split()}
    for scene in scenes:
        words = scene.caption.split()
        assert drawing.SMALL.classes[scene.label] == " ".join(w for w in words if w in drawing.SMALL.fills + drawing.SMALL.shapes)
        assert len(words) <= 14  # + start and end: a context of 16
    assert 35 <= len(vocabulary) <= 55
    prompted = {word for prompt in drawing.PROMPTS for name in drawing.SMALL.classes for word in prompt.format(name).split()}
    assert prompted <= vocabulary, "a prompt uses a word that the text tower never learns"
    large = {word for i in range(480) for word in drawing.object_scene(drawing.LARGE, 3, "test", i, 16).caption.split()}
    assert large == vocabulary | {"star", "crescent", "arrow", "pinstriped", "gridded"}


def test_captions_give_the_true_colour_size_and_texture(scenes, monkeypatch):
    names, colours = list(drawing.COLOURS), np.array(list(drawing.COLOURS.values()))
    colours /= np.linalg.norm(colours, axis=1, keepdims=True)  # direction only: the exposure varies
    right, areas = [], {"small": [], "large": []}
    for scene in scenes:
        words = set(scene.caption.split())
        colour, size = words & set(names), words & set(areas)
        if colour and "plain" in words:
            right.append(names[np.argmax(colours @ np.median(scene.image[scene.mask], axis=0))] in colour)
        if size:
            areas[size.pop()].append(scene.mask.mean())
    assert len(right) > 100 and np.mean(right) > 0.95
    assert np.mean(areas["large"]) > 1.3 * np.mean(areas["small"])
    drawn = []
    fields = {name: lambda _, size, name=name: drawn.append(name) or np.zeros((size, size)) for name in drawing.TEXTURES}
    monkeypatch.setattr(drawing, "_FIELDS", fields)
    for i in range(60):
        words = set(drawing.object_scene(drawing.SMALL, 3, "test", i, SIZE).caption.split())
        assert words & set(drawing.TEXTURES) <= {drawn[-1]}


@pytest.mark.parametrize("world", drawing.WORLDS)
def test_the_mask_is_exactly_what_the_object_changes(world, monkeypatch):
    scenes = [drawing.object_scene(drawing.WORLDS[world], 3, "test", i, SIZE) for i in range(200)]
    monkeypatch.setattr(drawing, "_blend", lambda below, above, coverage: below)
    changed = []
    for i, scene in enumerate(scenes):
        without = drawing.object_scene(drawing.WORLDS[world], 3, "test", i, SIZE).image
        difference = (without != scene.image).any(-1)
        assert not difference[~scene.mask].any()
        changed.append(difference[scene.mask].mean())
    assert np.mean(changed) > 0.99


@pytest.mark.parametrize(("world", "size"), [("small", 32), ("small", 48), ("small", 128), ("large", 48)])
def test_objects_take_about_a_seventh_of_the_image(world, size):
    drawn = drawing.WORLDS[world]
    shares = np.array([drawing.object_scene(drawn, 1, "area", i, size).mask.mean() for i in range(10 * len(drawn.classes))])
    assert 0.12 < shares.mean() < 0.18 and shares.min() > 0.04 and shares.max() < 0.32
    by_shape = shares.reshape(10, len(drawn.shapes), len(drawn.fills)).mean((0, 2))
    assert by_shape.min() > 0.08 and by_shape.max() < 0.22


def test_mean_colour_does_not_reveal_the_class(scenes):
    means = np.array([scene.image.mean((0, 1)) for scene in scenes])
    labels = np.array([scene.label for scene in scenes])
    centres = np.array([means[:800][labels[:800] == k].mean(0) for k in range(20)])
    nearest = ((means[800:, None] - centres) ** 2).sum(-1).argmin(1)
    assert np.mean(nearest == labels[800:]) < 0.11  # chance is 0.05


def test_annotations_use_every_class_and_leave_a_little_unlabelled():
    counts = sum(np.bincount(drawing.stuff_scene(drawing.SMALL, 2, "test", i, SIZE)[1].ravel(), minlength=12) for i in range(200))
    assert len(counts) == 12 == len(drawing.SMALL.scene_classes) + 1
    assert 0.03 < counts[0] / counts.sum() < 0.12
    assert (counts[1:] > 0.015 * counts.sum()).all()


def test_annotations_match_the_painted_regions(monkeypatch):
    """Sentinel: each region is painted in its own number, so every labelled pixel must show its label, unmixed."""
    painted, coverage = [], drawing._coverage
    number = {name: np.float32(k) for k, name in enumerate(drawing.SMALL.scene_classes, 1)}
    monkeypatch.setattr(drawing, "_coverage", lambda rng, shape, *a: painted.append(shape) or coverage(rng, shape, *a))
    monkeypatch.setattr(drawing, "_background", lambda rng, name, size: np.full((size, size, 3), number[name]))
    monkeypatch.setattr(drawing, "_pattern", lambda *_: number[painted[-1]])
    monkeypatch.setattr(drawing, "_photograph", lambda rng, canvas: canvas)
    for i in range(100):
        canvas, annotation = drawing.stuff_scene(drawing.SMALL, 2, "test", i, SIZE)
        assert np.array_equal(canvas[annotation > 0], np.repeat(annotation[annotation > 0][:, None], 3, 1))


def test_imagenet_is_the_same_bytes_for_one_process_and_two(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "CHUNK", 7)
    seen = {1: [], 2: []}
    for processes in (1, 2):
        writing.write_imagenet(tmp_path / str(processes), drawing.SMALL, 5, SIZE, train=60, val=20, pairs=25,
                             progress=seen[processes].append, processes=processes, objects=8)
    one = files(tmp_path / "1")
    assert one == files(tmp_path / "2")
    assert seen[1] == seen[2] == sorted(seen[1]) and seen[1][-1] == 105
    assert len(one) == 60 + 20 + 25 + 8 + 2


def test_imagenet_layout_holds_the_right_scenes(tmp_path):
    writing.write_imagenet(tmp_path, drawing.SMALL, 5, SIZE, train=40, val=20, pairs=20, objects=4)  # an empty folder is accepted
    assert json.loads((tmp_path / "classes.json").read_text()) == dict(zip(drawing.SMALL.wnids, drawing.SMALL.classes, strict=True))
    for split, each in (("train", 2), ("val", 1)):
        images = {path.name: len(list(path.iterdir())) for path in (tmp_path / split).iterdir()}
        assert images == dict.fromkeys(drawing.SMALL.wnids, each)
    wnid = drawing.SMALL.wnids[3]
    for purpose, index, path in (("train", 23, f"train/{wnid}/{wnid}_23.JPEG"), ("pairs", 3, "pairs/00000004.JPEG"),
                                 ("val", 3, f"val/{wnid}/ILSVRC2012_val_00000004.JPEG")):
        scene, image = drawing.object_scene(drawing.SMALL, 5, purpose, index, SIZE), Image.open(tmp_path / path)
        assert image.format == "JPEG" and image.mode == "RGB"
        error = np.abs(np.asarray(image).astype(int) - scene.image)
        assert error.mean() < 4 and error.max() < 30  # 10 and 100 if colour were subsampled
    rows = list(csv.DictReader((tmp_path / "pairs/captions.csv").read_text().splitlines()))
    assert rows[3] == {"file": "00000004.JPEG", "caption": drawing.object_scene(drawing.SMALL, 5, "pairs", 3, SIZE).caption}
    assert [row["file"] for row in rows] == sorted(path.name for path in (tmp_path / "pairs").glob("*.JPEG"))
    mask = np.asarray(Image.open(tmp_path / "val_objects/ILSVRC2012_val_00000004.png"))
    assert np.array_equal(mask, drawing.object_scene(drawing.SMALL, 5, "val", 3, SIZE).mask * 255)


def test_ade20k_layout_and_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "CHUNK", 3)
    for processes in (1, 2):
        writing.write_ade20k(tmp_path / str(processes), drawing.SMALL, 5, SIZE, train=8, val=5, processes=processes)
    one = files(tmp_path / "1")
    assert one == files(tmp_path / "2") and len(one) == 2 * (8 + 5) + 1
    image, annotation = drawing.stuff_scene(drawing.SMALL, 5, "validation", 4, SIZE)
    stored = Image.open(tmp_path / "1/annotations/validation/ADE_val_00000005.png")
    assert stored.mode == "L" and np.array_equal(np.asarray(stored), annotation)
    decoded = np.asarray(Image.open(tmp_path / "1/images/validation/ADE_val_00000005.jpg")).astype(int)
    assert np.abs(decoded - image).mean() < 4
    lines = (tmp_path / "1/objectInfo.txt").read_text().splitlines()
    assert lines[0] == "Idx\tName" and lines[1] == "1\tmossy" and lines[11] == "11\tsquare" and len(lines) == 12


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(writing, "CHUNK", 5)

    def fail(done: int) -> None:
        assert (tmp_path / "set.partial").exists()
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writing.write_imagenet(tmp_path / "set", drawing.SMALL, 5, SIZE, train=40, val=20, pairs=0, progress=fail, processes=processes)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_no_set_and_does_not_hinder_the_next(tmp_path):
    code = "import os, sys; from milan.ingest.world import drawing, writing; writing.write_ade20k(sys.argv[1], drawing.SMALL, 5, 48, 9, 2, lambda done: os._exit(9))"
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "set"], cwd=ROOT)
    assert killed.returncode == 9 and not (tmp_path / "set").exists()
    writing.write_ade20k(tmp_path / "set", drawing.SMALL, 5, SIZE, train=2, val=2)
    assert [path.name for path in tmp_path.iterdir()] == ["set"] and len(files(tmp_path / "set")) == 9


def test_a_folder_that_holds_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="already holds files"):
        writing.write_imagenet(tmp_path, drawing.SMALL, 5, SIZE, train=20, val=0, pairs=0)
    assert files(tmp_path) == {"mine.txt": b"precious"}


def test_a_fresh_interpreter_draws_the_same_and_starts_without_the_heavy_libraries():
    code = ("import sys, milan.ingest.world.drawing as w; print(w.object_scene(w.SMALL, 3, 'test', 41, 48).image.sum((0, 1)).tolist(), "
            "[name for name in ('torch', 'torchvision', 'mlflow') if name in sys.modules])")
    for hash_seed in "12":  # Python's own hash of a string differs between these two
        printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                              capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed}).stdout
        assert printed == f"{drawing.object_scene(drawing.SMALL, 3, 'test', 41, SIZE).image.sum((0, 1)).tolist()} []\n"
