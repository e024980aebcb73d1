"""The recipe: every section and key of params.yaml, its meaning, its unit and its valid values.

A section is a stage or something that several stages share. Sizes count pixels unless a comment says otherwise.
Published values and their sources are in conf/scale/paper.yaml; milan/core/validation.py reports what is wrong in a recipe.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from milan.core.errors import UserError, nearest
from milan.core.identity import flatten
from milan.core.validation import Bool, Float, Int, Section, Text, must, validate

Positive = Annotated[Int, Field(gt=0)]
Count = Annotated[Int, Field(ge=0)]
Few = Annotated[Int, Field(gt=0, le=65536)]  # processes, pixels of a side, channels: nobody has more
Images = Annotated[Int, Field(gt=0, le=10**8)]
Seed = Annotated[Int, Field(ge=0, le=2**31 - 1)]
Side = Annotated[Int, Field(ge=16, le=4096)]  # pixels of a picture of the built-in world
Above0 = Annotated[Float, Field(gt=0)]
AtLeast0 = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
ShareAbove0 = Annotated[Float, Field(gt=0, le=1)]
Below1 = Annotated[Float, Field(ge=0, lt=1)]
Pair = Field(min_length=2, max_length=2)
Ascending = must(lambda values: sorted(values) == values, "{} must not fall: the smallest comes first")
Distinct = must(lambda values: len(set(values)) == len(values), "{} names one of them twice")
Betas = Annotated[list[Below1], Strict(), Pair]  # of Adam
CropScale = Annotated[list[ShareAbove0], Strict(), Pair, Ascending]  # smallest and largest share of the area
WrittenOut = must(lambda path: not path.startswith("~"), "{!r}: write your home folder out; only a shell knows ~, at the start of a word")
Folder = Annotated[Text, must(str.strip, "an empty path; give the folder of the data, or null for the built-in world"), WrittenOut]
SetFolder = Annotated[Text, must(str.strip, "an empty path; give the folder of the set, or null to leave it out"), WrittenOut]
Sha256 = Annotated[Text, must("[0-9a-fA-F]{64}", "{!r} is no SHA-256: 64 hexadecimal digits (null: not checked)")]
TIMM = r"rand(-(m|n|mmax|inc)[0-9]{1,3}|-(mstd|p)[0-9]{1,3}([.][0-9]+)?|-t(weights|3aw|3a))+"
RandAugment = Annotated[Text, must(TIMM, "{!r} is none of timm's, such as rand-m9-mstd0.5-inc1 (null: none)")]
Name = Annotated[Text, must(r"\w[\w.-]*", "{!r} names folders, so it may hold only letters, digits and . _ -")]
VariantName = Annotated[
    Text,
    must(
        r"(?!((?i:latest)|[vV]\d+)$)\w[\w-]{0,49}",
        "{!r} names folders and, in MLflow, models and aliases, so it may hold only letters, digits, _ and -, 50 in all, and be "
        "neither latest nor a version such as v2",
    ),
]
World = Literal["small", "large"]  # the built-in worlds, milan/ingest/world/drawing.py
Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class Compute(Section):
    """Settings that change the last bits of a result."""

    device: Literal["auto", "cpu", "cuda"]
    threads: Few  # of each process
    precision: Literal["auto", "fp32", "bf16", "fp16"]  # auto: by the hardware (milan/training/device.py)
    deterministic: Bool
    compile: Bool  # torch.compile


@dataclass(frozen=True)
class Runtime(Section):
    """Execution settings: logged to MLflow; changing them reruns nothing.

    `processes` changes the order of sums, and so the last bits of a result; a run may be continued with another number.
    On GPUs it also sets the batch of segmentation's batch norm (see stages/segment.py)."""

    processes: Few  # on this machine; where torchrun started the stage, its world size counts instead
    workers: Annotated[Int, Field(ge=0, le=1024)]  # loader processes of each process
    save_seconds: AtLeast0  # seconds between two saves of a training's state


