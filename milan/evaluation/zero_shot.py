"""Zero-shot classification by the pretrained student itself: its prediction of CLIP's class token beside the classes' texts.

The teacher's text tower was never meant for the student; that it serves, is what predicting CLIP features comes to. No
label is used, and nothing is trained.
"""

from pathlib import Path

import torch
from torch import Tensor

from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records
from milan.evaluation import evaluate
from milan.method import masking
from milan.method.model import MaskedPretraining, load_pretrained
from milan.params import Params
from milan.teacher.class_text import read_class_text
from milan.training.device import autocast, resolve_precision

SEEN = ("zero_shot", "zero_shot_masked")  # the whole image; the share that pretraining left visible


def files(weights: Path, teacher: Path) -> list[Path]:
    """What the accuracies follow from, beside the encoder; of these what there is."""
    return [path for path in (weights / "decoder.safetensors", teacher / "class_text.safetensors") if path.exists()]


def accuracies(p: Params, variant: str, seed: int, weights: Path, teacher: Path, val: Records, device: torch.device) -> dict:
    """{"zero_shot_top1": %, "zero_shot_masked_top1": %} over the validation images; nothing for a student that predicts no
    CLIP features or came without its decoder, and for a teacher without text.

    Masks are random whatever the variant's own, so that all see alike and no teacher is asked: a function of (seed, index)."""
    text, recipe = read_class_text(teacher), p.pretrain.ablation[variant]
    if text is None or recipe.target != "clip" or not (weights / "decoder.safetensors").exists():
        return {}
    model = load_pretrained(weights, p.model, recipe, p.pretrain.mask_ratio, text.embeddings.shape[1]).to(device).eval()
    precision = resolve_precision(p.compute, device)

    def predict(images: Tensor, index: Tensor) -> Tensor:
        with autocast(precision, device):
            return class_tokens(model, images, noise_of(seed, index, model.n_patches).to(device))

    x = p.linear_eval
    views = CentreSamples(val, x.resize, p.model.image_size)
    found, labels = evaluate.outputs(predict, views, x.micro_batch, device, "zero-shot", p.runtime.workers, ("index",))
    tops = [dict(evaluate.accuracy(tokens @ text.embeddings.T, labels, "")) for tokens in found.unbind(dim=1)]
    return {f"{name}_top1": top["/top1"] for name, top in zip(SEEN, tops, strict=True)}


def noise_of(seed: int, index: Tensor, n_patches: int) -> Tensor:
    """(B, N) Gumbel noise of the samples of these indices (B,), which is not that of any training epoch."""
    return torch.stack([masking.gumbel(seed, 0, i, n_patches, purpose="zero-shot mask") for i in index.tolist()])


def class_tokens(model: MaskedPretraining, images: Tensor, noise: Tensor) -> Tensor:
    """images (B, 3, H, W) normalised, noise (B, N) -> (B, 2, D) float32: the decoder's class token, of whole images and of
    the n_visible patches that the noise keeps."""
    whole = masking.all_patches(len(images), model.n_patches).to(images.device)
    seen = (whole, masking.sample_visible(noise, model.n_visible))
    return torch.stack([model.predict(images, v, masking.complement(v, model.n_patches))[:, 0].float() for v in seen], dim=1)
