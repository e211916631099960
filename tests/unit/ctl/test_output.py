"""What the user sees."""

from __future__ import annotations

import io
from typing import Any

import pytest

from uenvd.ctl import output
from uenvd.ctl.output import Progress, megabytes, printable, table
from uenvd.errors import UnknownView
from uenvd.label import parse_descriptions


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def write(self, _text: str) -> int:
        raise BrokenPipeError


@pytest.fixture(autouse=True)
def able_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def _event(done: Any, total: Any, message: str = "pulling app") -> dict[str, Any]:
    return {
        "event": "progress",
        "phase": "pull",
        "done_bytes": done,
        "total_bytes": total,
        "message": message,
    }


def test_nothing_can_drive_the_terminal() -> None:
    assert printable("a\x1b[31mb\r\x07\x9b\u202e\nc") == "a?[31mb????\nc"
    assert printable("grün 世界") == "grün 世界"


def test_table_aligns_and_cleans() -> None:
    assert (
        table(("a", "bb"), [("ccc", "1"), ("d\ne", "22\x1b")], right=frozenset({1}))
        == "a     bb\nccc    1\nd e  22?"
    )
    assert table((), [("a", "")]) == "a"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0"), (91_226_112, "91"), (1_500_000, "1.5"), (5_000_000_000, "5000")]
)
def test_megabytes(size: int, text: str) -> None:
    assert megabytes(size) == text


def test_errors_and_hints_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output.report(UnknownView("no view\x1b 'x'\nsecond line", hint="available: y"))
    output.report(UnknownView("bare", hint=""))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "uenvctl: no view? 'x'\nsecond line\nhint: available: y\nuenvctl: bare\n"


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(**environ: str) -> str:
        stream = Terminal()
        monkeypatch.setattr("sys.stderr", stream)
        for name in ("NO_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        output.report(UnknownView("what", hint="do"))
        return stream.getvalue()

    assert shown(TERM="xterm") == "\x1b[31muenvctl:\x1b[0m what\n\x1b[36mhint:\x1b[0m do\n"
    for environ in ({"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}, {}):
        assert shown(**environ) == "uenvctl: what\nhint: do\n"


def test_a_closed_stderr_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, Broken()):
        monkeypatch.setattr("sys.stderr", stream)
        output.note("x")


def test_without_terminal_a_line_after_a_second_and_then_every_ten() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(clock=clock, stream=stream) as progress:
        for second in range(25):
            clock.now = second * 0.99
            progress(_event(second * 10**6, 30 * 10**6))
    assert stream.getvalue() == (
        "uenvctl: pulling app: 2.0 of 30 MB\nuenvctl: pulling app: 13 of 30 MB\nuenvctl: pulling app: 24 of 30 MB\n"
    )


def test_the_numbers_of_a_pull_are_shown_once() -> None:
    for stream, shown in (
        (io.StringIO(), "uenvctl: pulling app/1:v1: 45 of 90 MB, 5.0 MB/s, 1:09 left\n"),
        (Terminal(), "  50% 45 of 90 MB, 5.0 MB/s, 1:09 left  pulling app/1"),
    ):
        clock = Clock()
        with Progress(clock=clock, stream=stream) as progress:
            clock.now = 5.0
            message = "pulling app/1:v1: 45 of 90 MB, 5 MB/s, 69 s left"
            progress(_event(45_000_000, 90_000_000, message) | {"rate_bytes_per_s": 5e6, "eta_s": 69})
            progress(_event(1, 2, "waiting: for a lock") | {"rate_bytes_per_s": "x"})
        assert shown in stream.getvalue()


def test_a_short_wait_shows_nothing() -> None:
    stream = io.StringIO()
    with Progress(clock=Clock(), stream=stream) as progress:
        progress(_event(1, 2))
    assert stream.getvalue() == ""


def test_on_a_terminal_a_bar_that_is_cleared() -> None:
    clock, stream = Clock(), Terminal()
    with Progress(clock=clock, stream=stream) as progress:
        clock.now = 1.0
        progress(_event(45_000_000, 90_000_000))
    drawn, cleared = stream.getvalue().split("\x1b[K")[:2]
    assert drawn == "\r[############............]  50% 45 of 90 MB  pulling app"
    assert cleared == "\r"


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event": "other"},
        _event("x", None),
        _event(-1, -5),
        _event(1e300, 1),
        _event(float("nan"), 2),
        _event(5, 2, "\x1b[2J\n"),
    ],
)
def test_odd_events(event: dict[str, Any]) -> None:
    for stream in (io.StringIO(), Terminal(), Broken()):
        clock = Clock()
        with Progress(clock=clock, stream=stream) as progress:
            clock.now = 5.0
            progress(event)
        assert "\x1b[2J" not in stream.getvalue()


def test_a_file_that_was_named_like_a_label_is_mentioned(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.squashfs").touch()
    output.mention_files(parse_descriptions("x.squashfs,app/1,y.squashfs,./x.squashfs"))
    assert (
        capsys.readouterr().err
        == "uenvctl: 'x.squashfs' is taken as a label; the file of this name is ./x.squashfs\n"
    )


def test_data_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", Broken())
    with pytest.raises(BrokenPipeError):
        output.data("x")
