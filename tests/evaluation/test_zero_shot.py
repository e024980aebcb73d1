"""Zero-shot by the student: planted decoders whose accuracies are known, and what a mask hides."""

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
TEXT = torch.eye(3, 4)  # of three classes
LABELS = [2, 2, 0, 2]
ROWS = {
    "mae": AblationRow("pixels", "mae", "random"),
    "clip_target": AblationRow("clip", "mae", "random"),
    "milan": AblationRow("clip", "prompt", "semantic"),
}
LINEAR = LinearEval(1, 0, 4, 2, 0.1, 0, 0, None, "adamw", 0.9, [0.5, 1.0], 0, 16)
RECIPE = SimpleNamespace(
    model=SMALL,
    compute=Compute("cpu", 1, "fp32", True, False),
    runtime=Runtime(1, 1, 0, 0),
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


def built(variant: str, seed: int = 0) -> MaskedPretraining:
    torch.manual_seed(seed)
    return MaskedPretraining(SMALL, ROWS[variant], 0.5, 4).eval()


def store(folder, model: MaskedPretraining) -> None:
    save_weights(folder / "encoder.safetensors", model.encoder.vit.state_dict())
    save_weights(folder / "decoder.safetensors", model.decoder.state_dict())


def planted(folder, variant: str, says: torch.Tensor) -> None:
    """A student whose decoder predicts this feature of every token of every image."""
    model = built(variant)
    with torch.no_grad():
        model.decoder.decoder_pred.weight.zero_()
        model.decoder.decoder_pred.bias.copy_(says)
    store(folder, model)


def tops(tmp_path, val, variant: str = "milan") -> dict:
    return zero_shot.accuracies(RECIPE, variant, 0, tmp_path / "weights", tmp_path / "teacher", val, CPU)


def ask(tmp_path, embeddings: torch.Tensor) -> None:
    save_class_text(tmp_path / "teacher", Wording(["a", "b", "c"], ["a {}"]), embeddings)


@pytest.mark.parametrize("variant", ["clip_target", "milan"])
def test_the_share_of_the_class_that_is_predicted(tmp_path, val, variant):
    """Class 2 of every image, whatever the length of the prediction: three of four labels; with the texts moved on, none."""
    planted(tmp_path / "weights", variant, 0.01 * TEXT[2])
    ask(tmp_path, TEXT)
    assert tops(tmp_path, val, variant) == {"zero_shot_top1": 75, "zero_shot_masked_top1": 75}
    ask(tmp_path, TEXT[[2, 0, 1]])
    assert tops(tmp_path, val, variant) == {"zero_shot_top1": 25, "zero_shot_masked_top1": 25}
    ask(tmp_path, TEXT[[0, 2, 1]])
    assert tops(tmp_path, val, variant) == {"zero_shot_top1": 0, "zero_shot_masked_top1": 0}


def of_folder(folder) -> dict:
    return tops(folder, records.Records(folder / "records", "val"))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_images(tmp_path, val, workplace, processes):
    planted(tmp_path / "weights", "milan", TEXT[2])
    ask(tmp_path, TEXT)
    assert launched(processes, of_folder, tmp_path) == {"zero_shot_top1": 75, "zero_shot_masked_top1": 75}


class Reader(torch.nn.Module):
    """Right about an image whenever it sees patch 0, whose right answer it knows by the image's grey; else wrong."""

    n_patches, n_visible = 4, 2

    def predict(self, images, visible, masked):
        assert (torch.cat([visible, masked], dim=1).sort(dim=1).values == torch.arange(4)).all()
        grey = ((images[:, 0, 0, 0] * 0.229 + 0.485) * 255 / 50).round().long()
        right, seen = torch.tensor(LABELS)[grey], (visible == 0).any(dim=1).long()
        return TEXT[(right + 1 - seen) % 3][:, None].expand(-1, 5, -1)


def test_whole_images_show_every_patch_and_masked_ones_what_their_noise_keeps(tmp_path, val, monkeypatch):
    planted(tmp_path / "weights", "milan", TEXT[0])
    ask(tmp_path, TEXT)
    monkeypatch.setattr(zero_shot, "load_pretrained", lambda *_: Reader())
    shares = set()
    for seed in range(6):
        noise = zero_shot.noise_of(seed, torch.arange(4), 4)
        kept = [0 in row.argsort(descending=True)[:2].tolist() for row in noise]
        found = zero_shot.accuracies(RECIPE, "milan", seed, tmp_path / "weights", tmp_path / "teacher", val, CPU)
        assert found == {"zero_shot_top1": 100, "zero_shot_masked_top1": 25 * sum(kept)}
        shares.add(sum(kept))
    assert len(shares) > 1


def test_noise_is_of_the_sample_and_of_no_training_epoch():
    noise = zero_shot.noise_of(3, torch.tensor([7, 2]), 9)
    assert noise[1].equal(zero_shot.noise_of(3, torch.tensor([2]), 9)[0]) and not noise[0].equal(noise[1])
    assert not noise[1].equal(zero_shot.masking.gumbel(3, 0, 2, 9))
    assert not noise[1].equal(zero_shot.noise_of(4, torch.tensor([2]), 9)[0])


@pytest.mark.parametrize("variant", ["clip_target", "milan"])
def test_what_is_masked_is_not_seen(variant):
    """The pixels of patches 2 and 3 change the whole image's token and not the masked image's, whose noise keeps 0 and 1."""
    model, noise = built(variant), torch.tensor([[4.0, 3, 2, 1]])
    images = torch.randn(1, 3, 16, 16)
    changed = images.clone()
    changed[:, :, 8:] = 100  # the lower half
    with torch.no_grad():
        before, after = (zero_shot.class_tokens(model, some, noise)[0] for some in (images, changed))
    assert not before[0].allclose(after[0], atol=1e-2) and before[1].equal(after[1])


@pytest.mark.parametrize("variant", ["clip_target", "milan"])
def test_of_a_whole_image_the_mask_token_says_nothing(variant):
    """A mask token of 10,000 changes no class token of a whole image; the encoder's tokens go on as its own head has them."""
    model, noise = built(variant), torch.zeros(2, 4)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = zero_shot.class_tokens(model, images, noise)[:, 0]
        model.decoder.mask_token.fill_(1e4)
        after = zero_shot.class_tokens(model, images, noise)[:, 0]
        decoder, latent = model.decoder, model.encoder(images)
        if variant == "milan":
            by_hand = decoder.decoder_embed(latent) + decoder.decoder_pos_embed
            by_hand = decoder.decoder_pred(decoder.decoder_norm(by_hand))[:, 0]
            assert torch.allclose(before, by_hand, atol=1e-5)
    assert before.equal(after)


@pytest.mark.parametrize("lacking", ["text", "decoder", "CLIP target"])
def test_a_student_without_decoder_or_text_has_none(tmp_path, val, lacking):
    planted(tmp_path / "weights", "milan", TEXT[2])
    ask(tmp_path, TEXT)
    if lacking == "text":
        (tmp_path / "teacher/class_text.safetensors").unlink()
    if lacking == "decoder":
        (tmp_path / "weights/decoder.safetensors").unlink()
    assert tops(tmp_path, val, "mae" if lacking == "CLIP target" else "milan") == {}
    assert len(zero_shot.files(tmp_path / "weights", tmp_path / "teacher")) == 1 + (lacking == "CLIP target")


def test_a_student_is_loaded_as_it_was_stored_and_a_damaged_one_is_named(tmp_path):
    model = built("milan", seed=5)
    store(tmp_path, model)
    found = load_pretrained(tmp_path, SMALL, ROWS["milan"], 0.5, 4).state_dict()
    assert all(found[name].equal(tensor) for name, tensor in model.state_dict().items())
    (tmp_path / "decoder.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"decoder\.safetensors is damaged"):
        load_pretrained(tmp_path, SMALL, ROWS["milan"], 0.5, 4)
