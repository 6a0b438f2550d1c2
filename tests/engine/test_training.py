"""Training: that it continues exactly, writes whole checkpoints, and says what is wrong before it writes anything."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtdiffusion import (
    Backbone,
    Draws,
    Features,
    LossTerms,
    LossWeights,
    SamplerSettings,
    composite_loss,
    precision,
    sample,
)
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine import trainer as trainer_module
from mtdiffusion_engine.chance import StepChance
from mtdiffusion_engine.data import Batch, ModalityData, derive_seed, load_data
from mtdiffusion_engine.environment import choose_device
from mtdiffusion_engine.experiment import Experiment, build_model, load_experiment
from mtdiffusion_engine.interrupt import ECHO, Terminated, deferred_interrupt, held, raise_terminated, terminable
from mtdiffusion_engine.optimisation import Average, learning_rate
from mtdiffusion_engine.tally import Tally
from mtdiffusion_engine.trainer import Progress, Trainer, recompute_activations
from mtdiffusion_registry import ConfigError, UserError
from tests.engine.tiny import REGISTRY, toy

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
FILES = ("model", "ema", "optimizer")


def train(experiment: Experiment, run: Path, resume: bool = False, stop_at: int | None = None) -> Trainer:
    trainer = Trainer(experiment, run, REGISTRY, resume=resume, device="cpu")
    trainer.train(stop_at=stop_at)
    return trainer


def stop_with(action: Callable[[], object], step: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            action()

    return on_progress


def crash() -> None:
    raise RuntimeError("crash")


def newest(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint."""
    folder = ckpt.list_checkpoints(run)[-1]
    return {f"{name}/{key}": x for name in FILES for key, x in load_file(folder / f"{name}.safetensors").items()}


