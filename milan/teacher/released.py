"""Fetch a released teacher, by name and tag of open_clip or timm or from a local file, and verify its digest. A small CLIP
that this pipeline trained is a released teacher, too, whose file describes its own model (library milan).

A model that cannot be MILAN's teacher is refused before any download. Files in the library's own cache are used without a
network. A file's code runs only if the recipe names the file by its digest: pickles are read with weights_only, and a
TorchScript archive (OpenAI publishes such), which PyTorch's SECURITY.md treats as a program, is opened only when its SHA-256
is teacher.pretrained.sha256.
"""

import contextlib
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlparse

import open_clip
import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from open_clip.model import CLIP
from timm.models import list_pretrained
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from milan.core.described import small_clip
from milan.core.errors import UserError, nearest
from milan.core.files import damaged_source, file_digest
from milan.core.validation import validate
from milan.params import Pretrained
from milan.teacher.class_text import Wording, save_class_text
from milan.teacher.clip import NO_VISION, SmallClip, Tokenizer, build_tiny, build_towers, embed_classes, save_teacher
from milan.teacher.frozen import build_tower
from milan.teacher.towers import Tower
from milan.training.foreign import check_weights, is_torchscript, members, read_foreign, require_file
from milan.training.weights import checked_weights, load_state, misfits

State = dict[str, Tensor]
TEXT_SIZES = {"context_length", "vocab_size", "width", "heads", "layers"}  # the only settings that OpenAI's text towers have
WRAPPERS = r"^(module\.|_orig_mod\.)+"  # of DistributedDataParallel and torch.compile
OPENAI = {"input_resolution", "context_length", "vocab_size"}  # numbers beside the weights of OpenAI's archives alone


@dataclass(frozen=True)
class Release:
    """The places of published weights: a URL of the publisher's, a repository on the Hugging Face hub, or both."""

    url: str | None
    cache: Path  # the library's folder for files from URLs
    repo: str | None
    names: tuple[str, ...]  # of the file on the hub, best first


def fetch_teacher(source: Pretrained, folder: Path, wording: Wording | None = None, device: str | torch.device = "cpu") -> None:
    """Write a released image tower into folder as teacher.safetensors and teacher.json, and the class texts (class_text.py)
    where it has a text tower, which computes them on this device and, but for a small CLIP's, is not kept.

    wording: None for images without labels. Raises UserError for a model or a file that cannot be the teacher, weights that
    cannot be fetched and a digest that differs."""
    if source.library == "milan":
        return fetch_small(source, folder, wording)
    config = describe(source)
    path = Path(source.file) if source.file else locate(source)
    verify(path, source)
    with torch.device("meta"):
        tower = build_tower(config)
    print(f"teacher: {path}", flush=True)
    state = read_state(path, named=bool(source.sha256))
    refuse_other_gelu(source, tower, trained_with_quick_gelu(path, state))
    image_weights = timm_state(state, tower, path) if source.library == "timm" else image_state(state)
    load_as_float32(tower, image_weights, path)
    save_teacher(folder, tower, config)
    text_tower = build_text_tower(source, state, path, wording) if wording else None
    if text_tower:
        embeddings = embed_classes(text_tower.to(device), Tokenizer(text_tower.context_length), wording, shown=True)
        save_class_text(folder, wording, embeddings)


def fetch_small(source: Pretrained, folder: Path, wording: Wording | None) -> None:
    """Write a small CLIP that this pipeline trained into folder, as the stage that trained it did, with the class texts."""
    path = Path(source.file)
    verify(path, source)
    print(f"teacher: {path}", flush=True)
    state, config = load_small(path)
    model, tokenizer = build_towers(config)
    load_as_float32(model, state, path)
    save_teacher(folder, model, config)
    if wording and wording.names:
        save_class_text(folder, wording, embed_classes(model.eval().requires_grad_(False), tokenizer, wording))


def build_text_tower(source: Pretrained, state: State, path: Path, wording: Wording) -> nn.Module | None:
    """Build the text tower of a CLIP with its weights; without one of OpenAI's kind, print the consequence and return None.

    Its context is as long as the longest text of the wording: attention is causal, so padding behind the end of a text
    changes nothing."""
    config = open_clip.get_model_config(source.model) if source.library == "open_clip" else {"text_cfg": {}}
    sizes, embedding = config["text_cfg"], state.get("token_embedding.weight")
    try:
        if embedding is None or embedding.shape[:1] != (len(Tokenizer(1)),) or not set(sizes) <= TEXT_SIZES:
            raise UserError(f"{path} has no text tower of OpenAI's kind.")
        length = longest_text(wording, sizes["context_length"])
        model = CLIP(config["embed_dim"], NO_VISION, {**sizes, "context_length": length}, config.get("quick_gelu", False))
        del model.visual
        weights = {name: state[name] for name in model.state_dict() if name in state}
        check_weights(weights, path)
        shortened = {name: t[:length] if name == "positional_embedding" and t.ndim else t for name, t in weights.items()}
        load_as_float32(model, shortened, path)
    except UserError as error:  # a teacher needs no text tower
        print(f"No zero-shot accuracies and no text heat maps with this teacher: {error}", flush=True)
        return None
    return model.eval().requires_grad_(False)


