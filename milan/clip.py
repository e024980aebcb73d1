"""The frozen CLIP image tower: images -> features of all tokens and the importance of each patch.

open_clip's own model does the work; this file only reads two things out of it that it does not return:
the projected features of every token, and the last block's class-token attention (clip_demo.py).
"""

from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, convert_weights_to_lp
from torch import Tensor, nn

from milan.checkpoint import load_weights, save_weights
from milan.distributed import DTYPES, autocast, resolve_precision
from milan.errors import UserError
from milan.files import read_json, write_json
from milan.params import Compute, TinyClip
from milan.transforms import normalise


class ClipTower(nn.Module):
    """An open_clip vision transformer, read as MILAN's teacher."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        if not hasattr(visual, "transformer") or getattr(visual, "attn_pool", None) is not None:
            raise UserError("The teacher must be a CLIP vision transformer with a class token (such as ViT-B-16).")
        self.visual = visual

    def lowered(self, precision: str) -> "ClipTower":
        """Matrices kept in the precision that autocast would cast them to at every call; norms and embeddings stay in
        float32."""
        if precision != "fp32":
            convert_weights_to_lp(self, DTYPES[precision])
        return self

    @property
    def feature_dim(self) -> int:
        return self.visual.proj.shape[1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) -> features (B, 1+N, D) after ln_post and projection, class token
        first; importance (B, N) float32: the last block's attention from the class token to each patch, mean
        over heads after the softmax, class key dropped, not renormalised (reference: clip_demo.py)."""
        tokens = self.visual._embeds(images)
        for block in self.visual.transformer.resblocks:
            query, keys, values = in_heads(block, tokens)
            mixed = nn.functional.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
            tokens = tokens + block.ls_1(block.attn.out_proj(mixed))
            tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        return self.visual.ln_post(tokens) @ self.visual.proj.to(tokens.dtype), cls_attention(query, keys)[:, 1:]


def in_heads(block: nn.Module, tokens: Tensor) -> Tensor:
    """(3, B, heads, 1+N, D/heads): queries, keys and values of a block, by one product. nn.MultiheadAttention, which holds
    the weights, has a fast way too, but not under autocast; this one serves every precision, and the importance."""
    batch, length, _ = tokens.shape
    projected = nn.functional.linear(block.ln_1(tokens), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return projected.view(batch, length, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)


def cls_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of the class token over all tokens, (B, 1+N) float32, mean over heads: one query, never the matrix."""
    with torch.autocast(query.device.type, enabled=False):
        logits = query[:, :, :1].float() @ keys.float().transpose(-2, -1) * query.shape[-1] ** -0.5
    return logits.softmax(dim=-1).mean(dim=1).squeeze(1)


def build_tiny(config: TinyClip, image_size: int, patch_size: int, vocabulary: int) -> CLIP:
    """open_clip's CLIP at toy size. `conv_stem` replaces the patch embedding by a small convolutional stem on
    the same grid: a plain one does not learn shape from the built-in world in minutes (Xiao et al. 2021)."""
    vision = CLIPVisionCfg(
        layers=config.layers, width=config.width, head_width=config.head_width, patch_size=patch_size, image_size=image_size
    )
    text = CLIPTextCfg(
        context_length=config.context_length,
        vocab_size=vocabulary,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
    )
    model = CLIP(config.embed_dim, vision_cfg=vision, text_cfg=text)
    if config.conv_stem:
        model.visual.conv1 = conv_stem(config.width, patch_size)
    return model


def conv_stem(width: int, patch_size: int) -> nn.Sequential:
    """(B, 3, H, W) -> (B, width, H/patch, W/patch) by 3x3 stride-2 convolutions and a 1x1 one. GroupNorm, not
    BatchNorm: a sample's features depend on no other sample, nor on the number of processes."""
    halvings = patch_size.bit_length() - 1
    if 2**halvings != patch_size:
        raise UserError(f"teacher.tiny.conv_stem needs a patch size that is a power of two, not {patch_size}; set it to false.")
    layers: list[nn.Module] = []
    channels = 3
    for i in range(halvings):
        out = max(width >> (halvings - 1 - i), 32)
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.Conv2d(channels, width, 1))


