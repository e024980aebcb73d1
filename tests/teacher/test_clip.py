"""CLIP as the teacher: open_clip's own numbers, a renumbered tokenizer, weights stored exactly, class embeddings, loss."""

import copy

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP

from milan.core.errors import UserError
from milan.core.files import read_checked
from milan.data import seeding
from milan.params import TinyClip
from milan.teacher import contrast
from milan.teacher.class_text import Wording
from milan.teacher.clip import (
    Tokenizer,
    build_tiny,
    embed_classes,
    load_teacher,
    save_no_teacher,
    save_teacher,
)
from milan.teacher.towers import ClipTower, mean_attention, queries_keys_values

CAPTIONS = ["a photo of a red disc", "a photo of a striped square", "a picture of two stars", ""]
SIZES = dict(embed_dim=12, width=32, layers=3, head_width=8, text_width=24, text_heads=3, text_layers=2, context_length=12)


def tiny(conv_stem: bool, vocabulary: int = 40) -> CLIP:
    """Build a CLIP whose weights are far from their initialisation: uneven attention, biases and norms other than 0 and 1."""
    seeding.seed_globals(0, "clip")
    model = build_tiny(TinyClip(**SIZES, conv_stem=conv_stem), 32, 8, vocabulary).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 and "logit_scale" not in name or "in_proj" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.requires_grad_(False)


@pytest.fixture(params=[False, True], ids=["patches", "conv stem"])
def model(request) -> CLIP:
    return tiny(request.param)


IMAGES = torch.randn(3, 3, 32, 32, generator=seeding.generator(0, "images"))


def test_the_class_token_is_open_clip_s_image_feature(model):
    features, importance = ClipTower(model.visual)(IMAGES)
    assert features.shape == (3, 17, 12) and importance.shape == (3, 16)
    torch.testing.assert_close(features[:, 0], model.encode_image(IMAGES), atol=1e-5, rtol=1e-5)
    assert (features[:, 0] - features[:, 1]).abs().max() > 0.1


def test_patch_features_are_the_projected_normed_tokens(model):
    """With output_tokens open_clip returns its tokens before the projection, normalised like the class token."""
    model.visual.output_tokens = True
    pooled, tokens = model.visual(IMAGES)
    model.visual.output_tokens = False
    features, _ = ClipTower(model.visual)(IMAGES)
    torch.testing.assert_close(features[:, 0], pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features[:, 1:], tokens @ model.visual.proj, atol=1e-5, rtol=1e-5)


def test_importance_is_the_last_block_s_attention_from_the_class_token(model):
    """torch's own multi-head attention returns its weights with need_weights."""
    caught = []
    last = model.visual.transformer.resblocks[-1]
    hook = last.ln_1.register_forward_hook(lambda module, args, out: caught.append(out))
    importance = ClipTower(model.visual)(IMAGES)[1]
    hook.remove()
    for normed in caught:
        weights = last.attn(normed, normed, normed, need_weights=True, average_attn_weights=True)[1]
        torch.testing.assert_close(importance, weights[:, 0, 1:], atol=1e-6, rtol=1e-5)
    assert caught and (importance.sum(dim=1) < 1).all() and importance.std() > 0.005


def test_importance_follows_its_patch():
    """With the class token's query and the patches' keys set by hand, patch 5 gets all attention."""
    block = tiny(False).visual.transformer.resblocks[-1]
    tokens = torch.zeros(1, 17, 32)
    tokens[0, :, 0] = 1
    tokens[0, 6, 1] = 30  # after the norm, the only token with a large second channel
    with torch.no_grad():
        block.ln_1.weight.fill_(1), block.ln_1.bias.zero_()
        block.attn.in_proj_weight.zero_(), block.attn.in_proj_bias.zero_()
        block.attn.in_proj_bias[:32:8] = 50.0  # each head's query: its first channel
        block.attn.in_proj_weight[32:64:8, 1] = 1.0  # each head's key: the second channel
    query, keys, _ = queries_keys_values(block, tokens)
    attention = mean_attention(query[:, :, :1], keys)[0]
    assert attention.argmax() == 6 and attention[6] > 0.999 and attention.sum() == pytest.approx(1)


def test_a_lowered_tower_keeps_its_norms_and_gives_nearly_the_same(model):
    """bf16 keeps 8 bits, so these few layers of large weights differ by up to a tenth."""
    features, importance = ClipTower(model.visual)(IMAGES)
    lowered = ClipTower(copy.deepcopy(model.visual)).lowered("bf16")
    kinds = {name: parameter.dtype for name, parameter in lowered.named_parameters()}
    assert kinds["visual.transformer.resblocks.0.mlp.c_fc.weight"] == kinds["visual.proj"] == torch.bfloat16
    assert kinds["visual.ln_post.weight"] == kinds["visual.positional_embedding"] == torch.float32
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        lowered_features, lowered_importance = lowered(IMAGES)
    assert torch.nn.functional.cosine_similarity(lowered_features.float(), features, dim=-1).min() > 0.999
    torch.testing.assert_close(lowered_importance, importance, rtol=0.15, atol=1e-3)
    unchanged = ClipTower(copy.deepcopy(model.visual)).lowered("fp32")(IMAGES)
    assert unchanged[0].equal(features) and unchanged[1].equal(importance)


def test_a_tower_without_a_class_token_is_refused():
    with pytest.raises(UserError, match="vision transformer with a class token"):
        ClipTower(torch.nn.Linear(2, 2))


