"""Checkpoints in other projects' layouts: reading, refusals, conversion, and round trips to the same bits."""

import argparse
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from milan.convert import interop, layouts
from milan.core.errors import UserError
from milan.method.model import MaskedPretraining
from milan.params import AblationRow, Model, TransformerSize

SIZE = Model("tiny", 12, 4, TransformerSize(24, 2, 3), TransformerSize(16, 2, 2))


def official(decoder: str = "prompt") -> dict[str, torch.Tensor]:
    """Return a complete pretraining checkpoint under official names, with random values."""
    model = MaskedPretraining(SIZE, AblationRow("clip", decoder, "random"), 0.5, 20)
    generator = torch.Generator().manual_seed(0)
    tensors = model.state_dict().items()
    names = {name.removeprefix("encoder.vit.").removeprefix("decoder."): tensor for name, tensor in tensors}
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in names.items()}


def encoder_of(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith(("decoder_", "mask_token"))}


def same(ours, theirs) -> bool:
    """Return whether two state dicts have the same names, types and values."""
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and tensor.equal(theirs[name]) for name, tensor in ours.items()
    )


@pytest.fixture
def pth(tmp_path):
    def save(content, name="in.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def run(*arguments) -> int:
    return interop.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("decoder", ["prompt", "mae"])
def test_reads_official_milan_and_mae(pth, decoder):
    state = official(decoder)
    assert same(interop.read_encoder(pth({"model": state}), SIZE), encoder_of(state))


def test_reads_a_training_checkpoint_with_its_command_line(pth):
    """main_pretrain.py saves optimizer, scaler, epoch and the parsed arguments along."""
    state = official()
    optimizer = torch.optim.AdamW([torch.zeros(3, requires_grad=True)]).state_dict()
    arguments = argparse.Namespace(batch_size=64, data_path="data", lr=None, use_clip=True)
    path = pth({"model": state, "optimizer": optimizer, "epoch": 399, "scaler": {"scale": 1.0}, "args": arguments})
    assert same(interop.read_encoder(path, SIZE), encoder_of(state))


def test_reads_mmpretrain_with_teacher_and_preprocessor(pth):
    state = official()
    full = layouts.to_mmpretrain(state)
    full |= {"target_generator.clip.proj": torch.ones(2), "data_preprocessor.mean": torch.ones(3), "head.loss": torch.ones(1)}
    path = pth({"meta": {"epoch": 400}, "state_dict": full})
    assert same(interop.read_encoder(path, SIZE), encoder_of(state))
    assert same(interop.read(path), state)


def test_reads_timm_which_is_our_own(tmp_path):
    state = encoder_of(official())
    save_file(state, tmp_path / "encoder.safetensors")
    assert same(interop.read_encoder(tmp_path / "encoder.safetensors", SIZE), state)


def test_mmpretrain_names_of_mae_and_milan():
    names = layouts.to_mmpretrain(official("mae"))
    assert {
        "backbone.layers.1.ffn.layers.0.0.weight",
        "backbone.ln1.bias",
        "neck.decoder_blocks.0.attn.qkv.weight",
        "neck.ln1.weight",
    } <= set(names)
    assert "neck.decoder_blocks.1.attn.kv.weight" in layouts.to_mmpretrain(official())


@pytest.mark.parametrize("decoder", ["prompt", "mae"])
def test_round_trips_are_exact(pth, tmp_path, decoder):
    """Through every layout and back, half precision and position tables (here noise) keep their values."""
    state = official(decoder)
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].half()
    start, mm, timm_file, rest, back = (
        pth({"model": state}),
        *(tmp_path / n for n in ("mm.pth", "e.safetensors", "d.safetensors", "back.pth")),
    )
    assert run(start, mm, "--to", "mmpretrain") == 0
    assert same(torch.load(mm, weights_only=True)["state_dict"], layouts.to_mmpretrain(state))
    assert run(mm, timm_file, "--to", "timm", "--decoder", rest) == 0
    assert same(load_file(timm_file), encoder_of(state))
    assert same(load_file(rest), {name: state[name] for name in state.keys() - encoder_of(state).keys()})
    assert run(timm_file, back, "--to", "official", "--decoder", rest) == 0
    assert same(torch.load(back, weights_only=True)["model"], state)


