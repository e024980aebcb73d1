"""ADE20K's layout, as a folder or as the zip that it comes in: items for the records out (see sources)."""

from pathlib import Path, PurePosixPath

from milan.core.errors import UserError
from milan.ingest.archives import Place, tree
from milan.ingest.imagenet import IMAGES, existing, is_image


def scene_places(root: Path) -> dict[str, Place]:
    """The files of ADEChallengeData2016 by their names in it: of the folder, of its zip, or of a folder that holds either."""
    inner = [root / "ADEChallengeData2016", root / "ADEChallengeData2016.zip"]
    if not (root / "images").is_dir():
        root = next((path for path in inner if path.exists()), root)
    hint = "expected ADEChallengeData2016, with images/ and annotations/, or its zip"
    if existing(root, hint).is_dir():
        existing(root / "images", hint)
    return {name.removeprefix("ADEChallengeData2016/"): place for name, place in tree(root).items()}


def scene_items(places: dict[str, Place], split: str, root: Path) -> list[dict]:
    """images/<split>/*.jpg with annotations/<split>/*.png -> items {"image", "mask", "name"}."""
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
    """Names from objectInfo.txt or objectInfo150.txt (tab separated, a header, the name last or second), else numbers.
    Raises UserError for one that cannot be read."""
    for name in ("objectInfo.txt", "objectInfo150.txt"):
        if name in places:
            try:
                lines = places[name].read().decode(errors="replace").splitlines()[1:]
            except (OSError, ValueError) as error:
                raise UserError(f"{places[name]} cannot be read ({error}): mend or remove it.") from None
            found = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
            if len(found) == classes:
                return found
    return [f"class {k}" for k in range(1, classes + 1)]
