"""At demo scale nothing accesses the network, neither at import nor when models and tokenizer are built."""

import os
import subprocess
import sys

from tests.conftest import ROOT

# Records and refuses every access to the network; the record also shows refusals that a library suppresses.
GUARD = """
import socket

tried = []

def guarded(name):
    real = getattr(socket.socket, name)

    def call(self, address, *rest):
        host = address[0] if isinstance(address, tuple) else address
        if self.family != socket.AF_UNIX and str(host) not in ("127.0.0.1", "::1", "localhost"):
            tried.append((name, address))
            raise OSError(f"blocked: {address}")
        return real(self, address, *rest)

    setattr(socket.socket, name, call)

for name in ("connect", "connect_ex"):
    guarded(name)

real_lookup = socket.getaddrinfo

def lookup(host, *rest, **options):
    if host not in (None, "127.0.0.1", "::1", "localhost", socket.gethostname()):
        tried.append(("getaddrinfo", host))
        raise OSError(f"blocked: {host}")
    return real_lookup(host, *rest, **options)

socket.getaddrinfo = lookup
"""

WORK = """
from milan.params import TinyClip, read_params
from milan.teacher.clip import Tokenizer, build_tiny
from milan.teacher.towers import ClipTower
from milan.evaluation.classifier import build_classifier
from milan.method.encoder import Encoder
from milan.method.model import MaskedPretraining
from milan.ingest.world import drawing
import stages.teacher, stages.extract_targets, stages.pretrain, stages.linear_eval, stages.finetune, stages.segment, stages.dense_probe
import stages.attentive_probe
import torch

p = read_params()
tiny = TinyClip(64, 128, 3, 32, True, 96, 3, 1, 20)
tokenizer = Tokenizer.of_corpus([prompt.format("red disc") for prompt in drawing.PROMPTS], tiny.context_length)
model = build_tiny(tiny, p.model.image_size, p.model.patch_size, len(tokenizer))
model.encode_text(tokenizer(["a photo of a red disc"]))
images = torch.zeros(2, 3, p.model.image_size, p.model.image_size)
features, importance = ClipTower(model.visual)(images)
encoder = Encoder(p.model)
build_classifier(p.model, p.finetune, 20, encoder.vit.state_dict())(images)
MaskedPretraining(p.model, p.pretrain.ablation["milan"], p.pretrain.mask_ratio, tiny.embed_dim)(
    images, torch.zeros(2, p.model.n_patches), features, importance
)
stages.segment.build(p, p.prepare_ade20k.classes, encoder.vit.state_dict(), torch.device("cpu"))
stages.dense_probe.build(p, p.prepare_ade20k.classes, torch.device("cpu"))
stages.attentive_probe.build(p, 20)(torch.zeros(2, 1 + p.model.n_patches, p.model.encoder.embed_dim))
"""


CACHED = """
import json, os, sys
from pathlib import Path
import open_clip, timm, torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from milan.core.files import file_digest
from milan.params import Pretrained
from milan.teacher.released import fetch_teacher

config = {"embed_dim": 12, "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2},
          "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}}
home = Path(os.environ["HOME"])
(home / "ViT-tiny.json").write_text(json.dumps(config))
open_clip.add_model_config(home / "ViT-tiny.json")
open_clip.get_pretrained_cfg = lambda *_: {"hf_hub": "org/tiny/", "url": "https://publisher.invalid/tiny.safetensors"}

def cached(folder, name, state):
    folder.mkdir(parents=True)
    save_file(state, folder / name)
    return folder / name

def on_hub(repo, name, state):
    folder = Path(os.environ["HF_HOME"]) / "hub" / repo
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    cached(folder / "snapshots/abc", name, state)

clip, vit = CLIP(**config).state_dict(), timm.create_model("vit_tiny_patch16_224").state_dict()
on_hub("models--org--tiny", "open_clip_model.safetensors", clip)
on_hub("models--timm--vit_tiny_patch16_224.augreg_in21k", "model.safetensors", vit)
digest = file_digest(cached(home / ".cache/clip", "tiny.safetensors", clip))
fetch_teacher(Pretrained("open_clip", "ViT-tiny", "x", None, None), home / "a")
fetch_teacher(Pretrained("open_clip", "ViT-tiny", "x", None, digest), home / "b")
fetch_teacher(Pretrained("timm", "vit_tiny_patch16_224", "augreg_in21k", None, None), home / "c")
print([sorted(path.name for path in (home / name).iterdir()) for name in "abc"])
"""


def run(code: str, tmp_path) -> str:
    """Run code in a process of its own, with empty caches and without variables that put libraries offline."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "TORCH_HOME", "XDG_CACHE"))}
    environment |= {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hub"),
        "TORCH_HOME": str(tmp_path / "torch"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_guard_refuses_and_records(tmp_path):
    """Also an access whose refusal is suppressed."""
    reach = """
import contextlib, urllib.request
with contextlib.suppress(Exception):
    urllib.request.urlopen("http://huggingface.co", timeout=5)
with contextlib.suppress(OSError):
    socket.create_connection(("192.0.2.1", 80), timeout=5)
with contextlib.suppress(OSError):
    socket.socket().connect(("192.0.2.1", 80))
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
print([name for name, _ in tried])
"""
    assert run(GUARD + reach, tmp_path).strip() == "['getaddrinfo', 'getaddrinfo', 'connect']"


def test_nothing_accesses_the_network(tmp_path):
    assert run(f"{GUARD}{WORK}print('tried:', tried)", tmp_path).splitlines()[-1] == "tried: []"
    assert not (tmp_path / "hub").exists() and not (tmp_path / "torch").exists()


def test_weights_in_the_cache_need_no_network(tmp_path):
    """Weights of open_clip, from a URL or the hub, and of timm: no library checks for newer ones."""
    *_, files, tried = run(f"{GUARD}{CACHED}print('tried:', tried)", tmp_path).splitlines()
    assert files == str([["teacher.json", "teacher.safetensors"]] * 3) and tried == "tried: []"
