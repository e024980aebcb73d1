"""Frozen teachers: the same features and attention as timm's; other grids and sizes resampled to the student's, as computed by
hand."""

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from milan.core.errors import UserError
from milan.data import seeding, transforms
from milan.params import Compute
from milan.teacher.frozen import compute_targets, resample_to_grid
from milan.teacher.towers import TimmTower, Tower

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}
KINDS = {
    "DINO": (VisionTransformer, {}),
    "registers": (VisionTransformer, {"reg_tokens": 3, "init_values": 0.5, "no_embed_class": True}),
    "normed queries, no bias": (VisionTransformer, {"qk_norm": True, "qkv_bias": False}),
    "distilled": (VisionTransformerDistilled, {}),
}
IMAGES = torch.randn(3, 3, 32, 32, generator=seeding.generator(0, "images"))
CPU = Compute("cpu", 1, "fp32", True, False)


@pytest.fixture(params=KINDS)
def vit(request) -> VisionTransformer:
    """Build a ViT whose weights are far from their initialisation."""
    seeding.seed_globals(0, "vit")
    kind, options = KINDS[request.param]
    vit = kind(**SIZES, **options).eval().requires_grad_(False)
    for name, parameter in vit.named_parameters():
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim < 2 or "qkv" in name or "token" in name else 0.05))
    return vit


def test_features_are_timm_s_without_registers(vit):
    features, _ = TimmTower(vit)(IMAGES)
    tokens = vit.forward_features(IMAGES)
    extra = vit.num_prefix_tokens - 1
    assert features.shape == (3, 17, 32) and tokens.shape == (3, 17 + extra, 32)
    assert features[:, 0].equal(tokens[:, 0]) and features[:, 1:].equal(tokens[:, 1 + extra :])


def test_importance_is_the_softmax_that_timm_computes(vit):
    """Without its fused kernel timm computes the whole attention matrix, and its dropout layer sees it."""
    caught, last = [], vit.blocks[-1].attn
    last.fused_attn = False
    hook = last.attn_drop.register_forward_hook(lambda module, args, out: caught.append(out))
    importance = TimmTower(vit)(IMAGES)[1]
    hook.remove()
    torch.testing.assert_close(importance, caught[0].mean(dim=1)[:, 0, vit.num_prefix_tokens :], atol=1e-6, rtol=1e-5)
    assert importance.shape == (3, 16) and (importance.sum(dim=1) < 1).all() and importance.std() > 0.005


def test_a_lowered_timm_tower_gives_nearly_the_same(vit):
    features, importance = TimmTower(vit)(IMAGES)
    lowered = TimmTower(vit).lowered("bf16")
    kinds = {name: parameter.dtype for name, parameter in lowered.named_parameters()}
    assert kinds["visual.blocks.0.attn.qkv.weight"] == torch.bfloat16 and kinds["visual.pos_embed"] == torch.float32
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        lowered_features, lowered_importance = lowered(IMAGES)
    assert lowered_importance.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(lowered_features.float(), features, dim=-1).min() > 0.99
    torch.testing.assert_close(lowered_importance, importance, rtol=0.2, atol=2e-3)


@pytest.mark.parametrize("options, message", [
    ({"class_token": False, "global_pool": "avg"}, "no class token"),
    ({"global_pool": "avg"}, "mean of its patches"),
    ({"img_size": (32, 16)}, "square images, and this one takes 32 x 16 pixels"),
])  # fmt: skip
def test_a_vit_without_an_importance_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        TimmTower(VisionTransformer(**{**SIZES, **options}))


# Another grid than the student's.


def tokens(maps: torch.Tensor) -> torch.Tensor:
    """Return maps (G, G) as tokens (1, 1 + G G, 1) with a class token of 1000."""
    return torch.cat([torch.tensor([1000.0]), maps.flatten()]).view(1, -1, 1)


def test_features_on_the_same_grid_are_returned_as_they_are():
    features, importance = torch.randn(2, 17, 5).bfloat16(), torch.rand(2, 16)
    same_features, same_importance = resample_to_grid(features, importance, 4, 4)
    assert same_features is features and same_importance is importance


