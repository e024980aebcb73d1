"""The fine-tuned classifier: a ViT with a head, its files and its loss."""

import dataclasses
from pathlib import Path

import torch
from pydantic.dataclasses import dataclass
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from milan.core.files import read_json, write_json
from milan.core.validation import Section, Text, validate
from milan.method.encoder import build_vit
from milan.params import Few, Finetune, Model, Pooling
from milan.training.weights import OTHER_MODEL, load_state, load_weights, save_weights

TIMM_POOLING = {"mean": "avg", "cls": "token"}


def build_classifier(model: Model, finetune: Finetune, classes: int, encoder: dict[str, Tensor]) -> VisionTransformer:
    """Build timm's ViT from pretrained encoder weights; every parameter is trained, the position embedding included.

    With mean pooling a new norm follows the pool, and the encoder's final norm is not used (global_pool in MAE's
    models_vit.py). The head's weights start as N(0, 0.02). Raises UserError when the weights do not fit the model."""
    vit = build_vit(model, num_classes=classes, global_pool=TIMM_POOLING[finetune.pooling], drop_path_rate=finetune.drop_path)
    unused = ("norm.",) if finetune.pooling == "mean" else ()
    load_state(vit, encoder, "The encoder", OTHER_MODEL, new=("head.", "fc_norm."), unused=unused)
    nn.init.trunc_normal_(vit.head.weight, std=0.02)
    nn.init.zeros_(vit.head.bias)
    return vit


@dataclass(frozen=True)
class ClassifierInfo(Section):
    """Content of classifier.json: everything needed to use the weights in classifier.safetensors."""

    model: Model
    pooling: Pooling
    resize: Few  # short side of an image in pixels, before the central crop
    classes: list[Text]


def save_classifier(folder: Path, vit: VisionTransformer, info: ClassifierInfo) -> None:
    """Write classifier.safetensors and classifier.json into a folder."""
    save_weights(folder / "classifier.safetensors", vit.state_dict(), classes=len(info.classes))
    write_json(folder / "classifier.json", dataclasses.asdict(info))


def load_classifier(folder: Path) -> tuple[VisionTransformer, ClassifierInfo]:
    """Load what save_classifier wrote. Raises UserError when a file is missing or damaged."""
    path = folder / "classifier.json"
    info = validate(ClassifierInfo, read_json(path, model=dict), str(path))
    vit = build_vit(info.model, num_classes=len(info.classes), global_pool=TIMM_POOLING[info.pooling])
    path = folder / "classifier.safetensors"
    load_state(vit, load_weights(path), path, "classifier.json beside it describes another model: export the classifier again.")
    return vit, info


class FinetuneLoss(nn.Module):
    """Cross entropy with timm's mixup, cutmix and label smoothing."""

    def __init__(self, vit: VisionTransformer, finetune: Finetune, classes: int):
        super().__init__()
        self.vit, self.smoothing = vit, finetune.label_smoothing
        options = {"prob": 1.0, "switch_prob": 0.5, "mode": "batch", "label_smoothing": self.smoothing, "num_classes": classes}
        mixes = finetune.mixup > 0 or finetune.cutmix > 0
        self.mixup = Mixup(finetune.mixup, finetune.cutmix, **options) if mixes else None

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of normalised images (B, 3, S, S) and labels (B,). With mixup or cutmix, B must be even."""
        if self.mixup is None:
            return nn.functional.cross_entropy(self.vit(images).float(), labels, label_smoothing=self.smoothing)
        images, targets = self.mix(images, labels)
        return SoftTargetCrossEntropy()(self.vit(images).float(), targets)

    @torch.compiler.disable  # compiled, every new mixing ratio would be compiled anew
    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and soft targets (B, classes)."""
        with torch.autocast(images.device.type, enabled=False):
            return self.mixup(images, labels)
