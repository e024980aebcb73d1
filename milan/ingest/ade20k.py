"""Read ADE20K's layout from a folder or from its zip, as items for the records (see imagenet.py)."""

from pathlib import Path, PurePosixPath

from milan.core.errors import UserError
from milan.ingest.archives import Place, list_files
from milan.ingest.imagenet import IMAGES, is_image, require_path


def scene_places(root: Path) -> dict[str, Place]:
    """List the files of ADEChallengeData2016, {name: place}, from the folder, its zip, or a folder that holds either. Raises
    UserError when there is none."""
    inner = [root / "ADEChallengeData2016", root / "ADEChallengeData2016.zip"]
    if not (root / "images").is_dir():
        root = next((path for path in inner if path.exists()), root)
    hint = "expected ADEChallengeData2016, with images/ and annotations/, or its zip"
    if require_path(root, hint).is_dir():
        require_path(root / "images", hint)
    return {name.removeprefix("ADEChallengeData2016/"): place for name, place in list_files(root).items()}


def scene_items(places: dict[str, Place], split: str, root: Path) -> list[dict]:
    """Pair images/<split>/*.jpg with annotations/<split>/*.png: items {"image", "mask", "name"}. root: for the messages.

    Raises UserError when there is no image, or one without annotation."""
    items, missing = [], []
    for name, place in places.items():
        path = PurePosixPath(name)
        if path.parent == PurePosixPath("images", split) and is_image(name):
            mask = f"annotations/{split}/{path.stem}.png"
            items.append({"image": place, "mask": places.get(mask), "name": path.stem})
            missing += [] if mask in places else [mask]
    if missing:
        raise UserError(f"{len(missing)} scenes of {root} have no annotation, the first is {missing[0]}.")
    if not items:
        raise UserError(f"{root} holds no images ({', '.join(sorted(IMAGES))}) in images/{split}.")
    return items


def scene_classes(places: dict[str, Place], classes: int) -> list[str]:
    """Return the names of the classes from objectInfo.txt or objectInfo150.txt, or numbered names without a table of this many.

    A table is tab separated with a header, and the name is in the last column. Raises UserError when it cannot be read."""
    for table in ("objectInfo.txt", "objectInfo150.txt"):
        if table in places:
            try:
                lines = places[table].read().decode(errors="replace").splitlines()[1:]
            except (OSError, ValueError) as error:
                raise UserError(f"{places[table]} cannot be read ({error}): mend or remove it.") from None
            names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
            if len(names) == classes:
                return names
    return [f"class {number}" for number in range(1, classes + 1)]
