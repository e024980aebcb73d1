"""Packing: all broken files are listed at once, in every layout; finished shards are kept and not made again."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from milan.core.errors import UserError
from milan.data import records, transforms
from milan.ingest import imagenet, packing
from milan.ingest.ade20k import scene_items
from milan.ingest.archives import File, ParquetRow, ZipMember, list_files, tar_members
from milan.ingest.packing import Packing, read_job
from milan.segmentation.scenes import decode_scene
from tests import layouts
from tests.conftest import forked
from tests.layouts import FITTING, annotation, broken_files, class_tree, encoded, odd_files, parquet, scene_files, tar, zipped


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Skip fsync: on a busy disk each of the many small shards would wait for a second, and no test needs it."""
    monkeypatch.setattr(os, "fsync", lambda *_: None)


def items_of(root: Path, files: dict[str, bytes]) -> list[dict]:
    class_tree(root, files)
    return [{"image": File(root / name), "name": name} for name in files]


def rows_of(folder: Path, items: list[dict], processes: int = 1, **options) -> list[dict]:
    """Pack items and read the records back."""
    folder.mkdir(exist_ok=True)
    packed = Packing(folder, shard_images=5, processes=processes, **options).pack({"train": items})
    records.write_manifest(folder, splits=packed, classes=[])
    split = records.Records(folder, "train")
    return [split[i] for i in range(len(split))]


def refusal(folder: Path, **splits: list[dict]) -> str:
    folder.mkdir(exist_ok=True)
    with pytest.raises(UserError) as error:
        Packing(folder, shard_images=3, processes=1, classes=11).pack(splits)
    return str(error.value)


# Unusual and broken files.


def places(kind: str, root: Path, files: dict[str, bytes]) -> list:
    """Return the places of files in an archive of some kind, or of the files themselves."""
    root.mkdir(exist_ok=True)
    if kind == "files":
        return [item["image"] for item in items_of(root, files)]
    if kind == "tar":
        inner = {"n01.tar": tar(files)}
        (root / "outer.tar").write_bytes(tar(inner))
        return tar_members(root / "outer.tar", tar_members(root / "outer.tar")[0])
    if kind == "zip":
        return [place for _, place in list_files(zipped(root / "a.zip", files)).files.items()]
    parquet(root / "a.parquet", {f"n01440764/{name}": data for name, data in files.items()}, None)
    return [ParquetRow(root / "a.parquet", number, name) for number, name in enumerate(files)]


KINDS = ["files", "tar", "zip", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [1, 2])
def test_odd_files_are_kept_verbatim_and_decode_as_pil_s(tmp_path, kind, processes, one_thread):
    files = odd_files()
    items = [{"image": place, "name": name, "label": 1} for name, place in zip(files, places(kind, tmp_path / "in", files))]
    rows = rows_of(tmp_path / "out", items, processes)
    assert [(row["name"], row["image"], row["label"]) for row in rows] == [(name, data, 1) for name, data in files.items()]
    for row in rows:
        theirs = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"))
        ours = transforms.decode(row["image"], row["name"])
        assert (ours.int() - torch.from_numpy(theirs.copy()).permute(2, 0, 1).int()).abs().max() <= 4, row["name"]


@pytest.mark.parametrize(
    "kind, named", [("files", "in/{}"), ("tar", "outer.tar: {}"), ("zip", "a.zip: ADEChallengeData2016/{}"), ("parquet", "({})")]
)
def test_all_broken_files_are_listed_at_once_wherever_they_lie(tmp_path, kind, named):
    files = {"a.JPEG": encoded(), **broken_files(), "z.JPEG": encoded("PNG")}
    files = dict(sorted(files.items()))
    items = [{"image": place, "name": name} for name, place in zip(files, places(kind, tmp_path / "in", files))]
    said = refusal(tmp_path / "out", train=items[:3], val=items[3:], pairs=items[:3])
    assert said.startswith("4 of 6 files cannot be used") and said.endswith("what is packed already is kept.")
    for name in broken_files():
        assert said.count(named.format(name)) == 1, said
    assert "z.JPEG" not in said and "a.JPEG" not in said
    assert "zero.JPEG (empty file)" in said.replace(") (", " (") and "(no image: none of JPEG, PNG, WEBP, BMP, GIF)" in said


