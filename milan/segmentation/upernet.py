"""UPerNet on a plain ViT, the ADE20K model of MAE and its successors, and its loss.

The model follows mmsegmentation's configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512
(48.13 mIoU for MAE ViT-B/16); MILAN's own ADE20K configuration was never released.

    images -> ViT blocks -> 4 feature maps -> x4, x2, x1, x0.5 pyramid -> UPerNet -> logits
                                                                 (x1) -> FCN     -> auxiliary logits
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import RelPosBias
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from milan.method.pos_embed import interpolate_pos_embed
from milan.training.weights import OTHER_MODEL, load_state

Norm = type[nn.SyncBatchNorm] | type[nn.BatchNorm2d]
NORMS: dict[str, Norm] = {"sync": nn.SyncBatchNorm, "batch": nn.BatchNorm2d}
POOL_BINS = (1, 2, 3, 6)  # the pyramid pooling scales of PSPNet and UPerNet


class BiasedBlock(Block):
    """timm's block with a learned relative position bias in its attention."""

    def __init__(self, *args, grid: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.rel_pos = RelPosBias((grid, grid), self.attn.num_heads, prefix_tokens=1)
        # Pretraining has no such bias; zeros leave the pretrained encoder as it was.
        nn.init.zeros_(self.rel_pos.relative_position_bias_table)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, attn_mask=self.rel_pos.get_bias())


class Segmenter(nn.Module):
    """A ViT with class token and without final norm, a feature pyramid, the UPerNet head and an auxiliary FCN head.

    img_size: side of the square crop in pixels; out_indices: the four blocks whose outputs form the pyramid; norm: "sync"
    (batch statistics over all GPUs) or "batch" (those of one process, which also runs on CPUs). Raises ValueError for
    sizes or indices that do not fit.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        channels: int = 768,
        aux_channels: int = 256,
        out_indices: Sequence[int] = (3, 5, 7, 11),
        drop_path: float = 0.1,
        dropout: float = 0.1,
        layer_scale: float = 1.0,
        relative_position_bias: bool = True,
        norm: str = "sync",
    ) -> None:
        super().__init__()
        _check_geometry(img_size, patch_size, depth, out_indices, norm)
        self.out_indices, self.norm = list(out_indices), norm
        biased = partial(BiasedBlock, grid=img_size // patch_size)
        self.backbone = VisionTransformer(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            init_values=layer_scale,
            drop_path_rate=drop_path,
            block_fn=biased if relative_position_bias else Block,
            num_classes=0,
            global_pool="",
            final_norm=False,
        )
        self.neck = Pyramid(embed_dim, NORMS[norm])
        self.head = UPerHead([embed_dim] * 4, channels, num_classes, dropout, NORMS[norm])
        self.aux_head = FCNHead(embed_dim, aux_channels, num_classes, dropout, NORMS[norm])

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of the four blocks, each (B, embed_dim, G, G), for images (B, 3, S, S)."""
        return self.backbone.forward_intermediates(images, indices=self.out_indices, intermediates_only=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, C, 4G, 4G) and auxiliary logits (B, C, G, G) of images (B, 3, S, S), with G = S / patch_size.

        segmentation_loss and inference.slide_logits upsample them to the pixels. Raises ValueError when batch norm
        would be trained on a single image.
        """
        self._check_batch(len(images))
        maps = self.neck(self.features(images))
        return self.head(maps), self.aux_head(maps[2])

    def _check_batch(self, batch: int) -> None:
        processes = dist.get_world_size() if self.norm == "sync" and dist.is_initialized() else 1
        # The coarsest pooling leaves one value per channel and image; a single image has no variance.
        if self.training and batch * processes < 2:
            raise ValueError(f"the micro-batch must be >= 2 to train batch norm, it is {batch}")


def _check_geometry(img_size: int, patch_size: int, depth: int, out_indices: Sequence[int], norm: str) -> None:
    if img_size % patch_size or img_size < 2 * patch_size:
        raise ValueError(f"img_size {img_size} is not 2 or more patches of {patch_size} px")
    if len(out_indices) != 4 or sorted(set(out_indices)) != list(out_indices):
        raise ValueError(f"out_indices must be four increasing blocks, not {list(out_indices)}")
    if out_indices[0] < 0 or out_indices[-1] >= depth:
        raise ValueError(f"out_indices {list(out_indices)} outside the {depth} blocks")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")


class Pyramid(nn.Module):
    """Resize four maps (B, D, G, G) to the sides 4G, 2G, G and G / 2 (mmseg's Feature2Pyramid)."""

    def __init__(self, dim: int, norm: Norm) -> None:
        super().__init__()
        double = partial(nn.ConvTranspose2d, dim, dim, kernel_size=2, stride=2)
        quadruple = nn.Sequential(double(), norm(dim), nn.GELU(), double())
        self.levels = nn.ModuleList([quadruple, double(), nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(features) for level, features in zip(self.levels, maps, strict=True)]


class PyramidPooling(nn.Module):
    """Combine a map (B, D, h, w) with its averages over 1, 4, 9 and 36 regions into (B, channels, h, w)."""

    def __init__(self, in_channels: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), _conv(in_channels, channels, 1, norm)) for bins in POOL_BINS
        )
        self.fuse = _conv(in_channels + len(POOL_BINS) * channels, channels, 3, norm)

    def forward(self, features: Tensor) -> Tensor:
        pooled = [resize_maps(branch(features), features.shape[2:]) for branch in self.branches]
        return self.fuse(torch.cat([features, *pooled], dim=1))


