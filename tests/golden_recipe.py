"""Golden file J: compare the facts of the release's recipe with ours, composed with scale=paper.

Every leaf of the file is checked against a value of the recipe or the behaviour of our code, or noted where another case
proves it or it has no counterpart here. A leaf without any of these is a miss."""

import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from milan import params
from milan.core.validation import validate
from milan.data import transforms
from milan.evaluation.classifier import FinetuneLoss, build_classifier
from milan.evaluation.linear import LinearHead, ProbeLoss
from milan.method import model as pretraining
from milan.method.decoder import DECODERS
from milan.method.encoder import Encoder, build_vit
from milan.method.pos_embed import sincos_pos_embed
from milan.training import optim
from milan.training.loop import Order
from stages import finetune, linear_eval
from tests import golden_transforms, recipes
from tests.golden_transforms import differ, eraser

CLASSES = 1000
TINY = params.Model("golden", 8, 4, params.TransformerSize(16, 3, 2), params.TransformerSize(12, 2, 2))


def composed(scale: str) -> params.Params:
    return validate(params.Params, recipes.composed(scale), f"conf/scale/{scale}.yaml")


def recipe(content: dict) -> Iterator[tuple]:
    p = composed("paper")
    checks = {**values(p), **behaviours(p)}
    for path, stated in leaves({key: value for key, value in content.items() if key != "transforms"}):
        if path in checks:
            yield row(path, stated, checks[path])
        elif path in ELSEWHERE:
            yield path, None, None, ELSEWHERE[path]
        else:
            yield path, math.inf, 0, "nothing here checks it"
    yield from golden_transforms.rows(content["transforms"], p)


