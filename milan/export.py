"""Export a trained encoder or classifier as a folder that timm and transformers load, and that the Hugging Face hub takes.

    python -m milan.export outs/demo/pretrain/milan-0 FOLDER     # an encoder, from the stage pretrain
    python -m milan.export outs/demo/finetune/milan-0 FOLDER     # a classifier with the names of its classes

FOLDER gets model.safetensors, config.json (timm's: sizes and preprocessing) and README.md, the model card. It is loaded by
timm.create_model("local-dir:FOLDER", pretrained=True) and transformers.AutoModel.from_pretrained("FOLDER").
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCardData
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

from milan.core.errors import UserError
from milan.core.files import dvc_hash, explain_os_errors, file_digest, read_json, write_json, write_whole
from milan.core.program import fail
from milan.core.repository import revision
from milan.data import transforms
from milan.evaluation.classifier import TIMM_POOLING, load_classifier
from milan.method.encoder import load_encoder
from milan.params import Model, Params, Training, read_params
from milan.report.results import MEASURES, TITLES, ZERO_SHOT, method_name, read_metrics
from milan.report.text import decimal, in_markdown, markdown_table

LICENCES = {
    "mit": "MIT, as the code that trained it. Whether the data's own terms bind you too is for you to find out.",
    "unknown": "The licence is that of the released checkpoint. Write it into the head of this file before you publish it.",
}
CITATION = """\
@inproceedings{hou2025milan, author = {Hou, Zejiang and Kung, Sun-Yuan}, booktitle = {ICASSP}, year = {2025},
  title = {Masked Image Pretraining on Language Assisted Representation}}
@article{hou2022milan, author = {Hou, Zejiang and Sun, Fei and Chen, Yen-Kuang and Xie, Yuan and Kung, Sun-Yuan},
  title = {MILAN: Masked Image Pretraining on Language Assisted Representation}, journal = {arXiv:2208.06049}, year = {2022}}
