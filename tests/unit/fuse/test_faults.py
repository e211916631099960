"""What the log and the reader get."""

from __future__ import annotations

import errno
import logging

import pytest

from uenvd.errors import FormatError
from uenvd.fuse.faults import Faults


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError("nothing"), errno.EIO),
        (FormatError("bad"), errno.EIO),
        (MemoryError(), errno.EIO),
        (ZeroDivisionError(), errno.EIO),
    ],
)
def test_errno(error: Exception, number: int) -> None:
    assert Faults("x").note(error) == number


def test_each_kind_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults("image")
    for i in range(100):
        faults.note(FormatError(f"damaged block {i} at {i:#x}"))
        faults.note(FormatError(f"no table {i}"))
    assert len(caplog.records) == 2
    assert "image: FormatError: damaged block 0 at 0x0 (said once)" in caplog.text
    assert faults.count == 200


def test_kinds_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults("image")
    for i in range(1000):
        faults.note(FormatError("x" * i))
    assert len(caplog.records) == 65


def test_only_a_bug_has_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        for error in (FormatError("bad"), KeyError("bug")):
            Faults("image").note(error)
    assert [record.exc_info is not None for record in caplog.records] == [False, True]
