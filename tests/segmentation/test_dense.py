"""The frozen dense probe: the head by hand, the frozen encoder, and the whole stage on scenes whose answer is known."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from milan.core.errors import UserError
from milan.core.validation import validate
from milan.data import records, transforms
from milan.evaluation.linear import ProbeLoss
from milan.method.encoder import Encoder
from milan.method.pos_embed import interpolate_pos_embed
from milan.params import Params
from milan.segmentation.dense import DenseHead, frozen_encoder
from milan.segmentation.upernet import pixel_loss
from milan.training.weights import save_weights
from stages import dense_probe, prepare_ade20k
from tests.conftest import run_main, write_split

CPU = torch.device("cpu")


def randomise(head: DenseHead) -> None:
    """Give all weights and running statistics random values, so that no one or zero hides a mistake."""
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)


def test_the_head_is_batch_norm_and_a_1x1_convolution():
    torch.manual_seed(0)
    head, features = DenseHead(6, 3, "batch"), torch.randn(2, 6, 4, 4)
    assert head.linear.bias.eq(0).all() and head.linear.weight.std().item() == pytest.approx(0.01, rel=0.4)
    randomise(head)
    norm, linear = head.norm, head.linear
    for training in (False, True):
        head.train(training)
        statistics = (None, None) if training else (norm.running_mean.clone(), norm.running_var.clone())
        normed = F.batch_norm(features, *statistics, norm.weight, norm.bias, training=training, eps=1e-5)
        torch.testing.assert_close(head(features), F.conv2d(normed, linear.weight, linear.bias))


def test_the_loss_is_that_of_the_upsampled_logits():
    """Two patches with logits 0 and 4 of the second class: bilinear, corners not aligned, four pixels have 0, 1, 3, 4. The
    fourth pixel is ignored, but counts as one of the four."""
    head = DenseHead(1, 2, "batch").eval()
    with torch.no_grad():
        head.norm.running_var.fill_(1 - 1e-5)
        head.linear.weight.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1))
    loss = ProbeLoss(head, pixel_loss)(torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2), torch.tensor([[[0, 1, 1, 255]]]))
    losses = [np.log(1 + np.exp(0)), np.log(1 + np.exp(-1)), np.log(1 + np.exp(-3))]
    assert loss.item() == pytest.approx(sum(losses) / 4, abs=1e-6)


@pytest.fixture
def small(tree) -> Params:
    """The committed recipe for scenes of 32 px, with a ViT of two blocks of width 16."""
    tower = {"embed_dim": 16, "depth": 4, "num_heads": 2}
    tree["model"] |= {"image_size": 32, "encoder": tower, "decoder": tower}
    tree["runtime"]["processes"] = 1
    tree["prepare_ade20k"]["classes"] = 3
    tree["dense_probe"] |= {"crop_size": 48, "stride": 32, "resize": [96, 48], "resize_ratio": [1.0, 1.0], "lr": 0.03}
    tree["dense_probe"] |= {"batch_size": 8, "micro_batch": 4, "epochs": 20, "max_class_share": 1.0}
    return validate(Params, tree, "params.yaml")


def test_the_features_are_the_last_block_s_patch_tokens_in_their_places(workplace, small):
    torch.manual_seed(0)
    trained = Encoder(small.model)
    save_weights(Path("encoder.safetensors"), trained.vit.state_dict())
    encode = frozen_encoder(Path("encoder.safetensors"), small.model, 48, "fp32", CPU)
    images = torch.randn(2, 3, 48, 48)
    features = encode(images)
    vit = trained.vit
    table = interpolate_pos_embed(vit.pos_embed, 6)  # 4 x 4 patches in the checkpoint, 6 x 6 in the crop
    patches = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + table[:, 1:]
    class_token = (vit.cls_token + table[:, :1]).expand(2, -1, -1)
    tokens = vit.norm(vit.blocks(torch.cat([class_token, patches], dim=1)))
    assert features.shape == (2, 16, 6, 6) and not features.requires_grad
    torch.testing.assert_close(features[1, :, 2, 5], tokens[1, 1 + 2 * 6 + 5])
    torch.testing.assert_close(features.flatten(2), tokens[:, 1:].transpose(1, 2))


def test_weights_of_another_model_are_refused(workplace, small):
    save_weights(Path("encoder.safetensors"), {"not_a_weight": torch.zeros(1)})
    with pytest.raises(UserError, match="encoder.safetensors does not fit the model"):
        frozen_encoder(Path("encoder.safetensors"), small.model, 48, "fp32", CPU)


def png(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


GREYS = (0, 128, 255)


@pytest.fixture
def scenes(workplace) -> Path:
    """Write 16 training and 6 validation scenes of 6 x 6 blocks of 8 px: a block's grey level is its class, 1 to 3.

    In training the classes have 1, 2 and 3 parts, in validation 3, 2 and 1. Two pixels on every side of a block are
    unlabelled, so that upsampled logits of other blocks weigh less than half at every labelled pixel."""
    inner = np.pad(np.ones((4, 4), dtype=np.uint8), 2)
    draw, splits = np.random.default_rng(0), {}
    for split, count, shares in (("train", 16, [1, 2, 3]), ("val", 6, [3, 2, 1])):
        rows = []
        for i in range(count):
            blocks = draw.permutation(np.repeat([0, 1, 2], np.multiply(shares, 6))).reshape(6, 6)
            whole = np.kron(blocks, np.ones((8, 8), dtype=np.uint8)).astype(np.uint8)
            image = np.repeat(np.array(GREYS, dtype=np.uint8)[whole][..., None], 3, axis=2)
            rows.append({"image": png(image), "mask": png((whole + 1) * np.tile(inner, (6, 6))), "name": f"{split} {i}"})
        splits[split] = write_split(Path("scenes"), split, rows, 10)
    records.write_manifest(Path("scenes"), splits=splits, classes=["dark", "grey", "light"])
    return Path("scenes")


def one_hot_features(monkeypatch) -> None:
    """Put in the encoder's place the one-hot class of each patch, beside 13 channels of zeros."""

    def encode(images: torch.Tensor) -> torch.Tensor:
        levels = transforms.normalise(torch.tensor(GREYS, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 1, 1))[:, 0, 0, 0]
        classes = (images[:, 0, 4::8, 4::8, None] - levels).abs().argmin(dim=-1)
        return F.pad(F.one_hot(classes, 3).movedim(3, 1).float(), (0, 0, 0, 0, 0, 13))

    monkeypatch.setattr("milan.segmentation.dense.frozen_encoder", lambda *_: encode)


