"""Trained runs as folders of their own, and on the Hugging Face Hub.

::

    README.md            the model card: what it is, how to use it, what was measured
    config.toml          the experiment; paths are relative to this folder
    plugins.json         where each of its kinds came from
    ema.safetensors      the averaged weights
    state.json           how far they were trained
    metrics.json, metrics-directions.json, gallery.png
    files/               files and folders that its modalities read, such as a tokenizer

Nothing in it is code or pickled, and no more than the plugins that are installed is imported to use it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from torch import Tensor

from mtdiffusion import MultimodalDiffusion
from mtdiffusion_engine import checkpoint as ckpt
from mtdiffusion_engine.experiment import PLUGINS_FILE, TRAINED, Experiment, origins_of, resolved, with_paths
from mtdiffusion_engine.metrics import DIRECTIONS, METRICS, legend, rows, stored_directions
from mtdiffusion_engine.pictures import sample_sheet
from mtdiffusion_registry import Registry, UserError
from mtdiffusion_registry.config import dump_toml
from mtdiffusion_registry.errors import first_line
from mtdiffusion_registry.hub import HUB_NAME
from mtdiffusion_registry.installed import version

GALLERY = "gallery.png"
CARD = "README.md"
FILES = "files"


class TrainedRun(Protocol):
    """What is exported of a :class:`mtdiffusion_engine.run.Run`."""

    @property
    def path(self) -> Path: ...

    @property
    def experiment(self) -> Experiment: ...

    @property
    def model(self) -> MultimodalDiffusion: ...

    @property
    def checkpoint(self) -> Path: ...

    def outdates(self, path: Path) -> bool: ...

    def sample(self, n: int, *, seed: int = 0) -> dict[str, Tensor]: ...


def export_run(run: TrainedRun, folder: Path, *, name: str | None = None, license: str | None = None) -> Path:
    """Write all that is needed to use a run, and its model card, into an empty folder.

    Metrics and gallery are the run's own, if they were made of these weights; without a gallery, the picture is a sheet
    of samples. Of paths, those that the model reads are copied; of others (the data's), which say where something was
    on this machine, only the last part is kept.

    Args:
        name: what the card calls it; None: as the run's folder.
        license: of the weights, as the Hub names it ("apache-2.0"); None: the card says that none is given.

    Raises:
        UserError: if there is something in the folder.
    """
    ckpt.require_free(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def moved(key: str, path: Path) -> Path:
        if f"{key}.".startswith(TRAINED) or not path.exists():
            return Path(path.name)
        place = Path(FILES, *re.findall(r"\w+", key), path.name)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / place)
        return place

    shutil.copyfile(run.checkpoint / "ema.safetensors", folder / "ema.safetensors")
    ckpt.write_json(folder / PLUGINS_FILE, origins_of(run.path))
    state = ckpt.load_state(run.checkpoint)
    ckpt.write_json(folder / "state.json", {"step": state["step"], "format": state["format"]})
    dump_toml(resolved(with_paths(run.experiment, moved), Registry.discover()), folder / "config.toml")
    metrics = None
    if not run.outdates(run.path / METRICS):
        metrics = ckpt.read_json(run.path / METRICS, "measure again: mtdiffusion evaluate, which keeps a copy of it")
        shutil.copyfile(run.path / METRICS, folder / METRICS)
        if (run.path / DIRECTIONS).is_file():
            shutil.copyfile(run.path / DIRECTIONS, folder / DIRECTIONS)
    drawn = run.outdates(run.path / GALLERY)
    if drawn:
        sample_sheet(run.model, run.sample(16), f"Samples of {run.path.absolute().name}").save(folder / GALLERY)
    else:
        shutil.copyfile(run.path / GALLERY, folder / GALLERY)
    caption = (
        "Samples, everything generated together." if drawn else "Samples, and what is generated from what is given."
    )
    text = _card(run, folder, name, license, metrics, caption)
    (folder / CARD).write_text(text, encoding="utf-8")
    return folder


def push_run(
    run: TrainedRun,
    repo_id: str,
    *,
    license: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Export a run and upload it to the Hugging Face Hub. Of a run that was there before, neither metrics nor files
    that its model read stay.

    Args:
        repo_id: ``OWNER/NAME`` of a model there; made if it is not there.
        license: as of :func:`export_run`.
        commit_message: None: what made it, the run's name and its checkpoint.
        private: whether it is made private, if it is made; None: as its owner's settings say.
        token: of the account; None: of whoever is logged in.
        branch: where to, made if it is not there; None: the main branch.
        create_pr: propose it as a pull request to the main branch.

    Returns:
        The address of the model's page, or of the pull request.

    Raises:
        UserError: if the Hub refuses it or cannot be reached, or for both a branch and a pull request.
    """
    from huggingface_hub import HfApi

    if not HUB_NAME.fullmatch(repo_id):
        raise UserError(f"push: expected OWNER/NAME, found {repo_id!r}")
    if branch is not None and create_pr:
        raise UserError(f"push: a pull request is to the main branch, found branch = {branch!r}; leave out one of them")
    api = HfApi(token=token)
    said = f"mtdiffusion {version('mtdiffusion')}: {run.path.absolute().name}, {run.checkpoint.name}"
    with TemporaryDirectory() as scratch:
        folder = export_run(run, Path(scratch, "run"), name=repo_id, license=license)
        try:
            page = api.create_repo(repo_id, private=private, exist_ok=True)
            if branch is not None:
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or said,
                revision=branch,
                create_pr=create_pr,
                delete_patterns=[METRICS, DIRECTIONS, f"{FILES}/*"],
            )
        except Exception as error:  # of the network or the Hub: each has exceptions of its own
            raise UserError(
                f"push: {repo_id} could not be uploaded ({first_line(error)}); log in with `hf auth login`, as one who "
                "may write there, or export the run and upload the folder later: mtdiffusion export"
            ) from error
    return str(commit.pr_url or page)


