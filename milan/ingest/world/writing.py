"""Write the built-in world as files, in the layouts of ImageNet and ADE20K."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from milan.core.errors import UserError
from milan.core.parallel import ordered
from milan.ingest.world.drawing import World, object_scene, stuff_scene

JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}  # chroma subsampling would take the colour of thin stripes
CHUNK = 200  # scenes of a task: 0.1 to 0.2 s, so that progress moves and processes stay busy


def write_imagenet(
    folder: str | Path,
    world: World,
    seed: int,
    size: int,
    train: int,
    val: int,
    pairs: int,
    progress: Callable[[int], None] | None = None,
    processes: int = 1,
    objects: int = 256,
) -> None:
    """Write object scenes in the ILSVRC layout: `train` + `val` images, and `pairs` other images with captions for a teacher.

    train/<wnid>/<wnid>_<index>.JPEG, val/<wnid>/ILSVRC2012_val_<number>.JPEG (numbers from 1), val_objects/<same>.png
    (255 = object) for the first `objects` of val, pairs/<number>.JPEG, pairs/captions.csv (file, caption) and
    classes.json ({wnid: name}). The folder appears whole or not at all. progress is called with the number of scenes written.
    Raises UserError for a folder that holds files."""
    names = [f"{split}/{wnid}" for split in ("train", "val") for wnid in world.wnids]
    with _whole_folder(folder, [*names, "val_objects", "pairs"]) as root:
        (root / "classes.json").write_text(
            json.dumps(dict(zip(world.wnids, world.classes, strict=True)), indent=1) + "\n", encoding="utf-8"
        )
        counts = {"train": train, "val": val, "pairs": pairs}
        rows = _run(partial(_write_object_scenes, root, world, seed, size, objects), counts, progress, processes)
        with open(root / "pairs/captions.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("file", "caption"), *rows])


def write_ade20k(
    folder: str | Path,
    world: World,
    seed: int,
    size: int,
    train: int,
    val: int,
    progress: Callable[[int], None] | None = None,
    processes: int = 1,
) -> None:
    """Write stuff scenes in the ADEChallengeData2016 layout, with objectInfo.txt (Idx, Name), whole or not at all. progress is
    called with the number of scenes written. Raises UserError for a folder that holds files."""
    names = [f"{kind}/{split}" for kind in ("images", "annotations") for split in ("training", "validation")]
    with _whole_folder(folder, names) as root:
        lines = [f"{number}\t{name}\n" for number, name in enumerate(world.scene_classes, 1)]
        (root / "objectInfo.txt").write_text("".join(["Idx\tName\n", *lines]), encoding="utf-8")
        write = partial(_write_stuff_scenes, root, world, seed, size)
        _run(write, {"training": train, "validation": val}, progress, processes)


def _write_object_scenes(root: Path, world: World, seed: int, size: int, objects: int, job: tuple[str, range]) -> list[tuple]:
    """Write scenes of one split. Returns the rows (file, caption) if the split is pairs."""
    (purpose, indices), rows = job, []
    for index in indices:
        scene = object_scene(world, seed, purpose, index, size)
        wnid = world.wnids[scene.label]
        names = {"train": f"{wnid}/{wnid}_{index}", "val": f"{wnid}/ILSVRC2012_val_{index + 1:08d}", "pairs": f"{index + 1:08d}"}
        name = names[purpose]
        Image.fromarray(scene.image).save(root / purpose / f"{name}.JPEG", **JPEG)
        if purpose == "val" and index < objects:
            Image.fromarray(scene.mask.astype(np.uint8) * 255).save(root / f"val_objects/{Path(name).name}.png")
        elif purpose == "pairs":
            rows.append((f"{name}.JPEG", scene.caption))
    return rows


def _write_stuff_scenes(root: Path, world: World, seed: int, size: int, job: tuple[str, range]) -> list[tuple]:
    """Write scenes of one split with their annotations. Returns no rows."""
    purpose, indices = job
    short = {"training": "train", "validation": "val"}[purpose]
    for index in indices:
        image, annotation = stuff_scene(world, seed, purpose, index, size)
        name = f"{purpose}/ADE_{short}_{index + 1:08d}"
        Image.fromarray(image).save(root / "images" / f"{name}.jpg", **JPEG)
        Image.fromarray(annotation).save(root / "annotations" / f"{name}.png")
    return []


def _run(
    write: Callable[[tuple], list[tuple]], counts: dict[str, int], progress: Callable[[int], None] | None, processes: int
) -> list[tuple]:
    """Write all splits chunk by chunk, in this process or in several. Returns the rows in the order of the scenes."""
    jobs = [
        (purpose, range(start, min(start + CHUNK, count)))
        for purpose, count in counts.items()
        for start in range(0, count, CHUNK)
    ]
    rows, done = [], 0
    with closing(ordered(write, jobs, processes)) as results:
        for (_, indices), written in zip(jobs, results, strict=True):
            rows, done = rows + written, done + len(indices)
            if progress is not None:
                progress(done)
    return rows


@contextmanager
def _whole_folder(folder: str | Path, names: list[str]) -> Iterator[Path]:
    """Yield a new folder with the folders `names`, and rename it to `folder` at the end; a killed run leaves FOLDER.partial.
    Raises UserError when `folder` holds files."""
    folder = Path(folder).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} already holds files; remove it to render the built-in world there.")
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in names:
        (unfinished / name).mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
