"""The contract of every plugin: an entry point that loads, cheap to import, and a config that a file can hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from copy import copy
from functools import cache
from typing import Any

import attrs
import tomli_w

from mtdiffusion_registry.config import structure, unstructure
from mtdiffusion_registry.configs import BASES
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.hookspecs import HOOKS
from mtdiffusion_registry.registry import Registry
from mtdiffusion_registry.testing.contract import (
    NotApplicable,
    Subject,
    check,
    contract_error,
    require,
)

__tracebackhide__ = True

# fmt: off
HEAVY = frozenset((
    "cv2", "datasets", "diffusers", "jax", "librosa", "lightning", "lpips", "matplotlib", "numba", "open_clip",
    "pandas", "scipy", "skimage", "sklearn", "tensorflow", "timm", "torchaudio", "torchvision", "transformers",
))
# fmt: on
"""Libraries that take a good part of a second to import, or more."""
IMPORT_SECONDS = 2.0  # of processor time, beyond torch and the core


@check()
def entry_point(subject: Subject) -> None:
    """The entry point gives the config class of its kind."""
    if subject.info is None:
        raise NotApplicable("no entry point of an installed distribution gives this class")
    info = subject.info
    try:
        Registry.discover().config_class(info.group, info.kind)
    except UserError as error:
        raise contract_error(
            f"the entry point {info.entry_point or info.kind} gives a config class of its kind",
            str(error),
            f"mend what it says; the entry point names the module with the hook {HOOKS[info.group]}, which returns, "
            f'among others, a class of kind "{info.kind}"',
        ) from error


@check("entry_point")
def imports(subject: Subject) -> None:
    """Listing imports no plugin, and importing the plugin no heavy library."""
    if subject.info is None:
        raise NotApplicable("no entry point of an installed distribution gives this class")
    module = subject.info.module
    probe = _probe(module, tuple(sys.path))
    require(
        module not in probe["listed"] and "torch" not in probe["listed"],
        "listing plugins imports none of them, nor torch",
        f"imported by Registry.discover().plugins(): {module if module in probe['listed'] else 'torch'}",
        "let no .pth file and no package above the module import it",
    )
    fix = "import such libraries where they are used: inside build, or later"
    heavy = sorted(HEAVY & set(probe["added"]))
    require(not heavy, f"importing {module} imports no heavy library", ", ".join(heavy), fix)
    require(
        probe["seconds"] <= IMPORT_SECONDS,
        f"importing {module} takes at most {IMPORT_SECONDS:g} s beyond torch and the core",
        f"{probe['seconds']:.1f} s; it adds {', '.join(probe['added']) or 'no package'}",
        fix,
    )


_PROBE = """
import importlib, json, sys, time
from mtdiffusion_registry import Registry
Registry.discover().plugins()
listed = [name for name in sys.modules if name in (sys.argv[1], "torch")]
import mtdiffusion, mtdiffusion_registry.config
known, start = {name.partition(".")[0] for name in sys.modules}, time.process_time()
importlib.import_module(sys.argv[1])
seconds = time.process_time() - start
added = {name.partition(".")[0] for name in sys.modules} - known
print(json.dumps({"listed": listed, "added": sorted(added), "seconds": seconds}))
"""


@cache  # several kinds of one module are one import
def _probe(module: str, path: tuple[str, ...]) -> dict[str, Any]:
    """What listing and then importing a module do, seen in an interpreter of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, module], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise contract_error(
            f"{module} can be imported in a fresh interpreter",
            done.stderr.strip().rpartition("\n")[2],
            "import all that it needs, and nothing that another module must import first",
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@check("entry_point")
def config(subject: Subject) -> None:
    """A config is a frozen instance of its base, and its class can be registered."""
    config, cls = subject.config, type(subject.config)
    base = BASES.get(getattr(cls, "group", ""))
    require(
        base is not None and isinstance(config, base),
        "a config is an instance of one of the config bases",
        f"{cls.__qualname__}",
        f"subclass one of {', '.join(base.__name__ for base in BASES.values())}",
    )
    try:
        Registry().with_classes(cls)
    except UserError as error:
        raise contract_error("a config class can be registered", str(error), "mend what it says") from error
    frozen = False
    try:
        setattr(copy(config), next((attribute.name for attribute in attrs.fields(cls)), "kind"), None)
    except attrs.exceptions.FrozenInstanceError:
        frozen = True
    require(frozen, "a config is frozen", f"a field of {cls.__qualname__} can be set", "decorate it with @attrs.frozen")


@check("config")
def toml(subject: Subject) -> None:
    """A config comes back from TOML as it was."""
    config = subject.config
    registry = Registry.discover().with_classes(type(config))
    try:
        written = tomli_w.dumps(unstructure(registry, config))
        again = structure(registry, tomllib.loads(written), BASES[config.group])
    except (UserError, TypeError) as error:
        raise contract_error(
            "a config comes back from TOML", str(error), "use field types that TOML can hold"
        ) from error
    require(
        again == config,
        "a config comes back from TOML as it was",
        f"{again!r} from {config!r}",
        "compare fields by value, and let no field depend on another",
    )


CHECKS = (entry_point, imports, config, toml)
