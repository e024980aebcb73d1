"""Build and load any frozen teacher, and compute its targets for the student's images."""

from pathlib import Path

import timm
import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from milan.data import transforms
from milan.params import Compute, TinyClip
from milan.teacher.clip import NO_TEXT, OTHER_TEACHER, build_tiny, explain_misfits, read_config
from milan.teacher.towers import ClipTower, TimmTower, Tower
from milan.training.device import autocast
from milan.training.weights import load_state, load_weights


def build_tower(config: dict) -> Tower:
    """Build the tower that a teacher.json describes, without its weights. Raises UserError when MILAN cannot use it."""
    if config["kind"] == "timm":
        return TimmTower(timm.create_model(config["model"], num_classes=0))
    if config["kind"] == "open_clip":
        return ClipTower(build_visual(**config["model"]))
    sizes = (config["image_size"], config["patch_size"], len(config["token_ids"]))
    return ClipTower(build_tiny(TinyClip(**config["tiny"]), *sizes).visual)


def build_visual(embed_dim: int, vision_cfg: dict, quick_gelu: bool = False) -> nn.Module:
    """Build the image tower of one of open_clip's model configurations."""
    return CLIP(embed_dim, vision_cfg, NO_TEXT, quick_gelu).visual


def load_tower(folder: Path, compute: Compute, device: torch.device) -> Tower:
    """Load the image tower that the teacher stage wrote, frozen, onto a device in the recipe's precision.

    Raises UserError when the folder holds no teacher or the weights do not fit teacher.json."""
    config, weights = read_config(folder), load_weights(Path(folder) / "teacher.safetensors")
    with explain_misfits(folder):
        tower = build_tower(config)
    image_tower = {name: tensor for name, tensor in weights.items() if name.startswith("visual.")}
    load_state(tower, image_tower, folder / "teacher.safetensors", OTHER_TEACHER)
    return tower.eval().requires_grad_(False).to(device).lowered(compute.precision)


@torch.inference_mode()
def compute_targets(tower: Tower, images: Tensor, compute: Compute, normalisation: str, grid: int) -> tuple[Tensor, Tensor]:
    """Return the teacher's features (B, 1 + grid**2, D) and importance (B, grid**2) on the student's grid of patches, in the
    recipe's precision.

    images: the student's crops, uint8 (B, 3, H, W), resized where the tower takes another size (bicubic, antialiased).
    normalisation: a key of transforms.NORMALISATIONS."""
    images = transforms.resize(images, tower.size)
    with autocast(compute.precision, images.device):
        features, importance = tower(transforms.normalise(images, normalisation))
    return resample_to_grid(features, importance, tower.grid, grid)


def resample_to_grid(features: Tensor, importance: Tensor, source: int, target: int) -> tuple[Tensor, Tensor]:
    """Interpolate features (B, 1 + source**2, D) and importance (B, source**2) to a grid of target x target patches over the
    same image: bilinearly between patch centres, in float32.

    The class token and the sum of each image's importance stay as they are. Equal grids return the inputs themselves."""
    if source == target:
        return features, importance

    def interpolate(rows: Tensor) -> Tensor:
        maps = rows.float().transpose(1, 2).unflatten(2, (source, source))
        return nn.functional.interpolate(maps, size=(target, target), mode="bilinear").flatten(2).transpose(1, 2)

    weights = interpolate(importance.unsqueeze(2)).squeeze(2)
    shares = weights / weights.sum(dim=1, keepdim=True)
    features = torch.cat([features[:, :1].float(), interpolate(features[:, 1:])], dim=1)
    return features, shares * importance.sum(dim=1, keepdim=True)
