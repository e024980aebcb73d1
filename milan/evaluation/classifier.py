"""The fine-tuned classifier: a ViT with a head, its files, and the loss it is trained on."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from milan.core.files import read_json, write_json
from milan.core.typed import build, choice
from milan.method.encoder import build_vit
from milan.params import Finetune, Model
from milan.training.weights import OTHER_MODEL, load_state, load_weights, save_weights

POOLS = {"mean": "avg", "cls": "token"}


def build_classifier(model: Model, finetune: Finetune, classes: int, encoder: dict[str, Tensor]) -> VisionTransformer:
    """timm's ViT on the pretrained encoder, all of it trainable, positions included. With mean pooling a new norm
    follows the pool and the encoder's final one is not used (models_vit.py, global_pool). Head N(0, 0.02)."""
    vit = build_vit(model, num_classes=classes, global_pool=POOLS[finetune.pooling], drop_path_rate=finetune.drop_path)
    unused = ("norm.",) if finetune.pooling == "mean" else ()
    load_state(vit, encoder, "The encoder", OTHER_MODEL, new=("head.", "fc_norm."), unused=unused)
    nn.init.trunc_normal_(vit.head.weight, std=0.02)
    nn.init.zeros_(vit.head.bias)
    return vit


@dataclass(frozen=True)
class About:
    """classifier.json: what else it takes to use the weights beside it."""

    model: Model
    pooling: str = choice(*POOLS)
    resize: int  # the short side of an image, before the central crop
    classes: list[str]


def save_classifier(folder: Path, vit: VisionTransformer, about: About) -> None:
    save_weights(folder / "classifier.safetensors", vit.state_dict(), classes=len(about.classes))
    write_json(folder / "classifier.json", dataclasses.asdict(about))


def load_classifier(folder: Path) -> tuple[VisionTransformer, About]:
    """What save_classifier wrote. Raises UserError when it is missing or damaged."""
    path = folder / "classifier.json"
    about = build(About, read_json(path, model=dict), str(path))
    vit = build_vit(about.model, num_classes=len(about.classes), global_pool=POOLS[about.pooling])
    path = folder / "classifier.safetensors"
    load_state(vit, load_weights(path), path, "classifier.json beside it tells of another model: export the classifier again.")
    return vit, about


class FinetuneLoss(nn.Module):
    """Cross entropy under mixup, cutmix and label smoothing (timm's)."""

    def __init__(self, vit: VisionTransformer, finetune: Finetune, classes: int):
        super().__init__()
        self.vit, self.smoothing = vit, finetune.label_smoothing
        mixes = finetune.mixup > 0 or finetune.cutmix > 0
        self.mixup = (
            Mixup(
                finetune.mixup,
                finetune.cutmix,
                prob=1.0,
                switch_prob=0.5,
                mode="batch",
                label_smoothing=self.smoothing,
                num_classes=classes,
            )
            if mixes
            else None
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """images (B, 3, S, S) normalised, labels (B,) -> scalar. Under mixup B must be even."""
        if self.mixup is None:
            return nn.functional.cross_entropy(self.vit(images).float(), labels, label_smoothing=self.smoothing)
        with torch.autocast(images.device.type, enabled=False):
            images, targets = self.mixup(images, labels)
        return SoftTargetCrossEntropy()(self.vit(images).float(), targets)
