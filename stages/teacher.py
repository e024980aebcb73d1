"""Make the frozen teacher: a small CLIP trained here on captions, or a released CLIP or other ViT.

At paper scale the teacher is OpenAI's ViT-B/16, as in the release's main_pretrain.py; at demo scale it is a small CLIP that
the recipe demo_teacher trained and that is kept in conf/teacher. A recipe with teacher.tiny trains one here, on captioned
images that no student sees. MILAN's lead over MAE includes what those captions say. With pretrain.weights there is no
teacher: a released student is only evaluated. The text tower embeds the class names here (80,000 texts for ImageNet);
zero-shot classification by the student and the text heat maps use these embeddings.
Costs: demo a few seconds; demo_teacher about 10 minutes. Expect a zero-shot accuracy of 97 % on the 20 classes of both
(chance 5 %), nearly 100 % on demo_gpu's 48.
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
from milan.teacher.class_text import Wording, read_class_text, save_class_text
from milan.teacher.clip import Tokenizer, build_tiny, embed_classes, read_config, save_no_teacher, save_teacher, tiny_config
from milan.teacher.frozen import compute_targets, load_tower
from milan.teacher.released import fetch_teacher
from milan.teacher.wording import wording_of
from milan.training import distributed, optim
from milan.training.device import resolve_params, set_up
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState

KIND = Kind(reads=("records",), folders=("out",), files=("metrics", "curve"))


def main(stage: Stage) -> None:
    params, args = stage.params, stage.args
    sizes = {"image_size": params.model.image_size, "patch_size": params.model.patch_size}
    sections = {"teacher": params.teacher, "model": sizes, "compute": params.compute, "no_teacher": params.no_teacher}
    identity = stage.identify(sections, records=args.records / "manifest.json")
    if not params.no_teacher:
        params = resolve_params(params, stage.tracker)
    curve, metrics = [], {}
    with whole_folder(args.out, stage.folder_digest(identity)) as folder:
        if params.teacher.tiny:
            stage.tracker.reads(*(Records(args.records, split) for split in ("pairs", "train", "val")))
            saved = stage.keep(SavedState(stage.slug, identity, stage.code))
            curve = distributed.launch(train, params, args.records, folder, saved, stage.tracker)["curve"]
        elif params.no_teacher:
            print("pretrain.weights is set: no teacher is needed.", flush=True)
            save_no_teacher(folder)
        else:
            fetch(params, args.records, folder)
        if not params.no_teacher:
            metrics = assess(params, args.records, folder)
    if metrics:
        doubt_chance(stage, metrics["teacher/zero_shot_top1"])
    stage.write_curve(curve)
    stage.write_metrics(metrics, identity)
    if not params.no_teacher:
        stage.tracker.model(args.out, "teacher")


def train(params: Params, records: Path, folder: Path, saved: SavedState, tracker) -> dict:
    """Train the small CLIP in this process, one of the launch, and write it to folder. Return {"curve": points}."""
    device, section = set_up(params.compute), params.teacher
    pairs = Records(records, "pairs")
    tokenizer = Tokenizer.of_corpus(pairs.column("caption"), section.tiny.context_length)
    seeding.seed_globals(section.seed, "teacher init")
    model = build_tiny(section.tiny, params.model.image_size, params.model.patch_size, len(tokenizer)).to(device)
    samples = contrast.Captioned(pairs, tokenizer, section.seed, params.model.image_size, section.crop_scale)
    optimizer = optim.adamw(contrast.decay_groups(model, section.weight_decay), section.betas)
    # The contrast is over the whole batch, so each process takes its share of it at once.
    share = section.batch_size // distributed.world_size()
    curve = fit(
        contrast.Contrast(model),
        samples,
        optimizer,
        FitSettings("teacher", section, params.compute, params.runtime, section.seed, saved, tracker.point, micro_batch=share),
        lambda batch: (transforms.normalise(batch["image"]), batch["tokens"]),
    )
    if distributed.rank() == 0:
        save_teacher(folder, model, tiny_config(section.tiny, params.model, tokenizer.ids.tolist(), params.world))
        if names := read_manifest(records)["classes"]:
            wording = Wording(names, drawing.PROMPTS)
            save_class_text(folder, wording, embed_classes(model.eval(), tokenizer, wording))
    return {"curve": curve}


def fetch(params: Params, records: Path, folder: Path) -> None:
    """Write the released teacher of the recipe to folder."""
    source, manifest = params.teacher.pretrained, read_manifest(records)
    wording = Wording(manifest["classes"], drawing.PROMPTS) if source.library == "milan" else wording_of(manifest)
    fetch_teacher(source, folder, wording, set_up(params.compute))


def doubt_chance(stage: Stage, top1: float) -> None:
    """Say so where the teacher's zero-shot accuracy is that of guessing."""
    val = Records(stage.args.records, "val")
    if scores.is_chance(top1, len(val.classes), len(val)):
        stage.doubt(
            f"The teacher's zero-shot accuracy, {top1:.1f} %, is that of guessing among {len(val.classes)} classes: it learned too "
            "little, or the classes' names mean nothing to it. What students learn from its features then says nothing of the method."
        )


def assess(params: Params, records: Path, folder: Path) -> dict:
    """Return the teacher's own top-1 in %: zero-shot by the class texts, and for a small CLIP, whose features of all training
    images are soon computed, by a linear probe and nearest neighbours too. Empty where there are no class texts."""
    text = read_class_text(folder)
    if text is None:
        print("Without labels and a text tower the teacher's own accuracy is not measured.", flush=True)
        return {}
    device = set_up(params.compute)
    tower = load_tower(folder, params.compute, device)

    settings = (params.compute, "imagenet", tower.grid)

    def class_tokens(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher's class-token features (n, D) of a split as the student sees it, and its labels (n,)."""
        samples = CentreSamples(Records(records, split), params.linear_eval.resize, params.model.image_size)
        return inference.model_outputs(
            lambda images: compute_targets(tower, images, *settings)[0][:, 0],
            samples,
            250,
            device,
            f"teacher features, {split}",
            params.runtime.workers,
            prepare=lambda images: images,  # compute_targets takes uint8
        )

    features, labels = class_tokens("val")
    unit = torch.nn.functional.normalize(features, dim=1)
    zero_shot = dict(scores.accuracy(unit @ text.embeddings.T, labels, "teacher/zero_shot"))
    metrics = {"teacher/zero_shot_top1": zero_shot["teacher/zero_shot/top1"]}
    if read_config(folder)["kind"] != "tiny":
        return metrics
    train = class_tokens("train")
    return {
        **metrics,
        "teacher/linear_top1": probe_top1(*train, features, labels),
        "teacher/knn_top1": scores.knn_top1(*train, features, labels, device),
    }


if __name__ == "__main__":
    with distributed.torchrun():
        run("teacher", main, __doc__, KIND)
