"""UPerNet against that of transformers, the ViT against plain timm, and losses worked out by hand."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetFCNHead, UperNetHead

from milan.core.errors import UserError
from milan.method.pos_embed import interpolate_pos_embed
from milan.segmentation.inference import slide_logits
from milan.segmentation.upernet import (
    FCNHead,
    Pyramid,
    Segmenter,
    UPerHead,
    encoder_layer_ids,
    load_encoder,
    resize_by_products,
    resize_maps,
    segmentation_loss,
)

WIDTH, CLASSES = 32, 5


def tiny_segmenter(**changes) -> Segmenter:
    torch.manual_seed(0)
    sizes = dict(img_size=48, patch_size=8, embed_dim=WIDTH, depth=4, num_heads=2, num_classes=CLASSES)
    heads = dict(channels=16, aux_channels=8, out_indices=[0, 1, 2, 3], norm="batch")
    return Segmenter(**(sizes | heads | changes))


def randomise(module: nn.Module) -> None:
    """Randomise weights and running statistics, so that ones and zeros cannot hide a wrong order."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * (0.3 if tensor.ndim == 1 else tensor[0].numel() ** -0.5))


def copy_conv(ours: nn.Sequential, theirs: UperNetConvModule) -> None:
    theirs.conv.load_state_dict(ours[0].state_dict())
    theirs.batch_norm.load_state_dict(ours[1].state_dict())


def pyramid_maps() -> list[torch.Tensor]:
    """Make four maps; the last two sides, 7 and 3, do not differ by a factor of two."""
    return [torch.randn(2, width, side, side) for width, side in zip((6, 8, 10, 12), (28, 14, 7, 3), strict=True)]


def upernet_config() -> UperNetConfig:
    return UperNetConfig(hidden_size=16, auxiliary_channels=8, auxiliary_num_convs=1, num_labels=CLASSES)


