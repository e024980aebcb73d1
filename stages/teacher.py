"""The teacher: a frozen CLIP, or another ViT. Trained here on captions of the built-in world, or taken from a release.

At demo scale a tiny CLIP learns from captioned images that no student sees (so MILAN's edge over MAE includes
what those captions tell). At paper scale: OpenAI's ViT-B/16 (as the release's main_pretrain.py); none when pretrain.weights
names a released student, which is only evaluated. The text tower is asked about the classes here and now (for all of
ImageNet 80,000 texts), for zero-shot classification by the student, and for heat maps of text.
Costs: demo about 4 minutes. Expect a zero-shot accuracy of 40 to 75 % on the demo's 20 classes (chance 5 %), nearly 100 % on
demo_gpu's 48.
"""

from pathlib import Path

import torch

from milan.core.files import whole_folder
from milan.data import seeding, transforms
from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records, read_manifest
from milan.evaluation import inference, scores
from milan.evaluation.linear import probe_top1
from milan.ingest.world import drawing
from milan.params import Params
from milan.stage import Kind, Stage, run
from milan.teacher import contrast
from milan.teacher.class_text import Wording, save_class_text
from milan.teacher.clip import Tokenizer, build_tiny, embed_classes, save_no_teacher, save_teacher, tiny_config
from milan.teacher.released import fetch_teacher
from milan.teacher.wording import wording_of
from milan.training import distributed, optim
from milan.training.device import set_up
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState

KIND = Kind(reads=("records",), folders=("out",), files=("metrics", "curve"))


def main(stage: Stage) -> None:
    p, a = stage.params, stage.args
    sizes = {"image_size": p.model.image_size, "patch_size": p.model.patch_size}
    sections = {"teacher": p.teacher, "model": sizes, "compute": p.compute, "no_teacher": p.no_teacher}
    identity = stage.identify(sections, records=a.records / "manifest.json")
    result = {"curve": [], "metrics": {}}
    with whole_folder(a.out, stage.folder_digest(identity)) as folder:
        if p.teacher.tiny:
            stage.tracker.reads(*(Records(a.records, split) for split in ("pairs", "train", "val")))
            saved = stage.keep(SavedState(stage.slug, identity, stage.code))
            result = distributed.launch(train, p, a.records, folder, saved, stage.tracker)
        elif p.no_teacher:
            print("pretrain.weights is set: no teacher is needed.", flush=True)
            save_no_teacher(folder)
        else:
            fetch_teacher(p.teacher.pretrained, folder, wording_of(read_manifest(a.records)), set_up(p.compute))
    stage.write_curve(result["curve"])
    stage.write_metrics(result["metrics"], identity)
    if not p.no_teacher:
        stage.tracker.model(a.out, "teacher")


def train(p: Params, records: Path, folder: Path, saved: SavedState, tracker) -> dict:
    device, t = set_up(p.compute), p.teacher
    pairs = Records(records, "pairs")
    tokenizer = Tokenizer.of_corpus(pairs.column("caption"), t.tiny.context_length)
    seeding.seed_globals(t.seed, "teacher init")
    model = build_tiny(t.tiny, p.model.image_size, p.model.patch_size, len(tokenizer)).to(device)
    samples = contrast.Captioned(pairs, tokenizer, t.seed, p.model.image_size, t.crop_scale)
    optimizer = optim.adamw(contrast.decay_groups(model, t.weight_decay), t.betas)
    # The contrast is over the whole batch, so each process takes its share of it at once.
    share = t.batch_size // distributed.world_size()
    curve = fit(
        contrast.Contrast(model),
        samples,
        optimizer,
        FitSettings("teacher", t, p.compute, p.runtime, t.seed, saved, tracker.point, micro_batch=share),
        lambda batch: (transforms.normalise(batch["image"]), batch["tokens"]),
    )
    if distributed.rank() == 0:
        save_teacher(folder, model, tiny_config(t.tiny, p.model, tokenizer.ids.tolist()))
    wording = Wording(read_manifest(records)["classes"], drawing.PROMPTS)
    if not wording.names:
        print("The images have no labels: how good the teacher is cannot be said.", flush=True)
        return {"curve": curve, "metrics": {}}
    text = embed_classes(model.eval(), tokenizer, wording)
    if distributed.rank() == 0:
        save_class_text(folder, wording, text)
    return {"curve": curve, "metrics": assess(model, text, p, records, device)}


def assess(model, text: torch.Tensor, p: Params, records: Path, device: torch.device) -> dict:
    """Zero-shot, by the classes' texts (K, D), and linear-probe accuracy of the teacher itself."""
    train, val = (CentreSamples(Records(records, split), p.linear_eval.resize, p.model.image_size) for split in ("train", "val"))
    features = [inference.model_outputs(model.encode_image, d, 256, device, "teacher features") for d in (train, val)]
    unit = torch.nn.functional.normalize(features[1][0], dim=1)
    zero_shot = dict(scores.accuracy(unit @ text.T, features[1][1], "teacher/zero_shot"))
    return {
        "teacher/zero_shot_top1": zero_shot["teacher/zero_shot/top1"],
        "teacher/linear_top1": probe_top1(*features[0], *features[1]),
        "teacher/knn_top1": scores.knn_top1(*features[0], *features[1], device),
    }


if __name__ == "__main__":
    with distributed.torchrun():
        run("teacher", main, __doc__, KIND)