def assert_same(run: Path, other: Path) -> None:
    first, second = newest(run), newest(other)
    assert ckpt.list_checkpoints(run)[-1].name == ckpt.list_checkpoints(other)[-1].name
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def flat(model: nn.Module) -> Tensor:
    """All weights in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_denormals_are_flushed(tmp_path: Path) -> None:
    """They make the CPU many times as slow once a network knows its data by heart."""
    torch.set_flush_denormal(False)
    smallest = torch.full((4,), torch.finfo(torch.float32).tiny)
    assert (smallest / 2).all()
    Trainer(toy(), tmp_path / "run", REGISTRY, device="cpu")
    assert not (smallest / 2).any()


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(toy(), run)
    return run


def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(toy(), run, stop_at=3)
    train(toy(), run, resume=True, stop_at=7)
    train(toy(), run, resume=True)
    assert_same(run, uninterrupted)


def test_a_run_that_crashed_resumes_from_its_last_checkpoint_and_equals_one_that_did_not(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer = Trainer(toy(), run, REGISTRY, device="cpu")
    with pytest.raises(RuntimeError, match="crash"):
        trainer.train(stop_with(crash, 6))
    assert [folder.name for folder in ckpt.list_checkpoints(run)] == ["step-00000004"]
    train(toy(), run, resume=True)
    assert_same(run, uninterrupted)


def test_a_run_that_crashed_before_its_first_checkpoint_starts_again(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="crash"):
        Trainer(toy(), run, REGISTRY, device="cpu").train(stop_with(crash, 2))
    assert ckpt.list_checkpoints(run) == []
    train(toy(), run, resume=True)
    assert_same(run, uninterrupted)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_ctrl_c_and_sigterm_end_the_step_under_way_and_save_it(
    uninterrupted: Path, tmp_path: Path, number: signal.Signals, raised: type[KeyboardInterrupt]
) -> None:
    run = tmp_path / "run"
    before = signal.getsignal(number)
    trainer = Trainer(toy(), run, REGISTRY, device="cpu")
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train(stop_with(lambda: signal.raise_signal(number), 3))
    assert stopped.type is raised
    assert ckpt.list_checkpoints(run)[-1].name == "step-00000003"
    assert signal.getsignal(number) is before
    train(toy(), run, resume=True)
    assert_same(run, uninterrupted)


@pytest.mark.usefixtures("ctrl_c")
def test_the_second_ctrl_c_acts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_sigterm_acts_at_once_unless_it_is_an_echo_of_the_first() -> None:
    with terminable():
        with pytest.raises(Terminated), deferred_interrupt() as interrupted:
            for _ in range(2):  # as `timeout` sends it
                signal.raise_signal(signal.SIGTERM)
                assert interrupted() is Terminated
            time.sleep(1.5 * ECHO)
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it did not act")
        assert signal.getsignal(signal.SIGTERM) is raise_terminated
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_is_held_is_done_before_a_signal_is_raised() -> None:
    done = []
    with terminable(), pytest.raises(Terminated), held():
        signal.raise_signal(signal.SIGTERM)
        done.append(True)
    assert done == [True]


def test_workers_that_the_signal_ended_do_not_keep_the_last_step_from_being_saved(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer = Trainer(toy(), run, REGISTRY, device="cpu")
    advance = trainer.advance

    def lose_workers(batches: Iterator[Batch], tally: Tally) -> tuple[float, Tensor]:
        if trainer.step == 3:
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("DataLoader worker exited unexpectedly")
        return advance(batches, tally)

    trainer.advance = lose_workers  # type: ignore[method-assign]
    with pytest.raises(Terminated):
        trainer.train()
    assert ckpt.require_run(run).name == "step-00000003"
    train(toy(), run, resume=True)
    assert_same(run, uninterrupted)


def test_where_ctrl_c_is_ignored_it_stays_ignored(ctrl_c: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred_interrupt() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert not interrupted()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_training_in_a_thread_leaves_signals_alone() -> None:
    seen = []

    def body() -> None:
        with deferred_interrupt() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [None]


def test_worker_processes_and_the_cadence_of_logs_change_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(toy("training.workers=1", "training.log_every=7", "training.checkpoint_every=0"), run)
    assert_same(run, uninterrupted)


def test_a_report_is_the_mean_of_all_that_was_trained_since_the_last(tmp_path: Path) -> None:
    def told(every: int) -> dict[int, dict[str, float]]:
        reports: list[Progress] = []
        trainer = Trainer(toy(f"training.log_every={every}"), tmp_path / f"every-{every}", REGISTRY, device="cpu")
        trainer.train(reports.append)
        return {report.step: report.means for report in reports}

    each, fourth = told(1), told(4)
    assert list(fourth) == [4, 8, 10]
    for last, steps in ((4, (1, 2, 3, 4)), (8, (5, 6, 7, 8)), (10, (9, 10))):
        mean = sum(each[step]["loss"] for step in steps) / len(steps)
        assert fourth[last]["loss"] == pytest.approx(mean, rel=1e-6)
    assert all(value >= 0 for means in fourth.values() for value in means.values())


def test_a_law_of_clocks_is_trained_and_sampled_along_its_path(tmp_path: Path) -> None:
    experiment = toy('clocks={kind="offset", ahead={label=0.5, mask=0.25}}')
    model = train(experiment, tmp_path / "run").model
    assert model.path(3).tolist() == [[20, 20, 20], [20, 15, 10], [10, 5, 0], [0, 0, 0]]
    with pytest.raises(ConfigError, match=r"ahead: expected names among image, mask, label, found lable"):
        build_model(toy('clocks={kind="offset", ahead={lable=0.5}}'))
    with pytest.raises(ConfigError, match="in a shared layout codes overlap, so all modalities have one clock"):
        build_model(toy('clocks={kind="independent"}', 'latent.layout="shared"'))


def test_resuming_a_finished_run_changes_no_file(uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in ckpt.list_checkpoints(uninterrupted)[-1].iterdir()}
    train(toy(), uninterrupted, resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_experiment_does_not_resume_a_run(uninterrupted: Path) -> None:
    with pytest.raises(UserError, match=r"training\.seed is 0, asked for 1"):
        Trainer(toy("training.seed=1"), uninterrupted, REGISTRY, resume=True)
    with pytest.raises(UserError, match=r"modalities\.extra\.classes is not set, asked for 3"):
        Trainer(toy('modalities.extra={kind="label", classes=3}'), uninterrupted, REGISTRY, resume=True)


def test_what_weights_do_not_depend_on_may_change(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    trainer = Trainer(toy("sampling.steps=5", "training.keep=1"), run, REGISTRY, resume=True, device="cpu")
    assert trainer.step == 10
    assert load_experiment(run / "config.toml", [], REGISTRY).sampling.steps == 5


# --- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_is_the_same_in_any_number_of_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, noise, clocks and what is shown: all that is left is the order of sums."""
    monkeypatch.setattr(trainer_module, "build_model", lambda experiment: build_model(experiment).double())
    told, weights = [], []
    for parts in (1, 2, 4):
        overrides = (f"training.accumulate={parts}", "backbone.dropout=0.0")
        trainer = Trainer(toy(*overrides), tmp_path / str(parts), REGISTRY, device="cpu")
        reports: list[Progress] = []
        trainer.train(reports.append)
        told.append([[report.norm, *report.means.values()] for report in reports])
        weights.append(flat(trainer.model))
    for other in (1, 2):
        assert (weights[0] - weights[other]).abs().max() < 1e-10
        torch.testing.assert_close(torch.tensor(told[0]), torch.tensor(told[other]), rtol=1e-5, atol=1e-7)


