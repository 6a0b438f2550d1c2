"""What is installed: found by reading metadata, imported when it is asked for.

pluggy's own ``load_setuptools_entrypoints`` stops at the first broken plugin without saying whose it is, and loads one
of two plugins of the same name in silence. So the metadata is read here; pluggy only calls the hooks.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import Distribution, distributions
from types import ModuleType
from typing import Literal

import attrs
import pluggy
from attrs import field, frozen

from mtdiffusion_registry import hookspecs
from mtdiffusion_registry.configs import BASES, GROUPS, Config
from mtdiffusion_registry.errors import PluginError, UserError, did_you_mean

ENTRY_POINT_GROUP = "mtdiffusion.plugins"
DISABLE_VARIABLE = "MTDIFFUSION_DISABLE_PLUGINS"
DIRECT = "(registered directly)"
OURS = "mtdiffusion"
"""The distribution that a block list of ``*`` leaves."""

Status = Literal["ok", "conflict", "blocked", "broken"]


@frozen
class PluginInfo:
    """One entry point, as its distribution declares it. Nothing has been imported, so ``ok`` is a promise, not a test.

    Attributes:
        entry_point: its name as declared; ``GROUP.KIND`` unless broken.
        group: one of :data:`~mtdiffusion_registry.configs.GROUPS`, or ``""`` if the name is broken.
        kind: the kind it promises, or ``""`` if the name is broken.
        distribution: whose it is.
        version: of the distribution.
        module: what it points at.
        status: ``ok``; ``conflict``, another one has the same name; ``blocked``, by request; ``broken``, ill-formed.
        reason: why the status is not ``ok``.
    """

    entry_point: str
    group: str
    kind: str
    distribution: str
    version: str
    module: str
    status: Status = "ok"
    reason: str = ""

    @property
    def owner(self) -> str:
        """The distribution and its version."""
        return f"{self.distribution} {self.version}".rstrip()

    @property
    def origin(self) -> dict[str, str]:
        """What to record of where a kind came from, for :meth:`Registry.with_origins`."""
        return {"distribution": self.distribution, "version": self.version, "module": self.module}


@frozen(eq=False)
class Registry:
    """The kinds that can be used, a value: make one with :meth:`discover` and pass it on.

    ``Registry()`` is empty.
    """

    _plugins: tuple[PluginInfo, ...] = ()
    _direct: dict[tuple[str, str], type[Config]] = field(factory=dict)
    _origins: Mapping[str, Mapping[str, str]] = field(factory=dict)
    _loaded: dict[tuple[str, str], type[Config]] = field(factory=dict, init=False)

    @classmethod
    def discover(cls, block: Iterable[str] = (), paths: Sequence[str | os.PathLike[str]] | None = None) -> Registry:
        """Find the plugins installed, importing none.

        Args:
            block: what to leave out, as in :meth:`blocking`, beside what the environment variable
                ``MTDIFFUSION_DISABLE_PLUGINS`` says (comma separated).
            paths: where to look; ``sys.path`` by default.
        """
        search = list(sys.path) if paths is None else [os.fspath(path) for path in paths]
        found = cls(tuple(dict.fromkeys(_declared(search))))
        return found.blocking(os.environ.get(DISABLE_VARIABLE, "").split(","), by=DISABLE_VARIABLE).blocking(block)

    def blocking(self, names: Iterable[str], by: str = "the block list") -> Registry:
        """A new registry that leaves plugins out; what they were in conflict with can then be used.

        Args:
            names: of entry points or of distributions, up to case and ``-_.``; ``*`` is every distribution but
                mtdiffusion. A name of something that is not installed changes nothing, so that one list serves many
                machines.
            by: whose wish it is, for messages.
        """
        blocked = {_normalised(name) for name in names if name.strip()}

        def is_blocked(info: PluginInfo) -> bool:
            distribution = _normalised(info.distribution)
            return bool(blocked & {_normalised(info.entry_point), distribution}) or (
                "*" in blocked and distribution != OURS
            )

        reason = f"blocked by {by}"
        infos = (
            attrs.evolve(info, status="blocked", reason=reason) if is_blocked(info) else info for info in self._plugins
        )
        return attrs.evolve(self, plugins=_with_conflicts(infos))

    def with_origins(self, origins: Mapping[str, Mapping[str, str]]) -> Registry:
        """A new registry that can say of a kind that is missing where it once came from.

        Args:
            origins: what :meth:`origin` said of each ``GROUP.KIND`` at the time.
        """
        return attrs.evolve(self, origins=origins)

    def origin(self, group: str, kind: str) -> dict[str, str]:
        """The distribution, version and module of a kind that can be asked for; imports nothing.

        Raises:
            UserError: as :meth:`config_class` does.
        """
        _check_group(group)
        if cls := self._direct.get((group, kind)):
            return _direct_info(cls).origin
        return self._find(group, kind).origin

    def with_classes(self, *classes: type[Config]) -> Registry:
        """A new registry that knows these config classes too, for a notebook or a test.

        A class takes the place of what is known under its kind; what is installed is then listed as blocked.

        Raises:
            PluginError: if one is not a proper config class.
        """
        direct = dict(self._direct)
        for cls in classes:
            group = getattr(cls, "group", None)
            if not isinstance(group, str) or group not in BASES:
                bases = ", ".join(base.__name__ for base in BASES.values())
                raise PluginError(f"cannot register {cls!r}: it must subclass one of {bases}")
            if problem := _class_problem(cls, group):
                raise PluginError(f"cannot register {cls!r}: {problem}")
            direct[group, cls.kind] = cls
        return attrs.evolve(self, direct=direct)

    def plugins(self) -> list[PluginInfo]:
        """Everything that is installed or registered, also what cannot be used, sorted; imports nothing."""
        infos = []
        for info in self._plugins:
            if (cls := self._direct.get((info.group, info.kind))) and info.status != "blocked":
                infos.append(attrs.evolve(info, status="blocked", reason=f"replaced by {_name(cls)}"))
            else:
                infos.append(info)
        infos += [_direct_info(cls) for cls in self._direct.values()]
        order = {group: i for i, group in enumerate(GROUPS)}
        return sorted(infos, key=lambda info: (order.get(info.group, len(order)), info.entry_point, info.distribution))

    def kinds(self, group: str) -> list[str]:
        """The kinds of a group that can be asked for, sorted; imports nothing.

        Raises:
            UserError: for an unknown group.
        """
        _check_group(group)
        return [info.kind for info in self.plugins() if info.group == group and info.status == "ok"]

    def config_class(self, group: str, kind: str) -> type[Config]:
        """The config class of a kind; imports its plugin at first use.

        Raises:
            UserError: for an unknown group or kind, or one that is blocked.
            PluginError: if the plugin is broken, or if several distributions declare the kind.
        """
        _check_group(group)
        key = (group, kind)
        if key in self._direct:
            return self._direct[key]
        if key not in self._loaded:
            self._loaded[key] = _load(self._find(group, kind))
        return self._loaded[key]

    def _find(self, group: str, kind: str) -> PluginInfo:
        infos = [info for info in self._plugins if (info.group, info.kind) == (group, kind)]
        candidates = [info for info in infos if info.status != "blocked"]
        name = f"{group}.{kind}"
        if len(candidates) > 1:
            owners = " and ".join(f"{info.owner} (module {info.module})" for info in candidates)
            raise PluginError(
                f"{name} is declared by more than one plugin: {owners}. "
                f"Uninstall all but one, or leave distributions out: plugins.disable in the configuration, or "
                f"{DISABLE_VARIABLE}=NAME,NAME"
            )
        if candidates:
            if candidates[0].status == "broken":
                raise _plugin_error(candidates[0], candidates[0].reason)
            return candidates[0]
        if infos:
            raise UserError(
                f"{name} of {infos[0].owner} is installed but {infos[0].reason}; take it off there to use it"
            )
        if origin := self._origins.get(name):
            raise UserError(_missing(name, origin))
        known = self.kinds(group)
        broken = sum(info.status == "broken" for info in self._plugins)
        raise UserError(
            f'there is no {group} of kind "{kind}"{did_you_mean(kind, known)} '
            f"(installed: {', '.join(known) or 'none'}). See all, and whose they are: mtdiffusion plugins list"
            + (f" (entry points that are broken: {broken})" if broken else "")
        )


def _normalised(name: str) -> str:
    """Distribution names are equal up to case and ``-_.`` (PEP 503); entry-point names lose nothing by it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _direct_info(cls: type[Config]) -> PluginInfo:
    return PluginInfo(f"{cls.group}.{cls.kind}", cls.group, cls.kind, DIRECT, "", cls.__module__)


