"""Released teachers: every layout is read to the same weights, and a wrong file or name is refused with its reason."""

import argparse
import hashlib
import json
import os
import pickle
import socket
import zipfile
from unittest import mock

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from milan import plan
from milan.core.errors import UserError
from milan.core.files import read_checked
from milan.params import Compute, Pretrained
from milan.teacher import released
from milan.teacher.clip import load_teacher
from milan.teacher.frozen import build_tower, load_tower

NAME = "ViT-golden-tiny"
CPU = Compute("cpu", 1, "fp32", True, False)
CONFIG = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2},
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}
INTEGERS = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(6), "vocab_size": torch.tensor(20)}


@pytest.fixture(scope="module", autouse=True)
def tiny_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / f"{NAME}.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Return both towers' weights, rounded to float16, in which OpenAI publishes."""
    torch.manual_seed(0)
    return {name: tensor.half().float() for name, tensor in CLIP(**CONFIG).state_dict().items()}


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source(path, digest: str | None = None) -> Pretrained:
    return Pretrained("open_clip", NAME, None, str(path), digest)


def fetch(path, folder, digest: str | None = None):
    released.fetch_teacher(source(path, digest), folder)
    return load_tower(folder, CPU, torch.device("cpu"))


def refusal(path, digest: str | None = None) -> str:
    """Return the text of the error that a file raises; nothing is written."""
    with pytest.raises(UserError) as error:
        released.fetch_teacher(source(path, digest), path.parent / "never")
    assert not (path.parent / "never").exists()
    return str(error.value)


