"""What is written whole or not at all, and what a killed process leaves."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtdiffusion_registry.partial import partial_of, remove_abandoned


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with partial_of(tmp_path / "a.json") as partial:
        partial.write_text("{}")
        assert [path.name for path in tmp_path.iterdir()] == [f".a.json.{os.getpid()}"]
        partial.replace(tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("folder", [False, True])
def test_nothing_stays_of_what_failed(tmp_path: Path, folder: bool) -> None:
    with pytest.raises(OSError, match="full"), partial_of(tmp_path / "a", folder=folder):
        raise OSError("full")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_another_is_writing_is_not(tmp_path: Path) -> None:
    (tmp_path / ".a.1234567").mkdir()
    (tmp_path / ".a.1234567" / "inner").touch()
    (tmp_path / ".a.json").touch()  # somebody's own
    writes = (
        "import sys; from pathlib import Path; from mtdiffusion_registry.partial import partial_of\n"
        f"with partial_of(Path({str(tmp_path / 'a')!r})): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", writes], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f".a.{other.pid}", ".a.json"])
        remove_abandoned(tmp_path / "a")
        assert (tmp_path / f".a.{other.pid}").exists()
        other.kill()
        other.wait()
        assert (tmp_path / f".a.{other.pid}").exists()
        remove_abandoned(tmp_path / "a")
        assert [path.name for path in tmp_path.iterdir()] == [".a.json"]


def test_what_a_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / f".a.{os.getpid()}").mkdir()  # in a container a command often has the same number each time
    with partial_of(tmp_path / "a", folder=True) as partial:
        partial.replace(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_names_what_was_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as raised, partial_of(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path / "a.json")


def test_an_error_of_something_else_is_not_laid_on_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError) as raised, partial_of(tmp_path / "a.json"):
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    assert raised.value.filename is None
