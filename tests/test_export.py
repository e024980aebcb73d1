"""An exported folder is loaded by timm, by transformers and by us, with the same numbers, without a network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from milan import export
from milan.core.files import dvc_hash, file_digest, write_json
from milan.core.validation import validate
from milan.data import transforms
from milan.evaluation.classifier import ClassifierInfo, load_classifier, save_classifier
from milan.method.encoder import build_vit, load_encoder
from milan.method.model import MaskedPretraining
from milan.params import Params
from milan.training.weights import save_weights
from tests.conftest import ROOT
from tests.layouts import encoded
from tests.recipes import composed
from tests.stages.test_offline import GUARD

OTHERS = (
    GUARD
    + """
import json
import timm, torch, transformers
from PIL import Image
from safetensors.torch import load_file
import milan
from milan.data import transforms

images, photo = load_file("given.safetensors")["images"], Image.open("photo.jpg").convert("RGB")
for name in ("encoder", "classifier-mean", "classifier-cls"):
    model = timm.create_model(f"local-dir:{name}", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    said = {"pixels": timm.data.create_transform(**config)(photo)[None]}
    with torch.inference_mode():
        said |= {"timm tokens": model.forward_features(images), "timm": model(images)}
        other = transformers.AutoModel.from_pretrained(name).eval()
        output = other(images)
        said |= {"transformers tokens": output.last_hidden_state, "transformers pooled": output.pooler_output}
        if name != "classifier-mean":
            said["ours"] = milan.load_encoder(name)(images)
        if name != "encoder":
            other = transformers.AutoModelForImageClassification.from_pretrained(name).eval()
            said["transformers"] = other(images).logits
            said["names"] = [other.config.id2label[index] for index in range(other.config.num_labels)]
    said["transformers pixels"] = transformers.AutoImageProcessor.from_pretrained(name)(photo).pixel_values
    torch.save({"type": type(model).__name__, "wrapper": type(output).__name__, **said}, f"{name}.pt")
page = {}
exec(open("use.py").read(), page)
torch.save({name: page[name].detach() for name in ("tokens", "features")}, "use.pt")
print(json.dumps(tried))
"""
)


@pytest.fixture(scope="module")
def params() -> Params:
    return validate(Params, composed("demo"), "demo")


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Fill all parameters, norms and biases included, with random values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return module.eval()


@pytest.fixture(scope="module")
def project(params, tmp_path_factory) -> Path:
    """Return a folder with the outs of a demo and what is exported from them, made where the outs lie."""
    folder, here = tmp_path_factory.mktemp("project"), Path.cwd()
    os.chdir(folder)
    try:
        model = randomised(MaskedPretraining(params.model, params.pretrain.ablation["milan"], 0.75, 64))
        outs = Path("outs/demo/pretrain/milan-0")
        save_weights(outs / "encoder.safetensors", model.encoder.vit.state_dict())
        save_weights(outs / "decoder.safetensors", model.decoder.state_dict())
        write_json(
            Path("reports/metrics/demo/linear_eval/milan-0.json"), {"linear_eval/top1": 38.25, "linear_eval/knn_top1": 35.5}
        )
        write_json(Path("reports/metrics/demo/pretrain/milan-0.json"), {"pretrain/loss": 0.5, "recipe": "0123456789abcdef"})
        write_json(Path("reports/metrics/demo/finetune/milan-0.json"), {"finetune/top1": 37.05, "recipe": "fedcba9876543210"})
        Path("photo.jpg").write_bytes(encoded(size=(90, 60)))
        save_file({"images": torch.randn(3, 3, 48, 48)}, "given.safetensors")
        export.export(outs, Path("encoder"), params)
        for pooling, timm_word in (("mean", "avg"), ("cls", "token")):
            outs = Path("outs/demo/finetune/milan-0")
            vit = randomised(build_vit(params.model, num_classes=3, global_pool=timm_word))
            save_classifier(outs, vit, ClassifierInfo(params.model, pooling, 56, ["disc", "disc", "a <star>"]))
            export.export(outs, Path(f"classifier-{pooling}"), params)
            with torch.inference_mode():
                images = load_file("given.safetensors")["images"]
                torch.save(load_classifier(outs)[0].eval()(images), f"classifier-{pooling}-logits.pt")
        return folder
    finally:
        os.chdir(here)


@pytest.fixture
def in_project(project, monkeypatch) -> Path:
    monkeypatch.chdir(project)
    return project


@pytest.fixture(scope="module")
def others(project) -> dict:
    """Load the exported folders in a fresh process that refuses the network, and return what it computed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "TORCH_HOME", "XDG_CACHE"))}
    environment |= {"HOME": str(project / "home"), "PYTHONPATH": str(ROOT)}
    (project / "use.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/use.md").read_text(), re.S)))
    (project / "exported").symlink_to("encoder")
    done = subprocess.run([sys.executable, "-c", OTHERS], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    return {name: torch.load(project / f"{name}.pt") for name in ("encoder", "classifier-mean", "classifier-cls", "use")}


def near(one: torch.Tensor, other: torch.Tensor, most: float = 1e-5) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= most


def test_an_encoder_has_the_same_features_by_timm_transformers_and_us(others, project, params):
    said, images = others["encoder"], load_file(project / "given.safetensors")["images"]
    encoder = load_encoder(project / "outs/demo/pretrain/milan-0/encoder.safetensors", params.model).eval()
    with torch.inference_mode():
        tokens = encoder(images)
    assert tokens.abs().max() > 0.5 and tokens.shape == (3, 37, 128)
    assert all(near(said[kind], tokens) for kind in ("timm tokens", "transformers tokens", "ours"))
    assert all(near(said[kind], tokens[:, 0]) for kind in ("timm", "transformers pooled"))
    assert (said["type"], said["wrapper"]) == ("VisionTransformer", "TimmWrapperModelOutput")


def test_the_lines_of_the_page_give_what_they_say(others, project, params):
    encoder = load_encoder(project / "outs/demo/pretrain/milan-0/encoder.safetensors", params.model).eval()
    image = transforms.centre(transforms.decode((project / "photo.jpg").read_bytes()), 48, 48)
    with torch.inference_mode():
        assert near(others["use"]["tokens"], encoder(transforms.normalise(image[None])))
    assert others["use"]["features"].shape == (1, 37, 64)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_classifier_has_the_same_answers_and_names(others, project, pooling):
    said, logits = others[f"classifier-{pooling}"], torch.load(project / f"classifier-{pooling}-logits.pt")
    assert logits.abs().max() > 0.1 and near(said["timm"], logits) and near(said["transformers"], logits)
    assert said["names"] == ["disc", "disc", "a <star>"]


def test_preprocessing_is_that_of_our_evaluation(others, project):
    """The demo's encoder resizes to 48 pixels, the classifier here to 56; PIL and torch differ by two grey levels."""
    image = transforms.decode((project / "photo.jpg").read_bytes())
    for name, resize in (("encoder", 48), ("classifier-mean", 56)):
        pixels = transforms.normalise(transforms.centre(image, resize, 48)[None])
        assert near(others[name]["pixels"], pixels, 3 / 255 / 0.22), name
        assert near(others[name]["pixels"], others[name]["transformers pixels"])


def test_the_card_is_in_the_hub_s_format_and_says_where_the_weights_come_from(in_project):
    assert sorted(path.name for path in Path("encoder").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = ModelCard.load("encoder/README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("mit", "timm", "image-feature-extraction")
    assert card.data.datasets is None and "transformers" in card.data.tags
    said = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", card.text, re.M))
    assert (said["Linear eval"], said["k-NN"], said["Fine-tuning"]) == (
        "38.3",
        "35.5",
        "37.1",
    ) and "Segmentation mIoU" not in said
    assert said["teacher"] == "a small CLIP that the same project trained on captions"
    assert said["decoder, masking"] == "prompt, semantic (75 % hidden)"
    assert said["model.safetensors, SHA-256"] == file_digest(Path("encoder/model.safetensors"))
    assert said["outs/demo/pretrain/milan-0, as in dvc.lock"] == dvc_hash(Path("outs/demo/pretrain/milan-0"))
    assert "0123456789abcdef" in card.text and "arXiv:2208.06049" in card.text
    assert all(line.strip() in (ROOT / "README.md").read_text() for line in export.CITATION.splitlines())
    card = ModelCard.load("classifier-mean/README.md")
    said = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", card.text, re.M))
    assert card.data.pipeline_tag == "image-classification" and said["Fine-tuning"] == "37.1" and "k-NN" not in said


@pytest.mark.parametrize("scale, name", [("paper", "vit_base_patch16_224"), ("paper_large", "vit_large_patch16_224")])
def test_the_published_sizes_are_timm_s_own(scale, name):
    """Without our sizes timm builds the same: the names and shapes of ViT-B/16 and ViT-L/16."""
    params = validate(Params, composed(scale), scale)
    with torch.device("meta"):
        ours = build_vit(params.model)
        config = export.timm_config(export.Trained(ours, params.model, 256, "token", [], "milan", Path()))
        theirs = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
        plain = timm.create_model(name, num_classes=0)
    shapes = [{name: tensor.shape for name, tensor in vit.state_dict().items()} for vit in (ours, theirs, plain)]
    assert config["architecture"] == name and shapes[0] == shapes[1] == shapes[2]
    assert (theirs.norm.eps, theirs.blocks[0].attn.num_heads) == (plain.norm.eps, plain.blocks[0].attn.num_heads)
    assert config["pretrained_cfg"]["crop_pct"] == 0.875


def test_the_card_of_a_released_checkpoint_names_it_and_no_licence(in_project):
    tree = composed("paper")
    tree["pretrain"]["weights"] = "/home/alice/milan_vit_base.pth"
    params = validate(Params, tree, "paper")
    trained = export.Trained(None, params.model, 256, "token", [], "milan", Path("outs/paper/pretrain/milan-0"))
    write_json(Path("reports/metrics/paper/pretrain/milan-0.json"), {"recipe": "0123456789abcdef"})
    card = ModelCard(export.model_card(trained, params, "0" * 64))
    assert (card.data.license, card.data.datasets) == ("unknown", ["ILSVRC/imagenet-1k"])
    assert "the released checkpoint milan_vit_base.pth" in card.text and "alice" not in card.text
    assert "No evaluation of it has run." in card.text and "epochs" not in card.text


@pytest.mark.parametrize("source, target, message", [
    ("outs/demo/linear_eval/milan-0", "new", "give a folder of the stage pretrain or finetune"),
    ("outs/demo/pretrain/other-0", "new", "give a folder of the stage pretrain or finetune"),
    ("outs/smoke/pretrain/milan-0", "new", "is of the data smoke, and the active recipe has demo: give its own by --params"),
    ("outs/demo/pretrain/mae-0", "new", "mae-0/encoder.safetensors is missing"),
    ("outs/demo/pretrain/milan-0", "encoder", "encoder is there and not empty; give a new folder"),
    ("outs/demo/pretrain/milan-0", "photo.jpg", "photo.jpg is there and not empty; give a new folder"),
])  # fmt: skip
def test_what_cannot_be_exported_is_refused_before_anything_is_written(in_project, capsys, source, target, message):
    with pytest.raises(SystemExit):
        export.main([source, target, "--params", str(ROOT / "params.yaml")])
    assert message in " ".join(capsys.readouterr().err.split()) and not Path("new").exists()


def test_the_command_writes_what_the_function_does(in_project, capsys):
    export.main(["outs/demo/pretrain/milan-0/", "again", "--params", str(ROOT / "params.yaml")])
    assert capsys.readouterr().out == "again: model.safetensors, config.json, README.md\n"
    for name in ("model.safetensors", "config.json", "README.md"):
        assert Path("again", name).read_bytes() == Path("encoder", name).read_bytes()
