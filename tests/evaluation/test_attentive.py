"""The attentive probe: the head by hand and by torch, the frozen encoder, and the whole stage."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score
from torch import nn
from torch.nn import functional as F

from milan.core.validation import validate
from milan.data import records, transforms
from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records
from milan.evaluation import frozen
from milan.evaluation.attentive import AttentiveHead
from milan.method.encoder import Encoder
from milan.params import Params
from milan.training.weights import save_weights
from stages import attentive_probe
from tests.conftest import run_main, write_split
from tests.segmentation.test_dense import png

CPU = torch.device("cpu")
ENCODER = Path("weights/encoder.safetensors")
LEVELS = (80, 160, 255)  # of the classes


def test_the_head_by_hand():
    """Two tokens, normalised to (1, -1) and (-1, 1), are the keys and values; the query weighs them 3 to 1."""
    head = AttentiveHead(2, 1, 2)
    with torch.no_grad():
        for layer in (head.pool.q, head.pool.proj, head.linear):
            layer.weight.copy_(torch.eye(2))
        head.pool.kv.weight.copy_(torch.eye(2).repeat(2, 1))
        head.pool.latent.copy_(torch.tensor([math.log(3) / 2**0.5, 0.0]))  # scores of +- ln(3) / 2
        head.pool.mlp.fc2.weight.zero_()
        head.linear.bias.copy_(torch.tensor([7.0, 0.0]))
    logits = head(torch.tensor([[[5.0, -5.0], [-900.0, 900.0]]]))  # 3/4 (1, -1) + 1/4 (-1, 1) = (1/2, -1/2)
    assert logits[0].tolist() == pytest.approx([7.5, -0.5], abs=1e-5)


def test_the_head_is_v_jepa_s_block_by_torch_s_attention():
    """V-JEPA: y = query + attention(query, norm(tokens)), then y + mlp(norm(y)): here the query is in the projection's bias."""
    torch.manual_seed(0)
    head, tokens = AttentiveHead(8, 2, 3), torch.randn(4, 5, 8)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # so that no one or zero hides a mistake
    pool, query = head.pool, head.pool.latent.detach()
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
        attention.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
        attention.out_proj.weight.copy_(pool.proj.weight)
        attention.out_proj.bias.copy_(pool.proj.bias - query[0, 0])
    seen = F.layer_norm(tokens, (8,), head.norm.weight, head.norm.bias)
    block = query + attention(query.expand(4, -1, -1), seen, seen)[0]
    hidden = F.gelu(F.linear(F.layer_norm(block, (8,), pool.norm.weight, pool.norm.bias), pool.mlp.fc1.weight, pool.mlp.fc1.bias))
    block = block + F.linear(hidden, pool.mlp.fc2.weight, pool.mlp.fc2.bias)
    torch.testing.assert_close(head(tokens), F.linear(block[:, 0], head.linear.weight, head.linear.bias))


def test_the_head_starts_as_v_jepa_s():
    torch.manual_seed(0)
    head = AttentiveHead(256, 4, 100)
    weights = {name: value for name, value in head.named_parameters() if value.ndim > 1}
    smaller = {"pool.proj.weight", "pool.mlp.fc2.weight"}
    assert smaller < weights.keys() and len(weights) == 7
    for name, value in weights.items():
        assert value.std().item() == pytest.approx(0.02 / (2**0.5 if name in smaller else 1), rel=0.1), name
    assert all((value == 0).all() for name, value in head.named_parameters() if name.endswith("bias"))


@pytest.fixture
def small(tree) -> dict:
    """The committed recipe for images of 32 px in 16 patches, with a ViT of four blocks of width 16."""
    tree["model"] |= {"image_size": 32, "encoder": {"embed_dim": 16, "depth": 4, "num_heads": 2}}
    tree["runtime"]["processes"] = 1
    tree["attentive_probe"] |= {"epochs": 20, "batch_size": 8, "micro_batch": 8, "lr": 0.01, "resize": 32, "crop_scale": [1, 1]}
    return tree


