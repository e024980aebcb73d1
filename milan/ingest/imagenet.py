"""Read the layouts in which image sets are published, as items for the records. Nothing is decoded here.

An item is a row of the records with places (see archives.py) instead of bytes: {"image", "name"[, "label"][, "caption"]
[, "mask"]}. A label is the index of its class in the order of WordNet ids.
"""

import dataclasses
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath

from milan.core.errors import UserError, listed
from milan.core.progress import track
from milan.ingest.archives import File, Listing, ParquetRow, Place, TarMember, list_files, parquet_rows, passed_over, tar_members
from milan.ingest.labels import DEVKIT, KAGGLE, LABELS, TABLES, class_names, label_table, read_table, val_labels

IMAGES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
HELD_OUT = 50  # without a val/, every 50th image is held out for validation
PARQUET = {"train": r"train-.*\.parquet", "val": r"val(idation)?-.*\.parquet"}
BESIDE = ("pairs/", "val_objects/")  # folders of captions and of masks
TRAINING = ("train", "training")  # names of the folder of training images, in any case
VALIDATION = ("val", "valid", "validation", "dev", "test", "testing")  # and of the one beside it: the first that is there counts
HOLD_OUT = "-S prepare_imagenet.holdout=0.1"
LAYOUTS = (
    f"train/ and val/ with a folder a class; folders of classes alone, with {HOLD_OUT}; {TRAIN_TAR} and {VAL_TAR} with {DEVKIT}, {KAGGLE} or {LABELS}; "
    "train-*.parquet and val*-*.parquet; or images in any folders, without labels"
)


@dataclasses.dataclass(frozen=True)
class Images:
    """An image set: the items of its splits, and its classes. Without labels wnids and classes are empty. unread: members of
    archives that are no images."""

    train: list[dict]
    val: list[dict]
    wnids: list[str]
    classes: list[str]
    unread: list[str] = dataclasses.field(default_factory=list)


def read_images(root: Path, holdout: float | None = None) -> Images:
    """Read the set in a folder of one of LAYOUTS, and print what its layout leaves unread. holdout: the share of the images
    that is held out for validation where the set has none for it. Raises UserError that names the fault for any other folder,
    and where links or folders that belong to the set cannot be read."""
    if require_path(root, f"expected {LAYOUTS}").is_file():
        raise UserError(f"{root} is a file: data.imagenet names the folder that holds it. Expected {LAYOUTS}.")
    listing = list_files(root)
    listing.refuse_lost("pairs")
    images = read_layout(listing, holdout)
    used = (item["image"] for items in (images.train, images.val) for item in items)
    listing.tell_unread(used, lambda name: name == "classes.json" or name in TABLES or name.startswith(BESIDE), images.unread)
    return images


def read_layout(listing: Listing, holdout: float | None) -> Images:
    """Read the set in one of LAYOUTS."""
    root = listing.root
    tables = {split: parquet_files(root, split) for split in ("train", "val")}
    if os.path.lexists(root / TRAIN_TAR):  # also a broken link, which from_tars reports
        return from_tars(root)
    if tables["train"]:
        return from_parquet(root, tables)
    train = split_folder(listing, TRAINING)
    beside = {folder.lower() for folder in class_folders(listing, "")} & {*VALIDATION}
    if train == "train" or train and (beside or holdout):
        return from_class_folders(listing, train, class_folders(listing, train), holdout)
    if holdout and (classes := top_classes(listing)):
        print(f"{root}: its {len(classes)} folders are read as classes (as images without labels: holdout=null).", flush=True)
        return from_class_folders(listing, "", classes, holdout)
    return from_unlabelled(listing, holdout)


def split_folder(listing: Listing, names: tuple[str, ...]) -> str | None:
    """Return the folder at the top with the first of these names, in any case, that holds folders; None without one."""
    folders = [name for name in class_folders(listing, "") if name.lower() in names and class_folders(listing, name)]
    return min(folders, key=lambda name: (names.index(name.lower()), name != name.lower(), name), default=None)


def top_classes(listing: Listing) -> list[str]:
    """Return the folders at the top that hold images, where they may be classes: two at least, none with the name of a split,
    and no image beside them."""
    tops = {name.partition("/")[0] for name in listing.files if is_image(name) and not name.startswith(BESIDE)}
    may_be = len(tops) > 1 and tops <= listing.folders and not {name.lower() for name in tops} & {*TRAINING, *VALIDATION}
    return sorted(tops) if may_be else []


