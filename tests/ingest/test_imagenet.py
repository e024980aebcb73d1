"""The layouts of ImageNet and ADE20K: all of them give the same items for the same images, and faults are named."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io

from milan.core.errors import UserError
from milan.data import records
from milan.ingest import ade20k, imagenet
from milan.ingest.archives import File, Listing
from milan.ingest.packing import Packing
from milan.params import ImagenetCounts, SceneCounts
from tests import layouts
from tests.layouts import WNIDS, WORDS, class_tree, encoded, folders, images, parquet, parquets, scene_files, tar, tars, zipped

NAMES = ["tench", "goldfish", "golden retriever"]


def kaggle_folders(root: Path) -> Path:
    """Write Kaggle's layout: train in class folders, val in one folder."""
    given = images()
    class_tree(root, {f"train/{name}": data for name, data in given["train"].items()})
    class_tree(root, {f"val/{name.split('/')[1]}": data for name, data in given["val"].items()})
    layouts.kaggle(root, {Path(name).stem: name.split("/")[0] for name in given["val"]})
    return root


LAYOUTS = {
    "folders": folders,
    "folders and a flat val": kaggle_folders,
    "tars and the devkit": tars,
    "tars and Kaggle's table": lambda root: tars(root, "kaggle"),
    "tars and a list": lambda root: tars(root, "list"),
    "parquet with words": parquets,
    "parquet with WordNet ids": lambda root: parquets(root, [WNIDS[2], WNIDS[0], WNIDS[1]]),
    "parquet without names": lambda root: parquets(root, None),
}


def contents(items: list[dict]) -> list[tuple]:
    """Return (name, label, bytes) of each item."""
    return [(item["name"], item["label"], item["image"].read()) for item in items]


def expected(split: str) -> list[tuple]:
    """Return (name, label, bytes) of each image of a split."""
    return [(name, WNIDS.index(name.split("/")[0]), data) for name, data in images()[split].items()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_in_the_order_of_wordnet_ids(tmp_path, layout):
    dataset = imagenet.read_images(LAYOUTS[layout](tmp_path / "set"))
    assert contents(dataset.train) == expected("train")
    assert contents(dataset.val) == expected("val")


def test_every_layout_gives_the_same_record_files(tmp_path):
    digests = {}
    for layout, make in LAYOUTS.items():
        dataset, out = imagenet.read_images(make(tmp_path / layout)), tmp_path / "out" / layout
        out.mkdir(parents=True)
        splits = Packing(out, shard_images=5, processes=1).pack({"train": dataset.train, "val": dataset.val})
        digests[layout] = [shard["sha256"] for split in ("train", "val") for shard in splits[split]["shards"]]
    assert {len(shards) for shards in digests.values()} == {3 + 2}
    assert all(shards == digests["folders"] for shards in digests.values()), digests


@pytest.mark.parametrize(
    "layout, wnids, classes",
    [
        ("folders", WNIDS, WNIDS),
        ("tars and the devkit", WNIDS, NAMES),
        ("tars and a list", WNIDS, WNIDS),
        ("parquet with words", WORDS, WORDS),
        ("parquet with WordNet ids", WNIDS, WNIDS),
        ("parquet without names", ["class 0", "class 1", "class 2"], ["class 0", "class 1", "class 2"]),
    ],
)
def test_names_of_the_classes(tmp_path, layout, wnids, classes):
    dataset = imagenet.read_images(LAYOUTS[layout](tmp_path / "set"))
    assert (dataset.wnids, dataset.classes) == (wnids, classes)
    (tmp_path / "set" / "classes.json").write_text(json.dumps({wnids[1]: "the second"}))
    base = wnids if layout == "tars and the devkit" else classes
    assert imagenet.read_images(tmp_path / "set").classes == [base[0], "the second", base[2]]


def refusal(root: Path, holdout: float | None = None) -> str:
    """Return the text of the error that read_images raises."""
    with pytest.raises(UserError) as error:
        imagenet.read_images(root, holdout)
    return str(error.value)


# Tars.


def test_broken_inner_tars_are_all_named(tmp_path):
    root = tars(tmp_path / "set")
    inner = layouts.train_tars(images()["train"])
    inner |= {f"{WNIDS[0]}.tar": inner[f"{WNIDS[0]}.tar"][:1500], f"{WNIDS[2]}.tar": b"x" * 1024}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    message = refusal(root)
    assert (
        all(f"ILSVRC2012_img_train.tar: {wnid}.tar is not a complete" in message for wnid in (WNIDS[0], WNIDS[2]))
        and WNIDS[1] not in message
    )


def test_a_truncated_download_is_named(tmp_path):
    root = tars(tmp_path / "set")
    for name in ("ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar"):
        (root / name).write_bytes((root / name).read_bytes()[:-12_000])
        assert f"{name} is not a complete, uncompressed tar" in refusal(root)


def test_a_class_without_images_and_a_tar_without_classes_are_refused(tmp_path):
    root = tars(tmp_path / "set")
    (root / "ILSVRC2012_img_train.tar").write_bytes(
        tar({**layouts.train_tars(images()["train"]), "n09.tar": tar({"note.txt": b"n"})})
    )
    assert "1 class(es)" in refusal(root) and "the first is n09" in refusal(root)
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar({"README": b"n"}))
    assert "holds no images" in refusal(root)


@pytest.mark.parametrize(
    "name, message",
    [
        ("ILSVRC2012_img_val.tar", "holds ILSVRC2012_img_train.tar and no ILSVRC2012_img_val.tar"),
        (
            "ILSVRC2012_devkit_t12.tar.gz",
            "does not say the classes of its validation images: put ILSVRC2012_devkit_t12.tar.gz, LOC_val",
        ),
    ],
)
def test_a_missing_part_is_named(tmp_path, name, message):
    root = tars(tmp_path / "set")
    (root / name).unlink()
    assert message in refusal(root)


PARTS = ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "val_labels.txt"]


