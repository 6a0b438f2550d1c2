"""Evaluation on held-out data: every modality given every other, given all others and given a part of itself; joint
samples; the bound; and what real data scores.

Keys read ``target|observed/metric``: ``label|image/accuracy``, ``image|label+mask/judge_accuracy``,
``image|image:part/judge_accuracy`` (filled holes), ``joint/fid_judge``, ``real/fid_judge``. Each group says how many
samples its metrics are of (``label|image/samples``); of a metric that is of fewer, which an evaluator gives that needs
more of a sample than the group does, ``..._samples`` says it.

Samples that lack modalities serve wherever they have what is asked for. What no sample serves for, and what is
undefined, is left out of the results and told as a note.

:mod:`mtdiffusion_engine.measures` says what is measured, :mod:`mtdiffusion_engine.judging` what is said of samples;
here samples are drawn.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from attrs import evolve
from torch import Tensor

from mtdiffusion import MultimodalDiffusion, Params, SamplerSettings, read_out, sample, variational_bound
from mtdiffusion_engine.data import ModalityData, derive_seed
from mtdiffusion_engine.judging import (
    Metrics,
    Tell,
    as_samples,
    build_evaluators,
    check_evaluators,
    defined,
    judge_joint,
    judge_real,
    judge_target,
    silent,
    timed,
)
from mtdiffusion_engine.measures import PART, Kept, Measure, plan
from mtdiffusion_engine.metrics import directions_of
from mtdiffusion_engine.samples import Samples, Wish, draw_samples, held_out, joined
from mtdiffusion_engine.subsets import random_holes
from mtdiffusion_engine.team import Team, batches_of, chance_at
from mtdiffusion_registry import Evaluator, UserError
from mtdiffusion_registry.cache import code_key, config_key
from mtdiffusion_registry.installed import version
from mtdiffusion_registry.pace import Pace, by_step

if TYPE_CHECKING:
    from mtdiffusion_engine.experiment import Experiment
    from mtdiffusion_engine.run import Run

DEFAULT_SAMPLES = 1000
"""Held-out samples that an evaluation takes at most where ``evaluation.samples`` is not set."""


def complete_samples(data: ModalityData, limit: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Samples that have every modality, ``[n, ...]`` by name, in the order of the split: all or, with a limit, a random
    draw of as many, which follows from the seed.

    Raises:
        UserError: if there is none, or one that is read cannot be.
    """
    (samples,) = draw_samples(data, [Wish(list(data.modalities), limit)], seed)
    if len(samples) == 0:
        raise UserError(f"{data.what}: no sample has every modality, so there is nothing to compare with")
    return dict(samples.x)


def evaluate_run(
    run: Run, progress: Tell = silent, note: Tell | None = None, kept: Kept | None = None, team: Team | None = None
) -> Metrics:
    """All metrics of a run's model on its test split; the same every time on one machine with one number of threads.

    Args:
        progress: is told what goes on, how long the rest of it will take and how long it took.
        note: is told what is left out of the results, and why; None: progress is.
        kept: takes each part of the results when it is there, and gives those of an evaluation of the same model, data
            and settings that was interrupted. Its file stays: who has written the results removes it.
        team: which of several processes this is, all of which call it: they share the sampling, and the metrics are
            those of one process. The first judges, tells and gets them; the others get none. None: it is alone.

    Raises:
        UserError: if the test split is empty or cannot be read, something was chosen that cannot be measured, or an
            evaluator lacks a modality or fails; or another process has stopped.
    """
    config, model = run.experiment.evaluation, run.model
    kept, note, team = Kept() if kept is None else kept, note or progress, team or Team()
    if not team.first:
        progress = note = silent
    measures = planned(run.experiment, model)
    check_evaluators(config.evaluators, run.experiment.modalities)
    with timed(progress, "reading held-out samples"):
        data = held_out(run)
        limit = config.limit(DEFAULT_SAMPLES)
        (test,) = draw_samples(data, [Wish(limit=limit)], config.seed)
    if config.samples is None and limit is not None and limit < len(data):
        note(
            f"{limit:,} of {len(data):,} held-out samples are taken, a random draw by evaluation.seed. For all of them "
            'say --samples all, or evaluation.samples = "all"'
        )
    if team.first:
        if kept.begin(measures, fingerprint(run, test)):
            note(f"{kept.path}: of another checkpoint or other settings; it will be replaced")
        elif kept.done:
            note(f"going on with an evaluation that was stopped: {', '.join(kept.done)} {_is_are(kept.done)} kept")
    evaluators: list[Evaluator] = []
    modalities = {name: model.modality(name) for name in model.names}
    if team.first and any(measure.kind != "bound" and measure.name not in kept.done for measure in measures):
        evaluators = build_evaluators(
            config.evaluators,
            modalities,
            lambda: run.data("train"),
            seed=config.seed,
            progress=progress,
            note=note,
        )
    if evaluators or not kept.directions:  # those of an evaluation that was stopped may need no evaluator any more
        kept.directions = directions_of(modalities, evaluators)
    return evaluate(
        model,
        test,
        evaluators,
        conditional=evolve(run.experiment.sampling, steps=config.steps),
        joint=run.experiment.sampling,
        measures=measures,
        hidden_share=config.hidden_share,
        bound_times=config.bound_times,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=progress,
        note=note,
        kept=kept,
        team=team,
    )