"""


class Trained(NamedTuple):
    """What a stage trained, with all that the exported files say about it."""

    vit: VisionTransformer
    model: Model
    resize: int  # short side of an image in pixels, before the central crop
    pooling: str  # timm's word
    classes: list[str]  # of a classifier; of an encoder none
    variant: str
    source: Path  # the folder that the stage wrote


def export(source: Path, target: Path, params: Params) -> None:
    """Write the export of a folder that the stage pretrain or finetune of this recipe wrote.

    Raises UserError where `source` is another folder, or of another recipe, and where `target` holds files."""
    trained = read(source, params)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there and not empty; give a new folder, since all that it holds would be published.")
    weights = {name: tensor.contiguous() for name, tensor in sorted(trained.vit.state_dict().items())}
    write_whole(target / "model.safetensors", save(weights, {"format": "pt"}))
    write_json(target / "config.json", timm_config(trained))
    write_whole(target / "README.md", model_card(trained, params, file_digest(target / "model.safetensors")).encode())


def read(source: Path, params: Params) -> Trained:
    """Read what a stage wrote into outs/<data>/<stage>/<variant>-<seed>. Raises UserError for any other folder."""
    *_, data, stage, name = Path("/", "/", source.absolute()).parts
    variant = name.rpartition("-")[0]
    if stage not in ("pretrain", "finetune") or variant not in params.pretrain.ablation:
        raise UserError(
            f"{source}: give a folder of the stage pretrain or finetune, such as outs/{params.data.name}/pretrain/milan-0."
        )
    if data != params.data.name:
        raise UserError(
            f"{source} is of the data {data}, and the active recipe has {params.data.name}: give its own by --params."
        )
    if stage == "finetune":
        vit, info = load_classifier(source)
        return Trained(vit, info.model, info.resize, TIMM_POOLING[info.pooling], info.classes, variant, source)
    vit = load_encoder(source / "encoder.safetensors", params.model).vit
    return Trained(vit, params.model, params.linear_eval.resize, "token", [], variant, source)


def timm_config(trained: Trained) -> dict:
    """Return timm's config.json: the architecture, all its sizes, the names of the classes, and the preprocessing."""
    model, size = trained.model, trained.model.encoder
    (mean, deviation), side = transforms.IMAGENET, model.image_size
    return {
        "architecture": "vit_large_patch16_224" if size.embed_dim == 1024 else "vit_base_patch16_224",
        "num_classes": len(trained.classes),
        "num_features": size.embed_dim,
        "global_pool": trained.pooling,
        "model_args": {
            "img_size": side,
            "patch_size": model.patch_size,
            "embed_dim": size.embed_dim,
            "depth": size.depth,
            "num_heads": size.num_heads,
            "global_pool": trained.pooling,
        },
        **({"label_names": trained.classes} if trained.classes else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop_share(side, trained.resize),
            "crop_mode": "center",
            "mean": mean,
            "std": deviation,
            "num_classes": len(trained.classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def crop_share(side: int, resize: int) -> float:
    """Return the share of `resize` pixels that are cut out; timm divides by it and rounds down, which must give `resize` again."""
    share = side / resize
    return share if int(side / share) == resize else math.nextafter(share, 0)


def model_card(trained: Trained, params: Params, sha256: str) -> str:
    """Return README.md in the hub's format: a head of YAML, then what the model is, how good, and where it came from."""
    kind = "image-classification" if trained.classes else "image-feature-extraction"
    licence = "unknown" if params.pretrain.weights else "mit"
    head = ModelCardData(
        license=licence,
        library_name="timm",
        pipeline_tag=kind,
        tags=["timm", "transformers", "milan", "masked-image-modeling", kind],
        datasets=["ILSVRC/imagenet-1k"] if is_imagenet(params) else None,
    )
    model, width = trained.model, trained.model.encoder.embed_dim
    if trained.classes:
        output = f"logits = model(images)  # (B, {len(trained.classes)}), the classes in the order of label_names in config.json"
    else:
        output = f"features = model(images)  # (B, {width}), the class token; model.forward_features gives (B, {1 + model.n_patches}, {width})"
    return f"""\
---
{head.to_yaml()}
---

# {heading(trained, params)}

{f"A classifier for {len(trained.classes)} classes" if trained.classes else "An encoder without a head"}: a vision transformer
({model.name}: images of {model.image_size} pixels, patches of {model.patch_size}), pretrained by masked prediction{fine_tuned(trained)}.
MILAN ([arXiv 2208.06049](https://arxiv.org/abs/2208.06049)) hides most patches of an image and predicts the features of a frozen
CLIP for all of them. Trained by an independent reproduction; the paper's authors are not involved.

```python
import timm
from transformers import AutoModel

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # on the hub: "hf-hub:USER/NAME"
{output}
model = AutoModel.from_pretrained("FOLDER")  # the same by transformers; on the hub: "USER/NAME"
```

Images are resized to {trained.resize} pixels at the short side (bicubic), cut to the central {model.image_size}, and normalised with
ImageNet's mean and deviation, as config.json says.

## How it was trained

{markdown_table([{"": name, "value": value} for name, value in recipe(trained, params).items()])}

## Metrics of this run

{metrics_table(trained, params)}

## Licence and citation

{LICENCES[licence]}

```bibtex
{CITATION}```

## Provenance

{markdown_table([{"": name, "digest": f"{value}"} for name, value in provenance(trained, params, sha256).items()])}
"""


def heading(trained: Trained, params: Params) -> str:
    name = Path(params.pretrain.weights).stem if params.pretrain.weights else method_name(trained.variant)
    return in_markdown(f"{name}, {trained.model.name}, {data_words(params)}")


def fine_tuned(trained: Trained) -> str:
    return " and fine-tuned with labels" if trained.classes else ""


def recipe(trained: Trained, params: Params) -> dict[str, str]:
    """Return {what: value} of the settings that somebody who compares results asks for first."""
    row, pretrain = params.pretrain.ablation[trained.variant], params.pretrain
    if pretrain.weights:
        said = {"pretraining": f"the released checkpoint {Path(pretrain.weights).name}"}
    elif row.target == "none":
        said = {"pretraining": "none: random weights"}
    else:
        said = {
            "target": "features of the teacher" if row.target == "clip" else "pixels of the hidden patches",
            "teacher": teacher_words(params) if "clip" in row.target or row.masking == "semantic" else "none",
            "decoder, masking": f"{row.decoder}, {row.masking} ({100 * pretrain.mask_ratio:g} % hidden)",
            "pretraining": training_words(pretrain),
        }
    if trained.classes:
        said["fine-tuning"] = f"{training_words(params.finetune)}, {100 * params.finetune.labels:g} % of the labels"
    return {"recipe": f"conf/scale/{params.scale}.yaml", "data": data_words(params), **said}


def training_words(section: Training) -> str:
    return f"{section.epochs:g} epochs, batch size {section.batch_size}, peak learning rate {section.lr:g}"


def teacher_words(params: Params) -> str:
    given = params.teacher.pretrained
    if given is None or given.library == "milan":
        return "a small CLIP that the same project trained on captions"
    return " ".join(word for word in (given.library, given.model, given.tag or Path(given.file).name) if word)


def is_imagenet(params: Params) -> bool:
    """Return whether the recipe insists on the counts of ILSVRC2012."""
    expected = params.prepare_imagenet.expect
    return expected is not None and (expected.train, expected.classes) == (1_281_167, 1000)


def data_words(params: Params) -> str:
    return "ImageNet-1K" if is_imagenet(params) else params.data.title


def metrics_table(trained: Trained, params: Params) -> str:
    """Return the measures of this variant and seed that there are; of a classifier, those of its own stage alone."""
    stage, name = trained.source.absolute().parts[-2:]
    rows = []
    for column, (measured, entry) in {**MEASURES, **ZERO_SHOT}.items():
        path = Path("reports/metrics", params.data.name, measured, f"{name}.json")
        if path.exists() and stage in ("pretrain", measured) and entry in (metrics := read_metrics(path)):
            title = TITLES[column] if params.data.ade20k else TITLES[column].replace("ADE20K", "Segmentation")
            rows.append({"measure": title, "%": decimal(metrics[entry])})
    return markdown_table(rows) if rows else "No evaluation of it has run."


def provenance(trained: Trained, params: Params, sha256: str) -> dict[str, str]:
    """Return {what: digest} by which the weights can be traced to dvc.lock, and to the runs in MLflow."""
    stage, name = trained.source.absolute().parts[-2:]
    metrics = Path("reports/metrics", params.data.name, stage, f"{name}.json")
    return {
        "model.safetensors, SHA-256": sha256,
        f"outs/{params.data.name}/{stage}/{name}, as in dvc.lock": dvc_hash(trained.source) or "not computed, for its size",
        "recipe and inputs, as in its metrics": read_json(metrics, recipe=str)["recipe"],
        "git revision of the export": revision(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m milan.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="OUTS", help="the folder of a pretrained encoder or a fine-tuned classifier")
    parser.add_argument("target", type=Path, metavar="FOLDER", help="the folder to write; it must be new, or empty")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the recipe of OUTS (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        with explain_os_errors():
            export(args.source, args.target, read_params(args.params))
    except UserError as error:
        fail(str(error))
    print(f"{args.target}: model.safetensors, config.json, README.md")


if __name__ == "__main__":
    main()
