"""Both networks are judged in one process, on the same pictures, and what is told of their curves is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mtdiffusion_benchmarks import curves, peers
from mtdiffusion_benchmarks.curves import HeldOut, Recipe, Training
from mtdiffusion_benchmarks.timing import Setting
from mtdiffusion_engine.experiment import build_model, structure_experiment
from mtdiffusion_registry import Registry, UserError

TINY = {
    "theirs": Recipe(2e-3),
    "ours": Recipe(2e-3, "theirs"),
    "default": Recipe(2e-3, "theirs", epsilon=False, own="adamw"),
}


def _process():
    tables = peers.our_tables(Setting()) | {"process": {"steps": curves.TIMES, "curve": "linear"}}
    return build_model(structure_experiment(tables, Registry.discover(), "curves"), weightless=True).process


def test_diffusers_process_is_ours_with_a_linear_curve() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=curves.TIMES)
    process = _process()
    alpha_bar = process.log_alpha_bar[1:].exp()
    torch.testing.assert_close(alpha_bar.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(process.signal_table[1:, 0], alpha_bar.sqrt())
    pictures = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    judged = HeldOut.of(pictures, process)
    noisy = scheduler.add_noise(pictures, judged.noise, judged.t - 1)
    torch.testing.assert_close(judged.z, noisy, rtol=1e-4, atol=1e-5)


def test_measures_of_known_errors() -> None:
    """Of a prediction that is wrong by a constant all means are known, and a better one is better by each of them."""
    process = _process()
    judged = HeldOut.of(torch.zeros(10, 3, 32, 32), process)
    assert judged.t.tolist() == list(range(51, 1000, 100))  # the middles of ten parts of 1..1000
    found = {}
    for wrong in (0.1, 0.2):
        predict = lambda z, t, wrong=wrong: z / process.variance(t).sqrt()[:, None, None, None].float() + wrong  # noqa: E731
        found[wrong] = judged.measure(Training(lambda: None, predict, torch.nn.Identity()))
    snr = process.snr(judged.t[:, None])[:, 0]
    assert found[0.1]["epsilon"] == pytest.approx(0.01, rel=1e-3)
    assert found[0.1]["geometric"] == pytest.approx(0.01, rel=1e-3)
    assert found[0.1]["image"] == pytest.approx(0.005 * (snr.clamp(0.05, 5) / snr).mean().item(), rel=1e-3)
    assert found[0.1]["quarters"] == pytest.approx([0.01] * 4, rel=1e-3)
    assert all(found[0.2][measure] == pytest.approx(4 * found[0.1][measure], rel=1e-3) for measure in curves.MEASURES)


def test_ours_trains_epsilon_by_the_loss_of_diffusers(tmp_path: Path) -> None:
    """The mean of squares of ε − ε̂, nothing else: of a head that says 0, that of the noise."""
    trainer = curves.our_training(Recipe(1e-4, "theirs"), tmp_path / "run", Registry.discover(), Setting(batch=4), 8, 4)
    (group,) = trainer.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.95, 0.999), 1e-6)
    batch = trainer.data.batch(range(4))
    visible, draws = trainer.chance.draw(0, 0, batch.presence)
    assert not visible.any(), "a sample that is seen has nothing to predict"
    loss, _ = trainer.each(batch, visible, draws)
    torch.testing.assert_close(loss, draws.noise.square().flatten(1).mean(1))


@pytest.mark.long
def test_all_learn_on_the_same_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(curves, "PICTURES", 16)
    said: list[str] = []
    result = curves.measure(curves.LOOKS * 2, 4, 1, Registry.discover(), said.append, TINY, held_out=8)
    assert list(result["curves"]) == list(TINY)
    for title, curve in result["curves"].items():
        assert [look["images"] for look in curve] == [8 * look for look in range(curves.LOOKS + 1)]
        assert curve[0]["seconds"] == 0 < curve[1]["seconds"] < curve[-1]["seconds"]
        trained = "epsilon" if TINY[title].epsilon else "image"
        assert curve[-1][trained] < 0.8 * curve[0][trained]
    again = json.loads(json.dumps(result))
    assert curves.table(again).count("\n") == 1 + len(TINY)
    assert curves.seconds_table(again).count("\n") == 1 + len(TINY) - 1


def test_their_batches_are_those_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(curves, "PICTURES", 12)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(peers, "diffusers_training", lambda *_, **__: given.append)
    setting = Setting(batch=4)
    trainer = curves.our_training(Recipe(1e-4), tmp_path / "run", Registry.discover(), setting, 5, 4)
    theirs = curves._of_diffusers(Recipe(1e-4), trainer, setting, 5)
    theirs.advance(5)
    ours = [trainer.data.values(batch).x["image"] for batch in trainer.batches(5)]
    assert len(given) == len(ours) == 5
    for one, other in zip(given, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def _look(images: int, seconds: float, epsilon: float) -> dict[str, float]:
    return {"images": images, "seconds": seconds, "epsilon": epsilon, "image": 0.5, "geometric": 0.25}


RESULT = {
    "recipes": {"theirs": {"against": ""}, "quick": {"against": "theirs"}, "poor": {"against": "theirs"}},
    "curves": {
        "theirs": [_look(100 * i, 10.0 * i, 1 - 0.2 * i) for i in range(5)],
        "quick": [_look(100 * i, 4.0 * i, 1 - 0.22 * i) for i in range(5)],
        "poor": [_look(100 * i, 20.0 * i, 1 - 0.1 * i) for i in range(5)],
    },
}


def test_curves_are_compared_at_equal_images_and_at_equal_seconds() -> None:
    theirs = RESULT["curves"]["theirs"]
    assert curves.at(theirs, "epsilon", 16.0) == pytest.approx(0.68)
    assert curves.at(theirs, "epsilon", 150, "images") == pytest.approx(0.7)
    assert curves.at(theirs, "epsilon", 41.0) is None
    assert curves.reached(theirs, "epsilon", 0.5) == pytest.approx(25.0)
    assert curves.reached(theirs, "epsilon", 0.1) is None
    assert curves.seconds_table(RESULT).splitlines()[2:] == [
        "| quick | theirs | 2.50 | 0.12 | 0.2 | 0.68 | 0.36 of its seconds |",
        "| poor | theirs | 0.50 | 0.6 | 0.2 | slower | never |",
    ]
    header, _, first, *_ = curves.table(RESULT).splitlines()
    assert "error of ε after 100 images | 200 | 400 | error of the picture | geometric mean" in header
    assert first == "| theirs | 10 | 0.8 | 0.6 | 0.2 | 0.5 | 0.25 |"


def test_steps_that_cannot_be_shared_out_are_refused() -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(UserError, match=r"--steps 9: expected a multiple of 8"):
        curves.measure(9, 4, 1, Registry.discover(), lambda _: None)


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="diffusers is not installed; run: pip install diffusers"):
        curves.measure(8, 4, 1, Registry.discover(), lambda _: None)
