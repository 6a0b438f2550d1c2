"""With one clock for all, the numbers of the implementation that knew of no other.

``reference/one_clock.json`` holds its sampling laws (exact means and covariances, see :class:`NoiseBasis`) and bounds
(with every draw of the noise 0.5), for both layouts and retentions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtdiffusion.model
from mtdiffusion import Retention, SamplerSettings, variational_bound
from tests.core.gaussians import gaussian_model, sampled_law

REFERENCE: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "reference" / "one_clock.json").read_text()
)
TINY = {"rtol": 0, "atol": 1e-12}

layouts = pytest.mark.parametrize("layout", ["own", "shared"])
retentions = pytest.mark.parametrize("retention", ["compensated", "literal"])


def _float64(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@layouts
@retentions
@pytest.mark.parametrize(("solver", "eta"), [("ancestral", 1.0), ("ddim", 0.0), ("ddim", 0.5), ("dpmpp_2m", 0.0)])
def test_sampling_laws_are_what_they_were(
    monkeypatch: pytest.MonkeyPatch, layout: str, retention: str, solver: str, eta: float
) -> None:
    model, joint = gaussian_model(layout, retention=Retention.from_curve("cosine", 200, 3, retention))
    value = {name: x[0] for name, x in joint.draw(1, seed=3).items()}
    case = {"layout": layout, "retention": retention, "solver": solver, "eta": eta}
    cases = [row for row in REFERENCE["laws"] if case.items() <= row.items()]
    assert [tuple(row["observed"]) for row in cases] == list(joint.proper_subsets())
    for row in cases:
        settings = SamplerSettings(row["steps"], solver, eta=eta)  # type: ignore[arg-type]
        given = {name: value[name] for name in row["observed"]}
        mean, covariance = sampled_law(monkeypatch, model, settings, given)
        torch.testing.assert_close(mean, _float64(row["mean"]), **TINY)
        torch.testing.assert_close(covariance, _float64(row["covariance"]), **TINY)


@layouts
@retentions
def test_bounds_are_what_they_were(monkeypatch: pytest.MonkeyPatch, layout: str, retention: str) -> None:
    monkeypatch.setattr(mtdiffusion.model, "standard_normal", lambda like, generator=None: torch.full_like(like, 0.5))
    (row,) = (r for r in REFERENCE["bounds"] if (r["layout"], r["retention"]) == (layout, retention))
    model, joint = gaussian_model(layout, retention=Retention.from_curve("cosine", 20, 3, retention))
    bound = variational_bound(model, joint.draw(2))
    torch.testing.assert_close(bound.l0, _float64(row["l0"]), **TINY)
    torch.testing.assert_close(bound.l1, _float64(row["l1"]), **TINY)
    assert list(bound.l3) == list(row["l3"])
    for name, nll in bound.l3.items():
        torch.testing.assert_close(nll, _float64(row["l3"][name]), **TINY)