def test_head_equals_transformers():
    torch.manual_seed(0)
    ours = UPerHead([6, 8, 10, 12], channels=16, num_classes=CLASSES, dropout=0.1, norm=nn.BatchNorm2d).eval()
    theirs = UperNetHead(upernet_config(), in_channels=[6, 8, 10, 12]).eval()
    randomise(ours)
    for branch, block in zip(ours.pooling.branches, theirs.psp_modules.blocks, strict=True):
        copy_conv(branch[1], block.layers[1])
    for mine, other in [*zip(ours.laterals, theirs.lateral_convs), *zip(ours.smooth, theirs.fpn_convs)]:
        copy_conv(mine, other)
    copy_conv(ours.pooling.fuse, theirs.bottleneck)
    copy_conv(ours.fuse, theirs.fpn_bottleneck)
    theirs.classifier.load_state_dict(ours.classifier.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    maps = pyramid_maps()
    with torch.no_grad():
        logits, expected = ours(maps), theirs(maps)
    assert logits.shape == (2, CLASSES, 28, 28)
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-5


def test_auxiliary_head_equals_transformers():
    torch.manual_seed(0)
    ours = FCNHead(10, channels=8, num_classes=CLASSES, dropout=0.1, norm=nn.BatchNorm2d).eval()
    theirs = UperNetFCNHead(upernet_config(), in_channels=[6, 8, 10, 12]).eval()
    randomise(ours)
    copy_conv(ours[0], theirs.convs[0])
    theirs.classifier.load_state_dict(ours[2].state_dict())
    maps = pyramid_maps()
    with torch.no_grad():
        assert (ours(maps[2]) - theirs(maps)).abs().max() < 1e-5


def double(maps: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
    """Apply a transposed convolution of kernel and stride 2 by hand: each pixel becomes a 2x2 block."""
    blocks = torch.einsum("bchw,cdyx->bdhywx", maps, conv.weight)
    return blocks.flatten(4, 5).flatten(2, 3) + conv.bias[:, None, None]


def test_pyramid_by_definition():
    torch.manual_seed(0)
    neck = Pyramid(4, nn.BatchNorm2d).eval()
    randomise(neck)
    maps = [torch.randn(2, 4, 6, 6) for _ in range(4)]
    first, norm, _, second = neck.levels[0]
    with torch.no_grad():
        levels = neck(maps)
        normed = (double(maps[0], first) - norm.running_mean[:, None, None]) / (norm.running_var + 1e-5).sqrt()[
            :, None, None
        ]
        normed = normed * norm.weight[:, None, None] + norm.bias[:, None, None]
        gelu = normed * (1 + torch.erf(normed / math.sqrt(2))) / 2
        assert torch.allclose(levels[0], double(gelu, second), atol=1e-5)
        assert torch.allclose(levels[1], double(maps[1], neck.levels[1]), atol=1e-5)
    assert levels[2].equal(maps[2])
    assert levels[3].equal(maps[3].unflatten(3, (3, 2)).unflatten(2, (3, 2)).amax((3, 5)))


@pytest.mark.parametrize("relative_position_bias", [True, False])
def test_features_equal_plain_timm_while_the_bias_is_zero(relative_position_bias):
    segmenter = tiny_segmenter(layer_scale=0.7, relative_position_bias=relative_position_bias).eval()
    plain = VisionTransformer(img_size=48, patch_size=8, embed_dim=WIDTH, depth=4, num_heads=2, init_values=0.7).eval()
    weights = {k: v for k, v in segmenter.backbone.state_dict().items() if "rel_pos" not in k}
    left_over = plain.load_state_dict(weights, strict=False)
    assert left_over.missing_keys == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert not left_over.unexpected_keys
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = plain.forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True, norm=False)
        for ours, theirs in zip(segmenter.features(images), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        if relative_position_bias:
            segmenter.backbone.blocks[2].rel_pos.relative_position_bias_table.normal_()
            same = [torch.allclose(a, b, atol=1e-3) for a, b in zip(segmenter.features(images), expected, strict=True)]
            assert same == [True, True, False, False]


def test_relative_position_bias_reaches_the_attention():
    """A bias that lets every patch attend to itself alone: then no patch sees another one's pixels."""
    segmenter = tiny_segmenter().eval()
    for block in segmenter.backbone.blocks:
        table = block.rel_pos.relative_position_bias_table.data.fill_(-1e4)
        table[(len(table) - 3) // 2] = 0  # the middle entry is the displacement zero
    images = torch.randn(1, 3, 48, 48)
    changed = images.clone()
    changed[..., 8:16, 16:24] += 10_000
    with torch.no_grad():
        before, after = segmenter.features(images)[3], segmenter.features(changed)[3]
    moved = (before != after).any(dim=1)[0]
    assert moved.nonzero().tolist() == [[1, 2]]


def test_training_step_of_the_tiny_recipe():
    segmenter = tiny_segmenter(img_size=48, embed_dim=128, channels=64, num_heads=4)
    labels = torch.randint(CLASSES, (2, 48, 48))
    with torch.autocast("cpu", torch.bfloat16):
        logits, aux_logits = segmenter(torch.randn(2, 3, 48, 48))
        loss = segmentation_loss(logits, aux_logits, labels)
    loss.backward()
    assert logits.shape == (2, CLASSES, 24, 24)
    assert aux_logits.shape == (2, CLASSES, 6, 6)
    assert loss.item() == pytest.approx(1.4 * math.log(CLASSES), rel=0.15)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in segmenter.parameters())
    assert segmenter.backbone.blocks[0].rel_pos.relative_position_bias_table.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["batch", "sync"])
def test_one_image_cannot_train_but_can_be_segmented(norm):
    segmenter = tiny_segmenter(norm=norm)
    kind = {"batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm}[norm]
    assert sum(isinstance(m, kind) for m in segmenter.modules()) == 1 + 4 + 1 + 3 + 3 + 1 + 1
    image = torch.randn(1, 3, 48, 48)
    with pytest.raises(ValueError, match="micro-batch must be >= 2"):
        segmenter(image)
    with torch.no_grad():
        assert segmenter.eval()(image)[0].shape == (1, CLASSES, 24, 24)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(img_size=50), "img_size 50"),
        (dict(out_indices=[0, 1, 3]), "four increasing"),
        (dict(out_indices=[1, 0, 2, 3]), "four increasing"),
        (dict(out_indices=[1, 2, 3, 4]), "outside the 4 blocks"),
        (dict(norm="layer"), "sync, batch"),
    ],
)
def test_impossible_geometry_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_segmenter(**changes)


def test_layer_ids():
    segmenter = tiny_segmenter()
    ids = encoder_layer_ids(segmenter)
    assert list(ids) == [name for name, _ in segmenter.named_parameters()]
    embeddings = {"patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed"}
    assert {name for name, i in ids.items() if i == 0} == {f"backbone.{name}" for name in embeddings}
    assert ids["backbone.blocks.0.ls1.gamma"] == 1
    assert ids["backbone.blocks.3.rel_pos.relative_position_bias_table"] == 4
    assert {name.split(".")[0] for name, i in ids.items() if i == 5} == {"neck", "head", "aux_head"}
    assert max(ids.values()) == 5


def encoder_weights(**changes) -> dict[str, torch.Tensor]:
    sizes = dict(img_size=32, patch_size=8, embed_dim=WIDTH, depth=4, num_heads=2, num_classes=0)
    torch.manual_seed(1)
    return VisionTransformer(**(sizes | changes)).state_dict()


def test_load_encoder():
    segmenter, weights = tiny_segmenter(), encoder_weights()
    load_encoder(segmenter, weights)
    loaded = segmenter.backbone.state_dict()
    assert loaded["pos_embed"].equal(interpolate_pos_embed(weights["pos_embed"], grid=6))
    for name, value in weights.items():
        if name != "pos_embed" and not name.startswith("norm."):
            assert loaded[name].equal(value), name
    assert loaded["blocks.3.ls2.gamma"].eq(1).all()
    assert loaded["blocks.3.rel_pos.relative_position_bias_table"].eq(0).all()


