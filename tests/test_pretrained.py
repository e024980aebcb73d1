"""A released CLIP as the teacher: every layout is read to the same weights, and what is not right is refused by name."""

import hashlib
import json
import os
import pickle
import zipfile

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import nn

from milan import pretrained
from milan.clip import load_teacher
from milan.errors import UserError
from milan.params import Pretrained

NAME = "ViT-golden-tiny"
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
    """In values that float16, which OpenAI publishes, holds exactly."""
    torch.manual_seed(0)
    return {name: tensor.half().float() for name, tensor in CLIP(**CONFIG).state_dict().items()}


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source(path, digest: str | None = None) -> Pretrained:
    return Pretrained(NAME, None, str(path), digest)


def fetched(path, folder, digest: str | None = None):
    pretrained.fetch_teacher(source(path, digest), folder)
    return load_teacher(folder)[0]


def refusal(path, digest: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        pretrained.fetch_teacher(source(path, digest), path.parent / "never")
    assert not (path.parent / "never").exists()
    return str(error.value)


def program(state: dict):
    """A TorchScript module with these tensors in half precision, as OpenAI's archives have them."""
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
        torch.jit.save(program({**state, **INTEGERS}), path)
    return path


@pytest.mark.filterwarnings("ignore:.*jit.*")
@pytest.mark.parametrize("kind", ["safetensors", "open_clip pt", "OpenAI pth", "TorchScript jit"])
def test_every_layout_is_read_to_the_same_weights(kind, state, tmp_path):
    path = write(kind, state, tmp_path)
    model = fetched(path, tmp_path / "teacher", sha256(path).upper())
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    assert all(ours[name].dtype == torch.float32 and ours[name].equal(tensor) for name, tensor in state.items())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.*jit.*")
def test_a_program_is_opened_only_when_the_recipe_names_it(state, tmp_path, monkeypatch):
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
    changed = {name: tensor for name, tensor in state.items() if name not in ("logit_scale", "visual.proj")}
    changed |= {"visual.head.weight": torch.zeros(3), "visual.conv1.weight": torch.zeros(64, 3, 4, 4)}
    words = refusal(write("safetensors", changed, tmp_path))
    assert "missing: logit_scale, visual.proj; unexpected: visual.head.weight; " in words
    assert "misshapen: visual.conv1.weight is [64, 3, 4, 4], not [64, 3, 8, 8]." in words


@pytest.mark.parametrize(("name", "data"), [("a.safetensors", b"nonsense"), ("a.pth", b""), ("a.pt", b"nonsense"), ("a.pt", b"PK\3\4")])
def test_what_is_no_checkpoint_is_refused(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert "is no checkpoint" in refusal(tmp_path / name)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"state_dict": 3}, torch.zeros(2)])
def test_what_holds_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    assert "no state dict" in refusal(tmp_path / "a.pth")


def test_a_missing_file_is_named(tmp_path):
    assert "absent.pt is no file" in refusal(tmp_path / "absent.pt")


def test_unknown_models_and_tags_are_named(tmp_path):
    with pytest.raises(UserError, match="'ViT-B-61' is unknown.*ViT-B-16"):
        pretrained.fetch_teacher(Pretrained("ViT-B-61", "openai", None, None), tmp_path)
    with pytest.raises(UserError, match="'opneai' is unknown for ViT-B-16-quickgelu.*openai"):
        pretrained.fetch_teacher(Pretrained("ViT-B-16-quickgelu", "opneai", None, None), tmp_path)


@pytest.mark.parametrize("digest", [None, "5806"])
def test_a_digest_asks_for_the_publisher_s_own_file(digest, monkeypatch, tmp_path):
    """The hub's copy has other bytes; OpenAI's address carries the digest that conf/scale/paper.yaml names."""
    asked = {}

    def fetch(release, prefer_hf_hub=True):
        asked.update(release, prefer_hf_hub=prefer_hf_hub)
        return str(tmp_path / "file.pt")

    monkeypatch.setattr(open_clip, "download_pretrained", fetch)
    assert pretrained.download(Pretrained("ViT-B-16-quickgelu", "openai", None, digest)) == tmp_path / "file.pt"
    assert asked["prefer_hf_hub"] is (digest is None)
    assert "/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/" in asked["url"]


def test_no_network_is_told(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: (_ for _ in ()).throw(ConnectionError()))
    with pytest.raises(UserError, match=r"ConnectionError.*teacher\.pretrained\.file"):
        pretrained.download(Pretrained("ViT-B-16-quickgelu", "openai", None, None))
