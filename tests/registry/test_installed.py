"""What the distributions on the path declare, however damaged they are: all that can be read, and whose the rest is."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mtdiffusion_registry import PluginError, PluginInfo, Registry, UserError
from mtdiffusion_registry.installed import EntryPoint, entry_points, version

GROUP = "mtdiffusion.plugins"
POINTS = b"[mtdiffusion.plugins]\ndataset.toy = toy_module\n"
OWNER = b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n"


def put(site: Path, points: bytes = POINTS, metadata: bytes | None = OWNER, folder: str = "toy-1.0.dist-info") -> Path:
    info = site / folder
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_bytes(points)
    if metadata is not None:
        (info / "METADATA").write_bytes(metadata)
    return info


def found(*sites: Path) -> list[PluginInfo]:
    return Registry.discover(paths=sites).plugins()


@pytest.fixture(autouse=True)
def nothing_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTDIFFUSION_DISABLE_PLUGINS", raising=False)


@pytest.mark.parametrize(
    ("line", "entry_point", "problem"),
    [
        (b"no equals sign", "no equals sign", "line 3 of entry_points.txt is damaged; expected NAME = MODULE"),
        (b"dataset.x =", "dataset.x =", "line 3 of entry_points.txt is damaged; expected NAME = MODULE"),
        (b"= module", "= module", "line 3 of entry_points.txt is damaged; expected NAME = MODULE"),
        (b"dataset.\xe9 = module", "dataset.\\xe9", "line 3 of entry_points.txt is not UTF-8"),
        (b"dataset.x = module\xe9", "dataset.x", "line 3 of entry_points.txt is not UTF-8"),
        (b"\xff\xfe\xfd", "\\xff\\xfe\\xfd", "line 3 of entry_points.txt is not UTF-8"),
        (b"dataset.\x1b[2J = module", "dataset.\\x1b[2J", "must be named GROUP.KIND, with KIND an identifier"),
    ],
)
def test_a_damaged_line_is_broken_and_the_others_are_used(
    tmp_path: Path, line: bytes, entry_point: str, problem: str
) -> None:
    info = put(tmp_path, POINTS + line + b"\ndataset.last = last_module\n")
    broken = [i for i in found(tmp_path) if i.status != "ok"]
    assert [(i.entry_point, i.distribution, i.version, i.status) for i in broken] == [
        (entry_point, "toy", "1.0", "broken")
    ]
    assert broken[0].reason.startswith(problem)
    assert "entry_points" not in problem or broken[0].reason.endswith(f". Install it again, or delete {info}")
    assert Registry.discover(paths=[tmp_path]).kinds("dataset") == ["last", "toy"]


@pytest.mark.parametrize(
    ("points", "problem"),
    [
        ("\ufeff".encode("utf-16-le") + POINTS.decode().encode("utf-16-le"), "entry_points.txt is UTF-16, not UTF-8"),
        (POINTS.decode().encode("utf-16-le"), "entry_points.txt has NUL bytes"),
        (POINTS + b"\0" * 100, "entry_points.txt has NUL bytes"),
    ],
)
def test_of_a_file_that_is_damaged_as_a_whole_everything_is_broken(tmp_path: Path, points: bytes, problem: str) -> None:
    put(tmp_path, points)
    (info,) = found(tmp_path)
    assert (info.entry_point, info.module, info.status) == ("dataset.toy", "toy_module", "broken")
    assert info.reason.startswith(problem)


@pytest.mark.parametrize("header", [b"[mtdiffusion.plugins", b"mtdiffusion.plugins]", b"[mtdiffusion.plugins] # ours"])
@pytest.mark.parametrize("before", [b"", b"[console_scripts]\nx = y:z\n"])
def test_a_damaged_section_is_said_to_be_one(tmp_path: Path, before: bytes, header: bytes) -> None:
    put(tmp_path, before + header + b"\ndataset.toy = toy_module\n")
    (info,) = found(tmp_path)
    assert (info.entry_point, info.status) == (header.decode(), "broken")
    assert "expected [mtdiffusion.plugins]" in info.reason


@pytest.mark.parametrize(
    "points",
    [
        b"\xef\xbb\xbf" + POINTS,
        POINTS.replace(b"\n", b"\r\n"),
        b"# about\n\n [ mtdiffusion.plugins ] \n\tdataset.toy\t=\ttoy_module \n",
        POINTS + b"[other]\nx = y\n" + POINTS,
        b"[other]\nno equals sign\n\xe9 = y\n" + POINTS + b"[another\nx = y\n",
    ],
)
def test_what_can_be_read_without_doubt_is_used(tmp_path: Path, points: bytes) -> None:
    put(tmp_path, points)
    assert [(i.entry_point, i.module, i.status) for i in found(tmp_path)] == [("dataset.toy", "toy_module", "ok")]


@pytest.mark.parametrize(
    ("metadata", "owner", "problem"),
    [
        (None, "{info}", "METADATA is missing or empty"),
        (b"", "{info}", "METADATA is missing or empty"),
        (b"\0" * 20, "{info}", "METADATA has NUL bytes"),
        (b"Version: 1.0\n", "{info} 1.0", "METADATA has no Name"),
        (b"\nName: toy\nVersion: 1.0\n", "{info}", "METADATA has no Name"),
        (b"Name: toy\n", "toy (no version)", "METADATA has no Version"),
        (b"Name: toy\nVersion:\n", "toy (no version)", "METADATA has no Version"),
        (b"Name: t\xf6y\nVersion: 1.0\n", "t\\xf6y 1.0", "METADATA is not UTF-8"),
        (OWNER.decode().encode("utf-16"), "toy 1.0", "METADATA is UTF-16, not UTF-8"),
    ],
)
def test_a_plugin_of_damaged_metadata_is_broken_and_says_whose_it_is(
    tmp_path: Path, metadata: bytes | None, owner: str, problem: str
) -> None:
    folder = put(tmp_path, metadata=metadata)
    registry = Registry.discover(paths=[tmp_path])
    (info,) = registry.plugins()
    assert (info.entry_point, info.owner, info.status) == ("dataset.toy", owner.format(info=folder), "broken")
    assert info.reason == f"{problem}. Install it again, or delete {folder}"
    with pytest.raises(PluginError, match=problem):
        registry.config_class("dataset", "toy")


@pytest.mark.parametrize(
    "metadata",
    [
        OWNER + b"Author: Andr\xe9\n",
        b"\xef\xbb\xbf" + OWNER,
        OWNER.replace(b"\n", b"\r\n"),
        OWNER + b"Name: twice\n\nVersion: 3\n",
        b"name: toy\nVERSION:1.0",
    ],
)
def test_metadata_that_tell_name_and_version_do(tmp_path: Path, metadata: bytes) -> None:
    put(tmp_path, metadata=metadata)
    assert [(i.owner, i.status) for i in found(tmp_path)] == [("toy 1.0", "ok")]


def test_what_does_not_mention_the_group_is_passed_over(tmp_path: Path) -> None:
    put(tmp_path, folder="good-1.0.dist-info")
    put(tmp_path, b"no equals sign\n\xe9\n\0", None, "a-1.0.dist-info")
    (tmp_path / "b-1.0.dist-info" / "entry_points.txt").mkdir(parents=True)
    (tmp_path / "c-1.0.dist-info").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d-1.0.dist-info").symlink_to(tmp_path / "d-1.0.dist-info")
    (tmp_path / "e-1.0.dist-info").write_bytes(b"\0")
    (tmp_path / "f.egg-info").write_text("no colon")
    (put(tmp_path, folder="g-1.0.dist-info") / "entry_points.txt").unlink()
    (tmp_path / "g-1.0.dist-info" / "entry_points.txt").symlink_to("entry_points.txt")
    put(tmp_path, folder="~ood-1.0.dist-info", metadata=OWNER.replace(b"toy", b"gone"))  # what pip could not delete
    assert [(i.entry_point, i.status) for i in found(tmp_path)] == [("dataset.toy", "ok")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_passed_over_or_broken(tmp_path: Path) -> None:
    info = put(tmp_path)
    (info / "METADATA").chmod(0)
    assert [(i.distribution, i.status) for i in found(tmp_path)] == [(str(info), "broken")]
    (info / "entry_points.txt").chmod(0)
    assert found(tmp_path) == []


def test_eggs_and_archives_are_read_and_damaged_ones_passed_over(tmp_path: Path) -> None:
    egg = tmp_path / "toy-1.0.egg"
    (egg / "EGG-INFO").mkdir(parents=True)
    (egg / "EGG-INFO" / "PKG-INFO").write_bytes(OWNER)
    (egg / "EGG-INFO" / "entry_points.txt").write_bytes(POINTS)
    archive, cut, changed = (tmp_path / name for name in ("other.zip", "cut.zip", "changed.zip"))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("other-1.0.dist-info/METADATA", OWNER.replace(b"toy", b"other"))
        file.writestr("other-1.0.dist-info/entry_points.txt", POINTS.replace(b"toy", b"other"))
    cut.write_bytes(archive.read_bytes()[:-10])
    changed.write_bytes(archive.read_bytes().replace(b"dataset.other", b"dataset.otter"))  # against its checksum
    paths = (changed, cut, egg, archive)
    assert [(i.entry_point, i.owner, i.status) for i in found(*paths)] == [
        ("dataset.other", "other 1.0", "ok"),
        ("dataset.toy", "toy 1.0", "ok"),
    ]


def test_a_damaged_distribution_takes_nobodys_place(tmp_path: Path) -> None:
    put(tmp_path / "a", b"", None)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "toy-2.0.dist-info").symlink_to("nowhere")
    damaged = put(tmp_path / "c", metadata=None)
    put(tmp_path / "d", POINTS.replace(b"toy_module", b"sound"))
    put(tmp_path / "e", POINTS.replace(b"toy_module", b"later"))
    registry = Registry.discover(paths=[tmp_path / site for site in "abcde"])
    assert [(i.distribution, i.module, i.status) for i in registry.plugins()] == [
        (str(damaged), "toy_module", "broken"),
        ("toy", "sound", "ok"),
    ]
    assert registry.origin("dataset", "toy")["module"] == "sound"


def test_a_folder_twice_on_the_path_counts_once(tmp_path: Path) -> None:
    put(tmp_path, metadata=None)
    assert len(found(tmp_path, tmp_path)) == 1


def test_any_group_can_be_read(tmp_path: Path) -> None:
    put(tmp_path, POINTS + b"[mtdiffusion.commands]\nx = module:attribute\n")
    (point,) = entry_points("mtdiffusion.commands", [tmp_path])
    assert point == EntryPoint("x", "module:attribute", "toy", "1.0")
    assert not point.names_module


def test_the_version_of_what_is_installed_is_that_of_the_first_that_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "a", metadata=None, folder="some_toy-0.9.dist-info")
    put(tmp_path / "b", metadata=b"Name: some-toy\nVersion: 1.5\n", folder="some_toy-1.5.dist-info")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), tmp_path, str(tmp_path / "b")])
    assert version("Some.Toy") == "1.5"
    with pytest.raises(UserError, match="the version of some-other is not known"):
        version("some-other")


def test_the_reader_imports_neither_attrs_nor_pluggy_and_the_room_says_its_names() -> None:
    code = """
import sys
import mtdiffusion_registry.installed
heavy = {"attr", "attrs", "pluggy", "cattrs", "torch"} & set(sys.modules)
assert not heavy, heavy
assert set(mtdiffusion_registry.__all__) <= set(dir(mtdiffusion_registry))
for name in mtdiffusion_registry.__all__:
    assert getattr(mtdiffusion_registry, name) is not None
try:
    mtdiffusion_registry.Regstry
except AttributeError:
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
