"""Configuration files: strict types, messages that can be acted on, and nothing lost on the way back."""

from __future__ import annotations

import enum
import math
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from attrs import Factory, field, frozen
from attrs.validators import ge, in_, instance_of
from fake_distributions import Install

from mtdiffusion_registry import (
    ConfigError,
    DatasetConfig,
    EvaluatorConfig,
    ModalityConfig,
    Query,
    Registry,
    UserError,
)
from mtdiffusion_registry.config import apply_overrides, dump_toml, load_toml, structure, unstructure


@frozen
class Base(ModalityConfig):
    def latent_channels(self, height: int, width: int) -> int:
        return 1

    def build(self, latent: object, features: object) -> Any:
        raise NotImplementedError


@frozen
class Label(Base):
    kind: ClassVar[str] = "label"
    classes: int = field(validator=ge(2))
    field: str | None = None


def _even(instance: object, attribute: object, value: int) -> None:
    if value % 2:
        raise ValueError("patches must be even")


class Colour(enum.Enum):
    GREY = "grey"
    RGB = "rgb"


@frozen
class Image(Base):
    kind: ClassVar[str] = "image"
    channels: int = 3
    patch: int = field(default=2, validator=_even)
    scale: float = field(default=1.0, validator=instance_of(float))
    size: tuple[int, int] = (32, 32)
    mean: tuple[float, ...] = ()
    norm: Literal["none", "unit"] = "none"
    flip: bool = False
    folder: Path | None = None
    limit: int | str = "all"
    colour: Colour = Colour.RGB
    mode: str = field(default="fast", validator=in_(("fast", "exact")))


@frozen
class Judge(EvaluatorConfig):
    kind: ClassVar[str] = "judge"
    probes: tuple[str, ...] = ()

    def build(self, train: object) -> object:
        return None


@frozen
class Experiment:
    modalities: dict[str, ModalityConfig]
    evaluators: tuple[EvaluatorConfig, ...] = ()
    first: ModalityConfig | None = None
    steps: int = 50
    table: dict[str, list[float]] = Factory(dict)


REGISTRY = Registry().with_classes(Label, Image, Judge)


def problem(toml: str, cls: type = Experiment) -> str:
    with pytest.raises(ConfigError) as caught:
        structure(REGISTRY, tomllib.loads(toml), cls, "x.toml")
    return str(caught.value)


def test_kinds_choose_classes_wherever_a_base_is_annotated() -> None:
    experiment = structure(
        REGISTRY,
        tomllib.loads(
            """
            modalities.image = {kind = "image", scale = 2, size = [16, 8], mean = [1, 0.5], folder = "a/b", limit = 7}
            modalities.label = {kind = "label", classes = 10}
            evaluators = [{kind = "judge", probes = ["a"]}]
            first = {kind = "label", classes = 3, field = "digit"}
            table = {a = [1, 2.5]}
            """
        ),
        Experiment,
    )
    assert experiment == Experiment(
        modalities={
            "image": Image(scale=2.0, size=(16, 8), mean=(1.0, 0.5), folder=Path("a/b"), limit=7),
            "label": Label(classes=10),
        },
        evaluators=(Judge(probes=("a",)),),
        first=Label(classes=3, field="digit"),
        table={"a": [1.0, 2.5]},
    )
    image = experiment.modalities["image"]
    assert isinstance(image, Image)
    assert type(image.scale) is float
    assert [type(value) for value in image.mean] == [float, float]


