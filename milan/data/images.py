"""Image files from anywhere, opened by PIL with care: of the kinds that data sets hold, and of no other.

PIL knows more than fifty kinds. For one (EPS) it starts a program, and for some it makes white of numbers above 255.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
DAMAGE = (  # what PIL raises over broken files
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def open_image(data: bytes) -> Image.Image:
    """Its header read, nothing decoded. Raises what PIL raises, DecompressionBombError for a picture beyond all use."""
    return Image.open(io.BytesIO(data), formats=KINDS)


def rgb(image: Image.Image) -> Image.Image:
    """In RGB; of 16 bits of grey the high byte, as decoding for training takes it (PIL itself would clip them to white)."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