def _is_are(names: Mapping[str, object]) -> str:
    return "is" if len(names) == 1 else "are"


def planned(experiment: Experiment, model: MultimodalDiffusion) -> list[Measure]:
    """What an experiment's ``evaluation`` table asks for.

    Raises:
        UserError: if ``evaluation.conditionals`` names what cannot be measured.
    """
    config = experiment.evaluation
    return plan(
        model.names,
        model.spatial,
        config.conditionals,
        joint_draws=config.joint_draws,
        bound=config.bound_times > 0,
    )


def fingerprint(run: Run, test: Samples) -> str:
    """Of all that an evaluation's results depend on: the weights, the held-out samples, the configuration, the code of
    the plugins and of this package, and where it runs."""
    digest = hashlib.sha256()
    for part in (run.model.state_dict(), test.x, test.presence):
        for name, x in part.items():
            digest.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
            digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    experiment = run.experiment
    plugins = [experiment.data, *experiment.modalities.values(), experiment.backbone, *experiment.evaluation.evaluators]
    code = [code_key(MultimodalDiffusion), code_key(type(run)), *map(config_key, plugins)]
    where = [version("mtdiffusion"), torch.__version__, str(run.model.device.type)]
    digest.update(repr([experiment, code, where]).encode())
    return digest.hexdigest()[:32]


def _stream(seed: int, name: str) -> torch.Generator:
    """Random numbers of one measure, whatever else is measured."""
    return torch.Generator().manual_seed(derive_seed(seed, zlib.crc32(name.encode())))


