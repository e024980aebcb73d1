"""Image transforms: crop boxes follow their rules, pixels equal PIL's, labels move with their image."""

import io
import itertools
import math
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as pil_transforms

from milan.core.errors import UserError
from milan.data import seeding, transforms
from milan.evaluation import augmentation
from milan.segmentation import scenes

DRAWS = 1500


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw an image with smooth shapes, sharp edges and noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 255 / width, y * 255 / height, 127 + 127 * np.sin(x / 7) * np.cos(y / 5)], axis=-1)
    base[height // 4 : height // 2, width // 4 : width // 2] = (255, 0, 128)
    noisy = base + generator.normal(0, 12, base.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def grey_levels(ours: torch.Tensor, theirs: Image.Image) -> int:
    """Return the largest difference of two images, in grey levels."""
    assert ours.shape[1:] == theirs.size[::-1]
    return (ours.int() - tensor(theirs).int()).abs().max().item()


def draw_boxes(draw, height: int, width: int, scale: list[float]) -> list[tuple]:
    """Draw DRAWS crops (top, left, height, width, flip)."""
    return [draw(height, width, scale, seeding.generator(0, "crop", 0, i)) for i in range(DRAWS)]


@pytest.mark.parametrize("draw", [transforms.draw_crop, augmentation.draw_simple_crop])
@pytest.mark.parametrize("height, width", [(375, 500), (48, 48), (30, 200), (200, 30), (1, 1)])
def test_a_drawn_crop_lies_inside(draw, height, width):
    for top, left, h, w, flip in draw_boxes(draw, height, width, [0.2, 1.0]):
        assert min(top, left) >= 0 and min(h, w) > 0 and top + h <= height and left + w <= width
        assert isinstance(flip, bool)


def test_crops_fill_the_scale_and_the_ratio_evenly():
    """In an image that every draw fits: area uniform, ratio log-uniform, half of the crops flipped."""
    boxes = draw_boxes(transforms.draw_crop, 4000, 4000, [0.2, 0.5])
    area = np.array([h * w / 4000**2 for _, _, h, w, _ in boxes])
    ratio = np.array([math.log(w / h) for _, _, h, w, _ in boxes])
    assert area.min() > 0.199 and area.max() < 0.501
    assert abs(ratio).max() < math.log(4 / 3) + 1e-3
    # Uniform: mean at the middle, standard deviation the width over the root of 12; within 5 standard errors.
    for values, low, high in ((area, 0.2, 0.5), (ratio, -math.log(4 / 3), math.log(4 / 3))):
        spread = (high - low) / 12**0.5
        assert values.mean() == pytest.approx((low + high) / 2, abs=5 * spread / DRAWS**0.5)
        assert values.std() == pytest.approx(spread, rel=0.08)
    assert np.mean([flip for *_, flip in boxes]) == pytest.approx(0.5, abs=5 * 0.5 / DRAWS**0.5)


def test_crops_reach_every_corner():
    boxes = draw_boxes(transforms.draw_crop, 20, 20, [0.5, 0.5])
    assert {top for top, *_ in boxes} >= {0, 1, 2, 3, 4, 5} and min(20 - top - h for top, _, h, *_ in boxes) == 0
    assert min(left for _, left, *_ in boxes) == 0 and min(20 - left - w for _, left, _, w, _ in boxes) == 0


@pytest.mark.parametrize("height, width, expected", [(100, 1000, (0, 433, 100, 133)), (1000, 100, (433, 0, 133, 100))])
def test_an_extreme_aspect_takes_the_largest_central_crop(height, width, expected):
    """No crop of 90 % of the area has a ratio within 3/4 and 4/3: 4/3 of 100 is 133, and (1000 - 133) // 2 = 433."""
    for *box, _ in draw_boxes(transforms.draw_crop, height, width, [0.9, 1.0])[:50]:
        assert tuple(box) == expected


def test_the_simple_crop_is_cut_to_the_image():
    """In a 10 x 1000 image every drawn height is above 10: BYOL's crop takes all 10 rows and does not try again."""
    for top, _, h, w, _ in draw_boxes(augmentation.draw_simple_crop, 10, 1000, [0.5, 1.0])[:200]:
        assert (top, h) == (0, 10)
        assert math.sqrt(10 * 1000 * 0.5 * 3 / 4) - 1 <= w <= math.sqrt(10 * 1000 * 4 / 3) + 1


def test_a_draw_is_its_key_s():
    again = [
        transforms.draw_crop(375, 500, [0.2, 1.0], seeding.generator(3, "crop", e, i)) for e, i in ((1, 2), (1, 2), (1, 3), (2, 2))
    ]
    assert again[0] == again[1] and len(set(again)) == 3


@pytest.mark.parametrize("box", [(17, 33, 301, 402), (0, 0, 375, 500), (100, 100, 60, 70), (200, 10, 150, 200)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_pil_s_bicubic(box, flip):
    image = picture(500, 375)
    top, left, height, width = box
    theirs = image.crop((left, top, left + width, top + height)).resize((224, 224), Image.BICUBIC)
    theirs = theirs.transpose(Image.FLIP_LEFT_RIGHT) if flip else theirs
    assert grey_levels(transforms.crop(tensor(image), (*box, flip), 224), theirs) <= 2


@pytest.mark.parametrize("noise", [0, 12, 60], ids=["smooth", "noisy", "noise"])
def test_a_loaded_view_is_the_reference_s(noise):
    """Decoded and cropped from a file, it differs from the release's PIL transforms by at most 2 grey levels, and by less than a
    fiftieth of one on average (0.005 measured)."""
    colours = np.random.default_rng(noise).integers(0, 256, (8, 10, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(colours).resize((500, 400), Image.BICUBIC))
    pixels = smooth + np.random.default_rng(1).normal(0, noise, smooth.shape)
    data = file(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "JPEG", quality=90)
    for top, left, height, width in ((30, 70, 310, 402), (0, 0, 400, 500), (100, 100, 160, 170)):
        with Image.open(io.BytesIO(data)) as image:
            theirs = image.convert("RGB").crop((left, top, left + width, top + height)).resize((224, 224), Image.BICUBIC)
        ours = transforms.crop(transforms.decode(data), (top, left, height, width, False), 224)
        assert grey_levels(ours, theirs) <= 2
        assert (ours.float() - tensor(theirs).float()).abs().mean() < 0.02


def test_a_crop_without_resizing_is_a_cut():
    """Pixel (y, x) has the value 10 y + x."""
    image = (torch.arange(10)[:, None] * 10 + torch.arange(10)).to(torch.uint8).expand(3, -1, -1)
    cut = transforms.crop(image, (2, 3, 2, 2, False), 2)
    assert cut[0].tolist() == [[23, 24], [33, 34]]
    assert transforms.crop(image, (2, 3, 2, 2, True), 2)[2].tolist() == [[24, 23], [34, 33]]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 256), (1024, 300), (200, 180)])
def test_the_central_crop_is_torchvision_s(size):
    image = picture(*size)
    pipeline = pil_transforms.Compose(
        [pil_transforms.Resize(256, pil_transforms.InterpolationMode.BICUBIC), pil_transforms.CenterCrop(224)]
    )
    assert grey_levels(transforms.centre(tensor(image), 256, 224), pipeline(image)) <= 2


@pytest.mark.parametrize("long", [4 * transforms.ASPECT - 1, 4 * transforms.ASPECT, 4 * 100, 4 * 100 + 2])
@pytest.mark.parametrize("upright", [False, True])
def test_the_centre_of_a_long_image_is_that_of_the_whole_image_resized(long, upright):
    image = tensor(picture(long, 4))
    image = image.mT.contiguous() if upright else image
    whole = transforms.F.resize(image, [20], interpolation=transforms.BICUBIC, antialias=True)
    assert transforms.centre(image, 20, 16).equal(transforms.F.center_crop(whole, [16, 16]))


def test_a_line_of_a_million_pixels_takes_no_memory():
    """Resized whole it would take 256 x 256,000,000 pixels."""
    line = torch.zeros(3, 1, 1_000_001, dtype=torch.uint8)
    line[:, 0, 500_000] = 200
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cut = transforms.centre(line, 256, 224)
    assert cut.shape == (3, 224, 224) and cut[:, 112, 112].tolist() == [200] * 3
    assert cut.flip(-1).equal(cut), "the middle pixel stays in the middle"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_normalise_by_hand():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3).expand(2, 3, 1, 3)
    normalised = transforms.normalise(images)
    assert normalised[1, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, 0.515 / 0.229, -0.285 / 0.229], abs=1e-6)
    assert normalised[0, 2, 0].tolist() == pytest.approx([-0.406 / 0.225, 0.594 / 0.225, -0.206 / 0.225], abs=1e-6)
    clip = transforms.normalise(images, "clip")
    assert clip[0, 1, 0, 1].item() == pytest.approx((1 - 0.4578275) / 0.26130258, abs=1e-6)