def longest_text(wording: Wording, limit: int) -> int:
    """Return an upper bound on the tokens of a text of the wording, at most `limit`: longest name plus longest prompt."""
    return min(limit, sum(int((Tokenizer(limit)(texts) != 0).sum(dim=1).max()) for texts in wording))


def describe(source: Pretrained) -> dict:
    """Return the teacher.json of a released model, without any download. Raises UserError when its library does not know it
    or it cannot be the teacher."""
    if source.library == "milan":
        return load_small(Path(source.file))[1]
    config = timm_config(source) if source.library == "timm" else open_clip_config(source)
    try:
        refuse_timm_wrapper(config)
        with torch.device("meta"):
            build_tower(config)
    except UserError as error:
        raise UserError(f"teacher.pretrained.model {source.model!r} cannot be the teacher. {error}") from None
    return config


def load_small(path: Path) -> tuple[State, dict]:
    """Load the weights of a small CLIP and the teacher.json that their file holds. Raises UserError for any other file, and
    where the two do not fit each other, before anything is built."""
    require_file(path)
    config = small_clip(path)
    try:
        small = validate(SmallClip, config, "its header describes no teacher")
    except UserError as error:
        raise damaged_source(path, str(error).removesuffix(".")) from None
    state = checked_weights(path, damaged_source)
    check_weights(state, path)
    if fault := misfit_of(small, state):
        raise damaged_source(path, f"its header describes another teacher than its tensors make: {fault}")
    return state, asdict(small)


def misfit_of(small: SmallClip, state: State) -> str:
    """Say how the weights of a small CLIP differ from its description; "" where they fit.

    Blocks are counted first: any other size costs nothing on the meta device, a million blocks take hours."""
    for key, count in {"visual.transformer": small.tiny.layers, "transformer": small.tiny.text_layers}.items():
        beginning = f"{key}.resblocks."
        given = {name.removeprefix(beginning).partition(".")[0] for name in state if name.startswith(beginning)}
        if len(given) != count:
            return f"{len(given)} blocks in {key}, not {count}"
    try:
        with torch.device("meta"):
            model = build_tiny(small.tiny, small.image_size, small.patch_size, len(small.token_ids))
    except (UserError, ValueError, RuntimeError) as error:
        return str(error)[:200]
    return misfits(state, {name: tensor.shape for name, tensor in model.state_dict().items()})


def open_clip_config(source: Pretrained) -> dict:
    """Return the teacher.json of a model of open_clip's. Raises UserError for an unknown one or one of the wrong GELU."""
    known = open_clip.list_models()
    if source.model not in known:
        raise UserError(
            f"teacher.pretrained.model {source.model!r} is unknown to open_clip{nearest(source.model, known)}. "
            f"It knows {', '.join(name for name in known if name.startswith('ViT'))}."
        )
    config = open_clip.get_model_config(source.model)
    release = open_clip.get_pretrained_cfg(source.model, source.tag or "")
    if release and release.get("quick_gelu", False) != config.get("quick_gelu", False):
        right_model = f"{source.model}-quickgelu" if release.get("quick_gelu") else source.model.removesuffix("-quickgelu")
        raise UserError(
            f"{source.model} computes another GELU than {source.tag} was trained with: set teacher.pretrained.model to "
            f"{right_model}."
        )
    model = {name: config[name] for name in ("embed_dim", "vision_cfg", "quick_gelu") if name in config}
    return {"kind": "open_clip", "name": source.model, "model": model}


def refuse_timm_wrapper(config: dict) -> None:
    """Raise UserError for a model of open_clip's that wraps one of timm's: it must be taken from timm itself."""
    name = config["kind"] == "open_clip" and config["model"]["vision_cfg"].get("timm_model_name")
    if name:
        build_tower({"kind": "timm", "model": name})
        raise UserError(f"Its image tower is timm's {name}: set library to timm and model to that name.")