def evaluate(
    model: MultimodalDiffusion,
    test: Samples | Mapping[str, Tensor],
    evaluators: Sequence[Evaluator],
    *,
    conditional: SamplerSettings,
    joint: SamplerSettings,
    measures: Sequence[Measure] | None = None,
    hidden_share: float = 0.25,
    bound_times: int = 0,
    batch_size: int = 256,
    seed: int = 0,
    progress: Tell = silent,
    note: Tell | None = None,
    kept: Kept | None = None,
    team: Team | None = None,
) -> Metrics:
    """Metrics of a model on held-out samples; none of them is infinite or NaN.

    Args:
        test: the samples; as a mapping, of samples that lack nothing: ``[n, ...]`` by modality name.
        conditional, joint: how to sample with something and with nothing observed.
        measures: of :func:`mtdiffusion_engine.measures.plan`; None: all that it gives. Joint samples are as many as the
            held-out ones, each time they are drawn.
        hidden_share: how much of a spatial modality is hidden to be filled in.
        bound_times: terms of L1 a sample in the bound; 0 leaves it out.
        progress: is told what goes on, how long the rest of it will take and how long it took.
        note: is told what is left out of the results, and why; None: progress is.
        kept: takes each part of the results when it is there; what it has already is not measured again.
        team: as of :func:`evaluate_run`; ``evaluators`` and ``kept`` are those of the first process.

    Raises:
        UserError: if two evaluators, or an evaluator and a modality, give a metric of one name, or an evaluator fails;
            or another process has stopped.
    """
    note, kept, team = note or progress, Kept() if kept is None else kept, team or Team()
    if measures is None:
        measures = plan(model.names, model.spatial, bound=bound_times > 0)
    held = _Held(model, as_samples(test), evaluators, batch_size, note, team)
    done = team.told(set(kept.done))
    results: Metrics = {}
    draws: list[Metrics] = []
    unserved: list[str] = []
    for measure in measures:
        rows = held.rows(measure)
        unserved += [f"{target}|{'+'.join(measure.observed)}{_part(measure)}" for target in held.unserved(measure)]
        if measure.kind == "bound" and len(rows) == 0:
            unserved.append("joint/bound_bits_per_dim")
        if len(rows) == 0:
            continue
        if measure.name not in done:
            generator = _stream(seed, measure.name)
            with timed(progress, measure.name):
                pace = Pace(measure.name, len(rows), progress)
                if measure.kind == "real":
                    found = held.real() if team.first else {}
                elif measure.kind == "given":
                    found = held.given(measure, rows, conditional, generator, pace)
                elif measure.kind == "part":
                    found = held.part(measure, rows, hidden_share, conditional, generator, pace)
                elif measure.kind == "joint":
                    found = joint_draw(
                        model, len(rows), evaluators, joint, batch_size, generator, held.test, pace, team
                    )
                else:
                    found = held.bound(rows, bound_times, generator, pace)
            if team.first:
                kept.add(measure.name, found)
        if not team.first:
            continue
        if measure.kind == "joint":
            draws.append(kept.done[measure.name])
        else:
            results |= kept.done[measure.name]
    if draws:
        results |= joint_means(draws)
    if unserved and team.first:
        note(f"left out, since no held-out sample has all that they are of: {', '.join(unserved)}")
    return defined(results, note)


def _part(measure: Measure) -> str:
    return PART if measure.kind == "part" else ""


