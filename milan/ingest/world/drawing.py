"""Draw the scenes of the built-in captioned world.

An object scene shows one object, a shape with a fill ("striped disc"), over a textured background with bars as clutter. Shape
and fill together are the class. Colour, size, position and background are drawn independently of it, and some backgrounds are
striped, checked or noisy themselves, so neither colour nor global texture reveals the class. A stuff scene has two textures
and several objects, with an annotation of every pixel.

Every scene is a function of (seed, purpose, index) alone: neither order nor number of processes changes a byte. Lengths are in
half images (the image spans -1 to 1, y points down), so that one world serves sizes 32 to 128. A canvas is (size, size, 3), a
field or coverage (size, size): float32, 0..1. One core writes 1100 to 1900 scenes of 48 pixels a second.
"""

import math
from typing import NamedTuple
from zlib import crc32

import numpy as np

TEXTURES = ("mossy", "cloudy", "wooden", "quilted", "tiled", "sandy")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "gold": (0.95, 0.75, 0.10),
    "green": (0.15, 0.75, 0.20),
    "cyan": (0.10, 0.85, 0.85),
    "blue": (0.15, 0.30, 0.95),
    "purple": (0.60, 0.15, 0.75),
    "pink": (1.00, 0.50, 0.70),
    "white": (0.95, 0.95, 0.95),
}
RADII = {"small": (0.42, 0.51), "large": (0.55, 0.64)}

# Every caption names fill and shape: without them a tiny CLIP learns only colour and background.
TEMPLATES = (
    "a photo of a {size} {colour} {fill} {shape} on a {texture} background",
    "a picture of a {colour} {fill} {shape} in front of a {texture} wall",
    "there is a {size} {fill} {shape} on the {texture} ground",
    "the {fill} {shape} is {colour} and the background is {texture}",
    "this {texture} scene shows one {size} {colour} {fill} {shape}",
    "a {fill} {shape}",
)
PROMPTS = ("a photo of a {}", "a picture of a {}", "there is a {}", "this scene shows one {}", "a {}")

BARS = 3
NOISE = 0.04  # standard deviation of the pixel noise, where the range of a canvas is 1
PERIOD = 2 * 6.5 / 48  # of a fill's pattern: 6.5 pixels in an image of 48
SHADE = 0.35  # brightness of a fill's dark colour, where its light one has 1


class World(NamedTuple):
    """The objects of a world: each shape with each fill is a class."""

    shapes: tuple[str, ...]
    fills: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(f"{fill} {shape}" for shape in self.shapes for fill in self.fills)

    @property
    def wnids(self) -> tuple[str, ...]:
        """An id for each class, like a WordNet id; sorted they are in the order of the classes, as in ILSVRC."""
        return tuple(f"n{90000000 + label:08d}" for label in range(len(self.classes)))

    @property
    def scene_classes(self) -> tuple[str, ...]:
        """The classes of stuff scenes. As in ADE20K, a pixel's annotation is the index of its class + 1, and 0 is unlabelled."""
        return TEXTURES + self.shapes


SMALL = World(("disc", "ring", "triangle", "cross", "square"), ("striped", "dotted", "checked", "plain"))
LARGE = World((*SMALL.shapes, "star", "crescent", "arrow"), (*SMALL.fills, "pinstriped", "gridded"))
WORLDS = {"small": SMALL, "large": LARGE}  # 20 and 48 classes, 11 and 14 scene classes


class Scene(NamedTuple):
    """An object scene. The mask is True on every pixel that the object covers, even in part."""

    image: np.ndarray  # (size, size, 3) uint8
    label: int  # an index of the world's classes
    caption: str
    mask: np.ndarray  # (size, size) bool


def object_scene(world: World, seed: int, purpose: str, index: int, size: int) -> Scene:
    """Draw object scene `index` of the split `purpose`, size x size pixels. Its label is index modulo the number of classes, so a
    split is exactly balanced."""
    rng = _generator(seed, purpose, index)
    label = index % len(world.classes)
    fill, shape = world.classes[label].split()
    words = {
        name: str(rng.choice(list(names)))
        for name, names in {"size": RADII, "colour": COLOURS, "texture": TEXTURES, "template": TEMPLATES}.items()
    }
    canvas = _background(rng, words["texture"], size)
    _scatter_bars(rng, canvas)
    coverage = _coverage(rng, shape, rng.uniform(*RADII[words["size"]]), size)
    canvas = _blend(canvas, _pattern(rng, fill, words["colour"], size), coverage)
    caption = words["template"].format(fill=fill, shape=shape, **words)
    return Scene(_photograph(rng, canvas), label, caption, coverage > 0)


