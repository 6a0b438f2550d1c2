"""What is installed: found by reading metadata, imported when it is asked for.

pluggy's own ``load_setuptools_entrypoints`` stops at the first broken plugin without saying whose it is, and loads one
of two plugins of the same name in silence. So the metadata are read by :mod:`mtdiffusion_registry.installed`; pluggy
only calls the hooks.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Literal

import attrs
import pluggy
from attrs import field, frozen

from mtdiffusion_registry import hookspecs
from mtdiffusion_registry.configs import BASES, GROUPS, Config
from mtdiffusion_registry.errors import PluginError, UserError, did_you_mean
from mtdiffusion_registry.installed import EntryPoint, entry_points, normalised

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
        """Find the plugins installed, importing none. A damaged distribution is listed as broken, and hides no other.

        Args:
            block: what to leave out, as in :meth:`blocking`, beside what the environment variable
                ``MTDIFFUSION_DISABLE_PLUGINS`` says (comma separated).
            paths: where to look; ``sys.path`` by default.
        """
        found = cls(tuple(_plugin_info(point) for point in entry_points(ENTRY_POINT_GROUP, paths)))
        return found.blocking(os.environ.get(DISABLE_VARIABLE, "").split(","), by=DISABLE_VARIABLE).blocking(block)

    def blocking(self, names: Iterable[str], by: str = "the block list") -> Registry:
        """A new registry that leaves plugins out; what they were in conflict with can then be used.

        Args:
            names: of entry points or of distributions, up to case and ``-_.``; ``*`` is every distribution but
                mtdiffusion. A name of something that is not installed changes nothing, so that one list serves many
                machines.
            by: whose wish it is, for messages.
        """
        blocked = {normalised(name) for name in names if name.strip()}

        def is_blocked(info: PluginInfo) -> bool:
            distribution = normalised(info.distribution)
            return bool(blocked & {normalised(info.entry_point), distribution}) or (
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
        broken = [info for info in infos if info.status == "broken"]
        candidates = [info for info in infos if info.status in ("ok", "conflict")]
        name = f"{group}.{kind}"
        if len(candidates) > 1:
            owners = " and ".join(f"{info.owner} (module {info.module})" for info in candidates)
            raise PluginError(
                f"{name} is declared by more than one plugin: {owners}. "
                f"Uninstall all but one, or leave distributions out: plugins.disable in the configuration, or "
                f"{DISABLE_VARIABLE}=NAME,NAME"
            )
        if candidates:
            return candidates[0]
        if broken:
            raise _plugin_error(broken[0], broken[0].reason)
        if infos:
            raise UserError(
                f"{name} of {infos[0].owner} is installed but {infos[0].reason}; take it off there to use it"
            )
        if origin := self._origins.get(name):
            raise UserError(_missing(name, origin))
        known = self.kinds(group)
        others = sum(info.status == "broken" for info in self._plugins)
        raise UserError(
            f'there is no {group} of kind "{kind}"{did_you_mean(kind, known)} '
            f"(installed: {', '.join(known) or 'none'}). See all, and whose they are: mtdiffusion plugins list"
            + (f" (entry points that are broken: {others})" if others else "")
        )


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


def _plugin_info(point: EntryPoint) -> PluginInfo:
    group, _, kind = point.name.partition(".")
    well_named = group in BASES and kind.isidentifier()
    if point.problem:
        problem = point.problem
    elif group not in BASES:
        problem = f'must be named GROUP.KIND; unknown group "{group}"{did_you_mean(group, GROUPS)}'
        problem += f" (known: {', '.join(GROUPS)})"
    elif not well_named:
        problem = "must be named GROUP.KIND, with KIND an identifier"
    elif not point.names_module:
        problem = f"must point at a module, found {point.value!r}"
    else:
        problem = ""
    return PluginInfo(
        point.name,
        group if well_named else "",
        kind if well_named else "",
        point.distribution,
        point.version,
        point.value,
        "broken" if problem else "ok",
        problem,
    )


def _plugin_error(info: PluginInfo, problem: str) -> PluginError:
    return PluginError(f"plugin {info.entry_point} of {info.owner} (module {info.module}): {problem}")


def _load(info: PluginInfo) -> type[Config]:
    """Import the plugin, check it and ask it for the class of ``info``'s kind."""
    try:
        module = importlib.import_module(info.module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, or a library's own, such as a panic in Rust
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
    except KeyboardInterrupt:
        raise
    except BaseException as error:
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
