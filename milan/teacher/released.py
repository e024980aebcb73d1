"""A released teacher: by name and tag of open_clip or timm, or from a local file; digest verified.

Whether the model can be MILAN's teacher is known before anything is fetched. What lies in the library's own cache is
taken from there, without a network. No code of a file runs that the recipe has not named by its digest: pickles are
read with weights_only, and a TorchScript archive, as OpenAI publishes, which PyTorch says to treat as a program (its
SECURITY.md), is opened only when its SHA-256 is teacher.pretrained.sha256.
"""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import open_clip
import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from timm.models import list_pretrained
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from milan.core.errors import UserError
from milan.core.files import file_digest
from milan.core.typed import nearest
from milan.params import Pretrained
from milan.teacher.class_text import Wording, save_class_text
from milan.teacher.clip import Tokenizer, build_text, embed_classes, save_teacher
from milan.teacher.frozen import Tower, build_tower
from milan.training.foreign import check_weights, is_torchscript, read_foreign, require_file
from milan.training.weights import load_state

State = dict[str, Tensor]
TEXT_SIZES = {"context_length", "vocab_size", "width", "heads", "layers"}  # all that OpenAI's text towers differ in


@dataclass(frozen=True)
class Release:
    """Where published weights lie: at an address of the publisher's, on the hub, or both."""

    url: str | None
    cache: Path  # the library's folder for what comes from addresses
    repo: str | None
    names: tuple[str, ...]  # of the file on the hub, best first


def fetch_teacher(source: Pretrained, folder: Path, wording: Wording | None = None, device: str | torch.device = "cpu") -> None:
    """Write the released image tower into folder as teacher.safetensors and teacher.json, and what its text tower, where
    there is one, makes of the classes (class_text.py), which it is asked on this device. The text tower is not kept."""
    config = describe(source)
    path = Path(source.file) if source.file else located(source)
    verify(path, source)
    with torch.device("meta"):
        tower = build_tower(config)
    print(f"teacher: {path}", flush=True)
    state = read_state(path, named=bool(source.sha256))
    load(tower, timm_state(state, tower, path) if source.library == "timm" else image_state(state), path)
    save_teacher(folder, tower, config)
    text = text_tower(source, state, path, wording) if wording else None
    if text:
        save_class_text(folder, wording, embed_classes(text.to(device), Tokenizer(text.context_length), wording, shown=True))


def text_tower(source: Pretrained, state: State, path: Path, wording: Wording) -> nn.Module | None:
    """The text tower of a CLIP for texts as long as these, where the file has one as OpenAI's; else a line that says what that
    costs. Attention is causal, so what would follow the end of a text changes nothing, and is left out."""
    config = open_clip.get_model_config(source.model) if source.library == "open_clip" else {"text_cfg": {}}
    sizes, words = config["text_cfg"], state.get("token_embedding.weight")
    try:
        if words is None or words.shape[:1] != (len(Tokenizer(1)),) or not set(sizes) <= TEXT_SIZES:
            raise UserError(f"{path} has no text tower of OpenAI's kind.")
        length = longest(wording, sizes["context_length"])
        model = build_text(config["embed_dim"], {**sizes, "context_length": length}, config.get("quick_gelu", False))
        given = {name: state[name] for name in model.state_dict() if name in state}
        check_weights(given, path)
        short = {name: t[:length] if name == "positional_embedding" and t.ndim else t for name, t in given.items()}
        load(model, short, path)
    except UserError as error:  # an image tower is all that a teacher needs
        print(f"No zero-shot accuracies and no text heat maps with this teacher: {error}", flush=True)
        return None
    return model.eval().requires_grad_(False)


def longest(wording: Wording, most: int) -> int:
    """Tokens that no text of the wording exceeds."""
    return min(most, sum(int((Tokenizer(most)(texts) != 0).sum(dim=1).max()) for texts in wording))


def describe(source: Pretrained) -> dict:
    """teacher.json of a released model: known to its library, and such that it can be the teacher. Fetches nothing."""
    config = timm_config(source) if source.library == "timm" else open_clip_config(source)
    try:
        refuse_timm_inside(config)
        with torch.device("meta"):
            build_tower(config)
    except UserError as error:
        raise UserError(f"teacher.pretrained.model {source.model!r} cannot be the teacher. {error}") from None
    return config