def from_tars(root: Path) -> Images:
    """Read the tars of ILSVRC2012: one of training with a tar for each class, and a flat one of validation, whose labels are in
    another file."""
    outer, train, broken = root / TRAIN_TAR, [], []
    members = sorted(tar_members(outer), key=lambda member: PurePosixPath(member.name).stem)
    inner = [member for member in members if member.name.endswith(".tar")]
    if strange := [member.name for member in inner if not re.fullmatch(r"(\./)?n\d+\.tar", member.name)]:
        raise UserError(f"{outer} holds tars whose names are no WordNet ids (n01440764.tar): {listed(strange)}. Rename or remove them.")
    wnids = [PurePosixPath(member.name).stem for member in inner]
    unread = [f"{TRAIN_TAR}/{member.name}" for member in members if member not in inner]
    for label, member in enumerate(track(inner, f"indexing {TRAIN_TAR} (classes)", len(inner))):
        try:
            train += class_items(wnids[label], label, pictures(tar_members(outer, member), member.name, unread))
        except UserError as error:
            broken.append(str(error))
    if broken:
        raise UserError(" ".join(broken[:20]))
    refuse_empty_classes(outer, wnids, train)
    if not os.path.lexists(root / VAL_TAR):
        raise UserError(f"{root} holds {TRAIN_TAR} and no {VAL_TAR}: put it there too.")
    val = flat_val(root, pictures(tar_members(root / VAL_TAR), VAL_TAR, unread), wnids)
    return Images(train, val, wnids, class_names(root, wnids), unread)


def pictures(members: list[TarMember], archive: str, unread: list[str]) -> list[TarMember]:
    """Return the members of a tar that are images. The names of the others are added to `unread`."""
    unread += [f"{archive}/{member.name}" for member in members if not is_image(member.name)]
    return [member for member in members if is_image(member.name)]


def from_class_folders(listing: Listing, train: str, wnids: list[str], holdout: float | None) -> Images:
    """Read the classes in the folder `train` ("": the set's own) with val/<class>/, under any of its names, or with a val/ of
    pictures whose labels are in another file, or with a share held out."""
    root, val = listing.root, "val" if os.path.lexists(listing.root / "val") else split_folder(listing, VALIDATION)
    listing.refuse_lost(train, "val", "val_objects", *([val] if val else []))
    items = image_folder(listing, train, wnids)
    if val is None and holdout:
        return Images(*hold_out(items, holdout), wnids, class_names(root, wnids))
    if val is None:
        raise UserError(
            f"{root / 'val'} is missing: move the validation images there, into folders of the classes as in {train}/, or "
            f"{HOLD_OUT} holds out a tenth of {train}/. Expected {LAYOUTS}."
        )
    if (root / val).is_file():
        raise UserError(f"{root / val} is a file: make it the folder of the validation images. Expected {LAYOUTS}.")
    others = [f"{folder}/ is read as {name}/" for folder, name in ((train, "train"), (val, "val")) if folder != name]
    if others:
        print(f"{root}: {' and '.join(others)}.", flush=True)
    val_wnids = class_folders(listing, val)
    if val_wnids and (set(val_wnids) & set(wnids) or label_table(root) is None):
        refuse_different_classes(root, {train: wnids, val: val_wnids})
        return Images(items, with_object_masks(root, image_folder(listing, val, val_wnids)), wnids, class_names(root, wnids))
    flat = [place for name, place in listing.files.items() if name.startswith(f"{val}/") and is_image(name)]
    return Images(items, flat_val(root, flat, wnids), wnids, class_names(root, wnids))


def hold_out(items: list[dict], share: float) -> tuple[list[dict], list[dict]]:
    """Divide items into those of training and the share that is held out. The digest of a file's bytes decides: an image is
    always on the same side, whatever is beside it, and so are its copies. Raises UserError where a side or, of training, a
    class has no image."""
    sides: dict[bool, list[dict]] = {False: [], True: []}
    for item in track(items, "digests (images)", len(items)):
        sides[is_held_out(item["image"], share)].append(item)
    train, val = sides.values()
    said = f"prepare_imagenet.holdout {share:g} holds out {len(val):,} of {len(items):,} images"
    if not train or not val:
        raise UserError(f"{said}: take another share, or add images.")
    if lost := sorted({str(class_of(item)) for item in items} - {str(class_of(item)) for item in train}):
        raise UserError(f"{said} and leaves none to train on of {listed(lost)}: add images of them, or take a smaller share.")
    print(f"{said} for validation, by the digests of their files.", flush=True)
    return train, val


def is_held_out(place: Place, share: float) -> bool:
    """Return whether the digest of a file's bytes lies in the first `share` of all digests. A file that cannot be read is of
    training: packing names it."""
    try:
        digest = hashlib.sha256(place.read()).digest()
    except (OSError, ValueError):
        return False
    return int.from_bytes(digest[:8], "big") < share * 2**64


