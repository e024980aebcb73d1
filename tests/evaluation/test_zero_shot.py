"""Zero-shot classification by the student: decoders with known accuracies, and masked patches that must not be seen."""

import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from milan.core.errors import UserError
from milan.data import records
from milan.evaluation import zero_shot
from milan.method.model import MaskedPretraining, load_pretrained
from milan.params import AblationRow, Compute, LinearEval, Model, Runtime, TransformerSize
from milan.teacher.class_text import Wording, save_class_text
from milan.training.weights import save_weights
from tests.conftest import write_split
from tests.training.test_loop import launched

CPU = torch.device("cpu")
SMALL = Model("small", 16, 8, TransformerSize(16, 2, 2), TransformerSize(16, 1, 2))  # 4 patches, 2 of them visible
TEXT = torch.eye(3, 4)  # text embeddings of three classes
LABELS = [2, 2, 0, 2]
ROWS = {
    "mae": AblationRow("pixels", "mae", "random"),
    "clip_target": AblationRow("clip", "mae", "random"),
    "milan": AblationRow("clip", "prompt", "semantic"),
}
LINEAR = LinearEval(1, 0, 4, 2, 0.1, 0, 0, None, [0.5, 1.0], 16, 1.0, 0, "adamw", 0.9, 0)
RECIPE = SimpleNamespace(
    model=SMALL,
    compute=Compute("cpu", 1, "fp32", True, False),
    runtime=Runtime(1, 0, 0),
    pretrain=SimpleNamespace(ablation=ROWS, mask_ratio=0.5),
    linear_eval=LINEAR,
)


def grey(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (value,) * 3).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def val(tmp_path) -> records.Records:
    rows = [{"image": grey(50 * i), "name": str(i), "label": label} for i, label in enumerate(LABELS)]
    splits = {"val": write_split(tmp_path / "records", "val", rows, 10)}
    records.write_manifest(tmp_path / "records", splits=splits, classes=["a", "b", "c"])
    return records.Records(tmp_path / "records", "val")


def build_model(variant: str, seed: int = 0) -> MaskedPretraining:
    torch.manual_seed(seed)
    return MaskedPretraining(SMALL, ROWS[variant], 0.5, 4).eval()


def save_model(folder, model: MaskedPretraining) -> None:
    save_weights(folder / "encoder.safetensors", model.encoder.vit.state_dict())
    save_weights(folder / "decoder.safetensors", model.decoder.state_dict())


def save_constant_student(folder, variant: str, feature: torch.Tensor) -> None:
    """Save a student whose decoder predicts this feature for every token of every image."""
    model = build_model(variant)
    with torch.no_grad():
        model.decoder.decoder_pred.weight.zero_()
        model.decoder.decoder_pred.bias.copy_(feature)
    save_model(folder, model)


def accuracies(tmp_path, val, variant: str = "milan") -> dict:
    return zero_shot.accuracies(RECIPE, variant, 0, tmp_path / "weights", tmp_path / "teacher", val, CPU)


def save_texts(tmp_path, embeddings: torch.Tensor) -> None:
    save_class_text(tmp_path / "teacher", Wording(["a", "b", "c"], ["a {}"]), embeddings)


@pytest.mark.parametrize("variant", ["clip_target", "milan"])
def test_accuracy_of_a_constant_prediction(tmp_path, val, variant):
    """Predicting class 2, with a short vector, is right for three of four labels; with permuted texts for one, then none."""
    save_constant_student(tmp_path / "weights", variant, 0.01 * TEXT[2])
    save_texts(tmp_path, TEXT)
    assert accuracies(tmp_path, val, variant) == {"zero_shot_top1": 75, "zero_shot_masked_top1": 75}
    save_texts(tmp_path, TEXT[[2, 0, 1]])
    assert accuracies(tmp_path, val, variant) == {"zero_shot_top1": 25, "zero_shot_masked_top1": 25}
    save_texts(tmp_path, TEXT[[0, 2, 1]])
    assert accuracies(tmp_path, val, variant) == {"zero_shot_top1": 0, "zero_shot_masked_top1": 0}


def accuracies_of_folder(folder) -> dict:
    return accuracies(folder, records.Records(folder / "records", "val"))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_gives_the_same_accuracies(tmp_path, val, workplace, processes):
    save_constant_student(tmp_path / "weights", "milan", TEXT[2])
    save_texts(tmp_path, TEXT)
    assert launched(processes, accuracies_of_folder, tmp_path) == {"zero_shot_top1": 75, "zero_shot_masked_top1": 75}


