"""Fine-tuning: loading the encoder, trained parameters, layer-wise learning rates, and the loss."""

import dataclasses

import pytest
import torch

from milan.core.errors import UserError
from milan.core.validation import validate
from milan.data import seeding
from milan.evaluation.classifier import FinetuneLoss, build_classifier
from milan.method.encoder import Encoder
from milan.params import Finetune, Model, Params, TransformerSize
from milan.training import optim

MODEL = Model("small", 16, 8, TransformerSize(16, 2, 2), TransformerSize(16, 1, 2))
CLASSES = 5


@pytest.fixture
def recipe(tree) -> Finetune:
    return validate(Params, tree, "params.yaml").finetune


@pytest.fixture
def encoder() -> dict[str, torch.Tensor]:
    """Encoder weights in which every tensor is filled with a different number."""
    weights = Encoder(MODEL).vit.state_dict()
    return {name: torch.full_like(tensor, 0.01 * (place + 1)) for place, (name, tensor) in enumerate(weights.items())}


@pytest.mark.parametrize("pooling, unused", [("mean", {"norm.weight", "norm.bias"}), ("cls", set())])
def test_every_encoder_weight_is_loaded(recipe, encoder, pooling, unused):
    vit = build_classifier(MODEL, dataclasses.replace(recipe, pooling=pooling), CLASSES, encoder)
    loaded = vit.state_dict()
    assert set(encoder) - set(loaded) == unused
    for name in set(encoder) - unused:
        assert (loaded[name] == encoder[name]).all(), name
    assert set(loaded) - set(encoder) == {"head.weight", "head.bias"} | (
        {"fc_norm.weight", "fc_norm.bias"} if pooling == "mean" else set()
    )


def test_an_encoder_that_lacks_a_weight_is_refused(recipe, encoder):
    del encoder["blocks.1.mlp.fc1.weight"]
    with pytest.raises(UserError, match="blocks.1.mlp.fc1.weight"):
        build_classifier(MODEL, recipe, CLASSES, encoder)


def test_an_encoder_of_another_size_is_refused(recipe):
    wider = Encoder(Model("wider", 16, 8, TransformerSize(32, 2, 2), TransformerSize(16, 1, 2))).vit.state_dict()
    with pytest.raises(UserError, match="misshapen: cls_token is .*model section"):
        build_classifier(MODEL, recipe, CLASSES, wider)


def test_the_head_is_initialised_anew(recipe, encoder):
    seeding.seed_globals(0, "head")
    vit = build_classifier(MODEL, recipe, 1000, encoder)
    assert vit.head.weight.std().item() == pytest.approx(0.02, rel=0.03) and (vit.head.bias == 0).all()


def random_encoder() -> dict[str, torch.Tensor]:
    seeding.seed_globals(1, "encoder")
    return Encoder(MODEL).vit.state_dict()


def logits(recipe: Finetune, encoder: dict, images: torch.Tensor) -> torch.Tensor:
    seeding.seed_globals(0, "head")
    return build_classifier(MODEL, recipe, CLASSES, encoder).eval()(images).detach()


def test_mean_pooling_ignores_the_encoder_s_final_norm(recipe):
    encoder, images = random_encoder(), torch.randn(2, 3, 16, 16)
    changed = {**encoder, "norm.weight": torch.full((16,), 1e4), "norm.bias": torch.full((16,), -1e4)}
    mean, cls = dataclasses.replace(recipe, pooling="mean"), dataclasses.replace(recipe, pooling="cls")
    assert torch.equal(logits(mean, encoder, images), logits(mean, changed, images))
    assert (logits(cls, encoder, images) - logits(cls, changed, images)).abs().max() > 10


def test_mean_pooling_by_hand(recipe):
    """Average the patch tokens after the last block, without the class token; then apply the new norm and the head."""
    images = torch.randn(2, 3, 16, 16)
    seeding.seed_globals(0, "head")
    vit = build_classifier(MODEL, dataclasses.replace(recipe, pooling="mean"), CLASSES, random_encoder()).eval()
    with torch.no_grad():
        tokens = torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(images)], dim=1) + vit.pos_embed
        pooled = vit.blocks(tokens)[:, 1:].mean(dim=1)
        expected = vit.head(torch.nn.functional.layer_norm(pooled, (16,), eps=1e-6))
        torch.testing.assert_close(vit(images), expected)