def class_of(item: dict) -> str | None:
    """Return the class folder of a labelled item; None of one without a label."""
    return item["name"].partition("/")[0] if "label" in item else None


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


def from_unlabelled(listing: Listing, holdout: float | None) -> Images:
    """Read images without labels from any folders. val/ is for validation, or without it the share `holdout`, or without that
    every 50th image from the first on; pairs/ and val_objects/ are left out; all others are for training. A file that links show twice is read once."""
    root = listing.root
    listing.refuse_lost("")
    refuse_set_below(listing)
    names = [name for name in listing.files if is_image(name) and not name.startswith(BESIDE)]
    names.sort(key=lambda name: not name.startswith("val/"))  # what val/ holds too is no training image
    once = {real_path(listing.files[name].path): name for name in reversed(names)}
    items = [{"image": listing.files[name], "name": name} for name in sorted(once.values())]
    val = [item for item in items if item["name"].startswith("val/")]
    if items and holdout and not val:
        val = hold_out(items, holdout)[1]
    val = val or items[::HELD_OUT]
    if len(items) == len(val):
        raise UserError(f"{root} holds no images ({', '.join(sorted(IMAGES))}) to train on. Expected {LAYOUTS}.")
    held_out = {item["name"] for item in val}
    train = [item for item in items if item["name"] not in held_out]
    also = [folder for folder in class_folders(listing, "") if folder.lower() in VALIDATION and folder != "val"]
    more = f" Images of {listed(also)} are of training, too: only val/ is held out." if also else ""
    if classes := top_classes(listing):
        more = f" Where its {len(classes)} folders are classes: {HOLD_OUT}."
    print(f"{root} is read as images without labels: {len(train):,} of training, {len(val):,} of validation.{more}", flush=True)
    return Images(train, val, wnids=[], classes=[])


def real_path(path: Path) -> str:
    """Return the path of a file without links."""
    return os.path.realpath(path) if path.is_symlink() else os.path.join(real_folder(path.parent), path.name)


@lru_cache
def real_folder(path: Path) -> str:
    return os.path.realpath(path)


def refuse_set_below(listing: Listing) -> None:
    """Raise UserError where a labelled set lies in a folder below: its labels would be dropped and its validation images
    trained on."""
    for folder in sorted(listing.folders):
        parent, _, name = folder.rpartition("/")
        if name.lower() not in TRAINING:  # first: the rest looks at all folders again
            continue
        beside = {sibling.lower() for sibling in class_folders(listing, parent)}
        if beside & {*VALIDATION} and class_folders(listing, folder):
            raise UserError(
                f"{listing.root / folder} holds folders of classes, and {listing.root} would be read as images without labels: "
                f"set data.imagenet to {listing.root / parent}. (If they are no classes, rename {name}/.)"
            )
    for name in listing.files:
        path = PurePosixPath(name)
        if path.name == TRAIN_TAR or re.fullmatch(PARQUET["train"], path.name):
            parent = path.parent.parent if path.parent.name == "data" else path.parent
            raise UserError(f"{listing.root / name} belongs to a labelled set: set data.imagenet to {listing.root / parent}.")


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image."""
    return PurePosixPath(name).suffix.lower() in IMAGES


def class_items(wnid: str, label: int, places: Iterable[Place]) -> list[dict]:
    """Return the images of a class as items, in the order of their names."""
    return named_items(wnid, label, [(file_name(place), place) for place in places])


def named_items(wnid: str, label: int, named: Iterable[tuple[str, Place]]) -> list[dict]:
    """Return images with their names in their class as items, in the order of the names."""
    ordered = sorted(named, key=lambda image: image[0])
    return [{"image": place, "name": f"{wnid}/{name}", "label": label} for name, place in ordered]


def file_name(place: Place) -> str:
    """Return the name of a file or member, without its folders."""
    return place.path.name if isinstance(place, File) else PurePosixPath(place.name).name


def image_folder(listing: Listing, folder: str, wnids: list[str]) -> list[dict]:
    """Read the images of <folder>/<class>/ ("": of <class>/), also in folders below it, as items. Classes are in the order of
    wnids, which is that of their folders' names. Raises UserError for a class without images."""
    by_class = images_of_classes(listing, folder)
    items = [item for label, wnid in enumerate(wnids) for item in named_items(wnid, label, by_class[wnid])]
    refuse_empty_classes(listing.root / folder, wnids, items)
    return items


