"""Read the layouts in which image sets are published, as items for the records. Nothing is decoded here.

An item is a row of the records with places (see archives.py) instead of bytes: {"image", "name"[, "label"][, "caption"]
[, "mask"]}. A label is the index of its class in the order of WordNet ids.
"""

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from milan.core.errors import UserError
from milan.core.progress import track
from milan.ingest.archives import File, ParquetRow, Place, list_files, parquet_rows, tar_members
from milan.ingest.labels import DEVKIT, KAGGLE, LABELS, class_names, read_table, val_labels

IMAGES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
HELD_OUT = 50  # without a val/, every 50th image is held out for validation
LAYOUTS = (
    f"train/ and val/ with a folder a class; {TRAIN_TAR} and {VAL_TAR} with {DEVKIT}, {KAGGLE} or {LABELS}; "
    "train-*.parquet and val*-*.parquet; or images in any folders, without labels"
)


@dataclasses.dataclass(frozen=True)
class Images:
    """An image set: the items of its splits, and its classes. Without labels wnids and classes are empty."""

    train: list[dict]
    val: list[dict]
    wnids: list[str]
    classes: list[str]


def read_images(root: Path) -> Images:
    """Read the set in a folder of one of LAYOUTS. Raises UserError that names the fault for any other folder."""
    if require_path(root, f"expected {LAYOUTS}").is_file():
        raise UserError(f"{root} is a file: data.imagenet names the folder that holds it. Expected {LAYOUTS}.")
    tables = {split: parquet_files(root, split) for split in ("train", "val")}
    if os.path.lexists(root / TRAIN_TAR):  # also a broken link, which from_tars reports
        return from_tars(root)
    if tables["train"]:
        return from_parquet(root, tables)
    if class_folders(root / "train"):
        return from_class_folders(root)
    return from_unlabelled(root)


def from_tars(root: Path) -> Images:
    """Read the tars of ILSVRC2012: one of training with a tar for each class, and a flat one of validation, whose labels are in
    another file."""
    outer, train, broken = root / TRAIN_TAR, [], []
    members = [member for member in tar_members(outer) if re.fullmatch(r"(./)?n\d+\.tar", member.name)]
    members.sort(key=lambda member: PurePosixPath(member.name).stem)
    wnids = [PurePosixPath(member.name).stem for member in members]
    for label, member in enumerate(track(members, f"indexing {TRAIN_TAR} (classes)", len(members))):
        try:
            train += class_items(wnids[label], label, tar_members(outer, member))
        except UserError as error:
            broken.append(str(error))
    if broken:
        raise UserError(" ".join(broken[:20]))
    refuse_empty_classes(outer, wnids, train)
    if not os.path.lexists(root / VAL_TAR):
        raise UserError(f"{root} holds {TRAIN_TAR} and no {VAL_TAR}: put it there too.")
    return Images(train, flat_val(root, tar_members(root / VAL_TAR), wnids), wnids, class_names(root, wnids))


def from_class_folders(root: Path) -> Images:
    """Read train/<class>/<file> with val/<class>/<file>, or with a flat val/ whose labels are in another file."""
    train, wnids = image_folder(root, "train"), class_folders(root / "train")
    val = require_path(root / "val", f"expected {LAYOUTS}")
    if val.is_file():
        raise UserError(f"{val} is a file: make it the folder of the validation images. Expected {LAYOUTS}.")
    if class_folders(val):
        refuse_different_classes(root)
        return Images(train, with_object_masks(root, image_folder(root, "val")), wnids, class_names(root, wnids))
    return Images(train, flat_val(root, [File(path) for path in val.iterdir()], wnids), wnids, class_names(root, wnids))


def from_parquet(root: Path, tables: dict[str, list[Path]]) -> Images:
    """Read train-*.parquet and val-*.parquet (or validation-*) in root or root/data. Images keep the order of their rows."""
    if not tables["val"]:
        raise UserError(f"{root} holds train-*.parquet and no val-*.parquet or validation-*.parquet: put them there too.")
    paths = [path for split in tables.values() for path in split]
    files = {path: parquet_rows(path) for path in track(paths, "indexing parquet files", len(paths))}
    wnids, new_labels = parquet_classes(files, tables["train"])
    splits = {
        split: [item for path in paths for item in parquet_items(path, *files[path][:2], new_labels)]
        for split, paths in tables.items()
    }
    refuse_empty_classes(tables["train"][0].parent, wnids, splits["train"])
    if not splits["val"]:
        raise UserError(f"{tables['val'][0]} holds no rows, and neither does any other file of validation: fetch it again.")
    return Images(**splits, wnids=wnids, classes=class_names(root, wnids))


