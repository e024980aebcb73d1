"""The layouts in which data sets come: a folder in, items for the records out, before anything is decoded.

An item is a row of the records with places (see archives) where the row has bytes: {"image", "name"[, "label"]
[, "caption"][, "mask"]}. Labels are places in the list of classes, which is in the order of WordNet ids.
"""

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from milan.core.errors import UserError
from milan.core.progress import track
from milan.ingest.archives import File, Place, Row, parquet_rows, tar_spans, tree
from milan.ingest.labels import DEVKIT, KAGGLE, LABELS, class_names, table, val_labels

IMAGES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
HELD_OUT = 50  # without a val/, every 50th image is one of validation
LAYOUTS = (
    f"train/ and val/ with a folder a class; {TRAIN_TAR} and {VAL_TAR} with {DEVKIT}, {KAGGLE} or {LABELS}; "
    "train-*.parquet and val*-*.parquet; or images in any folders, without labels"
)


@dataclasses.dataclass(frozen=True)
class Images:
    """A classification set. Without labels wnids and classes are empty."""

    train: list[dict]
    val: list[dict]
    wnids: list[str]
    classes: list[str]


def read_images(root: Path) -> Images:
    """The set in a folder of one of LAYOUTS. Raises UserError for any other, naming what is odd."""
    if existing(root, f"expected {LAYOUTS}").is_file():
        raise UserError(f"{root} is a file: data.imagenet names the folder that holds it. Expected {LAYOUTS}.")
    tables = {split: parquet_files(root, split) for split in ("train", "val")}
    if os.path.lexists(root / TRAIN_TAR):  # and be it a link to nothing, which is to be said
        return from_tars(root)
    if tables["train"]:
        return from_parquet(root, tables)
    if class_folders(root / "train"):
        return from_class_folders(root)
    return without_labels(root)


def from_tars(root: Path) -> Images:
    """The archives as ILSVRC2012 gives them: a tar of a tar a class, and a flat one whose labels stand elsewhere."""
    outer, train, broken = root / TRAIN_TAR, [], []
    members = sorted(
        (m for m in tar_spans(outer) if re.fullmatch(r"(./)?n\d+\.tar", m.name)), key=lambda m: PurePosixPath(m.name).stem
    )
    wnids = [PurePosixPath(member.name).stem for member in members]
    for label, member in enumerate(track(members, f"indexing {TRAIN_TAR} (classes)", len(members))):
        try:
            train += of_class(wnids[label], label, tar_spans(outer, member))
        except UserError as error:
            broken.append(str(error))
    if broken:
        raise UserError(" ".join(broken[:20]))
    refuse_empty_classes(outer, wnids, train)
    if not os.path.lexists(root / VAL_TAR):
        raise UserError(f"{root} holds {TRAIN_TAR} and no {VAL_TAR}: put it there too.")
    return Images(train, flat(root, tar_spans(root / VAL_TAR), wnids), wnids, class_names(root, wnids))


def from_class_folders(root: Path) -> Images:
    """train/<class>/<file> with val/<class>/<file>, or with a flat val/ whose labels stand elsewhere."""
    train, wnids = image_folder(root, "train"), class_folders(root / "train")
    val = existing(root / "val", f"expected {LAYOUTS}")
    if val.is_file():
        raise UserError(f"{val} is a file: make it the folder of the validation images. Expected {LAYOUTS}.")
    if class_folders(val):
        same_classes(root)
        return Images(train, with_object_masks(root, image_folder(root, "val")), wnids, class_names(root, wnids))
    return Images(train, flat(root, [File(path) for path in val.iterdir()], wnids), wnids, class_names(root, wnids))


def from_parquet(root: Path, tables: dict[str, list[Path]]) -> Images:
    """train-*.parquet and val-*.parquet (or validation-*), in root or root/data. Images keep the order of their rows."""
    if not tables["val"]:
        raise UserError(f"{root} holds train-*.parquet and no val-*.parquet or validation-*.parquet: put them there too.")
    paths = [path for split in tables.values() for path in split]
    read = dict(zip(paths, (parquet_rows(path) for path in track(paths, "indexing parquet files", len(paths)))))
    wnids, places = parquet_classes(read, tables["train"])
    splits = {
        split: [item for path in paths for item in labelled_rows(path, *read[path][:2], places)]
        for split, paths in tables.items()
    }
    refuse_empty_classes(tables["train"][0].parent, wnids, splits["train"])
    if not splits["val"]:
        raise UserError(f"{tables['val'][0]} holds no rows, and neither does any other file of validation: fetch it again.")
    return Images(**splits, wnids=wnids, classes=class_names(root, wnids))


