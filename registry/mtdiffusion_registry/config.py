"""Configuration files: TOML in, config objects out, and back. Errors say where, what was found and what is expected.

Types are strict. The only conversions are an integer where a number is asked for, an array for a tuple and a string for
a path. A field annotated with one of the bases of :mod:`mtdiffusion_registry.configs` holds a table whose key ``kind``
says which class it is; a kind alone may stand for a table that says no more.
"""

from __future__ import annotations

import json
import os
import tomllib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from enum import Enum
from functools import lru_cache
from pathlib import Path, PurePath
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import tomli_w
from cattrs import Converter
from cattrs.errors import (
    AttributeValidationNote,
    BaseValidationError,
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
    StructureHandlerNotFoundError,
)
from cattrs.gen import make_dict_structure_fn

from mtdiffusion_registry.configs import BASES, Config
from mtdiffusion_registry.errors import ConfigError, UserError, did_you_mean
from mtdiffusion_registry.partial import partial_of
from mtdiffusion_registry.registry import Registry

__all__ = [
    "apply_overrides",
    "did_you_mean",
    "dump_toml",
    "explain",
    "load_toml",
    "make_converter",
    "structure",
    "unstructure",
]

T = TypeVar("T")
Hook = Any  # cattrs does not name the type of its hooks: (value, type) -> object
Source = str | os.PathLike[str]


# --- files ------------------------------------------------------------------------------------------------------------


def load_toml(path: Source) -> dict[str, Any]:
    """The contents of a TOML file; it may begin with a byte-order mark, as some editors save it.

    Raises:
        UserError: if it cannot be read, is not UTF-8 or is not TOML; the message says at which line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            raise UserError(f"{path}: is UTF-16; save it as UTF-8")
        return tomllib.loads(data.decode("utf-8-sig"))
    except FileNotFoundError as error:
        beside = did_you_mean(path.name, [other.name for other in path.parent.glob("*.toml")])
        raise UserError(f"{path}: there is no such file{beside}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: expected a TOML file, found a directory") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: not UTF-8 (at line {line})") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from error
    except RecursionError:
        raise UserError(f"{path}: arrays or tables are nested too deeply to be read; check its brackets") from None


def dump_toml(mapping: Mapping[str, Any], path: Source) -> None:
    """Write a TOML file, whole or not at all; makes the folder if need be.

    Raises:
        ConfigError: if a value cannot be written as TOML.
    """
    path = Path(path)
    try:
        text = tomli_w.dumps(mapping)
    except TypeError as error:
        raise ConfigError(f"{path}: cannot be written as TOML: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_of(path) as partial:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``mapping`` changed by arguments like ``modalities.label.classes=10``.

    The value is TOML; what is not TOML is taken as a string, so that strings need no quotes. Tables on the way are
    made. Whether the keys exist is checked by :func:`structure`.

    Raises:
        UserError: for an argument without a key or a value, or whose path leads through something that is no table.
    """
    result: dict[str, Any] = deepcopy(dict(mapping))
    for argument in overrides:
        path, equals, text = argument.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not text.strip() or not all(keys):
            hint = f'; for an empty string write {path}=""' if equals and all(keys) else ""
            raise UserError(f'override "{argument}": expected KEY=VALUE or TABLE.KEY=VALUE{hint}')
        table = result
        for i, key in enumerate(keys[:-1]):
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise UserError(f'override "{argument}": {".".join(keys[: i + 1])} is not a table, {_found(table)}')
        table[keys[-1]] = _override_value(text.strip(), argument)
    return result