class UPerHead(nn.Module):
    """The head of unified perceptual parsing (arXiv 1807.10221): pyramid pooling on top of a feature pyramid.

    Takes maps (B, in_channels[i], h_i, w_i), finest first; returns logits (B, num_classes, h_0, w_0).
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        *finer, top = in_channels
        self.laterals = nn.ModuleList(_conv(width, channels, 1, norm) for width in finer)
        self.pooling = PyramidPooling(top, channels, norm)
        self.smooth = nn.ModuleList(_conv(channels, channels, 3, norm) for _ in finer)
        self.fuse = _conv(len(in_channels) * channels, channels, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, top = maps
        levels = [lateral(features) for lateral, features in zip(self.laterals, finer, strict=True)]
        levels.append(self.pooling(top))
        for i in reversed(range(len(finer))):
            levels[i] = levels[i] + resize_maps(levels[i + 1], levels[i].shape[2:])
        smooth = [conv(level) for conv, level in zip(self.smooth, levels[:-1], strict=True)] + levels[-1:]
        stacked = torch.cat([resize_maps(level, smooth[0].shape[2:]) for level in smooth], dim=1)
        return self.classifier(self.dropout(self.fuse(stacked)))


class FCNHead(nn.Sequential):
    """The auxiliary head: a 3x3 convolution and a classifier. Takes (B, D, h, w), returns (B, C, h, w)."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float, norm: Norm) -> None:
        super().__init__(
            _conv(in_channels, channels, 3, norm),
            nn.Dropout2d(dropout),
            classifier(channels, num_classes),
        )


def _conv(in_channels: int, channels: int, kernel: int, norm: Norm) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # mmcv's ConvModule
    return nn.Sequential(conv, norm(channels), nn.ReLU())


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """Return a linear layer on every pixel: weights N(0, 0.01), bias 0 (mmseg's conv_seg)."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, C, h, w) to (B, C, *size), bilinearly without aligned corners, as mmseg does.

    Where a GPU trains, by matrix products: torch's kernel adds up gradients by atomic operations there, which takes a third of
    a step (benchmarks/RESULTS.md) and gives another sum at every run."""
    if maps.shape[2:] == tuple(size):
        return maps
    if maps.is_cuda and maps.requires_grad:
        return resize_by_products(maps, size)
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def resize_by_products(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize as resize_maps does, to rounding: one product along the height, one along the width, in the maps' precision.

    Fast for maps in channels-last, and returns such maps."""
    batch, channels, height, width = maps.shape
    along_height, along_width = (shares(*sides, maps) for sides in zip((height, width), size, strict=True))
    pixels = maps.permute(0, 2, 3, 1)
    with torch.autocast(maps.device.type, enabled=False):
        tall = along_height @ pixels.reshape(batch, height, width * channels)
        wide = along_width @ tall.view(batch * size[0], width, channels)
    return wide.view(batch, *size, channels).permute(0, 3, 1, 2)


def shares(source: int, target: int, like: Tensor) -> Tensor:
    """Return the share that each of `source` values has in each of `target` interpolated ones: (target, source), on the device
    and of the type of `like`."""
    one_each = torch.eye(source, device=like.device)[None]
    return F.interpolate(one_each, size=target, mode="linear", align_corners=False)[0].T.to(like.dtype)


def segmentation_loss(
    logits: Tensor,
    aux_logits: Tensor,
    labels: Tensor,
    ignore_index: int = 255,
    aux_weight: float = 0.4,
    average_over_ignored: bool = True,
) -> Tensor:
    """Return the pixel_loss of the main logits + aux_weight * that of the auxiliary logits (B, C, h', w'), as a scalar."""
    main, auxiliary = (pixel_loss(maps, labels, ignore_index, average_over_ignored) for maps in (logits, aux_logits))
    return main + aux_weight * auxiliary


def pixel_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255, average_over_ignored: bool = True) -> Tensor:
    """Return the cross-entropy of upsampled logits at the labels' resolution, as a scalar.

    logits: (B, C, h, w); labels: (B, H, W) integers. The sum over labelled pixels is divided by the number of all pixels,
    ignored ones included, as mmseg does by default (avg_non_ignore=False); with average_over_ignored=False it is divided by
    the number of labelled pixels.
    """
    pixels = labels.numel() if average_over_ignored else (labels != ignore_index).sum().clamp(min=1)
    fine = resize_maps(logits.float(), labels.shape[1:])
    return F.cross_entropy(fine, labels.long(), ignore_index=ignore_index, reduction="sum") / pixels


def encoder_layer_ids(segmenter: Segmenter) -> dict[str, int]:
    """Map every parameter's name to its layer, for layer-wise learning rates.

    Layer 0: patch and position embedding, class token; i + 1: block i with its relative position bias;
    depth + 1: neck and heads.
    """

    def layer_id(name: str) -> int:
        part, *path = name.split(".")
        if part != "backbone":
            return len(segmenter.backbone.blocks) + 1
        return int(path[1]) + 1 if path[0] == "blocks" else 0

    return {name: layer_id(name) for name, _ in segmenter.named_parameters()}


def load_encoder(segmenter: Segmenter, state_dict: Mapping[str, Tensor], unused: tuple[str, ...] = ("norm.",)) -> None:
    """Load a pretrained encoder in timm's layout and interpolate its position embedding to the crop's grid.

    Keys that begin with one of `unused` are skipped: the segmenter has no final norm (add "head." and "fc_norm." for a
    fine-tuned classifier). Layer scale and relative position bias keep their initial values when the encoder has none.
    Raises UserError naming the keys of any other difference, and then loads nothing."""
    state = dict(state_dict)
    if "pos_embed" in state:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], segmenter.backbone.patch_embed.grid_size[0])
    load_state(segmenter.backbone, state, "The encoder", OTHER_MODEL, new=(".rel_pos.", ".ls"), unused=unused)