def leaves(tree, path: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{path}.{key}" if path else key)


def row(path: str, stated, ours) -> tuple:
    """Compare a stated fact with ours: a callable returns (error, allowed) for it; any other value is compared with it."""
    if isinstance(ours, Callable):
        return path, *ours(stated)
    scale = abs(stated) if isinstance(stated, int | float) else 1.0
    return path, differ(ours, stated), 1e-9 * scale, f"ours {ours}"


def values(p: params.Params) -> dict:
    """Return {path: value} of facts that are values of the composed recipe, or of the objects that stages build from it."""
    x, f, probe = p.pretrain, p.finetune, p.linear_eval
    mixer = FinetuneLoss(nn.Identity(), f, CLASSES).mixup
    expected = {f"pretrain.{key}": getattr(x, key) for key in ("clip_grad", "epochs", "lr", "mask_ratio", "min_lr", "warmup_epochs")}
    expected |= {f"linprobe.{key}": getattr(probe, key) for key in ("epochs", "min_lr", "warmup_epochs")}
    same = ("clip_grad", "cutmix", "drop_path", "epochs", "label_smoothing", "layer_decay", "lr", "min_lr", "mixup", "warmup_epochs")
    expected |= {f"finetune.{key}": getattr(f, key) for key in same}
    expected |= {f"{name}.effective_batch": s.batch_size for name, s in (("pretrain", x), ("linprobe", probe), ("finetune", f))}
    return expected | {
        "pretrain.blr": x.lr * 256 / x.batch_size,
        "pretrain.gpus": p.world_size,
        "pretrain.per_gpu": x.micro_batch,
        "pretrain.accum_iter": x.batch_size // (x.micro_batch * p.world_size),
        "pretrain.drop_last": Order(10, 4, 4, 1, 0).steps_per_epoch == 2,
        "linprobe.blr_base": probe.lr * 256 / probe.batch_size,
        "linprobe.sync_bn": not isinstance(LinearHead(4, 2).norm, nn.BatchNorm1d),
        "finetune.blr": f.lr * 256 / f.batch_size,
        "finetune.correct_lam": mixer.correct_lam,
        "finetune.cutmix_minmax": mixer.cutmix_minmax,
        "finetune.mixup_mode": mixer.mode,
        "finetune.mixup_prob": mixer.mix_prob,
        "finetune.mixup_switch_prob": mixer.switch_prob,
        "finetune.recount": eraser(p)[0].max_count,
        "finetune.remode": eraser(p)[0].mode,
        "finetune.reprob": f.random_erasing,
        "teacher_normalisation.mean": list(transforms.NORMALISATIONS[p.extract_targets.normalisation][0]),
        "teacher_normalisation.std": list(transforms.NORMALISATIONS[p.extract_targets.normalisation][1]),
        "teacher_normalisation.clip_own.mean": list(transforms.NORMALISATIONS["clip"][0]),
        "teacher_normalisation.clip_own.std": list(transforms.NORMALISATIONS["clip"][1]),
        "teacher_normalisation.clip_own_mean_std_used": p.extract_targets.normalisation == "clip",
        **large_values(),
    }


def large_values() -> dict:
    """Return {path: value} of the facts in which ViT-L differs."""
    p = composed("paper_large")
    return {
        "finetune.large.drop_path": p.finetune.drop_path,
        "finetune.large.layer_decay": p.finetune.layer_decay,
        "linprobe.blr_large": p.linear_eval.lr * 256 / p.linear_eval.batch_size,
    }


def numbers(sentence: str) -> dict[str, float]:
    """Read {"eps": 1e-8, "wd": 0.05, "betas": [0.9, 0.999]} from "AdamW betas (0.9,0.999) eps 1e-8 wd 0.05": first mentions."""
    stated: dict = {}
    for word, value in re.findall(r"(lr|momentum|wd|trust|eps|std|bias)[ =]([\d.]+(?:e-?\d+)?)", sentence):
        stated.setdefault(word, float(value))
    if betas := re.search(r"betas \(([\d.]+),\s*([\d.]+)\)", sentence):
        stated["betas"] = [float(betas[1]), float(betas[2])]
    return stated


def said(ours: dict, tolerance: float = 1e-9) -> Callable[[str], tuple]:
    """Return a check that the numbers of a sentence are ours."""
    return lambda stated: (differ(ours, numbers(stated)), tolerance, f"ours {ours}")


def holds(fact: bool) -> Callable[[str], tuple]:
    """Return a check of a fact that the file states in words and that `fact` proves."""
    return lambda stated: (float(not fact), 0, str(stated)[:60])


def zero(fact: bool) -> Callable[[float], tuple]:
    """Return a check of a number that is stated as zero, where our code has no such feature."""
    return lambda stated: (float(stated != 0 or not fact), 0)


def behaviours(p: params.Params) -> dict[str, Callable]:
    """Return {path: check} of facts about the code's behaviour."""
    return {
        "pretrain.optimizer": said(adamw_numbers(p.pretrain)),
        "pretrain.drop_path": zero(not any(getattr(module, "drop_prob", 0) for module in masked_model().modules())),
        "pretrain.dropout": zero(not any(isinstance(module, nn.Dropout) and module.p for module in masked_model().modules())),
        "pretrain.pos_embed": holds(positions_are_fixed()),
        "finetune.optimizer": said(adamw_numbers(p.finetune)),
        "finetune.head_init": said(init_numbers(classifier(p).head), 5e-4),
        "finetune.checkpoint_norm": holds(fresh_norm(p)),
        "finetune.drop_path_rule": holds(drop_path_is_linear(p)),
        "finetune.mix_partner": holds(partner_is_flipped(p)),
        "finetune.smoothing_where": holds(smoothing_is_in_targets(p)),
        "finetune.pooling": holds(p.finetune.pooling == "mean" and classifier(p).fc_norm.eps == 1e-6),
        "finetune.pos_embed": holds(positions_are_tuned(p)),
        "linprobe.optimizer": said(lars_numbers(p)),
        "linprobe.head": said({"eps": LinearHead(4, 2).norm.eps, "momentum": LinearHead(4, 2).norm.momentum}),
        "linprobe.head_init": said(init_numbers(LinearHead(64, CLASSES).linear), 2e-4),
        "linprobe.label_smoothing": zero(probe_is_plain()),
        "linprobe.mixup": zero(probe_is_plain()),
        "init.pretrain": holds(initialised_as_stated()),
        **loss_behaviours(),
    }


def masked_model(target: str = "clip", decoder: str = "prompt") -> pretraining.MaskedPretraining:
    torch.manual_seed(0)
    return pretraining.MaskedPretraining(TINY, params.AblationRow(target, decoder, "random"), 0.5, 10)


def classifier(p: params.Params):
    torch.manual_seed(0)
    encoder = {name: torch.full_like(tensor, 5.0) for name, tensor in build_vit(TINY).state_dict().items()}
    return build_classifier(TINY, p.finetune, CLASSES, encoder)


def adamw_numbers(section) -> dict:
    optimizer = optim.adamw([{"params": [torch.zeros(1, requires_grad=True)]}], section.betas)
    return {"eps": optimizer.defaults["eps"], "wd": section.weight_decay, "betas": list(optimizer.defaults["betas"])}


def lars_numbers(p: params.Params) -> dict:
    matrices, vectors = linear_eval.optimizer_of(p, LinearHead(4, 2)).param_groups
    assert matrices["always_adapt"] and not vectors["always_adapt"]  # trust scaling for the weight, none for the bias
    return {"lr": p.linear_eval.lr, "momentum": matrices["momentum"], "wd": matrices["weight_decay"], "trust": matrices["trust_coeff"]}


def init_numbers(layer: nn.Linear) -> dict:
    return {"std": layer.weight.std().item(), "bias": layer.bias.abs().max().item()}


def positions_are_fixed() -> bool:
    model = masked_model()
    tables = ((model.encoder.vit.pos_embed, 16), (model.decoder.decoder_pos_embed, 12))
    return all(not table.requires_grad and table.equal(sincos_pos_embed(dim, TINY.grid)) for table, dim in tables)


def fresh_norm(p: params.Params) -> bool:
    """Return whether the checkpoint (here all fives) is loaded into the encoder but not the new norm, and its own final norm is
    not used."""
    vit = classifier(p)
    loaded = vit.blocks[0].norm1.weight.eq(5).all() and vit.pos_embed.eq(5).all()
    return bool(loaded and vit.fc_norm.weight.eq(1).all() and vit.fc_norm.bias.eq(0).all() and isinstance(vit.norm, nn.Identity))


def drop_path_is_linear(p: params.Params) -> bool:
    blocks = classifier(p).blocks
    rates = torch.linspace(0, p.finetune.drop_path, len(blocks)).tolist()
    drops = [[getattr(path, "drop_prob", 0.0) for path in (block.drop_path1, block.drop_path2)] for block in blocks]
    return all(abs(drop - rate) < 1e-6 for rate, pair in zip(rates, drops, strict=True) for drop in pair)


def partner_is_flipped(p: params.Params) -> bool:
    """Return whether mixup mixes a batch with its reverse: constants c become lam c + (1 - lam) reversed c, with one lam."""
    mixer = FinetuneLoss(nn.Identity(), p.finetune, CLASSES).mixup
    mixer.switch_prob = 0.0
    torch.manual_seed(0)
    values = torch.tensor([0.0, 1.0, 3.0, 7.0])
    mixed, _ = mixer(values.view(4, 1, 1, 1).repeat(1, 3, 8, 8), torch.arange(4))
    lam = 1 - mixed[0, 0, 0, 0] / values[3]
    return torch.allclose(mixed[:, 0, 0, 0], lam * values + (1 - lam) * values.flip(0), atol=1e-5)


def smoothing_is_in_targets(p: params.Params) -> bool:
    """Return whether the loss is the cross entropy against soft targets: s / C, and 1 - s + s / C for the label."""
    loss, s = FinetuneLoss(nn.Flatten(), p.finetune, CLASSES), p.finetune.label_smoothing
    loss.mixup.mixup_enabled = False
    images, labels = torch.randn(2, 1, 1, CLASSES), torch.tensor([3, 5])
    targets = torch.full((2, CLASSES), s / CLASSES)
    targets[[0, 1], labels] += 1 - s
    expected = -(targets * images.flatten(1).log_softmax(1)).sum(1).mean()
    return torch.allclose(loss(images, labels), expected, atol=1e-5)


def positions_are_tuned(p: params.Params) -> bool:
    """Return whether the position table is trained, without weight decay, at the first layer's rate."""
    vit = classifier(p)
    group = next(group for group in finetune.layer_groups(vit, p.finetune) if "pos_embed" in group["names"])
    rate = p.finetune.layer_decay ** (len(vit.blocks) + 1)
    return vit.pos_embed.requires_grad and group["weight_decay"] == 0 and math.isclose(group["lr_scale"], rate)


def probe_is_plain() -> bool:
    torch.manual_seed(0)
    head, features, labels = LinearHead(8, 4), torch.randn(6, 8), torch.arange(6) % 4
    expected = -head(features).log_softmax(1)[range(6), labels].mean()
    return torch.allclose(ProbeLoss(head)(features, labels), expected, atol=1e-6)


def initialised_as_stated() -> bool:
    """Return whether the initial weights are those that the release states; Xavier's bound is that of the stored matrix."""
    torch.manual_seed(0)
    size = params.Model("golden", 16, 8, params.TransformerSize(96, 2, 2), params.TransformerSize(64, 2, 2))
    encoder, decoder = Encoder(size).vit, DECODERS["prompt"](96, 64, 2, 2, size.grid, 32)
    projection = encoder.patch_embed.proj
    modules = [*encoder.modules(), *decoder.modules()]
    linears, norms = ([m for m in modules if isinstance(m, kind)] for kind in (nn.Linear, nn.LayerNorm))
    spread = all(is_xavier(weight) for weight in (projection.weight.flatten(1), *(linear.weight for linear in linears)))
    plain = all(linear.bias.eq(0).all() for linear in linears) and all(n.weight.eq(1).all() and n.bias.eq(0).all() for n in norms)
    conv_default = 0 < projection.bias.abs().max() <= projection.weight[0].numel() ** -0.5
    tokens = all(abs(token.std().item() - 0.02) < 0.006 for token in (encoder.cls_token, decoder.mask_token))
    return bool(spread and plain and conv_default and tokens)


def is_xavier(weight: Tensor) -> bool:
    bound = math.sqrt(6 / sum(weight.shape))
    return 0.98 * bound < weight.abs().max().item() <= bound


def loss_behaviours() -> dict[str, Callable]:
    counted = tokens_in_loss()
    prediction, target = (torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(i)) for i in range(2))
    plain = 2 - 2 * nn.functional.cosine_similarity(prediction, target, dim=-1)
    ours = pretraining.feature_loss(prediction, target)
    tiny = pretraining.feature_loss(prediction * 1e-9, target)  # an epsilon in the norm would change this
    return {
        "loss.formula": holds(torch.allclose(ours, plain, atol=1e-5)),
        "loss.eps": holds(torch.allclose(ours, tiny, atol=1e-5)),
        "loss.includes_cls": lambda stated: (float(counted["cls"] != stated), 0),
        "loss.includes_visible_tokens": lambda stated: (float(counted["visible"] != stated), 0),
        "loss.includes_masked_tokens": lambda stated: (float(counted["masked"] != stated), 0),
        "loss.mask_used_in_loss": lambda stated: (float(counted["weighted"] != stated), 0),
        "loss.pixel_variant": holds(pixel_targets_are_normalised()),
    }


