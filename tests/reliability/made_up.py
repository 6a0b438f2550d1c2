"""Made-up processes and small models, for hypothesis: of any sizes, layouts, schedules, clocks and modalities.

A model is one that a configuration describes, of the parts that ship, with random weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtdiffusion import (
    ClockLaw,
    DiffusionProcess,
    DirectWeights,
    Features,
    LatentSpec,
    Layout,
    MultimodalDiffusion,
    OwnLayout,
    Retention,
    SharedLayout,
    SNRMatched,
    TargetSignal,
    WeightSchedule,
)
from mtdiffusion.clocks import EdgesAndDiagonal, IndependentClocks, MixedClocks, OffsetClocks, SharedClock
from mtdiffusion.retention import CURVES, RETENTIONS
from mtdiffusion_engine.experiment import Experiment, build_model
from mtdiffusion_registry import Registry
from mtdiffusion_registry.config import structure

REGISTRY = Registry.discover(block=["*"])
VOID = 255


def examples(count: int) -> settings:
    """So many of them; each may take as long as it likes, and none is kept for another day."""
    return settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))


floats = partial(st.floats, allow_subnormal=False)  # a trainer sets this process to flush them to zero
shares = floats(0.0, 1.0)
seeds = st.integers(0, 2**31)


# --- processes and clocks ---------------------------------------------------------------------------------------------

schedules: st.SearchStrategy[WeightSchedule] = st.one_of(
    st.builds(SNRMatched, st.sampled_from([None, *CURVES])),
    st.lists(floats(0.1, 2.0), min_size=2, max_size=5).map(lambda knots: TargetSignal(tuple(knots))),
    st.builds(
        DirectWeights,
        st.sampled_from(["constant", "linear", "cosine"]),
        floats(0.1, 2.0),
        floats(-0.5, 0.5),
        floats(-0.5, 0.5),
    ),
)


@st.composite
def processes(draw: st.DrawFn) -> DiffusionProcess:
    count, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    names = [f"m{i}" for i in range(count)]
    layout: Layout
    if draw(st.booleans()):
        layout = OwnLayout({name: draw(st.integers(1, 3)) for name in names}, height, width)
    else:
        layout = SharedLayout(tuple(names), LatentSpec(draw(st.integers(1, 3)), height, width))
    curve, kind = draw(st.sampled_from([*CURVES])), draw(st.sampled_from(RETENTIONS))
    retention = Retention.from_curve(curve, draw(st.integers(2, 30)), count, kind)
    return DiffusionProcess.build(retention, draw(schedules), layout)


@st.composite
def laws(draw: st.DrawFn, modalities: int) -> ClockLaw:
    kind = draw(st.sampled_from([SharedClock, IndependentClocks, MixedClocks, OffsetClocks, EdgesAndDiagonal]))
    if kind is OffsetClocks:
        return OffsetClocks(tuple(draw(st.lists(shares, min_size=modalities, max_size=modalities))))
    return kind(draw(shares)) if kind in (MixedClocks, EdgesAndDiagonal) else kind()


def clocks_of(process: DiffusionProcess, batch: int, generator: torch.Generator, least: int = 0) -> Tensor:
    """Clocks ``[batch, N]`` from ``least`` to T, of one modality as of another where the layout has one for all."""
    count = 1 if process.layout.shared_clock else len(process.layout.names)
    t = torch.randint(least, process.steps + 1, (batch, count), generator=generator)
    return t.expand(batch, len(process.layout.names))


def codes_of(
    process: DiffusionProcess, batch: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    specs = {name: process.layout.share(name).shape for name in process.layout.names}
    codes = {
        name: torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for name, shape in specs.items()
    }
    return {name: code.to(dtype) for name, code in codes.items()}


# --- models -----------------------------------------------------------------------------------------------------------

weights = st.one_of(
    st.none(),
    st.fixed_dictionaries({"kind": st.just("snr_matched"), "curve": st.sampled_from([*CURVES])}),
    st.fixed_dictionaries({"kind": st.just("target"), "knots": st.lists(floats(0.1, 2.0), min_size=2, max_size=4)}),
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["linear", "cosine"]), "start": floats(-0.3, 0.3), "end": floats(-0.3, 0.3)}
    ),
    st.fixed_dictionaries({"kind": st.just("constant"), "value": floats(-0.3, 0.3)}),
)


@st.composite
def modalities(draw: st.DrawFn, height: int, width: int, own: bool) -> dict[str, Any]:
    """A modality's table, of a latent of these sides, in which it has channels of its own or not."""
    kind, patch = draw(st.sampled_from(["image", "mask", "label", "clip", "text"])), draw(st.integers(1, 2))
    size = [height * patch, width * patch]
    if kind == "image":
        channels = draw(st.sampled_from([1, 3]))
        table = {"kind": kind, "size": size, "channels": channels}
        if own and draw(st.booleans()):  # a learned code is no larger than its patch, and others may want more
            table |= {"encoder": "conv", "code_channels": draw(st.integers(1, min(channels * patch**2, 4)))}
        return table
    if kind == "mask":
        classes = draw(st.integers(2, 4))
        void = {"ignore": VOID} if draw(st.booleans()) else {}
        weighed = {"class_weights": draw(st.lists(floats(0.1, 2.0), min_size=classes, max_size=classes))}
        return {"kind": kind, "size": size, "classes": classes, **void, **(weighed if draw(st.booleans()) else {})}
    if kind == "label":
        return {"kind": kind, "classes": draw(st.integers(2, 5))}
    if kind == "clip":
        return {"kind": kind, "dim": draw(st.integers(2, 6))}
    words = ["a", "b", "c"][: draw(st.integers(1, 3))]
    return {"kind": kind, "length": draw(st.integers(1, 3)), "tokenizer": "words", "vocabulary": words}


