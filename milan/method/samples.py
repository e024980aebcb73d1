"""The samples of pretraining, and the views of which the target bank is made."""

import torch
from torch.utils.data import Dataset

from milan.data import seeding, transforms
from milan.data.records import Records
from milan.method import masking
from milan.method.target_bank import Bank, view_box


class PretrainSamples(Dataset):
    """One crop of one image with the noise of its mask, and its targets where there is a bank.

    Item (epoch, index) is {"image": uint8 (3, S, S), "noise": float32 (N,) Gumbel} and, with a bank, "features" float16
    (1+N, D) and "importance" float32 (N,). All draws follow from (seed, epoch, index). crop_scale: smallest and largest share
    of the image's area, without a bank."""

    def __init__(self, records: Records, seed: int, image_size: int, n_patches: int, crop_scale: list[float], bank: Bank | None):
        self.records, self.seed, self.size, self.n_patches = records, seed, image_size, n_patches
        self.scale, self.bank = crop_scale, bank

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        record = self.records[index]
        image = transforms.decode(record["image"], record["name"])
        sample = {"noise": masking.gumbel(self.seed, epoch, index, self.n_patches)}
        if self.bank is None:
            box = transforms.draw_crop(*image.shape[1:], self.scale, seeding.generator(self.seed, "crop", epoch, index))
        else:
            box, sample["features"], sample["importance"] = self.bank[epoch % self.bank.views, index]
        return {**sample, "image": transforms.crop(image, box, self.size)}


class BankViews(Dataset):
    """The V views of the images in `span`, image by image: view v of the k-th image is item k V + v.

    An item is {"image": uint8 (3, S, S), "box": int32 (5,) top, left, height, width, flip}."""

    def __init__(self, records: Records, span: range, views: int, seed: int, size: int, crop_scale: list[float]):
        self.records, self.span, self.views, self.seed, self.size, self.scale = records, span, views, seed, size, crop_scale

    def __len__(self) -> int:
        return len(self.span) * self.views

    def __getitem__(self, item: int) -> dict:
        position, view = divmod(item, self.views)
        index = self.span[position]
        record = self.records[index]
        image = transforms.decode(record["image"], record["name"])
        box = view_box(self.seed, view, index, *image.shape[1:], self.scale)
        return {"image": transforms.crop(image, box, self.size), "box": torch.tensor(box, dtype=torch.int32)}
