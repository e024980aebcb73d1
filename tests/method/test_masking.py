"""Masking: the sampler's distribution, index arithmetic checked by hand, and sentinels that prove which tokens see which."""

import pytest
import torch

from milan.method import masking
from milan.method.model import MaskedPretraining, in_decoder_order, in_image_order
from milan.params import AblationRow, Model, TransformerSize
from milan.training.device import choose_attention

DRAWS = 20_000


def our_frequencies(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Return the share of draws that keep each patch, (N,), by our sampler with our noise."""
    n_patches = len(importance)
    noise = masking.gumbel(7, 0, 0, DRAWS * n_patches).view(DRAWS, n_patches)
    visible = masking.sample_visible(noise, count, importance.expand(DRAWS, n_patches))
    return visible.flatten().bincount(minlength=n_patches) / DRAWS


def multinomial_frequencies(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Return the same share by the release's draw, in float64."""
    generator = torch.Generator().manual_seed(7)
    rows = importance.double().expand(DRAWS, -1)
    visible = torch.multinomial(rows, count, replacement=False, generator=generator)
    return visible.flatten().bincount(minlength=len(importance)) / DRAWS


def assert_same_frequencies(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Assert that two estimates differ by less than five standard errors of their difference plus five draws."""
    spread = (reference * (1 - reference) * 2 / DRAWS).sqrt()
    assert (ours - reference).abs().le(5 * spread + 5 / DRAWS).all(), (ours, reference)


IMPORTANCES = {
    "uniform": torch.ones(12),
    "skewed": torch.tensor([100.0, 30, 10, 3, 1, 1, 0.3, 0.1, 0.03, 0.01]),
    "one far above": torch.tensor([1e6, 1, 1, 1, 1, 1]),
    "tiny": torch.tensor([4e-30, 2e-30, 1e-30, 1e-30, 5e-31, 1e-37]),
    "smaller than float32's normal numbers": torch.tensor([8e-39, 8e-39, 4e-39, 4e-39, 2e-39, 1e-39]),
    "with zeros": torch.tensor([0.0, 0.5, 0.2, 0.0, 0.2, 0.05, 0.05, 0.0]),
}


@pytest.mark.parametrize("name", IMPORTANCES)
def test_keep_probability_is_multinomials(name):
    importance = IMPORTANCES[name]
    assert_same_frequencies(our_frequencies(importance, 3), multinomial_frequencies(importance, 3))


def test_first_draw_is_proportional_to_importance():
    importance = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert_same_frequencies(our_frequencies(importance, 1), importance)


def test_scale_of_importance_does_not_matter():
    noise = masking.gumbel(0, 0, 0, 60).view(4, 15)
    importance = torch.rand(4, 15, generator=torch.Generator().manual_seed(1)) + 0.01
    # A power of two, so that the logarithms differ by one constant up to rounding.
    assert masking.sample_visible(noise, 5, importance).equal(masking.sample_visible(noise, 5, importance * 2.0**-40))


def test_fewer_positive_entries_than_patches_to_keep():
    """All positive patches are kept and the rest is drawn evenly from the zeros; torch.multinomial raises here."""
    importance = torch.tensor([0.0, 0.7, 0.0, 0.3, 0.0, 0.0])
    frequencies = our_frequencies(importance, 4)
    assert frequencies[[1, 3]].eq(1).all()
    assert_same_frequencies(frequencies[[0, 2, 4, 5]], torch.full((4,), 0.5))
    assert_same_frequencies(our_frequencies(torch.zeros(6), 3), torch.full((6,), 0.5))


def test_no_importance_is_random_masking():
    noise = masking.gumbel(3, 0, 0, DRAWS * 8).view(DRAWS, 8)
    frequencies = masking.sample_visible(noise, 2).flatten().bincount(minlength=8) / DRAWS
    assert_same_frequencies(frequencies, torch.full((8,), 0.25))


def test_draws_are_keyed_and_distinct():
    assert masking.gumbel(0, 1, 2, 9).equal(masking.gumbel(0, 1, 2, 9))
    assert not masking.gumbel(0, 1, 2, 9).equal(masking.gumbel(0, 2, 1, 9))
    visible = masking.sample_visible(masking.gumbel(0, 0, 0, 320).view(20, 16), 5)
    assert all(len(set(row)) == 5 for row in visible.tolist())


def test_indices_are_in_the_order_of_the_draw():
    noise = torch.tensor([[0.1, 3.0, -1.0, 2.0]])
    assert masking.sample_visible(noise, 2).tolist() == [[1, 3]]
    assert masking.sample_visible(noise, 2, torch.tensor([[100.0, 1.0, 1.0, 1.0]])).tolist() == [[0, 1]]


@pytest.mark.parametrize(("n", "ratio", "kept"), [(196, 0.75, 49), (64, 0.75, 16), (100, 0.9, 9), (36, 0.5, 18)])
def test_number_of_visible_patches(n, ratio, kept):
    """100 patches at ratio 0.9 give 9, not 10: the release truncates in floating point."""
    assert masking.n_visible(n, ratio) == kept


VISIBLE = torch.tensor([[4, 1], [0, 2]])
MASKED = torch.tensor([[0, 2, 3], [1, 3, 4]])


def test_complement_and_polarity():
    assert masking.complement(VISIBLE, 5).tolist() == MASKED.tolist()
    assert masking.mask_of(VISIBLE, 5).tolist() == [[1, 0, 1, 1, 0], [0, 1, 0, 1, 1]]  # 0 is keep, 1 is remove


def test_all_patches_are_every_index_in_order():
    assert masking.all_patches(2, 3).tolist() == [[0, 1, 2], [0, 1, 2]]


PATCHES = torch.tensor(
    [[[10.0, -10], [11, -11], [12, -12], [13, -13], [14, -14]], [[20, -20], [21, -21], [22, -22], [23, -23], [24, -24]]]
)


def test_gather():
    assert masking.gather(PATCHES, VISIBLE)[..., 0].tolist() == [[14, 11], [20, 22]]
    assert masking.gather(PATCHES, MASKED)[..., 1].tolist() == [[-10, -12, -13], [-21, -23, -24]]


def test_decoder_order_and_back():
    tokens = torch.cat([torch.tensor([[[1.0, -1]], [[2, -2]]]), PATCHES], dim=1)  # class token, then patches
    ordered = in_decoder_order(tokens, VISIBLE, MASKED)
    assert ordered[..., 0].tolist() == [[1, 14, 11, 10, 12, 13], [2, 20, 22, 21, 23, 24]]
    assert in_image_order(ordered, VISIBLE, MASKED).equal(tokens)


def tiny_model(decoder: str) -> MaskedPretraining:
    torch.manual_seed(0)
    size = Model("tiny", 16, 4, TransformerSize(24, 2, 3), TransformerSize(16, 2, 2))
    return MaskedPretraining(size, AblationRow("clip", decoder, "random"), 0.75, 12).eval()


def draw_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images (2, 3, 16, 16), visible (2, 4) and masked (2, 12)."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    visible = masking.sample_visible(masking.gumbel(0, 0, 0, 32).view(2, 16), 4)
    return images, visible, masking.complement(visible, 16)


@torch.no_grad()
def test_encoder_does_not_see_masked_patches():
    images, visible, masked = draw_inputs()
    model = tiny_model("prompt")
    before = model.encoder(images, visible)
    spoilt = images.clone()
    for row, patches in enumerate(masked.tolist()):
        for patch in patches:
            top, left = 4 * (patch // 4), 4 * (patch % 4)
            spoilt[row, :, top : top + 4, left : left + 4] = 10_000
    assert model.encoder(spoilt, visible).equal(before)
    assert not model.encoder(spoilt, masked[:, :4]).equal(model.encoder(images, masked[:, :4]))


@torch.no_grad()
@pytest.mark.parametrize(("decoder", "seen_depends"), [("prompt", False), ("mae", True)])
def test_which_tokens_see_the_mask_token(decoder, seen_depends):
    """The mask token changes the encoder's tokens in MAE's decoder, where all tokens mix, and not in the prompting decoder."""
    images, visible, masked = draw_inputs()
    model = tiny_model(decoder)
    before = model.predict(images, visible, masked)
    model.decoder.mask_token.fill_(10_000)
    after = model.predict(images, visible, masked)
    seen = 1 + visible.shape[1]
    assert after[:, :seen].equal(before[:, :seen]) != seen_depends
    assert not torch.allclose(after[:, seen:], before[:, seen:])


@torch.no_grad()
def test_prompt_is_not_normalised():
    """Keys and values of the prompt are the plain projection of the encoder's tokens, in every block."""
    images, visible, masked = draw_inputs()
    decoder = tiny_model("prompt").decoder
    seen = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    for (keys, values), block in zip(decoder.project_prompt(seen), decoder.decoder_blocks, strict=True):
        expected_keys, expected_values = block.attn.kv(seen).chunk(2, dim=-1)
        assert torch.allclose(keys.transpose(1, 2).flatten(2), expected_keys, atol=1e-6)
        assert torch.allclose(values.transpose(1, 2).flatten(2), expected_values, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["prompt", "mae"])
def test_unfused_attention_equals_the_fused_one(decoder):
    """In encoder and decoder; a CPU computes the unfused one in bf16."""
    cpu = torch.device("cpu")
    fused, before = [], tiny_model(decoder).predict(*draw_inputs())
    try:
        for precision in ("bf16", "fp32"):
            choose_attention(precision, cpu)
            model = tiny_model(decoder)
            attentions = [block.attn for block in [*model.encoder.vit.blocks, *model.decoder.decoder_blocks]]
            fused.append({getattr(a, "fused_attn", getattr(a, "fused", None)) for a in attentions})
            torch.testing.assert_close(model.predict(*draw_inputs()), before, atol=1e-5, rtol=1e-5)
    finally:
        choose_attention("fp32", cpu)
    assert fused == [{False}, {True}]