def test_encoder_alone_converts(tmp_path, pth, capsys):
    state = official()
    assert run(pth({"model": state}), tmp_path / "e.safetensors", "--to", "timm") == 0
    assert "decoder tensors left out" in capsys.readouterr().out
    assert run(tmp_path / "e.safetensors", tmp_path / "o.pth", "--to", "official") == 0
    assert same(torch.load(tmp_path / "o.pth", weights_only=True)["model"], encoder_of(state))


def test_timm_loads_strictly(tmp_path, pth):
    """Into timm's own model; vit_base differs from vit_tiny in its sizes alone."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = {name: tensor.detach() + 1 for name, tensor in model.state_dict().items()}
    assert run(pth({"model": state}), tmp_path / "e.safetensors", "--to", "timm") == 0
    model.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=True)
    assert model.norm.bias.eq(1).all()


def clip_state() -> dict[str, torch.Tensor]:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=4, image_size=12)
    model = CLIP(10, vision, CLIPTextCfg(context_length=6, vocab_size=9, width=16, heads=2, layers=1), quick_gelu=True)
    return {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


def test_openai_clip_there_and_back(tmp_path, pth):
    state = clip_state()
    integers = {name: torch.tensor(7) for name in interop.CLIP_INTEGERS}
    assert run(pth({**state, **integers}), tmp_path / "c.safetensors", "--to", "timm") == 0
    assert run(tmp_path / "c.safetensors", tmp_path / "c.pt", "--to", "openai") == 0
    assert same(torch.load(tmp_path / "c.pt", weights_only=True), {n: t for n, t in state.items() if n.startswith("visual.")})


def test_openai_clip_gives_the_same_features_in_timm():
    """open_clip's tower and timm's with the converted weights give the same features."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = CLIP(
        10,
        CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=4, image_size=12),
        CLIPTextCfg(6, 9, width=16, heads=2, layers=1),
        True,
    )
    size = {"img_size": 12, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    other = VisionTransformer(**size, pre_norm=True, act_layer=QuickGELU, norm_layer=torch.nn.LayerNorm)
    other.load_state_dict(layouts.clip_to_timm(model.state_dict(), "here"), strict=True)
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.allclose(model.eval().encode_image(images), other.eval()(images), atol=1e-5)


def refused(path, *words) -> None:
    with pytest.raises(UserError) as caught:
        interop.read_encoder(path, SIZE)
    assert all(word in str(caught.value) for word in (str(path), *words)), caught.value


# Others' programs.


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "encoder.", "backbone.", "module._orig_mod.", "student.encoder.vit."])
@pytest.mark.parametrize("key", ["model", "state_dict", "net", None])
def test_prefixes_are_taken_off_and_said(pth, capsys, prefix, key):
    state = official()
    named = {f"{prefix}{name}": tensor for name, tensor in state.items()} | {"criterion.scale": torch.ones(1)}
    assert same(interop.read(pth({key: named, "epoch": 3} if key else named)), state)
    said = capsys.readouterr().out
    assert f"in.pth: the prefix {prefix} is taken off {len(state)} names; 1 tensors without it are left out: criterion.scale." in said


def test_wrappers_within_names_are_taken_out_and_said(pth, capsys):
    """Names as torch 2 writes them: FSDP around all and around each block, activation checkpointing, a compiled block."""
    state = official()
    inner = {"blocks.0.": "_fsdp_wrapped_module._checkpoint_wrapped_module.", "blocks.1.": "_orig_mod."}
    named = {}
    for name, tensor in state.items():
        for block, wrapper in inner.items():
            name = name.replace(block, block + wrapper) if name.startswith(block) else name
        named[f"_fsdp_wrapped_module.{name}"] = tensor
    assert "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.norm1.weight" in named
    assert same(interop.read(pth({"model": named})), state)
    blocks = sum(name.startswith("blocks.") for name in state)
    assert f"in.pth: wrappers are taken out of {blocks} names: blocks.0._fsdp_wrapped_module." in capsys.readouterr().out