def without_labels(root: Path) -> Images:
    """Images in any folders: all but those of val/, or of pairs/, are for training; without a val/ every 50th, from the first
    on, is held out."""
    places = {
        name: place for name, place in tree(root).items() if is_image(name) and not name.startswith(("pairs/", "val_objects/"))
    }
    val = {name: place for name, place in places.items() if name.startswith("val/")}
    val = val or dict(list(places.items())[::HELD_OUT])
    if len(places) == len(val):
        raise UserError(f"{root} holds no images ({', '.join(sorted(IMAGES))}) to train on. Expected {LAYOUTS}.")
    items = [[{"image": place, "name": name} for name, place in some] for some in (places.items() - val.items(), val.items())]
    return Images(*(sorted(some, key=lambda item: item["name"]) for some in items), wnids=[], classes=[])


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGES


def of_class(wnid: str, label: int, places: Iterable[Place]) -> list[dict]:
    """The images among the files of a class, in the order of their names."""
    found = sorted((place for place in places if is_image(base(place))), key=base)
    return [{"image": place, "name": f"{wnid}/{base(place)}", "label": label} for place in found]


def base(place: Place) -> str:
    """A file's own name."""
    return place.path.name if isinstance(place, File) else PurePosixPath(place.name).name


def image_folder(root: Path, split: str) -> list[dict]:
    """root/split/<class>/<file> -> items; classes in the order of their folders' names (for ImageNet: by WordNet id)."""
    folder, items = existing(root / split, f"expected {LAYOUTS}"), []
    wnids = class_folders(folder)
    for label, wnid in enumerate(track(wnids, f"listing {split} (classes)", len(wnids))):
        items += of_class(wnid, label, (File(path) for path in (folder / wnid).iterdir()))
    refuse_empty_classes(folder, wnids, items)
    return items


def check_classes(where: Path, wnids: list[str], items: list[dict]) -> None:
    if not items:
        raise UserError(f"{where} holds no images ({', '.join(sorted(IMAGES))}) of any class.")
    if len(wnids) < 2:
        raise UserError(
            f"{where} has one class; at least two are needed to tell classes apart. Images without labels belong "
            "right into train/, or anywhere but in train/."
        )


def refuse_empty_classes(where: Path, wnids: list[str], items: list[dict]) -> None:
    check_classes(where, wnids, items)
    empty = [wnids[label] for label in sorted(set(range(len(wnids))) - {item["label"] for item in items})]
    if empty:
        raise UserError(f"{len(empty)} class(es) of {where} hold no image, the first is {empty[0]}. Fill or remove them.")


def class_folders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []


def same_classes(root: Path) -> None:
    """UserError unless root/train and root/val have just the same class folders, since labels are places in the list."""
    train, val = (class_folders(root / split) for split in ("train", "val"))
    odd = [
        f"{split} has {', '.join(some[:5])}{' ...' if len(some) > 5 else ''} alone"
        for split, some in (("train", sorted(set(train) - set(val))), ("val", sorted(set(val) - set(train))))
        if some
    ]
    if odd:
        raise UserError(f"{root}/train and {root}/val must have the same class folders: {'; '.join(odd)}.")


def flat(root: Path, places: Iterable[Place], wnids: list[str]) -> list[dict]:
    """Validation images with the labels that the devkit or a table gives them, in the order of class and name."""
    path, known = val_labels(root)
    label_of, by_class, odd = {wnid: k for k, wnid in enumerate(wnids)}, {}, []
    for place in places:
        if is_image(base(place)):
            wnid = known.get(PurePosixPath(base(place)).stem)
            by_class.setdefault(wnid, []).append(place)
            odd += [] if wnid in label_of else [f"{base(place)} is {wnid or 'not in it'}"]
    if odd:
        raise UserError(
            f"{path} gives {len(odd)} validation image(s) none of the {len(wnids)} classes of the training images: "
            f"{', '.join(odd[:5])}{' ...' if len(odd) > 5 else ''}."
        )
    if not by_class:
        raise UserError(f"{root} holds no validation images ({', '.join(sorted(IMAGES))}).")
    return [item for wnid in sorted(by_class) for item in of_class(wnid, label_of[wnid], by_class[wnid])]


