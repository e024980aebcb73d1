"""The robustness sets: labels by the names of their folders, and every missing or unknown folder in one error."""

from pathlib import Path

import pytest

from milan.core.errors import UserError
from milan.data.corruptions import ALEXNET_ERROR, CORRUPTIONS, EXTRA, SEVERITIES
from milan.ingest.robustness import find_splits
from tests.layouts import WNIDS, class_tree

LABELS = {wnid: label for label, wnid in enumerate(WNIDS)}


def corrupted(root: Path, names=tuple(ALEXNET_ERROR)) -> Path:
    return class_tree(root, {f"{name}/{s}/{wnid}/a.JPEG": f"{name} {s} {wnid}".encode() for name in names for s in SEVERITIES for wnid in WNIDS})


def contents(splits: dict, split: str) -> list[tuple]:
    return [(item["name"], item["label"], item["image"].read()) for item in splits[split].items()]


def test_folders_of_wordnet_ids_get_the_labels_of_the_training_set(tmp_path, capsys):
    """Of a subset of the classes too. What systems leave is passed over, at every depth, and other files are told."""
    files = {f"{wnid}/{name}.jpg": f"{wnid} {name}".encode() for wnid in (WNIDS[2], WNIDS[1]) for name in "ba"}
    left = {"._n01440764/x.jpg": b"", "__MACOSX/n01440764/x.jpg": b"", f"{WNIDS[1]}/._a.jpg": b"", f"{WNIDS[1]}/@eaDir/a.jpg": b""}
    splits = find_splits({"imagenet_r": class_tree(tmp_path, {**files, **left, "README.txt": b""})}, LABELS)
    n1, n2 = WNIDS[1:]
    assert contents(splits, "imagenet_r") == [
        (f"{n1}/a.jpg", 1, f"{n1} a".encode()), (f"{n1}/b.jpg", 1, f"{n1} b".encode()),
        (f"{n2}/a.jpg", 2, f"{n2} a".encode()), (f"{n2}/b.jpg", 2, f"{n2} b".encode()),
    ]  # fmt: skip
    assert capsys.readouterr().out == f"Not read in {tmp_path}: 1 .txt (such as README.txt).\n"


def test_folders_of_v2_are_numbers(tmp_path):
    """In the order of the names "10" would be the third class."""
    labels = {f"n{label:08d}": label for label in range(12)}
    root = class_tree(tmp_path, {f"{label}/a.jpeg": str(label).encode() for label in range(12)})
    splits = find_splits({"imagenet_v2": root}, labels)
    assert contents(splits, "imagenet_v2") == [(f"{label}/a.jpeg", label, str(label).encode()) for label in range(12)]


def test_imagenet_c_has_a_split_for_each_corruption_and_severity(tmp_path):
    """Flat, or in folders of corruptions as its tars are named; the four extra ones may be there."""
    flat = find_splits({"imagenet_c": corrupted(tmp_path / "flat", CORRUPTIONS)}, LABELS)
    assert list(flat) == [f"imagenet_c-{name}-{severity}" for name in CORRUPTIONS for severity in SEVERITIES] and len(flat) == 19 * 5
    assert contents(flat, "imagenet_c-snow-4")[1] == (f"{WNIDS[1]}/a.JPEG", 1, f"snow 4 {WNIDS[1]}".encode())
    for name in ALEXNET_ERROR:
        corrupted(tmp_path / "grouped" / ("noise" if "noise" in name else "rest"), [name])
    grouped = find_splits({"imagenet_c": tmp_path / "grouped"}, LABELS)
    assert list(grouped) == [split for split in flat if split.split("-")[1] not in EXTRA]
    assert contents(grouped, "imagenet_c-shot_noise-2") == contents(flat, "imagenet_c-shot_noise-2")


def test_all_faults_of_all_sets_are_in_one_error(tmp_path):
    files = {
        "a": [f"{WNIDS[0]}/x.jpg", "n99999999/x.jpg"],
        "sketch": [f"{WNIDS[0]}/x.jpg", f"{WNIDS[2]}/x.jpg"],
        "v2": ["0/x.jpg", "2/x.jpg", "3/x.jpg"],
        "empty": ["note.txt"],
    }
    paths = {name: class_tree(tmp_path / name, dict.fromkeys(some, b"")) for name, some in files.items()}
    c = corrupted(tmp_path / "c", [name for name in ALEXNET_ERROR if name not in ("fog", "frost")])
    class_tree(c, {"gravel/1/x/a.jpg": b"", f"snow/6/{WNIDS[0]}/a.jpg": b"", "snow/1/n7/a.jpg": b""})
    (c / "contrast/2").rename(tmp_path / "away")
    class_tree(c, {f"noise/pixelate/1/{WNIDS[0]}/a.jpg": b""})
    given = {"imagenet_a": paths["a"], "imagenet_sketch": paths["sketch"], "imagenet_v2": paths["v2"], "imagenet_r": paths["empty"]}
    with pytest.raises(UserError) as error:
        find_splits({**given, "imagenet_c": c}, LABELS)
    said = str(error.value)
    expected = [
        f"{paths['a']} has unknown classes n99999999",
        f"{paths['sketch']} lacks the classes {WNIDS[1]}",
        f"{paths['v2']} lacks the classes 1; {paths['v2']} has unknown classes 3",
        f"{paths['empty']} has 0 of the 200 class folders",
        f"{c} lacks the corruptions frost, fog",
        f"{c}/gravel/1 is no corruption of ImageNet-C",
        f"{c}/snow has unknown severities 6",
        f"{c}/snow/1 has unknown classes n7",
        f"{c}/contrast lacks the severities 2",
        f"{c}/pixelate is also in {c}/noise",
    ]
    assert [words for words in expected if words not in said] == [], said


def test_a_subset_of_imagenet_has_200_classes(tmp_path):
    labels = {f"n{label:08d}": label for label in range(1000)}
    root = class_tree(tmp_path, {f"n{label:08d}/a.jpg": b"" for label in range(0, 995, 5)})
    with pytest.raises(UserError, match="has 199 of the 200 class folders that are published"):
        find_splits({"imagenet_a": root}, labels)
    class_tree(root, {"n00000999/a.jpg": b""})
    assert len(find_splits({"imagenet_a": root}, labels)["imagenet_a"].items()) == 200


def test_a_class_folder_without_images_is_named(tmp_path):
    root = class_tree(tmp_path, {f"{wnid}/{'a.txt' if label == 1 else 'a.jpg'}": b"" for wnid, label in LABELS.items()})
    with pytest.raises(UserError, match=rf"1 class folder\(s\) hold no image: {WNIDS[1]}"):
        find_splits({"imagenet_sketch": root}, LABELS)["imagenet_sketch"].items()
