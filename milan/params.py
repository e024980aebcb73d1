"""params.yaml -> frozen dataclasses: every key of a recipe, and what it may be. An unknown key, a missing key or an
impossible value stops the run before any work, naming the key and the nearest valid one (milan/core/typed.py).

Numbers may be written unreduced, with their reason: `lr: 1.5e-4 * 4096 / 256`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from milan.core.errors import UserError
from milan.core.typed import build, choice, nearest

POSITIVE = {"above": 0}
COUNT = {"least": 0}
SHARE = {"least": 0, "most": 1}
FEW = {"above": 0, "most": 65536}  # processes, pixels of a side, channels: what nobody has more of
MANY = {"above": 0, "most": 10**8}  # images
SEED = {"least": 0, "most": 2**31 - 1}
SIDE = {"least": 16, "most": 4096}  # pixels of a picture of the built-in world
SOME = {"some": True, "distinct": True}
BETAS = {"length": 2, "least": 0, "below": 1}
RAND_AUGMENT = r"rand(-(m|n|mmax|inc)[0-9]{1,3}|-(mstd|p)[0-9]{1,3}([.][0-9]+)?|-t(weights|3aw|3a))+"  # timm's words
CROP = {"length": 2, "above": 0, "most": 1, "ordered": True}  # smallest and largest share of the area


@dataclass(frozen=True)
class Compute:
    """What changes the last bits of a result."""

    device: str = choice("auto", "cpu", "cuda")
    threads: int = field(metadata=FEW)
    precision: str = choice("auto", "fp32", "bf16", "fp16")
    deterministic: bool
    compile: bool


@dataclass(frozen=True)
class Runtime:
    """Where it runs, which like the hardware itself is recorded (in MLflow) and no reason to run again.

    Loader workers and saves change nothing. The number of processes (on each node) and of nodes changes the order of
    sums, and so the last bits of a result; a run may be continued with another. One thing follows it knowingly:
    segmentation's batch norm on GPUs (see stages/segment.py)."""

    processes: int = field(metadata=FEW)
    nodes: int = field(metadata=FEW)
    workers: int = field(metadata=COUNT)
    save_seconds: float = field(metadata=COUNT)


@dataclass(frozen=True)
class Data:
    imagenet: str | None
    ade20k: str | None

    def __post_init__(self):
        for name, folder in vars(self).items():
            if folder is not None and not folder.strip():
                raise ValueError(f"{name}: an empty path; give the folder of the data, or null for the built-in world")


@dataclass(frozen=True)
class ImagenetCounts:
    """What a complete set holds."""

    train: int = field(metadata=POSITIVE)
    val: int = field(metadata=POSITIVE)
    classes: int = field(metadata=POSITIVE)


@dataclass(frozen=True)
class SceneCounts:
    train: int = field(metadata=POSITIVE)
    val: int = field(metadata=POSITIVE)


@dataclass(frozen=True)
class PrepareImagenet:
    seed: int = field(metadata=SEED)
    world: str = choice("small", "large")
    train: int = field(metadata=MANY)
    val: int = field(metadata=MANY)
    pairs: int = field(metadata={"least": 0, "most": 10**8})
    size: int | None = field(metadata=SIDE)
    short_side: int | None = field(metadata=POSITIVE)
    shard_images: int = field(metadata=POSITIVE)
    expect: ImagenetCounts | None


@dataclass(frozen=True)
class PrepareAde20k:
    seed: int = field(metadata=SEED)
    world: str = choice("small", "large")
    train: int = field(metadata=MANY)
    val: int = field(metadata=MANY)
    size: int | None = field(metadata=SIDE)
    classes: int = field(metadata={"above": 0, "most": 254})  # a byte of a mask, without 255 and the unlabelled
    shard_images: int = field(metadata=POSITIVE)
    expect: SceneCounts | None


@dataclass(frozen=True)
class TransformerSize:
    embed_dim: int = field(metadata=FEW)
    depth: int = field(metadata=FEW)
    num_heads: int = field(metadata=FEW)

    def __post_init__(self):
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads} and of 4")


