"""Open untrusted image files with PIL, limited to the formats that data sets have.

PIL reads more than fifty formats. For one (EPS) it starts a program, and in some it clips values above 255 to white.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
DAMAGE = (  # raised by PIL for broken files
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
    """Open an image: read its header, decode nothing. Raises one of DAMAGE, such as DecompressionBombError for absurd sizes."""
    return Image.open(io.BytesIO(data), formats=KINDS)


def rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB. 16-bit grey keeps its high byte, as in transforms.decode; PIL itself would clip it to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