def test_a_teacher_is_read_where_it_is_asked_for(pth, tmp_path):
    good = official()
    flat = {f"student.{name}": tensor * 0 for name, tensor in good.items()} | {f"teacher.{name}": tensor for name, tensor in good.items()}
    assert interop.read(pth({"state_dict": flat}))["cls_token"].eq(0).all()
    assert same(interop.read(pth({"state_dict": flat}), "teacher."), good)


def test_mmpretrain_s_backbone_is_no_prefix_and_module_before_it_is(pth):
    state = official()
    wrapped = {f"module.{name}": tensor for name, tensor in layouts.to_mmpretrain(state).items()}
    assert same(interop.read(pth({"state_dict": wrapped})), state)


def test_one_of_several_sets_of_weights_is_asked_for(pth, tmp_path, capsys):
    good, zeros = official(), {name: torch.zeros_like(tensor) for name, tensor in official().items()}
    path = pth({"model": zeros, "model_ema": good, "loss": {"centre": torch.ones(2)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}})
    refused(path, "holds several sets of weights: model, model_ema.", f"python -m milan.convert {path} OUT.pth --to official --take model_ema")
    assert run(path, tmp_path / "out.pth", "--to", "official", "--take", "model_ema") == 0
    assert same(torch.load(tmp_path / "out.pth", weights_only=True)["model"], good)
    said = conversion_error(capsys, path, tmp_path / "no.pth", "--to", "official", "--take", "ema")
    assert "holds no weights under ema; it has model, model_ema." in said
    said = conversion_error(capsys, pth({"model": good}), tmp_path / "no.pth", "--to", "official", "--take", "student.")
    assert "holds no weights under student.; it has its own." in said


def test_one_of_several_encoders_under_flat_names_is_asked_for(pth, tmp_path):
    good = official()
    flat = {f"a.{name}": tensor * 0 for name, tensor in good.items()} | {f"b.{name}": tensor for name, tensor in good.items()}
    refused(pth({"state_dict": flat}), "holds several sets of weights: a., b..", "--take b.")
    assert run(pth({"state_dict": flat}), tmp_path / "out.pth", "--to", "official", "--take", "b.") == 0
    assert same(torch.load(tmp_path / "out.pth", weights_only=True)["model"], good)


def huggingface(state: dict) -> dict[str, torch.Tensor]:
    """Return an MAE under the names of transformers' ViTMAEForPreTraining, written out by hand."""
    names = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings", "mask_token": "decoder.mask_token"}
    for kind in ("weight", "bias"):
        names |= {
            f"patch_embed.proj.{kind}": f"vit.embeddings.patch_embeddings.projection.{kind}",
            f"norm.{kind}": f"vit.layernorm.{kind}",
            **{f"decoder_{part}.{kind}": f"decoder.decoder_{part}.{kind}" for part in ("embed", "norm", "pred")},
        }
        for ours, theirs in (("blocks.", "vit.encoder.layer."), ("decoder_blocks.", "decoder.decoder_layers.")):
            for k in range(2):
                names |= {
                    f"{ours}{k}.norm1.{kind}": f"{theirs}{k}.layernorm_before.{kind}",
                    f"{ours}{k}.norm2.{kind}": f"{theirs}{k}.layernorm_after.{kind}",
                    f"{ours}{k}.attn.proj.{kind}": f"{theirs}{k}.attention.output.dense.{kind}",
                    f"{ours}{k}.mlp.fc1.{kind}": f"{theirs}{k}.intermediate.dense.{kind}",
                    f"{ours}{k}.mlp.fc2.{kind}": f"{theirs}{k}.output.dense.{kind}",
                }
    names["decoder_pos_embed"] = "decoder.decoder_pos_embed"
    named = {names[name]: tensor for name, tensor in state.items() if name in names}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            block, kind = name.split(".attn.qkv.")
            block = block.replace("decoder_blocks.", "decoder.decoder_layers.") if "decoder" in block else f"vit.encoder.layer.{block[7:]}"
            for k, part in enumerate(("query", "key", "value")):
                named[f"{block}.attention.attention.{part}.{kind}"] = tensor.chunk(3)[k].clone()
    return named