def _override_value(text: str, argument: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() == {"value"}:  # a line break in the text could add others
            return parsed["value"]
    except tomllib.TOMLDecodeError:
        pass
    except RecursionError:
        raise UserError(f'override "{argument[:80]}...": nested too deeply to be read; check its brackets') from None
    if text[0] in "\"'[{":
        raise UserError(f'override "{argument}": {text} is not a TOML value')
    return text


# --- objects ----------------------------------------------------------------------------------------------------------


def structure(registry: Registry, mapping: Mapping[str, Any], cls: type[T], source: Source = "") -> T:
    """An instance of ``cls`` from the contents of a configuration file.

    Args:
        registry: which kinds there are.
        mapping: the contents.
        cls: an attrs class, or a base of :mod:`mtdiffusion_registry.configs`.
        source: what error messages call the file.

    Raises:
        ConfigError: if they do not fit; one line for each problem, all problems at once.
    """
    try:
        return make_converter(registry).structure(mapping, cls)
    except (BaseValidationError, StructureHandlerNotFoundError, UserError, TypeError, ValueError) as error:
        prefix = f"{os.fspath(source)}: " if source else ""
        raise ConfigError("\n".join(prefix + line for line in explain(error, mapping))) from error


def unstructure(registry: Registry, obj: object) -> dict[str, Any]:
    """What :func:`structure` makes ``obj`` from: plain values, with every ``kind``, ready for TOML.

    A field that is None is left out, since TOML has no null.

    Raises:
        ConfigError: if a field is None but its default is not, so that leaving it out would change it.
    """
    result: dict[str, Any] = make_converter(registry).unstructure(obj)
    return result


@lru_cache(maxsize=8)
def make_converter(registry: Registry) -> Converter:
    """The cattrs converter that follows the rules of this module; one for a registry."""
    converter = Converter(forbid_extra_keys=True, unstruct_collection_overrides={tuple: list})
    for type_, accepted in _SCALARS.items():
        converter.register_structure_hook(type_, _scalar_hook(type_, accepted))
    converter.register_structure_hook_func(_is_literal, _structure_literal)
    converter.register_structure_hook_factory(_is_array, _array_hook)
    converter.register_structure_hook_factory(_is_table, _table_hook)
    converter.register_structure_hook_factory(_is_union, _union_hook)

    def class_hook(cls: type, converter: Converter) -> Hook:
        return _base_hook(cls, registry, converter) if cls in BASES.values() else _attrs_hook(cls, converter)

    converter.register_structure_hook_factory(attrs.has, class_hook)
    converter.register_unstructure_hook_factory(attrs.has, _attrs_unstructure_hook)
    converter.register_unstructure_hook_func(lambda t: isinstance(t, type) and issubclass(t, PurePath), str)
    return converter


_SCALARS: dict[type, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    Path: (str, Path),
}
_ARRAYS = (list, tuple, Sequence)
_TABLES = (dict, Mapping)


def _scalar_hook(type_: type, accepted: tuple[type, ...]) -> Hook:
    def hook(value: object, _: object) -> object:
        if not isinstance(value, accepted) or (isinstance(value, bool) and type_ is not bool):  # a bool is an int, too
            raise _mismatch(value, type_)
        if type_ is int and not -(2**63) <= value < 2**63:  # type: ignore[operator]
            raise ValueError(f"{_found(value)}, expected an integer of 64 bits, at most {2**63 - 1}")
        return type_(value)

    return hook


def _is_literal(type_: object) -> bool:
    return get_origin(type_) is Literal


def _structure_literal(value: object, type_: object) -> object:
    for option in get_args(type_):
        if type(value) is type(option) and value == option:
            return value
    options = [option for option in get_args(type_) if isinstance(option, str)]
    raise ValueError(str(_mismatch(value, type_)) + (did_you_mean(value, options) if isinstance(value, str) else ""))


def _is_array(type_: object) -> bool:
    return (get_origin(type_) or type_) in _ARRAYS


def _array_hook(type_: Any, converter: Converter) -> Hook:
    make = list if (get_origin(type_) or type_) is list else tuple
    args = get_args(type_) or (Any, ...)
    fixed = make is tuple and Ellipsis not in args and get_origin(type_) is tuple

    def hook(value: object, _: object) -> object:
        if not isinstance(value, list | tuple):
            raise _mismatch(value, type_)
        if fixed and len(value) != len(args):
            raise ValueError(f"{_found(value)}, expected {len(args)} values")
        types = args if fixed else (args[0],) * len(value)
        return make(_structure_items(converter, type_, zip(range(len(value)), value, types, strict=True)))

    return hook


def _is_table(type_: object) -> bool:
    return (get_origin(type_) or type_) in _TABLES


def _table_hook(type_: Any, converter: Converter) -> Hook:
    key_type, value_type = get_args(type_) or (Any, Any)

    def hook(value: object, _: object) -> object:
        if not isinstance(value, Mapping):
            raise _mismatch(value, type_)
        keys = _structure_items(converter, type_, ((key, key, key_type) for key in value))
        items = _structure_items(converter, type_, ((key, item, value_type) for key, item in value.items()))
        return dict(zip(keys, items, strict=True))

    return hook


def _structure_items(converter: Converter, type_: Any, items: Iterable[tuple[int | str, object, Any]]) -> list[object]:
    structured: list[object] = []
    errors: list[Exception] = []
    for key, value, item_type in items:
        try:
            structured.append(converter.structure(value, item_type))
        except Exception as error:  # collected, as cattrs does: every problem is reported, not only the first
            error.add_note(IterableValidationNote(f"at {key}", key, item_type))
            errors.append(error)
    if errors:
        raise IterableValidationError(f"while structuring {type_}", errors, type_)
    return structured


def _is_union(type_: object) -> bool:
    """Unions but for ``X | None``, which cattrs knows."""
    args = get_args(type_)
    return get_origin(type_) in (Union, UnionType) and not (len(args) == 2 and NoneType in args)


def _union_hook(type_: Any, converter: Converter) -> Hook:
    def hook(value: object, _: object) -> object:
        if value is None and NoneType in get_args(type_):
            return None
        tables = [member for member in get_args(type_) if _is_table(member) or attrs.has(member)]
        if isinstance(value, Mapping) and len(tables) == 1:  # so that what is wrong within is said
            return converter.structure(value, tables[0])
        for member in get_args(type_):
            with suppress(BaseValidationError, TypeError, ValueError, StructureHandlerNotFoundError):
                if member is not NoneType:
                    return converter.structure(value, member)
        raise _mismatch(value, type_)

    return hook


def _attrs_hook(cls: type, converter: Converter) -> Hook:
    try:
        inner: Hook = make_dict_structure_fn(cls, converter)
    except NameError as error:
        raise ConfigError(
            f"{cls.__module__}.{cls.__qualname__}: the type of a field cannot be resolved ({error}); "
            "import it at run time, not under TYPE_CHECKING"
        ) from error

    def hook(value: object, _: object) -> object:
        if not isinstance(value, Mapping):
            raise _mismatch(value, cls)
        if issubclass(cls, Config):
            value = dict(value)
            if value.pop("kind", cls.kind) != cls.kind:
                raise ValueError(f'only kind "{cls.kind}" is possible here')
        return inner(value, cls)

    return hook


def _base_hook(base: type, registry: Registry, converter: Converter) -> Hook:
    group: str = base.group  # type: ignore[attr-defined]

    def hook(value: object, _: object) -> object:
        if isinstance(value, base):
            return value
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, Mapping):
            raise _mismatch(value, base)
        try:
            if "kind" not in value:
                raise KeyError("kind")
            if not isinstance(value["kind"], str):
                raise _mismatch(value["kind"], str)
            cls = registry.config_class(group, value["kind"])
        except (KeyError, ValueError, UserError) as error:
            error.add_note(AttributeValidationNote("at kind", "kind", str))
            raise ClassValidationError(f"while structuring a {group}", [error], base) from None
        return converter.structure(value, cls)

    return hook


