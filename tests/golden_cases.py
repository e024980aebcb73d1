"""Compute each kind of golden case with our code: {tensor: values}, and under "rows" further (what, error, allowed)."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from milan import params
from milan.evaluation.linear import LinearHead
from milan.method import masking
from milan.method import model as pretraining
from milan.method.encoder import build_vit
from milan.method.pos_embed import interpolate_pos_embed, sincos_pos_embed
from milan.teacher import released
from milan.teacher.towers import ClipTower
from milan.training import optim
from tests.golden import SAMPLED, SAMPLES, Case

PUBLISHED = {"base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}
OFFICIAL_FEATURE_DIM = 512  # the release fixes it; trajectories do not state it


def sizes(config: dict) -> params.Model:
    """Return the model's sizes from a case's config: from its keys or the factory's arguments, from the factory's "(768/12/12,
    decoder 512/8/16)", or from the factory's name, vit_base_patch16."""
    factory = config.get("factory", "")
    numbers = [int(n) for tower in re.findall(r"\d+/\d+/\d+", factory) for n in tower.split("/")]
    named = re.search(r"vit_(\w+?)_patch(\d+)", factory)
    known = numbers or list(PUBLISHED.get(named[1] if named else "", ()))
    stated = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", factory)} | config
    keys = ("embed_dim", "depth", "num_heads")
    encoder = params.TransformerSize(*(stated.get(key) or known[i] for i, key in enumerate(keys)))
    decoder = encoder
    if "decoder_embed_dim" in stated or len(known) == 6:
        decoder = params.TransformerSize(*(stated.get(f"decoder_{key}") or known[3 + i] for i, key in enumerate(keys)))
    return params.Model("golden", stated["img_size"], stated.get("patch_size") or int(named[2]), encoder, decoder)


def official(name: str) -> str:
    """Return the official name of one of our parameters."""
    return name.removeprefix("encoder.vit.").removeprefix("decoder.")


def fill(model: nn.Module, case: Case) -> None:
    """Set every weight of a model by the formula, except its position tables."""
    ours = {official(name): parameter for name, parameter in model.named_parameters()}
    expected = {name: tuple(shape) for name, shape in case.shapes.items()}
    built = {name: tuple(parameter.shape) for name, parameter in ours.items()}
    if expected and expected != built:
        raise ValueError(f"parameters differ: {sorted(set(expected.items()) ^ set(built.items()))[:6]}")
    with torch.no_grad():
        for name, parameter in ours.items():
            if not name.endswith("pos_embed"):
                parameter.copy_(case.weight(name, parameter.shape))