def timm_config(source: Pretrained) -> dict:
    """Return the teacher.json of a model of timm's. Raises UserError for an unknown one or one that names two tags."""
    name, _, tag = source.model.partition(".")
    if not timm.is_model(name):
        raise UserError(
            f"teacher.pretrained.model {source.model!r} is unknown to timm{nearest(name, timm.list_models())}. "
            "timm.list_models() lists the known ones."
        )
    if tag and source.tag:
        raise UserError(f"teacher.pretrained: {source.model} names a tag already; set tag to null.")
    return {"kind": "timm", "model": name}


def locate(source: Pretrained) -> Path:
    """Return the file of the tag's weights, from the cache or the network. Raises UserError when it is in neither.

    With a digest the file comes from the original publisher; without one from the hub, which has the same weights in a file
    of other bytes."""
    release = timm_release(source) if source.library == "timm" else open_clip_release(source)
    try:
        return fetch_from_url(release) if release.url and (source.sha256 or not release.repo) else fetch_from_hub(release)
    except Exception as error:  # the clients of hub and network raise many kinds
        raise UserError(
            f"The weights {source.model} / {source.tag} are neither in the cache nor available from the network "
            f"({type(error).__name__}). Fetch them elsewhere and set teacher.pretrained.file."
        ) from None


def open_clip_release(source: Pretrained) -> Release:
    """Return the places of a tag of open_clip's. Raises UserError for an unknown one."""
    known = open_clip.list_pretrained_tags_by_model(source.model)
    release = open_clip.get_pretrained_cfg(source.model, source.tag)
    if not release:
        raise unknown_tag(source, source.tag, known)
    repo, _, name = release.get("hf_hub", "").rpartition("/")
    safetensors_name = Path(name).with_suffix(".safetensors").name if name else open_clip.constants.HF_SAFE_WEIGHTS_NAME
    names = (safetensors_name, name or open_clip.constants.HF_WEIGHTS_NAME)
    return Release(release.get("url"), Path("~/.cache/clip").expanduser(), repo, names)


def timm_release(source: Pretrained) -> Release:
    """Return the places of a tag of timm's. Raises UserError for an unknown one."""
    name, _, tag = source.model.partition(".")
    tag = tag or source.tag
    known = [full_name.partition(".")[2] for full_name in list_pretrained(f"{name}.*")]
    if tag not in known:
        raise unknown_tag(source, tag, known)
    release = timm.get_pretrained_cfg(f"{name}.{tag}")
    names = ("model.safetensors", release.hf_hub_filename or "pytorch_model.bin")
    return Release(release.url, Path(torch.hub.get_dir()) / "checkpoints", release.hf_hub_id, names)


def unknown_tag(source: Pretrained, tag: str, known: list[str]) -> UserError:
    hint = f"{nearest(tag, known)}. {source.library} knows {', '.join(known) or 'none'}."
    return UserError(f"teacher.pretrained.tag {tag!r} is unknown for {source.model}{hint}")


def fetch_from_url(release: Release) -> Path:
    """Return the file of a release's URL, downloaded into the library's cache where it is not there."""
    path = release.cache / Path(urlparse(release.url).path).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(release.url, str(path))  # whole or not at all, with a progress bar
    return path


def fetch_from_hub(release: Release) -> Path:
    """Return the file of a release on the hub, from its cache or downloaded into it."""
    for name in release.names:
        # hf_hub_download(local_files_only=True) would use the network: it asks the hub for a list of coding agents.
        if isinstance(path := try_to_load_from_cache(release.repo, name), str):
            return Path(path)
    for name in release.names:
        with contextlib.suppress(RemoteEntryNotFoundError):
            return Path(hf_hub_download(release.repo, name))  # with a progress bar
    raise FileNotFoundError(release.repo)


def verify(path: Path, source: Pretrained) -> None:
    """Raise UserError unless the SHA-256 of a file is that of the recipe or, where the recipe gives none, of the hub's
    cache."""
    require_file(path)
    blob = path.resolve().name  # the hub's cache names large files by their SHA-256
    if not source.sha256 and re.fullmatch("[0-9a-f]{64}", blob) and file_digest(path) != blob:
        raise UserError(f"{path} is damaged: its SHA-256 is not {blob}, the hub's. Delete {cache_entry(path)} and run again.")
    if source.sha256 and (digest := file_digest(path)) != source.sha256.lower():
        remedy = "fetch it again" if source.file else f"delete {cache_entry(path)} and run again, which fetches it again"
        raise UserError(
            f"{path} has SHA-256 {digest}, the recipe (teacher.pretrained.sha256) says {source.sha256}: {remedy}, "
            "or, if it is another file that you trust, set teacher.pretrained.sha256 to its digest."
        )