def _missing(name: str, origin: Mapping[str, str]) -> str:
    distribution, version, module = (origin.get(key, "") for key in ("distribution", "version", "module"))
    if distribution == DIRECT:
        return (
            f"{name} is not installed. The run was trained with a class of the module {module} that was registered "
            "directly: give load_run a registry that has it, Registry.discover().with_classes(...)"
        )
    return (
        f"{name} is not installed. The run was trained with {distribution} {version} (module {module}), which provides "
        f'it: pip install "{distribution}=={version}"'
    )


def _with_conflicts(infos: Iterable[PluginInfo]) -> tuple[PluginInfo, ...]:
    """The same plugins, those of one name in conflict with each other and no others."""
    infos = list(infos)
    rivals: dict[tuple[str, str], list[PluginInfo]] = {}
    for info in infos:
        if info.status in ("ok", "conflict"):
            rivals.setdefault((info.group, info.kind), []).append(info)
    for i, info in enumerate(infos):
        if info.status in ("ok", "conflict"):
            others = [rival for rival in rivals[info.group, info.kind] if rival is not info]
            also = " and ".join(f"{rival.owner} (module {rival.module})" for rival in others)
            infos[i] = attrs.evolve(
                info, status="conflict" if others else "ok", reason=f"also declared by {also}" if others else ""
            )
    return tuple(infos)