def open_clip_config(source: Pretrained) -> dict:
    known = open_clip.list_models()
    if source.model not in known:
        raise UserError(
            f"teacher.pretrained.model {source.model!r} is unknown to open_clip{nearest(source.model, known)}. "
            f"It knows {', '.join(name for name in known if name.startswith('ViT'))}."
        )
    config = open_clip.get_model_config(source.model)
    release = open_clip.get_pretrained_cfg(source.model, source.tag or "")
    if release and release.get("quick_gelu", False) != config.get("quick_gelu", False):
        other = f"{source.model}-quickgelu" if release.get("quick_gelu") else source.model.removesuffix("-quickgelu")
        raise UserError(
            f"{source.model} computes another GELU than {source.tag} was trained with: set teacher.pretrained.model to {other}."
        )
    model = {name: config[name] for name in ("embed_dim", "vision_cfg", "quick_gelu") if name in config}
    return {"kind": "open_clip", "name": source.model, "model": model}


def refuse_timm_inside(config: dict) -> None:
    """open_clip also wraps models of timm's; they are taken from timm, or not at all."""
    name = config["kind"] == "open_clip" and config["model"]["vision_cfg"].get("timm_model_name")
    if name:
        build_tower({"kind": "timm", "model": name})
        raise UserError(f"Its image tower is timm's {name}: set library to timm and model to that name.")


def timm_config(source: Pretrained) -> dict:
    name, _, tag = source.model.partition(".")
    if not timm.is_model(name):
        raise UserError(
            f"teacher.pretrained.model {source.model!r} is unknown to timm{nearest(name, timm.list_models())}. "
            "timm.list_models() names those it knows."
        )
    if tag and source.tag:
        raise UserError(f"teacher.pretrained: {source.model} names a tag already; set tag to null.")
    return {"kind": "timm", "model": name}


def located(source: Pretrained) -> Path:
    """The tag's weights, from the cache or the network. A digest names the file of the original publisher; the hub, which
    is preferred without one, has the same weights in a file of other bytes."""
    release = timm_release(source) if source.library == "timm" else open_clip_release(source)
    try:
        return from_address(release) if release.url and (source.sha256 or not release.repo) else from_hub(release)
    except Exception as error:  # the clients of hub and network raise many kinds
        raise UserError(
            f"The weights {source.model} / {source.tag} are neither in the cache nor to be had from the network "
            f"({type(error).__name__}). Fetch them elsewhere and set teacher.pretrained.file."
        ) from None


def open_clip_release(source: Pretrained) -> Release:
    known = open_clip.list_pretrained_tags_by_model(source.model)
    release = open_clip.get_pretrained_cfg(source.model, source.tag)
    if not release:
        raise unknown_tag(source, source.tag, known)
    repo, _, name = release.get("hf_hub", "").rpartition("/")
    safe = Path(name).with_suffix(".safetensors").name if name else open_clip.constants.HF_SAFE_WEIGHTS_NAME
    names = (safe, name or open_clip.constants.HF_WEIGHTS_NAME)
    return Release(release.get("url"), Path("~/.cache/clip").expanduser(), repo, names)


def timm_release(source: Pretrained) -> Release:
    name, _, tag = source.model.partition(".")
    tag = tag or source.tag
    known = [other.partition(".")[2] for other in list_pretrained(f"{name}.*")]
    if tag not in known:
        raise unknown_tag(source, tag, known)
    release = timm.get_pretrained_cfg(f"{name}.{tag}")
    names = ("model.safetensors", release.hf_hub_filename or "pytorch_model.bin")
    return Release(release.url, Path(torch.hub.get_dir()) / "checkpoints", release.hf_hub_id, names)


def unknown_tag(source: Pretrained, tag: str, known: list[str]) -> UserError:
    words = f"{nearest(tag, known)}. {source.library} knows {', '.join(known) or 'none'}."
    return UserError(f"teacher.pretrained.tag {tag!r} is unknown for {source.model}{words}")


def from_address(release: Release) -> Path:
    path = release.cache / Path(urlparse(release.url).path).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(release.url, str(path))  # whole or not at all, with a bar
    return path


