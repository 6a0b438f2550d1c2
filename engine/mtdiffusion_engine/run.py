"""A trained run, from Python: load it, sample with any subset observed, get a dict of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve, frozen
from torch import Tensor

from mtdiffusion import Modality, MultimodalDiffusion, Params, SamplerSettings, sample
from mtdiffusion.sampler import shares
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine import hub
from mtdiffusion_engine.data import ModalityData, derive_seed, load_data
from mtdiffusion_engine.environment import choose_device
from mtdiffusion_engine.experiment import (
    Experiment,
    build_model,
    load_experiment,
    require_trained,
)
from mtdiffusion_engine.given import tensor_of
from mtdiffusion_engine.pictures import visibility_of
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.errors import did_you_mean

_SAMPLES = 4  # tells the seeds of samples from those of a training


@frozen(eq=False, repr=False)
class Run:
    """A trained model and the experiment it comes from. Make one with :func:`load_run`, or, from the Hugging Face Hub,
    with :meth:`from_pretrained`.

    Attributes:
        path: the run's folder.
        experiment: its resolved configuration.
        model: with the averaged (EMA) weights of the checkpoint, in evaluation mode.
        checkpoint: the folder its weights come from; of an exported run the run's.
    """

    path: Path
    experiment: Experiment
    model: MultimodalDiffusion
    checkpoint: Path

    def __repr__(self) -> str:
        modalities = ", ".join(self.model.names)
        return f"Run({str(self.path)!r}, checkpoint={self.checkpoint.name!r}, modalities=[{modalities}])"

    # What follows takes what huggingface_hub's ModelHubMixin has, by the same names. Run is no subclass of it: it would
    # delete a config.json in a folder that is not free before we refuse it, make a model on the Hub before there is
    # something to upload, and raise the Hub's own exceptions.

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        device: str | None = None,
        registry: Registry | None = None,
        overrides: Sequence[str] = (),
    ) -> Run:
        """A run by its name on the Hugging Face Hub, or by its folder, which needs no network.

        Args:
            pretrained_model_name_or_path: ``OWNER/NAME``, or a folder: an exported run's, or that of a training.
            force_download: download it even if it is here.
            token: of an account that may read it; None: of whoever is logged in; False: none.
            cache_dir: where downloads are kept; None: where huggingface_hub keeps them.
            local_files_only: take what is here, and download nothing.
            revision: branch, tag or commit on the Hub; None: its main branch.
            device: as of :func:`load_run`.
            registry: as of :func:`load_run`.
            overrides: as of :func:`load_run`.

        Raises:
            UserError: if it cannot be fetched, and as :func:`load_run`; a plugin that is missing is named, with what to
                install.
        """
        folder = hub.fetch(
            pretrained_model_name_or_path,
            revision=revision,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return load_run(folder, device=device, registry=registry, overrides=overrides)

    def save_pretrained(self, save_directory: str | Path, *, license: str | None = None) -> Path:
        """Export the run into an empty folder; see :func:`mtdiffusion_engine.hub.export_run`.

        Raises:
            UserError: if there is something in the folder.
        """
        return hub.export_run(self, Path(save_directory), license=license)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Export the run to the Hugging Face Hub; see :func:`mtdiffusion_engine.hub.push_run`.

        Returns:
            The address of the model's page, or of the pull request.

        Raises:
            UserError: if the Hub refuses it or cannot be reached.
        """
        return hub.push_run(
            self,
            repo_id,
            license=license,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )

    def outdates(self, path: Path) -> bool:
        """Whether something (metrics, a gallery) is not there, or was made before the run was trained or configured as
        it is. What an exported run has was made of it."""
        if ckpt.is_exported(self.path):
            return not path.exists()
        made_of = (self.checkpoint / "state.json", self.path / "config.toml")
        return not path.exists() or any(path.stat().st_mtime < source.stat().st_mtime for source in made_of)

    def modality(self, name: str) -> Modality:
        """A modality by name.

        Raises:
            UserError: if the model has none of that name.
        """
        names = self.model.names
        if name not in names:
            near = did_you_mean(name, names)
            raise UserError(f'no modality named "{name}"{near} (this model has {", ".join(names)})')
        return self.model.modality(name)

    def data(self, split: Literal["train", "test"]) -> ModalityData:
        """A split of the run's data set, read (and embedded, where a modality is derived) anew at each call.

        Raises:
            UserError: if it cannot be read, or lacks a modality.
        """
        return load_data(self.experiment, self.model, split)

    def settings(self, **changes: object) -> SamplerSettings:
        """The run's sampler settings with some changed; None leaves one as it is.

        Another solver has its own noise, unless ``eta`` is given too: the run's was chosen for the run's solver.

        Raises:
            UserError: for a value out of range.
        """
        usual = self.experiment.sampling
        given = {name: value for name, value in changes.items() if value is not None}
        if given.get("solver", usual.solver) != usual.solver:
            given = {"eta": None, **given}
        try:
            return evolve(usual, **given)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise UserError(f"sampling: {error.args[0]}") from error

    def sample(
        self,
        n: int,
        *,
        observed: Mapping[str, Any] | None = None,
        visible: Mapping[str, Any] | None = None,
        strength: Mapping[str, float] | None = None,
        path: Literal["shared"] | Mapping[str, float] | Tensor | None = None,
        generate: Sequence[str] | None = None,
        steps: int | None = None,
        solver: Literal["ddim", "ancestral", "dpmpp_2m"] | None = None,
        eta: float | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        conditioning: Literal["observed", "replacement"] | None = None,
        draw: bool | None = None,
        compile: bool | None = None,
        precision: Literal["float32", "bfloat16"] | None = None,
        seed: int = 0,
        first: int = 0,
        on_step: Callable[[int, int, Mapping[str, Params]], None] | None = None,
    ) -> dict[str, Tensor]:
        """Generate every modality, or the rest given any subset; see :func:`mtdiffusion.sample`.

        They are drawn in batches of ``evaluation.batch_size``, so that any number fits into memory. What a batch leaves
        to chance follows from the seed and from the place of its first sample, and from how many it has.

        Args:
            n: how many samples.
            observed: what is given, by modality name: ``[n, ...]``, or one value (no batch axis) for all samples; or as
                on the command line, a file's path, a class's name, a caption; or a picture. See
                :func:`mtdiffusion_engine.given.tensor_of`.
            visible: for those given in part, a map of 1 (seen) and 0 (to be filled in) of the data's height and width:
                ``[n, h, w]``, or ``[h, w]`` for all samples; or a picture, or its path: white is seen.
            strength: for those given as something to start from, by name, in (0, 1]: 1 forgets it, near 0 keeps it.
            path: how far ahead of the slowest each modality is denoised, by name, in shares of the path; "shared": all
                together; clocks ``[steps + 1, N]`` (int64): these; None: as the run's configuration and law say.
            generate: the modalities wanted beside the observed; None: all. It saves no time: all of them are sampled.
            steps: network evaluations. This and the next eight are those of :class:`mtdiffusion.SamplerSettings`; None:
                as the run's configuration says.
            solver: its name.
            eta: noise of a step.
            guidance: on what is observed; 1 is none.
            guidance_interval: the part of the path on which there is guidance.
            conditioning: whether the network is shown what is observed.
            draw: draw from the final distributions instead of taking their modes.
            compile: compile the network.
            precision: of the network.
            seed: of all randomness. The same request with the same batch size on the same kind of device gives the same
                samples.
            first: the place of the first of these samples in a longer request: ``sample(n, first=k)`` are the last n of
                ``sample(k + n)`` if k is a multiple of the batch size. So many can be drawn in parts, by several
                processes.
            on_step: is told of each step, as in :func:`mtdiffusion.sample`; of many samples, batch after batch.

        Returns:
            Observed and generated modalities by name, each ``[n, ...]``, on the model's device.

        Raises:
            UserError: for a name that is no modality, or a value that does not fit.
        """
        if n < 1:
            raise UserError(f"expected at least 1 sample, found {n}")
        _require_by_name(observed=observed, visible=visible, strength=strength, generate=generate)
        if first < 0:
            raise UserError(f"first: expected the place of a sample, 0 or more, found {first}")
        clocks = path if isinstance(path, Tensor) else None
        ahead = None if isinstance(path, Tensor) else {} if path == "shared" else path
        settings = self.settings(
            steps=steps,
            solver=solver,
            eta=eta,
            path=ahead,
            guidance=guidance,
            guidance_interval=guidance_interval,
            conditioning=conditioning,
            draw=draw,
            compile=compile,
            precision=precision,
        )
        given = {name: self._batch(name, value, n) for name, value in (observed or {}).items()}
        maps = {name: self._visible(name, value, n) for name, value in (visible or {}).items()}
        for name in generate or ():
            self.modality(name)
        parts = []
        chunk = self.experiment.evaluation.batch_size
        for start in range(0, n, chunk):
            place = first + start
            generator = torch.Generator().manual_seed(
                derive_seed(seed % 2**64, _SAMPLES, place) if place else seed  # torch takes negative seeds, too
            )
            rows = slice(start, min(start + chunk, n))
            part = {name: x[rows] for name, x in given.items()}
            seen = {name: x[rows] for name, x in maps.items()}
            try:
                out = sample(
                    self.model,
                    rows.stop - start,
                    observed=part,
                    visible=seen,
                    strength=strength,
                    generate=generate,
                    settings=settings,
                    path=clocks,
                    generator=generator,
                    on_step=on_step,
                )
            except ValueError as error:
                raise UserError(str(error)) from error
            parts.append(out)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _batch(self, name: str, value: Any, n: int) -> Tensor:
        """An observed value as a checked batch ``[n, ...]``."""
        modality = self.modality(name)
        example = modality.placeholder(1)
        try:
            x = tensor_of(modality, value)
            if x.is_floating_point() == example.is_floating_point():
                x = x.to(example.dtype)
            if x.ndim == example.ndim - 1:
                x = x.expand(n, *x.shape)
            modality.check(x)
        except (UserError, ValueError) as error:
            raise UserError(f"observed {name}: {error}") from error
        if len(x) != n:
            raise UserError(f"observed {name}: expected one value or a batch of {n}, found a batch of {len(x)}")
        return x

    def visibility(self, name: str, value: Any) -> Tensor:
        """What of a modality ``visible`` lets be seen: a picture or a file of one, white where it is seen, scaled and
        cropped as what is observed, as ``[h, w]`` of 0 and 1; a tensor as it is.

        Raises:
            UserError: for a name that is no modality, one that has no places, or a picture that cannot be read or has
                another size and is not to be resized.
        """
        modality = self.modality(name)
        if not modality.encoder.spatial:
            raise UserError(f"visible {name}: this modality has no places, so it cannot be observed in part")
        height, width = modality.placeholder(1).shape[-2:]
        return visibility_of(value, (height, width), resize=modality.resize)

    def _visible(self, name: str, value: Any, n: int) -> Tensor:
        """A visibility map as a batch ``[n, h, w]`` at the data's resolution."""
        x = self.visibility(name, value)
        expected = [n, *self.modality(name).placeholder(1).shape[-2:]]
        if list(x.shape) not in (expected, expected[1:]):
            raise UserError(f"visible {name}: expected {expected} or {expected[1:]}, found {list(x.shape)}")
        if not bool(((x == 0) | (x == 1)).all()):
            raise UserError(f"visible {name}: expected 1 (seen) and 0 (to be filled in), found other values")
        return x.expand(expected)


