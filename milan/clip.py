"""CLIP by open_clip: the frozen image tower, the small model that is trained here, its tokenizer, both on disk.

open_clip's own model does the work; the tower only reads two things out of it that it does not return:
the projected features of every token, and the last block's class-token attention (clip_demo.py).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, convert_weights_to_lp
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from milan.checkpoint import load_weights, save_weights
from milan.class_text import Wording
from milan.distributed import DTYPES
from milan.encoder import Patches
from milan.errors import UserError
from milan.files import read_checked, write_checked
from milan.params import Model, TinyClip
from milan.progress import track

NO_TEXT = CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
NO_VISION = CLIPVisionCfg(layers=1, width=1, head_width=1, patch_size=1, image_size=1)


class Tower(nn.Module):
    """A frozen image tower, read as MILAN's teacher: ClipTower, or timm's in teachers.py.

    size: pixels of a side of what it looks at; grid: patches of a side (N = grid x grid); feature_dim: width of its
    features. forward: normalised images (B, 3, size, size) -> features (B, 1+N, D), class token first; importance
    (B, N) float32: the last block's attention from the class token to each patch, mean over heads after the softmax,
    keys that are no patch dropped, not renormalised (reference: clip_demo.py)."""

    def __init__(self, visual: nn.Module, size: tuple[int, int], grid: tuple[int, int], feature_dim: int):
        super().__init__()
        if size[0] != size[1] or grid[0] != grid[1]:
            raise UserError(f"The teacher must look at squares, and this one looks at {size[0]} x {size[1]} pixels.")
        self.visual, self.size, self.grid, self.feature_dim = visual, size[0], grid[0], feature_dim

    def lowered(self, precision: str) -> "Tower":
        """Matrices kept in the precision that autocast would cast them to at every call; norms and embeddings stay in
        float32."""
        if precision != "fp32":
            convert_weights_to_lp(self, DTYPES[precision])
        return self


class ClipTower(Tower):
    """An open_clip vision transformer; its features are projected, as the class token's are for the contrast with text."""

    def __init__(self, visual: nn.Module):
        if fault := unlike_clip(visual):
            raise UserError(f"The teacher must be a CLIP vision transformer with a class token (such as ViT-B-16): {fault}.")
        super().__init__(visual, visual.image_size, visual.grid_size, visual.proj.shape[1])
        if type(visual.conv1) is nn.Conv2d:  # and not a stem
            visual.conv1.__class__ = Patches

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.visual._embeds(images)
        for block in self.visual.transformer.resblocks:
            query, keys, values = in_heads(block, tokens)
            mixed = nn.functional.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
            tokens = tokens + block.ls_1(block.attn.out_proj(mixed))
            tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
        importance = mean_attention(query[:, :, :1], keys)[:, 1:]
        return self.visual.ln_post(tokens) @ self.visual.proj.to(tokens.dtype), importance


def unlike_clip(visual: nn.Module) -> str | None:
    """Why an image tower cannot be read as OpenAI's; None when it can."""
    if not isinstance(visual, VisionTransformer):
        return f"{type(visual).__name__} has no class token"
    if visual.attn_pool is not None:
        return "this one sums up an image by attention queries, not by its class token"
    if visual.pool_type != "tok":
        return "this one sums up an image by the mean of its patches, and its class token was never taught to"
    if any(type(block) is not ResidualAttentionBlock for block in visual.transformer.resblocks):
        return "this one has blocks of another kind"
    return None