def test_kinds_come_from_installed_plugins_too(install: Install) -> None:
    install()

    toy = structure(Registry.discover(), {"kind": "toy", "size": 5}, DatasetConfig)  # type: ignore[type-abstract]
    assert (type(toy).__name__, toy.size) == ("Toy", 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('label = {kind = "label", classes = "ten"}', 'label.classes: found "ten" (str), expected an integer'),
        ('label = {kind = "label", classes = "3"}', 'label.classes: found "3" (str), expected an integer'),
        ('label = {kind = "label", classes = 3.5}', "label.classes: found 3.5 (float), expected an integer"),
        ('label = {kind = "label", classes = 3.0}', "label.classes: found 3.0 (float), expected an integer"),
        ('label = {kind = "label", classes = true}', "label.classes: found true (bool), expected an integer"),
        ('label = {kind = "label", classes = {}}', "label.classes: found a table, expected an integer"),
        ('label = {kind = "label", classes = 1}', "label.classes: 'classes' must be >= 2: 1"),
        ('label = {kind = "label", classes = 3, field = 4}', "label.field: found 4 (int), expected a string"),
        ('label = {kind = "label"}', 'label: missing key "classes" (an integer)'),
        ('image = {kind = "image", scale = "2"}', 'image.scale: found "2" (str), expected a number'),
        ('image = {kind = "image", scale = false}', "image.scale: found false (bool), expected a number"),
        ('image = {kind = "image", flip = 1}', "image.flip: found 1 (int), expected true or false"),
        ('image = {kind = "image", size = 3}', "image.size: found 3 (int), expected an array"),
        ('image = {kind = "image", size = "ab"}', 'image.size: found "ab" (str), expected an array'),
        ('image = {kind = "image", size = [3]}', "image.size: found [3] (list), expected 2 values"),
        ('image = {kind = "image", size = [3, 0.5]}', "image.size[1]: found 0.5 (float), expected an integer"),
        ('image = {kind = "image", mean = [1, "b"]}', 'image.mean[1]: found "b" (str), expected a number'),
        (
            'image = {kind = "image", norm = "units"}',
            'image.norm: found "units" (str), expected one of "none", "unit"; did',
        ),
        ('image = {kind = "image", folder = 3}', "image.folder: found 3 (int), expected a path"),
        ('image = {kind = "image", limit = 0.5}', "image.limit: found 0.5 (float), expected an integer or a string"),
        ('image = {kind = "image", colour = "red"}', "image.colour: 'red' is not a valid Colour"),
        ('image = {kind = "image", patch = 3}', "image: patches must be even"),
        ('image = {kind = "image", mode = "slow"}', "image.mode: 'mode' must be in ('fast', 'exact') (got 'slow')"),
        (
            'image = {kind = "image", chanels = 3}',
            'image: unknown key "chanels"; did you mean "channels"? (known: kind, channels, patch, ',
        ),
        ('image = {kind = "imgae"}', 'image.kind: there is no modality of kind "imgae"; did you mean "image"?'),
        ('image = {kind = "judge"}', 'image.kind: there is no modality of kind "judge" (installed: image, label)'),
        ("image = {kind = 3}", "image.kind: found 3 (int), expected a string"),
        ("image = {channels = 3}", 'image: missing key "kind" (a string)'),
        ("image = 3", "image: found 3 (int), expected a table"),
    ],
)
def test_a_problem_is_reported_where_it_is(toml: str, message: str) -> None:
    name, _, rest = toml.partition(" = ")
    assert problem(f"[modalities]\n{name} = {rest}").startswith(f"x.toml: modalities.{message}")


def test_problems_at_the_top_and_in_arrays() -> None:
    assert problem("modalities = {}\nstep = 3") == (
        'x.toml: unknown key "step"; did you mean "steps"? (known: modalities, evaluators, first, steps, table)'
    )
    assert problem("") == 'x.toml: missing key "modalities" (a table)'
    assert problem("modalities = []") == "x.toml: modalities: found [] (list), expected a table"
    assert problem('modalities = {}\nevaluators = [{kind = "judge", probes = [1]}]') == (
        "x.toml: evaluators[0].probes[0]: found 1 (int), expected a string"
    )
    assert problem("modalities = {}\ntable.a = [1, true]") == (
        "x.toml: table.a[1]: found true (bool), expected a number"
    )


def test_all_problems_are_reported_at_once() -> None:
    lines = problem('steps = "many"\n[modalities]\na = {kind = "label", classes = "x"}\nb = {kind = "lable"}').split(
        "\n"
    )
    assert [line.split(": ")[1] for line in lines] == ["modalities.a.classes", "modalities.b.kind", "steps"]
    assert all(line.startswith("x.toml: ") for line in lines)


def test_a_concrete_class_takes_its_own_kind_only() -> None:
    assert structure(REGISTRY, {"kind": "label", "classes": 4}, Label) == Label(classes=4)
    assert structure(REGISTRY, {"classes": 4}, Label) == Label(classes=4)
    assert problem('kind = "image"\nclasses = 4', Label) == 'x.toml: only kind "label" is possible here'


def test_a_broken_plugin_is_reported_at_its_kind(install: Install) -> None:
    install("import no_such_library")
    with pytest.raises(ConfigError, match=r"^kind: plugin dataset\.toy of toy-plugin 1\.0 .* No module named"):
        structure(Registry.discover(), {"kind": "toy"}, DatasetConfig)  # type: ignore[type-abstract]


def test_a_type_that_exists_only_for_type_checkers_is_explained() -> None:
    @frozen
    class Hidden(Base):
        kind: ClassVar[str] = "hidden"
        where: NoSuchType = 3  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(ConfigError, match=r"NoSuchType.*import it at run time, not under TYPE_CHECKING"):
        structure(REGISTRY, {}, Hidden)


def test_a_query_is_checked() -> None:
    toml = 'observed = ["a"]\ntargets = '
    assert "a modality is either given or asked for, found in both: a" in problem(toml + '["a", "b"]', Query)
    assert "targets: expected what to generate given a, found nothing" in problem(toml + "[]", Query)
    assert "hidden: expected one target that is given in part, found 2" in problem(
        'targets = ["a", "b"]\nhidden = 0.5', Query
    )


# --- back -------------------------------------------------------------------------------------------------------------