@pytest.mark.parametrize("source, target", [(16, 14), (28, 14), (7, 14), (3, 5)])
def test_a_ramp_stays_a_ramp(source, target):
    """Patch centres are at (i + 1/2) / G of the image's side; beyond the outermost centres the ramp is level."""
    centres = (torch.arange(source) + 0.5) / source
    ramp = centres.expand(source, source) + 10 * centres[:, None]
    resampled, _ = resample_to_grid(tokens(ramp), torch.ones(1, source**2), source, target)
    expected = ((torch.arange(target) + 0.5) / target).clamp(centres[0], centres[-1])
    assert resampled.dtype == torch.float32 and resampled[0, 0, 0] == 1000
    expected_ramp = expected.expand(target, target) + 10 * expected[:, None]
    torch.testing.assert_close(resampled[0, 1:, 0].view(target, target), expected_ramp)


@pytest.mark.parametrize("source, target", [(16, 14), (28, 14), (7, 14)])
def test_constant_importance_stays_constant_and_keeps_its_sum(source, target):
    importance = torch.tensor([[0.75], [0.5]]).expand(2, source**2) / source**2
    _, resampled = resample_to_grid(torch.zeros(2, 1 + source**2, 1), importance, source, target)
    torch.testing.assert_close(resampled, torch.tensor([[0.75], [0.5]]).expand(2, target**2) / target**2)


@pytest.mark.parametrize("patch, source, target, expected", [
    ((1, 2), 4, 8, (slice(2, 4), slice(4, 6))),
    ((2, 1), 4, 2, (slice(1, 2), slice(0, 1))),
    ((5, 9), 16, 14, (slice(4, 5), slice(8, 9))),
])  # fmt: skip
def test_one_patch_stays_at_its_position(patch, source, target, expected):
    importance, features = torch.zeros(source, source), torch.zeros(source, source)
    importance[patch], features[patch] = 0.6, 2.0
    resampled, weights = resample_to_grid(tokens(features), importance.view(1, -1), source, target)
    for row in (resampled[0, 1:, 0], weights[0]):
        block = row.view(target, target)[expected]
        assert block.min() == pytest.approx(block.max().item()) and block.max() == row.max() > 0
    assert weights.sum() == pytest.approx(0.6)


def test_halving_a_grid_is_the_mean_of_four():
    maps = torch.arange(16.0).view(4, 4)
    resampled, _ = resample_to_grid(tokens(maps), torch.ones(1, 16), 4, 2)
    assert resampled[0, 1:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


# Targets for the student's images.


class RecordingTower(Tower):
    """Returns the mean of each of its 4 x 4 patches as features, and keeps its images."""

    def __init__(self, size: int):
        super().__init__(torch.nn.Identity(), (size, size), (4, 4), 3)

    def forward(self, images):
        self.images = images
        patches = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1), torch.full((len(images), 16), 1 / 16)


@pytest.mark.parametrize("normalisation", ["imagenet", "clip"])
def test_a_tower_of_the_student_s_size_sees_the_very_crops(normalisation):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tower = RecordingTower(32)
    features, _ = compute_targets(tower, images, CPU, normalisation, grid=4)
    expected_images = transforms.normalise(images, normalisation)
    assert tower.images.equal(expected_images) and features.equal(tower(expected_images)[0])


def test_a_tower_of_another_size_sees_the_whole_crop_resized():
    """The crop is dark at the left and bright at the right; the tower's size is larger or smaller than the crop."""
    for size in (48, 16):
        images = (torch.arange(32) * 8).to(torch.uint8).expand(1, 3, 32, 32)
        tower = RecordingTower(size)
        features, importance = compute_targets(tower, images, CPU, "imagenet", grid=2)
        expected_images = transforms.F.resize(images, [size, size], interpolation=transforms.BICUBIC, antialias=True)
        assert tower.images.shape[-1] == size and tower.images.equal(transforms.normalise(expected_images))
        left, right = features[0, 1:, 0].view(2, 2).unbind(dim=1)
        assert features.shape == (1, 5, 3) and (left < 0).all() and (right > 0).all() and left[0] == pytest.approx(left[1].item())
        assert importance.tolist() == [[0.25] * 4]