def run(params: Params, scenes: Path, name: str) -> dict:
    given = {"variant": "milan", "seed": 0, "scenes": scenes, "weights": Path("weights")}
    return run_main(dense_probe, params, Path(name), Path(f"{name}.json"), Path(f"{name}.csv"), **given)


@pytest.mark.parametrize("views", [0, 2])
def test_features_that_hold_the_class_reach_100(small, scenes, monkeypatch, tree, views):
    save_weights(Path("weights/encoder.safetensors"), {})
    one_hot_features(monkeypatch)
    tree["dense_probe"]["views"] = views
    metrics = run(validate(Params, tree, "params.yaml"), scenes, f"views{views}")
    assert metrics["dense_probe/miou"] == metrics["dense_probe/pixel_accuracy"] == 100


def test_one_and_two_processes_agree(small, scenes, tree):
    torch.manual_seed(0)
    save_weights(Path("weights/encoder.safetensors"), Encoder(small.model).vit.state_dict())
    tree["dense_probe"]["epochs"] = 3
    results = []
    for processes in (1, 2):
        tree["runtime"]["processes"] = processes
        results.append(run(validate(Params, tree, "params.yaml"), scenes, f"by{processes}"))
    assert results[0] == pytest.approx(results[1], abs=0.2)


def test_the_constant_answer_by_hand(scenes):
    """Training has most of class 3, which has a sixth of the validation pixels: IoU 1/6, and 0 of the two others."""
    scores = prepare_ade20k.constant_answer(scenes, 3)
    assert scores == pytest.approx({"constant_miou": 100 / 18, "constant_pixel_accuracy": 100 / 6})