@dataclass(frozen=True)
class RobustnessSets(Section):
    """Unpacked folders of the robustness sets; null: left out."""

    imagenet_a: SetFolder | None
    imagenet_r: SetFolder | None
    imagenet_sketch: SetFolder | None
    imagenet_v2: SetFolder | None
    imagenet_c: SetFolder | None  # null: validation images are corrupted here (prepare_robustness.images)


@dataclass(frozen=True)
class Data(Section):
    """Folders of real data; null: the built-in world."""

    name: Name  # of outs/<name>, reports/metrics/<name> and MLflow's experiment; in conf/: the folder's name, else the scale
    imagenet: Folder | None
    ade20k: Folder | None
    robustness: RobustnessSets

    @property
    def title(self) -> str:
        """What tables and figures call the images."""
        return self.name if self.imagenet else "the built-in world"


@dataclass(frozen=True)
class SceneCounts(Section):
    train: Positive
    val: Positive


@dataclass(frozen=True)
class ImagenetCounts(SceneCounts):
    classes: Positive


@dataclass(frozen=True)
class PrepareImagenet(Section):
    """The images of pretraining, linear evaluation and fine-tuning, and the captioned pairs of a teacher trained here."""

    seed: Seed  # of the built-in world
    world: World
    train: Images  # images to draw
    val: Images
    holdout: Annotated[Float, Field(gt=0, lt=1)] | None  # share of real images for validation, where the set has none for it
    pairs: Annotated[Int, Field(ge=0, le=10**8)]  # captioned images, for the teacher alone
    size: Side | None  # of a drawn image; null: only real data will do
    short_side: Positive | None  # larger images are shrunk to it; null: files are kept as they are
    shard_images: Positive  # images of a shard
    expect: ImagenetCounts | None  # refuse a set of other counts; null: take any set


@dataclass(frozen=True)
class PrepareAde20k(Section):
    """The scenes of segmentation, with a class for each pixel."""

    seed: Seed
    world: World
    train: Images
    val: Images
    size: Side | None
    classes: Annotated[Int, Field(gt=0, le=254)]  # a mask's byte without 255 and the unlabelled
    shard_images: Positive
    expect: SceneCounts | None


@dataclass(frozen=True)
class PrepareRobustness(Section):
    """The images of `robustness`: the sets of data.robustness, and validation images that are corrupted here."""

    seed: Seed  # of the noise
    images: Annotated[Int, Field(ge=0, le=10**6)]  # of each class, to corrupt; 0, or data.robustness.imagenet_c: none
    shard_images: Positive


@dataclass(frozen=True)
class TransformerSize(Section):
    """A stack of transformer blocks, in timm's terms."""

    embed_dim: Few  # channels of a token
    depth: Few  # blocks
    num_heads: Few

    def conflicts(self) -> Iterator[str]:
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            yield f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads} and of 4"


