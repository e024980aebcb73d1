"""Pack the robustness sets, images of the training classes that differ from those of training, into records.

Give data.robustness.imagenet_a, imagenet_r, imagenet_sketch, imagenet_v2 and imagenet_c, any of them, the unpacked folders of
their authors (docs/data.md): each becomes a split, and ImageNet-C one for each corruption and severity. Without imagenet_c,
prepare_robustness.images of each class of the validation images are corrupted here in five ways and five strengths, written in
ImageNet-C's layout and read by the very same code. Missing and unknown folders are named before the work. Without any set
nothing is measured, and the stage `robustness` says so. Costs: demo a few seconds; ImageNet-C as much disk as its tars.
"""

import os
import shutil
from pathlib import Path

from milan.core.files import SCRATCH, whole_folder
from milan.data import records
from milan.ingest import corrupting, robustness
from milan.ingest.packing import Packing
from milan.stage import Kind, Stage, run

KIND = Kind(reads=("records",), folders=("out",), files=("metrics",))


def main(stage: Stage) -> None:
    params, args = stage.params, stage.args
    section, given = params.prepare_robustness, params.data.robustness
    val, view = records.Records(args.records, "val"), (params.robustness.resize, params.model.image_size)
    sections = {"prepare_robustness": section, "data.robustness": given, "view": view}
    identity = stage.identify(sections, records=args.records / "manifest.json")
    made_from = stage.folder_digest(identity)
    paths = {name: Path(path) for name, path in vars(given).items() if path}
    wnids, drawn = val.manifest.get("wnids", []), SCRATCH / f"corrupted-{made_from}"
    splits = robustness.find_splits(paths, {wnid: label for label, wnid in enumerate(wnids)})
    with whole_folder(args.out, made_from) as folder:
        if "imagenet_c" not in paths and section.images and val.classes:
            labels = corrupting.write_corrupted(drawn, val, section.images, section.seed, view, os.cpu_count())
            splits |= robustness.find_splits({"imagenet_c": drawn}, labels, corrupting.STRENGTHS)
        packing, entries = Packing(folder, section.shard_images, os.cpu_count()), {}
        for split, folders in splits.items():  # one by one, because ImageNet-C has millions of files
            entries |= packing.pack({split: folders.items()})
        records.write_manifest(folder, splits=entries, classes=val.manifest.get("classes", []))
        records.drop_unlisted(folder)
    if not entries:
        print("No set of data.robustness is given and prepare_robustness.images is 0: robustness is not measured.", flush=True)
    shutil.rmtree(drawn, ignore_errors=True)
    stage.write_metrics({f"prepare_robustness/{split}": entry["images"] for split, entry in entries.items()}, identity)


if __name__ == "__main__":
    run("prepare_robustness", main, __doc__, KIND)
