"""Pack the segmentation scenes into records (splits train and val, image and annotation side by side).

Give data.ade20k the ADEChallengeData2016 folder; with null, scenes of the built-in world are drawn in that very
layout and packed by the very same code. Annotation value 0 stays "unlabelled"; training ignores it.
Costs: built-in world a few seconds; ADE20K some minutes, 1 GB.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from milan import records, sources, world
from milan.errors import UserError
from milan.files import SCRATCH, whole_folder
from milan.params import Params, PrepareAde20k
from milan.progress import Progress
from milan.stage import Stage, run

SPLITS = {"train": "training", "val": "validation"}


def main(stage: Stage) -> None:
    p, root = stage.params.prepare_ade20k, stage.params.data.ade20k
    recipe = stage.fingerprint(p, root)
    drawn = SCRATCH / f"scenes-{recipe}"
    if root is None:
        draw(drawn, p)
    with whole_folder(stage.args.out, recipe) as folder:
        manifest = pack(Path(root or drawn), folder, stage.params, source=root or "the built-in world")
    shutil.rmtree(drawn, ignore_errors=True)
    stage.write_metrics({f"prepare_ade20k/{name}": split["images"] for name, split in manifest["splits"].items()}, recipe)


def draw(root: Path, p: PrepareAde20k) -> None:
    if root.exists():
        return
    progress = Progress("drawing scenes", p.train + p.val)
    world.write_ade20k(root, p.seed, p.size, p.train, p.val, progress.to, os.cpu_count())
    progress.close()


def pack(root: Path, folder: Path, params: Params, source: str) -> dict:
    p, splits = params.prepare_ade20k, {}
    scenes = {split: sources.scene_folder(root, name) for split, name in SPLITS.items()}
    sources.refuse_too_few({"segment": (params.segment.batch_size, len(scenes["train"]))}, params.world)
    for split, name in SPLITS.items():
        rows = sources.rows(scenes[split], f"packing {split}", os.cpu_count(), classes=p.classes)
        splits[split] = records.write_split(folder, split, some_labelled(rows, root / "annotations" / name), p.shard_images)
    return records.write_manifest(folder, splits=splits, classes=sources.scene_classes(root, p.classes), source=source)


def some_labelled(rows: Iterator[dict], folder: Path) -> Iterator[dict]:
    """The rows; UserError at the end when not one pixel of all their annotations has a label."""
    labelled = False
    for row in rows:
        labelled = labelled or sources.has_labels(row["mask"])
        yield row
    if not labelled:
        raise UserError(f"{folder}: every pixel of every annotation is unlabelled (0 or 255), so there is nothing to learn.")


if __name__ == "__main__":
    run("prepare_ade20k", main, __doc__, out=Path, metrics=Path)