def images_of_classes(listing: Listing, folder: str) -> dict[str, list[tuple[str, Place]]]:
    """Return {class: its images, each with its name in the class} of folder/<class>/ ("": of the set's own folders), also of
    folders below it. Classes are sorted."""
    above = f"{folder}/" if folder else ""
    images: dict[str, list[tuple[str, Place]]] = {name: [] for name in class_folders(listing, folder)}
    for name, place in listing.files.items():
        wnid, _, inner = name.removeprefix(above).partition("/")
        if name.startswith(above) and inner and is_image(name):
            images[wnid].append((inner, place))
    return images


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


def class_folders(listing: Listing, folder: str) -> list[str]:
    """Return the names of the folders directly in a folder ("": the set's own), sorted."""
    return sorted(name.rpartition("/")[2] for name in listing.folders if name.rpartition("/")[0] == folder)


def refuse_different_classes(root: Path, classes: dict[str, list[str]]) -> None:
    """Raise UserError unless both folders of root have the same class folders: a label is an index in their list."""
    (train, own), (val, other) = classes.items()
    only = {train: set(own) - set(other), val: set(other) - set(own)}
    if differences := [f"only {split} has {listed(sorted(names))}" for split, names in only.items() if names]:
        plain = [{unicodedata.normalize("NFKC", name).strip().casefold() for name in names} for names in only.values()]
        alike = " Some differ only in case, spaces or the Unicode form of accents: rename them." if plain[0] & plain[1] else ""
        raise UserError(f"{root / train} and {root / val} must have the same class folders: {'; '.join(differences)}.{alike}")


def flat_val(root: Path, places: list[Place], wnids: list[str]) -> list[dict]:
    """Label validation images from the devkit or a table, and return them as items in the order of class and name. Raises
    UserError for an image without one of the training classes, and for two of one name."""
    path, wnid_of = val_labels(root)
    labels, by_class, misfits = {wnid: label for label, wnid in enumerate(wnids)}, {}, []
    stems = Counter(PurePosixPath(file_name(place)).stem for place in places)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise UserError(f"{root} has two validation images of one name, which {path.name} does not tell apart: {listed(twice)}.")
    for place in places:
        name = file_name(place)
        wnid = wnid_of.get(PurePosixPath(name).stem)
        by_class.setdefault(wnid, []).append(place)
        misfits += [] if wnid in labels else [f"{name} is {wnid or 'not in it'}"]
    if misfits:
        raise UserError(
            f"{path} gives {len(misfits)} validation image(s) none of the {len(wnids)} classes of the training images: "
            f"{listed(misfits)}."
        )
    if not by_class:
        raise UserError(f"{root} holds no validation images ({', '.join(sorted(IMAGES))}).")
    return [item for wnid in sorted(by_class) for item in class_items(wnid, labels[wnid], by_class[wnid])]


def parquet_files(root: Path, split: str) -> list[Path]:
    """Return the parquet files of a split in root or root/data, in the order of their names."""
    folders = [folder for folder in (root, root / "data") if folder.is_dir()]
    return [path for folder in folders for path in sorted(folder.iterdir()) if re.fullmatch(PARQUET[split], path.name)]


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
    """Return the rows of a file as items, without those whose file's name is passed over. new_labels: the new label for each
    label. Raises UserError for a label out of range."""
    for row, label in zip(rows, labels):
        if label is None or not 0 <= label < len(new_labels):
            classes = f"{len(new_labels)} classes (0 to {len(new_labels) - 1})"
            raise UserError(f"{row.archive}: row {row.number} has the label {label}, with {classes}.")
    return [
        {"image": row, "name": row.name or f"{path.stem}/{row.number}", "label": new_labels[label]}
        for row, label in zip(rows, labels)
        if not passed_over(PurePosixPath(row.name or "x").name)
    ]


def with_object_masks(root: Path, items: list[dict]) -> list[dict]:
    """Add "mask" to the val items that have one: root/val_objects/<stem>.png, 255 = object."""
    masks = {path.stem: File(path) for path in (root / "val_objects").glob("*.png")}
    stems = [PurePosixPath(item["name"]).stem for item in items]
    return [{**item, "mask": masks[stem]} if stem in masks else item for item, stem in zip(items, stems)]


def caption_pairs(root: Path) -> list[dict]:
    """Read root/pairs/captions.csv (columns file, caption) as items {"image", "name", "caption"}; none when it is absent.

    Raises UserError for a table of another form, and for a file outside pairs/."""
    path = root / "pairs" / "captions.csv"
    rows = read_table(path, "file", "caption") if os.path.lexists(path) else []
    outside = [row["file"] for row in rows if row["file"].startswith("/") or ".." in PurePosixPath(row["file"]).parts]
    if outside:
        raise UserError(f"{path} names files outside its folder: {listed(outside)}. Put the images into {path.parent}.")
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
