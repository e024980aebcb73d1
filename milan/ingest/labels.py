"""Read the labels of ImageNet's validation images and the names of classes from the files that hold them."""

import csv
import io
import json
import os
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from milan.core.errors import UserError, listed
from milan.core.validation import is_text
from milan.ingest.archives import regular, tar_texts, unreadable

DEVKIT, META, TRUTH = "ILSVRC2012_devkit_t12.tar.gz", "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
KAGGLE, LABELS, TINY = "LOC_val_solution.csv", "val_labels.txt", "val/val_annotations.txt"
TABLES = (KAGGLE, LABELS, TINY, DEVKIT)  # files with the labels of validation images, the first that is there counts


def label_table(root: Path) -> str | None:
    """Return the name of the file with the labels of the validation images; None without one."""
    return next((name for name in TABLES if os.path.lexists(root / name)), None)  # also a broken link, which its reader reports


def val_labels(root: Path) -> tuple[Path, dict[str, str]]:
    """Return the file with the labels of the validation images, and {image name without suffix: WordNet id}. Raises UserError
    when there is no such file or it cannot be read."""
    readers = {KAGGLE: kaggle_labels, LABELS: listed_labels, TINY: tiny_labels, DEVKIT: devkit_labels}
    name = label_table(root)
    if name is None:
        raise UserError(f"{root} does not say the classes of its validation images: put {DEVKIT}, {KAGGLE} or {LABELS} there.")
    return root / name, readers[name](root / name)


def kaggle_labels(path: Path) -> dict[str, str]:
    """Read Kaggle's table: {ImageId: WordNet id}, the first word of PredictionString."""
    rows = read_table(path, "ImageId", "PredictionString")
    return one_label_each(path, [(row["ImageId"], row["PredictionString"].split()[0]) for row in rows])


def one_label_each(path: Path, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Return {name: WordNet id} of pairs. Raises UserError for a name with two different ids."""
    labels: dict[str, str] = {}
    if twice := [name for name, wnid in pairs if labels.setdefault(name, wnid) != wnid]:
        raise UserError(f"{path} gives an image two classes: {listed(twice)} (names count without their suffix). Mend it.")
    return labels


def read_table(path: Path, *columns: str) -> list[dict[str, str]]:
    """Read the rows of a CSV file. Raises UserError unless every line has a value in each of these columns."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{path} is no CSV table ({error}): look for a quote that is not closed.") from None
    incomplete = not set(columns) <= set(reader.fieldnames or ())
    incomplete = incomplete or any(not (row[column] or "").strip() for row in rows for column in columns)
    if incomplete or any(any(row.get(None, ())) for row in rows):  # None: values beyond the last column
        raise UserError(
            f"{path} must have the columns {' and '.join(columns)}, and values for both in every line, in quotes where they "
            "hold a comma."
        )
    return rows


def listed_labels(path: Path, more: int = 0) -> dict[str, str]:
    """Read lines of an image's file name, its WordNet id and `more` other words: {name without suffix: WordNet id}."""
    rows = [line.split() for line in read_text(path).splitlines() if line.strip()]
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 2 + more), None)
    if wrong:
        raise UserError(f"{path}: line {wrong} is not a file's name and a WordNet id.")
    return one_label_each(path, [(PurePosixPath(name).stem, wnid) for name, wnid, *_ in rows])


def tiny_labels(path: Path) -> dict[str, str]:
    """Read Tiny ImageNet's table, whose lines end with the four numbers of a box."""
    return listed_labels(path, more=4)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8. Raises UserError for another encoding and for a file that cannot be read."""
    try:
        return regular(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8: save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def devkit_labels(path: Path) -> dict[str, str]:
    """Read the devkit: {name without suffix: WordNet id}. Line k of the ground truth is the ILSVRC2012_ID of image k; these ids
    are not in the order of WordNet ids."""
    meta, truth = tar_texts(path, META, TRUTH)
    synsets = read_synsets(path, meta)
    try:
        return {f"ILSVRC2012_val_{number:08d}": synsets[int(line)][0] for number, line in enumerate(truth.split(), 1)}
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: {TRUTH} names an id that {META} does not ({error}): fetch it again.") from None


def read_synsets(path: Path, meta: bytes) -> dict[int, tuple[str, str]]:
    """Read a devkit's meta.mat: {ILSVRC2012_ID: (WordNet id, words)}. Raises UserError when it cannot be read."""
    import scipy.io  # needed by the devkit alone

    try:
        table = np.atleast_1d(scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        return {int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"])) for row in table}
    except Exception as error:  # the reader raises many kinds for broken files
        raise UserError(f"{path}: {META} cannot be read ({error}): fetch it again.") from None


def read_class_names(path: Path) -> dict[str, str]:
    """Read a classes.json: {class folder: name}. Raises UserError for another form, such as Keras's."""
    try:
        names = json.loads(read_text(path))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, dict) or not all(isinstance(name, str) and is_text(name) for name in names.values()):
        raise UserError(f'{path} must be a JSON object of class folders and their names, such as {{"n01440764": "tench"}}.')
    return names


def class_names(root: Path, wnids: list[str]) -> list[str]:
    """Return the names of classes from root/classes.json or the devkit, each one once; a class without one keeps its WordNet
    id."""
    path, names = root / "classes.json", {}
    if os.path.lexists(path):
        names = read_class_names(path)
    elif (root / DEVKIT).exists():
        synsets = read_synsets(root / DEVKIT, *tar_texts(root / DEVKIT, META))
        names = {wnid: words.split(",")[0] for wnid, words in synsets.values()}
    return distinct([names.get(wnid, wnid).strip() or wnid for wnid in wnids], wnids, path)


def distinct(names: list[str], keys: list[str], path: Path) -> list[str]:
    """Return the names, with its key behind each that several classes share: ImageNet has two classes "crane". Raises UserError
    naming the path where that does not tell them apart."""
    counts = Counter(names)
    names = [f"{name} ({key})" if counts[name] > 1 else name for name, key in zip(names, keys, strict=True)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path} gives two classes the name {listed(twice)}: give each class a name of its own.")
    return names
