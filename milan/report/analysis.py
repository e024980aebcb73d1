"""Compute what the notebooks draw: mask statistics, predicted features, nearest neighbours, segmented scenes."""

from itertools import groupby

import torch
from torch import Tensor, nn

from milan.data import transforms
from milan.data.records import Records, chunks
from milan.method import masking
from milan.method.model import MaskedPretraining, in_image_order
from milan.report.project import Project, spread
from milan.segmentation import miou
from milan.segmentation.inference import predict
from milan.segmentation.scenes import decode_scene
from milan.training.device import autocast

DRAWS = 1000  # masks per image for the keep probabilities
MAX_CPU_PIXELS = 2_000_000  # in all scenes that a CPU segments
MAX_SCENES = 500


def keep_probability(importance: Tensor, n_visible: int, seed: int = 0) -> Tensor:
    """Return the share (n, N) of DRAWS semantic aware masks that keep each patch visible; importance (n, N)."""
    n_patches = importance.shape[1]
    noise = masking.gumbel(seed, 0, 0, DRAWS * n_patches).view(DRAWS, n_patches)
    visible = [masking.sample_visible(noise, n_visible, row.expand(DRAWS, n_patches)) for row in importance]
    return torch.stack([indices.flatten().bincount(minlength=n_patches) for indices in visible]) / DRAWS


@torch.inference_mode()
def predict_features(project: Project, model: MaskedPretraining, images: Tensor, visible: Tensor, batch: int = 32) -> Tensor:
    """Return the decoder's predictions (n, 1+N, D) for all tokens, in image order, from the visible patches (n, K) alone."""
    parts = []
    for some_images, some_visible in zip(images.split(batch), visible.split(batch), strict=True):
        masked = masking.complement(some_visible, model.n_patches)
        order = (some_visible.to(project.device), masked.to(project.device))
        predicted = model.predict(transforms.normalise(some_images.to(project.device)), *order)
        parts.append(in_image_order(predicted, *order).float().cpu())
    return torch.cat(parts)


@torch.inference_mode()
def encode_images(project: Project, variant: str, images: Tensor, batch: int = 32) -> Tensor:
    """Return the tokens (n, 1+N, D) of whole images, uint8 (n, 3, S, S), by a variant's encoder."""
    encoder = project.encoder(variant)
    return torch.cat([encoder(transforms.normalise(part.to(project.device))).float().cpu() for part in images.split(batch)])


def nearest_neighbours(features: Tensor, k: int) -> Tensor:
    """Return the indices (n, k) of the most similar other images by cosine of features (n, D); all others when fewer than k."""
    unit = nn.functional.normalize(features, dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).topk(min(k, len(unit) - 1), dim=1).indices


def validation_scenes(project: Project, val: Records) -> list[tuple[Tensor, Tensor]]:
    """Decode (image, labels) of all validation scenes, or of as many as this machine can segment in a short time."""
    scene_pixels = project.params.segment.crop_size**2
    most = MAX_SCENES if project.device.type == "cuda" else min(MAX_SCENES, max(8, MAX_CPU_PIXELS // scene_pixels))
    return [decode_scene(val[i], len(val.manifest["classes"])) for i in spread(len(val), most).tolist()]


@torch.inference_mode()
def segment_scenes(project: Project, variant: str, scenes: list[tuple[Tensor, Tensor]], classes: int) -> list[Tensor]:
    """Return the predicted labels (H, W) of each scene (image, labels), computed as in the segment stage."""
    model, predicted = project.segmenter(variant, classes), []
    for _, same_size in groupby(scenes, key=lambda scene: scene[0].shape):
        for some in chunks(same_size, 50):
            images, size = torch.stack([image for image, _ in some]), some[0][1].shape
            with autocast(project.params.compute.precision, project.device):
                predicted += predict(model, images.to(project.device), size, project.params.segment, classes).cpu()
    return predicted


def class_iou(predicted: list[Tensor], scenes: list[tuple[Tensor, Tensor]], classes: int) -> list[float]:
    """Return the IoU of each class in %, NaN for a class that occurs nowhere."""
    counts = sum(miou.confusion(part, labels, classes) for part, (_, labels) in zip(predicted, scenes, strict=True))
    return [float("nan") if value is None else value for value in miou.scores(counts)["class_iou"]]