class _Held:
    """A model beside the held-out samples it is measured on; each measurement by the key that results have."""

    def __init__(
        self,
        model: MultimodalDiffusion,
        test: Samples,
        evaluators: Sequence[Evaluator],
        batch_size: int,
        note: Tell,
        team: Team,
    ) -> None:
        count = len(test)
        lacking = [name for name in model.names if name not in test.x]  # those that no sample has
        self.test = Samples(
            {**test.x, **{name: model.modality(name).placeholder(count) for name in lacking}},
            {**test.presence, **{name: torch.zeros(count, dtype=torch.bool) for name in lacking}},
        )
        self.model, self.evaluators, self.batch_size, self.note = model, evaluators, batch_size, note
        self.team = team

    def _has(self, measure: Measure, target: str) -> Tensor:
        return self.test.having([*measure.observed, target])

    def unserved(self, measure: Measure) -> list[str]:
        """Targets that no sample serves for."""
        return [target for target in measure.targets if len(self._has(measure, target)) == 0]

    def rows(self, measure: Measure) -> Tensor:
        """Indices ``[k]`` of the samples that serve, ascending."""
        if measure.kind == "bound":
            return self.test.having(self.model.names)
        if not measure.targets:
            return torch.arange(len(self.test))
        return torch.unique(torch.cat([self._has(measure, target) for target in measure.targets]))

    def real(self) -> Metrics:
        judged = judge_real(self.evaluators, self.test, self.note)
        return {**{f"real/{metric}": value for metric, value in judged.items()}, "real/samples": len(self.test)}

    def given(
        self, measure: Measure, rows: Tensor, settings: SamplerSettings, generator: torch.Generator, pace: Pace
    ) -> Metrics:
        """Each target of those samples that have it, and what is said of it in one evaluation of the network."""
        generated = self._drawn(rows, measure.observed, {}, settings, generator, pace)
        params = self._said(rows, measure)
        found: Metrics = {}
        if generated is None or params is None:
            return found
        for target in measure.targets:
            has = self._has(measure, target)
            if len(has) == 0:
                continue
            at = slice(None) if len(has) == len(rows) else torch.isin(rows, has).nonzero()[:, 0]
            made = {name: x[at] for name, x in generated.items()}
            said = {key: value[at] for key, value in params[target].items()}
            modality = self.model.modality(target)
            judged = judge_target(modality, target, made, self.test.take(has), self.evaluators, said, self.note)
            given = "+".join(measure.observed)
            found |= {f"{target}|{given}/{metric}": value for metric, value in judged.items()}
        return found

    def part(
        self,
        measure: Measure,
        rows: Tensor,
        hidden_share: float,
        settings: SamplerSettings,
        generator: torch.Generator,
        pace: Pace,
    ) -> Metrics:
        """A spatial modality filled in where it was hidden."""
        (name,) = measure.targets
        latent = self.model.layout.latent
        holes = random_holes(torch.full((len(rows),), hidden_share), (latent.height, latent.width), generator)
        made = self._drawn(rows, measure.observed, {name: holes}, settings, generator, pace)
        if made is None:
            return {}
        modality, truth = self.model.modality(name), self.test.take(rows)
        judged = judge_target(modality, name, made, truth, self.evaluators, None, self.note)
        return {f"{name}|{name}{PART}/{metric}": value for metric, value in judged.items()}

    def bound(self, rows: Tensor, times: int, generator: torch.Generator, pace: Pace) -> Metrics:
        """The mean bound of the samples that have every modality."""

        def batch(part: Tensor) -> float:
            x = {name: self.test.x[name][rows[part]].to(self.model.device) for name in self.model.names}
            chance = chance_at(generator, int(part[0]))
            bits = float(variational_bound(self.model, x, times=times, generator=chance).bits_per_dim.sum())
            pace.tell(int(part[-1]) + 1)
            return bits

        sums = self.team.shared(batches_of(len(rows), self.batch_size), batch)
        if sums is None:
            return {}
        total = sum(sums)
        found: Metrics = {"joint/bound_bits_per_dim": total / len(rows)}
        return found | ({"joint/bound_bits_per_dim_samples": len(rows)} if len(rows) < len(self.test) else {})

    def _drawn(
        self,
        rows: Tensor,
        observed: Sequence[str],
        visible: Mapping[str, Tensor],
        settings: SamplerSettings,
        generator: torch.Generator,
        pace: Pace,
    ) -> dict[str, Tensor] | None:
        """All modalities, ``[k, ...]`` by name, with some observed of each of these samples; of several processes, the
        first one's."""
        whole = [name for name in observed if name not in visible]

        def batch(part: Tensor) -> dict[str, Tensor]:
            given = {name: self.test.x[name][rows[part]] for name in observed}
            maps = {name: v[part] for name, v in visible.items()}
            chance = chance_at(generator, int(part[0]))
            told = by_step(pace.tell, int(part[0]), len(part))
            out = sample(
                self.model,
                len(part),
                observed=given,
                visible=maps,
                settings=settings,
                generator=chance,
                on_step=told,
            )
            return {name: x.cpu() for name, x in out.items() if name not in whole}

        made = _in_batches(len(rows), self.batch_size, batch, pace, self.team)
        if made is None:
            return None
        given = self.test.take(rows).x  # as it came out, too
        return {name: given[name] if name in whole else made[name] for name in self.model.names}

    @torch.no_grad()
    def _said(self, rows: Tensor, measure: Measure) -> dict[str, Params] | None:
        """What the heads say of the targets with nothing of them seen, by name; of several processes, the first
        one's."""
        model = self.model

        def batch(part: Tensor) -> dict[str, Params]:
            given = {name: self.test.x[name][rows[part]].to(model.device) for name in measure.observed}
            said = read_out(model, model.observe(given, model.visibility(len(part), given)))
            return {name: {key: x.cpu() for key, x in said[name].items()} for name in measure.targets}

        parts = self.team.shared(batches_of(len(rows), self.batch_size), batch)
        if parts is None:
            return None
        return {
            name: {key: torch.cat([part[name][key] for part in parts]) for key in parts[0][name]}
            for name in measure.targets
        }


