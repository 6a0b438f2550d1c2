"""``mtdiffusion plugins new``: a complete plugin package to start from.

The templates beside this file are Jinja's. What they make works as it stands, and its own tests show it.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import tempfile
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, PackageLoader, StrictUndefined

from mtdiffusion_registry import API_VERSION, Registry, UserError

GROUPS = MappingProxyType(
    {
        "modality": "modality",
        "dataset": "dataset",
        "field": "field",
        "backbone": "backbone",
        "schedule": "weight_schedule",
        "clock-law": "clock_law",
        "evaluator": "evaluator",
        "task": "task",
        "method": "method",
    }
)
"""The group of each sort of plugin that can be written, by the name that the command line gives it."""

LIKES = MappingProxyType(
    {
        "vector": "a vector of numbers",
        "spatial": "a map of numbers, which can be observed in part",
        "sequence": "symbols, up to so many",
        "file": "a vector of numbers, and the field that reads them from files, in one package",
    }
)
"""What a new modality's data may be like, the default first."""

FILES = MappingProxyType(
    {
        "pyproject.toml": "pyproject.toml.jinja",
        "README.md": "README.md.jinja",
        "LICENSE": "LICENSE.jinja",
        ".gitignore": "gitignore.jinja",
        ".github/workflows/ci.yml": "ci.yml.jinja",
        "src/{package}/py.typed": "py.typed.jinja",
    }
)
"""The files that every package has beside its plugins and their tests, and the template of each."""


WORDS = MappingProxyType({"dataset": "data set", "weight_schedule": "weight schedule", "clock_law": "law of clocks"})
"""What a group is called in a sentence, where that is not its name."""

LONGEST_NAME = 24
"""In characters: with it, the lines of the templates stay within 120."""


def write_package(
    name: str, groups: Collection[str], out: Path | None, registry: Registry, like: str = "vector"
) -> Path:
    """Write a package with a plugin of a new kind in each of some groups: all of it, or nothing.

    What fits together is made to: a data set has a field that the modality reads, and with a data set, there is a
    configuration, ``example.toml``, that trains with whatever is here. A vector and a field are what ``file`` is.

    Args:
        name: of the kind: lower-case words joined by ``-`` or ``_``. The distribution is called ``mtdiffusion-NAME``.
        groups: of the plugins, each one of the values of :data:`GROUPS`, once.
        out: the folder, which must not exist; None: the distribution's name, here.
        registry: which kinds there are already.
        like: of a modality: what its data are like, one of :data:`LIKES`.

    Returns:
        The folder.

    Raises:
        UserError: if the name is no name or is taken, if the folder exists, if a group is given twice, or if it is to
            be like something that there is no template for.
    """
    asked, like = _asked(groups, like)
    kind, distribution = _names(name, asked, registry)
    folder = Path(distribution) if out is None else out
    if folder.exists():
        raise UserError(f"{folder}: already exists; nothing was written. Give another folder with --out")
    environment = Environment(
        loader=PackageLoader(__name__),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # what is written is source code, not HTML
    )
    package = distribution.replace("-", "_")
    plugins = _plugins(asked, package, like)
    files = _files(kind, package, plugins)
    names = {
        "files": files,
        "groups": asked,
        "words": _listed([WORDS.get(group, group) for group in asked]),
        "like": like,
        "supplied": like if {"modality", "dataset"} <= set(asked) else None,  # what the data set has for the modality
        "kind": kind,
        "class_name": _camel(kind),
        "distribution": distribution,
        "package": package,
        "modules": {each: module for each, (module, _) in plugins.items()},
        "api": API_VERSION,
        "ours": _release(),
    }
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.absolute().parent) as temporary:
        partial = Path(temporary, folder.name)
        for file, (template, module) in files.items():
            path = partial / file
            path.parent.mkdir(parents=True, exist_ok=True)
            text = environment.get_template(template).render(names, module=module)
            path.write_text(text, encoding="utf-8")
        partial.rename(folder)
    return folder


def _asked(groups: Collection[str], like: str) -> tuple[tuple[str, ...], str]:
    """The groups in the order of :data:`GROUPS`, and what the modality is like."""
    if twice := [f'"{kind}"' for kind, group in GROUPS.items() if list(groups).count(group) > 1]:
        raise UserError(f"--kind: {_listed(twice)} given more than once; nothing was written. Give each kind once")
    if like not in LIKES or (like != "vector" and "modality" not in groups):
        of = f"of a {_listed([WORDS.get(group, group) for group in groups])}"
        raise UserError(f'like: expected one of {", ".join(LIKES)}, of a modality alone, found "{like}" {of}')
    wanted = set(groups)
    if like == "file":
        wanted.add("field")
    elif like == "vector" and {"modality", "field"} <= wanted:
        like = "file"
    return tuple(group for group in GROUPS.values() if group in wanted), like


def _plugins(groups: Sequence[str], package: str, like: str) -> dict[str, tuple[str, str]]:
    """The plugins of a package by group, each its module and its template; several have modules of their own."""
    templates = {"modality": f"modality_{like}"} if like in ("spatial", "sequence") else {}
    several = len(groups) > 1
    return {group: (f"{package}.{group}" if several else package, templates.get(group, group)) for group in groups}


def _files(kind: str, package: str, plugins: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """The files of a package, and of each its template and the module that it is about."""
    files = {file.format(package=package): (template, package) for file, template in FILES.items()}
    if len(plugins) == 1:
        ((module, template),) = plugins.values()
        files[f"src/{package}/__init__.py"] = f"{template}.py.jinja", module
        files[f"tests/test_{kind}.py"] = f"test_{template}.py.jinja", module
        return files
    files[f"src/{package}/__init__.py"] = "package.py.jinja", package
    for group, (module, template) in plugins.items():
        files[f"src/{package}/{group}.py"] = f"{template}.py.jinja", module
        files[f"tests/test_{kind}_{group}.py"] = f"test_{template}.py.jinja", module
    if "dataset" in plugins:
        files["example.toml"] = "example.toml.jinja", package
        files[f"tests/test_{kind}_example.py"] = "test_example.py.jinja", package
    return files


def _names(name: str, groups: Sequence[str], registry: Registry) -> tuple[str, str]:
    """The kind and the distribution's name."""
    proper = re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) and not keyword.iskeyword(name)
    if not proper or len(name) > LONGEST_NAME:
        raise UserError(
            f'NAME: found "{name}", expected the name of the new kind: lower-case words of letters and digits joined '
            f'by "-" or "_", such as "depth" or "optical-flow", of at most {LONGEST_NAME} characters'
        )
    kind = name.replace("-", "_")
    taken = [info for info in registry.plugins() if info.group in groups and info.kind == kind]
    if taken:
        raise UserError(
            f'NAME: there is a {taken[0].group} of kind "{kind}" already, of {taken[0].owner}; choose another name'
        )
    distribution = f"mtdiffusion-{kind.replace('_', '-')}"
    package = distribution.replace("-", "_")
    if importlib.util.find_spec(package):
        raise UserError(f'NAME: there is a package "{package}" already, so "{name}" cannot be the name; choose another')
    return kind, distribution


def _listed(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _camel(kind: str) -> str:
    return "".join(word.capitalize() for word in kind.split("_"))


def _release() -> str:
    """The first two numbers of this mtdiffusion's version: the oldest that the new package is known to work with."""
    return ".".join(version("mtdiffusion").split(".")[:2])
