"""Any teacher: timm's own attention and features read out whole, other grids and sizes brought to the student's by rules
that can be worked out by hand."""

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from milan.core.errors import UserError
from milan.data import seeding, transforms
from milan.params import Compute
from milan.teacher.clip import Tower
from milan.teacher.frozen import TimmTower, look, on_grid

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
    """Weights far from their initialisation."""
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
    """Without its fused kernel timm makes the whole matrix, and its dropout sees it."""
    caught, last = [], vit.blocks[-1].attn
    last.fused_attn = False
    hook = last.attn_drop.register_forward_hook(lambda module, args, out: caught.append(out))
    importance = TimmTower(vit)(IMAGES)[1]
    hook.remove()
    torch.testing.assert_close(importance, caught[0].mean(dim=1)[:, 0, vit.num_prefix_tokens :], atol=1e-6, rtol=1e-5)
    assert importance.shape == (3, 16) and (importance.sum(dim=1) < 1).all() and importance.std() > 0.005


def test_a_lowered_timm_tower_says_nearly_the_same(vit):
    features, importance = TimmTower(vit)(IMAGES)
    lowered = TimmTower(vit).lowered("bf16")
    kinds = {name: parameter.dtype for name, parameter in lowered.named_parameters()}
    assert kinds["visual.blocks.0.attn.qkv.weight"] == torch.bfloat16 and kinds["visual.pos_embed"] == torch.float32
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found, attention = lowered(IMAGES)
    assert attention.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found.float(), features, dim=-1).min() > 0.99
    torch.testing.assert_close(attention, importance, rtol=0.2, atol=2e-3)


@pytest.mark.parametrize("options, said", [
    ({"class_token": False, "global_pool": "avg"}, "no class token"),
    ({"global_pool": "avg"}, "mean of its patches"),
    ({"img_size": (32, 16)}, "squares, and this one looks at 32 x 16"),
])  # fmt: skip
def test_a_vit_that_says_no_importance_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        TimmTower(VisionTransformer(**{**SIZES, **options}))


# Another grid than the student's.


def tokens(maps: torch.Tensor) -> torch.Tensor:
    """(G, G) -> (1, 1 + G G, 1) with a class token of 1000."""
    return torch.cat([torch.tensor([1000.0]), maps.flatten()]).view(1, -1, 1)


def test_the_same_grid_is_not_touched():
    features, importance = torch.randn(2, 17, 5).bfloat16(), torch.rand(2, 16)
    found = on_grid(features, importance, 4, 4)
    assert found[0] is features and found[1] is importance


@pytest.mark.parametrize("source, target", [(16, 14), (28, 14), (7, 14), (3, 5)])
def test_a_ramp_stays_a_ramp(source, target):
    """Over places in the image, patch centres at (i + 1/2) / G; beyond the outermost centres it is level."""
    place = (torch.arange(source) + 0.5) / source
    found, _ = on_grid(tokens(place.expand(source, source) + 10 * place[:, None]), torch.ones(1, source**2), source, target)
    aim = ((torch.arange(target) + 0.5) / target).clamp(place[0], place[-1])
    assert found.dtype == torch.float32 and found[0, 0, 0] == 1000
    torch.testing.assert_close(found[0, 1:, 0].view(target, target), aim.expand(target, target) + 10 * aim[:, None])


@pytest.mark.parametrize("source, target", [(16, 14), (28, 14), (7, 14)])
def test_constant_importance_stays_constant_and_keeps_its_sum(source, target):
    importance = torch.tensor([[0.75], [0.5]]).expand(2, source**2) / source**2
    _, found = on_grid(torch.zeros(2, 1 + source**2, 1), importance, source, target)
    torch.testing.assert_close(found, torch.tensor([[0.75], [0.5]]).expand(2, target**2) / target**2)


@pytest.mark.parametrize("patch, source, target, expected", [
    ((1, 2), 4, 8, (slice(2, 4), slice(4, 6))),
    ((2, 1), 4, 2, (slice(1, 2), slice(0, 1))),
    ((5, 9), 16, 14, (slice(4, 5), slice(8, 9))),
])  # fmt: skip
def test_one_patch_stays_at_its_place(patch, source, target, expected):
    importance, features = torch.zeros(source, source), torch.zeros(source, source)
    importance[patch], features[patch] = 0.6, 2.0
    found, weights = on_grid(tokens(features), importance.view(1, -1), source, target)
    for row in (found[0, 1:, 0], weights[0]):
        place = row.view(target, target)[expected]
        assert place.min() == pytest.approx(place.max().item()) and place.max() == row.max() > 0
    assert weights.sum() == pytest.approx(0.6)


def test_halving_a_grid_is_the_mean_of_four():
    maps = torch.arange(16.0).view(4, 4)
    found, _ = on_grid(tokens(maps), torch.ones(1, 16), 4, 2)
    assert found[0, 1:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]


# Asking it.


class Seen(Tower):
    """Says the mean of each of its 4 x 4 patches, and keeps what it was shown."""

    def __init__(self, size: int):
        super().__init__(torch.nn.Identity(), (size, size), (4, 4), 3)

    def forward(self, images):
        self.images = images
        patches = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1), torch.full((len(images), 16), 1 / 16)


@pytest.mark.parametrize("normalisation", ["imagenet", "clip"])
def test_a_tower_of_the_student_s_size_sees_the_very_crops(normalisation):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tower = Seen(32)
    features, _ = look(tower, images, CPU, normalisation, grid=4)
    wanted = transforms.normalise(images, normalisation)
    assert tower.images.equal(wanted) and features.equal(tower(wanted)[0])


def test_a_tower_of_another_size_sees_the_whole_crop_resized():
    """A crop dark at the left and bright at the right, larger and smaller than the tower's size."""
    for size in (48, 16):
        images = (torch.arange(32) * 8).to(torch.uint8).expand(1, 3, 32, 32)
        tower = Seen(size)
        features, importance = look(tower, images, CPU, "imagenet", grid=2)
        wanted = transforms.F.resize(images, [size, size], interpolation=transforms.BICUBIC, antialias=True)
        assert tower.images.shape[-1] == size and tower.images.equal(transforms.normalise(wanted))
        left, right = features[0, 1:, 0].view(2, 2).unbind(dim=1)
        assert features.shape == (1, 5, 3) and (left < 0).all() and (right > 0).all() and left[0] == pytest.approx(left[1].item())
        assert importance.tolist() == [[0.25] * 4]