def _attrs_unstructure_hook(cls: type, converter: Converter) -> Hook:
    def hook(obj: Any) -> dict[str, Any]:
        actual = type(obj)
        table: dict[str, Any] = {"kind": actual.kind} if isinstance(obj, Config) else {}
        for attribute in _keys(actual).values():
            value = getattr(obj, attribute.name)
            if value is not None:
                table[attribute.name] = converter.unstructure(value)  # by what it is, not by what is declared
            elif attribute.default is not None:
                raise ConfigError(
                    f"{actual.__qualname__}.{attribute.name} is None, which TOML cannot hold: None must be the default"
                )
        return table

    return hook


def _keys(cls: type) -> dict[str, attrs.Attribute[Any]]:
    return {attribute.name: attribute for attribute in attrs.fields(cls) if attribute.init}


# --- errors -----------------------------------------------------------------------------------------------------------


def explain(error: BaseException, mapping: object) -> list[str]:
    """One line for each problem in what cattrs raised for ``mapping``: its path, what was found, what is expected.

    (cattrs' own ``format_exception`` hides the messages of validators.)
    """
    return [f"{_path(keys)}: {problem}" if keys else problem for keys, problem in _problems(error, (), mapping)]


Keys = tuple[int | str, ...]


def _problems(error: BaseException, at: Keys, mapping: object) -> Iterator[tuple[Keys, str]]:
    if isinstance(error, ClassValidationError):
        noted, whole = error.group_exceptions()
        for inner, note in noted:
            if isinstance(inner, KeyError) and inner.args == (note.name,):
                yield at, f'missing key "{note.name}" ({_expected(note.type)})'
            else:
                yield from _problems(inner, (*at, note.name), mapping)
        for inner in whole:
            if isinstance(inner, ForbiddenExtraKeysError):
                yield from ((at, problem) for problem in _unknown_keys(inner))
            else:
                yield _invalid(inner, error.cl, at, mapping)
    elif isinstance(error, IterableValidationError):
        for inner, index in error.group_exceptions()[0]:
            yield from _problems(inner, (*at, index.index), mapping)
    else:
        yield at, str(error)


