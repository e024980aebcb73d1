"""What the classes of ImageNet's validation images are, and what classes are called, where folders do not say it."""

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
    """Where the labels stand, and {file name without its suffix: WordNet id}."""
    readers = {KAGGLE: kaggle_labels, LABELS: listed_labels, DEVKIT: devkit_labels}
    for name, reader in readers.items():
        if os.path.lexists(root / name):  # and be it a link to nothing, which is to be said
            return root / name, reader(root / name)
    raise UserError(f"{root} does not say the classes of its validation images: put {DEVKIT}, {KAGGLE} or {LABELS} there.")


def kaggle_labels(path: Path) -> dict[str, str]:
    """Columns ImageId and PredictionString, which begins with the WordNet id."""
    rows = table(path, "ImageId", "PredictionString")
    return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}


def table(path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises UserError unless every line has a value in each of these columns."""
    reader = csv.DictReader(io.StringIO(text(path), newline=""))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"{path} is no CSV table ({error}): look for a quote that is not closed.") from None
    lacking = not set(columns) <= set(reader.fieldnames or ()) or any(not (row[c] or "").strip() for row in rows for c in columns)
    if lacking or any(any(row.get(None, ())) for row in rows):  # None: what lies beyond the last column
        raise UserError(
            f"{path} must have the columns {' and '.join(columns)}, and a value of both in every line, in quotes where it holds a comma."
        )
    return rows


def listed_labels(path: Path) -> dict[str, str]:
    """Lines of a file's name and its WordNet id."""
    rows = [line.split() for line in text(path).splitlines() if line.strip()]
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != 2), None)
    if wrong:
        raise UserError(f"{path}: line {wrong} is not a file's name and a WordNet id.")
    return {PurePosixPath(name).stem: wnid for name, wnid in rows}


def text(path: Path) -> str:
    """Of a file in UTF-8. Raises UserError for any other, and when there is no such file."""
    try:
        return regular(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8: save it so.") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def devkit_labels(path: Path) -> dict[str, str]:
    """Line k of the ground truth is the ILSVRC2012_ID, which is no place in the order of WordNet ids, of image k."""
    meta, truth = tar_texts(path, META, TRUTH)
    known = synsets(path, meta)
    try:
        return {f"ILSVRC2012_val_{k:08d}": known[int(line)][0] for k, line in enumerate(truth.split(), 1)}
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: {TRUTH} names an id that {META} does not ({error}): fetch it again.") from None


def synsets(path: Path, meta: bytes) -> dict[int, tuple[str, str]]:
    """{ILSVRC2012_ID: (WordNet id, its words)} of a devkit's meta.mat."""
    import scipy.io  # for the devkit alone

    try:
        table = np.atleast_1d(scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        return {int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"])) for row in table}
    except Exception as error:  # the reader raises many kinds for broken files
        raise UserError(f"{path}: {META} cannot be read ({error}): fetch it again.") from None


def named_classes(path: Path) -> dict[str, str]:
    """{WordNet id: name} of a classes.json. Raises UserError for another form, such as Keras's."""
    try:
        known = json.loads(text(path))
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict) or not all(isinstance(name, str) for name in known.values()):
        raise UserError(f'{path} must be a JSON object of class folders and their names, such as {{"n01440764": "tench"}}.')
    return known


def class_names(root: Path, wnids: list[str]) -> list[str]:
    """Readable names where root/classes.json ({wnid: name}) or the devkit gives them, else the WordNet ids."""
    path, known = root / "classes.json", {}
    if os.path.lexists(path):
        known = named_classes(path)
    elif (root / DEVKIT).exists():
        known = {wnid: words.split(",")[0] for wnid, words in synsets(root / DEVKIT, *tar_texts(root / DEVKIT, META)).values()}
    return [known.get(wnid, wnid) for wnid in wnids]
