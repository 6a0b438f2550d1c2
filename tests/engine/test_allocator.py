"""What a process keeps of the memory that it frees."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from mtdiffusion_engine.allocator import keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library's allocator can be asked")

STEPS = 30
FREED_OFTEN = """
import resource, torch
{before}
def step():
    kept = [torch.ones(size << 20) for size in (1, 3, 12)]  # 4, 12 and 48 MiB
for _ in range(5):  # until each block has found its place
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(STEPS):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**20)
""".replace("STEPS", str(STEPS))
KEEP = "from mtdiffusion_engine.allocator import keep_freed_memory; print(keep_freed_memory())"
COMMAND = (
    "import contextlib, io\nfrom mtdiffusion_engine.cli import main\n"
    "with contextlib.redirect_stdout(io.StringIO()): main(['plugins', 'list'])\nprint(True)"
)


def _said(before: str, **environment: str) -> list[str]:
    """What a process says that does this, and then frees much and often: last how many MiB the system cleared."""
    code = FREED_OFTEN.format(before=before)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@glibc
@pytest.mark.parametrize("before", [KEEP, COMMAND], ids=["function", "command line"])
def test_freed_memory_is_taken_again_without_the_system(before: str) -> None:
    (usual,) = _said("")
    kept, cleared = _said(before)
    assert kept == "True"
    assert float(usual) > STEPS * 48, "at least the largest block of each step"
    assert float(cleared) < STEPS * 48 / 10, "not in more than a few steps, where a block finds another place"


@glibc
@pytest.mark.parametrize("name, value", [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")])
def test_what_the_environment_says_is_followed(name: str, value: str) -> None:
    kept, cleared = _said(KEEP, **{name: value})
    assert kept == "False"
    assert float(cleared) > STEPS * 48


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory({}) is False
