"""Read the labels of ImageNet's validation images and the names of classes from the files that hold them."""

import csv
import io
import json
import os
from pathlib import Path, PurePosixPath

import numpy as np

from milan.core.errors import UserError
from milan.ingest.archives import regular, tar_texts, unreadable

DEVKIT, META, TRUTH = "ILSVRC2012_devkit_t12.tar.gz", "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
KAGGLE, LABELS = "LOC_val_solution.csv", "val_labels.txt"


def val_labels(root: Path) -> tuple[Path, dict[str, str]]:
    """Return the file with the labels of the validation images, and {image name without suffix: WordNet id}. Raises UserError
    when there is no such file or it cannot be read."""
    readers = {KAGGLE: kaggle_labels, LABELS: listed_labels, DEVKIT: devkit_labels}
    for name, reader in readers.items():
        if os.path.lexists(root / name):  # also a broken link, which its reader reports
            return root / name, reader(root / name)
    raise UserError(f"{root} does not say the classes of its validation images: put {DEVKIT}, {KAGGLE} or {LABELS} there.")


def kaggle_labels(path: Path) -> dict[str, str]:
    """Read Kaggle's table: {ImageId: WordNet id}, the first word of PredictionString."""
    rows = read_table(path, "ImageId", "PredictionString")
    return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}


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


def listed_labels(path: Path) -> dict[str, str]:
    """Read lines of an image's file name and its WordNet id: {name without suffix: WordNet id}."""
    rows = [line.split() for line in read_text(path).splitlines() if line.strip()]
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 2), None)
    if wrong:
        raise UserError(f"{path}: line {wrong} is not a file's name and a WordNet id.")
    return {PurePosixPath(name).stem: wnid for name, wnid in rows}


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
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f'{path} must be a JSON object of class folders and their names, such as {{"n01440764": "tench"}}.')
    return names


def class_names(root: Path, wnids: list[str]) -> list[str]:
    """Return the names of classes from root/classes.json or the devkit; a class without one keeps its WordNet id."""
    path, names = root / "classes.json", {}
    if os.path.lexists(path):
        names = read_class_names(path)
    elif (root / DEVKIT).exists():
        synsets = read_synsets(root / DEVKIT, *tar_texts(root / DEVKIT, META))
        names = {wnid: words.split(",")[0] for wnid, words in synsets.values()}
    return [names.get(wnid, wnid) for wnid in wnids]
