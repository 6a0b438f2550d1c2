"""For people: pictures, metrics and files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from mtdiffusion.interfaces import InputSpec, Modality
from mtdiffusion_registry.errors import UserError, did_you_mean
from mtdiffusion_registry.testing.contract import (
    BATCHES,
    ContractError,
    check,
    contract_error,
    finite_metrics,
    require,
    require_directions,
    same_shape,
)
from mtdiffusion_registry.testing.modality.subject import ModalitySubject, accepts

__tracebackhide__ = True

_FORMS = ("file", "picture", "classes", "choice")


@check("examples")
def render(subject: ModalitySubject) -> None:
    """render(x) is pictures [B, 3, h, w] in [0, 1]."""
    for batch in BATCHES:
        picture = subject.cases[0].modality.render(subject.examples[:batch])
        require(
            picture.dim() == 4 and picture.shape[:2] == (batch, 3) and picture.is_floating_point(),
            "render(x) is floating point, [B, 3, h, w]",
            f"{picture.dtype} of shape {tuple(picture.shape)}",
            "repeat grey to three channels",
        )
        require(
            bool(((picture >= 0) & (picture <= 1)).all()),
            "render(x) is in [0, 1]",
            f"from {picture.min().item():.3g} to {picture.max().item():.3g}",
            "rescale and clip",
        )


@check("examples")
def similarity(subject: ModalitySubject) -> None:
    """similarity(x, candidates), if there is one, is [B, N], and nothing is nearer to x than x itself."""
    modality, candidates = subject.cases[0].modality, subject.examples
    for batch in BATCHES:
        x = candidates[:batch]
        similar = modality.similarity(x, candidates)
        if similar is None:
            return
        same_shape(similar, (len(x), len(candidates)), "similarity(x, candidates) is [B, N]", "compare every pair")
        least = (similar.diagonal() - similar.amax(1)).min().item()
        require(
            least > -1e-4,  # NaN is not
            "nothing is nearer to x than x itself: larger is nearer",
            f"another {-least:.3g} nearer",
            "negate a distance; normalize what is multiplied",
        )


@check("examples", "params")
def metrics(subject: ModalitySubject) -> None:
    """metrics and predictive_metrics are dicts of finite floats, of names that differ."""
    case = subject.cases[0]
    for batch in BATCHES:
        x = subject.examples[:batch]
        fix = "bound what is infinite for equal x, such as PSNR"
        of_samples = case.modality.metrics(x, x)
        finite_metrics(of_samples, "metrics of x and x", fix)
        with torch.no_grad():
            predictive = case.modality.predictive_metrics(case.params(batch), x)
        finite_metrics(predictive, "predictive_metrics", "compute with logits and log scales")
        both = sorted(of_samples.keys() & predictive.keys())
        require(not both, "metrics and predictive_metrics have different names", ", ".join(both), "rename one of them")


@check("metrics")
def directions(subject: ModalitySubject) -> None:
    """metric_directions says "higher" or "lower" of metrics that there are."""
    case, x = subject.cases[0], subject.examples
    stated = case.modality.metric_directions
    require_directions(stated)
    with torch.no_grad():
        names = {
            *case.modality.metrics(x, x),
            *case.modality.metrics(x.roll(1, 0), x),
            *case.modality.predictive_metrics(case.params(len(x)), x),
        }
    for name in stated:
        require(
            name in names,
            "metric_directions names metrics that there are",
            f'"{name}"{did_you_mean(name, sorted(names))} (reported: {", ".join(sorted(names)) or "none"})',
            "name it as metrics or predictive_metrics does: a metric without a direction is never ranked",
        )


@check("examples")
def files(subject: ModalitySubject) -> None:
    """parse reads what write wrote, and refuses what it cannot read by a ValueError."""
    modality, x = subject.cases[0].modality, subject.examples
    with tempfile.TemporaryDirectory() as folder:
        path = modality.write(x[0], Path(folder), "example")
        require(
            isinstance(path, Path) and path.is_file() and path.parent == Path(folder) and path.stem == "example",
            "write makes and returns folder/stem.<suffix>",
            repr(path),
            "write to folder / f'{stem}.<suffix>' and return it",
        )
        try:
            again = modality.parse(str(path))
        except (UserError, ValueError) as error:
            raise contract_error(
                "parse reads what write wrote", str(error), "let parse take the path of such a file"
            ) from error
    cells = modality.cells(x[0])
    require(
        not cells or isinstance(cells.get("value"), int | float | str),
        "cells gives a row with a column value, or none",
        repr(cells),
        'return {"value": x as a number or a text, ...}, or {}',
    )
    same_shape(again, x.shape[1:], "parse(path) gives what write wrote, without a batch axis", "parse")
    accepts(modality, again[None], "what parse reads", "return a valid x from parse")
    try:
        accepts(modality, modality.parse("no/such-file.?")[None], "what parse reads", "refuse it with a ValueError")
    except (UserError, ValueError):
        pass
    except ContractError:
        raise
    except Exception as error:
        raise contract_error(
            "parse refuses what it cannot read by a ValueError",
            f"{type(error).__name__}: {error}",
            "raise a ValueError",
        ) from error


@check("files")
def input_spec(subject: ModalitySubject) -> None:
    """input_spec says how a person may give x, and parse takes what is then entered."""
    modality = subject.cases[0].modality
    spec = modality.input_spec
    require(
        isinstance(spec, InputSpec) and spec.form in _FORMS,
        f"input_spec is an InputSpec, its form one of {', '.join(_FORMS)}",
        repr(spec),
        "return mtdiffusion.InputSpec(form, ...), or leave input_spec out: a file or a line of text",
    )
    names, colours = list(spec.names), [tuple(colour) for colour in spec.colours]
    if spec.form == "choice":
        require(
            len(names) > 0 and all(isinstance(name, str) and name for name in names) and _differ(names),
            "names of the form choice are texts, at least one, all different",
            repr(names),
            "name each choice once",
        )
        for name in names:
            _parses(modality, name, f"the choice {name!r}")
    if spec.form == "classes":
        in_range = all(len(colour) == 3 and set(colour) <= set(range(256)) for colour in colours)
        require(
            len(colours) == len(names) > 0 and _differ(colours) and in_range,
            "the form classes has a name and a colour of its own of each class, RGB in 0..255",
            f"{len(names)} names and the colours {colours[:9]}",
            "list both in the order of the indices",
        )
    if spec.form in ("picture", "classes"):
        height, width = modality.render(modality.placeholder(1)).shape[-2:]
        mode, values = ("RGB", [(0, 0, 0), (255, 128, 0)]) if spec.form == "picture" else ("L", range(len(names[:256])))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "given.png"
            for value in values:
                Image.new(mode, (width, height), value).save(path)
                _parses(modality, str(path), f"a PNG of mode {mode}, {width} × {height} pixels, all of them {value}")


def _differ(values: Sequence[object]) -> bool:
    return len(set(values)) == len(values)


def _parses(modality: Modality, text: str, what: str) -> None:
    try:
        x = modality.parse(text)
    except (UserError, ValueError) as error:
        raise contract_error(
            "parse takes what its input_spec asks for", f"{what}: {error}", "let parse take it, or change input_spec"
        ) from error
    accepts(modality, x[None], f"what parse makes of {what}", "return a valid x from parse")
