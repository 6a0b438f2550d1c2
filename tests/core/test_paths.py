"""A clock for each modality: along any path, and from data with noise, samplers return the true law.

All with the optimal heads of jointly Gaussian modalities and exact laws (see :class:`NoiseBasis`), so an error is the
solver's own, of its steps.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import mtdiffusion.model
from mtdiffusion import MultimodalDiffusion, OffsetClocks, SamplerSettings, sample
from tests.core.gaussians import NOISE, JointGaussian, NoiseBasis, gaussian_model, sampled_law, sampling_errors

PATHS: dict[str, dict[str, float]] = {
    "shared": {},
    "offset": {"depth": 0.3, "sound": 0.6},
    "sequential": {"depth": 1.0, "sound": 2.0},
}


@pytest.fixture(scope="module")
def gaussians() -> tuple[MultimodalDiffusion, JointGaussian]:
    return gaussian_model("own")


@pytest.mark.parametrize(
    # Bounds of the covariance's relative error by how many are given (none, one, two), about an eighth above what was
    # measured. A longer path leaves fewer steps to each modality; with two given, all paths are one.
    ("name", "solver", "eta", "bounds"),
    [
        ("shared", "ancestral", 1.0, (0.048, 0.051, 0.059)),
        ("offset", "ancestral", 1.0, (0.078, 0.086, 0.059)),
        ("sequential", "ancestral", 1.0, (0.142, 0.106, 0.059)),
        ("shared", "ddim", 0.0, (0.031, 0.029, 0.029)),
        ("offset", "ddim", 0.0, (0.045, 0.045, 0.029)),
        ("sequential", "ddim", 0.0, (0.082, 0.057, 0.029)),
        ("shared", "dpmpp_2m", 0.0, (0.0023, 0.0014, 0.0007)),
        ("offset", "dpmpp_2m", 0.0, (0.0023, 0.0016, 0.0007)),
        ("sequential", "dpmpp_2m", 0.0, (0.0070, 0.0026, 0.0007)),
        ("shared", "dpmpp_2m", 1.0, (0.0029, 0.0043, 0.0070)),
        ("offset", "dpmpp_2m", 1.0, (0.0123, 0.0176, 0.0070)),
        ("sequential", "dpmpp_2m", 1.0, (0.0495, 0.0197, 0.0070)),
    ],
)
def test_every_path_samples_the_joint_law_and_every_conditional(
    monkeypatch: pytest.MonkeyPatch,
    gaussians: tuple[MultimodalDiffusion, JointGaussian],
    name: str,
    solver: str,
    eta: float,
    bounds: tuple[float, float, float],
) -> None:
    settings = SamplerSettings(100, solver, eta, path=PATHS[name])  # type: ignore[arg-type]
    for subset, (mean, covariance) in sampling_errors(monkeypatch, *gaussians, settings).items():
        assert mean < 2e-4
        assert covariance < bounds[len(subset)]


def _wandering(total: int, steps: int, n: int) -> Tensor:
    """A path in which clocks fall by leaps of their own, and stand still now and then: ``[steps + 1, n]``."""
    generator = torch.Generator().manual_seed(0)
    falls = torch.rand(steps, n, generator=generator) * (torch.rand(steps, n, generator=generator) < 0.6)
    fallen = torch.cat([torch.zeros(1, n), falls.cumsum(0)]) / falls.sum(0)
    return (total * (1 - fallen)).round().long()


@pytest.mark.parametrize(("solver", "bound"), [("ddim", 0.06), ("dpmpp_2m", 0.01)])
def test_a_path_may_wander(
    monkeypatch: pytest.MonkeyPatch,
    gaussians: tuple[MultimodalDiffusion, JointGaussian],
    solver: str,
    bound: float,
) -> None:
    model, joint = gaussians
    path = _wandering(model.process.steps, 300, 3)
    assert (path.diff(dim=0) == 0).any()
    assert (path[:-1] != path[:-1, :1]).any(1).float().mean() > 0.9
    settings = SamplerSettings(1, solver, NOISE[solver])  # type: ignore[arg-type]
    for mean, covariance in sampling_errors(monkeypatch, model, joint, settings, [(), ("depth",)], path).values():
        assert mean < 2e-3
        assert covariance < bound


def test_the_law_of_clocks_says_which_path_is_taken_unless_the_settings_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = gaussian_model("own", steps=100, law=OffsetClocks((0.0, 0.3, 0.6)))
    plain, _ = gaussian_model("own", steps=100)

    def law(model: MultimodalDiffusion, path: dict[str, float] | None) -> Tensor:
        return sampled_law(monkeypatch, model, SamplerSettings(20, "ddim", path=path), {})[1]

    assert torch.equal(law(model, None), law(plain, PATHS["offset"]))
    assert torch.equal(law(model, {}), law(plain, None))
    assert not torch.allclose(law(model, None), law(plain, None), atol=1e-3)


@pytest.mark.parametrize("path", [{}, PATHS["offset"], PATHS["sequential"]])
def test_a_path_given_whole_is_gone_along_step_by_step(monkeypatch: pytest.MonkeyPatch, path: dict[str, float]) -> None:
    """Every step of the model's finest path, where the settings cannot ask for more."""
    model, _ = gaussian_model("own", steps=20)
    finest = model.path(None, path)
    by_settings = sampled_law(monkeypatch, model, SamplerSettings(len(finest) - 1, "dpmpp_2m", 0.0, path=path), {})
    given = sampled_law(monkeypatch, model, SamplerSettings(3, "dpmpp_2m", 0.0), {}, finest)
    for found, expected in zip(given, by_settings, strict=True):
        assert torch.equal(found, expected)


