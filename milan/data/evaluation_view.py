"""The evaluation view: resize the short side, crop the centre; of images, and of the outlines of their objects."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from milan.data import transforms
from milan.data.records import Records


class CentreSamples(Dataset):
    """Records in the evaluation view: item index -> {"image": uint8 (3, size, size), "index": int64[, "label": int64]}.

    resize: the short side before the central crop, in pixels; size: the side of the crop."""

    def __init__(self, records: Records, resize: int, size: int):
        self.records, self.resize, self.size = records, resize, size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        record = self.records[index]
        image = transforms.centre(transforms.decode(record["image"], record["name"]), self.resize, self.size)
        label = {"label": torch.tensor(record["label"])} if "label" in record else {}
        return {"image": image, **label, "index": torch.tensor(index)}


def object_cover(mask: bytes, resize: int, size: int, grid: int) -> Tensor:
    """Return the share of each patch (grid * grid,) that lies on the object of an encoded mask, 255 = object, cut out as its
    image is."""
    on_object = transforms.centre(transforms.decode_annotation(mask).unsqueeze(0), resize, size) > 127
    return nn.functional.adaptive_avg_pool2d(on_object.float(), grid).flatten()