def from_unlabelled(root: Path) -> Images:
    """Read images without labels from any folders. val/ is for validation, or without it every 50th image from the first on;
    pairs/ and val_objects/ are left out; all others are for training."""
    items = [
        {"image": place, "name": name}
        for name, place in list_files(root).items()
        if is_image(name) and not name.startswith(("pairs/", "val_objects/"))
    ]
    val = [item for item in items if item["name"].startswith("val/")] or items[::HELD_OUT]
    if len(items) == len(val):
        raise UserError(f"{root} holds no images ({', '.join(sorted(IMAGES))}) to train on. Expected {LAYOUTS}.")
    held_out = {item["name"] for item in val}
    return Images([item for item in items if item["name"] not in held_out], val, wnids=[], classes=[])


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image."""
    return PurePosixPath(name).suffix.lower() in IMAGES


def class_items(wnid: str, label: int, places: Iterable[Place]) -> list[dict]:
    """Return the images among the files of a class as items, in the order of their names."""
    images = sorted((place for place in places if is_image(file_name(place))), key=file_name)
    return [{"image": place, "name": f"{wnid}/{file_name(place)}", "label": label} for place in images]


def file_name(place: Place) -> str:
    """Return the name of a file or member, without its folders."""
    return place.path.name if isinstance(place, File) else PurePosixPath(place.name).name


def image_folder(root: Path, split: str) -> list[dict]:
    """Read root/split/<class>/<file> as items. Classes are in the order of their folders' names (in ImageNet the WordNet ids).
    Raises UserError for a missing folder and for a class without images."""
    folder, items = require_path(root / split, f"expected {LAYOUTS}"), []
    wnids = class_folders(folder)
    for label, wnid in enumerate(track(wnids, f"listing {split} (classes)", len(wnids))):
        items += class_items(wnid, label, (File(path) for path in (folder / wnid).iterdir()))
    refuse_empty_classes(folder, wnids, items)
    return items


def refuse_empty_classes(where: Path, wnids: list[str], items: list[dict]) -> None:
    """Raise UserError unless there are at least two classes and each has an image."""
    if not items:
        raise UserError(f"{where} holds no images ({', '.join(sorted(IMAGES))}) of any class.")
    if len(wnids) < 2:
        raise UserError(
            f"{where} has one class; at least two are needed to tell classes apart. Images without labels belong "
            "directly into train/, or anywhere but in train/."
        )
    empty = [wnids[label] for label in sorted(set(range(len(wnids))) - {item["label"] for item in items})]
    if empty:
        raise UserError(f"{len(empty)} class(es) of {where} hold no image, the first is {empty[0]}. Fill or remove them.")


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; none if it is no folder."""
    return sorted(child.name for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []


def refuse_different_classes(root: Path) -> None:
    """Raise UserError unless root/train and root/val have the same class folders: a label is an index in their list."""
    train, val = (class_folders(root / split) for split in ("train", "val"))
    differences = [
        f"only {split} has {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for split, names in (("train", sorted(set(train) - set(val))), ("val", sorted(set(val) - set(train))))
        if names
    ]
    if differences:
        raise UserError(f"{root}/train and {root}/val must have the same class folders: {'; '.join(differences)}.")


def flat_val(root: Path, places: Iterable[Place], wnids: list[str]) -> list[dict]:
    """Label validation images from the devkit or a table, and return them as items in the order of class and name. Raises
    UserError for an image without one of the training classes."""
    path, wnid_of = val_labels(root)
    labels, by_class, misfits = {wnid: label for label, wnid in enumerate(wnids)}, {}, []
    for place in places:
        name = file_name(place)
        if is_image(name):
            wnid = wnid_of.get(PurePosixPath(name).stem)
            by_class.setdefault(wnid, []).append(place)
            misfits += [] if wnid in labels else [f"{name} is {wnid or 'not in it'}"]
    if misfits:
        raise UserError(
            f"{path} gives {len(misfits)} validation image(s) none of the {len(wnids)} classes of the training images: "
            f"{', '.join(misfits[:5])}{' ...' if len(misfits) > 5 else ''}."
        )
    if not by_class:
        raise UserError(f"{root} holds no validation images ({', '.join(sorted(IMAGES))}).")
    return [item for wnid in sorted(by_class) for item in class_items(wnid, labels[wnid], by_class[wnid])]


def parquet_files(root: Path, split: str) -> list[Path]:
    """Return the parquet files of a split in root or root/data, in the order of their names."""
    pattern = re.compile(r"train-.*\.parquet" if split == "train" else r"val(idation)?-.*\.parquet")
    folders = [folder for folder in (root, root / "data") if folder.is_dir()]
    return [path for folder in folders for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)]


