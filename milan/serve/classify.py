"""What a fine-tuned classifier says of image files from anywhere: refused when they are not what they should be."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from milan.core.errors import UserError
from milan.data import transforms
from milan.evaluation.classifier import load_classifier

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
PIXELS = 50_000_000  # of the largest image that is decoded
BATCH = 64


class Classify:
    """images (encoded bytes), top_k -> [{"classes": names, "probabilities": floats}], best first, on a GPU if any."""

    def __init__(self, folder: Path):
        """folder: as the finetune stage wrote it."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.vit, self.about = load_classifier(folder)
        self.vit.to(self.device).eval()

    def __call__(self, images: list[bytes], top_k: int) -> list[dict]:
        """Raises UserError naming the first image that is none, or too large; and for no images or no top_k."""
        if not images:
            raise UserError("There is no image.")
        if top_k < 1:
            raise UserError(f"top_k must be 1 or more, not {top_k}.")
        ready = [self.prepare(data, f"image {row}") for row, data in enumerate(images)]
        return [answer for part in batched(ready) for answer in self.answers(part, top_k)]

    def prepare(self, data: bytes, name: str) -> Tensor:
        return transforms.centre(read_image(data, name), self.about.resize, self.about.model.image_size)

    @torch.inference_mode()
    def answers(self, images: list[Tensor], top_k: int) -> list[dict]:
        chances = self.vit(transforms.normalise(torch.stack(images).to(self.device))).float().softmax(dim=1).cpu()
        best = chances.topk(min(top_k, len(self.about.classes)), dim=1)
        return [
            {"classes": [self.about.classes[i] for i in places], "probabilities": values}
            for places, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def batched(items: list) -> list[list]:
    return [items[first : first + BATCH] for first in range(0, len(items), BATCH)]


def read_image(data: bytes, name: str) -> Tensor:
    """Encoded bytes -> uint8 (3, H, W). The header is asked first: what decodes to more than PIXELS is not decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            pixels = header.width * header.height
    except Image.DecompressionBombError:  # PIL's own limit, higher than ours
        pixels = float("inf")
    except Exception as error:  # PIL raises many kinds for broken files
        raise UserError(f"{name} is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file ({type(error).__name__}).") from None
    if pixels > PIXELS:
        raise UserError(f"{name} has more than {PIXELS:,} pixels, the most that is read.")
    try:
        return transforms.decode(data, name)
    except UserError:
        raise UserError(f"{name} is damaged: it cannot be decoded.") from None
