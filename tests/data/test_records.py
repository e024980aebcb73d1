"""Records: rows come back byte for byte, and a damaged file is named."""

import errno
import hashlib
import itertools
import json
import pickle
from pathlib import Path

import pandas
import pytest
from torch.utils.data import DataLoader

from milan.core.errors import UserError
from milan.data import records
from milan.data.records import Records
from tests.conftest import write_split

ROWS = [{"image": bytes([i]) * (i + 1), "name": f"n{i}", "label": i % 3, "caption": f"picture {i}"} for i in range(11)]


def write_records(folder: Path, rows=ROWS, shard_images: int = 4, split: str = "train") -> Path:
    """Write rows as the record set of one split, and return its folder."""
    entry = write_split(folder, split, rows, shard_images)
    records.write_manifest(folder, splits={split: entry}, classes=["a", "b", "c"])
    return folder


@pytest.mark.parametrize("shard_images, sizes", [(4, [4, 4, 3]), (11, [11]), (100, [11]), (1, [1] * 11)])
def test_round_trip(tmp_path, shard_images, sizes):
    split = Records(write_records(tmp_path, shard_images=shard_images), "train")
    assert [shard["images"] for shard in split.shards] == sizes
    assert len(split) == 11
    assert [split[i] for i in range(11)] == ROWS
    assert split.column("label") == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]
    assert split.column("name") == [f"n{i}" for i in range(11)]


def test_random_access_across_shards(tmp_path):
    split = Records(write_records(tmp_path), "train")
    for i in (10, 0, 3, 4, 7, 8, 3):
        assert split[i] == ROWS[i]
    for beyond in (11, -1):
        with pytest.raises(IndexError, match=f"record {beyond} of 11"):
            split[beyond]


def test_more_rows_than_a_batch_of_the_file(tmp_path):
    rows = [{"image": i.to_bytes(2, "big"), "name": str(i)} for i in range(600)]
    split = Records(write_records(tmp_path, rows, shard_images=500), "train")
    assert [split[i]["image"] for i in (0, 255, 256, 499, 500, 599)] == [
        i.to_bytes(2, "big") for i in (0, 255, 256, 499, 500, 599)
    ]


def test_masks_where_only_some_have_one(tmp_path):
    split = Records(write_records(tmp_path, [{"image": b"a", "name": "x", "mask": b"m"}, {"image": b"b", "name": "y"}]), "train")
    assert split.column("mask") == [b"m", None]
    assert split[1] == {"image": b"b", "name": "y", "mask": None}


def test_a_column_that_only_some_shards_have(tmp_path):
    rows = [{**row, "mask": b"m"} if number == 5 else row for number, row in enumerate(ROWS)]
    masks = Records(write_records(tmp_path, rows), "train").column("mask")
    assert masks == [None] * 5 + [b"m"] + [None] * 5


def test_the_manifest_tells_the_files_digests(tmp_path):
    write_records(tmp_path)
    shards = json.loads((tmp_path / "manifest.json").read_text())["splits"]["train"]["shards"]
    assert [shard["file"] for shard in shards] == ["train-00000.arrow", "train-00001.arrow", "train-00002.arrow"]
    for shard in shards:
        assert hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", *(s["file"] for s in shards)]


def test_equal_rows_give_equal_files(tmp_path):
    one, two = write_records(tmp_path / "one"), write_records(tmp_path / "two")
    assert [p.read_bytes() for p in sorted(one.iterdir())] == [p.read_bytes() for p in sorted(two.iterdir())]


def test_pandas_reads_a_shard(tmp_path):
    table = pandas.read_feather(write_records(tmp_path) / "train-00001.arrow")
    assert table["image"].tolist() == [row["image"] for row in ROWS[4:8]]
    assert table["label"].tolist() == [1, 2, 0, 1]
    assert table["caption"].tolist() == ["picture 4", "picture 5", "picture 6", "picture 7"]


def test_records_can_be_sent_to_a_worker(tmp_path):
    split = Records(write_records(tmp_path), "train")
    assert split[5] == ROWS[5]
    assert pickle.loads(pickle.dumps(split))[5] == ROWS[5]


def test_a_missing_manifest_is_refused(tmp_path):
    write_records(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json.*dvc repro"):
        Records(tmp_path, "train")


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="no split 'trian'; it has train"):
        Records(write_records(tmp_path), "trian")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"not arrow at all"), Path.unlink]
)
def test_a_damaged_shard_is_named_when_it_is_read(tmp_path, damage):
    split = Records(write_records(tmp_path), "train")
    damage(tmp_path / "train-00001.arrow")
    assert split[0] == ROWS[0]
    with pytest.raises(UserError, match="train-00001.arrow is damaged: it cannot be read"):
        split[4]