@pytest.fixture
def images(workplace, small) -> Path:
    """Write 24 training and 9 validation images of 32 px: black, but for one patch whose grey level is the class, and a random
    encoder."""
    splits = {}
    for split, count in (("train", 24), ("val", 9)):
        rows = []
        for i in range(count):
            pixels = np.zeros((4, 4), dtype=np.uint8)
            pixels.flat[(5 * i) % 16] = LEVELS[i % 3]
            image = np.repeat(np.kron(pixels, np.ones((8, 8), dtype=np.uint8))[..., None], 3, axis=2)
            rows.append({"image": png(image), "name": f"{split} {i}", "label": i % 3})
        splits[split] = write_split(Path("images"), split, rows, 10)
    records.write_manifest(Path("images"), splits=splits, classes=["dark", "grey", "light"])
    torch.manual_seed(0)
    save_weights(ENCODER, Encoder(validate(Params, small, "p").model).vit.state_dict())
    return Path("images")


def run(tree: dict, images: Path, name: str) -> dict:
    params = validate(Params, tree, "params.yaml")
    given = {"variant": "milan", "seed": 0, "records": images, "weights": Path("weights")}
    return run_main(attentive_probe, params, Path(name), Path(f"{name}.json"), Path(f"{name}.csv"), **given)


def test_the_features_are_timm_s_tokens_class_token_first(images, small):
    params = validate(Params, small, "p")
    vit = Encoder(params.model).vit
    vit.load_state_dict(load_file(ENCODER))
    pictures = torch.randn(2, 3, 32, 32)
    tokens = frozen.frozen_encoder(params, ENCODER.parent, CPU)(pictures)
    assert tokens.shape == (2, 17, 16) and not tokens.requires_grad
    torch.testing.assert_close(tokens, vit.eval().forward_features(pictures))


@pytest.mark.parametrize("views", [0, 2])
def test_a_class_that_only_a_patch_holds_is_found(small, images, monkeypatch, views):
    """The tokens are the one-hot class of each patch, black is a fourth, and the class token is 0: a linear probe on it knows
    nothing."""

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor([*LEVELS, 0], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 1, 1)
        seen = pictures[:, 0, 4::8, 4::8].flatten(1)[..., None] - transforms.normalise(levels)[:, 0, 0, 0]
        return F.pad(F.one_hot(seen.abs().argmin(dim=-1), 4).float(), (0, 12, 1, 0))

    monkeypatch.setattr("milan.evaluation.frozen.frozen_encoder", lambda *_: encode)
    small["attentive_probe"]["views"] = views
    metrics = run(small, images, f"views{views}")
    assert metrics["attentive_probe/top1"] == metrics["attentive_probe/top5"] == 100


def test_the_encoder_stays_as_it_is_and_top1_is_scikit_learn_s(small, images, monkeypatch):
    encoders, load = [], frozen.load_encoder
    monkeypatch.setattr(frozen, "load_encoder", lambda *given: encoders.append(load(*given)) or encoders[-1])
    before, small["attentive_probe"]["views"] = ENCODER.read_bytes(), 0
    metrics = run(small, images, "real")
    (encoder,) = encoders
    assert ENCODER.read_bytes() == before and not encoder.training
    assert all(torch.equal(encoder.vit.state_dict()[name], value) for name, value in load_file(ENCODER).items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    head = AttentiveHead(16, 2, 3)
    first = {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(load_file("real/head.safetensors"))
    assert all(not torch.equal(value, first[name]) for name, value in head.state_dict().items())
    samples = [CentreSamples(Records(images, "val"), 32, 32)[i] for i in range(9)]
    with torch.no_grad():
        pictures = transforms.normalise(torch.stack([sample["image"] for sample in samples]))
        predicted = head(encoder.vit.forward_features(pictures)).argmax(dim=1)
    top1 = 100 * accuracy_score([sample["label"] for sample in samples], predicted)
    assert metrics["attentive_probe/top1"] == pytest.approx(top1, abs=1e-4)


def test_weight_decay_is_on_matrices_and_the_query(small):
    """As in V-JEPA's init_opt: none on biases and vectors."""
    params = validate(Params, small, "p")
    head = attentive_probe.build(params, 3)
    vectors, matrices = attentive_probe.optimizer_of(params, head).param_groups
    assert matrices["weight_decay"] == 1e-3 and vectors["weight_decay"] == 0
    assert {id(p) for p in matrices["params"]} == {id(p) for p in head.parameters() if p.ndim > 1}
