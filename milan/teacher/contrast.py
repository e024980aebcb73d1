"""Train the built-in teacher: samples, loss and parameter groups for CLIP on captioned images, with open_clip's loss."""

from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.utils.data import Dataset

from milan.data import seeding, transforms
from milan.data.records import Records
from milan.teacher.clip import Tokenizer
from milan.training import distributed


class Captioned(Dataset):
    """Captioned images: item (epoch, index) -> {"image": uint8 (3, S, S), "tokens": (context,) int64}, one random crop and its
    caption."""

    def __init__(self, records: Records, tokenizer: Tokenizer, seed: int, size: int, crop_scale: list[float]):
        self.records, self.seed, self.size, self.scale = records, seed, size, crop_scale
        self.tokens = tokenizer(records.column("caption"))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        record = self.records[index]
        image = transforms.decode(record["image"], record["name"])
        box = transforms.draw_crop(*image.shape[1:], self.scale, seeding.generator(self.seed, "crop", epoch, index))
        return {"image": transforms.crop(image, box, self.size), "tokens": self.tokens[index]}


class Contrast(nn.Module):
    """The symmetric contrastive loss over the global batch, gathered from all processes."""

    def __init__(self, model: CLIP):
        super().__init__()
        self.model = model
        self.loss = ClipLoss(gather_with_grad=True, rank=distributed.rank(), world_size=distributed.world_size())

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return the loss, a scalar. images: (B, 3, S, S) normalised; tokens: (B, context)."""
        image_features, text_features, scale = self.model(images, tokens)
        return self.loss(image_features.float(), text_features.float(), scale)


def decay_groups(model: CLIP, weight_decay: float) -> list[dict]:
    """Return the optimizer's parameter groups. As in open_clip, one-dimensional parameters and the logit scale do not decay."""
    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        (undecayed if parameter.ndim < 2 or "logit_scale" in name else decayed).append(parameter)
    return [{"params": undecayed, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