def parquet_files(root: Path, split: str) -> list[Path]:
    pattern = re.compile(r"train-.*\.parquet" if split == "train" else r"val(idation)?-.*\.parquet")
    folders = [folder for folder in (root, root / "data") if folder.is_dir()]
    return [path for folder in folders for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)]


def parquet_classes(read: dict[Path, tuple], train: list[Path]) -> tuple[list[str], list[int]]:
    """Class names, and the place of each of the files' labels among them: by WordNet id where the names are such, else as
    the files have them (in Hugging Face's ImageNet by WordNet id, too)."""
    names = next((names for _, _, names in read.values() if names), None)
    for path, (_, _, own) in read.items():
        if own and own != names:
            raise UserError(f"{path} names its classes otherwise than {next(iter(read))}: the files must be of one set.")
    if names is None:
        labels = [label for path in train for label in read[path][1] if label is not None]
        most = max(labels, default=-1)
        if most >= len(labels):  # labels may be any whole numbers: it takes care not to count to them
            raise UserError(f"{train[0].parent} has the label {most} and {len(labels)} rows: labels must be 0, 1, 2 and so on.")
        names = [f"class {k}" for k in range(most + 1)]
    order = (
        sorted(range(len(names)), key=names.__getitem__) if all(re.fullmatch(r"n\d{8}", n) for n in names) else range(len(names))
    )
    return [names[k] for k in order], [place for _, place in sorted(zip(order, range(len(names))))]


def labelled_rows(path: Path, rows: list[Row], labels: list[int | None], places: list[int]) -> list[dict]:
    for row, label in zip(rows, labels):
        if label is None or not 0 <= label < len(places):
            raise UserError(
                f"{row.archive}: row {row.number} has the label {label}, with {len(places)} classes (0 to {len(places) - 1})."
            )
    return [
        {"image": row, "name": row.name or f"{path.stem}/{row.number}", "label": places[label]}
        for row, label in zip(rows, labels)
    ]


def with_object_masks(root: Path, items: list[dict]) -> list[dict]:
    """Add "mask" to the val items whose object's pixels are known (root/val_objects/<stem>.png, 255 = object)."""
    masks = {path.stem: File(path) for path in (root / "val_objects").glob("*.png")}
    found = [masks.get(PurePosixPath(item["name"]).stem) for item in items]
    return [{**item, "mask": mask} if mask else item for item, mask in zip(items, found)]


def caption_pairs(root: Path) -> list[dict]:
    """root/pairs/captions.csv with columns file, caption -> items {"image", "name", "caption"}; none when absent."""
    path = root / "pairs" / "captions.csv"
    rows = table(path, "file", "caption") if os.path.lexists(path) else []
    return [{"image": File(path.parent / row["file"]), "name": row["file"], "caption": row["caption"]} for row in rows]


def class_captions(items: list[dict], names: list[str], most: int) -> list[dict]:
    """Up to `most` of an image folder's items, evenly spread, captioned with the names of their classes."""
    chosen = items[:: max(1, -(-len(items) // most))]
    return [{"image": i["image"], "name": i["name"], "caption": f"a photo of a {names[i['label']]}"} for i in chosen]


def refuse_other_counts(section: str, found: dict[str, int], expect) -> None:
    """UserError unless what was found is what the recipe expects (a dataclass of the same names; None: anything)."""
    wrong = [
        f"{found[name]:,} instead of {count:,} ({name})"
        for name, count in (dataclasses.asdict(expect) if expect else {}).items()
        if found[name] != count
    ]
    if wrong:
        raise UserError(
            f"The data are not those of the recipe: {', '.join(wrong)}. Complete them; when the set is a subset or your own, "
            f"-S {section}.expect=null."
        )


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
    if not folder.exists():
        raise UserError(
            f"{folder} is missing: {hint}. Give the right folder (-S data.imagenet=/path, -S data.ade20k=/path), or null for the "
            "built-in world."
        )
    return folder