@pytest.mark.parametrize("name", PARTS)
def test_a_folder_or_a_broken_link_instead_of_a_part_is_named(tmp_path, name):
    root = tars(tmp_path / "set", "list")
    (root / name).unlink()
    (root / name).mkdir()
    assert f"{root / name} cannot be read: no file, but a folder" in refusal(root)
    (root / name).rmdir()
    (root / name).symlink_to("nowhere.tar")
    assert f"{root / name} (a link to nowhere.tar) cannot be read: No such file" in refusal(root)
    (root / name).unlink()
    (root / name).symlink_to(name)
    assert f"{root / name} (a link to {name}) cannot be read: Too many levels" in refusal(root)


def test_labels_of_unknown_classes_and_missing_labels_are_named(tmp_path):
    root = tars(tmp_path / "set", "list")
    lines = (root / "val_labels.txt").read_text().splitlines()
    (root / "val_labels.txt").write_text("\n".join([lines[0].split()[0] + " n99999999", *lines[2:]]))
    message = refusal(root)
    assert "val_labels.txt gives 2 validation image(s) none of the 3 classes" in message
    assert "ILSVRC2012_val_00000001.JPEG is n99999999" in message and "ILSVRC2012_val_00000004.JPEG is not in it" in message


TABLES = {
    "LOC_val_solution.csv": [
        "",
        "ImageId\nILSVRC2012_val_00000001\n",
        "a,b\n1,2\n",
        "ImageId,PredictionString\nILSVRC2012_val_00000001,\n",
    ],
    "val_labels.txt": ["ILSVRC2012_val_00000001.JPEG\n", "a b c\n"],
}


@pytest.mark.parametrize("name, content", [(name, content) for name, contents in TABLES.items() for content in contents])
def test_tables_of_another_form_are_named(tmp_path, name, content):
    root = tars(tmp_path / "set")
    (root / name).write_text(content)
    assert name in refusal(root) and ("must have the columns" in refusal(root) or "line 1 is not" in refusal(root))
    (root / name).write_bytes(b"\xff\xfe\x00")
    assert f"{name} is no text" in refusal(root)


@pytest.mark.parametrize("meta", [b"", b"no mat", "another"])
def test_a_devkit_that_cannot_be_read_is_named(tmp_path, meta):
    root = tars(tmp_path / "set")
    if meta == "another":
        out = io.BytesIO()
        scipy.io.savemat(out, {"synsets": 3})
        meta = out.getvalue()
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, data in {"data/meta.mat": meta, "data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}.items():
            member = tarfile.TarInfo(f"kit/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert "data/meta.mat cannot be read" in refusal(root)


# Parquet.


@pytest.mark.parametrize("names", [WORDS, None])
@pytest.mark.parametrize("label", [-1, 3, None])
def test_a_label_out_of_range_is_named_with_its_file(tmp_path, names, label):
    root = parquets(tmp_path / "set", names)
    path = root / "data" / "validation-00000-of-00001.parquet"
    table = pq.read_table(path)
    labels = [*table.column("label").to_pylist()[:-1], label]
    pq.write_table(table.set_column(1, "label", pa.array(labels, pa.int64())), path)
    assert f"validation-00000-of-00001.parquet: row 5 has the label {label}, with 3 classes (0 to 2)" in refusal(root)


def test_parquet_files_of_different_sets_and_without_validation(tmp_path):
    root = parquets(tmp_path / "set")
    parquet(root / "data" / "val-0.parquet", dict(list(images()["val"].items())[:2]), ["a", "b", "c"])
    assert "names its classes otherwise" in refusal(root)
    for path in (root / "data").glob("val*"):
        path.unlink()
    assert "no val-*.parquet" in refusal(root)


def with_labels(path: Path, labels: list[int]) -> None:
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(labels)).set_column(1, "label", pa.array(labels, pa.int64())), path)


def test_parquet_without_rows_of_validation_or_of_a_class(tmp_path):
    root = parquets(tmp_path / "set")
    with_labels(root / "data" / "validation-00000-of-00001.parquet", [])
    assert "validation-00000-of-00001.parquet holds no rows" in refusal(root)
    with_labels(root / "data" / "train-00001-of-00002.parquet", [0] * 5)
    assert "1 class(es) of" in refusal(root) and "the first is golden retriever. Fill" in refusal(root)


def test_a_huge_label_is_refused_at_once(tmp_path):
    root = parquets(tmp_path / "set", None)
    with_labels(root / "data" / "train-00001-of-00002.parquet", [2, 2, 2, 2, 2**40])
    assert "data has the label 1099511627776 and 12 rows" in refusal(root)


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", "b", "\ud800"], "abc", [1, 2, 3], {"0": "a", "1": "b", "2": "c"}])
def test_class_names_of_another_form_in_parquet_are_named(tmp_path, names):
    root = parquets(tmp_path / "set")
    path = root / "data" / "train-00000-of-00002.parquet"
    features = json.dumps({"info": {"features": {"label": {"names": names}}}})
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": features}), path)
    assert "train-00000-of-00002.parquet: the names of the feature label" in refusal(root)


CLASSES_OF_OTHERS = [b'{"0": ["n01440764", "tench"]}', b'{"n01440764": 0}', b'{"n01440764": "ten', b'["tench"]', b"null", rb'{"n01440764": "\ud800"}']


@pytest.mark.parametrize("content", [*CLASSES_OF_OTHERS, '{"n01440764": "pêche"}'.encode("latin-1"), None])
def test_class_names_of_another_form_are_named(tmp_path, content):
    root = folders(tmp_path / "set")
    (root / "classes.json").write_bytes(content) if content else (root / "classes.json").mkdir()
    message = refusal(root)
    expected = "must be a JSON object" if content in CLASSES_OF_OTHERS else "no text in UTF-8" if content else "cannot be read"
    assert f"{root / 'classes.json'} " in message and expected in message


def test_parquet_rows_without_names_are_named_by_file_and_row(tmp_path):
    dataset = imagenet.read_images(parquets(tmp_path / "set", plain=True))
    assert [item["name"] for item in dataset.train][6:8] == ["train-00000-of-00002/6", "train-00001-of-00002/0"]


# Folders.