@pytest.mark.parametrize("kind", ["pretraining", "wrapped", "model alone", "classifier"])
def test_reads_hugging_face_s_vitmae(tmp_path, kind, capsys):
    state = official("mae")
    named = huggingface(state)
    if kind == "wrapped":
        named = {f"module.{name}": tensor for name, tensor in named.items()}
    if kind != "pretraining" and kind != "wrapped":
        named = {name: tensor for name, tensor in named.items() if not name.startswith("decoder.")}
    if kind == "model alone":
        named = {name.removeprefix("vit."): tensor for name, tensor in named.items()}
    if kind == "classifier":
        named |= {"classifier.weight": torch.ones(5, 24), "classifier.bias": torch.ones(5)}
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    assert same(interop.read_encoder(tmp_path / "model.safetensors", SIZE), encoder_of(state))
    assert same(interop.read(tmp_path / "model.safetensors"), state if kind in ("pretraining", "wrapped") else encoder_of(state))
    assert ("the encoder may have seen labels" in capsys.readouterr().out) == (kind == "classifier")


def test_hugging_face_without_a_key_is_refused(tmp_path):
    named = huggingface(official("mae"))
    del named["vit.encoder.layer.1.attention.attention.key.weight"]
    save_file(named, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "missing: blocks.1.attn.qkv.weight", "unexpected: blocks.1.attention.attention.query.weight")


def test_a_fine_tuned_mae_is_told_as_such(pth, tmp_path, capsys):
    state = encoder_of(official())
    tuned = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: tensor for name, tensor in state.items()}
    path = pth({"model": {**tuned, "head.weight": torch.ones(1000, 24), "head.bias": torch.ones(1000)}})
    refused(path, "is a classifier fine-tuned with mean pooling", "mae_pretrain_vit_base.pth")
    assert "fine-tuned with mean pooling" in conversion_error(capsys, path, tmp_path / "out.pth", "--to", "mmpretrain")
    by_class_token = pth({"model": {**state, "head.weight": torch.ones(1000, 24), "head.bias": torch.ones(1000)}})
    assert same(interop.read_encoder(by_class_token, SIZE), state)
    said = capsys.readouterr().out
    assert "2 tensors of other parts are left out: head.weight, head.bias. A classifier's head: the encoder may have seen labels." in said


def test_half_precision_is_read(pth):
    half = {name: tensor.half() for name, tensor in encoder_of(official()).items()}
    assert same(interop.read_encoder(pth({"model": half}), SIZE), half)


def test_long_lists_of_names_are_cut(pth):
    strange = {f"backbone.gate{k}": torch.ones(1) for k in range(300)}
    with pytest.raises(UserError, match=r"gate0, .*gate4 and 295 more\. Save") as error:
        interop.read_encoder(pth({"state_dict": {**layouts.to_mmpretrain(official()), **strange}}), SIZE)
    assert len(str(error.value)) < 400
    with pytest.raises(UserError, match=r"not tensors by name: 0, 1, 2, 3, 4 and 295 more\."):
        interop.read_encoder(pth({**official(), **dict.fromkeys(range(300))}), SIZE)


def test_a_refusal_lists_the_keys(pth):
    state = official()
    del state["norm.weight"], state["blocks.1.mlp.fc2.bias"]
    state["blocks.2.norm1.weight"] = torch.zeros(24)
    state["pos_embed"] = torch.zeros(1, 5, 24)
    refused(
        pth({"model": state}),
        "missing: blocks.1.mlp.fc2.bias, norm.weight;",
        "unexpected: blocks.2.norm1.weight;",
        "misshapen: pos_embed is [1, 5, 24], not [1, 10, 24].",
    )
    refused(pth({"state_dict": {**layouts.to_mmpretrain(official()), "backbone.gate": torch.ones(1)}}), "unexpected keys", "backbone.gate")
    refused(pth(clip_state()), "CLIP")