def _in_batches(
    count: int, batch_size: int, batch: Callable[[Tensor], Mapping[str, Tensor]], pace: Pace, team: Team
) -> dict[str, Tensor] | None:
    """What ``batch`` gives for indices, a batch of them at a time, joined: ``[count, ...]`` by name; of several
    processes, the first one's."""

    def told(part: Tensor) -> Mapping[str, Tensor]:
        made = batch(part)
        pace.tell(int(part[-1]) + 1)
        return made

    places = batches_of(count, batch_size)
    if team.world == 1:  # each is let go as it is put in its place
        return joined(count, ((part, told(part)) for part in places))
    parts = team.shared(places, told)
    return None if parts is None else joined(count, zip(places, parts, strict=True))


def evaluate_joint(
    model: MultimodalDiffusion,
    count: int,
    evaluators: Sequence[Evaluator],
    settings: SamplerSettings,
    *,
    draws: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    real: Samples | None = None,
    note: Tell = silent,
) -> Metrics:
    """Metrics of samples with nothing observed, without held-out ones: the same as :func:`evaluate` of as many has.

    Args:
        count: samples a draw.
        draws: independent draws, over which metrics are means (:func:`joint_means`).
        real: as of :func:`mtdiffusion_engine.judging.judge_joint`.
        note: is told which metrics are defined in no draw, and so left out.

    Raises:
        UserError: if two evaluators give a metric of one name, or one fails.
    """
    made = []
    for measure in plan(model.names, model.spatial, ["joint"], joint_draws=draws):
        generator, pace = _stream(seed, measure.name), Pace(measure.name, count, silent)
        made.append(joint_draw(model, count, evaluators, settings, batch_size, generator, real, pace))
    return defined(joint_means(made), note)


def joint_draw(
    model: MultimodalDiffusion,
    count: int,
    evaluators: Sequence[Evaluator],
    settings: SamplerSettings,
    batch_size: int,
    generator: torch.Generator,
    real: Samples | None,
    pace: Pace,
    team: Team | None = None,
) -> Metrics:
    """Metrics of one draw of samples with nothing observed, and ``samples``, how many; as of :func:`judge_joint`. Of
    several processes (``team``), the first one's."""

    def batch(part: Tensor) -> dict[str, Tensor]:
        chance, told = chance_at(generator, int(part[0])), by_step(pace.tell, int(part[0]), len(part))
        out = sample(model, len(part), settings=settings, generator=chance, on_step=told)
        return {name: x.cpu() for name, x in out.items()}

    generated = _in_batches(count, batch_size, batch, pace, team or Team())
    if generated is None:
        return {}
    return {**judge_joint(evaluators, generated, real), "samples": count}


def joint_means(draws: Sequence[Mapping[str, float | int]]) -> Metrics:
    """Of draws of :func:`joint_draw`, keys ``joint/metric``: means over those draws in which a metric is defined.

    ``joint/metric_draws`` says over how many if not all; ``joint/metric_std`` is the standard deviation between them,
    if at least two. NaN where a metric is defined in none.
    """
    results: Metrics = {"joint/samples": draws[0]["samples"], "joint/draws": len(draws)}
    for metric in draws[0]:
        key, drawn = f"joint/{metric}", [draw[metric] for draw in draws]
        if key in results:
            continue
        if isinstance(drawn[0], int) and key.endswith("_samples"):
            results[key] = drawn[0]
            continue
        numbers = [value for value in drawn if math.isfinite(value)]
        results[key] = statistics.mean(numbers) if numbers else math.nan
        if len(numbers) > 1:
            results[f"{key}_std"] = statistics.stdev(numbers)
        if 0 < len(numbers) < len(draws):
            results[f"{key}_draws"] = len(numbers)
    return results
