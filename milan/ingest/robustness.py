"""Read the robustness sets, folders of classes in the layouts of their authors, as items for the records.

    imagenet_a, imagenet_r, imagenet_sketch   <wnid>/<image>; A and R have 200 of the 1,000 classes
    imagenet_v2                               <label>/<image>: 0 to 999, the place among the sorted WordNet ids
    imagenet_c                                <corruption>/<severity>/<wnid>/<image>, also in folders of corruptions (noise/, blur/, ...)

A class is a folder of the training set: its name is in the manifest's wnids, and its place there is the label.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from milan.core.errors import UserError, listed
from milan.data.corruptions import ALEXNET_ERROR, CORRUPTIONS, IMAGENET_CLASSES, SEVERITIES, split_name
from milan.ingest.archives import list_files, passed_over, unreadable
from milan.ingest.imagenet import images_of_classes, named_items

SUBSETS = ("imagenet_a", "imagenet_r")
SUBSET_CLASSES = 200  # of a subset of ImageNet's classes, as published


@dataclass(frozen=True)
class ClassFolders:
    """A folder of class folders, and the label of each."""

    root: Path
    labels: dict[str, int]

    def items(self) -> list[dict]:
        """Return the images as items, in the order of class and name, and print what is left unread. Raises UserError for
        classes without images, and for what cannot be read."""
        listing = list_files(self.root)
        listing.refuse_lost("")
        images = images_of_classes(listing, "")
        if empty := [name for name, some in images.items() if not some]:
            raise UserError(f"{self.root}: {len(empty)} class folder(s) hold no image: {listed(empty)}. Fetch the set again.")
        items = [
            item
            for name in sorted(images, key=self.labels.__getitem__)
            for item in named_items(name, self.labels[name], images[name])
        ]
        listing.tell_unread((item["image"] for item in items), lambda name: False)
        return items


def find_splits(
    paths: dict[str, Path], labels: dict[str, int], corruptions: Iterable[str] = ALEXNET_ERROR
) -> dict[str, ClassFolders]:
    """Return {split: its class folders} of the sets {key of data.robustness: folder}, without a look at the images.

    labels: {wnid: label} of the training set's classes; corruptions: those that imagenet_c must have. Raises one UserError that names every missing and every unknown folder."""
    roots, faults = {}, []
    for name, path in paths.items():
        roots |= corrupted(path, corruptions, faults) if name == "imagenet_c" else {name: path}
    splits = {}
    for split, root in roots.items():
        own = {str(label): label for label in labels.values()} if split == "imagenet_v2" else labels
        splits[split] = ClassFolders(root, own)
        faults += class_faults(splits[split], split in SUBSETS)
    if faults:
        raise UserError(
            f"The sets of data.robustness are not as published: {listed(faults, 20, '; ')}. Mend the folders, or set a set's path "
            "to null."
        )
    return splits


def corrupted(root: Path, corruptions: Iterable[str], faults: list[str]) -> dict[str, Path]:
    """Return {split: folder} of ImageNet-C. What is missing or unknown is added to `faults`."""
    roots: dict[str, Path] = {}
    for path in folders_in(root):
        inner = [path] if path.name in CORRUPTIONS else folders_in(path)
        for corruption in inner:
            if corruption.name not in CORRUPTIONS:
                faults.append(f"{corruption} is no corruption of ImageNet-C")
            elif corruption.name in roots:
                faults.append(f"{corruption} is also in {roots[corruption.name].parent}")
            roots.setdefault(corruption.name, corruption)
    if missing := [name for name in corruptions if name not in roots]:
        faults.append(f"{root} lacks the corruptions {listed(missing, 15)}")
    splits = {}
    for name in (name for name in CORRUPTIONS if name in roots):
        severities = {path.name: path for path in folders_in(roots[name])}
        faults += differences(roots[name], "severities", set(severities), set(SEVERITIES))
        splits |= {split_name(name, severity): severities[severity] for severity in SEVERITIES if severity in severities}
    return splits


def class_faults(folders: ClassFolders, subset: bool) -> list[str]:
    """Name class folders that are not of the training set and, unless the set has a part of the classes alone, missing ones."""
    there, known = {path.name for path in folders_in(folders.root)}, set(folders.labels)
    if not subset:
        return differences(folders.root, "classes", there, known)
    faults = differences(folders.root, "classes", there, known & there)
    wrong = len(there) != SUBSET_CLASSES if len(known) == IMAGENET_CLASSES else not there
    return faults + [f"{folders.root} has {len(there)} of the {SUBSET_CLASSES} class folders that are published"] * wrong


def differences(root: Path, kind: str, there: set[str], expected: set[str]) -> list[str]:
    """Name the folders that are missing in root, and those that are not expected there."""
    sides = {f"lacks the {kind}": expected - there, f"has unknown {kind}": there - expected}
    return [f"{root} {words} {listed(sorted(names))}" for words, names in sides.items() if names]


def folders_in(root: Path) -> list[Path]:
    """Return the folders directly in a folder, sorted, without the names that are passed over. Raises UserError where it cannot
    be read."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and not passed_over(entry.name))
    except OSError as error:
        raise unreadable(root, error) from None
