"""Made-up inputs: configurations, overrides, values, tables, checkpoints' states and distributions. Each is used or
refused with a sentence; nothing else may happen, nor may it take long or much memory.

The cases are drawn by hypothesis (MacIver et al., 2019, https://doi.org/10.21105/joss.01891) from a seed.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from mtdiffusion_benchmarks.reliability import distributions
from mtdiffusion_benchmarks.reliability.children import MOST_MEMORY, Child
from mtdiffusion_benchmarks.reliability.jobs import Bench
from mtdiffusion_registry import Registry, UserError

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

SLOW = 20
"""Seconds that one case may take."""
DISTRIBUTIONS = "distributions with entry points"
SHARES = {
    "a configuration, some keys changed": 20,
    "a configuration's text": 60,
    "arguments of --set": 20,
    "arguments of --observe": 60,
    "a table of labels": 20,
    "a checkpoint's state": 20,
    "a run's record of plugins": 10,
    DISTRIBUTIONS: 10,
}
"""Targets, and how many cases of each for one trial of other faults: 11,000 for 50."""
_BATCH = 500
_KEYS = (
    "kind",
    "steps",
    "size",
    "channels",
    "data",
    "latent",
    "height",
    "modalities",
    "image",
    "label",
    "classes",
    "root",
)


def fuzz(bench: Bench, trials: int, rng: random.Random, target: str) -> Iterator[str]:
    """Try so many cases of one target, some hundreds in a child; the smallest that fails of each is told, or,
    of whole commands, which take longer, the first."""
    seed = rng.randrange(2**32)
    for start in range(0, trials, _BATCH):
        count = min(_BATCH, trials - start)
        bench.empty()
        ended = Child(bench.place, partial(_child, target, count, seed + start)).wait(count + 60)
        wrong = ended.wrong(0)
        if wrong and "FOUND " in ended.said:
            wrong = ended.said[ended.said.rindex("FOUND ") + 6 :].strip()[:600]
        yield wrong
        yield from [""] * (count - 1)


def _child(target: str, count: int, seed: int) -> int:
    """Be the child that tries cases, with an alarm for each and a bound on memory."""
    import hypothesis

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, used + MOST_MEMORY))

    def slow(_number: int, _frame: object) -> None:
        raise TimeoutError(f"more than {SLOW} s")

    signal.signal(signal.SIGALRM, slow)
    strategy, tried = targets()[target]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        phases=[hypothesis.Phase.generate, *[hypothesis.Phase.shrink] * (target != DISTRIBUTIONS)],
    )
    @hypothesis.given(strategy)
    def each(case: Any) -> None:
        signal.alarm(SLOW)
        try:
            tried(case)
        except (UserError, OSError):  # what the command line says in a sentence
            pass
        finally:
            signal.alarm(0)

    try:
        each()
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        print(f"FOUND {type(error).__name__}: {str(error)[:200]} {notes[:300]}")
        return 1
    return 0


def targets() -> dict[str, tuple[SearchStrategy[Any], Callable[[Any], object]]]:
    """By name: what is drawn, and what is done with it."""
    from hypothesis import strategies as st

    from mtdiffusion_engine import checkpoint as ckpt
    from mtdiffusion_engine.commands import _pairs
    from mtdiffusion_engine.experiment import PLUGINS_FILE, build_model, load_experiment, structure_experiment
    from mtdiffusion_engine.given import parsed
    from mtdiffusion_engine.run import load_run
    from mtdiffusion_registry.config import apply_overrides, load_toml

    registry = Registry.discover()
    base = load_toml("config.toml")
    run = load_run(Path("run"), device="cpu", registry=registry)
    state = json.loads((run.checkpoint / "state.json").read_text(encoding="utf-8"))

    words = st.sampled_from(_KEYS) | st.text(max_size=12)
    numbers = st.integers(-(2**70), 2**70) | st.integers(-3, 9) | st.floats() | st.sampled_from([0, -1, 2**31, 10**6])
    scalars = st.booleans() | numbers | words
    values = st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=12
    )
    plain = st.recursive(
        scalars | st.none(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
        max_leaves=8,
    )

    def changed(table: dict[str, Any], anything: SearchStrategy[Any]) -> SearchStrategy[Any]:
        """A table with one to three places in it replaced, removed or added to."""
        places = [(*path, key) for path, inner in _tables(table) for key in inner]
        change = st.tuples(st.sampled_from(places), st.sampled_from(("set", "remove", "add")), words, anything)
        return st.lists(change, min_size=1, max_size=3).map(lambda changes: _change(table, changes))

    def configuration(table: Any) -> None:
        try:
            text = tomli_w.dumps(table)
        except (TypeError, ValueError, UnicodeError):
            return
        Path("fuzzed.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
        build_model(load_experiment(Path("fuzzed.toml"), [], registry), weightless=True)

    def text(content: bytes) -> None:
        Path("fuzzed.toml").write_bytes(content)
        load_experiment(Path("fuzzed.toml"), [], registry)

    def override(argument: str) -> None:
        structure_experiment(apply_overrides(base, [argument]), registry, "fuzzed")

    def observed(argument: str) -> None:
        for name, value in _pairs("--observe", [argument]).items():
            try:
                parsed(run.modality(name), value)
            except ValueError as error:  # as the command line does
                raise UserError(str(error)) from error

    def table(case: tuple[str, bytes]) -> None:
        suffix, content = case
        with tempfile.TemporaryDirectory(dir=".") as folder:
            shutil.copytree(Path(base["data"]["root"]) / "image", Path(folder, "image"))
            Path(folder, f"label{suffix}").write_bytes(content)
            data = {**base["data"], "root": str(Path(folder).absolute()), "test_fraction": 0.0}
            structure_experiment({**base, "data": data}, registry, "fuzzed").data.build("train")

    def checkpoint_state(value: Any) -> None:
        path = run.checkpoint / "state.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        load_run(Path("run"), device="cpu", registry=registry)
        ckpt.load_state(run.checkpoint)

    def record(value: Any) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode(errors="surrogatepass")
        (Path("run") / PLUGINS_FILE).write_bytes(content)
        load_run(Path("run"), device="cpu", registry=registry)

    recorded = json.loads((Path("run") / PLUGINS_FILE).read_text(encoding="utf-8"))
    stems = st.sampled_from([f"{i:03d}" for i in range(24)]) | words
    rows = st.lists(st.tuples(stems, scalars), max_size=26)
    csv = rows.map(lambda pairs: "stem,value\n" + "".join(f"{stem},{value}\n" for stem, value in pairs))
    jsonl = st.lists(
        st.dictionaries(st.sampled_from(["stem", "value", "file_name"]) | words, plain, max_size=3), max_size=26
    )
    lines = jsonl.map(lambda pairs: "".join(json.dumps(row) + "\n" for row in pairs))
    contents = st.one_of(csv, lines, plain.map(json.dumps), st.text(max_size=200)).map(
        lambda text: text.encode(errors="surrogatepass")
    )
    raw = contents | st.binary(max_size=200)
    keys = st.sampled_from([".".join((*path, key)) for path, inner in _tables(base) for key in inner]) | words
    literals = values.map(_literal)
    texts = st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode(errors="ignore"))
    names = st.sampled_from(["image", "label"]) | words
    suffixes = st.sampled_from([".csv", ".tsv", ".json", ".jsonl"])
    return {
        "a configuration, some keys changed": (changed(base, values), configuration),
        "a configuration's text": (texts, text),
        "arguments of --set": (st.tuples(keys, literals | st.text(max_size=40)).map("=".join), override),
        "arguments of --observe": (st.tuples(names, literals | st.text(max_size=40)).map("=".join), observed),
        "a table of labels": (st.tuples(suffixes, raw), table),
        "a checkpoint's state": (changed(state, plain) | plain, checkpoint_state),
        "a run's record of plugins": (changed(recorded, plain) | plain | raw, record),
        DISTRIBUTIONS: distributions.target(),
    }


def _literal(value: Any) -> str:
    """A value as TOML writes it behind a key, where it can."""
    try:
        text = tomli_w.dumps({"x": value})
        tomllib.loads(text)
    except (TypeError, ValueError):
        return str(value)
    return text.partition("=")[2].strip() if text.startswith("x =") else str(value)


def _tables(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    yield path, table
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _tables(value, (*path, key))


def _change(table: dict[str, Any], changes: list[tuple[tuple[str, ...], str, str, Any]]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(table))
    for path, what, word, value in changes:
        inner: Any = copy
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            if what == "remove":
                inner.pop(path[-1], None)
            else:
                inner[path[-1] if what == "set" else word] = value
    return copy