def test_a_damaged_member_of_a_zip_is_listed(tmp_path):
    """Its bytes have another checksum than the zip's directory states."""
    files = {f"{k}.jpg": encoded(seed=k) for k in range(3)}
    path = zipped(tmp_path / "a.zip", files)
    data = bytearray(path.read_bytes())
    place = data.index(b"1.jpg") + 300
    data[place : place + 20] = bytes(20)
    path.write_bytes(data)
    items = [{"image": place, "name": name} for name, place in list_files(path).files.items()]
    said = refusal(tmp_path / "out", train=items)
    assert said.startswith("1 of 3 files") and "a.zip: ADEChallengeData2016/1.jpg" in said
    assert all(isinstance(item["image"], ZipMember) for item in items)


def test_files_that_vanish_are_listed(tmp_path):
    items = items_of(tmp_path / "in", {"a.jpg": encoded(), "b.jpg": encoded(seed=1)})
    (tmp_path / "in" / "b.jpg").unlink()
    assert "b.jpg" in refusal(tmp_path / "out", train=items)


def test_names_that_are_not_in_utf_8_are_listed_readably(tmp_path):
    items = items_of(tmp_path / "in", {"a.jpg": encoded(), "caf\udce9.jpg": encoded(seed=1)})
    said = refusal(tmp_path / "out", train=items)
    assert said.startswith("1 of 2 files") and "caf\\udce9.jpg' (the name is not in UTF-8: rename it)" in said
    assert said.isascii()


def test_a_name_that_no_file_can_have_is_listed(tmp_path):
    items = items_of(tmp_path / "in", {"a.jpg": encoded()})
    said = refusal(tmp_path / "out", train=[*items, {"image": File(tmp_path / "b\0.jpg"), "name": "b"}])
    assert said.startswith("1 of 2 files") and re.search("null (byte|character)", said)  # by the version of Python


