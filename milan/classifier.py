"""The fine-tuned classifier: a ViT with a head, its files, and the loss it is trained on."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from milan.checkpoint import load_weights, save_weights
from milan.encoder import build_vit
from milan.errors import UserError
from milan.files import read_json, write_json
from milan.params import Finetune, Model
from milan.typed import build, choice

POOLS = {"mean": "avg", "cls": "token"}


def build_classifier(model: Model, finetune: Finetune, classes: int, encoder: dict[str, Tensor]) -> VisionTransformer:
    """timm's ViT on the pretrained encoder, all of it trainable, positions included. With mean pooling a new norm
    follows the pool and the encoder's final one is not used (models_vit.py, global_pool). Head N(0, 0.02)."""
    vit = build_vit(model, num_classes=classes, global_pool=POOLS[finetune.pooling], drop_path_rate=finetune.drop_path)
    fresh = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    wanted = {name: tensor.shape for name, tensor in vit.state_dict().items() if name not in fresh}
    if wrong := sorted(name for name, shape in wanted.items() if name not in encoder or encoder[name].shape != shape):
        words = "Was it made with another model section of params.yaml?"
        raise UserError(f"The encoder lacks, or has of another shape: {', '.join(wrong)}. {words}")
    vit.load_state_dict({name: tensor for name, tensor in encoder.items() if name in wanted}, strict=False)
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


def save_classifier(folder: Path, vit: VisionTransformer, about: About, fingerprint: str) -> None:
    save_weights(folder / "classifier.safetensors", vit.state_dict(), fingerprint=fingerprint, classes=len(about.classes))
    write_json(folder / "classifier.json", dataclasses.asdict(about))


def load_classifier(folder: Path) -> tuple[VisionTransformer, About]:
    """What save_classifier wrote. Raises UserError when it is missing or damaged."""
    path = folder / "classifier.json"
    about = build(About, read_json(path, model=dict), str(path))
    vit = build_vit(about.model, num_classes=len(about.classes), global_pool=POOLS[about.pooling])
    weights = load_weights(folder / "classifier.safetensors")
    try:
        vit.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder}: weights and classifier.json do not fit each other ({error}).") from None
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
        images, targets = self.mixed(images, labels)
        return SoftTargetCrossEntropy()(self.vit(images).float(), targets)

    @torch.compiler.disable  # compiled, every new share of the two images would be a new program
    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            return self.mixup(images, labels)