@pytest.mark.parametrize("missing", ["root", "val", "images"])
def test_a_missing_folder_is_named_with_the_layouts(tmp_path, missing):
    root = tmp_path / "imagenet"
    if missing != "root":
        class_tree(root, {"train/n01/x.JPEG": b"x", "train/n02/x.JPEG": b"x"} if missing == "val" else {"train/notes.txt": b"x"})
    message = refusal(root)
    assert f"{root}{'/val' if missing == 'val' else ''}" in message
    assert all(word in message for word in ("train/ and val/", "ILSVRC2012_img_train.tar", "train-*.parquet", "without labels"))


def test_a_file_instead_of_its_folder_is_refused(tmp_path):
    root = tars(tmp_path / "set")
    assert "ILSVRC2012_img_train.tar is a file: data.imagenet names the folder" in refusal(root / "ILSVRC2012_img_train.tar")


def test_a_file_instead_of_val_is_refused(tmp_path):
    root = class_tree(tmp_path, {"train/a/1.JPEG": b"x", "train/b/1.JPEG": b"x", "val": b"x"})
    assert f"{root / 'val'} is a file: make it the folder" in refusal(root)


def test_classes_that_differ_between_the_splits_are_named(tmp_path):
    root = class_tree(tmp_path, {f"{folder}/1.JPEG": b"x" for folder in ("train/a", "train/b", "val/a", "val/c")})
    said = refusal(root)
    assert "only train has b; only val has c" in said and "differ only" not in said


@pytest.mark.parametrize("train, val", [("pe\u0302che", "p\u00eache"), ("owl ", "owl"), ("Cat", "cat")], ids=ascii)
def test_classes_that_look_alike_are_told_apart(tmp_path, train, val):
    """As macOS, Windows and archives of others write one name in two ways."""
    root = class_tree(tmp_path, {f"{folder}/1.JPEG": b"x" for folder in ("train/a", "val/a", f"train/{train}", f"val/{val}")})
    assert "differ only in case, spaces or the Unicode form of accents" in refusal(root)


def test_one_class_is_refused(tmp_path):
    assert "one class; at least two" in refusal(class_tree(tmp_path, {"train/all/1.JPEG": b"x", "val/all/1.JPEG": b"x"}))


def test_an_empty_class_folder_is_named(tmp_path):
    root = class_tree(tmp_path, {f"{folder}/1.JPEG": b"x" for folder in ("train/a", "train/b", "val/a")})
    (root / "val/b").mkdir()
    assert "1 class(es)" in refusal(root) and "val hold no image, the first is b" in refusal(root)


def test_other_files_are_left_out(tmp_path):
    root = class_tree(folders(tmp_path), {f"train/{WNIDS[0]}/notes.txt": b"n", "train/list.txt": b"n"})
    assert contents(imagenet.read_images(root).train) == expected("train")


def loose(root: Path) -> Path:
    """Write the set in class folders, with files that the layout has no place for."""
    more = {"train/loose.jpg": b"", f"train/{WNIDS[0]}/notes.txt": b"", "test/1.jpg": b"", "README.md": b"", "classes.json": b"{}"}
    return class_tree(folders(root), more)


def test_what_a_layout_leaves_unread_is_counted_in_one_line(tmp_path, capsys):
    imagenet.read_images(loose(tmp_path))
    said = capsys.readouterr().out
    assert said == (
        f"Not read in {tmp_path}: 2 .jpg (such as test/1.jpg), 1 .md (such as README.md), "
        f"1 .txt (such as train/{WNIDS[0]}/notes.txt).\n"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_said_of_a_set_that_is_read_whole(tmp_path, layout, capsys):
    imagenet.read_images(LAYOUTS[layout](tmp_path / "set"))
    assert "Not read" not in capsys.readouterr().out


def test_other_members_of_tars_are_counted_and_other_tars_refused(tmp_path, capsys):
    root, inner = tars(tmp_path / "set"), layouts.train_tars(images()["train"])
    inner[f"{WNIDS[0]}.tar"] = tar({"._x.JPEG": b"junk", "notes.txt": b"", "x.JPEG": encoded()})
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar({"._n01.tar": b"junk", "list": b"", **inner}))
    dataset = imagenet.read_images(root)
    assert [name for name, label, _ in contents(dataset.train) if label == 0] == [f"{WNIDS[0]}/x.JPEG"]
    said = capsys.readouterr().out
    assert f"1 .txt (such as {WNIDS[0]}.tar/notes.txt), 1 without a suffix (such as ILSVRC2012_img_train.tar/list)." in said
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar({"cat.tar": b"", **inner}))
    assert "holds tars whose names are no WordNet ids (n01440764.tar): cat.tar." in refusal(root)


DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        "


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_systems_leave_are_no_images_and_no_classes(tmp_path, layout):
    """As macOS copies a folder: a ._NAME beside every file; and as Jupyter and Windows leave theirs."""
    root = LAYOUTS[layout](tmp_path / "set")
    for path in [path for path in root.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(DOUBLE)
        (path.parent / "Thumbs.db").write_bytes(b"junk")
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        class_tree(folder, {".ipynb_checkpoints/x.jpg": b"junk", "@eaDir/x.jpg": b"junk", ".DS_Store": b"junk"})
    dataset = imagenet.read_images(root)
    assert (contents(dataset.train), contents(dataset.val)) == (expected("train"), expected("val"))


def test_rows_of_files_that_systems_leave_are_no_images(tmp_path):
    given = {name: data for name, data in images()["train"].items()}
    parquet(tmp_path / "train-0.parquet", {f"{WNIDS[0]}/._x.JPEG": DOUBLE, **given}, WNIDS)
    parquet(tmp_path / "val-0.parquet", images()["val"], WNIDS)
    assert contents(imagenet.read_images(tmp_path).train) == expected("train")


def test_images_in_folders_below_a_class_are_the_class_s(tmp_path):
    """Two of them share a name, and the class "a b" sorts before "a/"."""
    names = ["train/a b/9.jpg", "train/a/0.jpg", "train/a/2019/0.jpg", "train/a/2020/deep/0.jpg", "val/a b/1.jpg", "val/a/images/1.jpg"]
    dataset = imagenet.read_images(class_tree(tmp_path, {name: name.encode() for name in names}))
    assert dataset.classes == ["a", "a b"]
    assert contents(dataset.train) == [
        ("a/0.jpg", 0, b"train/a/0.jpg"),
        ("a/2019/0.jpg", 0, b"train/a/2019/0.jpg"),
        ("a/2020/deep/0.jpg", 0, b"train/a/2020/deep/0.jpg"),
        ("a b/9.jpg", 1, b"train/a b/9.jpg"),
    ]
    assert contents(dataset.val) == [("a/images/1.jpg", 0, b"val/a/images/1.jpg"), ("a b/1.jpg", 1, b"val/a b/1.jpg")]


def tiny_imagenet(root: Path) -> Path:
    """Write Tiny ImageNet's layout: train/<wnid>/images/, and val/images/ with a table."""
    train = {f"train/{wnid}/images/{wnid}_{k}.JPEG": f"{wnid} {k}".encode() for wnid in WNIDS for k in range(2)}
    lines = [f"val_{k}.JPEG\t{WNIDS[k % 3]}\t0\t32\t44\t62" for k in range(6)]
    val = {f"val/images/val_{k}.JPEG": f"val {k}".encode() for k in range(6)}
    return class_tree(root, {**train, **val, "val/val_annotations.txt": "\n".join(lines).encode()})


def test_tiny_imagenet_as_it_unpacks(tmp_path):
    dataset = imagenet.read_images(tiny_imagenet(tmp_path))
    assert dataset.wnids == WNIDS
    assert contents(dataset.train)[:3] == [
        (f"{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG", 0, f"{WNIDS[0]} 0".encode()),
        (f"{WNIDS[0]}/images/{WNIDS[0]}_1.JPEG", 0, f"{WNIDS[0]} 1".encode()),
        (f"{WNIDS[1]}/images/{WNIDS[1]}_0.JPEG", 1, f"{WNIDS[1]} 0".encode()),
    ]
    assert contents(dataset.val) == [(f"{WNIDS[k % 3]}/val_{k}.JPEG", k % 3, f"val {k}".encode()) for k in (0, 3, 1, 4, 2, 5)]


def test_two_validation_images_of_one_name_are_refused(tmp_path):
    root = class_tree(tiny_imagenet(tmp_path), {"val/more/val_1.png": b""})
    assert "two validation images of one name, which val_annotations.txt does not tell apart: val_1." in refusal(root)


@pytest.mark.parametrize("name, lines", [
    ("val_labels.txt", f"x.JPEG {WNIDS[0]}\nx.png {WNIDS[1]}\n"),
    ("LOC_val_solution.csv", f"ImageId,PredictionString\nx,{WNIDS[0]} 1\nx,{WNIDS[1]} 1\n"),
])  # fmt: skip
def test_an_image_with_two_classes_is_refused(tmp_path, name, lines):
    root = tars(tmp_path / "set")
    (root / name).write_text(lines)
    assert f"{name} gives an image two classes: x (" in refusal(root)


# Links.


def test_linked_folders_and_files_are_read(tmp_path):
    """The set's folders, classes and files lie on another disk."""
    disk, root = folders(tmp_path / "disk"), tmp_path / "set"
    (root / "train").mkdir(parents=True)
    (root / "val").symlink_to(disk / "val")
    (root / "train" / WNIDS[0]).symlink_to(disk / "train" / WNIDS[0])
    for wnid in WNIDS[1:]:
        (root / "train" / wnid).mkdir()
        for path in (disk / "train" / wnid).iterdir():
            (root / "train" / wnid / path.name).symlink_to(path)
    dataset = imagenet.read_images(root)
    assert (contents(dataset.train), contents(dataset.val)) == (expected("train"), expected("val"))


@pytest.mark.parametrize("name", ["train/n09", f"train/{WNIDS[0]}/2019", f"val/{WNIDS[1]}/x.JPEG", "val_objects", "pairs", "train", "val"])
def test_links_to_nothing_are_refused_where_the_set_lies(tmp_path, name):
    root = folders(tmp_path)
    if (root / name).exists():
        (root / name).rename(root / "elsewhere")
    (root / name).symlink_to("/nowhere/n09")
    assert f"{root / name} (a link to /nowhere/n09) cannot be read: No such file" in refusal(root)


def test_links_to_nothing_beside_the_set_are_named(tmp_path, capsys):
    (folders(tmp_path) / "other").symlink_to("/nowhere")
    (tmp_path / "train" / WNIDS[0] / "up").symlink_to("..")
    imagenet.read_images(tmp_path)
    assert capsys.readouterr().out == f"Not read in {tmp_path}: 2 without a suffix (such as other).\n"


def test_images_without_labels_behind_links_are_read_once(tmp_path, capsys):
    root = class_tree(tmp_path / "set", {"few/a.jpg": b"few/a.jpg", "val/v.jpg": b"val/v.jpg"})
    class_tree(tmp_path / "disk", {f"p{k}.jpg": f"photos/p{k}.jpg".encode() for k in range(2)})
    (root / "photos").symlink_to(tmp_path / "disk")
    (root / "all").symlink_to(root / "val")
    (root / "zoo").symlink_to("few")
    (root / "one.jpg").symlink_to(tmp_path / "disk" / "p1.jpg")
    (root / "photos" / "up").symlink_to(root)
    dataset = imagenet.read_images(root)
    assert unlabelled_names(dataset.val) == ["val/v.jpg"]
    assert unlabelled_names(dataset.train) == ["few/a.jpg", "one.jpg", "photos/p0.jpg"]
    assert [item["image"].read() for item in dataset.train] == [b"few/a.jpg", b"photos/p1.jpg", b"photos/p0.jpg"]
    said = capsys.readouterr().out
    assert f"{root} is read as images without labels: 3 of training, 1 of validation." in said
    assert "3 .jpg (such as all/v.jpg)" in said
    (root / "more").symlink_to("/nowhere")
    assert "more (a link to /nowhere) cannot be read" in refusal(root)


# Other names of the folders, and folders of classes alone.


def by_class(*splits: str) -> dict[str, bytes]:
    """Return files of classes a and b in each folder ("": at the top)."""
    return {f"{split}{name}.jpg": f"{split}{name}".encode() for split in splits for name in ("a/0", "b/1")}


@pytest.mark.parametrize("train, val", [
    ("train", "test"), ("Train", "Test"), ("TRAIN", "VAL"), ("training", "validation"), ("Training", "testing"), ("train", "valid"), ("train", "dev"),
])  # fmt: skip
def test_the_folders_of_the_splits_have_other_names(tmp_path, capsys, train, val):
    dataset = imagenet.read_images(class_tree(tmp_path, by_class(f"{train}/", f"{val}/")))
    assert contents(dataset.train) == [("a/0.jpg", 0, f"{train}/a/0".encode()), ("b/1.jpg", 1, f"{train}/b/1".encode())]
    assert contents(dataset.val) == [("a/0.jpg", 0, f"{val}/a/0".encode()), ("b/1.jpg", 1, f"{val}/b/1".encode())]
    first = "" if train == "train" else f"{train}/ is read as train/ and "
    assert capsys.readouterr().out == f"{tmp_path}: {first}{val}/ is read as val/.\n"


def test_of_several_folders_of_validation_the_first_name_counts(tmp_path, capsys):
    dataset = imagenet.read_images(class_tree(tmp_path, by_class("train/", "test/", "Valid/")))
    assert contents(dataset.val)[0][2] == b"Valid/a/0"
    said = capsys.readouterr().out
    assert "Valid/ is read as val/." in said and "Not read in" in said and "2 .jpg (such as test/a/0.jpg)" in said


def test_training_classes_without_validation_images_name_both_ways(tmp_path):
    said = refusal(class_tree(tmp_path, by_class("Train/") | {"test/1.jpg": b"1"}))
    assert f"{tmp_path / 'val'} is missing: move the validation images there, into folders of the classes as in Train/" in said
    assert "or -S prepare_imagenet.holdout=0.1 holds out a tenth of Train/" in said


def photos(classes: str, each: int) -> dict[str, bytes]:
    return {f"{name}/{k}.jpg": f"{name} {k}".encode() for name in classes for k in range(each)}


def test_folders_of_classes_alone_with_a_share_held_out(tmp_path, capsys):
    """The digests decide, so a copy is on its original's side and an added image moves no other."""
    class_tree(tmp_path, photos("abc", 100) | {"c/copy.jpg": b"a 7", "readme.txt": b"r"})
    dataset = imagenet.read_images(tmp_path, holdout=0.25)
    assert dataset.classes == ["a", "b", "c"] and len(dataset.train) + len(dataset.val) == 301
    held = {data for _, _, data in contents(dataset.val)}
    assert held == {data for data in photos("abc", 100).values() if hashlib.sha256(data).digest()[0] < 64}  # a quarter of 256
    assert held.isdisjoint(data for _, _, data in contents(dataset.train)) and 50 < len(held) < 100
    assert ("a/3.jpg", 0, b"a 3") in contents(dataset.train + dataset.val) and ("c/copy.jpg", 2, b"a 7") in contents(dataset.train + dataset.val)
    said = capsys.readouterr().out
    assert f"{tmp_path}: its 3 folders are read as classes (as images without labels: holdout=null).\n" in said
    assert f"prepare_imagenet.holdout 0.25 holds out {len(dataset.val)} of 301 images for validation" in said
    more = imagenet.read_images(class_tree(tmp_path, photos("d", 50)), holdout=0.25)
    assert {data for _, _, data in contents(more.val) if not data.startswith(b"d")} == held


def test_a_share_is_held_out_of_train_and_of_images_without_labels(tmp_path):
    labelled = imagenet.read_images(class_tree(tmp_path / "one", {f"train/{name}": data for name, data in photos("ab", 40).items()}), holdout=0.25)
    loose = imagenet.read_images(class_tree(tmp_path / "two", {name.replace("/", ""): data for name, data in photos("ab", 40).items()}), holdout=0.25)
    sides = [sorted(item["image"].read() for item in dataset.val) for dataset in (labelled, loose)]
    assert sides[0] == sides[1] and len(sides[0]) > 5 and labelled.classes == ["a", "b"] and loose.classes == []


def test_a_set_with_validation_images_holds_out_none(tmp_path):
    dataset = imagenet.read_images(folders(tmp_path), holdout=0.5)
    assert (contents(dataset.train), contents(dataset.val)) == (expected("train"), expected("val"))


def test_a_share_that_leaves_a_side_or_a_class_empty_is_refused(tmp_path):
    class_tree(tmp_path, photos("ab", 3))
    assert "prepare_imagenet.holdout 1e-09 holds out 0 of 6 images: take another share, or add" in refusal(tmp_path, holdout=1e-9)
    lost = next(k for k in range(99) if hashlib.sha256(f"c {k}".encode()).digest()[0] < 128)
    class_tree(tmp_path, photos("ab", 30) | {"c/1.jpg": f"c {lost}".encode()})
    assert "leaves none to train on of c: add images" in refusal(tmp_path, holdout=0.5)


def test_folders_at_the_top_are_no_classes_without_a_word(tmp_path, capsys):
    """They may be albums: the line says how they become classes. An image beside them or a single folder makes none."""
    assert imagenet.read_images(class_tree(tmp_path / "albums", photos("ab", 30))).classes == []
    assert "Where its 2 folders are classes: -S prepare_imagenet.holdout=0.1." in capsys.readouterr().out
    sets = (["a/1.jpg", "b/1.jpg", "c.jpg"], ["a/1.jpg", "a/2.jpg"], ["a/1.jpg", "pairs/2.jpg", "a/3.jpg"])
    for number, names in enumerate(sets):
        assert imagenet.read_images(class_tree(tmp_path / str(number), {name: b"1" for name in names})).classes == []
    assert "are classes" not in capsys.readouterr().out


# Without labels.


@pytest.mark.parametrize("names, advice", [
    (["set/train/a/1.jpg", "set/train/b/1.jpg", "set/val/a/1.jpg"], "set data.imagenet to {}/set"),
    (["deep/er/train/a/1.jpg", "deep/er/valid/1.jpg"], "set data.imagenet to {}/deep/er"),
    (["set/Training/a/1.jpg", "set/Test/a/1.jpg"], "set data.imagenet to {}/set"),
    (["set/ILSVRC2012_img_train.tar", "x.jpg", "y.jpg"], "set data.imagenet to {}/set."),
    (["set/data/train-0.parquet", "x.jpg", "y.jpg"], "set data.imagenet to {}/set."),
])  # fmt: skip
def test_a_labelled_set_in_a_folder_below_is_refused(tmp_path, names, advice):
    assert advice.format(tmp_path) in refusal(class_tree(tmp_path, {name: b"1" for name in names}))


@pytest.mark.parametrize("names", [["trips/train/1.jpg", "trips/test/1.jpg"], ["train/1.jpg", "test/a/1.jpg"], ["by/train/a/1.jpg", "by/plane/1.jpg"]])
def test_folders_without_classes_or_without_validation_are_no_labelled_set(tmp_path, names):
    dataset = imagenet.read_images(class_tree(tmp_path, {name: b"1" for name in names}))
    assert len(dataset.train) == len(dataset.val) == 1


def test_folders_of_validation_under_another_name_are_said_to_be_trained_on(tmp_path, capsys):
    imagenet.read_images(class_tree(tmp_path, {f"{name}.jpg": b"1" for name in ("a/1", "test/1", "Val/1")}))
    assert "2 of training, 1 of validation. Images of Val, test are of training, too: only val/ is held out." in capsys.readouterr().out


def unlabelled_names(items: list[dict]) -> list[str]:
    """Return the names of items, which must have no label."""
    assert all(set(item) == {"image", "name"} for item in items)
    return [item["name"] for item in items]


def test_every_fiftieth_image_of_any_folders_is_for_validation(tmp_path):
    names = [f"{k % 3}/deep/{k:03d}.jpg" for k in range(120)]
    files = {name: name.encode() for name in names} | {
        "notes.txt": b"n",
        ".trash/x.jpg": b"t",
        "pairs/p.jpg": b"p",
        "pairs/captions.csv": b"c",
    }
    dataset = imagenet.read_images(class_tree(tmp_path, files))
    order = sorted(names)
    assert unlabelled_names(dataset.val) == [order[0], order[50], order[100]]
    assert unlabelled_names(dataset.train) == [name for k, name in enumerate(order) if k % 50]
    assert [item["image"].read().decode() for item in dataset.train] == unlabelled_names(dataset.train)
    assert dataset.wnids == dataset.classes == []


def test_of_two_images_each_split_has_one(tmp_path):
    dataset = imagenet.read_images(class_tree(tmp_path, {"b.png": b"b", "a.png": b"a"}))
    assert (unlabelled_names(dataset.train), unlabelled_names(dataset.val)) == (["b.png"], ["a.png"])


def test_a_val_folder_is_the_validation_split(tmp_path):
    files = {"train/x.jpg": b"1", "train/y.jpg": b"1", "val/deep/z.jpg": b"1"}
    dataset = imagenet.read_images(class_tree(tmp_path, files))
    assert (unlabelled_names(dataset.train), unlabelled_names(dataset.val)) == (["train/x.jpg", "train/y.jpg"], ["val/deep/z.jpg"])


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"n"}, {"one.jpg": b"1"}, {"val/one.jpg": b"1"}, {"pairs/p.jpg": b"p"}])
def test_a_set_without_training_images_is_refused(tmp_path, files):
    assert "holds no images" in refusal(class_tree(tmp_path, files))


