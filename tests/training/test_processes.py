"""Another number of processes: a run continued by more or fewer, and the models of all stages under one and two."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from milan.core.errors import Preempted
from milan.core.validation import validate
from milan.data import seeding, transforms
from milan.evaluation.classifier import FinetuneLoss, build_classifier
from milan.evaluation.linear import LinearHead, ProbeLoss
from milan.method.encoder import Encoder
from milan.params import Params
from milan.segmentation.upernet import pixel_loss
from milan.teacher import contrast
from milan.teacher.clip import build_tiny
from milan.training import batch_norm, distributed, optim
from milan.training.batch_norm import RunningStatistics
from milan.training.device import set_up
from milan.training.loop import fit
from stages import attentive_probe, dense_probe, finetune, linear_eval, segment
from tests.training.test_loop import (
    BATCH,
    COMPUTE,
    SAMPLES,
    Points,
    assert_same,
    at,
    kill,
    launched,
    patient,
    rank_of,
    settings,
    train,
)

# A run that one number of processes began and another ends.


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 4)])
def test_a_stopped_run_is_continued_by_another_number_of_processes(workplace, before, after):
    """4 micro-batches a step: accumulated 4, 2 or 1 at a time. The signal comes to the last process alone."""
    whole = train(Points(), settings(name="undisturbed"))
    run = patient(settings())
    harm = at(1, 3, lambda: rank_of(before - 1) and kill(15))
    with pytest.raises(Preempted):
        launched(before, train, Points(harm), run)
    state = run.saved.load()
    assert 0 < state["step"] < 12 and len(state["curve"]) == state["step"]
    met = []
    result = launched(after, train, Points(lambda epoch, index: met.append((epoch, index))), run)
    assert_same(whole, result)
    assert after > 1 or len(met) == (12 - state["step"]) * BATCH


def test_the_last_step_is_kept_for_what_follows_it(workplace):
    """An evaluation that is interrupted begins again without a step."""
    whole = train(Points(), patient(settings()))
    met = []
    assert train(Points(lambda *key: met.append(key)), settings()) == whole
    assert met == []


# A batch norm's running statistics.


def test_running_statistics_by_hand():
    """Two micro-batches of two: means 2 and 6, unbiased variances 2 and 8; momentum 0.1, from mean 0 and variance 1."""
    norm = nn.BatchNorm1d(1)
    running = RunningStatistics(nn.Sequential(norm))
    for micro_batch in ([[1.0], [3.0]], [[4.0], [8.0]]):
        norm(torch.tensor(micro_batch))
        running.note()
        assert (norm.running_mean.item(), norm.running_var.item(), norm.num_batches_tracked.item()) == (0, 1, 0)
    running.update(2)
    assert norm.running_mean.item() == pytest.approx(0.1 * 4)
    assert norm.running_var.item() == pytest.approx(0.9 * 1 + 0.1 * 5)
    assert norm.num_batches_tracked.item() == 1
    norm(torch.tensor([[1.0], [1.0]]))
    running.note()
    running.update(1)
    assert norm.running_mean.item() == pytest.approx(0.9 * 0.4 + 0.1)


@pytest.mark.parametrize("batch_size, said", [
    (16, ""),
    (32, "sees 16 x 1 images at a time, as published the whole batch of 32: for that, -S segment.micro_batch=32."),
])  # fmt: skip
def test_what_segmentation_s_batch_norm_sees_is_said(capfd, batch_size, said):
    batch_norm.say_what_it_sees("segment", batch_size, micro_batch=16)
    out = capfd.readouterr().out
    assert said in out and bool(out) == bool(said)


# The stages' own models.


class Pictures:
    """Item (epoch, index) -> all that any stage takes, from keys alone."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, key: tuple[int, int]) -> dict:
        draw = seeding.generator(4, "picture", *key)
        return {
            "image": torch.randint(0, 256, (3, 16, 16), generator=draw, dtype=torch.uint8),
            "label": torch.randint(0, 5, (), generator=draw),
            "labels": torch.randint(0, 5, (16, 16), generator=draw, dtype=torch.uint8),
            "features": torch.randn(16, generator=draw),
            "tokens": torch.randint(1, 9, (6,), generator=draw),
        }


def of_linear_eval(p: Params) -> tuple:
    loss = ProbeLoss(LinearHead(16, 5))
    return loss, linear_eval.optimizer_of(p, loss.head), lambda b: (b["features"], b["label"])


