"""What commands print, and where: one JSON document alone, and each line of a log once."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mtdiffusion_engine.printing import json_document, log_of_command, log_shown, say
from mtdiffusion_registry.pace import LOGGER

PRINTS = """
import os, subprocess, sys
from mtdiffusion_engine.printing import json_document
kept = sys.stdout
{closed}
with json_document(True) as put:
    print("python")
    kept.write("an object that was kept\\n")
    os.write(1, b"a library in C\\n")
    subprocess.run(["echo", "a process"], check=True)
    put({{"made": 1}})
    {fails}
"""


def printed(closed: str = "", fails: str = "") -> subprocess.CompletedProcess[str]:
    code = PRINTS.format(closed=closed, fails=fails)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_document_is_alone_whatever_prints_meanwhile() -> None:
    done = printed()
    assert json.loads(done.stdout) == {"made": 1}
    assert sorted(done.stderr.splitlines()) == ["a library in C", "a process", "an object that was kept", "python"]


def test_what_fails_prints_no_document() -> None:
    done = printed(fails="raise KeyError('a fault')")
    assert done.returncode == 1 and done.stdout == ""
    assert "a fault" in done.stderr


def test_a_closed_standard_error_does_not_lose_the_document() -> None:
    # What prints beside Python has nowhere else to go then.
    done = printed(closed="os.close(2); sys.stderr = open(os.devnull, 'w')")
    assert json.loads(done.stdout[done.stdout.index("{") :]) == {"made": 1}
    assert "python" not in done.stdout


def test_numbers_that_json_has_no_word_for_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"loss": float("nan"), "of": [1.5, float("inf"), (2, -float("inf"))], "text": "NaN", "none": None}
    with json_document(True) as put:
        put(found)
    said = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert said == {"loss": None, "of": [1.5, None, [2, None]], "text": "NaN", "none": None}


def test_without_a_document_the_standard_output_stays_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    with json_document(False) as put:
        print("lines")
        put({"made": 1})
    assert capfd.readouterr() == ("lines\n", "")


# --- the log ----------------------------------------------------------------------------------------------------------


class Printing(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


@pytest.fixture
def root_handler() -> Iterator[None]:
    """The root logger as ``logging.basicConfig`` leaves it, which libraries call: open_clip, as it makes a model."""
    handler = Printing()
    logging.getLogger().addHandler(handler)
    yield
    logging.getLogger().removeHandler(handler)


@pytest.mark.usefixtures("root_handler")
def test_a_line_is_told_once_though_the_root_logger_shows_all_there_is(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger(LOGGER)
    with log_of_command():
        logger.info("reading image: 5 of 10")
        with log_shown(lambda line: say(f"evaluating: {line}")):
            logger.info("training a judge: 1 of 3")
        logger.info("reading [mask]: 5 of 10")
    said = capfd.readouterr().err.splitlines()
    assert said == ["reading image: 5 of 10", "evaluating: training a judge: 1 of 3", "reading [mask]: 5 of 10"]
    # A program that runs a command in its own process has its loggers back, as they were.
    logger.warning("to the root logger")
    assert capfd.readouterr().err == "to the root logger\n" and not logger.handlers


def test_a_program_s_own_handler_is_left_to_show_it(capfd: pytest.CaptureFixture[str]) -> None:
    logger, told = logging.getLogger(LOGGER), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with log_of_command():
            logger.warning("a line")
    finally:
        logger.removeHandler(handler)
    assert told == ["a line"] and capfd.readouterr().err == ""


@pytest.mark.usefixtures("root_handler")
def test_of_several_processes_the_first_tells(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with log_of_command(), log_shown(say):
        logging.getLogger(LOGGER).info("reading image: 5 of 10")
    assert capfd.readouterr().err == ""
