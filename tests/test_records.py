"""Records: what goes in comes out, byte for byte; what is broken on disk is named. Sources: every bad file is listed."""

import hashlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from milan import records, sources
from milan.errors import UserError
from milan.records import Records

ROWS = [{"image": bytes([i]) * (i + 1), "name": f"n{i}", "label": i % 3, "caption": f"picture {i}"} for i in range(11)]


def written(folder: Path, rows=ROWS, shard_images: int = 4, split: str = "train") -> Path:
    entry = records.write_split(folder, split, rows, shard_images)
    records.write_manifest(folder, splits={split: entry}, classes=["a", "b", "c"])
    return folder


@pytest.mark.parametrize("shard_images, sizes", [(4, [4, 4, 3]), (11, [11]), (100, [11]), (1, [1] * 11)])
def test_round_trip(tmp_path, shard_images, sizes):
    found = Records(written(tmp_path, shard_images=shard_images), "train")
    assert [shard["images"] for shard in found.shards] == sizes
    assert len(found) == 11
    assert [found[i] for i in range(11)] == ROWS
    assert found.column("label") == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert found.column("name") == [f"n{i}" for i in range(11)]


def test_random_access_across_shards(tmp_path):
    found = Records(written(tmp_path), "train")
    for i in (10, 0, 3, 4, 7, 8, 3):
        assert found[i] == ROWS[i]
    for beyond in (11, -1):
        with pytest.raises(IndexError, match=f"record {beyond} of 11"):
            found[beyond]


def test_more_rows_than_a_batch_of_the_file(tmp_path):
    rows = [{"image": i.to_bytes(2, "big"), "name": str(i)} for i in range(600)]
    found = Records(written(tmp_path, rows, shard_images=500), "train")
    assert [found[i]["image"] for i in (0, 255, 256, 499, 500, 599)] == [
        i.to_bytes(2, "big") for i in (0, 255, 256, 499, 500, 599)
    ]


def test_masks_where_only_some_have_one(tmp_path):
    found = Records(written(tmp_path, [{"image": b"a", "name": "x", "mask": b"m"}, {"image": b"b", "name": "y"}]), "train")
    assert found.column("mask") == [b"m", None]
    assert found[1] == {"image": b"b", "name": "y", "mask": None}


def test_the_manifest_tells_the_files_digests(tmp_path):
    written(tmp_path)
    shards = json.loads((tmp_path / "manifest.json").read_text())["splits"]["train"]["shards"]
    assert [shard["file"] for shard in shards] == ["train-00000.arrow", "train-00001.arrow", "train-00002.arrow"]
    for shard in shards:
        assert hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", *(s["file"] for s in shards)]


def test_equal_rows_give_equal_files(tmp_path):
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    assert [p.read_bytes() for p in sorted(one.iterdir())] == [p.read_bytes() for p in sorted(two.iterdir())]


def test_pandas_reads_a_shard(tmp_path):
    table = pandas.read_feather(written(tmp_path) / "train-00001.arrow")
    assert table["image"].tolist() == [row["image"] for row in ROWS[4:8]]
    assert table["label"].tolist() == [1, 2, 0, 1]
    assert table["caption"].tolist() == ["picture 4", "picture 5", "picture 6", "picture 7"]


def test_it_travels_to_a_worker(tmp_path):
    found = Records(written(tmp_path), "train")
    assert found[5] == ROWS[5]
    assert pickle.loads(pickle.dumps(found))[5] == ROWS[5]


def test_a_missing_manifest_is_said(tmp_path):
    written(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json.*dvc repro"):
        Records(tmp_path, "train")


def test_an_unknown_split_is_said_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="no split 'trian'; it has train"):
        Records(written(tmp_path), "trian")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"not arrow at all"), Path.unlink]
)
def test_a_damaged_shard_is_named_when_it_is_touched(tmp_path, damage):
    found = Records(written(tmp_path), "train")
    damage(tmp_path / "train-00001.arrow")
    assert found[0] == ROWS[0]
    with pytest.raises(UserError, match="train-00001.arrow cannot be read"):
        found[4]


