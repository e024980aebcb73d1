"""Classify images by the pretrained student's prediction of CLIP's class token, without labels or training.

The predicted class token is compared with CLIP's text embeddings of the class names, as CLIP's own zero-shot
classification compares the real one.
"""

from pathlib import Path

import torch
from torch import Tensor

from milan.data.evaluation_view import CentreSamples
from milan.data.records import Records
from milan.evaluation import inference, scores
from milan.method import masking
from milan.method.model import MaskedPretraining, load_pretrained
from milan.params import Params
from milan.teacher.class_text import read_class_text
from milan.training.device import autocast

MEASURES = ("zero_shot_top1", "zero_shot_masked_top1")  # of whole images; of the patches that a training mask would keep


def input_files(weights: Path, teacher: Path) -> list[Path]:
    """Return the files that the accuracies depend on besides the encoder, as far as they exist."""
    return [path for path in (weights / "decoder.safetensors", teacher / "class_text.safetensors") if path.exists()]


def accuracies(
    params: Params, variant: str, seed: int, weights: Path, teacher: Path, val: Records, device: torch.device
) -> dict[str, float]:
    """Return top-1 in % over the validation images for each of MEASURES.

    Empty when the student does not predict CLIP features or has no decoder file, or when the teacher has no text.
    Masks are random for every variant, so that all are measured alike and no teacher is needed; a mask depends on
    (seed, index)."""
    text, row = read_class_text(teacher), params.pretrain.ablation[variant]
    if text is None or row.target != "clip" or not (weights / "decoder.safetensors").exists():
        return {}
    model = load_pretrained(weights, params.model, row, params.pretrain.mask_ratio, text.embeddings.shape[1]).to(device).eval()

    def predict(images: Tensor, index: Tensor) -> Tensor:
        with autocast(params.compute.precision, device):
            return predict_class_tokens(model, images, mask_noise(seed, index, model.n_patches).to(device))

    views = CentreSamples(val, params.linear_eval.resize, params.model.image_size)
    batch_size, workers = params.linear_eval.micro_batch, params.runtime.workers
    tokens, labels = inference.model_outputs(predict, views, batch_size, device, "zero-shot", workers, ("index",))
    top1 = [dict(scores.accuracy(view @ text.embeddings.T, labels, ""))["/top1"] for view in tokens.unbind(dim=1)]
    return dict(zip(MEASURES, top1, strict=True))


def mask_noise(seed: int, index: Tensor, n_patches: int) -> Tensor:
    """Return Gumbel noise (B, N) for the samples of these indices (B,), different from that of every training epoch."""
    return torch.stack([masking.gumbel(seed, 0, i, n_patches, purpose="zero-shot mask") for i in index.tolist()])


def predict_class_tokens(model: MaskedPretraining, images: Tensor, noise: Tensor) -> Tensor:
    """Return the decoder's class tokens (B, 2, D) float32: of whole images, and of the n_visible patches chosen by the noise.

    images: (B, 3, H, W) normalised; noise: (B, N)."""
    whole = masking.all_patches(len(images), model.n_patches).to(images.device)
    views = (whole, masking.sample_visible(noise, model.n_visible))
    tokens = [model.predict(images, visible, masking.complement(visible, model.n_patches))[:, 0].float() for visible in views]
    return torch.stack(tokens, dim=1)
