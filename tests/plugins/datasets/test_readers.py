"""Files read by processes are what they are when they are read here, whatever becomes of the processes."""

import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtdiffusion_plugins.datasets import _decoded, _readers
from mtdiffusion_plugins.datasets._decoded import decode
from mtdiffusion_plugins.datasets._readers import ReadingProcess, count_for
from mtdiffusion_plugins.fields import ImageField
from mtdiffusion_registry.cache import CACHE_VARIABLE
from mtdiffusion_registry.errors import UserError
from mtdiffusion_registry.pictures import read_levels


@pytest.fixture
def paths(tmp_path):
    """100 pictures of several sorts, some of which have to be turned, scaled, cropped or put on white."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(100):
        pixels = rng.integers(0, 256, (8 + index % 3, 90 if index % 7 == 0 else 10, 4), np.uint8)
        picture = Image.fromarray(pixels).convert(("RGB", "L", "RGBA")[index % 3])
        exif = Image.Exif()
        exif[0x0112] = 1 + index % 8
        path = tmp_path / f"{index:03}.{('jpg', 'png', 'webp')[index % 3]}"
        picture.save(path, exif=exif)
        paths.append(str(path))
    return paths


@pytest.fixture
def two(monkeypatch):
    """Two processes, however few the files and the processors."""
    monkeypatch.setattr(_decoded, "count_for", lambda _: 2)


def levels(paths, cache, monkeypatch, field=None):
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    found = decode("image", field or ImageField(), paths, (6, 6))
    return found.array.copy()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_by_processes_as_here(paths, tmp_path, monkeypatch, two, channels):
    monkeypatch.setattr(_decoded, "count_for", lambda _: 0)
    here = levels(paths, tmp_path / "a", monkeypatch, ImageField(channels))
    assert here.shape == (100, channels, 6, 6) and len(np.unique(here)) > 100
    monkeypatch.setattr(_decoded, "count_for", lambda _: 2)
    monkeypatch.setattr(ImageField, "read", None)  # would fail if it were called
    assert np.array_equal(levels(paths, tmp_path / "b", monkeypatch, ImageField(channels)), here)


def test_what_is_wrong_is_told_in_the_same_words(paths, tmp_path, monkeypatch, two):
    Path(paths[3]).write_bytes(Path(paths[3]).read_bytes()[:150])
    Path(paths[40]).write_text("no picture")
    Path(paths[77]).unlink()
    Path(paths[77]).mkdir()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(Path(paths[78]), "tiff")
    said = []
    for count in (0, 2):
        monkeypatch.setattr(_decoded, "count_for", lambda _, count=count: count)
        with pytest.raises(UserError, match=r"4 of 100 files of the field 'image' cannot be used") as error:
            levels(paths, tmp_path / "cache", monkeypatch)
        said.append(str(error.value))
    assert said[0] == said[1] and all(paths[index] in said[0] for index in (3, 40, 77, 78))


def test_a_process_that_dies_is_done_without(paths, tmp_path, monkeypatch, two):
    class Dies(ReadingProcess):
        def read(self, paths):
            self._process.kill()
            return super().read(paths)

    monkeypatch.setattr(_decoded, "ReadingProcess", Dies)
    found = levels(paths, tmp_path / "cache", monkeypatch)
    assert np.array_equal(found[5], read_levels(Path(paths[5]), (6, 6), 3))


def test_where_no_process_can_be_started_files_are_read_without(paths, tmp_path, monkeypatch, two):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    found = levels(paths, tmp_path / "cache", monkeypatch)
    assert np.array_equal(found[99], read_levels(Path(paths[99]), (6, 6), 3))


def test_alike_pictures_side_by_side_are_handed_over_together(tmp_path):
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{index}.png") for index in range(100)]
    sides = [4, 4, 4, 6, None, 6, 6, *(64 for _ in paths[7:])]
    for path, side in zip(paths, sides, strict=True):
        if side:
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(path)
    process = ReadingProcess(partial(read_levels, channels=3), "image", None)
    try:
        found = process.read(paths)
    finally:
        process.end()
    assert [len(each) for each in found if isinstance(each, np.ndarray)][:3] == [3, 1, 2]
    assert str(found[2]) == f"{paths[4]}: no such file"
    large = found[4:]
    assert len(large) > 1 and max(each.nbytes for each in large) <= 2**18  # a long lot is not kept until its end
    values = [value for each in found if isinstance(each, np.ndarray) for value in each]
    expected = [read_levels(Path(path), None, 3) for path, side in zip(paths, sides, strict=True) if side]
    assert all(np.array_equal(one, other) for one, other in zip(values, expected, strict=True))


def broken(path, size, wrong):
    raise wrong


def test_an_error_of_a_reader_is_raised_and_not_lost(paths, tmp_path, monkeypatch, two):
    """A slip in a plugin: the process ends with it, and the files are then read here, where it is seen."""
    monkeypatch.setattr(ImageField, "reader", lambda _: partial(broken, wrong=TypeError("a slip")))
    monkeypatch.setattr(ImageField, "read", lambda *_: broken(*_[1:], wrong=TypeError("a slip")))
    with pytest.raises(TypeError, match="a slip"):
        levels(paths, tmp_path / "cache", monkeypatch)


def test_none_is_left_when_reading_is_given_up(paths, tmp_path, monkeypatch, two):
    started = []

    class Noted(ReadingProcess):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self._process)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_decoded, "ReadingProcess", Noted)
    monkeypatch.setattr(torch, "from_numpy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        levels(paths, tmp_path / "cache", monkeypatch)
    assert len(started) == 2 and all(process.returncode is not None for process in started)
    assert not list((tmp_path / "cache" / "decoded").iterdir())


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    program = (
        "import functools, os, sys\n"
        "from mtdiffusion_plugins.datasets._readers import ReadingProcess\n"
        "from mtdiffusion_registry.pictures import read_levels\n"
        "process = ReadingProcess(functools.partial(read_levels, channels=3), 'image', None)\n"
        "print(process.read(['/nowhere'])[0], 'torch' in sys.modules, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    # Its output is at its end, so the process, which has the same standard error, has ended too.
    assert done.returncode == -9 and done.stderr == ""
    assert done.stdout == "/nowhere: no such file False\n"


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [count_for(files) for files in (0, 1999, 2000, 5500, 10**6)] == [0, 0, 2, 5, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # each of the training's processes reads
    assert count_for(10**6) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1), raising=False)
    assert count_for(10**6) == 0


def test_a_small_file_is_read_at_once(paths, tmp_path, monkeypatch):
    assert _readers._source(paths[0]).read_bytes() == Path(paths[0]).read_bytes()
    monkeypatch.setattr(_readers, "_SMALL", 10)
    assert _readers._source(paths[0]) == Path(paths[0])
    assert _readers._source(str(tmp_path / "nothing")) == tmp_path / "nothing"
    assert pickle.loads(pickle.dumps(ImageField(1).reader()))(Path(paths[0]), (6, 6)).shape == (1, 6, 6)