def test_what_is_given_costs_no_steps_of_a_path() -> None:
    """Of the sound ahead, of which nothing is left to do, no step is taken: all go to the others."""
    model, joint = gaussian_model("own", steps=100)
    x = joint.draw(2)
    clocks: list[list[float]] = []
    n = len(model.names)
    model.backbone.register_forward_pre_hook(lambda _, inputs: clocks.append(inputs[2][0, 16 * n : 17 * n].tolist()))
    settings = SamplerSettings(8, "ddim", path=PATHS["sequential"])
    sample(model, 2, observed={"sound": x["sound"]}, settings=settings)
    given, _ = clocks[:], clocks.clear()
    assert len(given) == 8
    assert all(sound == 0 for _, _, sound in given)
    assert [depth for _, depth, _ in given][4:] == [0] * 4  # half of the steps are the depth's
    sample(model, 2, settings=settings, path=model.path(None, PATHS["sequential"]), observed={"sound": x["sound"]})
    assert len(clocks) == 200
    # What is given and comes last leaves the others' steps as they are.
    clocks.clear()
    sample(model, 2, observed={"pose": x["pose"]}, settings=settings)
    assert len(clocks) == 8
    assert all(pose == 0 for pose, _, _ in clocks)


def test_a_step_that_moves_nothing_of_what_is_generated_is_not_taken() -> None:
    model, joint = gaussian_model("own", steps=20)
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    path = torch.tensor([[20, 20, 20], [20, 20, 10], [20, 10, 10], [20, 10, 0], [0, 5, 0], [0, 0, 0]])
    x = joint.draw(2)
    for given, steps in (((), 5), (("sound",), 3), (("pose",), 5), (("pose", "sound"), 3), (("depth", "sound"), 1)):
        calls.clear()
        sample(model, 2, observed={name: x[name] for name in given}, path=path)
        assert len(calls) == steps


# Replacement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_replacement_is_right_where_what_is_given_comes_first(
    monkeypatch: pytest.MonkeyPatch, gaussians: tuple[MultimodalDiffusion, JointGaussian], solver: str
) -> None:
    """It is biased because early steps decide before z shows what is known; after a path of its own, z shows all."""
    biased = SamplerSettings(60, solver, NOISE[solver], conditioning="replacement")  # type: ignore[arg-type]
    first = SamplerSettings(60, solver, NOISE[solver], conditioning="replacement", path={"sound": 1.0})  # type: ignore[arg-type]
    ((mean, covariance),) = sampling_errors(monkeypatch, *gaussians, first, [("sound",)]).values()
    assert mean < 1e-3
    assert covariance < (0.1 if solver == "ddim" else 0.01)  # 30 of the steps are left
    assert next(iter(sampling_errors(monkeypatch, *gaussians, biased, [("sound",)]).values()))[0] > 0.2


