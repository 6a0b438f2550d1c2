"""The cache folder: where it is asked for, by convention, and never a reason to fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtdiffusion_registry.cache import cache_folder


def test_the_variable_then_xdg_then_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MTDIFFUSION_CACHE", str(tmp_path / "own"))
    for expected, drop in (
        (tmp_path / "own", "MTDIFFUSION_CACHE"),
        (tmp_path / "xdg" / "mtdiffusion", "XDG_CACHE_HOME"),
        (tmp_path / "home" / ".cache" / "mtdiffusion", "HOME"),
    ):
        assert not expected.exists()
        assert cache_folder() == expected
        assert expected.is_dir() and list(expected.iterdir()) == []
        monkeypatch.delenv(drop)


def test_empty_and_relative_values_count_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MTDIFFUSION_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "mtdiffusion"
    assert not (tmp_path / "relative").exists()


def test_what_cannot_be_written_is_replaced_by_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/mtdiffusion")):
        monkeypatch.setenv("MTDIFFUSION_CACHE", str(place))
        folder = cache_folder()
        (folder / "kept").write_text("it can be written")
        assert folder != place and folder == cache_folder()  # one folder for all of a process
    assert (tmp_path / "file").read_text() == "not a folder"


def test_the_temporary_folder_goes_with_its_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = (
        f"import os; os.environ['MTDIFFUSION_CACHE'] = {str(tmp_path / 'file')!r}\n"
        "from mtdiffusion_registry.cache import cache_folder\n"
        "folder = cache_folder(); (folder / 'kept').write_text(''); print(folder)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() and not Path(done.stdout.strip()).exists()