def test_a_row_that_fails_leaves_no_half_shard_under_a_final_name(tmp_path):
    def failing():
        yield from ROWS[:6]
        raise UserError("the seventh")

    with pytest.raises(UserError, match="the seventh"):
        records.write_split(tmp_path, "train", failing(), 4)
    assert [p.name for p in tmp_path.iterdir()] == ["train-00000.arrow"]


# The files of a class folder tree.


def encoded(kind: str = "JPEG", mode: str = "RGB", size=(20, 16), **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode).save(out, kind, **options)
    return out.getvalue()


def good_files() -> dict[str, bytes]:
    return {
        "a_plain.JPEG": encoded(),
        "b_cmyk.JPEG": encoded(mode="CMYK"),
        "c_grey.jpg": encoded(mode="L"),
        "d_png_named.JPEG": encoded("PNG"),
        "e_exif_junk.JPEG": encoded(exif=b"Exif\0\0" + b"\xff\x00junk" * 9),
        "f_progressive.JPEG": encoded(progressive=True),
    }


BAD = {
    "zero.JPEG": b"",
    "cut.JPEG": encoded(size=(200, 160))[:3000],
    "text.JPEG": b"no image, a note\n",
    "head.JPEG": encoded()[:30],
}


def class_tree(root: Path, **files: dict[str, bytes]) -> Path:
    for wnid, members in files.items():
        (root / "train" / wnid).mkdir(parents=True)
        for name, data in members.items():
            (root / "train" / wnid / name).write_bytes(data)
    return root


def test_good_files_are_kept_verbatim_in_the_order_of_their_names(tmp_path):
    files = good_files()
    root = class_tree(tmp_path, n02=files, n01={"x.JPEG": encoded(size=(9, 9)), "notes.txt": b"passed over"})
    rows = list(sources.rows(sources.image_folder(root, "train"), "packing", 2))
    assert [(row["name"], row["label"]) for row in rows] == [("n01/x.JPEG", 0)] + [(f"n02/{name}", 1) for name in sorted(files)]
    assert [row["image"] for row in rows[1:]] == [files[name] for name in sorted(files)]


def test_all_broken_files_are_listed_at_once_after_the_good_ones(tmp_path):
    files = good_files()
    root = class_tree(tmp_path, n01={**files, "zero.JPEG": BAD["zero.JPEG"]}, n02={**BAD, "ok.png": encoded("PNG")})
    got = []
    with pytest.raises(UserError) as error:
        for row in sources.rows(sources.image_folder(root, "train"), "packing", 2):
            got.append(row["name"])
    assert got == [f"n01/{name}" for name in sorted(files)] + ["n02/ok.png"]
    said = str(error.value)
    assert said.startswith("5 of 12 files cannot be used")
    for name in ["n01/zero.JPEG", *(f"n02/{name}" for name in BAD)]:
        assert said.count(name) == 1
    assert "ok.png" not in said and "a_plain" not in said
    assert "zero.JPEG (empty file)" in said and "text.JPEG (no image)" in said


def test_a_long_list_of_broken_files_is_cut(tmp_path):
    root = class_tree(tmp_path, n01={f"{i:02d}.JPEG": b"" for i in range(23)})
    with pytest.raises(UserError, match="23 of 23 files.*19.JPEG.* and 3 more"):
        list(sources.rows(sources.image_folder(root, "train"), "packing", 2))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "JPEG"])
