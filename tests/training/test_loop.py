"""The training loop: the same data and numbers for any number of processes, and the same bytes after any interruption."""

import dataclasses
import errno
import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from milan.core.errors import PREEMPTED, UserError
from milan.data import seeding
from milan.method import masking
from milan.method.model import MaskedPretraining
from milan.params import AblationRow, Compute, Model, Runtime, Training, TransformerSize
from milan.training import distributed, optim
from milan.training.device import set_up
from milan.training.loop import FitSettings, Loop, Order, fit
from milan.training.resume import SavedState
from milan.training.weights import save_weights
from tests.conftest import forked, saved_state

SAMPLES, BATCH, MICRO = 24, 8, 2  # 3 steps an epoch, 4 micro-batches a step
EPOCHS = 4
STEPS = EPOCHS * SAMPLES // BATCH


# The order of the data.


def keys_by_rank(order: Order, world_size: int, start: int = 0) -> list[list[list]]:
    """Return the micro-batches of every rank."""
    return [list(order.keys(start, rank, world_size)) for rank in range(world_size)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_sample_once_an_epoch_whatever_the_number_of_processes(world):
    order = Order(SAMPLES, BATCH, MICRO, EPOCHS, seed=5)
    assert (order.steps_per_epoch, order.total_steps, order.micro_batches) == (3, 12, 4)
    keys = [key for rank in keys_by_rank(order, world) for micro in rank for key in micro]
    for epoch in range(EPOCHS):
        assert sorted(index for e, index in keys if e == epoch) == list(range(SAMPLES))
    assert len(keys) == EPOCHS * SAMPLES


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_share_each_step_s_micro_batches_in_turn(world):
    order = Order(SAMPLES, BATCH, MICRO, EPOCHS, seed=5)
    alone, parts = keys_by_rank(order, 1)[0], keys_by_rank(order, world)
    for step in range(order.total_steps):
        for micro in range(4):
            turn = step * (4 // world) + micro // world
            assert parts[micro % world][turn] == alone[step * 4 + micro]


def test_the_order_changes_with_epoch_and_seed_and_starts_anywhere():
    order = Order(SAMPLES, BATCH, MICRO, EPOCHS, seed=5)
    alone = keys_by_rank(order, 1)[0]
    indices = [[index for micro in alone[12 * e : 12 * e + 12] for _, index in micro] for e in range(2)]
    assert indices[0] != indices[1]
    assert keys_by_rank(Order(SAMPLES, BATCH, MICRO, EPOCHS, seed=6), 1)[0] != alone
    for start in (1, 3, 7, 12):
        assert keys_by_rank(order, 1, start)[0] == alone[start * 4 :]


def test_what_does_not_fill_a_batch_waits_for_the_next_epoch():
    order = Order(21, 8, 2, 2.5, seed=0)
    assert (order.steps_per_epoch, order.total_steps) == (2, 5)
    epoch = [index for micro in keys_by_rank(order, 1)[0][:8] for _, index in micro]
    assert len(set(epoch)) == len(epoch) == 16


def test_a_data_set_smaller_than_a_batch_is_said():
    with pytest.raises(UserError, match="A batch of 8.*the data set has 7"):
        Order(7, 8, 2, 1, seed=0)


# A small training that tests can observe, interrupt and repeat.


def unharmed(epoch: int, index: int) -> None:
    pass


class Points:
    """A data set whose item (epoch, index) is a point drawn from both; `harm` is called with every key."""

    def __init__(self, harm: Callable[[int, int], None] = unharmed, value: Callable[[int, int], float] | None = None):
        self.harm, self.value = harm, value

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, key: tuple[int, int]) -> dict:
        self.harm(*key)
        x = torch.randn(6, generator=seeding.generator(1, "point", *key))
        return {"x": x * self.value(*key) if self.value else x, "y": 2 * x[:1]}


class Regression(nn.Module):
    """Two layers with dropout between them, so that the model draws random numbers too."""

    def __init__(self):
        super().__init__()
        seeding.seed_globals(0, "init")
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.layers(x) - y).square().mean()