def _check_group(group: str) -> None:
    if group not in BASES:
        raise UserError(f'there is no group "{group}"{did_you_mean(group, GROUPS)} (known: {", ".join(GROUPS)})')


def _declared(search: list[str]) -> Iterator[PluginInfo]:
    """The entry points of every distribution on the path, in its order."""
    seen = set()
    for distribution in distributions(path=search):
        text = distribution.read_text("entry_points.txt") or ""
        if ENTRY_POINT_GROUP not in text:
            continue
        name = distribution.metadata["Name"] or "(unnamed)"
        if _normalised(name) in seen:
            continue
        seen.add(_normalised(name))
        # A distribution can be on the path more than once, in two versions. Python takes the first, and so must we,
        # even if the first declares no plugin.
        yield from _entry_points(next(iter(distributions(name=name, path=search)), distribution), name)


def _entry_points(distribution: Distribution, name: str) -> Iterator[PluginInfo]:
    def info(entry_point: str, group: str, kind: str, module: str, problem: str | None) -> PluginInfo:
        status: Status = "broken" if problem else "ok"
        return PluginInfo(entry_point, group, kind, name, version, module, status, problem or "")

    version = distribution.metadata["Version"] or "(no version)"
    try:
        points = [point for point in distribution.entry_points if point.group == ENTRY_POINT_GROUP]
    except Exception as error:  # importlib.metadata promises no type; one bad file must not hide all other plugins
        yield info("(unreadable)", "", "", "", f"entry_points.txt cannot be read: {type(error).__name__}: {error}")
        return
    for point in points:
        group, _, kind = point.name.partition(".")
        if group not in BASES:
            reason = f'must be named GROUP.KIND; unknown group "{group}"{did_you_mean(group, GROUPS)}'
            yield info(point.name, "", "", point.value, f"{reason} (known: {', '.join(GROUPS)})")
        elif not kind.isidentifier():
            yield info(point.name, "", "", point.value, "must be named GROUP.KIND, with KIND an identifier")
        elif not all(part.isidentifier() for part in point.value.split(".")):
            yield info(point.name, group, kind, point.value, f"must point at a module, found {point.value!r}")
        else:
            yield info(point.name, group, kind, point.value, None)


