"""A job's later steps get what its first one got, and a node remembers only so many jobs."""

from __future__ import annotations

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
