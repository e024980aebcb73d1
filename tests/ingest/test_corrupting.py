"""Corruptions by hand, and their files in ImageNet-C's layout."""

import numpy as np
import pytest
from PIL import Image

from milan.data import records
from milan.ingest import corrupting
from milan.ingest.robustness import find_splits
from tests.conftest import write_split
from tests.layouts import WNIDS, encoded

GREY = np.full((48, 48, 3), 128, np.uint8)


def test_contrast_by_hand():
    image = np.array([[[80, 0, 10], [120, 200, 10]]], np.uint8)
    assert corrupting.faded(image, 0.5, None).tolist() == [[[90, 50, 10], [110, 150, 10]]]


def test_pixelation_by_hand():
    """Blocks of two pixels become their mean."""
    image = np.kron(np.array([[10, 30], [50, 90]], np.uint8), np.ones((2, 2), np.uint8))[..., None].repeat(3, axis=2)
    image[0, 0] = 50
    assert corrupting.pixelated(image, 0.5, None)[:, :, 0].tolist() == [[20, 20, 30, 30]] * 2 + [[50, 50, 90, 90]] * 2


def test_blur_by_hand():
    """A disk of one pixel: 1 at its centre, 0.5 beside it and 1.5 - sqrt(2) at the corners, which are 3.343 in all."""
    image = np.zeros((48, 48, 3), np.uint8)
    image[20, 30] = 255
    blurred = corrupting.defocused(image, 1 / 48, None)
    assert blurred[19:22, 29:32, 0].tolist() == [[7, 38, 7], [38, 76, 38], [7, 38, 7]] and (blurred[18] == 0).all()
    assert (corrupting.defocused(GREY, 2.5 / 48, None) == 128).all()


def test_jpeg_is_of_the_quality(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=25)
    assert (corrupting.compressed(image, 25, None) == np.asarray(Image.open(tmp_path / "a.jpg"))).all()


def test_noise_has_its_deviation_and_its_key():
    def noise(seed: int, severity: str, index: int) -> np.ndarray:
        images = {(name, level): image for name, level, image in corrupting.versions(GREY, seed, index)}
        return images["gaussian_noise", severity].astype(float) - 128

    first = noise(0, "3", 7)
    assert first.std() == pytest.approx(0.12 * 255, rel=0.03) and abs(first.mean()) < 1.5
    assert (first == noise(0, "3", 7)).all()
    for other in (noise(1, "3", 7), noise(0, "3", 8), noise(0, "4", 7) * 0.12 / 0.15):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05


def test_files_lie_in_the_layout_of_imagenet_c_for_any_number_of_processes(tmp_path, one_thread):
    """Two images of each class, cut out as in evaluation; the second class has one alone, and the third has none."""
    rows = [{"image": encoded(size=(64, 60), seed=i), "name": str(i), "label": label} for i, label in enumerate((0, 0, 1, 0))]
    splits = {"val": write_split(tmp_path / "records", "val", rows, 10)}
    records.write_manifest(tmp_path / "records", splits=splits, classes=["a", "b", "c"], wnids=WNIDS)
    val = records.Records(tmp_path / "records", "val")
    files = []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        assert corrupting.write_corrupted(root, val, 2, 0, (56, 48), processes) == {WNIDS[0]: 0, WNIDS[1]: 1}
        files.append({path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.JPEG")})
    assert files[0] == files[1] and len(files[0]) == 5 * 5 * 3
    splits = find_splits({"imagenet_c": tmp_path / "1"}, {WNIDS[0]: 0, WNIDS[1]: 1}, corrupting.STRENGTHS)
    items = splits["imagenet_c-jpeg_compression-5"].items()
    assert [(item["name"], item["label"]) for item in items] == [
        (f"{WNIDS[0]}/00000000.JPEG", 0), (f"{WNIDS[0]}/00000001.JPEG", 0), (f"{WNIDS[1]}/00000002.JPEG", 1),
    ]  # fmt: skip
    with Image.open(items[0]["image"].path) as image:
        assert image.size == (48, 48)


def test_a_class_s_name_leads_to_no_other_folder():
    """Names from a parquet file may be anything."""
    names = ["n01440764", "../../up", ".hidden", "a/b", "n01440764\n"]
    assert [corrupting.class_folder(name, label) for label, name in enumerate(names)] == ["n01440764", "1", "2", "3", "4"]
