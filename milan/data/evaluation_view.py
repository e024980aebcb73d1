"""The evaluation view: resize the short side, crop the centre."""

import torch
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
