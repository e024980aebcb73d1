"""milan.load_encoder and milan.load_pretrained give the models that wrote the files, and ask for what no file tells."""

import subprocess
import sys

import pytest
import torch

import milan
from milan.core.errors import UserError
from milan.method.model import MaskedPretraining
from milan.params import AblationRow, Model, TransformerSize
from milan.training.weights import save_weights
from tests.conftest import ROOT

SIZE = Model("tiny", 12, 4, TransformerSize(24, 2, 3), TransformerSize(16, 2, 2))
IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def model_of(row: AblationRow, out_dim: int) -> MaskedPretraining:
    """Return a model with random values everywhere."""
    model, generator = MaskedPretraining(SIZE, row, 0.75, out_dim).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


@pytest.fixture(params=["official file", "stage's folder"])
def saved(request, tmp_path):
    """Return a function that saves a model, and returns the path."""

    def save(model: MaskedPretraining):
        encoder, decoder = model.encoder.vit.state_dict(), model.decoder.state_dict()
        if request.param == "official file":
            torch.save({"model": {**encoder, **decoder}}, tmp_path / "milan.pth")
            return tmp_path / "milan.pth"
        save_weights(tmp_path / "encoder.safetensors", encoder)
        save_weights(tmp_path / "decoder.safetensors", decoder)
        return str(tmp_path)

    return save


@pytest.mark.parametrize("row, out_dim", [
    (AblationRow("clip", "prompt", "semantic"), 20),
    (AblationRow("clip", "mae", "random"), 20),
    (AblationRow("pixels", "mae", "random"), 48),
])  # fmt: skip
def test_the_loaded_models_compute_what_the_saved_one_does(saved, row, out_dim):
    model = model_of(row, out_dim)
    path = saved(model)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2)).expand(2, -1)
    loaded = milan.load_pretrained(path, num_heads=3, decoder_heads=2)
    with torch.inference_mode():
        assert milan.load_encoder(path, num_heads=3)(IMAGES).equal(model.encoder(IMAGES))
        assert not milan.load_encoder(path, num_heads=6)(IMAGES).allclose(model.encoder(IMAGES), atol=1e-3)
        given = (IMAGES, order[:, : loaded.n_visible], order[:, loaded.n_visible :])
        assert loaded.predict(*given).equal(model.predict(*given))
    assert (loaded.n_visible, loaded.row.target, loaded.row.decoder) == (2, row.target, row.decoder)
    assert not loaded.training and not milan.load_encoder(path, num_heads=3).training


def test_heads_that_no_file_tells_are_asked_for(saved):
    path = saved(model_of(AblationRow("clip", "prompt", "semantic"), 20))
    with pytest.raises(UserError, match="no published model is 24 wide.* give num_heads"):
        milan.load_encoder(path)
    with pytest.raises(UserError, match="no published model is 16 wide.* give decoder_heads"):
        milan.load_pretrained(path, num_heads=3)
    with pytest.raises(UserError, match="embed_dim 24 must be a multiple of num_heads 5"):
        milan.load_encoder(path, num_heads=5)


@pytest.mark.parametrize(
    "config, heads",
    [('{"model_args": {"num_heads": 6}}', 6), ('{"model_type": "vit_mae", "num_attention_heads": 6}', 6), ('{"model_args": null}', None)],
)
def test_a_config_beside_the_weights_tells_the_heads(tmp_path, config, heads):
    """Of milan.export, of Hugging Face's ViTMAE, which has its decoder in the same file, and of timm, which does not say."""
    model = model_of(AblationRow("clip", "mae", "random"), 20)
    save_weights(tmp_path / "model.safetensors", {**model.encoder.vit.state_dict(), **model.decoder.state_dict()})
    (tmp_path / "config.json").write_text(config)
    if heads is None:
        with pytest.raises(UserError, match="give num_heads"):
            milan.load_encoder(tmp_path)
    else:
        assert milan.load_encoder(tmp_path).vit.blocks[0].attn.num_heads == heads
        assert milan.load_pretrained(tmp_path, decoder_heads=2).decoder.state_dict().keys() == model.decoder.state_dict().keys()


def test_without_a_decoder_or_any_weights_it_says_so(tmp_path):
    encoder = model_of(AblationRow("clip", "prompt", "semantic"), 20).encoder.vit.state_dict()
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    with pytest.raises(UserError, match="holds no decoder tensors"):
        milan.load_pretrained(tmp_path / "encoder.pth", num_heads=3, decoder_heads=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is a folder"):
        milan.load_encoder(tmp_path / "empty")
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        milan.load_decoder  # noqa: B018


def test_torch_hub_finds_both_functions(saved):
    path = saved(model := model_of(AblationRow("clip", "prompt", "semantic"), 20))
    for name, heads in (("load_encoder", {}), ("load_pretrained", {"decoder_heads": 2})):
        loaded = torch.hub.load(str(ROOT), name, path, num_heads=3, source="local", **heads)
        with torch.inference_mode():
            assert getattr(loaded, "encoder", loaded)(IMAGES).equal(model.encoder(IMAGES))


def test_importing_milan_loads_no_library():
    """What a stage starts with stays as quick as it was."""
    asked = "import sys; before = set(sys.modules); import milan; print({n.split('.')[0] for n in set(sys.modules) - before})"
    loaded = subprocess.run([sys.executable, "-S", "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert eval(loaded) - set(sys.stdlib_module_names) == {"milan"}
