"""Read ADE20K's layout from a folder or from its zip, as items for the records (see imagenet.py)."""

from collections import Counter
from pathlib import Path, PurePosixPath

from milan.core.errors import UserError, listed
from milan.ingest.archives import Listing, list_files
from milan.ingest.imagenet import IMAGES, is_image, require_path
from milan.ingest.labels import distinct

TABLES = ("objectInfo.txt", "objectInfo150.txt")  # of the names of the classes


def list_scenes(root: Path) -> Listing:
    """List the files of ADEChallengeData2016 from the folder, its zip, or a folder that holds either. Raises UserError when
    there is none, and where links or folders that belong to it cannot be read."""
    inner = [root / "ADEChallengeData2016", root / "ADEChallengeData2016.zip"]
    if not (root / "images").is_dir():
        root = next((path for path in inner if path.exists()), root)
    hint = "expected ADEChallengeData2016, with images/ and annotations/, or its zip"
    if require_path(root, hint).is_dir():
        require_path(root / "images", hint)
    listing = list_files(root)
    listing.files = {name.removeprefix("ADEChallengeData2016/"): place for name, place in listing.files.items()}
    listing.refuse_lost("images", "annotations", *TABLES)
    return listing


def scene_items(listing: Listing, split: str) -> list[dict]:
    """Pair images/<split>/*.jpg with annotations/<split>/*.png: items {"image", "mask", "name"}.

    Raises UserError when there is no image, one without annotation, or two that share an annotation."""
    items, missing, places, root = [], [], listing.files, listing.root
    for name, place in places.items():
        path = PurePosixPath(name)
        if path.parent == PurePosixPath("images", split) and is_image(name):
            mask = f"annotations/{split}/{path.stem}.png"
            items.append({"image": place, "mask": places.get(mask), "name": path.stem})
            missing += [] if mask in places else [mask]
    if missing:
        raise UserError(f"{len(missing)} scenes of {root} have no annotation, the first is {missing[0]}.")
    if shared := [name for name, count in Counter(item["name"] for item in items).items() if count > 1]:
        raise UserError(f"{root}: images/{split} has two images of one annotation: {listed(shared)}. Remove one of each.")
    if not items:
        raise UserError(f"{root} holds no images ({', '.join(sorted(IMAGES))}) in images/{split}.")
    return items


def tell_unread(listing: Listing, items: list[dict]) -> None:
    """Print what no item uses."""
    listing.tell_unread((place for item in items for place in (item["image"], item["mask"])), lambda name: name in TABLES)


def scene_classes(listing: Listing, classes: int) -> list[str]:
    """Return the names of the classes from objectInfo.txt or objectInfo150.txt, each one once, or numbered names without a table
    of this many.

    A table is tab separated with a header, and the name is in the last column. Raises UserError when it cannot be read."""
    numbers, places = [f"class {number}" for number in range(1, classes + 1)], listing.files
    for table in TABLES:
        if table in places:
            try:
                lines = places[table].read().decode(errors="replace").splitlines()[1:]
            except (OSError, ValueError) as error:
                raise UserError(f"{places[table]} cannot be read ({error}): mend or remove it.") from None
            names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
            if len(names) == classes:
                return distinct(names, numbers, listing.root / table)
    return numbers