def test_a_step_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training: batch_size = 8 cannot be shared out in accumulate = 3"):
        toy("training.accumulate=3")


def test_the_average_warms_up() -> None:
    for decay in (0.5, 0.999):
        model = nn.Linear(1, 1, bias=False)
        average = Average(model, decay)
        expected = None
        for n in range(30):
            with torch.no_grad():
                model.weight.fill_(math.sin(n))
            average.update(model)
            share = min(decay, (1 + n) / (10 + n))
            expected = math.sin(n) if expected is None else share * expected + (1 - share) * math.sin(n)
            assert average.module.weight.item() == pytest.approx(expected, abs=1e-6)


def test_the_trainer_averages_the_weights_of_every_step(tmp_path: Path) -> None:
    trainer = Trainer(toy("training.steps=5"), tmp_path / "run", REGISTRY, device="cpu")
    steps: list[Tensor] = []
    trainer.train(lambda _: steps.append(flat(trainer.model)))
    expected = steps[0]
    for n, weights in enumerate(steps[1:], start=1):
        expected = torch.lerp(expected, weights, 1 - (1 + n) / (10 + n))
    assert torch.allclose(flat(trainer.averaged_model), expected, atol=1e-6)
    assert not torch.allclose(flat(trainer.averaged_model), steps[-1], atol=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = toy("training.steps=100", "training.warmup=10", "training.learning_rate=0.5").training
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(0.5)
    assert rates[55] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_rate_may_stay_or_fall_only_at_the_end() -> None:
    config = toy("training.steps=110", "training.warmup=10", "training.learning_rate=0.5").training
    assert {learning_rate(evolve(config, schedule="constant"), step) for step in range(10, 111)} == {0.5}
    stable = evolve(config, schedule="wsd", decay=0.25)
    rates = [learning_rate(stable, step) for step in range(111)]
    assert set(rates[10:86]) == {0.5}
    assert rates[85:] == pytest.approx([0.5 * (1 - n / 25) for n in range(26)])


def test_activations_that_are_computed_again_change_nothing(tmp_path: Path) -> None:
    """Dropout included, whose draws are repeated."""
    plain = train(toy("training.steps=4"), tmp_path / "plain")
    again = train(toy("training.steps=4", "training.checkpoint_activations=true"), tmp_path / "again")
    assert torch.equal(flat(again.model), flat(plain.model))
    assert newest(tmp_path / "again").keys() == newest(tmp_path / "plain").keys()

    class Opaque(Backbone):
        def forward(self, z: Tensor, noise: Tensor, vector: Tensor) -> Features:
            return Features(z, vector)

    with pytest.raises(UserError, match="the backbone Opaque does not tell its repeated blocks"):
        recompute_activations(Opaque())


def test_held_out_samples_are_watched(tmp_path: Path) -> None:
    reports: list[Progress] = []
    trainer = Trainer(toy("training.held_out_every=4"), tmp_path / "run", REGISTRY, device="cpu")
    watched = trainer.watched
    assert watched is not None
    assert watched.what == "11 samples of data (test)"
    first = watched.of(trainer.averaged_model)
    torch.manual_seed(1)
    assert watched.of(trainer.averaged_model) == first  # the same noise
    trainer.train(reports.append)
    assert [report.step for report in reports if report.held_out] == [4, 8, 10]
    assert reports[-1].held_out == watched.of(trainer.averaged_model) != first
    # By hand: the samples at once, with the noise of their places.
    data = load_data(trainer.experiment, trainer.averaged_model, "test").batch(range(11))
    model, experiment = trainer.averaged_model, trainer.experiment
    chance = StepChance(model, experiment.conditioning, experiment.loss, derive_seed(0, 3), 11)
    visible, draws = chance.draw(0, 0, data.presence)
    terms = composite_loss(trainer.averaged_model, data.x, visible=visible, presence=data.presence, draws=draws)
    assert reports[-1].held_out["loss"] == pytest.approx(terms.total.mean().item(), rel=1e-5)
    off = Trainer(toy("training.held_out_every=0"), tmp_path / "off", REGISTRY, device="cpu")
    assert off.watched is None


def test_training_learns(tmp_path: Path) -> None:
    losses = []
    overrides = ("training.steps=40", "training.accumulate=1", "training.batch_size=11", "training.learning_rate=0.02")
    overrides += ("loss.readout=0.0",)  # so few steps show in the mask where it is read out of z
    trainer = Trainer(toy(*overrides), tmp_path / "run", REGISTRY, device="cpu")
    trainer.train(lambda progress: losses.append(progress.means["l2/mask"]))
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def test_bfloat16_trains_close_to_float32(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(toy("training.precision=bfloat16"), run)
    exact, rounded = newest(uninterrupted), newest(run)
    weights = [key for key in exact if key.startswith("model/")]
    assert not all(torch.equal(exact[key], rounded[key]) for key in weights)
    assert all(torch.allclose(exact[key], rounded[key], atol=0.05) for key in weights)


def test_samples_that_lack_a_modality_are_trained_on(tmp_path: Path) -> None:
    reports: list[Progress] = []
    trainer = Trainer(toy("data.lacking=label", "training.steps=4"), tmp_path / "run", REGISTRY, device="cpu")
    trainer.train(reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for report in reports for value in report.means.values())


TOPOLOGY = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from mtdiffusion_engine import trainer as module
from mtdiffusion_engine.trainer import Trainer
from tests.engine.tiny import REGISTRY, toy
build = module.build_model
module.build_model = lambda experiment: build(experiment).double()
run, parts, stop, resume = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "resume"
overrides = ("backbone.dropout=0.0", "conditioning.partial=0.5", "augmentation.flip=0.5", "data.lacking=label")
experiment = toy(*overrides, f"training.accumulate={{parts}}", "training.steps=6", "training.checkpoint_every=0")
trainer = Trainer(experiment, run, REGISTRY, resume=resume, device="cpu")
trainer.train(lambda progress: print("loss", progress.step, progress.means["loss"]), stop_at=stop)
trainer.accelerator.end_training()
"""


def _in_processes(count: int, script: Path, *arguments: str) -> dict[int, float]:
    """Run a script in processes; the losses that it told, by step."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    command = [sys.executable, *launch, str(script), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("loss")]
    return {int(step): float(loss) for _, step, loss in lines}


@pytest.mark.long  # of sharded and whole models on two processes, test_sharding.py has a shorter one
def test_a_run_is_the_same_on_any_number_of_processes_and_resumed_on_another(tmp_path: Path) -> None:
    """Order, augmentation, noise, clocks and what is shown: the losses told are those of the whole batch."""
    script = tmp_path / "script.py"
    script.write_text(TOPOLOGY.format(root=str(ROOT)))
    alone, two, across = (tmp_path / name for name in ("alone", "two", "across"))
    losses = _in_processes(1, script, str(alone), "1", "6", "new")
    assert _in_processes(2, script, str(two), "2", "6", "new") == pytest.approx(losses, rel=1e-9)
    told = _in_processes(2, script, str(across), "1", "3", "new") | _in_processes(
        1, script, str(across), "2", "6", "resume"
    )
    assert told == pytest.approx(losses, rel=1e-9)
    expected = newest(alone)
    for run in (two, across):
        found = newest(run)
        for key, x in expected.items():
            assert (found[key] - x).abs().max() < 1e-10, key


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_data_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for overrides, message in {
        ("modalities.label.classes=2",): r"'label': label of 2 classes: expected values from 0 to 1, found 2",
        ("data.nan_at=2",): r"sample 2: modality 'image': image: expected finite values, found NaN or infinity",
        ("modalities.image.channels=3",): r"expected shape \[batch, 3, 4, 4\], found \[1, 1, 4, 4\]",
        ("modalities.image.field=picture",): "no sample has the field 'picture' that modality 'image' reads",
        (
            "modalities.label.field=caption",
        ): "sample 0: modality 'label': label: expected a class from 0 to 2, found 'noise'",
        ("data.count=0",): "the data set is empty",
    }.items():
        with pytest.raises(UserError, match=message):
            Trainer(toy(*overrides), tmp_path / "run", REGISTRY, device="cpu")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_met_later_stops_the_training_and_leaves_the_checkpoint(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModalityData, "verify", lambda self: None)  # as of data that change while they are read
    run = tmp_path / "run"
    overrides = ("training.steps=3", "training.accumulate=1", "data.nan_at=10", f"training.workers={workers}")
    with pytest.raises(
        UserError, match=r"^data \(train\): sample 10: modality 'image': image: expected finite values"
    ) as error:
        train(toy(*overrides), run)
    assert "\n" not in str(error.value)
    assert ckpt.list_checkpoints(run) == []


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trainer, Callable[[int], bool], str], None]:
    """Makes the loss or its gradient NaN at those steps that a function picks."""

    def spoil(trainer: Trainer, bad: Callable[[int], bool], where: str) -> None:
        exact = trainer_module.composite_loss

        def loss(*args: object, **kwargs: object) -> LossTerms:
            terms = exact(*args, **kwargs)  # type: ignore[arg-type]
            if bad(trainer.step):
                if where == "loss":
                    terms.l2["mask"].mul_(math.nan)
                    terms.total.mul_(math.nan)
                elif terms.total.requires_grad:  # not where a step is computed again without its gradient
                    terms.total.register_hook(lambda gradient: gradient * math.nan)
            return terms

        monkeypatch.setattr(trainer_module, "composite_loss", loss)

    return spoil


