"""The daemon's log: each line says whose request it belongs to.

A request's facts (operation, uid, job, step) are put into a context variable by the control server. trio copies the context into every task
and thread that is started for the request, so the pull that a job caused is logged with that job's number, too.

Formats (``log.format``): ``text``, for a terminal; ``json``, one object a line; ``journal``, journald's native protocol with fields that
``journalctl`` can filter by (``journalctl UENVD_JOB=4711``); ``auto``, the default, is ``journal`` where standard error goes to journald
(``$JOURNAL_STREAM``, systemd.exec(5)), else ``text``.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import re
import socket
import sys
import time
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import Final

FORMATS: Final = ("auto", "text", "json", "journal")
JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
MAX_DATAGRAM_BYTES: Final = 128 << 10
"""Longer entries are cut: they would have to be passed as a file."""

_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_STEPS: Final = {0xFFFFFFFA: "interactive", 0xFFFFFFFB: "batch", 0xFFFFFFFC: "extern"}
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

_facts: contextvars.ContextVar[Mapping[str, str | int]] = contextvars.ContextVar(
    "request", default=types.MappingProxyType({})
)


@contextlib.contextmanager
def about(**facts: str | int | None) -> Iterator[None]:
    """Attach facts to all that is logged in this block, and by tasks and threads that are started in it; None is left out."""
    told = {name: value for name, value in facts.items() if value is not None}
    token = _facts.set({**_facts.get(), **told})
    try:
        yield
    finally:
        _facts.reset(token)


def step_name(step: int | None) -> str | int | None:
    """Return a step as Slurm's programs show it: ``batch``, ``interactive``, ``extern`` or its number (slurm.h)."""
    return None if step is None else _STEPS.get(step & 0xFFFFFFFF, step)


def current_facts() -> Mapping[str, str | int]:
    """Return the facts of the request in whose context this is called."""
    return _facts.get()


def _whose(facts: Mapping[str, str | int]) -> str:
    parts = [f"{name} {facts[name]}" for name in ("op", "uid", "job", "step") if name in facts]
    return f" [{', '.join(parts)}]" if parts else ""


def _message(record: logging.LogRecord) -> str:
    """Return the text without control characters, with the traceback if there is one."""
    text = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        text += "\n" + "".join(traceback.format_exception(record.exc_info[1])).rstrip()
    return _CONTROL.sub("?", text)


class TextFormatter(logging.Formatter):
    """``INFO uenvd.daemon.service: message [op mount, uid 1000, job 42, step 0]``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback follows on lines of its own."""
        head, newline, rest = _message(record).partition("\n")
        return f"{record.levelname} {record.name}: {head}{_whose(_facts.get())}{newline}{rest}"


class JsonFormatter(logging.Formatter):
    """One object: time (ISO 8601, UTC), level, logger, message, and the request's facts."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return json.dumps(
            {
                "time": f"{stamp}.{int(record.msecs):03d}Z",
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": _message(record),
                **_facts.get(),
            }
        )


def journal_entry(record: logging.LogRecord, facts: Mapping[str, str | int]) -> bytes:
    """Return the datagram of an entry (systemd.io/JOURNAL_NATIVE_PROTOCOL): ``FIELD=value`` lines, values of several lines with their length."""
    priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
    fields: dict[str, str | int] = {
        "PRIORITY": priority,
        "SYSLOG_IDENTIFIER": "uenvd",
        "LOGGER": record.name,
        "CODE_FILE": record.pathname,
        "CODE_LINE": record.lineno,
        "CODE_FUNC": record.funcName or "",
        **{f"UENVD_{name.upper()}": value for name, value in facts.items()},
        "MESSAGE": _message(record),
    }
    parts = []
    for name, value in fields.items():
        data = str(value).encode(errors="replace")[: MAX_DATAGRAM_BYTES // 2]
        if b"\n" in data:
            parts.append(name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n")
        else:
            parts.append(name.encode() + b"=" + data + b"\n")
    return b"".join(parts)


class JournalHandler(logging.Handler):
    """Sends entries to journald; what it does not take goes to standard error as text. Never blocks."""

    def __init__(self, path: str = JOURNAL_SOCKET) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        self._text = TextFormatter()

    def emit(self, record: logging.LogRecord) -> None:
        """Send one entry."""
        try:
            self._socket.sendto(journal_entry(record, _facts.get()), self._path)
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                print(self._text.format(record), file=sys.stderr)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def to_journal(environ: Mapping[str, str]) -> bool:
    """Tell whether standard error goes to journald: systemd says device and inode of what it connected."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def set_up(form: str, *, verbose: bool) -> None:
    """Make the root logger write in one of `FORMATS`; may be called again when the configuration is known."""
    if form == "auto":
        form = "journal" if to_journal(os.environ) else "text"
    handler: logging.Handler
    if form == "journal":
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
