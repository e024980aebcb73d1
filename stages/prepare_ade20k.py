"""Pack the segmentation scenes into records (splits train and val, image and annotation side by side).

Give data.ade20k the ADEChallengeData2016 folder, its zip (read in place) or the folder that holds either; with null,
scenes of the built-in world are drawn in that very layout and packed by the very same code. Annotation value 0 stays
"unlabelled"; training ignores it. The metrics also hold the scores of a constant answer, for comparison.
Costs: built-in world a few seconds; ADE20K some minutes, 1 GB.
"""

import os
import shutil
from pathlib import Path

from milan.core.errors import UserError
from milan.core.files import SCRATCH, whole_folder
from milan.core.progress import Progress
from milan.data import records
from milan.ingest import ade20k, imagenet
from milan.ingest.packing import Packing, has_labels
from milan.ingest.world import drawing, writing
from milan.params import Params, PrepareAde20k, SceneTraining, stages_of
from milan.stage import Kind, Stage, run

SPLITS = {"train": "training", "val": "validation"}
KIND = Kind(folders=("out",), files=("metrics",))


def main(stage: Stage) -> None:
    section, root = stage.params.prepare_ade20k, stage.params.data.ade20k
    identity = stage.identify({"prepare_ade20k": section, "data.ade20k": root})
    made_from = stage.folder_digest(identity)
    drawn = SCRATCH / f"scenes-{made_from}"
    if root is None:
        draw(drawn, section)
    with whole_folder(stage.args.out, made_from) as folder:
        manifest = pack(Path(root or drawn), folder, stage.params, root)
    shutil.rmtree(drawn, ignore_errors=True)
    metrics = {name: split["images"] for name, split in manifest["splits"].items()} | constant_answer(stage.args.out, section.classes)
    stage.write_metrics({f"prepare_ade20k/{name}": value for name, value in metrics.items()}, identity)


def draw(root: Path, section: PrepareAde20k) -> None:
    world = drawing.WORLDS[section.world]
    if section.classes != len(world.scene_classes):
        raise UserError(
            f"prepare_ade20k.classes is {section.classes}, and scenes of the {section.world} built-in world have {len(world.scene_classes)} "
            "classes: change classes or prepare_ade20k.world."
        )
    if root.exists():
        return
    progress = Progress("drawing scenes", section.train + section.val)
    writing.write_ade20k(root, world, section.seed, section.size, section.train, section.val, progress.to, os.cpu_count())
    progress.close()


def pack(root: Path, folder: Path, params: Params, given: str | None) -> dict:
    section, listing = params.prepare_ade20k, ade20k.list_scenes(root)
    items = {split: ade20k.scene_items(listing, name) for split, name in SPLITS.items()}
    ade20k.tell_unread(listing, [item for some in items.values() for item in some])
    if given:
        imagenet.refuse_other_counts("prepare_ade20k", {split: len(some) for split, some in items.items()}, section.expect)
    batches = {name: getattr(params, name).batch_size for name in stages_of(SceneTraining)}
    imagenet.refuse_too_few({name: (size, len(items["train"])) for name, size in batches.items()}, params.world_size)
    classes = ade20k.scene_classes(listing, section.classes)
    splits = Packing(folder, section.shard_images, os.cpu_count(), classes=section.classes).pack(items)
    manifest = records.write_manifest(folder, splits=splits, classes=classes)
    refuse_unlabelled(folder, root)
    records.drop_unlisted(folder)
    return manifest


def refuse_unlabelled(folder: Path, root: Path) -> None:
    """Raise UserError when no pixel of a split's annotations has a label."""
    for split, name in SPLITS.items():
        packed = records.Records(folder, split)
        if not any(has_labels(packed[i]["mask"]) for i in range(len(packed))):
            raise UserError(
                f"{root}: every pixel of every annotation in annotations/{name} is unlabelled (0 or 255), so there is nothing to learn."
            )


def constant_answer(folder: Path, classes: int) -> dict[str, float]:
    """Return mIoU and pixel accuracy, in %, of answering every validation pixel with the class of most training pixels."""
    from milan.data import transforms  # here: they load torch, for which the faults of a recipe would have to wait
    from milan.segmentation import miou

    pixels = []
    for split in SPLITS:
        packed = records.Records(folder, split)
        annotations = (transforms.decode_annotation(packed[i]["mask"]) for i in range(len(packed)))
        pixels.append(sum(miou.class_pixels(miou.reduce_zero_label(array, classes), classes) for array in annotations))
    scores = miou.constant_answer(*pixels)
    return {f"constant_{name}": scores[name] for name in ("miou", "pixel_accuracy")}


if __name__ == "__main__":
    run("prepare_ade20k", main, __doc__, KIND)
