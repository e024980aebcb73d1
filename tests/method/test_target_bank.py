"""The target bank: written views are read back, views follow from their keys, and a disk that is too small is refused first."""

import io
import resource
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from milan.core.errors import UserError
from milan.data import records, seeding, transforms
from milan.data.records import Records
from milan.method import target_bank
from milan.method.samples import BankViews, PretrainSamples
from milan.method.target_bank import Bank
from stages.extract_targets import object_shares
from tests.conftest import forked, write_split

IMAGES, VIEWS, N, D, SHARD = 5, 3, 4, 2, 2
SIDE = 64


def sentinel(image: int, view: int, token: int, channel: int) -> float:
    """Return a number of its own for every place, exact in float16."""
    return 8.0 * (image * VIEWS + view) + token + channel / 4


def box(image: int, view: int) -> list[int]:
    return [image, view, 16 + image, 16 + view, (image + view) % 2]


def write_bank(folder, shard: int = SHARD, first: float = 0) -> None:
    """Write a bank of sentinels. first: added to the very first feature."""
    for number, start in enumerate(range(0, IMAGES, shard)):
        span = range(start, min(start + shard, IMAGES))
        features = [[[[sentinel(i, v, t, c) for c in range(D)] for t in range(1 + N)] for v in range(VIEWS)] for i in span]
        features[0][0][0][0] += first if number == 0 else 0
        importance = [[[i + v / 10 + t / 100 for t in range(N)] for v in range(VIEWS)] for i in span]
        boxes = [[box(i, v) for v in range(VIEWS)] for i in span]
        kinds = (np.float16, np.float32, np.int32)
        arrays = {n: np.array(a, k) for n, a, k in zip(target_bank.ARRAYS, (features, importance, boxes), kinds, strict=True)}
        assert not target_bank.has_shard(folder, number)
        target_bank.write_shard(folder, number, arrays)
        assert target_bank.has_shard(folder, number)
    target_bank.finish(folder, views=VIEWS, shard_images=shard, feature_dim=D, images=IMAGES)


@pytest.fixture
def bank(tmp_path) -> Bank:
    write_bank(tmp_path / "bank")
    return Bank(tmp_path / "bank")


def test_the_files_are_those_of_np_save(bank, tmp_path):
    for name in (*target_bank.FILES,):
        np.save(tmp_path / "plain.npy", np.load(bank.file(name, 0)))
        assert bank.file(name, 0).read_bytes() == (tmp_path / "plain.npy").read_bytes()


def test_a_disk_that_fills_up_within_a_shard_is_said(tmp_path):
    """np.save itself would raise an OSError that does not tell why."""

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        with pytest.raises(UserError, match="features-00000.npy would be larger than a file may be here"):
            write_bank(tmp_path / "bank")
        assert list((tmp_path / "bank").iterdir()) == []

    assert forked(write) == 0


def test_every_view_of_every_image_comes_back(bank):
    for image in range(IMAGES):
        for view in range(VIEWS):
            crop, features, importance = bank[view, image]
            *place, flip = box(image, view)
            assert crop == (*place, bool(flip)) and isinstance(crop[-1], bool)
            assert features.tolist() == [[sentinel(image, view, t, c) for c in range(D)] for t in range(1 + N)]
            assert importance.tolist() == pytest.approx([image + view / 10 + t / 100 for t in range(N)], abs=1e-6)
    assert (bank.views, bank.feature_dim, features.dtype, importance.dtype) == (VIEWS, D, torch.float16, torch.float32)


def test_the_size_is_that_of_the_arrays_on_the_disk(bank):
    """5 images x 3 views x (5 tokens x 2 numbers x 2 bytes + 4 patches x 4 bytes + 5 numbers x 4 bytes + 3 CRC-32) = 1020 bytes."""
    assert target_bank.bank_bytes(IMAGES, VIEWS, N, D) == 1020
    written = sum(array.nbytes for number in range(3) for array in (bank.array(name, number) for name in target_bank.FILES))
    assert written == 1020
    assert target_bank.bank_bytes(1_281_167, 1, 196, 512) == 1_281_167 * (197 * 1024 + 784 + 20 + 12)