def test_load_encoder_loads_layer_scale():
    segmenter, weights = tiny_segmenter(), encoder_weights(init_values=0.1)
    load_encoder(segmenter, weights)
    assert segmenter.backbone.blocks[3].ls2.gamma.detach().eq(weights["blocks.3.ls2.gamma"]).all()


def test_load_encoder_names_the_keys_that_do_not_fit():
    segmenter, weights = tiny_segmenter(), encoder_weights(num_classes=7)
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    del weights["blocks.1.attn.qkv.bias"], weights["cls_token"]
    weights["blocks.2.mlp.fc1.weight"] = torch.zeros(3, 2)
    with pytest.raises(UserError) as caught:
        load_encoder(segmenter, weights)
    assert str(caught.value) == (
        "The encoder does not fit the model. missing: cls_token, blocks.1.attn.qkv.bias; unexpected: head.weight, head.bias; "
        "misshapen: blocks.2.mlp.fc1.weight is [3, 2], not [128, 32]. "
        "Were the pretrained weights made with another model section of params.yaml?"
    )
    assert all(value.equal(before[name]) for name, value in segmenter.state_dict().items())
    load_encoder(segmenter, encoder_weights(num_classes=7), unused=("norm.", "head."))


def test_loss_by_hand():
    # Logits (2 log 3, 0), (0, 0), (0, log 3) and an ignored pixel: the true class has probability 0.9, 0.5, 0.25.
    logits = torch.tensor([[[2 * math.log(3), 0], [0, 9]], [[0, 0], [math.log(3), 0]]])[None]
    labels = torch.tensor([[[0, 1], [0, 255]]])
    aux_logits = torch.zeros(1, 2, 1, 1)
    main, aux = -math.log(0.9 * 0.5 * 0.25), 3 * math.log(2)
    over_all = segmentation_loss(logits, aux_logits, labels)
    assert over_all.item() == pytest.approx((main + 0.4 * aux) / 4)
    over_labelled = segmentation_loss(logits, aux_logits, labels, average_over_ignored=False)
    assert over_labelled.item() == pytest.approx((main + 0.4 * aux) / 3)
    assert segmentation_loss(logits, aux_logits, labels.to(torch.uint8), aux_weight=0).item() == pytest.approx(main / 4)
    nothing = torch.full_like(labels, 255)
    assert segmentation_loss(logits, aux_logits, nothing, average_over_ignored=False) == 0


def test_loss_upsamples_bilinearly_without_aligned_corners():
    # Two columns with logits 0 and 4 become four: 0, 1, 3, 4 (aligned corners would give 0, 4/3, 8/3, 4).
    logits = torch.tensor([[[0.0, 4.0]], [[0.0, 0.0]]])[None]
    labels = torch.zeros(1, 1, 4, dtype=torch.long)
    expected = sum(math.log1p(math.exp(-score)) for score in (0, 1, 3, 4)) / 4
    assert segmentation_loss(logits, torch.zeros_like(logits), labels, aux_weight=0).item() == pytest.approx(expected)


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_resizing_by_products_by_hand():
    """Two values to four: pixel centres at -0.25, 0.25, 0.75 and 1.25 of the source, held at its ends."""
    maps = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]])
    row, column = torch.tensor([0.0, 1.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 6.0, 8.0])
    assert torch.equal(resize_by_products(maps, (4, 4))[0, 0], column[:, None] + row)


@pytest.mark.parametrize("size", [(10, 8), (7, 9), (2, 3), (1, 1)])
def test_where_a_gpu_trains_maps_are_resized_by_products(size):
    maps, upstream = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, *size)
    exact = nn.functional.interpolate(maps, size=size, mode="bilinear")
    found = resize_maps(maps.as_subclass(OnGpu), size)
    assert found.is_contiguous(memory_format=torch.channels_last)  # as only the products leave it
    torch.testing.assert_close(found.as_subclass(torch.Tensor), exact, atol=2e-6, rtol=0)
    gradients = [torch.autograd.grad(resized, maps, upstream)[0] for resized in (exact, found.as_subclass(torch.Tensor))]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)
    low = resize_by_products(maps.bfloat16(), size).float()
    torch.testing.assert_close(low, exact, atol=2**-5, rtol=0)  # four roundings of values below 4
    assert torch.equal(resize_maps(maps, size), exact)  # on a CPU
    assert torch.equal(resize_maps(maps.detach().as_subclass(OnGpu), size).as_subclass(torch.Tensor), exact)


def test_slide_logits_of_a_segmenter():
    segmenter, image = tiny_segmenter().eval(), torch.randn(1, 3, 48, 48)
    whole = slide_logits(segmenter, image, window=48, stride=32, num_classes=CLASSES)
    with torch.no_grad():
        direct = nn.functional.interpolate(segmenter(image)[0], size=(48, 48), mode="bilinear")
    assert torch.allclose(whole, direct, atol=1e-6)
    assert not whole.requires_grad