def torchscript(state: dict):
    """Build a TorchScript module with these tensors in half precision, as OpenAI's archives have them."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_buffer(last, tensor.half() if tensor.is_floating_point() else tensor)
    return torch.jit.script(root)


def write(kind: str, state: dict, folder):
    path = folder / f"given.{kind.split()[-1]}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "open_clip pt":
        torch.save({"epoch": 3, "name": "run", "state_dict": {f"module.{name}": t for name, t in state.items()}}, path)
    elif kind == "OpenAI pth":
        torch.save({**{name: tensor.half() for name, tensor in state.items()}, **INTEGERS}, path)
    else:
        torch.jit.save(torchscript({**state, **INTEGERS}), path)
    return path


@pytest.mark.filterwarnings("ignore:.*jit.*")
@pytest.mark.parametrize("kind", ["safetensors", "open_clip pt", "OpenAI pth", "TorchScript jit"])
def test_every_layout_is_read_to_the_same_weights(kind, state, tmp_path):
    path = write(kind, state, tmp_path)
    tower = fetch(path, tmp_path / "teacher", sha256(path).upper())
    ours = tower.state_dict()
    assert ours.keys() == {name for name in state if name.startswith("visual.")}
    assert all(tensor.dtype == torch.float32 and tensor.equal(state[name]) for name, tensor in ours.items())
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    with pytest.raises(UserError, match="no text tower"):
        load_teacher(tmp_path / "teacher")


class Traced(nn.Module):
    """A program that computes a GELU, as TorchScript archives are traced from models."""

    def __init__(self, quick: bool):
        super().__init__()
        self.quick = quick

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x) if self.quick else nn.functional.gelu(x)


@pytest.mark.filterwarnings("ignore:.*[jJ]it.*")
@pytest.mark.parametrize("quick", [True, False])
def test_a_program_says_the_gelu_that_it_computes(quick, tmp_path):
    torch.jit.trace(Traced(quick), torch.zeros(2)).save(str(tmp_path / "a.pt"))
    assert released.trained_with_quick_gelu(tmp_path / "a.pt", {}) is quick


@pytest.mark.parametrize("library, model, right", [
    ("open_clip", "ViT-exact-tiny", "ViT-exact-tiny-quickgelu"),
    ("timm", "vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"),
])  # fmt: skip
def test_openai_s_weights_under_a_model_of_the_exact_gelu_are_refused(library, model, right, state, tmp_path):
    """The tensors fit, and every feature would be wrong."""
    (tmp_path / f"{model}.json").write_text(json.dumps({**CONFIG, "quick_gelu": False}))
    open_clip.add_model_config(tmp_path / f"{model}.json")
    path = write("OpenAI pth", state, tmp_path)
    with pytest.raises(UserError, match=f"trained with the quick GELU, and {model} computes the exact GELU: set .* to {right}\\."):
        released.fetch_teacher(Pretrained(library, model, None, str(path), None), tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_weights_of_the_exact_gelu_under_a_quick_model_are_refused(state, tmp_path, monkeypatch):
    monkeypatch.setattr(released, "trained_with_quick_gelu", lambda *_: False)
    assert "trained with the exact GELU" in refusal(write("safetensors", state, tmp_path))


def test_a_file_that_does_not_say_its_gelu_is_told(state, tmp_path, capsys):
    fetch(write("safetensors", state, tmp_path), tmp_path / "teacher")
    assert f"does not say its GELU; {NAME} computes the quick GELU" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*jit.*")
def test_torchscript_is_opened_only_when_the_recipe_names_it(state, tmp_path, monkeypatch):
    path = write("TorchScript jit", state, tmp_path)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was opened"))
    assert "teacher.pretrained.sha256" in refusal(path)
    assert "says " + "0" * 64 in refusal(path, "0" * 64)


class Malice:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("wrapping", ["torch", "bare pickle", "beside weights", "dressed as TorchScript"])
def test_a_malicious_pickle_is_refused_and_does_not_run(wrapping, state, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "given.pt"
    if wrapping == "bare pickle":
        path.write_bytes(pickle.dumps(Malice(marker), protocol=2))
    elif wrapping == "dressed as TorchScript":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("data.pkl", "constants.pkl"):
                archive.writestr(f"given/{name}", pickle.dumps(Malice(marker), protocol=2))
            archive.writestr("given/version", "3\n")
    else:
        torch.save({"state_dict": state, "args": Malice(marker)} if wrapping == "beside weights" else Malice(marker), path)
    for digest in (None, sha256(path)):
        assert str(path) in refusal(path, digest)
    assert not marker.exists()


def test_another_file_than_the_recipe_names_is_refused(state, tmp_path):
    path = write("safetensors", state, tmp_path)
    words = refusal(path, "ab" * 32)
    assert sha256(path) in words and "ab" * 32 in words


def test_missing_unexpected_and_misshapen_keys_are_listed(state, tmp_path):
    changed = {name: tensor for name, tensor in state.items() if name not in ("visual.class_embedding", "visual.proj")}
    changed |= {"visual.head.weight": torch.zeros(3), "visual.conv1.weight": torch.zeros(64, 3, 4, 4)}
    words = refusal(write("safetensors", changed, tmp_path))
    assert "missing: visual.class_embedding, visual.proj; unexpected: visual.head.weight; " in words
    assert "misshapen: visual.conv1.weight is [64, 3, 4, 4], not [64, 3, 8, 8]." in words


@pytest.mark.parametrize(("name", "data"), [
    ("a.safetensors", b"nonsense"),
    ("a.pth", b""),
    ("a.pt", b"nonsense"),
    ("a.pt", b"PK\3\4"),
    ("a.pth", b"<html>404</html>"),
    ("a.pth", b"PK\1\2" + bytes(42) + b"PK\5\6" + bytes(4) + b"\1\0\1\0\xff\0\0\0" + bytes(6)),  # its directory lies before it begins
])  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_refused(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    for digest in (None, sha256(tmp_path / name)):
        words = refusal(tmp_path / name, digest)
        assert "is no checkpoint" in words and "expected safetensors" in words and "weights_only" not in words


VALUES = {
    "finite": lambda t: t.index_fill(0, torch.tensor([3]), float("nan")),
    "finite, in float32": lambda t: torch.full_like(t, 1e300, dtype=torch.float64),
    "complex64": lambda t: t.to(torch.complex64),
    "int64": lambda t: t.long(),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("words", VALUES)
def test_tensors_that_are_no_weights_are_refused(words, state, tmp_path):
    name = "visual.class_embedding"
    torch.save({**state, name: VALUES[words](state[name])}, tmp_path / "a.pth")
    said = refusal(tmp_path / "a.pth")
    assert f"a.pth: {name}" in said and words.split(",")[0] in said


def test_tied_tensors_and_keys_that_are_no_text_are_accepted(state, tmp_path):
    """Other content of a training run's checkpoint does not matter."""
    tied = {**state, "visual.ln_pre.bias": state["visual.ln_post.bias"]}
    torch.save({**tied, 5: torch.ones(2), ("a", 1): torch.ones(1)}, tmp_path / "a.pth")
    tower = fetch(tmp_path / "a.pth", tmp_path / "teacher")
    assert tower.visual.ln_pre.bias.equal(state["visual.ln_post.bias"])