class Tokenizer:
    """open_clip's byte-pair tokenizer, with the ids that occur in a corpus renumbered in order: a text tower
    for fifty words needs no table of 49,408. Ids outside the corpus become padding (id 0)."""

    def __init__(self, context_length: int, ids: list[int] | None = None):
        self.bpe = open_clip.SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.ids = torch.tensor(ids) if ids is not None else None

    @classmethod
    def of_corpus(cls, captions: list[str], context_length: int) -> "Tokenizer":
        found = cls(context_length).bpe(sorted(set(captions))).unique()
        return cls(context_length, sorted({0, *found.tolist()}))

    def __len__(self) -> int:
        return len(self.ids) if self.ids is not None else self.bpe.vocab_size

    def __call__(self, texts: list[str]) -> Tensor:
        """(B, context_length) int64; the end-of-text id is the highest, as open_clip's pooling expects."""
        tokens = self.bpe(texts)
        if self.ids is None:
            return tokens
        places = torch.searchsorted(self.ids, tokens).clamp_max(len(self.ids) - 1)
        return torch.where(self.ids[places] == tokens, places, torch.zeros_like(places))


def save_no_teacher(folder: Path) -> None:
    """What stands in the teacher's place when a released student is only evaluated."""
    write_json(folder / "teacher.json", {"kind": "none"})


def save_teacher(folder: Path, model: CLIP, config: dict) -> None:
    """teacher.safetensors (image and text tower) and teacher.json, which says how to build the model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "teacher.safetensors", model.state_dict())
    write_json(folder / "teacher.json", config)


def load_teacher(folder: Path) -> tuple[CLIP, Tokenizer, dict]:
    """The frozen model in evaluation mode, its tokenizer and its config."""
    folder = Path(folder)
    config = read_json(folder / "teacher.json", kind=str)
    if config["kind"] == "none":
        raise UserError(
            f"{folder} holds no teacher: pretrain.weights was set when it was made. Set it to null and run `dvc repro`."
        )
    if config["kind"] == "tiny":
        tokenizer = Tokenizer(config["tiny"]["context_length"], config["token_ids"])
        model = build_tiny(TinyClip(**config["tiny"]), config["image_size"], config["patch_size"], len(tokenizer))
    else:
        tokenizer = Tokenizer(config["model"]["text_cfg"].get("context_length", 77))
        model = CLIP(**config["model"])
    model.load_state_dict(load_weights(folder / "teacher.safetensors"))
    return model.eval().requires_grad_(False), tokenizer, config


def load_tower(folder: Path, compute: Compute, device: torch.device) -> ClipTower:
    """The frozen image tower on its device, in the recipe's precision."""
    return ClipTower(load_teacher(folder)[0].visual).to(device).lowered(resolve_precision(compute, device))


@torch.inference_mode()
def look(tower: ClipTower, images: Tensor, compute: Compute, normalisation: str) -> tuple[Tensor, Tensor]:
    """What the teacher makes of uint8 images (B, 3, H, W): features and importance, in the recipe's precision."""
    with autocast(resolve_precision(compute, images.device), images.device):
        return tower(normalise(images, normalisation))


def text_classifier(model: CLIP, tokenizer: Tokenizer, classes: list[str], prompts: list[str]) -> Tensor:
    """(D, C) float32: unit text features of each class, averaged over the prompts ("a photo of a {}")."""
    columns = []
    with torch.no_grad():
        for name in classes:
            features = model.encode_text(tokenizer([prompt.format(name) for prompt in prompts]), normalize=True)
            columns.append(nn.functional.normalize(features.mean(dim=0), dim=0))
    return torch.stack(columns, dim=1).float()