def test_no_damage_of_any_kind_is_a_traceback(tmp_path, kind):
    """Each prefix of a file and each of 200 flipped bytes: a row or a fault, never an exception."""
    whole = encoded(kind, size=(12, 9))
    variants = [whole[:n] for n in range(0, len(whole), max(1, len(whole) // 60))]
    for place in np.random.default_rng(1).integers(0, len(whole), 200):
        variants.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    path, faults = tmp_path / "x.JPEG", 0
    for data in variants:
        path.write_bytes(data)
        row, fault = sources.read_job(({"path": path, "name": "x"}, None, 255))
        assert (row is None) != (fault is None)
        assert row is None or row["image"] == data
        faults += fault is not None
    assert faults > 20


def test_a_bomb_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "bomb.JPEG").write_bytes(encoded(size=(20, 16)))
    row, fault = sources.read_job(({"path": tmp_path / "bomb.JPEG", "name": "x"}, None, 255))
    assert row is None and "bomb.JPEG" in fault


def test_shrinking_keeps_the_aspect_and_leaves_small_files_alone(tmp_path):
    (tmp_path / "big.JPEG").write_bytes(encoded(size=(90, 60)))
    (tmp_path / "small.JPEG").write_bytes(encoded(size=(40, 30)))
    shrunk, kept = (sources.checked_image(tmp_path / f"{name}.JPEG", 30) for name in ("big", "small"))
    assert Image.open(io.BytesIO(shrunk)).size == (45, 30)
    assert kept == encoded(size=(40, 30))


@pytest.mark.parametrize("missing", ["root", "split", "images"])
def test_a_missing_folder_is_named(tmp_path, missing):
    root = tmp_path / "imagenet"
    if missing != "root":
        (root / ("val" if missing == "split" else "train")).mkdir(parents=True)
    with pytest.raises(UserError, match="imagenet/train"):
        sources.image_folder(root, "train")


def test_class_names_captions_and_object_masks(tmp_path):
    (tmp_path / "classes.json").write_text('{"n01": "red disc"}')
    assert sources.class_names(tmp_path, ["n01", "n02"]) == ["red disc", "n02"]
    assert sources.caption_pairs(tmp_path) == []
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "captions.csv").write_text('file,caption\n0.JPEG,"a disc, red"\n')
    assert sources.caption_pairs(tmp_path) == [
        {"path": tmp_path / "pairs" / "0.JPEG", "name": "0.JPEG", "caption": "a disc, red"}
    ]
    (tmp_path / "val_objects").mkdir()
    (tmp_path / "val_objects" / "v1.png").touch()
    items = [{"path": Path(f"val/n01/v{i}.JPEG")} for i in (0, 1)]
    assert sources.with_object_masks(tmp_path, items) == [
        items[0],
        {**items[1], "mask_path": tmp_path / "val_objects" / "v1.png"},
    ]


@pytest.mark.parametrize("table", ["file,caption\n", "file,text\na,b\n", "file,caption\na.JPEG,\n", "file,caption\na.JPEG\n"])
def test_captions_without_a_file_or_a_caption_are_refused(table, tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "captions.csv").write_text(table)
    with pytest.raises(UserError, match=r"captions\.csv must have the columns file and caption"):
        sources.caption_pairs(tmp_path)


def test_classes_that_differ_between_the_splits_are_named(tmp_path):
    for folder in ("train/a", "train/b", "val/a", "val/c"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match="train has b alone; val has c alone"):
        sources.same_classes(tmp_path)
    (tmp_path / "val/c").rename(tmp_path / "val/b")
    assert sources.same_classes(tmp_path) == ["a", "b"]
    for split in ("train", "val"):
        (tmp_path / split / "b").rmdir()
    with pytest.raises(UserError, match="at least two"):
        sources.same_classes(tmp_path)


def test_an_empty_class_folder_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train/a/1.JPEG").touch()
    with pytest.raises(UserError, match="1 class folder.* hold no image, the first is b"):
        sources.image_folder(tmp_path, "train")


def test_class_names_serve_as_captions(tmp_path):
    items = [{"path": tmp_path / str(i), "name": str(i), "label": i % 2} for i in range(10)]
    assert [pair["caption"] for pair in sources.class_captions(items, ["red disc", "dog"], 100)] == ["a photo of a red disc", "a photo of a dog"] * 5
    few = sources.class_captions(items, ["red disc", "dog"], 4)
    assert [pair["name"] for pair in few] == ["0", "3", "6", "9"]
    assert few[1] == {"path": tmp_path / "3", "name": "3", "caption": "a photo of a dog"}


# The scenes of an ADE20K tree.


def annotation(values, mode: str = "L") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(values, np.uint8)).convert(mode).save(out, "PNG")
    return out.getvalue()


