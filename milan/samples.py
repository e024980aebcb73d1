"""Records as training and evaluation samples: torch data sets whose every draw is keyed by (epoch, index)."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from milan import masking, rng, transforms
from milan.miou import reduce_zero_label
from milan.records import Records
from milan.targets import Bank, view_box


class PretrainSamples(Dataset):
    """One crop of one image with its mask noise, and its banked targets where there is a bank.

    item (epoch, index) -> {"image": uint8 (3, S, S), "noise": (N,) Gumbel[, "features", "importance"]}"""

    def __init__(self, records: Records, seed: int, image_size: int, n_patches: int, crop_scale: list[float], bank: Bank | None):
        self.records, self.seed, self.size, self.n_patches, self.scale, self.bank = (
            records,
            seed,
            image_size,
            n_patches,
            crop_scale,
            bank,
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        record = self.records[index]
        image = transforms.decode(record["image"], record["name"])
        sample = {"noise": masking.gumbel(self.seed, epoch, index, self.n_patches)}
        if self.bank is None:
            box = transforms.draw_crop(*image.shape[1:], self.scale, rng.generator(self.seed, "crop", epoch, index))
        else:
            box, sample["features"], sample["importance"] = self.bank[epoch % self.bank.views, index]
        return {**sample, "image": transforms.crop(image, box, self.size)}


class BankViews(Dataset):
    """The views of a range of images: item k -> {"image": uint8 (3, S, S), "box": (5,) int32}; views of an image are
    neighbours (item = (index - start) * V + view)."""

    def __init__(self, records: Records, span: range, views: int, seed: int, size: int, crop_scale: list[float]):
        self.records, self.span, self.views, self.seed, self.size, self.scale = records, span, views, seed, size, crop_scale

    def __len__(self) -> int:
        return len(self.span) * self.views

    def __getitem__(self, item: int) -> dict:
        place, view = divmod(item, self.views)
        index = self.span[place]
        record = self.records[index]
        image = transforms.decode(record["image"], record["name"])
        box = view_box(self.seed, view, index, *image.shape[1:], self.scale)
        return {"image": transforms.crop(image, box, self.size), "box": torch.tensor(box, dtype=torch.int32)}


class LabelledSamples(Dataset):
    """One augmented training view of one labelled image: item (epoch, index) -> {"image", "label"}.

    draw: transforms.draw_crop or draw_simple_crop; augment: image -> image, drawing from the global generators.
    `subset` lists the record indices in use (None: all)."""

    def __init__(self, records: Records, seed: int, size: int, scale: list[float], draw, augment=None, subset=None):
        self.records, self.seed, self.size, self.scale = records, seed, size, scale
        self.draw, self.augment, self.subset = draw, augment, subset

    def __len__(self) -> int:
        return len(self.records) if self.subset is None else len(self.subset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, position = key
        index = position if self.subset is None else self.subset[position]
        record = self.records[index]
        image = transforms.decode(record["image"], record["name"])
        box = self.draw(*image.shape[1:], self.scale, rng.generator(self.seed, "crop", epoch, index))
        image = transforms.crop(image, box, self.size)
        if self.augment is not None:
            rng.seed_globals(self.seed, "augment", epoch, index)
            image = self.augment(image)
        return {"image": image, "label": torch.tensor(record["label"])}


class OneView(Dataset):
    """The training views of one epoch as a plain data set: item index -> what `samples` gives for (epoch, index)."""

    def __init__(self, samples: Dataset, epoch: int):
        self.samples, self.epoch = samples, epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[self.epoch, index]


class CentreSamples(Dataset):
    """The evaluation view: item index -> {"image", "index"[, "label"]}."""

    def __init__(self, records: Records, resize: int, size: int):
        self.records, self.resize, self.size = records, resize, size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        image = transforms.centre(transforms.decode(record["image"], record["name"]), self.resize, self.size)
        label = {"label": torch.tensor(record["label"])} if "label" in record else {}
        return {"image": image, **label, "index": torch.tensor(index)}


class SceneSamples(Dataset):
    """One training view of one scene: item (epoch, index) -> {"image" uint8 (3, C, C), "label" uint8 (C, C)}."""

    def __init__(self, records: Records, seed: int, classes: int, **crop):
        """crop: the keyword arguments of transforms.scene_crop."""
        self.records, self.seed, self.classes, self.crop = records, seed, classes, crop

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        image, labels = scene(self.records[index], self.classes)
        rng.seed_globals(self.seed, "scene", epoch, index)
        image, labels = transforms.scene_crop(image, labels, **self.crop)
        return {"image": image, "label": labels}


def scene(record: dict, classes: int) -> tuple[Tensor, Tensor]:
    """uint8 (3, H, W) image and uint8 (H, W) labels 0..classes-1, 255 ignored, of one scene record."""
    image = transforms.decode(record["image"], record["name"])
    return image, reduce_zero_label(transforms.decode_annotation(record["mask"], record["name"]), classes)


def balanced_subset(labels: list[int], share: float, seed: int) -> list[int] | None:
    """Indices of a share of the images, the same number (at least one) of every class; None for all of them."""
    if share >= 1:
        return None
    by_class: dict[int, list[int]] = {}
    for index in rng.permutation(len(labels), seed, "subset").tolist():
        by_class.setdefault(labels[index], []).append(index)
    return sorted(i for members in by_class.values() for i in members[: max(1, round(share * len(members)))])
