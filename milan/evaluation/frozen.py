"""Features of a frozen encoder, and the training set of a head on them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from milan.data import transforms
from milan.evaluation.inference import model_outputs
from milan.evaluation.linear import FeatureViews
from milan.evaluation.samples import EpochView
from milan.method.encoder import load_encoder
from milan.params import Params
from milan.training.device import autocast


def frozen_encoder(params: Params, weights: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function from normalised images (B, 3, S, S) to tokens (B, 1+N, D), class token first, without gradient.

    weights: the folder that the pretrain stage wrote. Raises UserError when the encoder does not have the recipe's sizes."""
    encoder = load_encoder(weights / "encoder.safetensors", params.model).to(device).eval()
    precision = params.compute.precision

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with autocast(precision, device):
            return encoder(images).float()

    return encode


def training_data(
    crops: Dataset, encode: Callable[[Tensor], Tensor], section, device: torch.device, workers: int
) -> tuple[Dataset, Callable[[dict], tuple]]:
    """Return the training set of a head, and the function that turns its batches into (features, labels).

    crops: item (epoch, index) is {"image", "label"}. section: of the recipe; with views = 0 its encoder sees a new crop every
    epoch; with V views the features of V fixed crops are extracted here, once, and kept in memory."""
    if section.views == 0:
        return crops, lambda batch: (encode(transforms.normalise(batch["image"])), batch["label"])
    views = [
        model_outputs(encode, EpochView(crops, view), section.micro_batch, device, "features", workers)
        for view in range(section.views)
    ]
    return FeatureViews(views), lambda batch: (batch["features"], batch["label"])