def test_convert_refuses_an_incomplete_model(pth, tmp_path, capsys):
    state = official()
    for name in ("pos_embed", "blocks.0.norm1.bias", "decoder_norm.bias", "decoder_embed.weight"):
        broken = {key: tensor for key, tensor in state.items() if key != name}
        assert run(pth({"model": broken}), tmp_path / "out.pth", "--to", "mmpretrain") == 1
        assert name in capsys.readouterr().err
    assert run(pth({"model": state}), tmp_path / "out.safetensors", "--to", "official") == 1
    assert run(pth({"model": state}), tmp_path / "out.pth", "--to", "openai") == 1
    assert run(pth(clip_state()), tmp_path / "out.pth", "--to", "official") == 1
    assert run(pth({"model": state}), tmp_path / "out.pth", "--to", "official", "--decoder", "d.safetensors") == 1
    assert not (tmp_path / "out.pth").exists()


def conversion_error(capsys, *arguments) -> str:
    """Return the error text of convert for bad input; it writes nothing."""
    assert run(*arguments) == 1 and not arguments[1].is_file()
    return capsys.readouterr().err


def test_convert_refuses_a_decoder_file_without_a_decoder(tmp_path, capsys):
    save_file(encoder_of(official()), tmp_path / "e.safetensors")
    arguments = (tmp_path / "e.safetensors", tmp_path / "out.pth", "--to", "official", "--decoder", tmp_path / "e.safetensors")
    assert "e.safetensors holds no decoder tensors" in conversion_error(capsys, *arguments)


def test_convert_writes_a_decoder_only_beside_the_encoder(pth, tmp_path, capsys):
    source, target = pth({"model": official()}), tmp_path / "e.safetensors"
    for other in (target, tmp_path / "d.pth"):
        assert "of its own" in conversion_error(capsys, source, target, "--to", "timm", "--decoder", other)
    (tmp_path / "file").touch()
    assert "file: File exists" in conversion_error(capsys, source, target, "--to", "timm", "--decoder", tmp_path / "file/d.safetensors")


@pytest.mark.parametrize("name", ["decoder_norm.bias", "pos_embed"])
@pytest.mark.parametrize("value", [float("nan"), 1j])
def test_convert_refuses_tensors_that_are_no_weights(pth, tmp_path, capsys, name, value):
    state = official()
    broken = {**state, name: torch.full(state[name].shape, value)}
    assert f"in.pth: {name}" in conversion_error(capsys, pth({"model": broken}), tmp_path / "out.pth", "--to", "mmpretrain")


@pytest.mark.parametrize("shape", [(), (3,), (1, 1, 1, 1, 1), (0, 0), (1, 0, 24), (64, 3, 0, 0)])
def test_convert_refuses_misshapen_tensors(pth, tmp_path, capsys, shape):
    """Wrong numbers of dimensions and sizes of zero, in MILAN's layout and in both of CLIP's."""
    clip = clip_state()
    cases = [(official(), "pos_embed"), (official(), "patch_embed.proj.weight")]
    cases += [(clip, f"visual.{name}") for name in ("class_embedding", "positional_embedding", "conv1.weight", "proj")]
    cases += [(layouts.clip_to_timm(clip, "here"), name) for name in ("cls_token", "pos_embed", "head.weight")]
    for state, name in cases:
        path = pth({**state, name: torch.zeros(shape)})
        layout = "official" if "mask_token" in state else "openai" if "cls_token" in state else "timm"
        target = tmp_path / ("out.safetensors" if layout == "timm" else "out.pth")
        assert "in.pth" in conversion_error(capsys, path, target, "--to", layout), name


def test_keys_that_are_no_text_are_refused(pth):
    refused(pth({"model": {**official(), 5: torch.ones(2)}}), "not tensors by name: 5")


