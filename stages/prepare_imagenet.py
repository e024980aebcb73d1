"""Pack the classification images into records (splits train, val and, where there are captions, pairs).

Give data.imagenet a folder that holds one of these; with null the built-in captioned world is drawn as real JPEG files in
the first layout and packed by the very same code:

    train/<class>/ and val/<class>/     (or Train/, training/; test/, validation/), or a val/ of images alone, with its labels
                                        as below (or as in Tiny ImageNet)
    <class>/                            with holdout, the share of the images for validation
    ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, read in place, with the val labels in one of
        ILSVRC2012_devkit_t12.tar.gz    as published
        LOC_val_solution.csv            as on Kaggle
        val_labels.txt                  lines of a file's name and its WordNet id
    train-*.parquet and val-*.parquet   (or validation-*, or in data/) with the columns image and label, as on Hugging Face
    images in any folders               without labels: pretraining and segmentation run, what needs labels does not.
                                        val/ is for validation where there is one, else the share holdout, else every 50th image

The captions of a teacher that is trained here come from pairs/captions.csv (columns file, caption), or from the names of the
classes. A run that was killed, or that met broken files, keeps the shards that it finished.
Costs: the demo's world a few seconds; ImageNet about an hour on 16 cores, 145 GB.
"""

import os
import shutil
from collections import Counter
from pathlib import Path

from milan.core.errors import UserError
from milan.core.files import SCRATCH, whole_folder
from milan.core.progress import Progress
from milan.data import records
from milan.data.shares import images_of_share
from milan.ingest import imagenet
from milan.ingest.packing import Packing
from milan.ingest.world import drawing, writing
from milan.params import Data, ImageTraining, Params, PrepareImagenet, stages_of
from milan.stage import Kind, Stage, run

KIND = Kind(folders=("out",), files=("metrics",))


def main(stage: Stage) -> None:
    section, root = stage.params.prepare_imagenet, stage.params.data.imagenet
    identity = stage.identify({"prepare_imagenet": section, "data.imagenet": root})
    made_from = stage.folder_digest(identity)
    drawn = SCRATCH / f"world-{made_from}"
    print(where_results_go(stage.params.data), flush=True)
    if root is None:
        draw(drawn, section)
    with whole_folder(stage.args.out, made_from) as folder:
        manifest = pack(Path(root or drawn), folder, stage.params, root)
    shutil.rmtree(drawn, ignore_errors=True)
    doubt_one_class(stage, manifest["classes"])
    splits = {f"prepare_imagenet/{name}": split["images"] for name, split in manifest["splits"].items()}
    stage.write_metrics({**splits, "prepare_imagenet/classes": len(manifest["classes"])}, identity)


def where_results_go(data: Data) -> str:
    if data.imagenet is None:
        return f"No data.imagenet is given: images of the built-in world are drawn, and results go to outs/{data.name}."
    return (
        f"These images are called {data.name}: results go to outs/{data.name}, reports/metrics/{data.name} and MLflow's experiment "
        f"milan-{data.name}, in place of those of other images of that name. To name them: -S data.name=NAME."
    )


def doubt_one_class(stage: Stage, classes: list[str]) -> None:
    """Say so where all validation images are of one class."""
    labels = set(records.Records(stage.args.out, "val").column("label")) if classes else ()
    if len(labels) == 1:
        stage.doubt(
            f"All validation images are of one class, {classes[labels.pop()]}: accuracies on them do not tell whether classes are told "
            "apart. Give val/ images of every class."
        )


def draw(root: Path, section: PrepareImagenet) -> None:
    world = drawing.WORLDS[section.world]
    for split, images in {"train": section.train, "val": section.val}.items():
        if images < len(world.classes):
            raise UserError(
                f"prepare_imagenet.{split} is {images}, and the {section.world} built-in world has {len(world.classes)} classes: give each "
                "an image."
            )
    for other in set(root.parent.glob("world-*")) - {root}:  # left by another recipe
        shutil.rmtree(other, ignore_errors=True)
    if root.exists():
        return
    progress = Progress("drawing the world", section.train + section.val + section.pairs)
    writing.write_imagenet(
        root, world, section.seed, section.size, section.train, section.val, section.pairs, progress.to, os.cpu_count()
    )
    progress.close()


def pack(root: Path, folder: Path, params: Params, given: str | None) -> dict:
    section = params.prepare_imagenet
    images = imagenet.read_images(root, section.holdout if given else None)
    if given:
        counts = {"train": len(images.train), "val": len(images.val), "classes": len(images.classes)}
        imagenet.refuse_other_counts("prepare_imagenet", counts, section.expect)
    pairs = captioned(root, images, params)
    imagenet.refuse_too_few(needs(params, images, len(pairs)), params.world_size)
    packing = Packing(folder, section.shard_images, os.cpu_count(), section.short_side)
    splits = packing.pack({"train": images.train, "val": images.val, **({"pairs": pairs} if pairs else {})})
    manifest = records.write_manifest(folder, splits=splits, wnids=images.wnids, classes=images.classes)
    records.drop_unlisted(folder)
    return manifest


def captioned(root: Path, images: imagenet.Images, params: Params) -> list[dict]:
    """Return the captioned images for a teacher that is trained here: pairs/captions.csv, else images captioned by their
    class names. Raises UserError where the recipe trains a teacher and there is neither."""
    pairs, most = imagenet.caption_pairs(root), params.prepare_imagenet.pairs
    if pairs or not most:
        return pairs
    if images.classes:
        pairs = imagenet.class_captions(images.train, images.classes, most)
        few = f" of {len(pairs):,} of the {len(images.train):,} training images (prepare_imagenet.pairs is {most:,})"
        print(
            "No captions in pairs/captions.csv: the teacher trained here will learn from class names, as captions"
            f"{few if len(pairs) < len(images.train) else ''}.",
            flush=True,
        )
        return pairs
    if params.teacher.tiny:
        raise UserError(
            f"{root} has neither labels nor {root / 'pairs' / 'captions.csv'} (columns file, caption), and the teacher that is "
            f"trained here needs one of them. Where its folders are classes, {imagenet.HOLD_OUT} reads them so, or move them to "
            f"{root / 'train'} and {root / 'val'}. Else write captions of some images, or take a released teacher (-S scale=photos)."
        )
    return []


def needs(section: Params, images: imagenet.Images, pairs: int) -> dict[str, tuple[int, int]]:
    """Return {stage: (its batch size, the images that it trains on)} of the stages that will run."""
    counts, train = {}, len(images.train)
    if images.classes:
        of_classes = Counter(item["label"] for item in images.train).values()
        for name in stages_of(ImageTraining):
            training = getattr(section, name)
            share = getattr(training, "labels", 1)
            counts[name] = (training.batch_size, sum(images_of_share(count, share) for count in of_classes))
    if section.pretrain.weights is None and any(section.pretrain.ablation[v].target != "none" for v in section.variants):
        counts["pretrain"] = (section.pretrain.batch_size, train)
    return counts | ({"teacher": (section.teacher.batch_size, pairs)} if section.teacher.tiny else {})


if __name__ == "__main__":
    run("prepare_imagenet", main, __doc__, KIND)