def test_a_long_list_of_broken_files_is_cut(tmp_path):
    items = items_of(tmp_path / "in", {f"{i:02d}.JPEG": b"" for i in range(23)})
    said = refusal(tmp_path / "out", train=items)
    assert said.startswith("23 of 23 files") and "19.JPEG" in said and "20.JPEG" not in said and " and 3 more" in said


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "JPEG"])
def test_no_damage_of_any_kind_is_a_traceback(tmp_path, kind):
    """Read 60 prefixes of a file, and 200 copies with a flipped byte: each gives a row or a fault, never an exception."""
    whole = encoded(kind, size=(12, 9))
    variants = [whole[:n] for n in range(0, len(whole), max(1, len(whole) // 60))]
    for place in np.random.default_rng(1).integers(0, len(whole), 200):
        variants.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    path, faults = tmp_path / "x.JPEG", 0
    for data in variants:
        path.write_bytes(data)
        row, fault = read_job(({"image": File(path), "name": "x"}, None, 255))
        assert (row is None) != (fault is None)
        assert row is None or row["image"] == data
        faults += fault is not None
    assert faults > 20


def test_a_bomb_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "bomb.JPEG").write_bytes(encoded(size=(20, 16)))
    row, fault = read_job(({"image": File(tmp_path / "bomb.JPEG"), "name": "x"}, None, 255))
    assert row is None and "bomb.JPEG" in fault


def test_shrinking_keeps_the_aspect_and_leaves_small_files_alone():
    shrunk, kept = (packing.checked_image(encoded(size=size), 30) for size in ((90, 60), (40, 30)))
    assert Image.open(io.BytesIO(shrunk)).size == (45, 30)
    assert kept == encoded(size=(40, 30))


def scenes(root: Path, annotations: dict[str, bytes]) -> list[dict]:
    return scene_items(list_files(class_tree(root, scene_files(annotations))), "training")


def test_good_scenes_are_kept_verbatim(tmp_path):
    given = {"s1": annotation(FITTING), "s2": annotation(FITTING * 0)}
    rows = rows_of(tmp_path / "out", scenes(tmp_path / "in", given), classes=11)
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
    said = refusal(tmp_path / "out", train=scenes(tmp_path / "in", {"good": annotation(FITTING), **bad}))
    assert said.startswith("5 of 6 files cannot be used")
    assert all(f"annotations/training/{name}.png" in said for name in bad)
    assert "empty.png (empty file)" in said
    assert "annotation value 12 with 11 classes" in said
    assert "annotation of (9, 6) for an image of (8, 6)" in said
    assert "annotation of mode RGB" in said


@pytest.mark.parametrize("classes", [11, 254])
def test_the_void_label_is_no_class_and_is_ignored(tmp_path, classes):
    """255, as mmsegmentation's ignore_index has it; the values between the classes and it are still refused."""
    mask = np.where(FITTING == 0, 255, FITTING)
    (row,) = rows_of(tmp_path / "out", scenes(tmp_path / "in", {"void": annotation(mask)}), classes=classes)
    _, labels = decode_scene(row, classes)
    assert labels.tolist() == np.where(mask == 255, 255, mask - 1).tolist()
    said = refusal(tmp_path / "no", train=scenes(tmp_path / "bad", {"high": annotation(np.where(FITTING == 0, 254, FITTING))}))
    assert "annotation value 254 with 11 classes" in said


# Finished shards are kept.


@pytest.fixture
def given(tmp_path) -> list[dict]:
    return items_of(tmp_path / "in", {f"{k:02d}.jpg": encoded(seed=k) for k in range(11)})


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Return the list of the items' names that are read in this process."""
    names = []

    def recorded(jobs):
        names.extend(item["name"] for item, *_ in jobs)
        return [read_job(job) for job in jobs]

    monkeypatch.setattr(packing, "read_jobs", recorded)
    return names


def pack(folder: Path, items: list[dict], **options) -> dict[str, bytes]:
    """Pack items into shards of 3 and return the files of the finished folder."""
    folder.mkdir(exist_ok=True)
    splits = Packing(folder, **{"shard_images": 3, "processes": 1, **options}).pack({"train": items})
    records.write_manifest(folder, splits=splits, classes=[])
    records.drop_unlisted(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def spoiled(item: dict) -> bytes:
    """Break an item's file and return its former bytes."""
    data = item["image"].read()
    item["image"].path.write_bytes(data[:100])
    return data


def names(*spans: range) -> list[str]:
    return [f"{k:02d}.jpg" for span in spans for k in span]


def test_after_mending_only_the_shard_of_the_broken_file_is_packed(tmp_path, given, read):
    whole = pack(tmp_path / "whole", given)
    assert sorted(whole) == ["manifest.json", *(f"train-0000{k}.arrow" for k in range(4))]
    read.clear()
    data = spoiled(given[4])
    assert "04.jpg" in refusal(tmp_path / "out", train=given)
    assert read == names(range(11))
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.arrow")}
    assert sorted(kept) == ["train-00000.arrow", "train-00002.arrow", "train-00003.arrow"]
    given[4]["image"].path.write_bytes(data)
    read.clear()
    # classes as in refusal: shards of another setting would not be reused.
    assert pack(tmp_path / "out", given, classes=11) == whole
    assert read == names(range(3, 6))
    assert all((tmp_path / "out" / name).stat().st_ino == node for name, node in kept.items())


def test_a_removed_file_shifts_what_follows_and_leaves_no_shard_too_many(tmp_path, given, read):
    spoiled(given[9])
    refusal(tmp_path / "out", train=given)
    left = given[:7] + given[9 + 1 :]
    read.clear()
    files = pack(tmp_path / "out", left, classes=11)
    assert read == [*names(range(6, 7)), "10.jpg"]
    assert files == pack(tmp_path / "whole", left) and len(files) == 1 + 3


@pytest.mark.parametrize("change", ["bytes", "time", "name", "label", "shrink", "cut shard", "no shard"])
def test_a_shard_of_other_items_or_settings_is_not_reused(tmp_path, given, read, change):
    spoiled(given[4])
    refusal(tmp_path / "out", train=given)
    given, options = given[:3], {"classes": 11}
    path, shard = given[1]["image"].path, tmp_path / "out" / "train-00000.arrow"
    if change == "bytes":
        path.write_bytes(encoded(seed=99))
    elif change == "time":
        os.utime(path, ns=(1, 1))
    elif change in ("name", "label"):
        given[1][change] = 7 if change == "label" else "another"
        given = [{"label": 0, **item} for item in given] if change == "label" else given
    elif change == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif change == "no shard":
        shard.unlink()
    else:
        options |= {"short_side": 8}
    read.clear()
    files = pack(tmp_path / "out", given, **options)
    assert len(read) == 3
    assert files == pack(tmp_path / "whole", given, **options)


def killed_after(folder: Path, items: list[dict], shards: int) -> None:
    """Pack, in a child, until that many shards are finished, then end as by kill -9."""
    write = records.write_shard

    def counted(path, rows, columns):
        if len(list(folder.glob("*.seal"))) == shards:
            path.with_name(path.name + ".part").write_bytes(b"half a shard")
            os._exit(9)
        return write(path, rows, columns)

    records.write_shard = counted
    pack(folder, items)


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_a_killed_run_continues_to_the_same_bytes(tmp_path, given, read, shards, capsys):
    whole = pack(tmp_path / "whole", given)
    assert forked(killed_after, tmp_path / "out", given, shards) == 9
    read.clear()
    assert pack(tmp_path / "out", given) == whole
    assert read == names(range(3 * shards, 11))


def test_the_progress_continues_its_count(tmp_path, given, monkeypatch):
    calls = []
    monkeypatch.setattr(packing, "track", lambda items, name, total, start=0: calls.append((name, total, start)) or items)
    data = spoiled(given[4])
    refusal(tmp_path / "out", train=given)
    given[4]["image"].path.write_bytes(data)
    pack(tmp_path / "out", given, classes=11)
    assert calls == [("packing train", 11, 0), ("packing train", 11, 8)]


def test_a_full_disk_keeps_the_finished_shards(tmp_path, given, read):
    whole = pack(tmp_path / "whole", given)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-00002.arrow.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"train-00002\.arrow is full .*it continues"):
        pack(tmp_path / "out", given)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"train-0000{k}.{kind}" for k in (0, 1) for kind in ("arrow", "seal")
    ]
    read.clear()
    assert pack(tmp_path / "out", given) == whole
    assert read == names(range(6, 11))


def test_a_damaged_seal_is_said(tmp_path, given):
    spoiled(given[4])
    refusal(tmp_path / "out", train=given)
    (tmp_path / "out" / "train-00000.seal").write_text("{")
    with pytest.raises(UserError, match=r"train-00000\.seal is damaged"):
        pack(tmp_path / "out", given, classes=11)


def test_shards_of_a_tar_are_kept_as_long_as_the_tar_is_the_same(tmp_path, read):
    files = {f"{k:02d}.jpg": encoded(seed=k) for k in range(6)}
    path = tmp_path / "a.tar"
    path.write_bytes(tar(files))
    items = [{"image": place, "name": place.name} for place in tar_members(path)]
    bad = {"image": File(tmp_path / "absent.jpg"), "name": "absent.jpg"}
    refusal(tmp_path / "out", train=[*items, bad])
    read.clear()
    pack(tmp_path / "out", items, classes=11)
    assert read == []
    refusal(tmp_path / "again", train=[*items, bad])
    os.utime(path, ns=(1, 1))
    read.clear()
    pack(tmp_path / "again", items, classes=11)
    assert read == list(files)


def test_pairs_made_of_the_class_names_do_not_name_a_broken_file_twice(tmp_path):
    root = layouts.folders(tmp_path / "set")
    images = imagenet.read_images(root)
    spoiled(images.train[0])
    pairs = imagenet.class_captions(images.train, images.classes, 100)
    assert refusal(tmp_path / "out", train=images.train, pairs=pairs).startswith("1 of 12 files")