backbones: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries(
        {
            "kind": st.just("unet"),
            "channels": st.just(8),
            "multipliers": st.just([1]),
            "heads": st.sampled_from([0, 2]),
            "vector": st.sampled_from([4, 8]),
        }
    ),
    st.fixed_dictionaries(
        {
            "kind": st.just("dit"),
            "width": st.just(16),
            "depth": st.integers(1, 2),
            "heads": st.just(2),
            "channels": st.just(8),
            "positions": st.sampled_from(["learned", "sincos", "rope"]),
            "qk_norm": st.booleans(),
            "mlp": st.sampled_from(["gelu", "swiglu"]),
            "registers": st.integers(1, 2),
        }
    ),
)


@st.composite
def clock_tables(draw: st.DrawFn, names: list[str]) -> dict[str, Any]:
    kind = draw(st.sampled_from(["shared", "independent", "mixed", "offset", "edges_and_diagonal"]))
    more: dict[str, Any] = {"mixed": {"independent": 0.5}, "edges_and_diagonal": {"diagonal": 0.5}}.get(kind, {})
    if kind == "offset":
        more = {"ahead": {name: draw(floats(0.0, 0.6)) for name in names}}
    return {"kind": kind, **more}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """The tables of a model of one to four modalities, to be :func:`built`."""
    height, width, layout = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.sampled_from(["own", "shared"]))
    names = [f"m{i}" for i in range(draw(st.integers(1, 4)))]
    head = {"parameterisation": "epsilon_head"} if draw(st.booleans()) else {}
    schedule = draw(weights)
    return {
        "data": {"kind": "digits"},
        "latent": {"height": height, "width": width, "layout": layout},
        "modalities": {name: draw(modalities(height, width, layout == "own")) for name in names},
        "backbone": draw(backbones),
        "process": {
            "steps": draw(st.integers(2, 20)),
            "curve": draw(st.sampled_from([*CURVES])),
            "retention": draw(st.sampled_from(RETENTIONS)),
            **({} if schedule is None else {"weights": schedule}),
        },
        "clocks": {"kind": "shared"} if layout == "shared" else draw(clock_tables(names)),
        "model": {"show_clean": draw(st.booleans()), **head},
        "loss": {"l1": 1.0},
        "training": {"seed": draw(st.integers(0, 9))},
    }


def built(tables: dict[str, Any]) -> MultimodalDiffusion:
    """The model of a configuration in float64, none of whose weights is 0."""
    model = build_model(structure(REGISTRY, tables, Experiment)).eval().double()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(tables["training"]["seed"])
        for parameter in model.parameters():
            if not bool(parameter.any()):  # of a block that starts as its shortcut, where what is sought would not show
                nn.init.normal_(parameter, std=0.1)
    return model


def data_of(model: MultimodalDiffusion, batch: int, number: int) -> dict[str, Tensor]:
    """A batch of every modality by name, as its decoder draws it of random features; of some masks, void pixels."""
    generator = torch.Generator().manual_seed(number)
    shapes = model.backbone.features

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=model.dtype)

    x = {}
    with torch.no_grad():
        for name in model.names:
            decoder = model.modality(name).decoder
            features = normal(batch, shapes.channels, shapes.height, shapes.width), normal(batch, shapes.vector)
            x[name] = decoder.sample(decoder(Features(*features)), generator)
            if getattr(decoder, "ignore", None) is not None:
                void = torch.rand(x[name].shape, generator=generator) < 0.3
                x[name] = torch.where(void, VOID, x[name])
    return x


def maps_of(model: MultimodalDiffusion, batch: int, generator: torch.Generator) -> Tensor:
    """What is visible ``[batch, N, H, W]``, 0 or 1: of some all or nothing, and of what shows places some of them."""
    _, height, width = model.layout.latent.shape
    whole = torch.randint(2, (batch, len(model.names), 1, 1), generator=generator).expand(-1, -1, height, width)
    places = torch.randint(2, whole.shape, generator=generator)
    in_part = torch.randint(2, (batch, len(model.names), 1, 1), generator=generator) > 0
    in_part = in_part & torch.tensor(model.spatial)[:, None, None]
    return torch.where(in_part, places, whole).double()