def stuff_scene(world: World, seed: int, purpose: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a stuff scene: two textures parted by a wavy line, with 2 to 4 objects.

    Returns the image (size, size, 3) and the annotation (size, size), both uint8. Annotation: 0 = unlabelled (bars, and pixels
    that two regions share), 1..6 = TEXTURES, from 7 on the world's shapes."""
    rng = _generator(seed, purpose, index)
    first, second = rng.permutation(len(TEXTURES))[:2].tolist()
    u, v = _frame(size, rng.uniform(0, 2 * math.pi), *rng.uniform(-0.3, 0.3, 2).tolist())
    side = _soft(u + 0.15 * np.sin(v * rng.uniform(2, 6) + rng.uniform(0, 2 * math.pi)), size / 2)
    canvas = _blend(*(_background(rng, TEXTURES[k], size) for k in (first, second)), side)
    annotation = _label(np.full((size, size), first + 1, np.uint8), second + 1, side)
    annotation[_scatter_bars(rng, canvas)] = 0
    for _ in range(rng.integers(2, 5)):
        shape, fill, colour = (str(rng.choice(list(names))) for names in (world.shapes, world.fills, COLOURS))
        coverage = _coverage(rng, shape, rng.uniform(0.34, 0.5), size)
        canvas = _blend(canvas, _pattern(rng, fill, colour, size), coverage)
        annotation = _label(annotation, world.scene_classes.index(shape) + 1, coverage)
    return _photograph(rng, canvas), annotation


def _generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """Return the scene's own generator. crc32, because Python's hash of a string differs between processes."""
    key = np.random.SeedSequence(seed, spawn_key=(crc32(purpose.encode()), index))
    return np.random.Generator(np.random.PCG64(key))


def _frame(size: int, angle: float, x: float = 0.0, y: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates (u, v) of the pixel centres in a frame turned by `angle` (radians) about (x, y)."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    dx, dy = axis[None, :] - x, axis[:, None] - y
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * dx + sin * dy, cos * dy - sin * dx


def _soft(values: np.ndarray, slope: float = 1.0) -> np.ndarray:
    """Threshold values at zero with a ramp of width 1 / slope, so that edges do not flicker with sub-pixel shifts."""
    return (values * slope + 0.5).clip(0, 1)


def _blend(below: np.ndarray, above: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Blend two canvases: `above` where coverage is 1, `below` where it is 0."""
    return below + coverage[..., None] * (above - below)


def _label(annotation: np.ndarray, value: int, coverage: np.ndarray) -> np.ndarray:
    """Set `value` where a region covers the whole pixel, and 0 (unlabelled) where it covers a part."""
    return np.where(coverage == 1, value, np.where(coverage == 0, annotation, 0)).astype(np.uint8)


def _background(rng: np.random.Generator, texture: str, size: int) -> np.ndarray:
    """Draw a texture between two random colours with a distance of 0.2 to 0.5."""
    colour = rng.uniform(0.1, 0.9, 3)
    step = np.abs(rng.standard_normal(3)) * np.where(colour > 0.5, -1, 1)  # inwards: clipping cannot shorten it
    step *= rng.uniform(0.2, 0.5) / np.linalg.norm(step)
    return colour.astype(np.float32) + _FIELDS[texture](rng, size)[..., None] * step.astype(np.float32)


def _value_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Draw a field by linear interpolation between cells x cells random values."""
    distance = np.abs(np.linspace(0, cells - 1, size)[:, None] - np.arange(cells))
    stretch = (1 - distance).clip(0).astype(np.float32)
    return _soft(stretch @ (rng.random((cells, cells), np.float32) - 0.5) @ stretch.T, 1.4)


def _waves(rng: np.random.Generator, size: int, shortest: float, longest: float, warp: float = 0) -> list[np.ndarray]:
    """Draw two sine waves (-1..1) at right angles, of one random period, direction and phase, bent by up to `warp`."""
    axes = _frame(size, rng.uniform(0, math.pi), *rng.uniform(-1, 1, 2).tolist())
    bend = warp * _value_noise(rng, size, 5) if warp else 0
    frequency = 2 * math.pi / rng.uniform(shortest, longest)
    return [np.sin(frequency * (axis + bend)) for axis in axes]


_FIELDS = {
    "mossy": lambda rng, size: _value_noise(rng, size, 12),
    "cloudy": lambda rng, size: _value_noise(rng, size, 4),
    "wooden": lambda rng, size: 0.5 + 0.5 * _waves(rng, size, 0.25, 0.4, warp=0.3)[0],
    "quilted": lambda rng, size: _soft(np.prod(_waves(rng, size, 0.35, 0.55), axis=0), 2),
    "tiled": lambda rng, size: _soft(0.25 - np.min(np.abs(_waves(rng, size, 0.6, 1.0)), axis=0), 4),
    "sandy": lambda rng, size: rng.random((size, size), np.float32),
}


def _scatter_bars(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Draw bars into the canvas as clutter. Returns the pixels that they cover, (size, size) bool."""
    taken = np.zeros(canvas.shape[:2], bool)
    for _ in range(BARS):
        u, v = _frame(len(canvas), rng.uniform(0, math.pi), *rng.uniform(-1, 1, 2).tolist())
        bar = (np.abs(u) < rng.uniform(0.12, 0.3)) & (np.abs(v) < rng.uniform(0.03, 0.08))
        canvas[bar] = rng.random(3)
        taken |= bar
    return taken


def _in_star(u: np.ndarray, v: np.ndarray, tip: float, notch: float) -> np.ndarray:
    """Return whether points lie in a star of five tips, one up, with tips and notches at these distances from its centre."""
    fifth = math.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fifth) % (2 * fifth) - fifth)  # to the nearest tip: 0 to a tenth of a turn
    edge = tip * notch * math.sin(fifth)  # twice the area of the triangle centre, tip, notch
    along, across = tip - notch * math.cos(fifth), notch * math.sin(fifth)
    return np.hypot(u, v) * (np.sin(angle) * along + np.cos(angle) * across) < edge


_INSIDE = {  # in units of the radius; sizes give the shapes similar areas and so similar difficulty
    "disc": lambda u, v: u * u + v * v < 0.84**2,
    "ring": lambda u, v: np.abs(np.sqrt(u * u + v * v) - 0.70) < 0.24,
    "triangle": lambda u, v: np.maximum(v - 0.5, (math.sqrt(3) * np.abs(u) - v) / 2 - 0.5) < 0.05,
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < 0.30) & (np.maximum(np.abs(u), np.abs(v)) < 0.95),
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.70,
    "star": lambda u, v: _in_star(u, v, 1.10, 0.55),
    "crescent": lambda u, v: (u * u + v * v < 0.98**2) & ((u - 0.45) ** 2 + v * v > 0.68**2),
    "arrow": lambda u, v: (np.abs(u) < np.where(v < 0, 0.95 * (v + 0.95), 0.38)) & (v < 0.95),
}
_DARK = {  # functions of two waves; a fill is dark where they are positive
    "striped": lambda a, b: a,
    "dotted": lambda a, b: a + b - 0.6,
    "checked": lambda a, b: 2 * a * b,
    "plain": lambda a, b: np.full_like(a, -1),
    "pinstriped": lambda a, b: a - 0.7,
    "gridded": lambda a, b: np.maximum(a, b) - 0.7,
}


def _coverage(rng: np.random.Generator, shape: str, radius: float, size: int) -> np.ndarray:
    """Place a shape of this radius at random, and return the share of each pixel that it covers: 0, 1/4, ... 1."""
    u, v = _frame(2 * size, rng.uniform(-0.4, 0.4), *rng.uniform(radius - 1.03, 1.03 - radius, 2).tolist())
    inside = _INSIDE[shape](u / radius, v / radius).view(np.uint8)
    rows = inside[::2] + inside[1::2]
    return (rows[:, ::2] + rows[:, 1::2]) * np.float32(0.25)


def _pattern(rng: np.random.Generator, fill: str, colour: str, size: int) -> np.ndarray:
    """Draw a canvas with a fill's pattern, in a random direction that does not depend on the shape."""
    shade = 1 - (1 - SHADE) * _soft(_DARK[fill](*_waves(rng, size, 0.9 * PERIOD, 1.1 * PERIOD)))
    light = np.asarray(COLOURS[colour]) + rng.uniform(-0.06, 0.06, 3)
    return shade[..., None] * light.astype(np.float32)


def _photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Apply a random exposure and pixel noise, and convert to 8 bits: (size, size, 3) uint8."""
    noise = NOISE * rng.standard_normal(canvas.shape, np.float32)
    return ((canvas * rng.uniform(0.75, 1.15) + noise).clip(0, 1) * 255 + 0.5).astype(np.uint8)