COMPUTE = Compute("cpu", 1, "fp32", True, False)


def settings(saved: SavedState | None = None, name: str = "tiny", **changes) -> FitSettings:
    training = dict(
        epochs=EPOCHS, warmup_epochs=1, batch_size=BATCH, micro_batch=MICRO, lr=0.01, min_lr=0, weight_decay=0.05, clip_grad=1.0
    )
    saved = saved or saved_state(name)
    return FitSettings(name, Training(**(training | changes)), COMPUTE, Runtime(1, workers=0, save_seconds=0), seed=3, saved=saved)


def patient(run: FitSettings) -> FitSettings:
    """Return the same settings with an hour between saves."""
    return dataclasses.replace(run, runtime=dataclasses.replace(run.runtime, save_seconds=3600))


def train(data: Points, run: FitSettings, out: Path | None = None, monitor_epochs: float = 0) -> dict:
    """Build, fit and save, as a stage does; weights are returned as lists, to be sent between processes."""
    set_up(run.compute)
    model = Regression()
    if monitor_epochs:
        run = dataclasses.replace(run, monitor=lambda: look(model), monitor_epochs=monitor_epochs)
    optimizer = optim.adamw(optim.decay_groups(model, run.training.weight_decay), (0.9, 0.95))
    curve = fit(model, data, optimizer, run, lambda batch: (batch["x"], batch["y"]))
    if out is not None and distributed.rank() == 0:
        save_weights(out, model.state_dict())
    return {"curve": curve, "weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()}}


def look(model: Regression) -> dict[str, float]:
    """Return the model's mean answer to fixed points: a value of its weights alone, as dropout is off. Draw numbers meanwhile."""
    torch.rand(3)
    with torch.inference_mode():
        return {"answer": distributed.mean(model.layers(torch.linspace(-1, 1, 30).view(5, 6)).mean()).item()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def undisturbed(workplace) -> str:
    train(Points(), settings(name="undisturbed"), workplace / "undisturbed")
    return digest(workplace / "undisturbed")


def at(epoch: int, count: int, harm: Callable[[], None]) -> Callable[[int, int], None]:
    """Return a function of (epoch, index) that calls harm at the count-th sample of an epoch."""
    samples = [0]

    def harm_once(current: int, index: int) -> None:
        samples[0] += current == epoch
        if current == epoch and samples[0] == count:
            harm()

    return harm_once


def kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def fail() -> None:
    raise RuntimeError("the lights went out")


def test_the_curve_has_every_step_of_a_short_run(workplace):
    curve = train(Points(), settings())["curve"]
    assert [point["step"] for point in curve] == list(range(1, STEPS + 1))
    assert [point["epoch"] for point in curve[:4]] == [0.3333, 0.6667, 1.0, 1.3333]
    # Warm-up over the first of 4 epochs, then half a cosine: the rate of step k is that at epoch k / 3.
    assert [point["lr"] for point in curve[:4]] == pytest.approx([0, 0.01 / 3, 0.02 / 3, 0.01])
    assert curve[-1]["lr"] == pytest.approx(0.01 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (11 / 3 - 1) / 3)).item()))


def test_a_longer_run_s_curve_has_at_most_a_hundred_points(workplace):
    points = train(Points(), settings(epochs=40))["curve"]
    assert [point["step"] for point in points] == list(range(2, 121, 2))
    assert sum(point["loss"] for point in points[-10:]) < 0.5 * sum(point["loss"] for point in points[:10])


