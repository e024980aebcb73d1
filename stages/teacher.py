"""Make the frozen teacher: a small CLIP trained here on captions, or a released CLIP or other ViT.

At demo scale a small CLIP learns from captioned images that no student sees, so MILAN's lead over MAE includes what those
captions say. At paper scale the teacher is OpenAI's ViT-B/16, as in the release's main_pretrain.py. With pretrain.weights
there is none: a released student is only evaluated. The text tower embeds the class names here (80,000 texts for ImageNet);
zero-shot classification by the student and the text heat maps use these embeddings.
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
from milan.training.device import resolve_params, set_up
from milan.training.loop import FitSettings, fit
from milan.training.resume import SavedState

KIND = Kind(reads=("records",), folders=("out",), files=("metrics", "curve"))


def main(stage: Stage) -> None:
    params, args = stage.params, stage.args
    sizes = {"image_size": params.model.image_size, "patch_size": params.model.patch_size}
    sections = {"teacher": params.teacher, "model": sizes, "compute": params.compute, "no_teacher": params.no_teacher}
    identity = stage.identify(sections, records=args.records / "manifest.json")
    result = {"curve": [], "metrics": {}}
    with whole_folder(args.out, stage.folder_digest(identity)) as folder:
        if params.teacher.tiny:
            stage.tracker.reads(*(Records(args.records, split) for split in ("pairs", "train", "val")))
            saved = stage.keep(SavedState(stage.slug, identity, stage.code))
            result = distributed.launch(train, resolve_params(params, stage.tracker), args.records, folder, saved, stage.tracker)
        elif params.no_teacher:
            print("pretrain.weights is set: no teacher is needed.", flush=True)
            save_no_teacher(folder)
        else:
            device = set_up(resolve_params(params, stage.tracker).compute)
            fetch_teacher(params.teacher.pretrained, folder, wording_of(read_manifest(args.records)), device)
    stage.write_curve(result["curve"])
    stage.write_metrics(result["metrics"], identity)
    if not params.no_teacher:
        stage.tracker.model(args.out, "teacher")


def train(params: Params, records: Path, folder: Path, saved: SavedState, tracker) -> dict:
    """Train the small CLIP in this process, one of the launch, and write it to folder. Return its curve and metrics."""
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
        save_teacher(folder, model, tiny_config(section.tiny, params.model, tokenizer.ids.tolist()))
    wording = Wording(read_manifest(records)["classes"], drawing.PROMPTS)
    if not wording.names:
        if distributed.rank() == 0:
            print("The images have no labels, so the teacher cannot be evaluated.", flush=True)
        return {"curve": curve, "metrics": {}}
    text = embed_classes(model.eval(), tokenizer, wording)
    if distributed.rank() == 0:
        save_class_text(folder, wording, text)
    return {"curve": curve, "metrics": assess(model, text, params, records, device)}


def assess(model, text: torch.Tensor, params: Params, records: Path, device: torch.device) -> dict:
    """Return the teacher's own top-1 in %: zero-shot by the class texts (K, D), linear probe and nearest neighbours."""
    train, val = (
        CentreSamples(Records(records, split), params.linear_eval.resize, params.model.image_size) for split in ("train", "val")
    )
    features = [
        inference.model_outputs(model.encode_image, samples_of, 256, device, "teacher features") for samples_of in (train, val)
    ]
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