def cache_entry(path: Path) -> Path:
    """Return the path to delete for a damaged file: in the hub's cache the folder of its model, since models--*/blobs holds
    the bytes and models--*/snapshots/<revision>/<name> only links to them."""
    return path.parents[2] if path.parents[1].name == "snapshots" else path


def read_state(path: Path, named: bool) -> State:
    """Read the state dict of a safetensors file, a checkpoint or a TorchScript archive, which is opened only when the recipe
    names it by its digest (`named`). Raises UserError for any other file."""
    state = read_torchscript(path) if named and is_torchscript(path) else read_foreign(path)
    for name in ("state_dict", "model", "teacher"):  # open_clip's and SLIP's; DeiT's and MAE's; DINO's
        state = state.get(name, state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict: expected tensors by name, bare or under 'state_dict'.")
    return {
        re.sub(WRAPPERS, "", name): tensor
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def read_torchscript(path: Path) -> State:
    """Read the tensors of a TorchScript archive; opening it may run its code."""
    try:
        return torch.jit.load(path, map_location="cpu").state_dict()
    except Exception:  # torch raises many kinds
        raise UserError(
            f"{path} is no checkpoint: as a TorchScript archive it cannot be loaded. Fetch it again, or give the same weights "
            "as safetensors."
        ) from None


def trained_with_quick_gelu(path: Path, state: State) -> bool | None:
    """Return whether the weights were trained with OpenAI's quick GELU, x * sigmoid(1.702 x), or with the exact one; None
    where the file does not say. A TorchScript archive says it in the text of its program, OpenAI's tensors by their names."""
    program = b""
    if is_torchscript(path):
        with zipfile.ZipFile(path) as archive:
            sources = [member for member in members(path) if member.filename.endswith(".py") and member.file_size < 1 << 20]
            program = b"".join(archive.read(member) for member in sources)
    quick, exact = b"torch.sigmoid(" in program, b"torch.gelu(" in program
    if quick != exact:
        return quick
    return True if state.keys() >= OPENAI else None


def refuse_other_gelu(source: Pretrained, tower: Tower, trained: bool | None) -> None:
    """Raise UserError where the weights were trained with another GELU than the model computes, which no tensor's shape
    shows. Where a file does not say, print what the model computes."""
    quick = any(type(module).__name__ == "QuickGELU" for module in tower.modules())
    names = {True: "quick GELU", False: "exact GELU"}
    if trained is None and source.file and not source.tag:
        print(f"teacher: the file does not say its GELU; {source.model} computes the {names[quick]}.", flush=True)
    if trained is not None and trained != quick:
        plain = source.model.replace("-quickgelu", "").replace("_quickgelu", "")
        right = (f"{plain}-quickgelu" if source.library == "open_clip" else plain.replace("_clip", "_clip_quickgelu")) if trained else plain
        raise UserError(
            f"{source.file or source.tag} was trained with the {names[trained]}, and {source.model} computes the {names[quick]}: "
            f"set teacher.pretrained.model to {right}."
        )


def image_state(state: State) -> State:
    """Return the weights of a CLIP's image tower."""
    return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}


def timm_state(state: State, tower: Tower, path: Path) -> State:
    """Return the weights of the ViT in a checkpoint (bare, or DINO's `backbone.`, SLIP's `visual.`), without its classifier.
    timm itself translates the names. Raises UserError when the weights do not fit the tower."""
    prefix = next((name.removesuffix("cls_token") for name in state if name.endswith("cls_token")), "")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    given, wanted = (weights.get("patch_embed.proj.weight") for weights in (state, tower.visual.state_dict()))
    if given is not None and wanted is not None and given.numel() != wanted.numel():  # timm would resize it
        raise UserError(
            f"{path} does not fit teacher.pretrained.model. Its patches are {list(given.shape)}, not {list(wanted.shape)}."
        )
    try:
        state = checkpoint_filter_fn(state, tower.visual, adapt_layer_scale=True)
    except Exception as error:  # timm reshapes position embeddings, and raises many kinds
        raise UserError(f"{path} does not fit teacher.pretrained.model ({str(error)[:200]}).") from None
    return {f"visual.{name}": tensor for name, tensor in state.items() if not name.startswith(("head.", "head_dist."))}


def load_as_float32(model: nn.Module, state: State, path: Path) -> None:
    """Load a release's weights as float32. Raises UserError where they do not fit or are not finite numbers."""
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    check_weights(state, path)
    load_state(model, state, path, "Name the model of these weights as teacher.pretrained.model.")
