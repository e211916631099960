"""The journal of jobs survives restarts, crashes and full disks, and stays small."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from uenvd.daemon import journal as module
from uenvd.daemon.journal import Journal, Used


def used(job: int, step: int = 0, uid: int = 1000, label: str = "app/1.0:v1@demo%zen3") -> Used:
    return Used(job, step, uid, label, "sha256:" + "1" * 64, "/user-environment", ["default"], 1.5)


def test_what_was_noted_is_found_by_the_next_daemon(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.note(used(7, 0))
    first.note(used(7, 1, label="tool/1"))
    first.note(used(77))
    first.flush()
    assert Journal(tmp_path).steps_of(7, None) == [
        {
            "step": step,
            "uid": 1000,
            "label": label,
            "digest": "sha256:" + "1" * 64,
            "mount": "/user-environment",
            "views": ["default"],
            "time": 1.5,
        }
        for step, label in ((0, "app/1.0:v1@demo%zen3"), (1, "tool/1"))
    ]


def test_others_jobs_are_not_shown(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.note(used(7, uid=1000))
    assert journal.steps_of(7, 1001) == []
    assert len(journal.steps_of(7, 1000)) == 1
    assert len(journal.steps_of(7, None)) == 1
    assert journal.path.stat().st_mode & 0o777 == 0o600


def test_nothing_is_known(tmp_path: Path) -> None:
    assert Journal(tmp_path / "nowhere").steps_of(7, None) == []


def test_it_stays_small_and_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 2000)
    journal = Journal(tmp_path)
    for job in range(1, 101):
        journal.note(used(job))
        journal.flush()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) <= 4000
    assert journal.steps_of(1, None) == []
    assert all(journal.steps_of(job, None) for job in range(94, 101))


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.note(used(7, 0))
    journal.flush()
    with journal.path.open("ab") as file:
        file.write(b'{"job":7,"step":1,"ui')
    journal.note(used(7, 2))
    assert [one["step"] for one in journal.steps_of(7, None)] == [0, 2]


def test_a_full_disk_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(Path("/dev/full"))
    journal.path = Path("/dev/full")
    for _ in range(3):
        journal.note(used(7))
        journal.flush()
    assert caplog.text.count("cannot be written") == 1
    journal.path = tmp_path / "jobs.jsonl"
    journal.note(used(8))
    journal.flush()
    assert journal.steps_of(8, None)


def test_a_link_in_its_place_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine\n")
    os.symlink(victim, tmp_path / "jobs.jsonl")
    journal = Journal(tmp_path)
    journal.note(used(7))
    journal.flush()
    assert victim.read_text() == "mine\n"
    assert "cannot be written" in caplog.text


def test_the_queue_is_bounded(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(module.MAX_QUEUED + 10):
        journal.note(used(7, step))
    found = journal.steps_of(7, None)
    assert len(found) == module.MAX_ANSWERED
    assert found[-1]["step"] == module.MAX_QUEUED + 9


async def test_the_task_writes_and_writes_what_is_left_when_it_is_cancelled(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(journal.run)
        journal.note(used(7))
        with trio.fail_after(5):
            while not journal.path.exists():
                await trio.sleep(0.005)
        journal.note(used(8))
        nursery.cancel_scope.cancel()
    assert b'"job":8' in journal.path.read_bytes()
