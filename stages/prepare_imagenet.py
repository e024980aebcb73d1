"""Pack the classification images into records (splits train, val and, where there are captions, pairs).

Give data.imagenet the folder that holds train/ and val/ in class folders; with null the built-in captioned
world is drawn as real JPEG files in that very layout and packed by the very same code. The captions of a teacher that
is trained here come from pairs/captions.csv (columns file, caption), or from the names of the class folders.
Costs: built-in world about 30 s; ImageNet about an hour on 16 cores, 145 GB.
"""

import os
import shutil
from pathlib import Path

from milan import records, sources, world
from milan.files import SCRATCH, whole_folder
from milan.params import Params, PrepareImagenet
from milan.progress import Progress
from milan.stage import Stage, run


def main(stage: Stage) -> None:
    p, root = stage.params.prepare_imagenet, stage.params.data.imagenet
    recipe = stage.fingerprint(p, root)
    drawn = SCRATCH / f"world-{recipe}"
    if root is None:
        draw(drawn, p)
    with whole_folder(stage.args.out, recipe) as folder:
        manifest = pack(Path(root or drawn), folder, stage.params, source=root or "the built-in world")
    shutil.rmtree(drawn, ignore_errors=True)
    splits = {f"prepare_imagenet/{name}": split["images"] for name, split in manifest["splits"].items()}
    stage.write_metrics({**splits, "prepare_imagenet/classes": len(manifest["classes"])}, recipe)


def draw(root: Path, p: PrepareImagenet) -> None:
    if root.exists():
        return
    progress = Progress("drawing the world", p.train + p.val + p.pairs)
    world.write_imagenet(root, p.seed, p.size, p.train, p.val, p.pairs, progress.to, os.cpu_count())
    progress.close()


def pack(root: Path, folder: Path, params: Params, source: str) -> dict:
    p = params.prepare_imagenet
    items = {"train": sources.image_folder(root, "train")}
    items["val"] = sources.with_object_masks(root, sources.image_folder(root, "val"))
    wnids = sources.same_classes(root)
    classes = sources.class_names(root, wnids)
    items["pairs"] = sources.caption_pairs(root)
    if p.pairs and not items["pairs"]:
        items["pairs"] = sources.class_captions(items["train"], classes, p.pairs)
        print("No pairs/captions.csv: the teacher that is trained here will learn from the class names, as captions.", flush=True)
    sources.refuse_too_few(needs(params, len(items["train"]), len(items["pairs"])), params.world)
    splits = {}
    for split in filter(items.get, items):
        rows = sources.rows(items[split], f"packing {split}", os.cpu_count(), p.short_side)
        splits[split] = records.write_split(folder, split, rows, p.shard_images)
    return records.write_manifest(folder, splits=splits, wnids=wnids, classes=classes, source=source)


def needs(p: Params, train: int, pairs: int) -> dict[str, tuple[int, int]]:
    """{stage: (its global batch, the images it trains on)} of what will run."""
    trains = p.pretrain.weights is None and any(p.pretrain.recipes[v].target != "none" for v in p.variants)
    found = {
        "linear_eval": (p.linear_eval.batch_size, train),
        "finetune": (p.finetune.batch_size, round(p.finetune.labels * train)),
    }
    found |= {"pretrain": (p.pretrain.batch_size, train)} if trains else {}
    return found | ({"teacher": (p.teacher.batch_size, pairs)} if p.teacher.tiny else {})


if __name__ == "__main__":
    run("prepare_imagenet", main, __doc__, out=Path, metrics=Path)