# Captions and masks.


def test_captions_and_object_masks(tmp_path):
    assert imagenet.caption_pairs(tmp_path) == []
    class_tree(tmp_path, {"pairs/captions.csv": b"file,caption\n"})
    assert imagenet.caption_pairs(tmp_path) == []  # as the built-in world has it without pairs
    class_tree(tmp_path, {"pairs/captions.csv": b'\xef\xbb\xbffile,caption\n0.JPEG,"a disc, red"\n', "val_objects/v1.png": b""})
    assert imagenet.caption_pairs(tmp_path) == [
        {"image": File(tmp_path / "pairs" / "0.JPEG"), "name": "0.JPEG", "caption": "a disc, red"}
    ]
    items = [{"name": f"n01/v{i}.JPEG"} for i in (0, 1)]
    assert imagenet.with_object_masks(tmp_path, items) == [
        items[0],
        {**items[1], "mask": File(tmp_path / "val_objects" / "v1.png")},
    ]


@pytest.mark.parametrize(
    "table",
    ["", "file\n", "file,text\na,b\n", "file,caption\na.JPEG,\n", "file,caption\na.JPEG,a disc, red\n", "file,caption\na.JPEG\n"],
)
def test_captions_without_a_file_or_a_caption_are_refused(table, tmp_path):
    class_tree(tmp_path, {"pairs/captions.csv": table.encode()})
    with pytest.raises(UserError, match=r"captions\.csv must have the columns file and caption"):
        imagenet.caption_pairs(tmp_path)