Spoil = Callable[[Trainer, Callable[[int], bool], str], None]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_training_that_diverges_stops_and_leaves_the_checkpoint(tmp_path: Path, spoil: Spoil, where: str) -> None:
    run = tmp_path / "run"
    trainer = Trainer(
        toy("training.steps=40", "training.checkpoint_every=2", "training.keep=2"), run, REGISTRY, device="cpu"
    )
    spoil(trainer, lambda step: step >= 8, where)
    named = "loss, l2/mask" if where == "loss" else "the gradient alone"
    with pytest.raises(
        UserError, match=rf"training diverged: no gradient was finite from step 9 to step \d+ \(.*: {named}\)"
    ):
        trainer.train()
    assert trainer.step < 20
    assert [folder.name for folder in ckpt.list_checkpoints(run)] == ["step-00000006"]  # that of step 8 fails again
    assert (run / "checkpoints" / f"step-00000008{ckpt.ASIDE}").is_dir()
    assert all(bool(x.isfinite().all()) for x in newest(run).values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_whose_gradient_is_not_finite_is_left_out_and_told(tmp_path: Path, spoil: Spoil, where: str) -> None:
    trainer = Trainer(toy(), tmp_path / "run", REGISTRY, device="cpu")
    spoil(trainer, lambda step: step in (4, 7), where)
    reports: list[Progress] = []
    weights: list[Tensor] = []
    trainer.train(lambda progress: (reports.append(progress), weights.append(flat(trainer.model))))  # type: ignore[func-returns-value]
    assert [report.skipped for report in reports] == [0, 0, 0, 0, 1, 0, 0, 1, 0, 0]
    same = [torch.equal(before, after) for before, after in pairwise(weights)]
    assert same == [False, False, False, True, False, False, True, False, False]
    assert all(math.isfinite(value) for report in reports for value in report.means.values())
    assert ("loss" in reports[4].means) == (where == "gradient")  # no batch of it had a finite one
    assert all(bool(x.isfinite().all()) for x in newest(tmp_path / "run").values())


class Waits(TorchDispatchMode):
    """Collects what would wait for the device: values that Python asks for, and shapes that depend on them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        for name in ("tolist", "numpy", "cpu"):
            exact = getattr(Tensor, name)
            monkeypatch.setattr(Tensor, name, lambda x, exact=exact, **kwargs: (self._note(), exact(x, **kwargs))[1])

    def _note(self) -> None:
        self.found.append("".join(traceback.format_stack(limit=8)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.masked_select):
            self._note()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_does_not_wait_for_the_device(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that happens where the model is: the draws on the CPU, which are small, are made before."""
    trainer = Trainer(
        toy("data.lacking=label", f"training.optimizer={optimizer}"), tmp_path / "run", REGISTRY, device="cpu"
    )
    every = list(trainer.batches(3))
    places = [(step, start) for step in range(3) for start in (0, 4)]
    drawn = {at: trainer.chance.draw(*at, batch.presence) for at, batch in zip(places, every, strict=True)}
    monkeypatch.setattr(trainer.chance, "draw", lambda step, start, _: drawn[step, start])
    batches = iter(every)
    tally = Tally(trainer.accelerator)
    trainer.advance(batches, tally)
    waits = Waits(monkeypatch)
    with waits:
        for _ in range(2):
            trainer.advance(batches, tally)
    assert waits.found == [], waits.found[0]
    with waits:
        tally.take()
        assert len(waits.found) == 1  # the log does, and it is seen
        assert tally.skipped() == (0, 0)
        assert bool(flat(trainer.model).isfinite().all())
    assert len(waits.found) == 3


@pytest.mark.parametrize("epsilon_head", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compiled_and_not_a_training_is_the_same_of_one_graph(tmp_path: Path, epsilon_head: bool) -> None:
    """Whatever is drawn: clocks, subsets, holes, presence."""
    head = ("model.parameterisation=epsilon_head", "loss.l1=1.0") if epsilon_head else ()
    changes = ("data.lacking=label", "conditioning.partial=0.5", "backbone.dropout=0.0", "training.accumulate=1", *head)
    plain = train(toy(*changes), tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    trainer = Trainer(toy(*changes), tmp_path / "compiled", REGISTRY, device="cpu")
    trainer.objective.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    trainer.train()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(flat(trainer.model), flat(plain.model), atol=1e-4, rtol=1e-3)


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    with pytest.raises(UserError, match="already exists; nothing was written"):
        Trainer(toy(), tmp_path / "run", REGISTRY, device="cpu")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    train(toy("training.steps=1"), tmp_path)
    assert ckpt.require_run(tmp_path).name == "step-00000001"


def test_a_folder_without_a_run_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to resume here"):
        Trainer(toy(), tmp_path, REGISTRY, resume=True, device="cpu")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:", "cuda:one", "cpu:0", "mps:1"):
        with pytest.raises(UserError, match=f'expected "cpu", "cuda", .* found "{name}"'):
            choose_device(name)
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match=r"device mps: this machine has no Apple GPU .*; this machine has .*cpu"):
            choose_device("mps")
    if not torch.cuda.is_available():
        assert choose_device(None) == torch.device("cpu")
        with pytest.raises(UserError, match="no CUDA device"):
            choose_device("cuda")
        with pytest.raises(UserError, match="device cuda:1: there is no CUDA device"):
            choose_device("cuda:1")
    # Of a machine with one GPU, what is said follows from what torch tells of it.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="device cuda:1: this machine has 1 GPU, cuda:0"):
        choose_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device cuda:0: of several processes each has a GPU of its own; say cuda"):
        choose_device("cuda:0")


class NoFloat64(TorchDispatchMode):
    """A device without float64, as Apple's GPUs are: any such tensor on "meta" is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "meta":
                assert x.dtype != torch.float64, func
        return out


@pytest.mark.parametrize("layout", ["own", "shared"])
def test_a_device_without_float64_trains_and_samples(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "widest", lambda device: torch.float32 if device.type == "meta" else torch.float64)
    model = build_model(toy(f"latent.layout={layout}"))
    draws = Draws.of(model, 4)
    assert draws.clocks.dtype == torch.float64
    with NoFloat64():
        model.to("meta")
        x = {name: model.modality(name).placeholder(4).to("meta") for name in model.names}
        terms = composite_loss(model, x, LossWeights(1, 1, 1, 1), draws=draws)
        terms.total.mean().backward()
        assert terms.sums()["loss"].dtype == torch.float32
        for solver in ("ancestral", "dpmpp_2m", "ddim"):
            out = sample(model.eval(), 2, settings=SamplerSettings(steps=3, solver=solver))  # type: ignore[arg-type]
            assert out["image"].shape == (2, 1, 4, 4)


def test_tables_of_float32_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(toy()).eval()
    x = {name: model.modality(name).placeholder(8) for name in model.names}
    draws = Draws.of(model, 8, torch.Generator().manual_seed(0))

    def both() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        loss = composite_loss(model, x, LossWeights(1, 1, 1, 1), draws=draws).total.detach()
        return loss, sample(model, 4, settings=SamplerSettings(steps=10), generator=generator)["image"]

    wide = both()
    monkeypatch.setattr(precision, "widest", lambda device: torch.float32)
    model.to("cpu")
    assert model.process.signal_table.dtype == torch.float32
    for found, expected in zip(both(), wide, strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