def fetch(name: str | Path, *, revision: str | None = None, **download: Any) -> Path:
    """The folder of a run by its name on the Hub, which is downloaded unless it is here, or by its folder.

    Args:
        revision: branch, tag or commit on the Hub; None: its main branch.
        download: ``force_download``, ``token``, ``cache_dir``, ``local_files_only``, as huggingface_hub's
            ``snapshot_download`` takes them.

    Raises:
        UserError: if it is neither, or cannot be downloaded.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise UserError(f"{name}: revision = {revision!r} is of the Hub, and this is a folder; leave it out")
        return Path(name)
    if not HUB_NAME.fullmatch(str(name)):
        raise UserError(f"{name}: expected the folder of a run, or OWNER/NAME on the Hugging Face Hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), revision=revision, **download))
    except Exception as error:  # of the network, the Hub or the disk: each has exceptions of its own
        raise UserError(
            f"{name}: there is no such folder, and it could not be downloaded from the Hugging Face Hub "
            f"({first_line(error)}); check the name and the network, or give the folder of a copy"
        ) from error


# The model card -------------------------------------------------------------------------------------------------------


def _card(
    run: TrainedRun,
    folder: Path,
    name: str | None,
    license: str | None,
    metrics: Mapping[str, Any] | None,
    caption: str,
) -> str:
    """The model card in Markdown, with the header that the Hub reads."""
    experiment, model = run.experiment, run.model
    kinds = {key: config.kind for key, config in experiment.modalities.items()}
    header = {
        "library_name": "mtdiffusion",
        "tags": ["mtdiffusion", "diffusion", "multimodal", *sorted({*kinds.values()})],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items()]  # JSON is YAML
    lines += [f"license: {json.dumps(license)}"] if license else []
    title = name or run.path.absolute().name
    state, training = ckpt.load_state(folder), experiment.training
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return "\n".join(
        [
            "---",
            *lines,
            "---",
            "",
            f"# {title}",
            "",
            f"One diffusion model over {_listed(list(kinds))}: it generates all of them together, or any of them from "
            f"any others. Made with mtdiffusion {version('mtdiffusion')}.",
            "",
            f"![Samples]({GALLERY})",
            "",
            caption,
            "",
            "## Use",
            "",
            "mtdiffusion is on no package index yet: install it from a clone of its repository.",
            "",
            "```sh",
            f"pip install /path/to/the/clone{_other_packages(folder)}",
            "```",
            "",
            "```python",
            "from mtdiffusion_engine import Run",
            "",
            f'run = Run.from_pretrained("{name or "FOLDER"}")' + ("" if name else "  # this folder"),
            f"out = run.sample(16)  # a dict of tensors: {', '.join(model.names)}",
            f'more = run.sample(16, observed={{"{model.names[0]}": out["{model.names[0]}"]}})  # given one, the others',
            "```",
            "",
            "From a command line, with a copy of this folder: `mtdiffusion sample FOLDER -n 16 --out samples`.",
            "",
            "## Modalities",
            "",
            "| name | kind | shape |",
            "|---|---|---|",
            *(f"| {key} | {kind} | {_shape(model, key)} |" for key, kind in kinds.items()),
            "",
            "## Training",
            "",
            f"Data of kind `{experiment.data.kind}`; {state['step']:,} steps of {training.batch_size} samples, seed "
            f"{training.seed}; {parameters:.3g} million parameters. The weights are averages over training (decay "
            f"{training.ema:g}). All settings are in `config.toml`.",
            "",
            "## Measured",
            "",
            *_measured(metrics, stored_directions(run.path, run.model)),
            "",
            "## Licence",
            "",
            f"The weights: {license}." if license else "None is given for the weights.",
            "",
        ]
    )


def _measured(metrics: Mapping[str, Any] | None, directions: Mapping[str, str]) -> list[str]:
    """A table with a row for each ``target|observed``."""
    if not metrics:
        return ["These weights were not evaluated (`mtdiffusion evaluate`)."]
    table = [
        f"| {row.group.replace('|', ' given ')} | {', '.join((*row.first, *row.others))} |"
        for row in rows(metrics, directions)
    ]
    told = "By `mtdiffusion evaluate` on held-out data (the row `real` is of these themselves); also in `metrics.json`."
    return [told, f"{legend()}.", "", "| what | metrics |", "|---|---|", *table]


def _shape(model: MultimodalDiffusion, name: str) -> str:
    x = model.modality(name).placeholder(1)
    return f"{' × '.join(map(str, x.shape[1:])) or 'one value'}, {str(x.dtype).removeprefix('torch.')}"


def _other_packages(folder: Path) -> str:
    """What else is to be installed, for ``pip install``."""
    found = {origin["distribution"]: origin["version"] for origin in origins_of(folder).values()}
    return "".join(f' "{name}=={number}"' for name, number in sorted(found.items()) if name not in ("mtdiffusion", ""))


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
