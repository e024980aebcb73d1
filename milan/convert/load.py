"""The public functions `milan.load_encoder` and `milan.load_pretrained`: models for other code, from any checkpoint."""

from pathlib import Path

from milan.convert import interop, layouts
from milan.convert.layouts import State
from milan.core.errors import UserError
from milan.core.files import read_json
from milan.method.encoder import Encoder
from milan.method.model import MaskedPretraining
from milan.params import AblationRow, TransformerSize

ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}  # {width: heads} of ViT-Ti, S, B and L
DECODER_HEADS = {512: 16}  # of the decoder in MAE's and MILAN's releases
ENCODER_FILES = ("model.safetensors", "encoder.safetensors")  # in a folder of milan.export, and of the stage pretrain


def load_encoder(path: str | Path, num_heads: int | None = None) -> Encoder:
    """Load an encoder in evaluation mode: encoder(images) is (B, 1+N, D) after the final norm, the class token first.

    images: (B, 3, H, W) with ImageNet's normalisation (milan.data.transforms.normalise). path: a folder of milan.export or of
    the stage `pretrain`, or a checkpoint in any layout that milan.convert reads; no code in it is run. num_heads: of the
    attention. The weights do not tell it; None: as the config.json in an exported folder or Hugging Face's says, else as the published ViT of this width.

    Raises UserError where that is not known, and for a checkpoint without a complete encoder."""
    file, state = read_encoder(Path(path))
    interop.check_complete(state, {}, file, file)
    encoder = Encoder(interop.sizes_of(state, file, num_heads or encoder_heads(file, state)))
    encoder.vit.load_state_dict(state)
    return encoder.eval()


def load_pretrained(
    path: str | Path, num_heads: int | None = None, decoder_heads: int | None = None, mask_ratio: float = 0.75
) -> MaskedPretraining:
    """Load encoder and decoder in evaluation mode: model.predict(images, visible, masked) predicts the teacher's features.

    path: a folder of the stage `pretrain`, or a checkpoint with a decoder. num_heads and decoder_heads: as in load_encoder.
    mask_ratio: share of the patches that are hidden, which gives model.n_visible. The weights do not tell how masks were drawn
    in training; those that this model samples are random.

    Raises UserError as load_encoder does, and where there is no complete decoder."""
    file, state = read_encoder(Path(path))
    of_stage = file.with_name("decoder.safetensors")
    decoder_file = of_stage if file.name in ENCODER_FILES and of_stage.exists() else file
    decoder = interop.read_decoder(decoder_file)
    interop.check_complete(state, decoder, file, decoder_file)
    (width, _), out_dim = decoder["decoder_embed.weight"].shape, len(decoder["decoder_pred.weight"])
    heads = decoder_heads or known_heads(DECODER_HEADS, width, decoder_file, "decoder_heads")
    size = TransformerSize(width, layouts.depth(decoder, "decoder_blocks."), heads)
    model = interop.sizes_of(state, file, num_heads or encoder_heads(file, state), size)
    kind = interop.decoder_kind(decoder)
    target = "pixels" if kind == "mae" and out_dim == 3 * model.patch_size**2 else "clip"
    pretraining = MaskedPretraining(model, AblationRow(target, kind, "random"), mask_ratio, out_dim)
    pretraining.encoder.vit.load_state_dict(state)
    pretraining.decoder.load_state_dict(decoder)
    return pretraining.eval()


def read_encoder(path: Path) -> tuple[Path, State]:
    """Return the file of the weights, which lies in `path` where that is a folder, and the encoder's tensors."""
    if path.is_dir():
        path = next((path / name for name in ENCODER_FILES if (path / name).exists()), path)
    state, _ = layouts.split_decoder(interop.read(path))
    interop.refuse_classifier(state, path)
    return path, state


def encoder_heads(file: Path, state: State) -> int:
    """Return the number of heads that the config.json beside an exported file or one of Hugging Face's says, else the published
    ViT's of this width."""
    config = file.with_name("config.json")
    told = read_json(config) if file.name == "model.safetensors" and config.exists() else {}
    heads = told.get("num_attention_heads") or (told.get("model_args") or {}).get("num_heads")
    return heads or known_heads(ENCODER_HEADS, state["cls_token"].shape[-1], file, "num_heads")


def known_heads(heads: dict[int, int], width: int, file: Path, argument: str) -> int:
    """Look up a width. Raises UserError for any that no published model has."""
    if width not in heads:
        raise UserError(
            f"{file}: no published model is {width} wide, and weights do not tell how many heads they are for: give {argument}."
        )
    return heads[width]