def test_only_whole_files_lie_under_final_names(bank):
    kept = {path.name for path in bank.folder.iterdir()}
    assert kept == {"bank.json", *(f"{name}-{number:05d}.npy" for name in target_bank.FILES for number in range(3))}


def test_the_digest_is_of_the_content(bank, tmp_path):
    """The size of the shards does not change it; other features of the same shape do."""
    write_bank(tmp_path / "other shards", shard=3)
    write_bank(tmp_path / "other feature", first=0.25)
    same, other = (target_bank.content_digest(tmp_path / name) for name in ("other shards", "other feature"))
    assert same == target_bank.content_digest(bank.folder) != other


def test_a_view_follows_from_seed_view_and_image_alone():
    drawn = transforms.draw_crop(50, 60, [0.2, 1.0], seeding.generator(7, "view", 2, 11))
    assert target_bank.view_box(7, 2, 11, 50, 60, [0.2, 1.0]) == drawn
    keys = [(7, 2, 11), (7, 2, 12), (7, 3, 11), (8, 2, 11), (7, 11, 2)]
    assert len({target_bank.view_box(*key, 50, 60, [0.2, 1.0]) for key in keys}) == len(keys)


def image_records(folder) -> Records:
    """Write pictures that encode positions: red grows with x, green with y; blue is 40 times the index."""
    rows = []
    for index in range(IMAGES):
        y, x = np.mgrid[:SIDE, :SIDE].astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(np.stack([x * 3, y * 3, np.full_like(x, 40 * index)], axis=-1)).save(out, "PNG")
        rows.append({"image": out.getvalue(), "name": str(index), "label": index})
    records.write_manifest(folder, splits={"train": write_split(folder, "train", rows, 3)}, classes=list("abcdefgh")[:IMAGES])
    return Records(folder, "train")


def test_bank_views_are_the_boxes_cut_out_image_by_image(tmp_path):
    views = BankViews(image_records(tmp_path), range(2, 5), VIEWS, seed=1, size=16, crop_scale=[0.3, 1.0])
    assert len(views) == 9
    for item in range(9):
        image, view = 2 + item // VIEWS, item % VIEWS
        sample = views[item]
        top, left, height, width, flip = sample["box"].tolist()
        assert (top, left, height, width, bool(flip)) == target_bank.view_box(1, view, image, SIDE, SIDE, [0.3, 1.0])
        assert sample["image"][2].float().mean() == 40 * image
        across = torch.linspace(left + width / 32 - 0.5, left + width - width / 32 - 0.5, 16) * 3
        assert (sample["image"][0, 8].float() - (across.flip(0) if flip else across))[2:-2].abs().max() < 2.5


def test_pretraining_uses_view_e_mod_v_with_its_targets(tmp_path, bank):
    samples = PretrainSamples(image_records(tmp_path / "records"), 0, 16, N, [0.2, 1.0], bank)
    for epoch, image in ((0, 0), (1, 4), (2, 3), (3, 3), (7, 2)):
        sample, view = samples[epoch, image], epoch % VIEWS
        assert sample["features"][1, 0] == sentinel(image, view, 1, 0)
        assert sample["importance"][0].item() == pytest.approx(image + view / 10)
        *place, flip = box(image, view)
        expected = transforms.crop(transforms.decode(samples.records[image]["image"]), (*place, bool(flip)), 16)
        assert torch.equal(sample["image"], expected)
    assert not torch.equal(samples[0, 3]["noise"], samples[3, 3]["noise"])
    assert torch.equal(samples[3, 3]["noise"], samples[3, 3]["noise"])


def test_without_a_bank_every_epoch_has_a_new_crop(tmp_path):
    samples = PretrainSamples(image_records(tmp_path), 0, 16, N, [0.2, 0.5], None)
    first, again, second = samples[0, 1], samples[0, 1], samples[1, 1]
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], second["image"])
    assert sorted(first) == ["image", "noise"]


Usage = namedtuple("Usage", "total used free")