class Masked:
    """A pretraining case: the model with its weights, and the images, teacher features and ids of a step."""

    def __init__(self, case: Case):
        self.case, self.config, self.size = case, case.config, sizes(case.config)
        names = list(case.shapes) or list(case.arrays["param_names"])
        self.prompting = any(".attn.kv." in name for name in names)
        self.clip = self.config.get("use_clip", True)
        row = params.AblationRow("clip" if self.clip else "pixels", "prompt" if self.prompting else "mae", "random")
        self.model = pretraining.MaskedPretraining(self.size, row, self.config["mask_ratio"], self.feature_dim)
        fill(self.model, case)

    @property
    def feature_dim(self) -> int | None:
        stated = self.case.shapes.get("decoder_pred.bias") or self.case.tensors.get("final:decoder_pred.bias", {}).get("shape")
        return (self.config.get("teacher_dim") or (stated or [OFFICIAL_FEATURE_DIM])[0]) if self.clip else None

    def inputs(self, step: str = "") -> tuple[Tensor, Tensor | None, Tensor]:
        """Return images (B, 3, H, H), teacher features (B, 1+N, D) or None, and ids (B, N)."""
        batch, side, n = self.config["batch"], self.size.image_size, self.size.n_patches
        images = self.case.input(f"images{step}", batch, 3, side, side)
        name = "teacher" if self.prompting else f"teacher{self.feature_dim}"
        teacher = self.case.input(f"{name}{step}", batch, 1 + n, self.feature_dim) if self.clip else None
        return images, teacher, torch.from_numpy(self.case.draw(f"input:ids{step}", (batch, n)).argsort(axis=1, kind="stable"))

    def split(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        visible = ids[:, : self.model.n_visible]
        return visible, masking.complement(visible, self.size.n_patches)

    def forward(self, images: Tensor, teacher: Tensor | None, ids: Tensor) -> dict[str, Tensor]:
        """Return latent, pred (in image order), loss and, for feature targets, loss_per_token."""
        model, (visible, masked) = self.model, self.split(ids)
        latent = model.encoder(images, visible)
        predictions = model.decoder(latent, visible, masked)
        pred = pretraining.in_image_order(predictions, visible, masked)
        if teacher is None:
            hidden = predictions[:, 1 + model.n_visible :]
            loss = pretraining.pixel_loss(hidden, model.pixel_targets(images, masked)).mean()
            return {"latent": latent, "pred": pred[:, 1:], "loss": loss}
        loss = pretraining.feature_loss(predictions, pretraining.in_decoder_order(teacher, visible, masked))
        per_token = pretraining.in_image_order(loss.unsqueeze(-1), visible, masked).squeeze(-1)
        return {"latent": latent, "pred": pred, "loss": loss.mean(), "loss_per_token": per_token}


def masked_step(case: Case) -> dict:
    """Cases A, B, C: the forward pass in float32, every gradient in float64."""
    setting = Masked(case)
    images, teacher, ids = setting.inputs()
    with torch.no_grad():
        ours = setting.forward(images, teacher, ids)
    ours["ids_shuffle"], ours["mask"] = ids, masking.mask_of(setting.split(ids)[0], setting.size.n_patches)
    setting.model.double()
    setting.forward(images.double(), None if teacher is None else teacher.double(), ids)["loss"].backward()
    gradients = {official(name): p.grad for name, p in setting.model.named_parameters() if p.requires_grad}
    in_order = [gradients[name] for name in case.arrays.get("grad_names", ()) if name in gradients]
    ours["grad_names"] = list(gradients)
    ours["grad_norms"] = np.array([gradient.norm() for gradient in in_order])
    ours["grad_first8"] = np.stack([gradient.flatten()[:8] for gradient in in_order])
    return {**ours, **sampler(case, setting)}


def sampler(case: Case, setting: Masked) -> dict:
    """Return the importance by the formula, and how often our sampler keeps each patch of one row."""
    if "importance" not in case.tensors:
        return {}
    logits = case.draw("input:importance", case.shape("importance")).astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    importance = (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
    if SAMPLED not in case.tensors:
        return {"importance": importance}
    row = torch.from_numpy(importance[case.entry[SAMPLED]["row"]])
    return {"importance": importance, SAMPLED: keep_probability(row, setting.model.n_visible, SAMPLES)}


def keep_probability(importance: Tensor, k: int, draws: int, seed: int = 0) -> Tensor:
    """Return the share (N,) of draws in which our sampler keeps each patch of importance (N,)."""
    n, kept, chunk = len(importance), torch.zeros(len(importance), dtype=torch.float64), 10_000
    for start in range(0, draws, chunk):
        noise = masking.gumbel(seed, 0, start, n * chunk).view(chunk, n)
        visible = masking.sample_visible(noise, k, importance.expand(chunk, n))
        kept += visible.flatten().bincount(minlength=n)
    return kept / (math.ceil(draws / chunk) * chunk)


def clip_tower(case: Case) -> dict:
    """Case D: features, the last block's attention and importance, from an OpenAI state dict."""
    state = {name: case.weight(name, shape) for name, shape in case.shapes.items()}
    state |= {name: torch.tensor(value) for name, value in case.entry.get("extra_int_keys", {}).items()}
    tower = ClipTower(empty_clip(case.config).visual).eval()
    released.load_as_float32(tower, released.image_state(state), Path(case.name))
    last, seen = tower.visual.transformer.resblocks[-1], []
    last.ln_1.register_forward_hook(lambda *module_inputs_and_output: seen.append(module_inputs_and_output[-1]))
    side = case.config["image"]
    with torch.no_grad():
        features, importance = tower(case.input("images", case.config["batch"], 3, side, side))
        attention = last.attn(seen[0], seen[0], seen[0], need_weights=True)[1]
    return {"features": features, "importance": importance, "importance_sum": importance.sum(dim=1), "attention": attention}


def empty_clip(config: dict) -> CLIP:
    """Build open_clip's model of these sizes; text heads are 64 wide, as in all of OpenAI's models."""
    width, text = config["width"], config["text"]
    size = {"width": width, "layers": config["layers"], "head_width": width // config["heads"]}
    vision = CLIPVisionCfg(**size, patch_size=config["patch"], image_size=config["image"])
    text = CLIPTextCfg(**{"heads": max(text["width"] // 64, 1), **text})
    return CLIP(config["embed_dim"], vision_cfg=vision, text_cfg=text, quick_gelu=config["activation"] == "QuickGELU")


def finetuned(case: Case) -> dict:
    """Case E: features (mean of the patches, fc_norm) and logits in evaluation; and the drop path of each block."""
    rates = case.entry.get("drop_path_per_block", [0.0])
    classes = case.shape("logits")[-1]
    size = sizes(case.config)
    pool = "avg" if "fc_norm.weight" in case.shapes else "token"
    model = build_vit(size, num_classes=classes, global_pool=pool, drop_path_rate=rates[-1]).eval()
    fill_vit(model, case, size)
    with torch.no_grad():
        tokens = model.forward_features(images_of(case, size))
        ours = {"features": model.forward_head(tokens, pre_logits=True), "logits": model.forward_head(tokens)}
    drops = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    error = max(abs(a - b) for a, b in zip(rates, drops, strict=True)) if len(rates) > 1 else 0
    return {**ours, "rows": [("drop_path_per_block", error, 1e-7)]}


def fill_vit(model: nn.Module, case: Case, size: params.Model) -> None:
    fill(model, case)
    with torch.no_grad():
        model.pos_embed.copy_(sincos_pos_embed(size.encoder.embed_dim, size.grid))


def images_of(case: Case, size: params.Model) -> Tensor:
    return case.input("images", case.config["batch"], 3, size.image_size, size.image_size)


def linear_probe(case: Case) -> dict:
    """Case F: the head in evaluation, in training, and in evaluation after that one step; and LARS."""
    size = sizes(case.config)
    vit = build_vit(size).eval()
    fill_vit(vit, case, size)
    head = LinearHead(size.encoder.embed_dim, case.shape("logits_train")[-1])
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(case.weight(name.replace("linear.", "head.1."), parameter.shape))
        features = vit(images_of(case, size))
        ours = {"features": features, "logits_eval_initial": head.eval()(features)}
        ours |= {"logits_train": head.train()(features), "logits_eval_after_one_train_step": head.eval()(features)}
    return {**ours, "running_mean": head.norm.running_mean, "running_var": head.norm.running_var, **lars_steps(case)}


def lars_steps(case: Case) -> dict:
    if "lars_weight_steps" not in case.tensors:
        return {}
    settings, (steps, rows, columns) = case.config["lars"], case.shape("lars_weight_steps")
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(case.weight(f"lars.{name}", parameter.shape))
    optimizer = optim.lars(layer, settings["momentum"], settings["weight_decay"])
    optim.set_lr(optimizer, settings["lr"])
    seen: dict[str, list] = {"weight": [], "bias": []}
    for step in range(steps):
        for name, parameter in layer.named_parameters():
            parameter.grad = case.input(f"lars.{name}.grad:step{step}", *parameter.shape)
        optimizer.step()
        for name, parameter in layer.named_parameters():
            seen[name].append(parameter.detach().clone())
    trust = max(abs(group["trust_coeff"] - settings["trust_coefficient"]) for group in optimizer.param_groups)
    return {f"lars_{name}_steps": torch.stack(values) for name, values in seen.items()} | {"rows": [("lars trust coefficient", trust, 0)]}


def schedule(case: Case) -> dict:
    """Case G: learning rates at fractional epochs."""
    ours = {}
    for stage in (name.removeprefix("lr_").removesuffix("_epochs") for name in case.tensors if name.endswith("_epochs")):
        epochs = case.arrays[f"lr_{stage}_epochs"]
        ours[f"lr_{stage}_epochs"] = epochs
        ours[f"lr_{stage}"] = np.array([optim.lr_at(epoch, **case.config[stage]) for epoch in epochs])
    return ours


def trajectory(case: Case) -> dict:
    """Case H: AdamW steps, each with its own batch, or all with the first one."""
    setting = Masked(case)
    numbers, weight_decay, betas = optimisation(case.config)
    optimizer = optim.adamw(optim.decay_groups(setting.model, weight_decay), betas)
    kept: dict[str, list] = {"lr_steps": [], "losses": [], "grad_global_norm": [], "ids_shuffle": []}
    repeated = len(case.arrays["ids_shuffle"]) == 1
    for step in range(case.config["steps"]):
        if step == 0 or not repeated:
            images, teacher, ids = setting.inputs(f":step{step}")
            kept["ids_shuffle"].append(ids)
        kept["lr_steps"].append(optim.lr_at(step, **numbers))
        optim.set_lr(optimizer, kept["lr_steps"][-1])
        loss = setting.forward(images, teacher, ids)["loss"]
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad.double().norm() for p in setting.model.parameters() if p.requires_grad]
        kept["grad_global_norm"].append(torch.stack(gradients).norm())
        kept["losses"].append(loss.item())
        optimizer.step()
    final = {official(name): parameter.detach() for name, parameter in setting.model.named_parameters()}
    norms = [final[name].double().norm() for name in case.arrays["param_names"] if name in final]
    values = {**kept, "final_param_norms": norms}
    ours = {name: np.stack([np.asarray(value) for value in column]) for name, column in values.items()}
    return {**ours, "param_names": list(final), **{f"final:{name}": value for name, value in final.items()}}


def optimisation(config: dict) -> tuple[dict[str, float], float, list[float]]:
    """Read (arguments of lr_at, weight decay, betas) from the two sentences that state them."""
    stated: dict[str, float] = {}
    for key, value in re.findall(r"(\w+)=([\d.e+-]+)", config["schedule"]):
        if key in ("lr", "min_lr", "warmup_epochs", "epochs"):
            stated.setdefault(key, float(value))
    betas = re.search(r"betas=\(([\d.]+),\s*([\d.]+)\)", config["optimizer"])
    decay = re.search(r"wd ([\d.e+-]+)", config["optimizer"])
    return stated, float(decay[1]), [float(beta) for beta in betas.groups()]


def position_embeddings(case: Case) -> dict:
    """Case I: sin-cos tables and the interpolation, with single rows of each."""
    ours: dict[str, Tensor] = {}
    for dim, grid, *cls in case.config.get("sincos", ()):
        ours[f"sincos_{dim}"] = sincos_pos_embed(dim, grid)[0, 0 if cls else 1 :]
    if "interpolated" in case.tensors:
        _, rows, dim = case.shape("interpolated")
        old = int(re.search(r"(\d+)x\d+", case.config["interpolate"])[1])
        ours["interpolated"] = interpolate_pos_embed(case.input("pos_embed", 1, old * old + 1, dim), math.isqrt(rows - 1))
    for name in case.tensors:
        if match := re.fullmatch(r"(.+)_row(\d+)", name):
            ours[name] = ours[match[1]].squeeze(0)[int(match[2])]
    return ours


# A tensor of a case: the function that computes cases with such a tensor. The first that applies is used.
KINDS = {
    "losses": trajectory,
    "attention": clip_tower,
    "logits_train": linear_probe,
    "logits": finetuned,
    "pred": masked_step,
    "interpolated": position_embeddings,
}


def kind(case: Case) -> Callable | None:
    for tensor, compute in KINDS.items():
        if tensor in case.tensors:
            return compute
    names = " ".join(case.tensors)
    return schedule if "lr_" in names else position_embeddings if "sincos_" in names else None