def test_a_conv_stem_needs_a_power_of_two():
    with pytest.raises(UserError, match="power of two, not 6.*false"):
        build_tiny(TinyClip(**SIZES, conv_stem=True), 36, 6, 40)


# The tokenizer.


def test_renumbering_keeps_the_order_and_the_end_of_text_highest():
    ours, plain = Tokenizer.of_corpus(CAPTIONS, 12), open_clip.SimpleTokenizer(context_length=12)
    tokens, theirs = ours(CAPTIONS), plain(CAPTIONS)
    assert torch.equal(tokens.argmax(dim=1), theirs.argmax(dim=1))
    assert tokens.max() == len(ours) - 1 and ours.ids[-1] == plain.eot_token_id and ours.ids[-2] == plain.sot_token_id
    assert torch.equal(ours.ids[tokens], theirs)
    assert (tokens.max(dim=1).values == len(ours) - 1).all()
    assert sorted(tokens.unique().tolist()) == list(range(len(ours)))
    assert ours.ids[0] == 0 and tokens[0, -1] == 0


def test_unknown_words_become_padding():
    ours = Tokenizer.of_corpus(CAPTIONS, 12)
    known, unknown = ours(["a red disc", "a zebra disc"])
    assert known[:5].tolist()[2] != 0
    assert unknown[:5].tolist() == [known[0], known[1], 0, known[3], known[4]]


def test_a_long_caption_still_ends():
    ours = Tokenizer.of_corpus(CAPTIONS, 12)
    tokens = ours(["red " * 50])[0]
    assert tokens[-1] == len(ours) - 1 and (tokens[1:-1] == tokens[1]).all() and tokens[1] != 0


def test_a_released_teacher_keeps_the_whole_vocabulary():
    assert len(Tokenizer(77)) == 49408
    assert torch.equal(Tokenizer(77)(CAPTIONS), open_clip.SimpleTokenizer(context_length=77)(CAPTIONS))


# On disk.


def store_tiny(folder, conv_stem: bool = True):
    tokenizer = Tokenizer.of_corpus(CAPTIONS, 12)
    model = tiny(conv_stem, len(tokenizer))
    config = {
        "kind": "tiny",
        "tiny": {**SIZES, "conv_stem": conv_stem},
        "image_size": 32,
        "patch_size": 8,
        "token_ids": tokenizer.ids.tolist(),
        "world": None,
    }
    save_teacher(folder, model, config)
    return model, tokenizer, config


@pytest.mark.parametrize("conv_stem", [False, True])
def test_a_teacher_comes_back_exactly(tmp_path, conv_stem):
    model, tokenizer, config = store_tiny(tmp_path / "teacher", conv_stem)
    again, loaded_tokenizer, loaded_config = load_teacher(tmp_path / "teacher")
    assert loaded_config == config and torch.equal(loaded_tokenizer(CAPTIONS), tokenizer(CAPTIONS))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again.encode_image(IMAGES), model.encode_image(IMAGES))
    assert torch.equal(again.encode_text(loaded_tokenizer(CAPTIONS)), model.encode_text(tokenizer(CAPTIONS)))
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())


def test_the_same_teacher_is_the_same_files(tmp_path):
    for name in ("one", "two"):
        store_tiny(tmp_path / name)
    for file in ("teacher.safetensors", "teacher.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_folder_of_no_teacher_is_refused(tmp_path):
    save_no_teacher(tmp_path)
    assert read_checked(tmp_path / "teacher.json") == {"kind": "none"}
    with pytest.raises(UserError, match="holds no teacher"):
        load_teacher(tmp_path)


def test_a_class_is_the_unit_mean_of_unit_features():
    tokenizer = Tokenizer.of_corpus(CAPTIONS, 12)
    model = tiny(False, len(tokenizer))
    embeddings = embed_classes(model, tokenizer, Wording(["red disc", "stars"], ["a photo of a {}", "a picture of two {}"]))
    assert embeddings.shape == (2, 12)
    for row, texts in enumerate(
        (["a photo of a red disc", "a picture of two red disc"], ["a photo of a stars", "a picture of two stars"])
    ):
        features = model.encode_text(tokenizer(texts)).double().numpy()
        mean = (features / np.linalg.norm(features, axis=1, keepdims=True)).mean(axis=0)
        assert embeddings[row].tolist() == pytest.approx((mean / np.linalg.norm(mean)).tolist(), abs=1e-5)


# Its training.


def test_the_contrast_by_hand():
    """The loss is the mean of both directions' cross entropies of scale x cosine, here over three pairs."""
    tokenizer = Tokenizer.of_corpus(CAPTIONS, 12)
    model = tiny(True, len(tokenizer))
    tokens = tokenizer(CAPTIONS[:3])
    images, texts = (torch.nn.functional.normalize(x, dim=1) for x in (model.encode_image(IMAGES), model.encode_text(tokens)))
    logits = model.logit_scale.exp() * images @ texts.T
    diagonal = logits.diagonal()
    expected = ((logits.logsumexp(1) - diagonal).mean() + (logits.logsumexp(0) - diagonal).mean()) / 2
    assert contrast.Contrast(model)(IMAGES, tokens).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_logit_scale_and_vectors_do_not_decay():
    model = tiny(True)
    plain, decayed = contrast.decay_groups(model, 0.2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.2)
    assert len(plain["params"]) + len(decayed["params"]) == len(names)
    undecayed = {names[id(p)] for p in plain["params"]}
    assert {"logit_scale", "visual.ln_post.weight", "visual.class_embedding"} <= undecayed
    assert {"visual.proj", "text_projection", "token_embedding.weight"} <= {names[id(p)] for p in decayed["params"]}