def _unknown_keys(error: ForbiddenExtraKeysError) -> Iterator[str]:
    known = (["kind"] if issubclass(error.cl, Config) else []) + list(_keys(error.cl))
    for key in sorted(error.extra_fields):
        yield f'unknown key "{key}"{did_you_mean(key, known)} (known: {", ".join(known)})'


def _invalid(error: Exception, cls: type, at: Keys, mapping: object) -> tuple[Keys, str]:
    """What a validator of ``cls`` said. attrs' own put the field's name in quotes first; the value may be missing."""
    message = str(error.args[0]) if error.args else type(error).__name__
    for name in _keys(cls) if attrs.has(cls) else ():
        if message.startswith(f"'{name}'"):
            value = _look_up(mapping, (*at, name))
            if value is not None and str(value) not in message:
                message += f" ({_found(value)})"
            return (*at, name), message
    return at, message


def _look_up(mapping: Any, keys: Keys) -> object:
    for key in keys:
        try:
            mapping = mapping[key]
        except (LookupError, TypeError):
            return None  # a default, which the file does not show
    return mapping


def _path(keys: Keys) -> str:
    path = ""
    for key in keys:
        path += f"[{key}]" if isinstance(key, int) else f".{key}" if path else key
    return path


def _mismatch(value: object, type_: object) -> ValueError:
    return ValueError(f"{_found(value)}, expected {_expected(type_)}")


def _found(value: object) -> str:
    if isinstance(value, Mapping):
        return "found a table"
    shown = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
    return f"found {shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"


_EXPECTED = {int: "an integer", float: "a number", str: "a string", bool: "true or false", Path: "a path"}


def _expected(type_: Any) -> str:
    if get_origin(type_) in (Union, UnionType):
        return " or ".join(_expected(member) for member in get_args(type_) if member is not NoneType)
    if _is_literal(type_):
        return "one of " + ", ".join(json.dumps(option) for option in get_args(type_))
    if _is_array(type_):
        return "an array"
    if _is_table(type_) or attrs.has(type_):
        return "a table"
    if isinstance(type_, type) and issubclass(type_, Enum):
        return "one of " + ", ".join(json.dumps(member.value) for member in type_)
    return _EXPECTED.get(type_, str(type_))
