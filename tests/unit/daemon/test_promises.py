"""A job's later steps get what its first one got, and a node remembers only so many jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from uenvd.daemon.promises import Promises


def test_first_answer_stays() -> None:
    promises = Promises()
    assert promises.recall(7, "app/1", "/home") is None
    promises.keep(7, "app/1", "/home", "app/1@sha256:old")
    promises.keep(7, "app/1", "/home", "app/1@sha256:new")
    assert promises.recall(7, "app/1", "/home") == "app/1@sha256:old"


def test_jobs_labels_and_directories_are_told_apart() -> None:
    promises = Promises()
    promises.keep(7, "./x.squashfs", "/a", "/a/x.squashfs")
    for asked in (
        (8, "./x.squashfs", "/a"),
        (7, "./y.squashfs", "/a"),
        (7, "./x.squashfs", "/b"),
        (7, "./x.squashfs", None),
    ):
        assert promises.recall(*asked) is None


def test_without_a_job_nothing_is_remembered() -> None:
    promises = Promises()
    promises.keep(None, "app/1", None, "app/1@sha256:old")
    assert promises.recall(None, "app/1", None) is None


def test_least_recently_used_are_forgotten() -> None:
    promises = Promises(limit=2)
    for job in (1, 2):
        promises.keep(job, "app/1", None, str(job))
    assert promises.recall(1, "app/1", None) == "1"
    promises.keep(3, "app/1", None, "3")
    assert [promises.recall(job, "app/1", None) for job in (1, 2, 3)] == ["1", None, "3"]


def test_a_restarted_daemon_remembers(tmp_path: Path) -> None:
    path = tmp_path / "promises.jsonl"
    promises = Promises(path)
    assert promises.keep(7, "app/1", "/home", "app/1@sha256:old")
    promises.save()
    assert not promises.keep(7, "app/1", "/home", "app/1@sha256:new")
    assert promises.keep(8, "app/1", None, "app/1@sha256:new")
    promises.save()
    with path.open("ab") as file:
        file.write(b'[7, "app/1", "/home", "forged later"]\n[9]\n[true, "a", null, "b"]\n\xff\n[10, "torn')
    again = Promises(path)
    assert again.recall(7, "app/1", "/home") == "app/1@sha256:old"
    assert again.recall(8, "app/1", None) == "app/1@sha256:new"
    assert len(path.read_bytes().splitlines()) == 2
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "promises.jsonl"
    promises = Promises(path, limit=3)
    for job in range(1, 50):
        promises.keep(job, "app/1", None, str(job))
        promises.save()
        assert len(path.read_bytes().splitlines()) <= 6
    again = Promises(path, limit=3)
    assert [again.recall(job, "app/1", None) for job in (46, 47, 49)] == [None, "47", "49"]


def test_a_directory_that_refuses_costs_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    promises = Promises(tmp_path / "gone" / "promises.jsonl")
    for job in (1, 2):
        promises.keep(job, "app/1", None, "x")
        promises.save()
    assert promises.recall(1, "app/1", None) == "x"
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "cannot be used: No such file or directory"
    ]
    (tmp_path / "d").mkdir()
    assert Promises(tmp_path / "d").recall(1, "app/1", None) is None