def test_the_first_steps_equal_a_plain_loop_with_adamw(workplace):
    """Compare with a plain torch loop over the same samples, with one micro-batch a step."""
    run = settings(epochs=1, warmup_epochs=0, micro_batch=BATCH, clip_grad=None)
    ours = train(Points(), run)
    model = Regression()
    model.train()
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0},
            {"params": [p for p in model.parameters() if p.ndim > 1]},
        ],
        lr=0,
        betas=(0.9, 0.95),
        weight_decay=0.05,
    )
    order, data = seeding.permutation(SAMPLES, 3, "shuffle", 0).tolist(), Points()
    for step in range(3):
        batch = [data[0, index] for index in order[step * BATCH : (step + 1) * BATCH]]
        for group in reference.param_groups:
            group["lr"] = optim.lr_at(step / 3, lr=0.01, min_lr=0, warmup_epochs=0, epochs=1)
        seeding.seed_globals(3, "step", step, 0)
        loss = model(torch.stack([item["x"] for item in batch]), torch.stack([item["y"] for item in batch]))
        reference.zero_grad()
        loss.backward()
        reference.step()
        assert ours["curve"][step]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(torch.tensor(ours["weights"][name]), tensor, atol=1e-6, rtol=1e-5)


# Any number of processes.


def assert_same(one: dict, other: dict) -> None:
    assert [p["step"] for p in one["curve"]] == [p["step"] for p in other["curve"]]
    for name in ("loss", "lr"):
        assert [p[name] for p in other["curve"]] == pytest.approx([p[name] for p in one["curve"]], rel=1e-6, abs=1e-6)
    for name, values in one["weights"].items():
        ours, theirs = (torch.tensor(v) for v in (other["weights"][name], values))
        # The keys' bias cancels in the softmax: its gradient is rounding error, which AdamW amplifies.
        if name.endswith(".qkv.bias"):
            ours, theirs = (torch.cat([t[: len(t) // 3], t[2 * len(t) // 3 :]]) for t in (ours, theirs))
        if name.endswith(".kv.bias"):
            ours, theirs = ours[len(ours) // 2 :], theirs[len(theirs) // 2 :]
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def without_recipe(p: SimpleNamespace, function: Callable[..., dict], *arguments) -> dict:
    return function(*arguments)


def launched(processes: int, function: Callable[..., dict], *arguments) -> dict:
    p = SimpleNamespace(compute=COMPUTE, runtime=Runtime(processes, 0, 0), world_size=processes)
    return distributed.launch(without_recipe, p, function, *arguments)


@pytest.mark.parametrize("processes", [2, 4])
def test_one_two_and_four_processes_agree(workplace, processes):
    alone = train(Points(), settings(name="alone"))
    assert_same(alone, launched(processes, train, Points(), settings()))
    other_draws = train(Points(), settings(name="other", micro_batch=4))
    assert other_draws["weights"] != alone["weights"]


SMALL = Model("small", 16, 8, TransformerSize(16, 2, 2), TransformerSize(16, 1, 2))  # 4 patches, 2 of them visible


class Masked:
    """Samples like those of PretrainSamples, drawn from their keys."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, key: tuple[int, int]) -> dict:
        generator = seeding.generator(2, "masked", *key)
        return {
            "image": torch.randn(3, 16, 16, generator=generator),
            "noise": masking.gumbel(0, *key, 4),
            "features": torch.randn(5, 6, generator=generator).half(),
            "importance": torch.rand(4, generator=generator),
        }


def pretrain(row: AblationRow, run: FitSettings) -> dict:
    set_up(run.compute)
    seeding.seed_globals(0, "init")
    model = MaskedPretraining(SMALL, row, 0.5, 6 if row.target == "clip" else None)
    optimizer = optim.adamw(optim.decay_groups(model, 0.05), (0.9, 0.95))
    curve = fit(model, Masked(), optimizer, run, lambda b: (b["image"], b["noise"], b["features"], b["importance"]))
    return {"curve": curve, "weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()}}


@pytest.mark.parametrize(
    "row", [AblationRow("pixels", "mae", "random"), AblationRow("clip", "prompt", "semantic")], ids=["mae", "milan"]
)
def test_pretraining_agrees_over_processes(workplace, row):
    options = dict(epochs=2, lr=1e-3)
    alone = pretrain(row, settings(name="alone", **options))
    for processes in (2, 4):
        assert_same(alone, launched(processes, pretrain, row, settings(name=f"by {processes}", **options)))


def test_a_batch_that_processes_cannot_share_is_said(workplace):
    with pytest.raises(UserError, match="4 micro-batches of 2.*3 processes cannot share"):
        launched(3, train, Points(), settings())


# Interruptions.


@pytest.mark.parametrize("harm, epoch, count", [(fail, 2, 3), (kill, 0, 9), (kill, 1, 24), (kill, 3, 17)])
def test_an_interrupted_run_ends_in_the_same_bytes(workplace, undisturbed, capfd, harm, epoch, count):
    """The interruptions come in the middle of a step, at its first sample and at its last."""
    status = forked(train, Points(at(epoch, count, harm)), settings(), workplace / "out")
    assert status == (1 if harm is fail else -signal.SIGKILL)
    assert not (workplace / "out").exists()
    complete = epoch * 3 + (count - 1) // BATCH
    assert settings().saved.load()["step"] == complete
    train(Points(), settings(), workplace / "out")
    assert digest(workplace / "out") == undisturbed
    assert f"continuing from step {complete} of {STEPS}" in capfd.readouterr().out


def test_killed_again_and_again(workplace, undisturbed):
    """Interrupt three attempts in a row, each of which saves every step."""
    for attempt in range(3):
        assert forked(train, Points(at(attempt, 10, kill)), settings(), workplace / "out") == -signal.SIGKILL
    train(Points(), settings(), workplace / "out")
    assert digest(workplace / "out") == undisturbed


def test_a_continued_run_has_the_whole_curve(workplace):
    whole = train(Points(), settings(name="undisturbed"))
    with pytest.raises(RuntimeError, match="the lights went out"):
        train(Points(at(2, 3, fail)), settings())
    assert train(Points(), settings())["curve"] == whole["curve"]


def test_a_point_s_mean_survives_an_interruption_between_its_checks(workplace, monkeypatch):
    """60 steps, 5 points, a check every 5 steps: a point is the mean over three checks, of five, five and two steps."""
    monkeypatch.setattr("milan.training.loop.CURVE_POINTS", 5)
    monkeypatch.setattr("milan.training.loop.CHECK_STEPS", 5)
    options = dict(epochs=20)
    whole = train(Points(), settings(name="undisturbed", **options))["curve"]
    assert [p["step"] for p in whole] == [12, 24, 36, 48, 60]
    with pytest.raises(RuntimeError):
        train(Points(at(6, 1, fail)), settings(**options))
    state = settings().saved.load()
    assert (state["step"], len(state["curve"]), len(state["checked"])) == (15, 1, 1)
    assert train(Points(), settings(**options))["curve"] == whole


def test_a_monitor_looks_every_so_many_epochs_and_leaves_the_training_as_it_is(workplace, undisturbed):
    """3 steps an epoch: every 1.5 epochs, rounded to 4 steps, and after the last."""
    result = train(Points(), settings(), workplace / "out", 1.5)
    assert digest(workplace / "out") == undisturbed
    assert [point["step"] for point in result["curve"] if "answer" in point] == [4, 8, 12]
    model = Regression().eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in result["weights"].items()})
    assert result["curve"][-1]["answer"] == look(model)["answer"]


def test_a_monitored_step_is_a_point_of_the_curve(workplace, monkeypatch):
    """60 steps, 5 points, and a look every 15 steps."""
    monkeypatch.setattr("milan.training.loop.CURVE_POINTS", 5)
    curve = train(Points(), settings(epochs=20), None, 5)["curve"]
    assert [point["step"] for point in curve] == [12, 15, 24, 30, 36, 45, 48, 60]
    assert [point["step"] for point in curve if "answer" in point] == [15, 30, 45, 60]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_the_monitor_saw_before_an_interruption_is_kept(workplace, processes):
    whole = launched(processes, train, Points(), settings(name="undisturbed"), None, 1)
    assert sum("answer" in point for point in whole["curve"]) == EPOCHS
    with pytest.raises(RuntimeError, match="the lights went out"):
        launched(processes, train, Points(at(2, 3, fail)), settings(), None, 1)
    assert launched(processes, train, Points(), settings(), None, 1) == whole


def test_a_damaged_state_falls_back_to_the_one_before(workplace, undisturbed, capfd):
    with pytest.raises(RuntimeError):
        train(Points(at(2, 1, fail)), settings())
    newest = settings().saved.saves()[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    train(Points(), settings(), workplace / "out")
    assert digest(workplace / "out") == undisturbed
    said = capfd.readouterr()
    assert f"{newest} is damaged" in said.err and "falling back" in said.err
    assert "continuing from step 5" in said.out


def test_a_changed_recipe_starts_afresh(workplace):
    with pytest.raises(RuntimeError):
        train(Points(at(2, 1, fail)), settings())
    epochs = []
    train(Points(lambda epoch, index: epochs.append(epoch)), settings(saved=saved_state("tiny", "another recipe")))
    assert epochs.count(0) == SAMPLES
    epochs.clear()
    train(Points(lambda epoch, index: epochs.append(epoch)), settings())
    assert epochs.count(0) == epochs.count(1) == 0 and epochs.count(2) == SAMPLES


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75_and_the_next_run_continues(workplace, undisturbed, capfd, number):
    """A preemption or a Ctrl-C; the next regular save is an hour away."""
    run = patient(settings())
    assert forked(train, Points(at(2, 3, lambda: kill(number))), run, workplace / "out") == PREEMPTED == 75
    assert [path.name for path in run.saved.saves()] == ["state-000000007.pt"]
    assert "stopped by a signal at step 7; saved" in capfd.readouterr().out
    train(Points(), run, workplace / "out")
    assert digest(workplace / "out") == undisturbed


def test_signal_handlers_are_restored(workplace):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(Points(), settings(epochs=1, warmup_epochs=0))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_the_run_and_names_step_and_save(workplace, number):
    poisoned = Points(value=lambda epoch, index: number if (epoch, index) == (1, 0) else 1.0)
    where = seeding.permutation(SAMPLES, 3, "shuffle", 1).tolist().index(0) // BATCH
    step = 3 + where + 1
    with pytest.raises(UserError) as error:
        train(poisoned, settings())
    said = str(error.value)
    assert f"step {step} of {STEPS}" in said and "the loss became nan" in said
    assert f"state-{step - 1:09d}.pt" in said and "Lower this stage's lr" in said
    assert settings().saved.load()["step"] == step - 1


@pytest.mark.parametrize("step", [4, STEPS])
@pytest.mark.parametrize("part", ["a weight", "a moment"])
def test_weights_that_an_update_breaks_are_neither_saved_nor_written(workplace, monkeypatch, part, step):
    """The loss of the step is still finite; the state of the step before is kept, and is finite."""
    update = Loop.update_weights

    def update_and_break(loop: Loop) -> None:
        update(loop)
        if loop.step == step - 1:
            weight = loop.model.layers[3].weight
            broken = weight.data if part == "a weight" else loop.optimizer.state[weight]["exp_avg_sq"]
            broken[0, 7] = float("nan" if part == "a weight" else "inf")

    monkeypatch.setattr(Loop, "update_weights", update_and_break)
    with pytest.raises(UserError) as error:
        train(Points(), settings(), workplace / "out")
    said = str(error.value)
    assert f"tiny: the weights or the optimizer's moments are not finite after step {step} of {STEPS}" in said
    assert f"state-{step - 1:09d}.pt" in said and "Lower this stage's lr" in said
    assert not (workplace / "out").exists()
    kept = settings().saved.load()
    assert kept["step"] == step - 1 and all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_a_full_disk_while_saving_names_what_is_kept(workplace, undisturbed, monkeypatch):
    """The disk is full at the third save: the second is named, whole, and continued from."""
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 5:  # after identity.json, code.json and two saves
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError) as error:
        train(Points(), settings())
    said = str(error.value)
    assert "state-000000003.pt is full" in said and "the state of step 3" in said and "run `dvc repro` again" in said
    assert f"the last good state is {settings().saved.folder}/state-000000002.pt" in said
    assert sorted(path.name for path in settings().saved.folder.iterdir()) == ["code.json", "identity.json", "state-000000001.pt", "state-000000002.pt"]
    train(Points(), settings(), workplace / "out")
    assert digest(workplace / "out") == undisturbed


def test_a_full_disk_under_two_processes_is_reported_by_the_parent(workplace, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="identity.json is full.*state of step 1; no state had been saved yet"):
        launched(2, train, Points(), settings())


def test_a_non_finite_loss_before_any_save(workplace):
    with pytest.raises(UserError, match="step 1 of 12.*no state had been saved yet"):
        train(Points(value=lambda *_: float("nan")), settings())


# Processes that fail.


def rank_of(*ranks: int) -> bool:
    return distributed.rank() in ranks


def user_error_in_one(place: int) -> dict:
    if rank_of(place):
        raise UserError("the moon is full: wait a week")
    distributed.barrier()
    return {}


@pytest.mark.parametrize("place", [0, 1])
def test_a_user_error_in_a_process_is_the_parent_s(workplace, place):
    with pytest.raises(UserError, match="^the moon is full: wait a week$"):
        launched(2, user_error_in_one, place)


def crash_in_one() -> dict:
    if rank_of(1):
        raise ZeroDivisionError("a fault of the program")
    distributed.barrier()
    return {}


def test_a_fault_of_the_program_keeps_its_traceback(workplace):
    with pytest.raises(RuntimeError, match="(?s)Traceback.*in crash_in_one.*ZeroDivisionError: a fault of the program"):
        launched(2, crash_in_one)


def lost_in_one(place: int) -> dict:
    if rank_of(place):
        kill()
    distributed.barrier()
    return {}


@pytest.mark.parametrize("place", [0, 1])
def test_a_lost_process_is_said(workplace, place):
    with pytest.raises(UserError, match="process was lost"):
        launched(2, lost_in_one, place)


def whereabouts() -> dict:
    return {
        "rank": distributed.rank(),
        "world": distributed.world_size(),
        "sum": distributed.total(torch.tensor(distributed.rank() + 1)).item(),
    }


def test_the_parent_gets_rank_0_s_result(workplace):
    assert launched(3, whereabouts) == {"rank": 0, "world": 3, "sum": 6}
    assert launched(1, whereabouts) == {"rank": 0, "world": 1, "sum": 1}


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_killed_and_continued(workplace, victim):
    whole = launched(2, train, Points(), settings(name="undisturbed"), workplace / "undisturbed")
    harm = at(2, 3, lambda: rank_of(victim) and kill())
    with pytest.raises(UserError, match="process was lost"):
        launched(2, train, Points(harm), settings(), workplace / "out")
    assert not (workplace / "out").exists()
    assert launched(2, train, Points(), settings(), workplace / "out") == whole
    assert digest(workplace / "out") == digest(workplace / "undisturbed")


def launched_in_a_child(data: Points, run: FitSettings, out: Path) -> None:
    launched(2, train, data, run, out)


def test_sigterm_to_the_launcher_saves_and_the_next_run_continues(workplace):
    launched(2, train, Points(), settings(name="undisturbed"), workplace / "undisturbed")
    run = patient(settings())

    def ask() -> None:
        """On rank 0, ask the launcher to stop; training goes on until its signal arrives."""
        if rank_of(0):
            os.kill(os.getppid(), signal.SIGTERM)

    slow = Points(lambda epoch, index: (ask() if (epoch, index) == (1, 5) else None, time.sleep(0.01 if epoch else 0)))
    assert forked(launched_in_a_child, slow, run, workplace / "out") == PREEMPTED
    assert len(run.saved.saves()) == 1
    launched(2, train, Points(), run, workplace / "out")
    assert digest(workplace / "out") == digest(workplace / "undisturbed")


def deaf_beside_a_failure() -> dict:
    """Fail in rank 1, while rank 0 hears no signal, as inside a collective operation of NCCL's."""
    if rank_of(1):
        raise ZeroDivisionError("a fault of the program")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def test_a_process_that_hears_no_signal_ends_with_the_first_failure(workplace, monkeypatch):
    monkeypatch.setattr(distributed, "FAIL_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a fault of the program"):
        launched(2, deaf_beside_a_failure)
    assert time.monotonic() - began < 20