def of_attentive_probe(p: Params) -> tuple:
    loss = ProbeLoss(attentive_probe.build(p, 5))
    return loss, attentive_probe.optimizer_of(p, loss.head), lambda b: (b["features"].unflatten(1, (1, 16)), b["label"])


def of_finetune(p: Params) -> tuple:
    vit = build_classifier(p.model, p.finetune, 5, Encoder(p.model).vit.state_dict())
    optimizer = optim.adamw(finetune.layer_groups(vit, p.finetune), (0.9, 0.999))
    return FinetuneLoss(vit, p.finetune, 5), optimizer, partial(finetune.inputs, p.finetune.random_erasing)


def of_segment(p: Params) -> tuple:
    model = segment.build(p, 5, Encoder(p.model).vit.state_dict(), torch.device("cpu"))
    inputs = lambda b: (transforms.normalise(b["image"]), b["labels"])  # noqa: E731
    return segment.SegmentLoss(model), optim.adamw(optim.decay_groups(model, 0.05), (0.9, 0.999)), inputs


def of_dense_probe(p: Params) -> tuple:
    head = dense_probe.build(p, 5, torch.device("cpu"))
    as_features = lambda images: nn.functional.pixel_unshuffle(images[:, :1].float() / 255, 4)  # noqa: E731
    return ProbeLoss(head, pixel_loss), dense_probe.optimizer_of(p, head), lambda b: (as_features(b["image"]), b["labels"])


def of_teacher(p: Params) -> tuple:
    loss = contrast.Contrast(build_tiny(p.teacher.tiny, 16, 8, 9))
    optimizer = optim.adamw(contrast.decay_groups(loss.model, 0.05), (0.9, 0.98))
    return loss, optimizer, lambda b: (transforms.normalise(b["image"]), b["tokens"])


def few_steps(made: Callable[[Params], tuple], p: Params, **changes) -> dict:
    """Three steps of a stage's model; the contrast takes its share of the batch at once, as in the stage."""
    set_up(COMPUTE)
    seeding.seed_globals(0, "init")
    model, optimizer, inputs = made(p)
    share = {"micro_batch": BATCH // distributed.world_size()} if made is of_teacher else {}
    run = settings(
        name=f"by {distributed.world_size()} {changes}", **({"epochs": 1, "warmup_epochs": 0, "lr": 1e-3} | share | changes)
    )
    curve = fit(model, Pictures(), optimizer, run, inputs)
    return {"loss": [point["loss"] for point in curve], "buffers": {k: v.tolist() for k, v in model.named_buffers()}}


@pytest.fixture
def small(tree) -> Params:
    """The committed recipe with a ViT of two blocks of width 16 and all that draws at random switched on."""
    tower = {"embed_dim": 16, "depth": 4, "num_heads": 2}
    tree["model"] |= {"image_size": 16, "encoder": tower, "decoder": tower}
    tree["linear_eval"]["optimizer"] = "lars"
    tree["finetune"] |= {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.5, "random_erasing": 0.5, "label_smoothing": 0.1}
    tree["segment"] |= {"crop_size": 16, "stride": 16, "channels": 8, "aux_channels": 8, "drop_path": 0.5}
    tree["teacher"]["tiny"] |= {"width": 32, "layers": 1, "text_width": 24, "context_length": 6, "embed_dim": 16}
    return validate(Params, tree, "params.yaml")


@pytest.mark.parametrize("made", [of_linear_eval, of_attentive_probe, of_finetune, of_segment, of_dense_probe, of_teacher])
def test_the_stages_models_agree_over_processes(workplace, small, made):
    alone, two = few_steps(made, small), launched(2, few_steps, made, small)
    assert len(alone["loss"]) == 3
    assert two["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert alone["buffers"].keys() == two["buffers"].keys()
    for name, values in alone["buffers"].items():
        torch.testing.assert_close(torch.tensor(two["buffers"][name]), torch.tensor(values), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("made", [of_finetune, of_segment])
def test_other_micro_batches_are_other_draws(workplace, small, made):
    """So the agreement above is of dropped paths and mixed pictures too, and not for want of them."""
    assert few_steps(made, small, micro_batch=4)["loss"][0] != pytest.approx(few_steps(made, small)["loss"][0], rel=5e-5)