def _plugin_error(info: PluginInfo, problem: str) -> PluginError:
    return PluginError(f"plugin {info.entry_point} of {info.owner} (module {info.module}): {problem}")


def _load(info: PluginInfo) -> type[Config]:
    """Import the plugin, check it and ask it for the class of ``info``'s kind."""
    try:
        module = importlib.import_module(info.module)
    except (Exception, SystemExit) as error:
        raise _plugin_error(
            info,
            f"its import failed: {type(error).__name__}: {error}. Upgrade or reinstall {info.distribution}, or do "
            "without this kind",
        ) from error
    if problem := _api_problem(module, info) or _hook_problem(module):
        raise _plugin_error(info, problem)

    # A manager a plugin: what is wrong with one must not reach another.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(module)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise _plugin_error(info, f"its hooks do not fit: {error}") from error

    name = hookspecs.HOOKS[info.group]
    hook: pluggy.HookCaller = getattr(manager.hook, name)
    if not hook.get_hookimpls():
        raise _plugin_error(info, f"it has no hook {name}, which should return the config class of {info.entry_point}")
    try:
        results = hook()
    except Exception as error:
        raise _plugin_error(info, f"its hook {name} failed: {type(error).__name__}: {error}") from error
    returned = results[0] if results else None  # pluggy leaves out a None
    if not isinstance(returned, list | tuple):
        raise _plugin_error(info, f"its hook {name} must return a list of config classes, found {returned!r}")
    classes: dict[str, type[Config]] = {}
    for cls in returned:
        if problem := _class_problem(cls, info.group):
            raise _plugin_error(info, f"its hook {name} returned {cls!r}: {problem}")
        if cls.kind in classes:
            raise _plugin_error(info, f'its hook {name} returned two classes of kind "{cls.kind}"')
        classes[cls.kind] = cls
    if info.kind not in classes:
        raise _plugin_error(info, f'its hook {name} returned kinds {sorted(classes)}, not "{info.kind}"')
    return classes[info.kind]


def _api_problem(module: ModuleType, info: PluginInfo) -> str | None:
    stated = getattr(module, "MTDIFFUSION_API", None)
    ours = hookspecs.API_VERSION
    here = f"this mtdiffusion has {ours}"
    if type(stated) is not int:
        found = "it does not state" if stated is None else f"found MTDIFFUSION_API = {stated!r}, not a number:"
        return f"{found} the plugin API it was written for; set MTDIFFUSION_API = {ours} in the module"
    if stated < ours:
        return f"it is of plugin API {stated}, {here}; upgrade {info.distribution}, or install an older mtdiffusion"
    if stated > ours:
        return f"it is of plugin API {stated}, {here}; upgrade mtdiffusion, or install an older {info.distribution}"
    return None


def _hook_problem(module: ModuleType) -> str | None:
    """What is meant as a hook but would be ignored: a misspelt name, or a missing marker."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    known = hookspecs.HOOKS.values()
    for name in dir(module):
        if not inspect.isroutine(getattr(module, name, None)):
            continue
        options = manager.parse_hookimpl_opts(module, name)
        hook = (options and options["specname"]) or name
        if hook not in known and (options or name.startswith("mtdiffusion_")):
            return f"there is no hook {hook}{did_you_mean(hook, known)} (known: {', '.join(known)})"
        if hook in known and not options:
            return f"its function {name} lacks the marker: decorate it with @mtdiffusion_registry.hookimpl"
    return None


def _class_problem(cls: object, group: str) -> str | None:
    base = BASES[group]
    if not isinstance(cls, type) or not issubclass(cls, base):
        return f"it must be a subclass of {base.__name__}" + ("" if isinstance(cls, type) else ", the class itself")
    if "__attrs_attrs__" not in vars(cls):  # an undecorated subclass is frozen too, but its fields are ignored
        return "it must be decorated with @attrs.frozen"
    if not isinstance(getattr(cls, "kind", None), str):
        return 'it must state its kind: kind: ClassVar[str] = "..."'
    if missing := getattr(cls, "__abstractmethods__", None):
        return f"it must define {', '.join(sorted(missing))}"
    return None