def test_every_parameter_is_trained_also_the_position_embedding(recipe, encoder):
    vit = build_classifier(MODEL, recipe, CLASSES, encoder)
    assert all(parameter.requires_grad for parameter in vit.parameters())
    vit(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert vit.pos_embed.grad is not None


def test_layer_decay_by_hand():
    """Depth 4, decay 0.8: embeddings 0.8^5, block i 0.8^(4 - i), head and last norm 1."""
    vit = Encoder(Model("m", 16, 8, TransformerSize(16, 4, 2), TransformerSize(16, 1, 2))).vit
    vit.pos_embed.requires_grad_(True)
    vit.reset_classifier(3)
    groups = optim.layer_decay_groups(vit, 0.05, 0.8, lambda name: optim.vit_layer_id(name, 4), 4)
    group_of = {name: group for group in groups for name in group["names"]}
    assert set(group_of) == {name for name, _ in vit.named_parameters()}
    expected = {
        "cls_token": (0.32768, 0), "pos_embed": (0.32768, 0),
        "patch_embed.proj.weight": (0.32768, 0.05), "patch_embed.proj.bias": (0.32768, 0),
        "blocks.0.attn.qkv.weight": (0.4096, 0.05), "blocks.0.norm1.weight": (0.4096, 0), "blocks.1.mlp.fc2.bias": (0.512, 0),
        "blocks.2.mlp.fc2.weight": (0.64, 0.05), "blocks.3.attn.proj.weight": (0.8, 0.05),
        "norm.weight": (1, 0), "head.weight": (1, 0.05), "head.bias": (1, 0),
    }  # fmt: skip
    for name, (scale, decay) in expected.items():
        assert (group_of[name]["lr_scale"], group_of[name]["weight_decay"]) == (pytest.approx(scale), decay), name
    optimizer = optim.adamw(groups, (0.9, 0.999))
    optim.set_lr(optimizer, 10.0)
    assert sorted({round(group["lr"], 6) for group in optimizer.param_groups}) == [3.2768, 4.096, 5.12, 6.4, 8.0, 10.0]


# The loss.


class ConstantLogits(torch.nn.Module):
    """A model that returns the same logits for every image and keeps the images."""

    def __init__(self, row):
        super().__init__()
        self.row = torch.tensor(row)

    def forward(self, images):
        self.images = images
        return self.row.expand(len(images), -1)


def test_label_smoothing_by_hand(recipe):
    """Smoothing 0.3 over three classes: target 0.8 for the label, 0.1 for each other class."""
    plain = dataclasses.replace(recipe, mixup=0, cutmix=0, label_smoothing=0.3)
    row = [0.0, 1.0, 3.0]
    logs = torch.tensor(row).log_softmax(0)
    loss = FinetuneLoss(ConstantLogits(row), plain, 3)(torch.zeros(2, 3, 4, 4), torch.tensor([2, 2]))
    assert loss.item() == pytest.approx(-(0.1 * logs[0] + 0.1 * logs[1] + 0.8 * logs[2]).item(), rel=1e-5)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 1.0), (0.8, 0), (0, 1.0)])
def test_mixed_targets_match_the_mixed_images(recipe, mixup, cutmix):
    """Every pixel of image i is i, and i is mixed with image 3 - i: the mean pixel equals the targets' mean label."""
    mixing = dataclasses.replace(recipe, mixup=mixup, cutmix=cutmix, label_smoothing=0.0)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 20, 20)
    for seed in range(10):
        seeding.seed_globals(seed, "mix")
        mixed, targets = FinetuneLoss(ConstantLogits([0.0] * 4), mixing, 4).mixup(images.clone(), torch.arange(4))
        assert targets.sum(dim=1).tolist() == pytest.approx([1] * 4)
        assert (mixed.mean(dim=(1, 2, 3)) - targets @ torch.arange(4.0)).abs().max() < 1e-5
        assert ((targets > 0) & torch.tensor([[i in (j, 3 - j) for i in range(4)] for j in range(4)])).equal(targets > 0)


def test_the_mixed_loss_by_hand(recipe):
    """With equal logits every target has the loss log 4."""
    mixing = dataclasses.replace(recipe, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    loss = FinetuneLoss(ConstantLogits([0.0] * 4), mixing, 4)(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-5)