@pytest.mark.parametrize(
    "table, message",
    [
        ("file,caption\na.jpg,café\n".encode("latin-1"), "is no text in UTF-8"),
        ("file,caption\na.jpg,disc\n".encode("utf-16"), "is no text in UTF-8"),
        (b'file,caption\na.jpg,"' + b"x" * 140_000, "is no CSV table .*quote"),
        (None, "cannot be read: no file, but a folder"),
    ],
)
def test_captions_that_are_no_table_are_named(tmp_path, table, message):
    (tmp_path / "pairs" / "captions.csv").mkdir(parents=True)
    if table:
        (tmp_path / "pairs" / "captions.csv").rmdir()
        class_tree(tmp_path, {"pairs/captions.csv": table})
    with pytest.raises(UserError, match=rf"captions\.csv {message}"):
        imagenet.caption_pairs(tmp_path)


def test_class_names_serve_as_captions(tmp_path):
    items = [{"image": File(tmp_path / str(i)), "name": str(i), "label": i % 2} for i in range(10)]
    names = ["red disc", "dog"]
    assert [pair["caption"] for pair in imagenet.class_captions(items, names, 100)] == [
        "a photo of a red disc",
        "a photo of a dog",
    ] * 5
    few = imagenet.class_captions(items, names, 4)
    assert [pair["name"] for pair in few] == ["0", "3", "6", "9"]
    assert few[1] == {"image": File(tmp_path / "3"), "name": "3", "caption": "a photo of a dog"}