def parquet_classes(files: dict[Path, tuple], train: list[Path]) -> tuple[list[str], list[int]]:
    """Return the class names, and the new label for each label of the files.

    files: {path: rows, labels and names} from parquet_rows; train: the paths of training. Names that are WordNet ids are
    sorted; others keep the order of the files, which in Hugging Face's ImageNet is that of WordNet ids too. Raises UserError
    for files of different sets and for labels that are not 0, 1, 2 and so on."""
    names = next((names for _, _, names in files.values() if names), None)
    for path, (_, _, own_names) in files.items():
        if own_names and own_names != names:
            raise UserError(f"{path} names its classes otherwise than {next(iter(files))}: the files must be of one set.")
    if names is None:
        labels = [label for path in train for label in files[path][1] if label is not None]
        largest = max(labels, default=-1)
        if largest >= len(labels):  # before a list of that length is made: a label may be any number
            raise UserError(
                f"{train[0].parent} has the label {largest} and {len(labels)} rows: labels must be 0, 1, 2 and so on."
            )
        names = [f"class {label}" for label in range(largest + 1)]
    order = list(range(len(names)))
    if all(re.fullmatch(r"n\d{8}", name) for name in names):
        order.sort(key=names.__getitem__)
    return [names[label] for label in order], sorted(range(len(order)), key=order.__getitem__)


def parquet_items(path: Path, rows: list[ParquetRow], labels: list[int | None], new_labels: list[int]) -> list[dict]:
    """Return the rows of a file as items. new_labels: the new label for each label. Raises UserError for a label out of range."""
    for row, label in zip(rows, labels):
        if label is None or not 0 <= label < len(new_labels):
            classes = f"{len(new_labels)} classes (0 to {len(new_labels) - 1})"
            raise UserError(f"{row.archive}: row {row.number} has the label {label}, with {classes}.")
    return [
        {"image": row, "name": row.name or f"{path.stem}/{row.number}", "label": new_labels[label]}
        for row, label in zip(rows, labels)
    ]


def with_object_masks(root: Path, items: list[dict]) -> list[dict]:
    """Add "mask" to the val items that have one: root/val_objects/<stem>.png, 255 = object."""
    masks = {path.stem: File(path) for path in (root / "val_objects").glob("*.png")}
    stems = [PurePosixPath(item["name"]).stem for item in items]
    return [{**item, "mask": masks[stem]} if stem in masks else item for item, stem in zip(items, stems)]


def caption_pairs(root: Path) -> list[dict]:
    """Read root/pairs/captions.csv (columns file, caption) as items {"image", "name", "caption"}; none when it is absent."""
    path = root / "pairs" / "captions.csv"
    rows = read_table(path, "file", "caption") if os.path.lexists(path) else []
    return [{"image": File(path.parent / row["file"]), "name": row["file"], "caption": row["caption"]} for row in rows]


def class_captions(items: list[dict], names: list[str], limit: int) -> list[dict]:
    """Return at most `limit` labelled items, evenly spread, with captions that name their classes."""
    chosen = items[:: max(1, -(-len(items) // limit))]
    return [{"image": item["image"], "name": item["name"], "caption": f"a photo of a {names[item['label']]}"} for item in chosen]


def refuse_other_counts(section: str, counts: dict[str, int], expect) -> None:
    """Raise UserError unless the counts are those that the recipe expects (a dataclass of the same names; None: any)."""
    wrong = [
        f"{counts[name]:,} instead of {count:,} ({name})"
        for name, count in (dataclasses.asdict(expect) if expect else {}).items()
        if counts[name] != count
    ]
    if wrong:
        raise UserError(
            f"The data are not those of the recipe: {', '.join(wrong)}. Complete them or, for a subset or a set of your "
            f"own, use -S {section}.expect=null."
        )


AT_LEAST_TWO = ("linear_eval", "segment", "teacher")  # images of a micro-batch, for batch norms and the teacher's contrast


def refuse_too_few(needs: dict[str, tuple[int, int]], processes: int) -> None:
    """Raise one UserError that names all stages whose batch is larger than their images, with options that mend it.

    needs: {stage: (images of a batch, images there are)}."""
    short = {stage: available for stage, (batch, available) in needs.items() if batch > available}
    if not short:
        return
    faults = ", ".join(f"{stage} takes {needs[stage][0]} images a step and has {count}" for stage, count in short.items())
    options = []
    for stage, available in short.items():
        micro_batch = 2 ** max(0, (max(1, available // processes)).bit_length() - 1)
        options += [f"-S {stage}.batch_size={micro_batch * processes}", f"-S {stage}.micro_batch={micro_batch}"]
        if micro_batch < 2 and stage in AT_LEAST_TWO:
            raise UserError(
                f"Too few images for the recipe's batches: {faults}. Add images: {stage} needs two at least for each process "
                f"(runtime.processes is {processes})."
            )
    raise UserError(f"Too few images for the recipe's batches: {faults}. Add images, or {' '.join(options)}.")


def require_path(folder: Path, hint: str) -> Path:
    """Return a path of the user's data. Raises UserError, with the hint, when it is missing."""
    if not folder.exists():
        raise UserError(
            f"{folder} is missing: {hint}. Give the right folder (-S data.imagenet=/path, -S data.ade20k=/path), or null for the "
            "built-in world."
        )
    return folder