@dataclass(frozen=True)
class Model:
    name: str
    image_size: int = field(metadata=FEW)
    patch_size: int = field(metadata=FEW)
    encoder: TransformerSize
    decoder: TransformerSize

    def __post_init__(self):
        if self.image_size % self.patch_size:
            below = max(self.image_size // self.patch_size, 1) * self.patch_size
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}; "
                f"the nearest are {below} and {below + self.patch_size}"
            )

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def n_patches(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class Training:
    """What every training stage has. batch_size is the global batch of one optimizer step;
    micro_batch is what one process computes at a time (the rest is accumulation)."""

    epochs: float = field(metadata=POSITIVE)
    warmup_epochs: float = field(metadata=COUNT)
    batch_size: int = field(metadata=POSITIVE)
    micro_batch: int = field(metadata=POSITIVE)
    lr: float = field(metadata=POSITIVE)
    min_lr: float = field(metadata=COUNT)
    weight_decay: float = field(metadata=COUNT)
    clip_grad: float | None = field(metadata=POSITIVE)

    def __post_init__(self):
        if self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of micro_batch {self.micro_batch}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be fewer than epochs {self.epochs}")


@dataclass(frozen=True)
class TinyClip:
    """The image and text towers of the teacher that is trained here, in open_clip's terms."""

    embed_dim: int = field(metadata=FEW)
    width: int = field(metadata=FEW)
    layers: int = field(metadata=FEW)
    head_width: int = field(metadata=FEW)
    conv_stem: bool
    text_width: int = field(metadata=FEW)
    text_heads: int = field(metadata=FEW)
    text_layers: int = field(metadata=FEW)
    context_length: int = field(metadata=FEW)

    def __post_init__(self):
        for name, width, part in (("width", self.width, self.head_width), ("text_width", self.text_width, self.text_heads)):
            if width % part:
                other = "head_width" if name == "width" else "text_heads"
                raise ValueError(f"{name} {width} is no multiple of {other} {part}")


@dataclass(frozen=True)
class Pretrained:
    """A released teacher: a model of open_clip's or timm's with the tag of its weights, or with a local file."""

    library: str = choice("open_clip", "timm")
    model: str
    tag: str | None
    file: str | None
    sha256: str | None

    def __post_init__(self):
        if not (self.tag or self.file or (self.library == "timm" and "." in self.model)):
            raise ValueError("give the tag of the weights (such as openai), or their file")
        if self.sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.sha256):
            raise ValueError(f"sha256 {self.sha256!r} is no SHA-256: 64 hexadecimal digits (null: not checked)")


@dataclass(frozen=True)
class Teacher(Training):
    seed: int = field(metadata=SEED)
    betas: list[float] = field(metadata=BETAS)
    crop_scale: list[float] = field(metadata=CROP)
    tiny: TinyClip | None
    pretrained: Pretrained | None

    def __post_init__(self):
        super().__post_init__()
        if (self.tiny is None) == (self.pretrained is None):
            raise ValueError("give either tiny (a teacher trained here) or pretrained (a released one), not both")


@dataclass(frozen=True)
class ExtractTargets:
    seed: int = field(metadata=SEED)
    views: int = field(metadata=COUNT)
    batch_size: int = field(metadata=POSITIVE)
    shard_images: int = field(metadata=POSITIVE)
    figure_images: int = field(metadata=POSITIVE)
    normalisation: str = choice("imagenet", "clip")


@dataclass(frozen=True)
class AblationRow:
    """One row of the paper's ablation."""

    target: str = choice("none", "pixels", "clip")
    decoder: str = choice("none", "mae", "prompt")
    masking: str = choice("none", "random", "semantic")

    def __post_init__(self):
        words = (self.target, self.decoder, self.masking)
        if "none" in words and set(words) != {"none"}:
            raise ValueError("target, decoder and masking are either all `none` (no pretraining) or none of them is")
        if self.decoder == "prompt" and self.target == "pixels":
            raise ValueError("the prompting decoder predicts CLIP features of all tokens; use target: clip")


@dataclass(frozen=True)
class Pretrain(Training):
    weights: str | None
    betas: list[float] = field(metadata=BETAS)
    mask_ratio: float = field(metadata={"above": 0, "below": 1})
    crop_scale: list[float] = field(metadata=CROP)
    ablation: dict[str, AblationRow]

    def __post_init__(self):
        super().__post_init__()
        for name in self.ablation:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"ablation: {name!r} names folders, so it may hold only letters, digits and . _ -")


@dataclass(frozen=True)
class LinearEval(Training):
    optimizer: str = choice("lars", "adamw")
    momentum: float = field(metadata=SHARE)
    crop_scale: list[float] = field(metadata=CROP)
    views: int = field(metadata=COUNT)
    resize: int = field(metadata=POSITIVE)


@dataclass(frozen=True)
class Finetune(Training):
    labels: float = field(metadata={"above": 0, "most": 1})
    betas: list[float] = field(metadata=BETAS)
    layer_decay: float = field(metadata={"above": 0, "most": 1})
    drop_path: float = field(metadata=SHARE)
    crop_scale: list[float] = field(metadata=CROP)
    rand_augment: str | None
    mixup: float = field(metadata=COUNT)
    cutmix: float = field(metadata=COUNT)
    label_smoothing: float = field(metadata=SHARE)
    random_erasing: float = field(metadata=SHARE)
    pooling: str = choice("mean", "cls")
    resize: int = field(metadata=FEW)

    def __post_init__(self):
        super().__post_init__()
        if self.rand_augment is not None and not re.fullmatch(RAND_AUGMENT, self.rand_augment):
            raise ValueError(f"rand_augment {self.rand_augment!r} is none of timm's, such as rand-m9-mstd0.5-inc1 (null: none)")