class FirstPatchReader(torch.nn.Module):
    """A model that is right about an image, whose label it reads from the grey level, exactly if patch 0 is visible."""

    n_patches, n_visible = 4, 2

    def predict(self, images, visible, masked):
        assert (torch.cat([visible, masked], dim=1).sort(dim=1).values == torch.arange(4)).all()
        grey = ((images[:, 0, 0, 0] * 0.229 + 0.485) * 255 / 50).round().long()
        right, seen = torch.tensor(LABELS)[grey], (visible == 0).any(dim=1).long()
        return TEXT[(right + 1 - seen) % 3][:, None].expand(-1, 5, -1)


def test_whole_images_show_every_patch_and_masked_images_those_that_the_noise_keeps(tmp_path, val, monkeypatch):
    save_constant_student(tmp_path / "weights", "milan", TEXT[0])
    save_texts(tmp_path, TEXT)
    monkeypatch.setattr(zero_shot, "load_pretrained", lambda *_: FirstPatchReader())
    shares = set()
    for seed in range(6):
        noise = zero_shot.mask_noise(seed, torch.arange(4), 4)
        kept = [0 in row.argsort(descending=True)[:2].tolist() for row in noise]
        accuracies = zero_shot.accuracies(RECIPE, "milan", seed, tmp_path / "weights", tmp_path / "teacher", val, CPU)
        assert accuracies == {"zero_shot_top1": 100, "zero_shot_masked_top1": 25 * sum(kept)}
        shares.add(sum(kept))
    assert len(shares) > 1


def test_noise_depends_on_seed_and_sample_and_differs_from_training():
    noise = zero_shot.mask_noise(3, torch.tensor([7, 2]), 9)
    assert noise[1].equal(zero_shot.mask_noise(3, torch.tensor([2]), 9)[0]) and not noise[0].equal(noise[1])
    assert not noise[1].equal(zero_shot.masking.gumbel(3, 0, 2, 9))
    assert not noise[1].equal(zero_shot.mask_noise(4, torch.tensor([2]), 9)[0])


@pytest.mark.parametrize("variant", ["clip_target", "milan"])
def test_masked_patches_are_not_seen(variant):
    """The noise keeps patches 0 and 1: pixels of patches 2 and 3 change the whole image's token and not the masked one's."""
    model, noise = build_model(variant), torch.tensor([[4.0, 3, 2, 1]])
    images = torch.randn(1, 3, 16, 16)
    changed = images.clone()
    changed[:, :, 8:] = 100  # the lower half
    with torch.no_grad():
        before, after = (zero_shot.predict_class_tokens(model, some, noise)[0] for some in (images, changed))
    assert not before[0].allclose(after[0], atol=1e-2) and before[1].equal(after[1])


@pytest.mark.parametrize("variant", ["clip_target", "milan"])
def test_the_mask_token_does_not_affect_whole_images(variant):
    """A mask token of 10,000 leaves the class token unchanged; the prompting decoder passes the encoder's token through."""
    model, noise = build_model(variant), torch.zeros(2, 4)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = zero_shot.predict_class_tokens(model, images, noise)[:, 0]
        model.decoder.mask_token.fill_(1e4)
        after = zero_shot.predict_class_tokens(model, images, noise)[:, 0]
        decoder, latent = model.decoder, model.encoder(images)
        if variant == "milan":
            by_hand = decoder.decoder_embed(latent) + decoder.decoder_pos_embed
            by_hand = decoder.decoder_pred(decoder.decoder_norm(by_hand))[:, 0]
            assert torch.allclose(before, by_hand, atol=1e-5)
    assert before.equal(after)


@pytest.mark.parametrize("lacking", ["text", "decoder", "CLIP target"])
def test_a_student_without_decoder_or_text_has_no_accuracies(tmp_path, val, lacking):
    save_constant_student(tmp_path / "weights", "milan", TEXT[2])
    save_texts(tmp_path, TEXT)
    if lacking == "text":
        (tmp_path / "teacher/class_text.safetensors").unlink()
    if lacking == "decoder":
        (tmp_path / "weights/decoder.safetensors").unlink()
    assert accuracies(tmp_path, val, "mae" if lacking == "CLIP target" else "milan") == {}
    assert len(zero_shot.input_files(tmp_path / "weights", tmp_path / "teacher")) == 1 + (lacking == "CLIP target")


def test_a_student_is_loaded_as_saved_and_a_damaged_file_is_named(tmp_path):
    model = build_model("milan", seed=5)
    save_model(tmp_path, model)
    loaded = load_pretrained(tmp_path, SMALL, ROWS["milan"], 0.5, 4).state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in model.state_dict().items())
    (tmp_path / "decoder.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"decoder\.safetensors is damaged"):
        load_pretrained(tmp_path, SMALL, ROWS["milan"], 0.5, 4)