def test_a_bank_too_big_for_the_disk_is_refused_before_it_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10e9, 9e9, 1e9))
    target_bank.refuse_when_too_big(tmp_path / "not" / "there", 10**9)
    assert "1.0 GB to write, 1.0 GB free" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"needs 2.5 GB .* has 1.0 GB free.*extract_targets.views"):
        target_bank.refuse_when_too_big(tmp_path / "bank", 2_500_000_000)
    assert "2.5 GB to write" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"needs 3.0 MB .* has 0.2 MB free"):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1e6, 8e5, 2e5))
        target_bank.refuse_when_too_big(tmp_path / "bank", 3_000_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", target_bank.FILES)
def test_any_flipped_byte_of_a_view_is_found_and_its_file_named(bank, name):
    path = bank.folder / f"{name}-00001.npy"
    whole = path.read_bytes()
    row = (len(whole) - 128) // SHARD  # numpy's header has 128 bytes; shard 1 holds images 2 and 3
    for place in range(128, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        changed, same = (2, 3) if place < 128 + row else (3, 2)
        fresh = Bank(bank.folder)
        assert [fresh[view, same][0] for view in range(VIEWS)] == [bank[view, same][0] for view in range(VIEWS)]
        file = r"\w+" if name == "crc" else name  # a CRC-32 does not tell which of the two files has changed
        with pytest.raises(UserError, match=rf"{file}-00001\.npy is damaged: of row {changed - 2}, view \d the digest"):
            [fresh[view, changed] for view in range(VIEWS)]


def test_a_flipped_byte_of_a_bank_s_header_is_found(bank):
    path = bank.folder / "features-00000.npy"
    whole, features = path.read_bytes(), bank[0, 1][1]
    for place in range(128):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert torch.equal(Bank(bank.folder)[0, 1][1], features)
        except UserError as error:
            assert str(path) in str(error)


def test_an_edited_index_is_named(bank):
    path = bank.folder / "bank.json"
    path.write_text(path.read_text().replace('"shard_images": 2', '"shard_images": 1'))
    with pytest.raises(UserError, match=r"bank\.json is damaged: the digest"):
        Bank(bank.folder)


def test_an_unfinished_bank_is_named(tmp_path):
    write_bank(tmp_path)
    (tmp_path / "bank.json").unlink()
    with pytest.raises(UserError, match="no complete target bank.*dvc repro"):
        Bank(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"\x93NUMPY cut"])
def test_a_damaged_shard_is_named(bank, content):
    path = bank.folder / "importance-00001.npy"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert bank[0, 0][1][0, 0] == 0
    with pytest.raises(UserError, match="importance-00001.npy is damaged: it cannot be read"):
        bank[0, 2]


def test_a_bank_that_holds_a_pickle_is_not_opened(bank):
    class Malice:
        def __reduce__(self):
            return (np.save, (str(bank.folder / "harm"), np.zeros(1)))

    np.save(bank.folder / "features-00000.npy", np.array([Malice()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="features-00000.npy"):
        bank[0, 0]
    assert not (bank.folder / "harm.npy").exists()


def test_a_damaged_index_of_the_bank_is_named(tmp_path):
    (tmp_path / "bank.json").write_text('{"views": 4}')
    with pytest.raises(UserError, match=r"bank\.json is damaged: it is no JSON object with views, shard_images, feature_dim"):
        target_bank.Bank(tmp_path)


def test_an_index_of_another_kind_is_named(tmp_path):
    (tmp_path / "bank.json").write_text('{"views": "4", "shard_images": 8, "feature_dim": 3}')
    with pytest.raises(UserError, match="bank.json is damaged"):
        target_bank.Bank(tmp_path)


def test_the_importance_on_objects_by_hand():
    """Three images of two patches. Importance on the object: 3 of 4, 1 of 4, half of 2 of 4 (75, 25, 25 %). Area: 50, 50, 25 %."""
    importance = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    cover = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    assert object_shares(importance, cover) == pytest.approx(
        {
            "extract_targets/importance_on_object": 125 / 3,
            "extract_targets/object_area": 125 / 3,
            "extract_targets/importance_above_area": 100 / 3,  # an equal share is not above
        }
    )
