"""Every line of a request's log names its job, in each format, and no peer can forge a line."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from uenvd.daemon import logs
from uenvd.daemon.logs import JournalHandler, JsonFormatter, TextFormatter, about, journal_entry, step_name


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    made = logging.Logger("uenvd.test")
    yield made
    for handler in made.handlers:
        handler.close()


def written(logger: logging.Logger, formatter: logging.Formatter) -> io.StringIO:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    return stream


def test_text_with_and_without_a_request(logger: logging.Logger) -> None:
    stream = written(logger, TextFormatter())
    logger.info("before")
    with about(op="mount", uid=1000, job=42, step=0):
        logger.warning("inside %d", 1)
    logger.info("after")
    assert stream.getvalue() == (
        "INFO uenvd.test: before\n"
        "WARNING uenvd.test: inside 1 [op mount, uid 1000, job 42, step 0]\n"
        "INFO uenvd.test: after\n"
    )


def test_json(logger: logging.Logger) -> None:
    stream = written(logger, JsonFormatter())
    with about(op="wait", uid=1000, job=None):
        logger.error("two\nlines")
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "error", "logger": "uenvd.test", "message": "two\nlines", "op": "wait", "uid": 1000,
    }  # fmt: skip


def test_a_traceback_is_part_of_the_entry(logger: logging.Logger) -> None:
    stream = written(logger, JsonFormatter())
    try:
        raise RuntimeError("deep")
    except RuntimeError:
        logger.exception("it failed")
    (line,) = stream.getvalue().splitlines()
    message = json.loads(line)["message"]
    assert message.startswith("it failed\nTraceback")
    assert message.endswith("RuntimeError: deep")


def test_control_characters_do_not_reach_a_terminal(logger: logging.Logger) -> None:
    stream = written(logger, TextFormatter())
    logger.info("label %s", "a\x1b[2J\x07\r\x00")
    assert stream.getvalue() == "INFO uenvd.test: label a?[2J???\n"


async def test_tasks_and_threads_of_a_request_have_its_facts(logger: logging.Logger) -> None:
    stream = written(logger, TextFormatter())

    async def task() -> None:
        await trio.to_thread.run_sync(logger.info, "thread")

    async with trio.open_nursery() as nursery:
        with about(op="mount", job=1):
            nursery.start_soon(task)
        with about(op="mount", job=2):
            nursery.start_soon(task)
        logger.info("none")
    assert sorted(stream.getvalue().splitlines()) == [
        "INFO uenvd.test: none",
        "INFO uenvd.test: thread [op mount, job 1]",
        "INFO uenvd.test: thread [op mount, job 2]",
    ]


@pytest.mark.parametrize(
    ("step", "name"),
    [(None, None), (0, 0), (7, 7), (0xFFFFFFFB, "batch"), (-5, "batch"), (-6, "interactive"), (-4, "extern")],
)
def test_steps_have_slurms_names(step: int | None, name: str | int | None) -> None:
    assert step_name(step) == name


# --- journald ---------------------------------------------------------------------------------------------------------------------------


def fields_of(entry: bytes) -> dict[str, str]:
    """Parse an entry of the native protocol by its description, independently of the writer."""
    found = {}
    while entry:
        name, separator, rest = entry[: entry.index(b"\n")].partition(b"=")
        if separator:
            found[name.decode()] = rest.decode()
            entry = entry[entry.index(b"\n") + 1 :]
        else:
            start = entry.index(b"\n") + 1
            size = int.from_bytes(entry[start : start + 8], "little")
            found[name.decode()] = entry[start + 8 : start + 8 + size].decode()
            assert entry[start + 8 + size : start + 9 + size] == b"\n"
            entry = entry[start + 9 + size :]
    return found


def record(message: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("uenvd.x", level, "/x.py", 7, message, None, None, "f")


def test_an_entry_of_the_journal() -> None:
    entry = journal_entry(record("two\nlines = 2"), {"job": 42, "op": "mount"})
    assert fields_of(entry) == {
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "uenvd",
        "LOGGER": "uenvd.x",
        "CODE_FILE": "/x.py",
        "CODE_LINE": "7",
        "CODE_FUNC": "f",
        "UENVD_JOB": "42",
        "UENVD_OP": "mount",
        "MESSAGE": "two\nlines = 2",
    }


@pytest.mark.parametrize("text", ["a\nPRIORITY=0", "MESSAGE=x\nUENVD_JOB=1", "\n\n"])
def test_no_text_can_forge_a_field(text: str) -> None:
    fields = fields_of(journal_entry(record(text, logging.DEBUG), {}))
    assert fields["PRIORITY"] == "7"
    assert "UENVD_JOB" not in fields
    assert fields["MESSAGE"] == text


def test_entries_reach_journalds_socket(tmp_path: Path, logger: logging.Logger) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(str(tmp_path / "socket"))
        journald.settimeout(5.0)
        logger.addHandler(JournalHandler(str(tmp_path / "socket")))
        with about(job=5):
            logger.error("hello")
            logger.error("x" * (1 << 20))
        assert fields_of(journald.recv(1 << 16))["UENVD_JOB"] == "5"
        assert len(fields_of(journald.recv(1 << 20))["MESSAGE"]) == logs.MAX_DATAGRAM_BYTES // 2


def test_without_journald_the_text_goes_to_stderr(
    tmp_path: Path, logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.addHandler(JournalHandler(str(tmp_path / "nobody")))
    logger.error("hello")
    assert capsys.readouterr().err == "ERROR uenvd.test: hello\n"


def test_auto_means_the_journal_where_stderr_is_journalds(monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.stat(sys.__stderr__.fileno()) if sys.__stderr__ else os.fstat(2)
    assert logs.to_journal({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
    assert not logs.to_journal({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"})
    assert not logs.to_journal({})
