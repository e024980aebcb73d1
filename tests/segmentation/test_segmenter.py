"""UPerNet against transformers' own, the ViT against plain timm's, and hand-computed losses and scores."""

import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetFCNHead, UperNetHead

from milan.core.errors import UserError
from milan.method.pos_embed import interpolate_pos_embed
from milan.segmentation.miou import confusion, reduce_zero_label, scores
from milan.segmentation.segmenter import (
    FCNHead,
    Pyramid,
    Segmenter,
    UPerHead,
    encoder_layer_ids,
    load_encoder,
    segmentation_loss,
    slide_logits,
)

WIDTH, CLASSES = 32, 5


def tiny(**changes) -> Segmenter:
    torch.manual_seed(0)
    sizes = dict(img_size=48, patch_size=8, embed_dim=WIDTH, depth=4, num_heads=2, num_classes=CLASSES)
    heads = dict(channels=16, aux_channels=8, out_indices=[0, 1, 2, 3], norm="batch")
    return Segmenter(**(sizes | heads | changes))


def randomise(module: nn.Module) -> None:
    """Random weights and random running statistics, so that no wrong order can hide behind ones and zeros."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * (0.3 if tensor.ndim == 1 else tensor[0].numel() ** -0.5))


def copy_conv(ours: nn.Sequential, theirs: UperNetConvModule) -> None:
    theirs.conv.load_state_dict(ours[0].state_dict())
    theirs.batch_norm.load_state_dict(ours[1].state_dict())


def pyramid_maps() -> list[torch.Tensor]:
    """Odd sides as well: 7 -> 3 is no factor of two."""
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


def double(x: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
    """A transposed convolution of kernel and stride 2, written out: each pixel becomes a 2x2 block."""
    blocks = torch.einsum("bchw,cdyx->bdhywx", x, conv.weight)
    return blocks.flatten(4, 5).flatten(2, 3) + conv.bias[:, None, None]


def test_neck_by_definition():
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
def test_features_are_plain_timm_until_the_bias_moves(relative_position_bias):
    segmenter = tiny(layer_scale=0.7, relative_position_bias=relative_position_bias).eval()
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
    """A bias that forbids everything but a patch itself: then no patch can see another one's pixels."""
    segmenter = tiny().eval()
    for block in segmenter.backbone.blocks:
        table = block.rel_pos.relative_position_bias_table.data.fill_(-1e4)
        table[(len(table) - 3) // 2] = 0  # the middle of the displacements: none
    images = torch.randn(1, 3, 48, 48)
    changed = images.clone()
    changed[..., 8:16, 16:24] += 10_000
    with torch.no_grad():
        before, after = segmenter.features(images)[3], segmenter.features(changed)[3]
    moved = (before != after).any(dim=1)[0]
    assert moved.nonzero().tolist() == [[1, 2]]


def test_training_step_of_the_tiny_recipe():
    segmenter = tiny(img_size=48, embed_dim=128, channels=64, num_heads=4)
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
def test_one_image_cannot_train_but_can_be_judged(norm):
    segmenter = tiny(norm=norm)
    kind = {"batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm}[norm]
    assert sum(isinstance(m, kind) for m in segmenter.modules()) == 1 + 4 + 1 + 3 + 3 + 1 + 1
    image = torch.randn(1, 3, 48, 48)
    with pytest.raises(ValueError, match="micro-batch must be >= 2"):
        segmenter(image)
    with torch.no_grad():
        assert segmenter.eval()(image)[0].shape == (1, CLASSES, 24, 24)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(img_size=50), "img_size 50"),
        (dict(out_indices=[0, 1, 3]), "four increasing"),
        (dict(out_indices=[1, 0, 2, 3]), "four increasing"),
        (dict(out_indices=[1, 2, 3, 4]), "outside the 4 blocks"),
        (dict(norm="layer"), "sync, batch"),
    ],
)
def test_impossible_geometry(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny(**changes)


def test_layer_ids():
    segmenter = tiny()
    ids = encoder_layer_ids(segmenter)
    assert list(ids) == [name for name, _ in segmenter.named_parameters()]
    embeddings = {"patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed"}
    assert {name for name, i in ids.items() if i == 0} == {f"backbone.{name}" for name in embeddings}
    assert ids["backbone.blocks.0.ls1.gamma"] == 1
    assert ids["backbone.blocks.3.rel_pos.relative_position_bias_table"] == 4
    assert {name.split(".")[0] for name, i in ids.items() if i == 5} == {"neck", "head", "aux_head"}
    assert max(ids.values()) == 5


def pretrained(**changes) -> dict[str, torch.Tensor]:
    sizes = dict(img_size=32, patch_size=8, embed_dim=WIDTH, depth=4, num_heads=2, num_classes=0)
    torch.manual_seed(1)
    return VisionTransformer(**(sizes | changes)).state_dict()


def test_load_encoder():
    segmenter, weights = tiny(), pretrained()
    load_encoder(segmenter, weights)
    loaded = segmenter.backbone.state_dict()
    assert loaded["pos_embed"].equal(interpolate_pos_embed(weights["pos_embed"], grid=6))
    for name, value in weights.items():
        if name != "pos_embed" and not name.startswith("norm."):
            assert loaded[name].equal(value), name
    assert loaded["blocks.3.ls2.gamma"].eq(1).all()
    assert loaded["blocks.3.rel_pos.relative_position_bias_table"].eq(0).all()


def test_load_encoder_takes_layer_scale_along():
    segmenter, weights = tiny(), pretrained(init_values=0.1)
    load_encoder(segmenter, weights)
    assert segmenter.backbone.blocks[3].ls2.gamma.detach().eq(weights["blocks.3.ls2.gamma"]).all()


def test_load_encoder_names_what_does_not_fit():
    segmenter, weights = tiny(), pretrained(num_classes=7)
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
    load_encoder(segmenter, pretrained(num_classes=7), unused=("norm.", "head."))


def test_loss_by_hand():
    # Logits (2 log 3, 0), (0, 0), (0, log 3) and one ignored: probabilities of the truth 0.9, 0.5, 0.25.
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
    # Two columns 0 and 4 become four: 0, 1, 3, 4 (aligned corners would give 0, 4/3, 8/3, 4).
    logits = torch.tensor([[[0.0, 4.0]], [[0.0, 0.0]]])[None]
    labels = torch.zeros(1, 1, 4, dtype=torch.long)
    expected = sum(math.log1p(math.exp(-score)) for score in (0, 1, 3, 4)) / 4
    assert segmentation_loss(logits, torch.zeros_like(logits), labels, aux_weight=0).item() == pytest.approx(expected)


class Recorder:
    """A model whose logits are a function of the pixels: every second pixel, and its double."""

    def __init__(self):
        self.windows = []

    def __call__(self, images):
        self.windows.append(images)
        pooled = nn.functional.avg_pool2d(images[:, :1], 2)
        return torch.cat([pooled, 2 * pooled], dim=1), None


@pytest.mark.parametrize("height, width, windows", [(8, 8, 1), (8, 13, 2), (19, 13, 4 * 2), (9, 20, 2 * 4)])
def test_slide_logits_agree_where_windows_overlap(height, width, windows):
    model = Recorder()
    image = torch.full((1, 3, height, width), 3.0)
    logits = slide_logits(model, image, window=8, stride=5, num_classes=2)
    assert logits.shape == (1, 2, height, width)
    assert torch.allclose(logits[0, 0], torch.tensor(3.0))
    assert torch.allclose(logits[0, 1], torch.tensor(6.0))
    assert len(model.windows) == windows
    assert all(window.shape == (1, 3, 8, 8) for window in model.windows)


def test_slide_logits_average_by_count():
    """Window k answers k everywhere: width 9, window 4, stride 3 gives windows at 0, 3 and, shifted inside, 5."""
    answers = iter([0.0, 1.0, 2.0])
    logits = slide_logits(lambda x: (torch.full((1, 1, 2, 2), next(answers)), None), torch.zeros(1, 3, 4, 9), 4, 3, 1)
    assert logits[0, 0, 0].tolist() == [0, 0, 0, 0.5, 1, 1.5, 1.5, 2, 2]
    assert logits[0, 0].unique(dim=0).shape == (1, 9)


def test_slide_logits_of_a_small_image():
    model = Recorder()
    logits = slide_logits(model, torch.full((1, 3, 5, 6), 3.0), window=8, stride=8, num_classes=2)
    assert logits.shape == (1, 2, 5, 6)
    (window,) = model.windows
    assert window[..., :5, :6].eq(3).all()
    assert window.sum() == 3 * 3 * 5 * 6
    with pytest.raises(ValueError, match="gaps"):
        slide_logits(model, torch.zeros(1, 3, 8, 8), window=4, stride=5, num_classes=2)


def test_slide_logits_of_a_segmenter():
    segmenter, image = tiny().eval(), torch.randn(1, 3, 48, 48)
    whole = slide_logits(segmenter, image, window=48, stride=32, num_classes=CLASSES)
    with torch.no_grad():
        direct = nn.functional.interpolate(segmenter(image)[0], size=(48, 48), mode="bilinear")
    assert torch.allclose(whole, direct, atol=1e-6)
    assert not whole.requires_grad


def test_miou_by_hand():
    label = torch.tensor([[0, 0, 0, 1], [1, 1, 255, 255]])
    pred = torch.tensor([[0, 0, 1, 1], [1, 3, 0, 2]])
    counts = confusion(pred, label, num_classes=4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert counts.dtype == torch.int64
    result = scores(counts)  # IoU 2/3, 2/4, absent (predicted on an ignored pixel only), 0/1
    assert result["class_iou"] == [pytest.approx(200 / 3), 50.0, None, 0.0]
    assert result["miou"] == pytest.approx((200 / 3 + 50 + 0) / 3)
    assert result["mean_accuracy"] == pytest.approx(200 / 3)
    assert result["pixel_accuracy"] == pytest.approx(400 / 6)


def test_confusions_add():
    torch.manual_seed(0)
    pred, label = torch.randint(4, (6, 9, 9)), torch.randint(4, (6, 9, 9))
    label[:, 0] = 255
    parts = [confusion(p, y, num_classes=4) for p, y in zip(pred.split(2), label.split(2), strict=True)]
    assert sum(parts).equal(confusion(pred, label, num_classes=4))


def test_confusion_refuses_strange_numbers():
    with pytest.raises(ValueError, match="label 4 outside the 4 classes"):
        confusion(torch.tensor([0, 1]), torch.tensor([4, 1]), num_classes=4)
    with pytest.raises(ValueError, match="prediction 7 outside"):
        confusion(torch.tensor([7, 7]), torch.tensor([255, 1]), num_classes=4)
    with pytest.raises(ValueError, match="no labelled pixel"):
        scores(torch.zeros(4, 4, dtype=torch.int64))


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_reduce_zero_label(make):
    annotation = (
        make([[0, 1, 150], [255, 2, 0]]).astype("uint8") if make is np.array else make([[0, 1, 150], [255, 2, 0]])
    )
    labels = reduce_zero_label(annotation, num_classes=150)
    assert labels.tolist() == [[255, 0, 149], [255, 1, 255]]
    assert labels.dtype == torch.uint8
    assert annotation.tolist() == [[0, 1, 150], [255, 2, 0]]


@pytest.mark.parametrize("strange", [151, 254, -1])
def test_reduce_zero_label_names_what_is_no_class(strange):
    with pytest.raises(ValueError, match=f"label {strange} "):
        reduce_zero_label(torch.tensor([[0, 255, 1, strange]]), num_classes=150)