@pytest.mark.parametrize("file", ["../../secret.png", "/etc/secret.png", "deep/../../secret.png", ".."])
def test_captions_of_files_outside_their_folder_are_refused(tmp_path, file):
    class_tree(tmp_path / "set", {"pairs/captions.csv": f"file,caption\na.jpg,a\n{file},b\n".encode()})
    (tmp_path / "secret.png").write_bytes(encoded("PNG"))
    with pytest.raises(UserError, match="captions.csv names files outside its folder: ") as error:
        imagenet.caption_pairs(tmp_path / "set")
    assert file in str(error.value)


# Names of classes.


def test_classes_of_one_name_are_told_apart_by_their_ids(tmp_path):
    """ImageNet's devkit names two classes "crane" and two "maillot"."""
    root = folders(tmp_path)
    (root / "classes.json").write_text(json.dumps({WNIDS[0]: "crane", WNIDS[1]: " ", WNIDS[2]: " crane"}))
    assert imagenet.read_images(root).classes == [f"crane ({WNIDS[0]})", WNIDS[1], f"crane ({WNIDS[2]})"]


def test_names_that_their_ids_do_not_tell_apart_are_refused(tmp_path):
    root = folders(tmp_path)
    (root / "classes.json").write_text(json.dumps({WNIDS[0]: "x", WNIDS[1]: "x", WNIDS[2]: f"x ({WNIDS[0]})"}))
    assert f"classes.json gives two classes the name x ({WNIDS[0]})" in refusal(root)


# Counts.


def test_too_few_images_are_refused_with_the_options_that_mend_it():
    imagenet.refuse_too_few({"pretrain": (64, 64), "finetune": (32, 40)}, 2)
    with pytest.raises(UserError) as error:
        imagenet.refuse_too_few({"teacher": (64, 10), "pretrain": (32, 40), "finetune": (16, 3)}, 2)
    message = str(error.value)
    assert "teacher takes 64 images a step and has 10, finetune takes 16 images a step and has 3" in message
    assert "-S teacher.batch_size=8 -S teacher.micro_batch=4 -S finetune.batch_size=2 -S finetune.micro_batch=1" in message


@pytest.mark.parametrize("stage", ["linear_eval", "segment", "teacher"])
def test_a_micro_batch_of_one_is_no_option_where_two_images_are_needed(stage):
    with pytest.raises(UserError, match=f"{stage} needs two at least for each process") as error:
        imagenet.refuse_too_few({stage: (64, 3), "pretrain": (64, 3)}, 2)
    assert "-S" not in str(error.value)
    with pytest.raises(UserError, match=f"-S {stage}.batch_size=4 -S {stage}.micro_batch=2 -S pretrain.batch_size=4"):
        imagenet.refuse_too_few({stage: (64, 4), "pretrain": (64, 4)}, 2)


def test_other_counts_than_the_recipe_s_are_refused_with_the_remedy():
    counts = {"train": 1281166, "val": 50000, "classes": 999}
    with pytest.raises(UserError) as error:
        imagenet.refuse_other_counts("prepare_imagenet", counts, ImagenetCounts(1281167, 50000, 1000))
    message = str(error.value)
    assert "1,281,166 instead of 1,281,167 (train), 999 instead of 1,000 (classes)" in message and "val" not in message
    assert "-S prepare_imagenet.expect=null" in message
    imagenet.refuse_other_counts("prepare_imagenet", counts, None)
    imagenet.refuse_other_counts("prepare_ade20k", {"train": 2, "val": 1}, SceneCounts(2, 1))


def test_a_world_with_too_few_images_for_its_classes_is_refused_before_it_is_drawn(tmp_path):
    from stages import prepare_imagenet

    for counts, key in (({"train": 19, "val": 20}, "train is 19"), ({"train": 20, "val": 0}, "val is 0")):
        with pytest.raises(UserError, match=rf"prepare_imagenet\.{key}, and the small built-in world has 20 classes"):
            prepare_imagenet.draw(tmp_path / "world", SimpleNamespace(seed=0, world="small", size=16, pairs=0, **counts))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("world, classes, right", [("small", 14, 11), ("large", 11, 14)])
def test_scenes_of_another_world_than_the_classes_are_refused_before_they_are_drawn(tmp_path, world, classes, right):
    from stages import prepare_ade20k

    message = rf"prepare_ade20k\.classes is {classes}, and scenes of the {world} built-in world have {right} classes"
    with pytest.raises(UserError, match=message):
        prepare_ade20k.draw(tmp_path / "scenes", SimpleNamespace(world=world, classes=classes, seed=0, size=16, train=1, val=1))
    assert list(tmp_path.iterdir()) == []


def test_a_world_of_an_earlier_recipe_is_removed(tmp_path):
    from stages import prepare_imagenet

    for name in ("world-old", "world-new", "pretrain-milan-0"):
        (tmp_path / name).mkdir()
    section = SimpleNamespace(seed=0, world="small", size=16, train=20, val=20, pairs=0)
    prepare_imagenet.draw(tmp_path / "world-new", section)  # which is there: drawn before an interruption
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pretrain-milan-0", "world-new"]
    assert list((tmp_path / "world-new").iterdir()) == []


# Scenes.

ANNOTATIONS = {"s2": layouts.annotation(layouts.FITTING), "s1": layouts.annotation(layouts.FITTING * 0)}