def test_what_is_written_comes_back_the_same(tmp_path: Path) -> None:
    experiment = Experiment(
        modalities={
            "image": Image(mean=(0.1, math.inf), folder=Path("x/y"), limit=3, colour=Colour.GREY, flip=True),
            "ü.x": Label(classes=10, field='a "b"\n'),
        },
        evaluators=(Judge(), Judge(probes=("p",))),
        first=Label(classes=2),
    )
    plain = unstructure(REGISTRY, experiment)
    assert plain["modalities"]["ü.x"] == {"kind": "label", "classes": 10, "field": 'a "b"\n'}
    assert plain["first"] == {"kind": "label", "classes": 2}  # field = None has no place in TOML
    assert plain["steps"] == 50  # defaults are written: they may change
    dump_toml(plain, tmp_path / "new" / "x.toml")
    assert structure(REGISTRY, load_toml(tmp_path / "new" / "x.toml"), Experiment) == experiment


def test_a_none_that_toml_would_lose_is_refused() -> None:
    @frozen
    class Lossy(Base):
        kind: ClassVar[str] = "lossy"
        limit: int | None = 3

    assert unstructure(REGISTRY, Lossy()) == {"kind": "lossy", "limit": 3}
    with pytest.raises(ConfigError, match=r"Lossy\.limit is None, which TOML cannot hold"):
        unstructure(REGISTRY, Lossy(limit=None))


def test_writing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    dump_toml({"a": 1}, path)
    with pytest.raises(ConfigError, match="cannot be written as TOML"):
        dump_toml({"a": [None]}, path)
    assert load_toml(path) == {"a": 1}
    assert [left.name for left in tmp_path.iterdir()] == ["x.toml"]


# --- files and overrides ----------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_explained(tmp_path: Path) -> None:
    (tmp_path / "digits.toml").write_text("a = 1")
    with pytest.raises(UserError, match=r'digit\.toml: there is no such file; did you mean "digits\.toml"\?'):
        load_toml(tmp_path / "digit.toml")
    with pytest.raises(UserError, match="expected a TOML file, found a directory"):
        load_toml(tmp_path)
    (tmp_path / "bad.toml").write_text("a = 1\nb = = 2\n")
    with pytest.raises(UserError, match=r"bad\.toml: not TOML: .*at line 2"):
        load_toml(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes('a = 1\nb = "ü"\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.toml: not UTF-8 \(at line 2\)"):
        load_toml(tmp_path / "latin.toml")


def test_text_is_read_as_editors_save_it(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    text = 'a = "é"\r\n[b]\r\nc = """1\r\n2"""\r\n'
    for data in (text.encode(), text.encode("utf-8-sig")):
        path.write_bytes(data)
        assert load_toml(path) == {"a": "é", "b": {"c": "1\n2"}}
    for order in ("le", "be"):
        path.write_bytes(f"\ufeff{text}".encode(f"utf-16-{order}"))
        with pytest.raises(UserError, match=r"x\.toml: is UTF-16; save it as UTF-8$"):
            load_toml(path)
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\nb = '\xe9'")
    with pytest.raises(UserError, match=r"x\.toml: not UTF-8 \(at line 2\)"):
        load_toml(path)


def test_overrides_are_toml_or_bare_words() -> None:
    mapping = {"a": {"b": 1, "c": "x"}, "d": 2}
    changed = apply_overrides(
        mapping,
        ["a.b=3", "a.c=/data/x=y", "new.table.key=[1, 2]", 'd="3"', "rate = 1e-4", "flag=true", "line=1\nother = 2"],
    )
    assert changed == {
        "a": {"b": 3, "c": "/data/x=y"},
        "new": {"table": {"key": [1, 2]}},
        "d": "3",
        "rate": 1e-4,
        "flag": True,
        "line": "1\nother = 2",
    }
    assert mapping == {"a": {"b": 1, "c": "x"}, "d": 2}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps", 'override "steps": expected KEY=VALUE or TABLE.KEY=VALUE'),
        ("=3", 'override "=3": expected KEY=VALUE'),
        ("a..b=3", 'override "a..b=3": expected KEY=VALUE'),
        ("a.b=", 'override "a.b=": expected KEY=VALUE or TABLE.KEY=VALUE; for an empty string write a.b=""'),
        ("a.b.c=3", 'override "a.b.c=3": a.b is not a table, found 1 (int)'),
        ("a.b=[1, 2", 'override "a.b=[1, 2": [1, 2 is not a TOML value'),
    ],
)
def test_overrides_that_cannot_be_meant_are_refused(argument: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides({"a": {"b": 1}}, [argument])
    assert str(caught.value).startswith(message)


def test_a_misspelt_override_is_caught_when_the_config_is_made() -> None:
    mapping = apply_overrides({"modalities": {"l": {"kind": "label", "classes": 3}}}, ["modalities.l.clases=4"])
    with pytest.raises(ConfigError, match=r'modalities\.l: unknown key "clases"; did you mean "classes"\?'):
        structure(REGISTRY, mapping, Experiment)