def tokens_in_loss() -> dict[str, bool]:
    """Return which of the teacher's tokens enter the loss, and whether it is anything but the mean over all tokens."""
    model = masked_model()
    noise = torch.rand(1, TINY.n_patches, generator=torch.Generator().manual_seed(0))
    visible = noise.argsort(dim=1, descending=True)[:, : model.n_visible]
    hidden = torch.ones(TINY.n_patches, dtype=torch.bool).scatter(0, visible[0], False)
    features = torch.randn(1, 1 + TINY.n_patches, 10, requires_grad=True)
    images = torch.randn(1, 3, TINY.image_size, TINY.image_size)
    loss = model(images, noise, features, None)
    loss.backward()
    moved = features.grad[0].abs().sum(dim=1) > 0
    masked = hidden.nonzero()[:, 0][None]
    predictions = pretraining.in_image_order(model.predict(images, visible, masked), visible, masked)
    mean = pretraining.feature_loss(predictions, features).mean()
    counted = {"cls": moved[0], "visible": moved[1:][~hidden].all(), "masked": moved[1:][hidden].all(), "weighted": abs(loss - mean) > 1e-6}
    return {name: bool(value) for name, value in counted.items()}


def pixel_targets_are_normalised() -> bool:
    """Return whether pixel targets are the masked patches, normalised with unbiased variance and eps 1e-6."""
    model, images, masked = masked_model("pixels", "mae"), torch.randn(1, 3, 8, 8) * 1e-3, torch.tensor([[1, 2]])
    patches = pretraining.patchify(images, 4)[:, [1, 2]].double()
    deviation = patches - patches.mean(-1, keepdim=True)
    expected = deviation / (deviation.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1) + 1e-6).sqrt()
    return torch.allclose(model.pixel_targets(images, masked).double(), expected, atol=1e-3)


ELSEWHERE = {
    "finetune.eval_loss": "no evaluation loss is reported",
    "linprobe.amp": "deliberate difference: compute.precision, bf16 by default, fp16 on request",
    "linprobe.backbone_mode": "frozen and without dropout: train and eval mode are the same",
    "linprobe.feature": "proved by case F",
    "loss.teacher_features": "proved by case D",
    "masking.draw": "proved by case A, keep_prob_mc, and tests/method/test_masking.py",
    "masking.importance": "proved by case D",
    "pretrain.amp": "deliberate difference: compute.precision, bf16 by default, fp16 on request",
    "pretrain.lr_granularity": "per optimizer step from its fractional epoch: cases G and H",
    "pretrain.norm_pix_loss": "no such switch here: it follows from the target",
    "teacher_normalisation.clip_own.note": "see clip_own_mean_std_used",
    "teacher_normalisation.received": "see mean and std",
    "transform_notes": "checked entry by entry under transforms",
}