def in_heads(block: nn.Module, tokens: Tensor) -> Tensor:
    """(3, B, heads, 1+N, D/heads): queries, keys and values of a block, by one product. nn.MultiheadAttention, which holds
    the weights, has a fast way too, but not under autocast; this one serves every precision, and the importance."""
    batch, length, _ = tokens.shape
    projected = nn.functional.linear(block.ln_1(tokens), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return projected.view(batch, length, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)


def mean_attention(query: Tensor, keys: Tensor) -> Tensor:
    """query (B, heads, 1, d), keys (B, heads, L, d) -> (B, L) softmax over L, mean over heads: one query, never the matrix;
    float32 whatever the autocast."""
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ keys.float().transpose(-2, -1) * query.shape[-1] ** -0.5
    return logits.softmax(dim=-1).mean(dim=1).squeeze(1)


def build_visual(embed_dim: int, vision_cfg: dict, quick_gelu: bool = False) -> nn.Module:
    """The image tower of open_clip's own classes that one of its model configurations describes."""
    return CLIP(embed_dim, vision_cfg, NO_TEXT, quick_gelu).visual


def build_text(embed_dim: int, text_cfg: dict, quick_gelu: bool = False) -> CLIP:
    """The text tower alone of a model configuration: a CLIP of open_clip's that encodes texts and has no `visual`."""
    model = CLIP(embed_dim, NO_VISION, text_cfg, quick_gelu)
    del model.visual
    return model


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
    write_checked(folder / "teacher.json", {"kind": "none"})


def save_teacher(folder: Path, model: nn.Module, config: dict) -> None:
    """teacher.safetensors (the image tower under `visual.`; a teacher trained here has its text tower beside it) and
    teacher.json, which says how to build the model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "teacher.safetensors", model.state_dict())
    write_checked(folder / "teacher.json", config)


def read_config(folder: Path) -> dict:
    """teacher.json. Raises UserError when no teacher was made."""
    config = read_checked(Path(folder) / "teacher.json", kind=str)
    if config["kind"] == "none":
        raise UserError(
            f"{folder} holds no teacher: pretrain.weights was set when it was made. Set it to null and run `dvc repro`."
        )
    return config


@contextlib.contextmanager
def misfits_said(folder: Path) -> Iterator[None]:
    """Turn what torch and open_clip raise over a teacher.json that describes no model, or not that of the weights beside
    it, into an error that names the folder."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, AssertionError, RuntimeError) as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
        raise UserError(
            f"{folder}: teacher.json and teacher.safetensors make no teacher ({said}). Delete it and run `dvc repro` again."
        ) from None


def tiny_config(tiny: TinyClip, model: Model, token_ids: list[int]) -> dict:
    """teacher.json of a teacher that is trained here, for students of this size."""
    return {
        "kind": "tiny",
        "tiny": vars(tiny),
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "token_ids": token_ids,
    }


def load_teacher(folder: Path) -> tuple[CLIP, Tokenizer, dict]:
    """Both towers of a teacher that was trained here, frozen and in evaluation mode, with tokenizer and config."""
    config = read_config(folder)
    if config["kind"] != "tiny":
        raise UserError(f"{folder} holds an image tower and no text tower: a released teacher is asked for features alone.")
    weights = load_weights(Path(folder) / "teacher.safetensors")
    with misfits_said(folder):
        tokenizer = Tokenizer(config["tiny"]["context_length"], config["token_ids"])
        model = build_tiny(TinyClip(**config["tiny"]), config["image_size"], config["patch_size"], len(tokenizer))
        model.load_state_dict(weights)
    return model.eval().requires_grad_(False), tokenizer, config


def embed_classes(model: CLIP, tokenizer: Tokenizer, wording: Wording, shown: bool = False) -> Tensor:
    """(K, D) float32, on the CPU: of each class the unit mean of the unit text features of its name in the prompts."""
    rows, device = [], model.token_embedding.weight.device
    with torch.no_grad():
        for name in track(wording.names, "texts of the classes", len(wording.names)) if shown else wording.names:
            tokens = tokenizer([prompt.format(name) for prompt in wording.prompts]).to(device)
            features = model.encode_text(tokens, normalize=True)
            rows.append(nn.functional.normalize(features.mean(dim=0), dim=0).float().cpu())
    return torch.stack(rows)