def test_prefixes_of_wrappers_are_taken_off(state, tmp_path):
    torch.save({"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}}, tmp_path / "a.pt")
    assert fetch(tmp_path / "a.pt", tmp_path / "teacher").visual.proj.equal(state["visual.proj"])


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"state_dict": 3}, torch.zeros(2)])
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    assert "no state dict" in refusal(tmp_path / "a.pth")


def test_a_missing_file_is_named(tmp_path):
    assert "absent.pt is no file" in refusal(tmp_path / "absent.pt")
    assert f"{tmp_path} is a folder" in refusal(tmp_path)


def test_a_file_that_may_not_be_read_is_named(state, tmp_path, monkeypatch):
    path = write("safetensors", state, tmp_path)
    monkeypatch.setattr(type(path), "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    assert "given.safetensors cannot be read (Permission denied)" in refusal(path)


def refusal_of(*words) -> str:
    """Return the text of the error that Pretrained(*words) raises without any download."""
    with pytest.raises(UserError) as error, mock.patch("socket.socket.connect", side_effect=AssertionError("the network was asked")):
        given = Pretrained(*words)
        released.describe(given)
        released.locate(given)
    return str(error.value)


@pytest.mark.parametrize("words, message", [
    (("open_clip", "ViT-B-61", "openai", None, None), "'ViT-B-61' is unknown to open_clip; did you mean 'ViT-B-16'?"),
    (("open_clip", "hf-hub:laion/x", "openai", None, None), "is unknown to open_clip"),
    (("open_clip", "ViT-B-16-quickgelu", "opneai", None, None), "'opneai' is unknown for ViT-B-16-quickgelu; did you mean 'openai'?"),
    (("open_clip", "ViT-B-16", "openai", None, None), "set teacher.pretrained.model to ViT-B-16-quickgelu"),
    (("open_clip", "ViT-B-16-quickgelu", "datacomp_xl_s13b_b90k", None, None), "'datacomp_xl_s13b_b90k' is unknown"),
    (("timm", "vit_bse_patch16_224", "dino", None, None), "is unknown to timm; did you mean 'vit_base_patch16_224'?"),
    (("timm", "vit_base_patch16_224", "dion", None, None), "'dion' is unknown for vit_base_patch16_224; did you mean 'dino'?"),
    (("timm", "vit_base_patch16_224.dion", None, None, None), "did you mean 'dino'?"),
    (("timm", "vit_base_patch16_224.dino", "dino", None, None), "names a tag already"),
])  # fmt: skip
def test_unknown_names_come_with_the_nearest(words, message):
    assert message in refusal_of(*words)


@pytest.mark.parametrize("words, message", [
    (("open_clip", "RN50"), "ModifiedResNet has no class token"),
    (("open_clip", "ViT-L-14-CLIPA"), "mean of its patches"),
    (("open_clip", "coca_ViT-B-32"), "pools an image by attention queries"),
    (("open_clip", "ViT-B-16-SigLIP"), "no class token"),
    (("open_clip", "MobileCLIP-B"), "set library to timm and model to that name"),
    (("timm", "resnet18"), "ResNet is of another family"),
    (("timm", "vit_small_patch16_36x1_224"), None),
    (("timm", "vit_small_patch16_18x2_224"), "blocks of another kind"),
    (("timm", "vit_base_patch16_siglip_224"), "no class token"),
    (("timm", "vit_medium_patch16_gap_240"), "no class token"),
])  # fmt: skip
def test_a_model_that_cannot_be_the_teacher_is_refused_before_any_download(words, message):
    if message is None:
        released.describe(Pretrained(*words, "x", None, None))
    else:
        text = refusal_of(*words, "x", None, None)
        assert message in text and words[1] in text and "cannot be the teacher" in text


@pytest.mark.parametrize("name, size, grid, width", [
    ("ViT-B-32", 224, 7, 512),
    ("ViT-L-14", 224, 16, 768),
    ("ViT-L-14-336", 336, 24, 768),
    ("ViT-H-14", 224, 16, 1024),
    ("xlm-roberta-base-ViT-B-32", 224, 7, 512),  # its text tower would come from the hub
])  # fmt: skip
def test_vits_of_any_size_can_be_the_teacher(name, size, grid, width):
    config = released.describe(Pretrained("open_clip", name, "x", None, None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        tower = plan.build_fake(lambda: build_tower(config))
        features, importance = tower(torch.empty(2, 3, size, size))
    assert (tower.size, tower.grid, tower.feature_dim) == (size, grid, width)
    assert features.shape == (2, 1 + grid**2, width) and importance.shape == (2, grid**2)


# timm's.


def small_vit(**options) -> VisionTransformer:
    torch.manual_seed(1)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, **options).eval()


@register_model
def vit_golden_tiny(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
    return small_vit(**options)


def fetch_vit(path, folder):
    released.fetch_teacher(Pretrained("timm", "vit_golden_tiny", None, str(path), None), folder)
    return load_tower(folder, CPU, torch.device("cpu"))


LAYOUTS = {
    "timm": lambda vit: vit.state_dict(),
    "DINO": lambda vit: {name: t for name, t in vit.state_dict().items() if not name.startswith("head.")},
    "DINO, whole": lambda vit: {
        "student": {"module.backbone.cls_token": torch.full((1, 1, 32), 9.0)},
        "teacher": {"module.head.mlp.0.weight": torch.ones(2), **{f"module.backbone.{n}": t for n, t in vit.state_dict().items()}},
        "args": argparse.Namespace(arch="vit_small"),
        "epoch": 3,
    },
    "SLIP": lambda vit: {
        "state_dict": {"module.logit_scale": torch.ones(()), **{f"module.visual.{n}": t for n, t in vit.state_dict().items()}},
        "args": argparse.Namespace(model="SLIP_VITB16"),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dino_s_and_slip_s_layouts_are_read_to_the_same_weights(layout, tmp_path):
    vit = small_vit()
    torch.save(LAYOUTS[layout](vit), tmp_path / "a.pth")
    tower = fetch_vit(tmp_path / "a.pth", tmp_path / "teacher")
    expected = {f"visual.{name}": tensor for name, tensor in vit.state_dict().items() if not name.startswith("head.")}
    weights = tower.state_dict()
    assert weights.keys() == expected.keys() and all(weights[name].equal(tensor) for name, tensor in expected.items())
    assert read_checked(tmp_path / "teacher/teacher.json") == {"kind": "timm", "model": "vit_golden_tiny"}


def test_a_vit_of_another_patch_size_is_not_resized(tmp_path):
    state = small_vit().state_dict()
    save_file({**state, "patch_embed.proj.weight": torch.zeros(32, 3, 4, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"patches are \[32, 3, 4, 4\], not \[32, 3, 8, 8\]"):
        fetch_vit(tmp_path / "a.safetensors", tmp_path / "teacher")


def test_a_malicious_pickle_is_no_vit(tmp_path):
    torch.save({"teacher": small_vit().state_dict(), "args": Malice(tmp_path / "ran")}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"posix\.system.*Nothing in it was run"):
        fetch_vit(tmp_path / "a.pth", tmp_path / "teacher")
    assert not (tmp_path / "ran").exists()


# The cache and the network.


@pytest.fixture
def releases(monkeypatch, tmp_path):
    """Give the tiny model a release at a URL and one on the hub, empty caches, and no network."""
    cfg = {"url": "https://publisher.invalid/given.safetensors", "hf_hub": "org/golden/"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: {**cfg, "quick_gelu": True} if tag == "golden" else {})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.getaddrinfo", mock.Mock(side_effect=OSError("blocked")))
    return tmp_path


def in_hub_cache(tmp_path, name: str, state: dict):
    folder = tmp_path / "hub/models--org--golden"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    path = folder / "snapshots/abc" / name
    path.parent.mkdir(parents=True)
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_file_in_the_hub_s_cache_needs_no_network(name, releases, state):
    path = in_hub_cache(releases, name, state)
    assert released.locate(Pretrained("open_clip", NAME, "golden", None, None)) == path
    released.fetch_teacher(Pretrained("open_clip", NAME, "golden", None, None), releases / "teacher")
    assert not socket.getaddrinfo.called
    ours = load_tower(releases / "teacher", CPU, torch.device("cpu")).state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in ours.items())


def test_a_flipped_byte_in_the_hub_s_cache_is_found(releases, state):
    """The cache stores a large file under its SHA-256, with a link to it under its name."""
    path, given = in_hub_cache(releases, "open_clip_model.safetensors", state), Pretrained("open_clip", NAME, "golden", None, None)
    blob = path.parents[2] / "blobs" / sha256(path)
    blob.parent.mkdir()
    path.rename(blob)
    path.symlink_to(blob)
    released.fetch_teacher(given, releases / "teacher")
    whole = blob.read_bytes()
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{path} is damaged: .* Delete {path.parents[2]} and run again"):
        released.fetch_teacher(given, releases / "never")
    assert not (releases / "never").exists()


def test_a_digest_selects_the_publisher_s_own_file(releases, state):
    """The hub has the same weights in a file of other bytes."""
    in_hub_cache(releases, "open_clip_model.safetensors", state)
    path = releases / ".cache/clip/given.safetensors"
    path.parent.mkdir(parents=True)
    save_file(state, path)
    given = Pretrained("open_clip", NAME, "golden", None, sha256(path))
    assert released.locate(given) == path
    released.fetch_teacher(given, releases / "teacher")
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match=rf"{path} has SHA-256 {sha256(path)}, .* delete {path} and run again"):
        released.fetch_teacher(given, releases / "never")
    assert not socket.getaddrinfo.called and not (releases / "never").exists()


def test_a_digest_that_differs_from_the_hub_s_file(releases, state, monkeypatch):
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"hf_hub": "org/golden/", "quick_gelu": True})
    in_hub_cache(releases, "open_clip_model.safetensors", state)
    with pytest.raises(UserError, match=f"delete {releases}/hub/models--org--golden and run again"):
        released.fetch_teacher(Pretrained("open_clip", NAME, "golden", None, "ab" * 32), releases / "never")


@pytest.mark.parametrize("digest", [None, "ab" * 32])
def test_a_missing_network_is_reported(digest, releases, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download._get_metadata_or_catch_error", mock.Mock(side_effect=ConnectionError))
    with pytest.raises(UserError, match=r"neither in the cache .*set teacher\.pretrained\.file"):
        released.locate(Pretrained("open_clip", NAME, "golden", None, digest))


def test_openai_s_url_holds_the_digest_of_the_paper_s_recipe():
    given = Pretrained("open_clip", "ViT-B-16-quickgelu", "openai", None, None)
    assert "/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/" in released.open_clip_release(given).url


def test_timm_s_releases():
    release = released.timm_release(Pretrained("timm", "vit_base_patch16_224", "dino", None, None))
    assert release.repo == "timm/vit_base_patch16_224.dino" and release.names == ("model.safetensors", "pytorch_model.bin")
    assert release == released.timm_release(Pretrained("timm", "vit_base_patch16_224.dino", None, None, None))
    assert release.url.endswith("dino_vitbase16_pretrain.pth")
