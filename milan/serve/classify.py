"""Classify encoded images with a fine-tuned classifier. The images are not trusted: unsuitable ones are refused."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from milan.core.errors import UserError
from milan.data import transforms
from milan.evaluation.classifier import load_classifier

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_PIXELS = 50_000_000  # of an image that is decoded
BATCH_SIZE = 64


class ImageClassifier:
    """A classifier loaded from a folder that the finetune stage wrote; runs on a GPU if there is one."""

    def __init__(self, folder: Path):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.vit, self.info = load_classifier(folder)
        self.vit.to(self.device).eval()

    def __call__(self, images: list[bytes], top_k: int) -> list[dict]:
        """Return {"classes": names, "probabilities": floats} for each encoded image, the top_k best classes first.

        Raises UserError without an image, for a top_k below 1, and naming the first image that is unreadable or too large."""
        if not images:
            raise UserError("There is no image.")
        if top_k < 1:
            raise UserError(f"top_k must be 1 or more, not {top_k}.")
        inputs = torch.stack([self.prepare(data, f"image {row}") for row, data in enumerate(images)])
        return [answer for batch in inputs.split(BATCH_SIZE) for answer in self.predict(batch, top_k)]

    def prepare(self, data: bytes, name: str) -> Tensor:
        """Decode an image and cut it as in evaluation: uint8 (3, S, S)."""
        return transforms.centre(read_image(data, name), self.info.resize, self.info.model.image_size)

    @torch.inference_mode()
    def predict(self, images: Tensor, top_k: int) -> list[dict]:
        """Return the answers for a batch of prepared images, uint8 (B, 3, S, S)."""
        probabilities = self.vit(transforms.normalise(images.to(self.device))).float().softmax(dim=1).cpu()
        best = probabilities.topk(min(top_k, len(self.info.classes)), dim=1)
        return [
            {"classes": [self.info.classes[i] for i in indices], "probabilities": values}
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def read_image(data: bytes, name: str) -> Tensor:
    """Decode an image into uint8 (3, H, W). Raises UserError naming an image that is unreadable or larger than MAX_PIXELS.

    The size is read from the header first, so that a small file with a huge image is never decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            pixels = header.width * header.height
    except Image.DecompressionBombError:  # PIL's own limit, which is higher than MAX_PIXELS
        pixels = float("inf")
    except Exception as error:  # PIL raises many kinds for broken files
        raise UserError(f"{name} is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file ({type(error).__name__}).") from None
    if pixels > MAX_PIXELS:
        raise UserError(f"{name} has more than {MAX_PIXELS:,} pixels, the most that is read.")
    try:
        return transforms.decode(data, name)
    except UserError:
        raise UserError(f"{name} is damaged: it cannot be decoded.") from None
