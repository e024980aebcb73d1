"""The layouts in which data sets come: checked files in, rows for the records out.

Every image is opened and decoded once here, so that a broken one is found in minutes rather than in the middle
of a night's training; all broken ones are listed together.
"""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from milan.errors import UserError
from milan.progress import track
from milan.records import chunks
from milan.workers import ordered

IMAGES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
LISTED = 20


def image_folder(root: Path, split: str) -> list[dict]:
    """root/split/<class>/<file> -> items {"path", "name", "label"}; classes in the order of their folders' names
    (for ImageNet: by WordNet id)."""
    folder = existing(root / split, f"expected {root} to hold train/ and val/ with a folder a class")
    items, empty = [], []
    for label, wnid in enumerate(class_folders(folder)):
        found = [path for path in sorted((folder / wnid).iterdir()) if path.suffix.lower() in IMAGES]
        items += [{"path": path, "name": f"{wnid}/{path.name}", "label": label} for path in found]
        empty += [] if found else [wnid]
    if not items:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(IMAGES))}) in class folders.")
    if empty:
        raise UserError(f"{len(empty)} class folder(s) of {folder} hold no image, the first is {empty[0]}. Fill or remove them.")
    return items


def class_folders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir())


def same_classes(root: Path) -> list[str]:
    """The class folders of root/train; UserError unless root/val has just these, since labels are places in the list."""
    train, val = (class_folders(root / split) for split in ("train", "val"))
    if train != val:
        odd = [
            f"{split} has {', '.join(some[:5])}{' ...' if len(some) > 5 else ''} alone"
            for split, some in (("train", sorted(set(train) - set(val))), ("val", sorted(set(val) - set(train))))
            if some
        ]
        raise UserError(f"{root}/train and {root}/val must have the same class folders: {'; '.join(odd)}.")
    if len(train) < 2:
        raise UserError(f"{root}/train has one class folder; at least two are needed to tell classes apart.")
    return train


def caption_pairs(root: Path) -> list[dict]:
    """root/pairs/captions.csv with columns file, caption -> items {"path", "name", "caption"}; none when absent."""
    table = root / "pairs" / "captions.csv"
    if not table.exists():
        return []
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(not row.get("file") or not row.get("caption") for row in rows):
        raise UserError(f"{table} must have the columns file and caption, and a value of both in every line.")
    return [{"path": table.parent / row["file"], "name": row["file"], "caption": row["caption"]} for row in rows]


def class_captions(items: list[dict], names: list[str], most: int) -> list[dict]:
    """Up to `most` of an image folder's items, evenly spread, captioned with the names of their classes."""
    chosen = items[:: max(1, -(-len(items) // most))]
    return [{"path": i["path"], "name": i["name"], "caption": f"a photo of a {names[i['label']]}"} for i in chosen]


def with_object_masks(root: Path, items: list[dict]) -> list[dict]:
    """Add "mask_path" to the val items whose object's pixels are known (root/val_objects/<stem>.png, 255 = object)."""
    masks = {path.stem: path for path in (root / "val_objects").glob("*.png")}
    return [{**item, "mask_path": masks[item["path"].stem]} if item["path"].stem in masks else item for item in items]


def scene_classes(root: Path, classes: int) -> list[str]:
    """Names from root/objectInfo.txt or objectInfo150.txt (tab separated, a header, the name last or second), else numbers."""
    for name in ("objectInfo.txt", "objectInfo150.txt"):
        if (root / name).exists():
            lines = (root / name).read_text().splitlines()[1:]
            found = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
            if len(found) == classes:
                return found
    return [f"class {k}" for k in range(1, classes + 1)]


def class_names(root: Path, wnids: list[str]) -> list[str]:
    """Readable names where root/classes.json gives them, else the folders' names."""
    path = root / "classes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    return [known.get(wnid, wnid) for wnid in wnids]


def scene_folder(root: Path, split: str) -> list[dict]:
    """ADEChallengeData2016: images/<split>/*.jpg with annotations/<split>/*.png -> items {"path", "mask_path", "name"}."""
    folder = existing(root / "images" / split, f"expected {root} to be ADEChallengeData2016, with images/ and annotations/")
    items, missing = [], []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGES:
            continue
        mask = root / "annotations" / split / f"{path.stem}.png"
        (items if mask.exists() else missing).append({"path": path, "mask_path": mask, "name": path.stem})
    if missing:
        raise UserError(f"{len(missing)} scenes have no annotation, the first is {missing[0]['mask_path']}.")
    if not items:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(IMAGES))}).")
    return items