@dataclass(frozen=True)
class Model(Section):
    """The ViT encoder and the decoder of pretraining (paper: ViT-B/16, and a decoder of 8 blocks of 512 channels)."""

    name: Text
    image_size: Few
    patch_size: Few
    encoder: TransformerSize
    decoder: TransformerSize

    def conflicts(self) -> Iterator[str]:
        size, patch = self.image_size, self.patch_size
        if size % patch:
            below = max(size // patch, 1) * patch
            yield f"image_size {size} is no multiple of patch_size {patch}; the nearest are {below} and {below + patch}"

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def n_patches(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class Training(Section):
    """The keys that all training stages share. Schedule: linear warm-up, then cosine decay (segment, dense_probe:
    linear decay)."""

    epochs: Above0  # passes over the training images
    warmup_epochs: AtLeast0
    batch_size: Positive  # images of one optimizer step, over all processes
    micro_batch: Positive  # images that one process computes at a time; the rest is accumulated
    lr: Above0  # peak learning rate of this batch; published as base rate * batch_size / 256
    min_lr: AtLeast0  # at the end of the decay
    weight_decay: AtLeast0
    clip_grad: Above0 | None  # largest norm of the gradient; null: not clipped

    def conflicts(self) -> Iterator[str]:
        if self.batch_size % self.micro_batch:
            yield f"batch_size {self.batch_size} is no multiple of micro_batch {self.micro_batch}"
        if self.warmup_epochs >= self.epochs:
            yield f"warmup_epochs {self.warmup_epochs} must be fewer than epochs {self.epochs}"


@dataclass(frozen=True)
class TinyClip(Section):
    """The image and text towers of the teacher that is trained here, in open_clip's terms."""

    embed_dim: Few  # of the space that both towers share
    width: Few  # of the image tower, as layers and head_width
    layers: Few
    head_width: Few
    conv_stem: Bool  # convolutions in place of the patch embedding
    text_width: Few
    text_heads: Few
    text_layers: Few
    context_length: Few  # tokens of a caption

    def conflicts(self) -> Iterator[str]:
        if self.width % self.head_width:
            yield f"width {self.width} is no multiple of head_width {self.head_width}"
        if self.text_width % self.text_heads:
            yield f"text_width {self.text_width} is no multiple of text_heads {self.text_heads}"


@dataclass(frozen=True)
class Pretrained(Section):
    """A released teacher: a model of open_clip or timm, with the tag of its weights or a local file, or the file of a small
    CLIP that this pipeline trained (library milan), which describes its own model."""

    library: Literal["open_clip", "timm", "milan"]
    model: Text | None  # null with library milan
    tag: Text | None
    file: Text | None
    sha256: Sha256 | None  # of the weights, in hex; null: not checked

    def conflicts(self) -> Iterator[str]:
        if self.library == "milan":
            if not self.file or self.model or self.tag:
                yield "library milan takes a file, which describes its own model; set model and tag to null"
        elif not self.model:
            yield f"give the model, by {self.library}'s name for it"
        elif not (self.tag or self.file or (self.library == "timm" and "." in self.model)):
            yield "give the tag of the weights (such as openai), or their file"


@dataclass(frozen=True)
class Teacher(Training):
    """The CLIP teacher: one trained here on the captioned pairs, or a released one (paper: OpenAI's ViT-B/16)."""

    seed: Seed
    betas: Betas
    crop_scale: CropScale
    tiny: TinyClip | None
    pretrained: Pretrained | None

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if (self.tiny is None) == (self.pretrained is None):
            yield "give either tiny (a teacher trained here) or pretrained (a released one), not both"


@dataclass(frozen=True)
class ExtractTargets(Section):
    """The target bank: the teacher's features and importance of fixed crops of each training image."""

    seed: Seed
    views: Count  # crops of an image; 0, as published: no bank, the teacher looks at a new crop every epoch
    batch_size: Positive  # images that one process computes at a time
    shard_images: Positive
    figure_images: Positive  # validation images whose features are kept for the figures
    normalisation: Literal["imagenet", "clip"]  # of what the teacher sees; as released: imagenet, the student's


@dataclass(frozen=True)
class AblationRow(Section):
    """A row of the paper's ablation; all `none`: a random encoder."""

    target: Literal["none", "pixels", "clip"]  # clip: the teacher's features
    decoder: Literal["none", "mae", "prompt"]
    masking: Literal["none", "random", "semantic"]

    def conflicts(self) -> Iterator[str]:
        words = (self.target, self.decoder, self.masking)
        if "none" in words and set(words) != {"none"}:
            yield "target, decoder and masking are either all `none` (no pretraining) or none of them is"
        if self.decoder == "prompt" and self.target == "pixels":
            yield "the prompting decoder predicts CLIP features of all tokens; use target: clip"


@dataclass(frozen=True)
class Pretrain(Training):
    """Masked pretraining by AdamW (the release's PRETRAIN.sh)."""

    weights: Text | None  # a released checkpoint, evaluated instead of training one
    betas: Betas
    mask_ratio: Annotated[Float, Field(gt=0, lt=1)]  # share of the patches that the encoder does not see
    crop_scale: CropScale
    monitor_epochs: AtLeast0  # epochs between two values of k-NN and RankMe on a fixed set of images; 0: none
    ablation: dict[VariantName, AblationRow]  # variants by name


@dataclass(frozen=True)
class ImageTraining(Training):
    """The keys that the stages on labelled images share."""

    crop_scale: CropScale
    resize: Few  # short side of a validation image before the central crop


@dataclass(frozen=True)
class LinearEval(ImageTraining):
    """A linear probe on the frozen encoder's class token (the release's main_linprobe.py and FINETUNE.sh)."""

    labels: ShareAbove0  # share of each class's training labels in use, by the nearest neighbours too; 1: all
    eval_epochs: AtLeast0  # epochs between two evaluations during the training, for the best of them; 0: after it alone
    optimizer: Literal["lars", "adamw"]
    momentum: Below1  # of LARS; of AdamW the first beta
    views: Count  # 0, as published: a new crop every epoch; above 0: features of so many fixed crops, extracted once


@dataclass(frozen=True)
class AttentiveProbe(ImageTraining):
    """A block of cross-attention with a learned query on all tokens of the frozen encoder, and a linear layer (V-JEPA)."""

    betas: Betas
    views: Count  # as linear_eval's; in memory a crop takes 4 bytes x tokens x channels


@dataclass(frozen=True)
class Finetune(ImageTraining):
    """End-to-end fine-tuning by AdamW (the release's FINETUNE.sh); augmentation by timm."""

    labels: ShareAbove0  # share of the training labels in use
    betas: Betas
    layer_decay: ShareAbove0  # factor of the learning rate from a block to the one below it
    drop_path: Below1  # of the last block; the first has 0 (stochastic depth)
    rand_augment: RandAugment | None
    mixup: AtLeast0  # alpha of mixup; 0: off
    cutmix: AtLeast0  # alpha of cutmix; 0: off
    label_smoothing: Below1
    random_erasing: Share  # probability
    pooling: Pooling  # of the tokens, before the head
    eval_epochs: AtLeast0  # epochs between two evaluations during the training, for the best of them; 0: after it alone


@dataclass(frozen=True)
class SceneTraining(Training):
    """The keys that the stages on scenes share: crops as mmsegmentation's ADE20K pipeline draws them, and AdamW."""

    crop_size: Few
    stride: Few  # of the sliding window, in evaluation
    resize: Annotated[list[Few], Strict(), Pair]  # long and short side of a scene before the random scale
    resize_ratio: Annotated[list[Above0], Strict(), Pair, Ascending]  # smallest and largest random scale
    max_class_share: Share  # of a crop: crops with more of one class are drawn again
    photometric: Bool  # distortion of brightness, contrast, saturation and hue
    betas: Betas
    scales: Annotated[list[Above0], Strict(), Field(min_length=1), Distinct]  # factors of `resize` in evaluation
    flip: Bool  # evaluate the mirrored scenes too; the probabilities of all passes are averaged


@dataclass(frozen=True)
class Segment(SceneTraining):
    """UPerNet on the encoder (mmsegmentation, configs/mae)."""

    layer_decay: ShareAbove0
    drop_path: Below1
    channels: Few  # of UPerNet
    aux_channels: Few  # of the auxiliary head
    out_blocks: Annotated[list[Int], Strict()]  # the encoder's blocks that UPerNet reads, from 0


@dataclass(frozen=True)
class DenseProbe(SceneTraining):
    """Batch norm and one linear layer on the frozen encoder's patch features (DINOv2, section 7.4, "linear")."""

    views: Count  # 0, as published: a new crop every epoch; above 0: features of so many fixed crops, extracted once


@dataclass(frozen=True)
class Robustness(Section):
    """Top-1 of the fine-tuned classifier and of the linear layer on the robustness sets."""

    micro_batch: Positive  # images that one process computes at a time
    resize: Few  # short side of an image before the central crop; ImageNet-C's are not resized


@dataclass(frozen=True)
class Report(Section):
    published: Text  # CSV of published results, for the table


@dataclass(frozen=True)
class Params(Section):
    """A whole recipe."""

    scale: Name  # its name: the file of conf/scale
    seeds: Annotated[list[Seed], Strict(), Field(min_length=1), Distinct]  # of the training stages
    variants: Annotated[list[Text], Strict(), Field(min_length=1), Distinct]  # rows of pretrain.ablation to run
    compute: Compute
    runtime: Runtime
    data: Data
    model: Model
    prepare_imagenet: PrepareImagenet
    prepare_ade20k: PrepareAde20k
    prepare_robustness: PrepareRobustness
    teacher: Teacher
    extract_targets: ExtractTargets
    pretrain: Pretrain
    linear_eval: LinearEval
    attentive_probe: AttentiveProbe
    finetune: Finetune
    segment: Segment
    dense_probe: DenseProbe
    robustness: Robustness
    report: Report

    @property
    def world_size(self) -> int:
        """Processes of a training: torchrun's where it started this stage, else runtime.processes."""
        by_torchrun = "LOCAL_RANK" in os.environ  # which a cluster does not set by itself, as it may WORLD_SIZE
        return int(os.environ["WORLD_SIZE"]) if by_torchrun else self.runtime.processes

    @property
    def world(self) -> World | None:
        """The built-in world of the images; None for images of data.imagenet."""
        return None if self.data.imagenet else self.prepare_imagenet.world

    @property
    def no_teacher(self) -> bool:
        """Whether a released student is only evaluated, so that nothing asks for the released teacher."""
        return bool(self.pretrain.weights and self.teacher.pretrained)

    def conflicts(self) -> Iterator[str]:
        rows, patch, segment, finetune = self.pretrain.ablation, self.model.patch_size, self.segment, self.finetune
        for variant in self.variants:
            if variant not in rows:
                yield f"variants: {variant!r} is no row of pretrain.ablation{nearest(variant, rows)}; there are {', '.join(rows)}"
        size = self.model.image_size
        sides = {f"{name}.resize": getattr(self, name).resize for name in (*stages_of(ImageTraining), "robustness")}
        if below := [f"{key} {side}" for key, side in sides.items() if side < size]:
            verb = "is" if len(below) == 1 else "are"
            yield f"{', '.join(below)} {verb} below model.image_size {size}: images would be padded with black; take the same or more"
        for name in stages_of(SceneTraining):
            section = getattr(self, name)
            crop = section.crop_size
            if crop % patch:
                yield f"{name}.crop_size {crop} is no multiple of the patch size"
            if crop < 2 * patch:
                yield f"{name}.crop_size {crop} must be two patches of {patch} at least"
            if crop < size:
                yield (
                    f"{name}.crop_size {crop} is below model.image_size {size}: the encoder would see smaller images than in "
                    "pretraining; take the same or more"
                )
            if section.stride > crop:
                yield f"{name}.stride {section.stride} is above {name}.crop_size {crop}: it would leave out pixels"
        if self.prepare_imagenet.short_side and self.prepare_imagenet.size and not self.data.imagenet:
            yield "prepare_imagenet.short_side shrinks real images: set it to null, or data.imagenet to their folder"
        patches, ratio = self.model.n_patches, self.pretrain.mask_ratio
        kept = int(patches * (1 - ratio))  # as in milan/method/masking.py
        if not 0 < kept < patches:
            yield f"pretrain.mask_ratio {ratio} leaves {kept} of {patches} patches visible: some must be, and some not"
        tiny = self.teacher.tiny
        halvings = range(patch.bit_length() - 1) if tiny and tiny.conv_stem else ()  # each has a norm of 8 groups
        if odd := [channels for halving in halvings if (channels := max(tiny.width >> halving, 32)) % 8]:
            yield (
                f"teacher.tiny.width {tiny.width} makes a stem layer of {odd[0]} channels, no multiple of 8: take a "
                f"multiple of {4 * patch}, or set teacher.tiny.conv_stem to false"
            )
        blocks, depth = segment.out_blocks, self.model.encoder.depth
        if len(blocks) != 4 or sorted(set(blocks)) != blocks or not 0 <= blocks[0] <= blocks[3] < depth:
            yield f"segment.out_blocks {blocks} must be four increasing blocks of the encoder's {depth}, from 0"
        world_size, batch = self.world_size, self.teacher.batch_size
        for name in stages_of(Training):
            training = getattr(self, name)
            if isinstance(training, Teacher):  # whose contrast takes each process's share of a batch at once
                continue
            micro_batches = training.batch_size // training.micro_batch
            if micro_batches % world_size:
                yield (
                    f"{name}.batch_size {training.batch_size} makes {micro_batches} micro-batches of {training.micro_batch}, "
                    f"which {world_size} processes cannot share evenly: change {name}.micro_batch or runtime.processes"
                )
        if self.teacher.tiny and batch % world_size:
            yield f"teacher.batch_size {batch} cannot be shared by {world_size} processes: change it or runtime.processes"
        if (finetune.mixup or finetune.cutmix) and finetune.micro_batch % 2:
            yield f"finetune.micro_batch {finetune.micro_batch} must be even: mixup mixes pairs"
        for name in ("linear_eval", "segment"):
            if getattr(self, name).micro_batch < 2:
                yield f"{name}.micro_batch must be at least 2: its batch norm has no variance over one image"
        if self.teacher.tiny and batch < 2:
            yield "teacher.batch_size must be at least 2: a caption is contrasted with those of other images"


def stages_of(kind: type[Training]) -> list[str]:
    """Return the stages whose section of the recipe is of this kind, in the recipe's order."""
    return [field.name for field in fields(Params) if isinstance(field.type, type) and issubclass(field.type, kind)]


def read_params(path: str | Path = "params.yaml") -> Params:
    """Return the whole recipe, validated. Raises UserError naming the file and the keys at fault."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the repository's root (git checkout -- {path} restores it).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Give the path of a recipe, a YAML file.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueErrors: invalid bytes, dates and numbers
        raise UserError(f"{path} is no valid YAML: {error}") from None
    return validate(Params, tree, str(path))


def compose_recipe(scale: str) -> Params:
    """Compose the recipe of conf/scale/<scale>.yaml as DVC does. Raises UserError for an unknown scale or a broken recipe."""
    return validate(Params, compose_tree(scale), f"conf/scale/{scale}.yaml")


def compose_tree(scale: str) -> dict:
    """Compose the recipe of conf/scale/<scale>.yaml, not validated. Raises UserError for an unknown scale or a broken file."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known, path = sorted(path.stem for path in Path("conf/scale").glob("*.yaml")), f"conf/scale/{scale}.yaml"
    if not known:
        raise UserError("There is no conf/scale here, where the recipes are: run from the repository's root.")
    if scale not in known:  # this also keeps out names that hydra would read as syntax
        raise UserError(f"There is no scale {scale!r}; conf/scale has {', '.join(known)}.")
    with initialize_config_dir(str(Path("conf").absolute()), version_base=None):
        try:
            return OmegaConf.to_container(compose("config", overrides=[f"scale={scale}"]), resolve=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be composed: {error}") from None


def changed_settings(recipe: dict) -> dict:
    """Return {key: value} of a recipe that its scale's recipe in conf/scale has not, or has otherwise; {} where there is none.

    recipe: {dotted key: value}, redacted or not, since the scale's own values hold nothing to redact."""
    try:
        own = flatten(compose_tree(str(recipe["scale"])))
    except (UserError, KeyError):
        return {}
    return {key: value for key, value in recipe.items() if key not in own or own[key] != value}


def say_settings(changed: dict, known: Iterable[str], most: int = 3) -> str:
    """Return `mask_ratio=0.5, pretrain.epochs=4 and 2 more`: the last word of a key where no other key of `known` ends in it, a
    folder without those above it, and what changes nothing (runtime) left out."""
    ends = Counter(key.rpartition(".")[2] for key in known)
    shown = {key: value for key, value in changed.items() if not key.startswith("runtime.")}

    def say(key: str, value) -> str:
        end = key.rpartition(".")[2]
        text = Path(value).name if key.startswith("data.") and value else str(value).replace("'", "")
        return f"{end if ends[end] < 2 else key}={text}"

    said = [say(*item) for item in shown.items()]
    return ", ".join(said[:most]) + (f" and {len(said) - most} more" if len(said) > most else "")
