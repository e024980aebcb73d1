"""Watch an encoder while it is pretrained: nearest neighbours and RankMe on a small fixed set of images."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from milan.data import seeding, transforms
from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records
from milan.evaluation import scores
from milan.evaluation.inference import gather_rows, rank_batches
from milan.method.encoder import Encoder
from milan.params import Params
from milan.training.device import autocast

IMAGES = {"train": 4000, "val": 1000}  # at most, of each split


class Monitor:
    """monitor() is {"rankme": of the class tokens of training images, "knn_top1": in %, of validation images by the votes of
    these training images}; without labels, RankMe alone.

    The images are the same in every run on these records. Each is resized to model.image_size and cropped at its centre."""

    def __init__(self, encoder: Encoder, folder: Path, params: Params, device: torch.device):
        """folder: of the records."""
        self.encoder, self.params, self.device = encoder, params, device
        records = {split: Records(folder, split) for split in IMAGES}
        chosen = {split: fixed_indices(records[split]) for split in IMAGES}
        size = params.model.image_size
        self.samples = {split: Subset(CentreSamples(records[split], size, size), chosen[split]) for split in IMAGES}
        self.labels = {}
        if records["train"].manifest["classes"]:
            columns = {split: torch.tensor(records[split].column("label")) for split in IMAGES}
            self.labels = {split: column[chosen[split]] for split, column in columns.items()}

    def __call__(self) -> dict[str, float]:
        train = self.class_tokens(self.samples["train"])
        values = {"rankme": scores.rankme(train)}
        if self.labels:
            val = self.class_tokens(self.samples["val"])
            values["knn_top1"] = scores.knn_top1(train, self.labels["train"], val, self.labels["val"], self.device)
        return values

    @torch.inference_mode()
    def class_tokens(self, samples: Dataset) -> Tensor:
        """Return the class tokens (n, D) of all samples, float32 on the CPU, on every rank."""
        batches = rank_batches(samples, self.params.pretrain.micro_batch, self.device, None, self.params.runtime.workers)
        with autocast(self.params.compute.precision, self.device):
            own = [self.encoder(transforms.normalise(batch["image"]))[:, 0].float().cpu() for batch in batches]
        return gather_rows(own, len(samples))


def fixed_indices(records: Records) -> list[int]:
    """Return the indices of the images in use of a split."""
    return sorted(seeding.permutation(len(records), 0, f"monitor {records.split}")[: IMAGES[records.split]].tolist())