def _require_by_name(generate: object, **given: object) -> None:
    """Texts as on the command line are taken for what they stand for by no one; the message shows what does."""
    for key, value in given.items():
        if value is not None and not isinstance(value, Mapping):
            shown = shares(value) if key == "strength" else _pairs(value)
            raise UserError(f"{key}: expected a dict by modality name, such as {shown}; found {value!r}")
    if isinstance(generate, str):
        raise UserError(
            f"generate: expected a list of modalities' names, such as {generate.split(',')}; found {generate!r}"
        )


def _pairs(value: object) -> str:
    name, equals, text = str(value).partition("=")
    return str({name: text} if equals and isinstance(value, str) else {"label": "3"})


def _folder_of(path: Path, checkpoint: int | None) -> Path:
    """The folder of a run's weights: of the checkpoint of a step, or the newest."""
    newest = ckpt.require_run(path)
    if checkpoint is None:
        return newest
    known = {ckpt.step_of(other): other for other in ckpt.list_checkpoints(path)}
    if checkpoint not in known:
        raise UserError(f"{path}: no checkpoint of step {checkpoint} (there is {', '.join(map(str, known))})")
    return known[checkpoint]


def load_run(
    path: str | Path,
    *,
    device: str | None = None,
    registry: Registry | None = None,
    checkpoint: int | None = None,
    overrides: Sequence[str] = (),
) -> Run:
    """Rebuild a run's model from its folder.

    Args:
        path: what ``mtdiffusion train --out`` made.
        device: "cpu", "cuda", "cuda:1" or "mps"; None: CUDA if there is one.
        registry: where kinds are looked up; None: what is installed.
        checkpoint: the step of the checkpoint to load; None: the newest.
        overrides: ``KEY=VALUE`` arguments that change what the model does not depend on: data, evaluation, sampling,
            and where something is. The folder stays as it is.

    Raises:
        UserError: if the folder is no run, or something in it is missing or damaged, or for other overrides.
    """
    path, where = Path(path), choose_device(device)
    folder = _folder_of(path, checkpoint)
    registry = registry or Registry.discover()
    experiment = load_experiment(path / "config.toml", list(overrides), registry)
    if overrides:
        require_trained(experiment, path, registry)
    model = build_model(experiment)
    while True:
        try:
            ckpt.load_weights(model, folder / "ema.safetensors")
            break
        except UserError:
            if checkpoint is not None or folder.is_dir():
                raise
            folder = _folder_of(path, checkpoint)  # a training that goes on has removed the one that was the newest
    return Run(path, experiment, model.to(where).eval(), folder)
