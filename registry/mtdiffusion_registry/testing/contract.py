"""What a contract is made of: checks, each with an id, and their outcomes."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from attrs import field, frozen
from torch import Tensor

from mtdiffusion_registry.registry import PluginInfo

__tracebackhide__ = True  # pytest shows where a plugin failed, not how the kit came there

BATCHES = (1, 3)


class ContractError(AssertionError):
    """A part of the contract that is not kept."""


class NotApplicable(Exception):
    """A check that says nothing of this plugin, or cannot be made here; the message says why."""


class Unavailable(NotApplicable):
    """What this check needs cannot be had here, nor can checks that need this one be made."""


@frozen(eq=False, slots=False)
class Subject:
    """What is checked.

    Attributes:
        config: what builds it; None if its entry point gives no config class.
        info: the entry point, if it is known by one.
    """

    config: Any
    info: PluginInfo | None = field(default=None, kw_only=True)


S = TypeVar("S", bound=Subject)


@frozen(eq=False)
class Check:
    """One part of a contract.

    Attributes:
        id: its name in reports.
        contract: what it asks, in a line.
        function: raises :class:`ContractError`, or :class:`NotApplicable`; may return a warning, of what the contract
            allows and is seldom meant.
        needs: ids of checks without which it would say nothing new.
    """

    id: str
    contract: str
    function: Callable[[Any], str | None]
    needs: tuple[str, ...]


def check(*needs: str) -> Callable[[Callable[[S], str | None]], Check]:
    """Makes a function a check: its name is the id, the first line of its docstring the contract."""

    def decorate(function: Callable[[S], str | None]) -> Check:
        contract = (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")
        return Check(function.__name__, contract, function, needs)

    return decorate


@frozen
class Outcome:
    """Of one check.

    Attributes:
        status: "ok", "failed" or "skipped".
        reason: why it failed or was skipped; of one that is ok, a warning, if there is any.
        error: what was raised, if it failed; a :class:`ContractError` unless the plugin itself raised something.
        blocked: whether it was skipped because what it needs failed or is not to be had.
    """

    check: Check
    status: Literal["ok", "failed", "skipped"]
    reason: str = ""
    error: Exception | None = None
    blocked: bool = False


@frozen(eq=False)
class Contract:
    """The checks of one plugin. Each is made once, when its outcome is asked for, after those that it needs."""

    subject: Subject
    checks: tuple[Check, ...]
    _outcomes: dict[str, Outcome] = field(factory=dict, init=False)

    def outcome(self, check: Check) -> Outcome:
        """Of one of :attr:`checks`; those that it needs are made before it."""
        if check.id not in self._outcomes:
            self._outcomes[check.id] = self._make(check)
        return self._outcomes[check.id]

    def outcomes(self) -> Iterator[Outcome]:
        """Of every check, in order."""
        return map(self.outcome, self.checks)

    def require(self) -> None:
        """Make every check.

        Raises:
            ContractError: at the first that is not met (or whatever the plugin raised in it).
        """
        for outcome in self.outcomes():
            if outcome.error is not None:
                raise outcome.error

    def _make(self, check: Check) -> Outcome:
        for needed in self.checks:
            if needed.id in check.needs:
                before = self.outcome(needed)
                if before.status == "failed" or before.blocked:
                    return Outcome(check, "skipped", f"needs {needed.id}", blocked=True)
        try:
            with _seeded():
                warning = check.function(self.subject)
        except NotApplicable as reason:
            return Outcome(check, "skipped", str(reason), blocked=isinstance(reason, Unavailable))
        except Exception as error:
            said = str(error) if isinstance(error, ContractError) else f"{type(error).__name__}: {error}{_place(error)}"
            return Outcome(check, "failed", said, error)
        return Outcome(check, "ok", f"warning: {warning}" if warning else "")


def _place(error: Exception) -> str:
    """Where in the plugin an error arose: the innermost line that is neither the kit's nor a library's of ours."""
    ours = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# --- what checks are made of ------------------------------------------------------------------------------------------


def contract_error(contract: str, found: str, fix: str) -> ContractError:
    """Says what the contract is, what was found and how to meet it."""
    return ContractError(f"{contract}.\n  found: {found}\n  to meet it: {fix}")


def require(kept: bool, contract: str, found: str, fix: str) -> None:
    if not kept:
        raise contract_error(contract, found, fix)


def kind_of(value: object) -> str:
    return f"a {type(value).__qualname__}"


def rms(value: Tensor) -> float:
    return value.detach().double().square().mean().sqrt().item()


def same_shape(value: object, shape: Sequence[int], contract: str, fix: str) -> None:
    found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else kind_of(value)
    kept = isinstance(value, Tensor) and tuple(value.shape) == tuple(shape)
    require(kept, contract, f"{found}, expected {tuple(shape)}", f"mend {fix}" if " " not in fix else fix)


def same_dtype(value: Tensor, dtype: torch.dtype, contract: str, fix: str) -> None:
    require(value.dtype == dtype, contract, f"{value.dtype}, expected {dtype}", fix)


def finite(value: Tensor, contract: str, fix: str) -> None:
    bad = int((~torch.isfinite(value)).sum())
    require(bad == 0, contract, f"{bad} of {value.numel()} values are not", fix)


def close(value: Tensor, expected: Tensor, contract: str, fix: str) -> None:
    same_shape(value, expected.shape, contract, fix)
    off = (value - expected).abs().max().item()
    allowed = 1e-4 * max(1.0, expected.abs().max().item())
    require(off <= allowed, contract, f"they differ by up to {off:.3g}, allowed {allowed:.1g}", fix)


def stands_for(stored: Tensor, value: Tensor) -> bool:
    """Whether what is stored means this value by the conventions of ``Dataset.stored``; itself, if it is no other."""
    if value.dtype == torch.float32 and stored.dtype == torch.uint8:
        stored = stored.to(torch.float32) / 127.5 - 1
    return torch.equal(stored.to(value.dtype), value)


def finite_metrics(metrics: object, contract: str, fix: str) -> None:
    require(
        isinstance(metrics, dict)
        and all(isinstance(name, str) and isinstance(value, float) for name, value in metrics.items()),
        f"{contract} are a dict of floats by name",
        repr(metrics),
        "convert tensors with .item()",
    )
    assert isinstance(metrics, dict)
    require(all(math.isfinite(value) for value in metrics.values()), f"{contract} are finite", repr(metrics), fix)


def require_directions(stated: object) -> None:
    contract = 'metric_directions maps names of metrics to "higher" or "lower"'
    fix = "say which way each metric is better, as {'mae': 'lower'}"
    require(isinstance(stated, Mapping), contract, kind_of(stated), fix)
    assert isinstance(stated, Mapping)
    wrong = {name: direction for name, direction in stated.items() if direction not in ("higher", "lower")}
    require(not wrong, contract, repr(wrong), fix)


def sizes(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """The latents that are tried: the one given, one of half its side, and one that is not square."""
    half = max(1, height // 2), max(1, width // 2)
    return tuple(dict.fromkeys([(height, width), half, (height, half[1])]))