def test_an_error_among_the_rows_leaves_no_file(tmp_path):
    def failing():
        yield from ROWS[:300]
        raise UserError("the next")

    rows = [{"image": bytes(1000), "name": str(i)} for i in range(300)]
    with pytest.raises(UserError, match="the next"):
        records.write_shard(tmp_path / "train-00000.arrow", itertools.chain(rows, failing()), ["image", "name"])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_the_older_shard(tmp_path):
    """Linux's /dev/full takes the place of the half-written shard."""
    path = tmp_path / "train-00000.arrow"
    path.write_bytes(b"older")
    path.with_name(path.name + ".part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"disk that holds .*train-00000\.arrow is full"):
        records.write_shard(path, ROWS, ["image", "name", "label", "caption"])
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_another_disk_error_passes_unchanged(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "a broken disk")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="a broken disk"):
        records.write_shard(tmp_path / "train-00000.arrow", ROWS, ["image", "name"])
    assert list(tmp_path.iterdir()) == []


def test_files_that_the_manifest_does_not_list_are_removed(tmp_path):
    write_records(tmp_path, shard_images=6)
    for name in ("train-00002.arrow", "train-00000.seal", "val-00000.part"):
        (tmp_path / name).touch()
    records.drop_unlisted(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "train-00000.arrow", "train-00001.arrow"]


def test_classes_without_labels_are_refused(tmp_path):
    assert Records(write_records(tmp_path), "train").classes == ["a", "b", "c"]
    records.write_manifest(tmp_path, **{**records.read_manifest(tmp_path), "classes": []})
    with pytest.raises(UserError, match="has no labels.*`dvc repro pretrain segment dense_probe`"):
        Records(tmp_path, "train").classes  # noqa: B018


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "list", "keyless", "binary", "deep"])
def test_a_damaged_manifest_is_named(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged: it is no JSON object with splits\. Delete .* and run `dvc repro`"):
        records.Records(tmp_path, "train")


def test_an_edited_manifest_is_named(tmp_path):
    path = write_records(tmp_path) / "manifest.json"
    path.write_text(path.read_text().replace('"images": 4', '"images": 3', 1))
    with pytest.raises(UserError, match=r"manifest\.json is damaged: the digest"):
        records.Records(tmp_path, "train")


def read_all(folder: Path) -> list:
    """Return all that training reads of a split: its records, and two columns."""
    split = Records(folder, "train")
    return [[split[i] for i in range(len(split))], split.column("label"), split.column("caption")]


def test_any_flipped_byte_is_detected_and_its_file_named(tmp_path):
    """With one bit of each byte flipped in turn, an error names the file, or nothing depends on the byte."""
    rows = [{"image": bytes([i]) * 9, "mask": b"m" * i or None, "name": f"n{i}", "label": i, "caption": "red"} for i in range(3)]
    sound, refused = read_all(write_records(tmp_path, rows)), 0
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            try:
                assert read_all(tmp_path) == sound
            except UserError as error:
                assert str(path) in str(error)
                refused += 1
        path.write_bytes(whole)
    assert refused > 400


def test_a_flipped_byte_of_an_image_is_detected_when_it_is_read(tmp_path):
    write_records(tmp_path)
    path = tmp_path / "train-00002.arrow"
    path.write_bytes(path.read_bytes().replace(bytes([10]) * 11, bytes([10]) * 10 + b"!"))
    split = Records(tmp_path, "train")
    assert split[9] == ROWS[9]
    with pytest.raises(UserError, match=r"train-00002\.arrow is damaged: in record 2 the digest .*Delete .* and run `dvc repro` again"):
        split[10]


def test_a_loader_s_worker_raises_the_same_text(tmp_path):
    """Without torch's traceback before it."""
    write_records(tmp_path)
    path = tmp_path / "train-00000.arrow"
    path.write_bytes(path.read_bytes().replace(bytes([3]) * 4, bytes([3]) * 3 + b"!"))
    with pytest.raises(UserError) as caught:
        list(DataLoader(Records(tmp_path, "train"), batch_size=None, num_workers=1))
    assert str(caught.value).startswith(f"{path} is damaged: in record 3 the digest")