def refuse_too_few(needs: dict[str, tuple[int, int]], processes: int) -> None:
    """needs: {stage: (images of one global batch, images there are)}. Raises one UserError that names all stages whose
    batch is too large, and the options that mend it."""
    short = {stage: there for stage, (batch, there) in needs.items() if batch > there}
    if not short:
        return
    options = []
    for stage, there in short.items():
        micro = 2 ** max(0, (max(1, there // processes)).bit_length() - 1)
        options += [f"-S {stage}.batch_size={micro * processes}", f"-S {stage}.micro_batch={micro}"]
    said = ", ".join(f"{stage} takes {needs[stage][0]} images a step and has {there}" for stage, there in short.items())
    raise UserError(f"Too few images for the recipe's batches: {said}. Add images, or {' '.join(options)}.")


def existing(folder: Path, hint: str) -> Path:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing: {hint}. Give the right folder (-S data.imagenet=/path, -S data.ade20k=/path), or null for the "
            "built-in world."
        )
    return folder


def rows(items: list[dict], name: str, processes: int, short_side: int | None = None, classes: int = 255) -> Iterator[dict]:
    """Items as record rows, read and checked by several processes, in order; raises one UserError that lists
    every unreadable file at the end. classes: the largest annotation value allowed in masks."""
    broken = []
    jobs = chunks(((item, short_side, classes) for item in items), 64)
    with closing(ordered(read_jobs, jobs, processes)) as results:
        for row, fault in track((result for some in results for result in some), name, len(items)):
            if fault:
                broken.append(fault)
            else:
                yield row
    if broken:
        more = f" and {len(broken) - LISTED} more" if len(broken) > LISTED else ""
        raise UserError(
            f"{len(broken)} of {len(items)} files cannot be used: {'; '.join(broken[:LISTED])}{more}. Mend or remove them and run again."
        )


def read_jobs(jobs: list[tuple]) -> list[tuple]:
    return [read_job(job) for job in jobs]


def read_job(job: tuple[dict, int | None, int | None]) -> tuple[dict | None, str | None]:
    """(row, None), or (None, what is wrong with the file)."""
    item, short_side, classes = job
    row = {key: value for key, value in item.items() if key not in ("path", "mask_path")}
    path = item["path"]
    try:
        row["image"] = checked_image(path, short_side)
        if "mask_path" in item:
            path = item["mask_path"]
            row["mask"] = checked_mask(path, row["image"], classes)
    except UnidentifiedImageError:
        return None, f"{path} (no image)"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return None, f"{path} ({error or type(error).__name__})"
    return row, None


def checked_image(path: Path, short_side: int | None) -> bytes:
    """The file's bytes, verbatim, once they have proved to decode; re-encoded only when they are to be shrunk."""
    data = path.read_bytes()
    if not data:
        raise ValueError("empty file")
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if short_side is None or min(image.size) <= short_side:
            return data
        factor = short_side / min(image.size)
        size = tuple(max(short_side, round(side * factor)) for side in image.size)
        out = io.BytesIO()
        image.convert("RGB").resize(size, Image.BICUBIC, reducing_gap=3.0).save(out, "JPEG", quality=92, subsampling=0)
        return out.getvalue()


def has_labels(mask: bytes) -> bool:
    """Whether any pixel of an annotation is of a class, neither 0 nor 255."""
    with Image.open(io.BytesIO(mask)) as image:
        return bool((np.asarray(image) % 255).any())


def checked_mask(path: Path, image: bytes, classes: int) -> bytes:
    data = path.read_bytes()
    if not data:
        raise ValueError("empty file")
    with Image.open(io.BytesIO(data)) as mask, Image.open(io.BytesIO(image)) as picture:
        if mask.mode not in ("L", "P"):
            raise ValueError(f"annotation of mode {mask.mode}, expected one 8-bit channel")
        if mask.size != picture.size:
            raise ValueError(f"annotation of {mask.size} for an image of {picture.size}")
        strange = set(np.unique(np.asarray(mask)).tolist()) - set(range(classes + 1))
    if strange:
        raise ValueError(f"annotation value {min(strange)} with {classes} classes")
    return data
