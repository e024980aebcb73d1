"""Records as training and evaluation samples: torch data sets whose every draw is keyed by (epoch, index)."""

import torch
from torch.utils.data import Dataset

from milan.data import seeding, transforms
from milan.data.records import Records


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
        box = self.draw(*image.shape[1:], self.scale, seeding.generator(self.seed, "crop", epoch, index))
        image = transforms.crop(image, box, self.size)
        if self.augment is not None:
            seeding.seed_globals(self.seed, "augment", epoch, index)
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


def balanced_subset(labels: list[int], share: float, seed: int) -> list[int] | None:
    """Indices of a share of the images, the same number (at least one) of every class; None for all of them."""
    if share >= 1:
        return None
    by_class: dict[int, list[int]] = {}
    for index in seeding.permutation(len(labels), seed, "subset").tolist():
        by_class.setdefault(labels[index], []).append(index)
    return sorted(i for members in by_class.values() for i in members[: max(1, round(share * len(members)))])
