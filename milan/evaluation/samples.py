"""Training samples of labelled images: torch data sets whose random draws depend on (seed, epoch, index) alone."""

from collections import Counter

import torch
from torch.utils.data import Dataset

from milan.core.errors import UserError, listed
from milan.data import seeding, transforms
from milan.data.records import Records
from milan.data.shares import images_of_share


class LabelledSamples(Dataset):
    """Augmented labelled images: item (epoch, index) is {"image": uint8 (3, size, size), "label"}.

    scale: smallest and largest share of the image's area in a crop; draw_crop: transforms.draw_crop or
    augmentation.draw_simple_crop; augment: image -> image, drawing from the global generators; subset: indices of the
    records in use (None: all)."""

    def __init__(self, records: Records, seed: int, size: int, scale: list[float], draw_crop, augment=None, subset=None):
        self.records, self.seed, self.size, self.scale = records, seed, size, scale
        self.draw_crop, self.augment, self.subset = draw_crop, augment, subset

    def __len__(self) -> int:
        return len(self.records) if self.subset is None else len(self.subset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, position = key
        index = position if self.subset is None else self.subset[position]
        record = self.records[index]
        image = transforms.decode(record["image"], record["name"])
        box = self.draw_crop(*image.shape[1:], self.scale, seeding.generator(self.seed, "crop", epoch, index))
        image = transforms.crop(image, box, self.size)
        if self.augment is not None:
            seeding.seed_globals(self.seed, "augment", epoch, index)
            image = self.augment(image)
        return {"image": image, "label": torch.tensor(record["label"])}


class EpochView(Dataset):
    """One epoch of a data set keyed by (epoch, index): item index is samples[epoch, index]."""

    def __init__(self, samples: Dataset, epoch: int):
        self.samples, self.epoch = samples, epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return self.samples[self.epoch, index]


def balanced_subset(labels: list[int], share: float, seed: int) -> list[int] | None:
    """Draw the indices of a share of every class, at least one image each; None (all images) for a share of 1 or more."""
    if share >= 1:
        return None
    by_class: dict[int, list[int]] = {}
    for index in seeding.permutation(len(labels), seed, "subset").tolist():
        by_class.setdefault(labels[index], []).append(index)
    return sorted(index for members in by_class.values() for index in members[: images_of_share(len(members), share)])


def refuse_few_labels(key: str, labels: list[int], classes: list[str], share: float, batch_size: int) -> None:
    """Raise UserError where a share of every class's labels, below 1, is no image of a class, or fewer than a batch in all.

    key: of the share in the recipe; classes: names by label."""
    of_classes = Counter(labels)
    without = [f"{classes[label]} ({count})" for label, count in sorted(of_classes.items()) if round(share * count) < 1]
    if without:
        raise UserError(
            f"{key} {share} is less than one image of {len(without)} of {len(of_classes)} classes (training images): "
            f"{listed(without)}. Take a larger share."
        )
    drawn = sum(images_of_share(count, share) for count in of_classes.values())
    if drawn < batch_size:
        section = key.split(".")[0]
        raise UserError(
            f"{key} {share} leaves {drawn} of {len(labels)} training images, fewer than {section}.batch_size {batch_size}. Take a "
            "larger share or a smaller batch_size and micro_batch."
        )