def test_an_output_that_cannot_be_written_is_named(pth, tmp_path, capsys):
    source = pth({"model": official()})
    (tmp_path / "folder.pth").mkdir()
    assert "folder.pth: Is a directory" in conversion_error(capsys, source, tmp_path / "folder.pth", "--to", "official")
    assert "in.pth: File exists" in conversion_error(capsys, source, source / "out.pth", "--to", "official")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pth", "in.pth"]


class Payload:
    """An object whose unpickling runs a shell command."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch '{self.sentinel}'",)


@pytest.mark.parametrize("where", ["beside the weights", "among the weights", "bare pickle"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, where):
    sentinel, path = tmp_path / "ran", tmp_path / "in.pth"
    contents = {
        "beside the weights": {"model": official(), "args": Payload(sentinel)},
        "among the weights": {"model": {**official(), "cls_token": Payload(sentinel)}},
        "bare pickle": Payload(sentinel),
    }
    if where == "bare pickle":
        path.write_bytes(pickle.dumps(contents[where]))
    else:
        torch.save(contents[where], path)
    refused(path, "pickle", "Nothing in it was run")
    assert not sentinel.exists()
    if where != "bare pickle":  # the payload does run without the check
        torch.load(path, weights_only=False)
        assert sentinel.exists()


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "in.pt")
    refused(tmp_path / "in.pt", "TorchScript")


@pytest.mark.parametrize("name", ["in.pth", "in.safetensors"])
@pytest.mark.parametrize("data", [b"", b"<html>404</html>", bytes(range(256)) * 9, "half"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name, data):
    path = tmp_path / name
    if data == "half":
        (torch.save if name.endswith("pth") else save_file)(encoder_of(official()), path)
        data = path.read_bytes()
        data = data[: len(data) // 2]
    path.write_bytes(data)
    refused(path)


def test_a_flipped_byte_in_a_download_is_found(pth, tmp_path):
    """torch.load itself accepts it."""
    path = pth({"model": {**official(), "cls_token": torch.full((1, 1, 24), 7.0)}})
    whole = path.read_bytes()
    place = whole.index(torch.full((24,), 7.0).numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert torch.load(path, weights_only=True)["model"]["cls_token"][0, 0, 0] != 7
    refused(path, "in.pth is damaged: in/data/", "Download or write it again")


def test_a_file_without_weights_is_refused(pth, tmp_path):
    refused(tmp_path / "absent.pth", "no file")
    refused(tmp_path, "is a folder")
    refused(pth({"epoch": 3}), "no state dict")
    refused(pth([torch.ones(2)]), "no state dict")
    refused(pth({"model": {**official(), "version": 3}}), "not tensors by name: version")


def test_help_names_the_layouts(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: python -m milan.convert ")
    assert all(word in output for word in ("timm", "official", "mmpretrain", "openai"))


def test_vitdet_has_the_names_of_detectron2_and_mmdetection(pth, tmp_path, capsys):
    """As read in detectron2's modeling/backbone/vit.py and mmdetection's projects/ViTDet/vitdet/vit.py, without the relative
    positions, which start at zero there. `norm.weight` would also be the end of other names in detectron2's model."""
    state = official()
    assert run(pth({"model": state}), tmp_path / "v.pth", "--to", "vitdet") == 0
    written = torch.load(tmp_path / "v.pth", weights_only=True)["model"]
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    blocks = {f"blocks.{i}.{part}.{kind}" for i in (0, 1) for part in parts for kind in ("weight", "bias")}
    assert written.keys() == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", *blocks}
    assert all(tensor.equal(state[name]) for name, tensor in written.items())
    assert written["pos_embed"].shape == (1, 1 + 9, 24)  # both cut off the class token's row themselves
    assert "no class token" in capsys.readouterr().out
    assert run(tmp_path / "in.pth", tmp_path / "w.pth", "--to", "vitdet", "--decoder", tmp_path / "d.safetensors") == 1
    assert "the vitdet layout has no decoder" in capsys.readouterr().err