def scene_layouts(root: Path) -> list[Path]:
    """Write the same scenes as a folder and as a zip; return both, each also by the folder that holds it."""
    files = {
        **scene_files(ANNOTATIONS),
        **scene_files(ANNOTATIONS, "validation"),
        "objectInfo150.txt": b"Idx\tName\n1\twall, paint\n2\tsky\n",
    }
    one = class_tree(root / "one" / "ADEChallengeData2016", files)
    return [one, one.parent, zipped(root / "two" / "ADEChallengeData2016.zip", files), root / "two"]


@pytest.mark.parametrize("kind", range(4))
def test_scenes_of_a_folder_and_of_a_zip_are_the_same(tmp_path, kind):
    listing = ade20k.list_scenes(scene_layouts(tmp_path)[kind])
    items = ade20k.scene_items(listing, "training")
    contents = [(item["name"], item["image"].read(), item["mask"].read()) for item in items]
    assert contents == [(name, encoded(size=(8, 6)), ANNOTATIONS[name]) for name in ("s1", "s2")]
    assert ade20k.scene_classes(listing, 2) == ["wall", "sky"]
    assert ade20k.scene_classes(listing, 3) == ade20k.scene_classes(Listing(tmp_path), 3) == ["class 1", "class 2", "class 3"]


def test_class_names_of_scenes_that_cannot_be_read_are_refused(tmp_path):
    root = class_tree(tmp_path, scene_files(ANNOTATIONS))
    (root / "objectInfo150.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"objectInfo150\.txt \(a link to nowhere\) cannot be read: .*Mend or remove it"):
        ade20k.list_scenes(root)
    (root / "objectInfo150.txt").unlink()
    os.mkfifo(root / "objectInfo150.txt")
    with pytest.raises(UserError, match=r"objectInfo150\.txt cannot be read .*mend or remove it"):
        ade20k.scene_classes(ade20k.list_scenes(root), 11)


def test_a_missing_annotation_is_named(tmp_path):
    root = class_tree(tmp_path, scene_files({"with": ANNOTATIONS["s1"], "without": None}))
    with pytest.raises(UserError, match=r"1 scenes of .* have no annotation, the first is annotations/training/without\.png"):
        ade20k.scene_items(ade20k.list_scenes(root), "training")
    with pytest.raises(UserError, match="holds no images .* in images/validation"):
        ade20k.scene_items(ade20k.list_scenes(root), "validation")


def test_a_missing_or_damaged_scene_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="images is missing: expected ADEChallengeData2016"):
        ade20k.list_scenes(tmp_path)
    with pytest.raises(UserError, match=r"nowhere is missing.*-S data\.ade20k=/path"):
        ade20k.list_scenes(tmp_path / "nowhere")
    (tmp_path / "ADEChallengeData2016.zip").write_bytes(b"PK half a download")
    with pytest.raises(UserError, match=r"ADEChallengeData2016\.zip is not a complete zip"):
        ade20k.list_scenes(tmp_path)


def test_records_of_images_without_labels_have_no_such_column(tmp_path):
    dataset = imagenet.read_images(class_tree(tmp_path / "set", {f"{k}.jpg": encoded(seed=k) for k in range(3)}))
    splits = Packing(tmp_path, shard_images=5, processes=1).pack({"train": dataset.train, "val": dataset.val})
    records.write_manifest(tmp_path, splits=splits, classes=dataset.classes)
    assert records.Records(tmp_path, "train")[0] == {"image": encoded(seed=1), "name": "1.jpg"}


def test_scenes_behind_links_and_beside_leftovers_are_read(tmp_path, capsys):
    files = {**scene_files(ANNOTATIONS), **scene_files(ANNOTATIONS, "validation")}
    class_tree(tmp_path / "disk", files)
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    (root / "images" / "training").symlink_to(tmp_path / "disk" / "images" / "training")
    (root / "annotations").symlink_to(tmp_path / "disk" / "annotations")
    class_tree(root, {"images/validation/._s1.jpg": DOUBLE, "images/training/more/s3.jpg": b"", "annotations/training/s9.png": b""})
    listing = ade20k.list_scenes(root)
    items = ade20k.scene_items(listing, "training")
    assert [(item["name"], item["mask"].read()) for item in items] == [(name, ANNOTATIONS[name]) for name in ("s1", "s2")]
    ade20k.tell_unread(listing, items)
    assert capsys.readouterr().out == (
        f"Not read in {root}: 3 .png (such as annotations/training/s9.png), 1 .jpg (such as images/training/more/s3.jpg).\n"
    )
    (root / "images" / "validation" / "gone.jpg").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"gone\.jpg \(a link to /nowhere\) cannot be read"):
        ade20k.list_scenes(root)


def test_leftovers_in_a_zip_of_scenes_are_passed_over(tmp_path, capsys):
    files = scene_files(ANNOTATIONS)
    junk = {f"__MACOSX/ADEChallengeData2016/{name.replace('/s', '/._s')}": DOUBLE for name in files}
    junk |= {f"ADEChallengeData2016/{name.replace('/s', '/._s')}": DOUBLE for name in files}
    named = {f"ADEChallengeData2016/{name}": data for name, data in files.items()}
    listing = ade20k.list_scenes(zipped(tmp_path / "a.zip", {**junk, **named}, top=""))
    items = ade20k.scene_items(listing, "training")
    ade20k.tell_unread(listing, items)
    assert [item["name"] for item in items] == ["s1", "s2"] and capsys.readouterr().out == ""


def test_two_images_of_one_annotation_are_refused(tmp_path):
    root = class_tree(tmp_path, {**scene_files(ANNOTATIONS), "images/training/s1.png": b""})
    with pytest.raises(UserError, match="images/training has two images of one annotation: s1"):
        ade20k.scene_items(ade20k.list_scenes(root), "training")


def test_scene_classes_of_one_name_are_told_apart_by_their_numbers(tmp_path):
    root = class_tree(tmp_path, {**scene_files(ANNOTATIONS), "objectInfo150.txt": b"Idx\tName\n1\tscreen, door\n2\tsky\n3\tscreen\n"})
    assert ade20k.scene_classes(ade20k.list_scenes(root), 3) == ["screen (class 1)", "sky", "screen (class 3)"]