# Starting from what is given ----------------------------------------------------------------------------------------


def _from_data(
    monkeypatch: pytest.MonkeyPatch,
    model: MultimodalDiffusion,
    joint: JointGaussian,
    settings: SamplerSettings,
    strength: dict[str, float],
    given: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and covariance of all modalities, those with a strength and those given being drawn from the data together;
    and how what is sampled goes with what was given: ``[D, D]``, the identity if it is the same."""
    factor = torch.linalg.cholesky(joint.covariance)
    basis = NoiseBasis.of(monkeypatch, model, settings, more=len(factor))
    x = joint.mean.repeat(basis.batch, 1)
    x[-len(factor) :] += factor.T
    data = {name: values for name, values in joint.split(x).items() if name in (*strength, *given)}
    out = sample(model, basis.batch, observed=data, strength=strength, settings=settings)
    sampled = torch.cat([out[name] for name in joint.dims], 1)
    kept = torch.linalg.solve(factor.T, sampled[-len(factor) :] - sampled[0])
    return *basis.law(sampled), kept


@pytest.mark.parametrize(
    ("strength", "given"),
    [
        ({"pose": 0.5, "depth": 0.5, "sound": 0.5}, ()),
        ({"pose": 0.2, "sound": 0.7}, ()),
        ({"depth": 0.4}, ()),
        ({"pose": 0.3}, ("sound",)),
    ],
    ids=["all", "two", "one", "one_beside_another_given"],
)
@pytest.mark.parametrize(
    ("solver", "eta", "bound"),  # measured: 5.3, 6.1, 9.8 and 0.6 % at worst
    [
        ("ddim", 0.0, 0.06),
        ("ddim", 0.5, 0.07),
        ("ancestral", 1.0, 0.11),
        ("dpmpp_2m", 0.0, 0.0065),
        ("dpmpp_2m", 1.0, 0.1),
    ],
)
def test_from_data_with_noise_the_law_is_the_data_s(
    monkeypatch: pytest.MonkeyPatch,
    gaussians: tuple[MultimodalDiffusion, JointGaussian],
    solver: str,
    eta: float,
    bound: float,
    strength: dict[str, float],
    given: tuple[str, ...],
) -> None:
    """Each starts at q(z_τ | x) of its own τ, which is the process of the whole at those clocks."""
    model, joint = gaussians
    settings = SamplerSettings(50, solver, eta=eta, path=PATHS["offset"])  # type: ignore[arg-type]
    mean, covariance, _ = _from_data(monkeypatch, model, joint, settings, strength, given)
    torch.testing.assert_close(mean, joint.mean, rtol=0, atol=2e-4)
    assert ((covariance - joint.covariance).norm() / joint.covariance.norm()).item() < bound


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "dpmpp_2m"])
def test_strength_goes_from_keeping_what_was_given_to_forgetting_it(
    monkeypatch: pytest.MonkeyPatch, gaussians: tuple[MultimodalDiffusion, JointGaussian], solver: str
) -> None:
    model, joint = gaussians
    settings = SamplerSettings(20, solver, NOISE[solver])  # type: ignore[arg-type]
    kept = []
    for strength in (1e-6, 0.01, 0.3, 0.6, 0.9, 1.0):
        each = dict.fromkeys(joint.dims, strength)
        kept.append(_from_data(monkeypatch, model, joint, settings, each)[2].diagonal())
    torch.testing.assert_close(kept[0], torch.ones_like(kept[0]), rtol=0, atol=2e-3)
    torch.testing.assert_close(kept[1], torch.ones_like(kept[1]), rtol=0, atol=5e-3)
    torch.testing.assert_close(kept[-1], torch.zeros_like(kept[-1]), rtol=0, atol=1e-3)
    assert (torch.stack(kept).diff(dim=0)[1:] < -0.02).all()  # less of it the stronger


# Decisions on the way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("path", [{"pose": 1.0}, {"pose": 1.0, "depth": 0.0, "sound": 0.5}])
def test_what_arrives_early_is_decided_and_the_rest_goes_by_the_decision(
    monkeypatch: pytest.MonkeyPatch, draw: bool, path: dict[str, float]
) -> None:
    """Pose arrives when the others have gone no or half of their way: from there on they are sampled as given it."""
    model, joint = gaussian_model("own", steps=40)
    noise = torch.randn(3, *model.layout.latent.shape, generator=torch.Generator().manual_seed(0)).double()
    monkeypatch.setattr(mtdiffusion.model, "standard_normal", lambda like, generator=None: noise)
    decided = joint.draw(3, seed=7)["pose"]  # far from what z at that point would say
    decoder = model.modality("pose").decoder
    asked: list[str] = []

    def decide(kind: str) -> Tensor:
        asked.append(kind)
        return decided

    monkeypatch.setattr(decoder, "mode", lambda params: decide("mode"))
    monkeypatch.setattr(decoder, "sample", lambda params, generator: decide("sample"))
    others = [model.modality(name).decoder for name in ("depth", "sound")]
    for other in others:
        monkeypatch.setattr(other, "sample", lambda params, generator: params["mean"])
    whole = model.path(None, path)
    arrival = int((whole[:, 0] == 0).int().argmax())
    settings = SamplerSettings(draw=draw, solver="ddim")
    out = sample(model, 3, settings=settings, path=whole)
    assert asked == ["sample" if draw else "mode"]
    assert torch.equal(out["pose"], decided)
    # The rest of the path by hand, from where z stood then, but with the code of what was decided.
    z, _ = _ddim(model, noise, whole[: arrival + 1])
    code = model.modality("pose").encoder(decided)
    _, found = _ddim(model, torch.cat([code, z[:, code.shape[1] :]], 1), whole[arrival:])
    for name in ("depth", "sound"):
        torch.testing.assert_close(out[name], found[name], rtol=1e-10, atol=1e-10)


def _ddim(model: MultimodalDiffusion, z: Tensor, path: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """DDIM along a path, written out block by block: z at its end, and the last means of the heads."""
    process, means = model.process, {}
    for t, s in itertools.pairwise(path):
        params, blocks = model(z, t[None]).params, []
        for i, name in enumerate(model.names):
            block, m = model.layout.take(name, z), process.signal_table[:, i]
            if s[i] < t[i]:
                means[name] = params[name]["mean"]
                code = model.modality(name).encoder(means[name])
                epsilon = (block - m[t[i]] * code) / process.variance(t[i]).sqrt()
                block = m[s[i]] * code + process.variance(s[i]).sqrt() * epsilon
            blocks.append(block)
        z = torch.cat(blocks, 1)
    return z, means


def test_decisions_that_are_drawn_leave_the_law_as_it_is(gaussians: tuple[MultimodalDiffusion, JointGaussian]) -> None:
    """Few steps, of which the last is a leap: there a mode would lose much of the variance, and a draw does not."""
    model, joint = gaussians
    path = model.path(None, {"pose": 1.0})
    path = path[(path[:, 0] % 50 == 0) & (path[:, 1] % 50 == 0) & ((path[:, 0] > 200) | (path[:, 0] == 0))]
    error = {}
    for draw in (False, True):
        settings = SamplerSettings(solver="dpmpp_2m", eta=0.0, draw=draw)
        out = sample(model, 8000, settings=settings, path=path, generator=torch.Generator().manual_seed(0))
        found = torch.cat([out[name] for name in joint.dims], 1).T.cov()
        error[draw] = ((found - joint.covariance).norm() / joint.covariance.norm()).item()
    assert error[True] < 0.05  # of which 3 % are what 8,000 samples leave
    assert error[False] > 2 * error[True]