def scene_tree(root: Path, annotations: dict[str, bytes | None]) -> Path:
    (root / "images" / "training").mkdir(parents=True)
    (root / "annotations" / "training").mkdir(parents=True)
    for name, data in annotations.items():
        (root / "images" / "training" / f"{name}.jpg").write_bytes(encoded(size=(8, 6)))
        if data is not None:
            (root / "annotations" / "training" / f"{name}.png").write_bytes(data)
    return root


FITTING = np.arange(48).reshape(6, 8) % 12  # labels 0 to 11


def test_good_scenes_are_kept_verbatim(tmp_path):
    given = {"s1": annotation(FITTING), "s2": annotation(FITTING * 0)}
    rows = list(sources.rows(sources.scene_folder(scene_tree(tmp_path, given), "training"), "packing", 2, classes=11))
    assert [(row["name"], row["mask"]) for row in rows] == list(given.items())
    assert all(row["image"] == encoded(size=(8, 6)) for row in rows)


def test_every_wrong_annotation_is_listed_with_its_fault(tmp_path):
    bad = {
        "high": annotation(np.where(FITTING == 11, 12, FITTING)),
        "large": annotation(np.zeros((6, 9))),
        "rgb": annotation(FITTING, "RGB"),
        "empty": b"",
        "cut": annotation(FITTING)[:40],
    }
    root = scene_tree(tmp_path, {"good": annotation(FITTING), **bad})
    with pytest.raises(UserError) as error:
        list(sources.rows(sources.scene_folder(root, "training"), "packing", 2, classes=11))
    said = str(error.value)
    assert said.startswith("5 of 6 files cannot be used")
    assert all(f"annotations/training/{name}.png" in said for name in bad)
    assert "empty.png (empty file)" in said
    assert "annotation value 12 with 11 classes" in said
    assert "annotation of (9, 6) for an image of (8, 6)" in said
    assert "annotation of mode RGB" in said


def test_a_missing_annotation_is_named(tmp_path):
    root = scene_tree(tmp_path, {"with": annotation(FITTING), "without": None})
    with pytest.raises(UserError, match="1 scenes have no annotation.*without.png"):
        sources.scene_folder(root, "training")


def test_scene_class_names(tmp_path):
    assert sources.scene_classes(tmp_path, 2) == ["class 1", "class 2"]
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t5\t5\twall, paint\n2\t0.1\t5\t5\tsky\n")
    assert sources.scene_classes(tmp_path, 2) == ["wall", "sky"]
    assert sources.scene_classes(tmp_path, 3) == ["class 1", "class 2", "class 3"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "list", "keyless", "binary", "deep"])
def test_a_damaged_manifest_is_named(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: it is no JSON object with splits\. Delete .* and run `dvc repro`"):
        records.Records(tmp_path, "train")


def test_a_manifest_without_shards_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"splits": {"train": {"images": 3}}}')
    with pytest.raises(UserError, match="a split lists no shards"):
        records.Records(tmp_path, "train")


def test_too_few_images_are_said_with_the_options_that_mend_it():
    sources.refuse_too_few({"pretrain": (64, 64), "finetune": (32, 40)}, 2)
    with pytest.raises(UserError) as error:
        sources.refuse_too_few({"teacher": (64, 10), "pretrain": (32, 40), "finetune": (16, 3)}, 2)
    said = str(error.value)
    assert "teacher takes 64 images a step and has 10, finetune takes 16 images a step and has 3" in said
    assert "-S teacher.batch_size=8 -S teacher.micro_batch=4 -S finetune.batch_size=2 -S finetune.micro_batch=1" in said