@dataclass(frozen=True)
class Segment(Training):
    crop_size: int = field(metadata=POSITIVE)
    stride: int = field(metadata=POSITIVE)
    resize: list[int] = field(metadata={"length": 2, "above": 0})
    resize_ratio: list[float] = field(metadata={"length": 2, "above": 0, "ordered": True})
    max_class_share: float = field(metadata=SHARE)
    photometric: bool
    betas: list[float] = field(metadata=BETAS)
    layer_decay: float = field(metadata={"above": 0, "most": 1})
    drop_path: float = field(metadata=SHARE)
    channels: int = field(metadata=POSITIVE)
    aux_channels: int = field(metadata=POSITIVE)
    out_blocks: list[int]


@dataclass(frozen=True)
class Report:
    published: str


@dataclass(frozen=True)
class Params:
    scale: str
    seeds: list[int] = field(metadata={**SOME, **SEED})
    variants: list[str] = field(metadata=SOME)
    compute: Compute
    runtime: Runtime
    data: Data
    model: Model
    prepare_imagenet: PrepareImagenet
    prepare_ade20k: PrepareAde20k
    teacher: Teacher
    extract_targets: ExtractTargets
    pretrain: Pretrain
    linear_eval: LinearEval
    finetune: Finetune
    segment: Segment
    report: Report

    def __post_init__(self):
        for variant in self.variants:
            if variant not in self.pretrain.ablation:
                known = ", ".join(self.pretrain.ablation)
                raise ValueError(
                    f"variants: {variant!r} is no row of pretrain.ablation{nearest(variant, self.pretrain.ablation)}; there are {known}"
                )
        if self.segment.crop_size % self.model.patch_size:
            raise ValueError(f"segment.crop_size {self.segment.crop_size} is no multiple of the patch size")
        if self.segment.crop_size < 2 * self.model.patch_size:
            raise ValueError(
                f"segment.crop_size {self.segment.crop_size} must be two patches of {self.model.patch_size} at least"
            )
        self.check_masking()
        self.check_stem()
        blocks = self.segment.out_blocks
        if len(blocks) != 4 or sorted(set(blocks)) != blocks or not 0 <= blocks[0] <= blocks[3] < self.model.encoder.depth:
            raise ValueError(
                f"segment.out_blocks {blocks} must be four increasing blocks of the encoder's {self.model.encoder.depth}, from 0"
            )
        for name in ("pretrain", "linear_eval", "finetune", "segment"):
            self.check_shares(name, getattr(self, name))
        if self.teacher.tiny and self.teacher.batch_size % self.world:
            raise ValueError(
                f"teacher.batch_size {self.teacher.batch_size} cannot be shared by {self.world} processes: change it or "
                "runtime.processes"
            )
        if (self.finetune.mixup or self.finetune.cutmix) and self.finetune.micro_batch % 2:
            raise ValueError(f"finetune.micro_batch {self.finetune.micro_batch} must be even: mixup mixes pairs")
        if self.segment.micro_batch < 2:
            raise ValueError("segment.micro_batch must be at least 2: its batch norm has no variance over one image")

    @property
    def world(self) -> int:
        """Processes on all nodes."""
        return self.runtime.processes * self.runtime.nodes

    @property
    def no_teacher(self) -> bool:
        """A released student is only evaluated, so that nothing asks for the released teacher."""
        return bool(self.pretrain.weights and self.teacher.pretrained)

    def check_masking(self) -> None:
        kept = int(self.model.n_patches * (1 - self.pretrain.mask_ratio))  # as in milan/method/masking.py
        if not 0 < kept < self.model.n_patches:
            raise ValueError(
                f"pretrain.mask_ratio {self.pretrain.mask_ratio} leaves {kept} of {self.model.n_patches} patches visible: "
                "some must be, and some not"
            )

    def check_stem(self) -> None:
        """The group norms of the teacher's stem (milan/teacher/clip.py) have 8 groups in each of its halvings."""
        tiny = self.teacher.tiny
        for halving in range(self.model.patch_size.bit_length() - 1) if tiny and tiny.conv_stem else ():
            channels = max(tiny.width >> halving, 32)
            if channels % 8:
                raise ValueError(
                    f"teacher.tiny.width {tiny.width} makes a stem layer of {channels} channels, no multiple of 8: take a "
                    f"multiple of {4 * self.model.patch_size}, or set teacher.tiny.conv_stem to false"
                )

    def check_shares(self, name: str, training: Training) -> None:
        micro_batches = training.batch_size // training.micro_batch
        if micro_batches % self.world:
            raise ValueError(
                f"{name}.batch_size {training.batch_size} makes {micro_batches} micro-batches of {training.micro_batch}, which "
                f"{self.world} processes cannot share evenly: change {name}.micro_batch or runtime.processes"
            )


def read_params(path: str | Path = "params.yaml") -> Params:
    """The whole recipe, checked. Raises UserError naming the key at fault."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the repository's root (git checkout -- {path} restores it).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Give the path of a recipe, a YAML file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueErrors: bytes, dates and numbers that are none
        raise UserError(f"{path} is no valid YAML: {error}") from None
    return build(Params, tree, str(path))