def from_hub(release: Release) -> Path:
    for name in release.names:
        # Not hf_hub_download(local_files_only=True): that, too, asks the hub for a list of coding agents.
        if isinstance(path := try_to_load_from_cache(release.repo, name), str):
            return Path(path)
    for name in release.names:
        with contextlib.suppress(RemoteEntryNotFoundError):
            return Path(hf_hub_download(release.repo, name))  # with a bar
    raise FileNotFoundError(release.repo)


def verify(path: Path, source: Pretrained) -> None:
    """Raises UserError when a file has another SHA-256 than the recipe says or, where that says none, the hub has it under."""
    require_file(path)
    blob = path.resolve().name  # in the hub's cache: its SHA-256, if it is large
    if not source.sha256 and re.fullmatch("[0-9a-f]{64}", blob) and file_digest(path) != blob:
        raise UserError(f"{path} is damaged: its SHA-256 is not {blob}, the hub's. Delete {cached_as(path)} and run again.")
    if source.sha256 and (found := file_digest(path)) != source.sha256.lower():
        mend = "fetch it again" if source.file else f"delete {cached_as(path)} and run again, which fetches it anew"
        raise UserError(
            f"{path} has SHA-256 {found}, the recipe (teacher.pretrained.sha256) says {source.sha256}: {mend}, "
            "or, if it is another file that you trust, set teacher.pretrained.sha256 to what it has."
        )


def cached_as(path: Path) -> Path:
    """What to delete: the hub's cache keeps a file's bytes beside its name, models--*/snapshots/<revision>/<name>."""
    return path.parents[2] if path.parents[1].name == "snapshots" else path


def read_state(path: Path, named: bool) -> State:
    """State dict of a safetensors file, a plain checkpoint or, when the recipe has named it by its digest, an OpenAI
    TorchScript archive."""
    state = read_program(path) if named and is_torchscript(path) else read_foreign(path)
    for name in ("state_dict", "model", "teacher"):  # open_clip's and SLIP's; DeiT's and MAE's; DINO's
        state = state.get(name, state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict: expected tensors by name, bare or under 'state_dict'.")
    named_tensors = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}
    return {name.removeprefix("module."): tensor for name, tensor in named_tensors.items()}


def read_program(path: Path) -> State:
    """The tensors of a TorchScript archive; opening it may run what it holds."""
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()
    except Exception:  # torch raises many kinds
        raise UserError(
            f"{path} is no checkpoint: as a TorchScript archive it cannot be loaded. Fetch it again, or give the same weights "
            "as safetensors."
        ) from None


def image_state(state: State) -> State:
    """The image tower of a CLIP; its text tower is asked nothing."""
    return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}


def timm_state(state: State, tower: Tower, path: Path) -> State:
    """The ViT in a checkpoint (bare, or DINO's `backbone.`, SLIP's `visual.`), its names turned into timm's by timm, its
    classifier left out."""
    place = next((name.removesuffix("cls_token") for name in state if name.endswith("cls_token")), "")
    state = {name.removeprefix(place): tensor for name, tensor in state.items() if name.startswith(place)}
    given, wanted = (of.get("patch_embed.proj.weight") for of in (state, tower.visual.state_dict()))
    if given is not None and wanted is not None and given.numel() != wanted.numel():  # timm would resize it to fit
        raise UserError(
            f"{path} does not fit teacher.pretrained.model. Its patches are {list(given.shape)}, not {list(wanted.shape)}."
        )
    try:
        state = checkpoint_filter_fn(state, tower.visual, adapt_layer_scale=True)
    except Exception as error:  # timm reshapes what it takes for positions
        raise UserError(f"{path} does not fit teacher.pretrained.model ({str(error)[:200]}).") from None
    return {f"visual.{name}": tensor for name, tensor in state.items() if not name.startswith(("head.", "head_dist."))}


def load(model: nn.Module, state: State, path: Path) -> None:
    """Load a release's weights as float32. Raises UserError where they do not fit or hold anything but finite numbers."""
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    check_weights(state, path)
    load_state(model, state, path, "Name the model of these weights as teacher.pretrained.model.")