def test_renormalise_equals_the_other_normalisation_and_is_its_own_inverse():
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).to(torch.uint8)
    ours, clip = transforms.normalise(images), transforms.normalise(images, "clip")
    torch.testing.assert_close(transforms.renormalise(ours, "imagenet", "clip"), clip, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(transforms.renormalise(clip, "clip", "imagenet"), ours, atol=1e-6, rtol=1e-6)
    assert transforms.renormalise(ours, "imagenet", "imagenet") is ours


# Scenes.


def sentinel_scene(height: int, width: int, block: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image and its labels: labels in blocks, and 10 times the label plus 5 in every channel of the image."""
    rows, columns = torch.arange(height)[:, None] // block, torch.arange(width) // block
    labels = ((rows * 7 + columns * 3) % 23).to(torch.uint8)
    return (labels * 10 + 5).expand(3, -1, -1).clone(), labels


def crop_scene(image, labels, seed: int, **changes):
    seeding.seed_globals(seed, "scene")
    options = dict(crop_size=24, resize=[192, 48], ratio=[1.0, 1.0], max_share=0.75, photometric=False)
    return scenes.scene_crop(image, labels, **(options | changes))


def test_image_and_labels_move_together():
    image, labels = sentinel_scene(48, 64)
    flips, positions = 0, set()
    for seed in range(60):
        cut, cut_labels = crop_scene(image, labels, seed)
        assert cut.shape == (3, 24, 24) and cut_labels.shape == (24, 24)
        assert torch.equal(cut, (cut_labels * 10 + 5).expand(3, -1, -1))
        candidates = itertools.product(range(25), range(41), (0, 1))
        top, left, flip = next(
            (y, x, f) for y, x, f in candidates if torch.equal(flipped(labels[y : y + 24, x : x + 24], f), cut_labels)
        )
        flips += flip
        positions.add((top, left))
    assert 15 <= flips <= 45
    assert len(positions) > 40


def flipped(labels: torch.Tensor, flip: int) -> torch.Tensor:
    return labels.flip(-1) if flip else labels


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.7, 2.0])
def test_image_and_labels_are_scaled_together(ratio):
    """Away from the edges between labels, where the image is blended, the image has the value of its label."""
    image, labels = sentinel_scene(48, 64, block=16)
    cut, cut_labels = crop_scene(image, labels, 3, ratio=[ratio, ratio])
    around = cut_labels.float().view(1, 1, 24, 24)
    highest, lowest = (sign * torch.nn.functional.max_pool2d(sign * around, 5, 1, 2)[0, 0] for sign in (1, -1))
    inside = highest == lowest
    assert inside.float().mean() > 0.1
    assert torch.equal(cut[:, inside], (cut_labels[inside] * 10 + 5).expand(3, -1))


def test_a_small_scene_is_padded_below_and_to_the_right():
    image, labels = sentinel_scene(48, 64)
    cut, cut_labels = crop_scene(image, labels, 0, crop_size=80, max_share=1.0)
    assert (cut_labels[:48, :64] < 23).all()
    assert (cut_labels[48:] == 255).all() and (cut_labels[:, 64:] == 255).all()
    assert (cut[:, 48:] == 0).all() and (cut[:, :, 64:] == 0).all()
    assert torch.equal(cut[:, :48, :64], (cut_labels[:48, :64] * 10 + 5).expand(3, -1, -1))


def largest_share(labels: torch.Tensor) -> float:
    counts = labels[labels != 255].bincount()
    return (counts.max() / counts.sum()).item()


def test_no_class_fills_more_than_its_share_where_possible():
    """A third of the scene is class 0, the rest classes 1 and 2 and ignored: a quarter of the windows hold class 0 alone.
    They are drawn only without the limit."""
    labels = torch.zeros(48, 120, dtype=torch.uint8)
    labels[:, 40:] = torch.where(torch.arange(80) // 4 % 2 == 0, 1, 255).to(torch.uint8)
    labels[:, 40::3] = 2
    image = labels.expand(3, -1, -1).clone()
    limited = [largest_share(crop_scene(image, labels, seed, max_share=0.75)[1]) for seed in range(60)]
    free = [largest_share(crop_scene(image, labels, seed, max_share=1.1)[1]) for seed in range(60)]
    assert max(limited) < 0.75 < max(free)


def test_ignored_pixels_count_for_no_class():
    """Label 255 fills nine tenths, and no class has more than half of the labelled pixels."""
    labels = torch.full((48, 48), 255, dtype=torch.uint8)
    labels[:, ::20], labels[:, 1::20] = 3, 4
    _, cut = crop_scene(labels.expand(3, -1, -1).clone(), labels, 0, crop_size=48)
    assert sorted(cut.unique().tolist()) == [3, 4, 255] and largest_share(cut) == 0.5


def test_a_scene_of_one_class_still_gives_a_crop():
    labels = torch.full((48, 48), 7, dtype=torch.uint8)
    cut, cut_labels = crop_scene(labels.expand(3, -1, -1).clone(), labels, 0)
    assert (cut_labels == 7).all() and (cut == 7).all()


@pytest.mark.parametrize("size, resize, ratio, expected", [
    ((375, 500), [2048, 512], 1.0, (512, 683)),  # 512 / 375 = 1.3653; 682.67 rounds to 683
    ((100, 1000), [2048, 512], 1.0, (205, 2048)),  # the long side binds: 2.048
    ((375, 500), [2048, 512], 0.5, (256, 341)),  # 256 / 375 x 500 = 341.3
    ((48, 48), [192, 48], 1.0, (48, 48)),
    ((48, 64), [48, 192], 1.5, (72, 96)),
])  # fmt: skip
def test_the_rescale_rule_by_hand(size, resize, ratio, expected):
    image, labels = scenes.resize_scene(
        torch.zeros(3, *size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8), resize, ratio
    )
    assert image.shape[1:] == labels.shape == expected
    assert scenes.resize_scene(torch.zeros(3, *size, dtype=torch.uint8), None, resize, ratio)[1] is None


def test_colour_changes_the_image_and_never_the_labels():
    image, labels = sentinel_scene(48, 64)
    plain, coloured = (crop_scene(image, labels, 5, photometric=p) for p in (False, True))
    assert torch.equal(plain[1], coloured[1])
    changed = [
        not torch.equal(crop_scene(image, labels, s)[0], crop_scene(image, labels, s, photometric=True)[0]) for s in range(20)
    ]
    assert sum(changed) >= 15


# Decoding.


def file(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def sixteen_bit_png(channels: int) -> bytes:
    """Write a 16-bit PNG with the small picture in the high bytes; PIL itself writes none in colour."""
    pixels = np.asarray(SMALL)[..., :channels].astype(np.uint16) << 8
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", 48, 40, 16, {1: 0, 3: 2}[channels], 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


SMALL = picture(48, 40)
FILES = {
    "rgb jpeg": file(SMALL, "JPEG", quality=95),
    "progressive jpeg": file(SMALL, "JPEG", progressive=True),
    "subsampled jpeg": file(SMALL, "JPEG", subsampling=2),
    "grey jpeg": file(SMALL.convert("L"), "JPEG"),
    "cmyk jpeg": file(SMALL.convert("CMYK"), "JPEG"),
    "jpeg with an orientation": file(
        SMALL, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    ),
    "rgb png": file(SMALL, "PNG"),
    "grey png": file(SMALL.convert("L"), "PNG"),
    "palette png": file(SMALL.convert("P", palette=Image.ADAPTIVE), "PNG"),
    "rgba png": file(SMALL.convert("RGBA"), "PNG"),
    "see-through png": file(Image.merge("RGBA", (*SMALL.split(), SMALL.convert("L"))), "PNG"),
    "grey and alpha png": file(SMALL.convert("LA"), "PNG"),
    "one-bit png": file(SMALL.convert("1"), "PNG"),
    "palette png with transparency": file(SMALL.convert("P", palette=Image.ADAPTIVE), "PNG", transparency=3),
    "webp": file(SMALL, "WEBP", quality=90),
    "bmp": file(SMALL, "BMP"),
    "gif": file(SMALL.convert("P", palette=Image.ADAPTIVE), "GIF"),
    "animated gif": file(
        SMALL.convert("P", palette=Image.ADAPTIVE), "GIF", save_all=True, append_images=[picture(48, 40, 1).convert("P")]
    ),
    "animated webp": file(SMALL, "WEBP", save_all=True, append_images=[picture(48, 40, 1)], quality=90),
    "sixteen-bit colour png": sixteen_bit_png(3),
}


@pytest.mark.parametrize("name", FILES)
def test_decoding_is_pil_s(name):
    decoded = transforms.decode(FILES[name], name)
    with Image.open(io.BytesIO(FILES[name])) as image:
        theirs = image.convert("RGB")
    assert decoded.dtype == torch.uint8 and decoded.shape[0] == 3
    assert grey_levels(decoded, theirs) <= 4


def test_sixteen_bits_of_grey_keep_their_high_byte():
    """PIL would clip them to white."""
    assert transforms.decode(sixteen_bit_png(1))[2].tolist() == np.asarray(SMALL)[..., 0].tolist()


@pytest.mark.parametrize(
    "data", [b"", b"a note", FILES["rgb jpeg"][:50], FILES["rgb png"][:60]], ids=["empty", "text", "cut jpeg", "cut png"]
)
def test_an_unreadable_image_is_named(data):
    with pytest.raises(UserError, match="n01/x.JPEG is no readable image"):
        transforms.decode(data, "n01/x.JPEG")


def test_annotations_keep_their_values():
    values = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    for mode in ("L", "P"):
        image = Image.fromarray(values)
        if mode == "P":
            image = Image.fromarray(values, "L").copy()
            image.putpalette([255 - i // 3 for i in range(768)])
        assert transforms.decode_annotation(file(image, "PNG")).tolist() == values.tolist()


@pytest.mark.parametrize("data", [b"", b"x", file(SMALL, "PNG")], ids=["empty", "text", "three channels"])
def test_a_wrong_annotation_is_named(data):
    with pytest.raises(UserError, match="scene 7: its annotation is no readable label image"):
        transforms.decode_annotation(data, "scene 7")


# Augmentation of fine-tuning.


def test_random_erasing_takes_a_share_of_the_images():
    torch.manual_seed(0)
    import random

    random.seed(0)
    images = torch.full((400, 3, 16, 16), 9.0)
    erased = (augmentation.random_erasing(images.clone(), 0.25) != 9).any(dim=3).any(dim=2).any(dim=1)
    assert erased.float().mean().item() == pytest.approx(0.25, abs=0.1)
    assert torch.equal(augmentation.random_erasing(images.clone(), 0.0), images)


def test_rand_augment_draws_from_the_keyed_generators():
    augment = augmentation.FinetuneAugment("rand-m9-mstd0.5-inc1", 48)
    image = tensor(SMALL)
    augmented = []
    for key in (1, 1, 2, 3, 4):
        seeding.seed_globals(0, "augment", key)
        augmented.append(augment(image))
    assert torch.equal(augmented[0], augmented[1])
    assert any(not torch.equal(augmented[0], other) for other in augmented[2:])
    assert augmentation.FinetuneAugment(None, 48)(image) is image


def test_a_sliver_of_a_scene_keeps_a_pixel():
    image, labels = torch.zeros(3, 2, 3000, dtype=torch.uint8), torch.zeros(2, 3000, dtype=torch.uint8)
    resized, annotation = scenes.resize_scene(image, labels, [192, 48], 1.0)
    assert resized.shape == (3, 1, 192) and annotation.shape == (1, 192)
