"""What the rules let go, and what keeps an image whatever the rules say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from uenvd.errors import ResourceMissing
from uenvd.oci.index import Entry
from uenvd.publish.queue import parse_queue
from uenvd.publish.retirement import Image, Rules, decide, freed_bytes

NOW = datetime(2026, 11, 22, tzinfo=UTC)


def image(
    number: int,
    *tags: str,
    days: int | None = 300,
    version: str = "1.0",
    retired: int | None = None,
    **more: Any,
) -> Image:
    digest = f"sha256:{number:064x}"
    made = None if days is None else (NOW - timedelta(days=days)).isoformat()
    entry = Entry(
        f"deploy/demo/zen3/app/{version}", digest, tags, more.pop("layer", digest), 100, date=made, **more
    )
    return Image(entry, None if retired is None else NOW - timedelta(days=retired))


def action(
    one: Image,
    rules: Rules,
    *others: Image,
    held: dict[str, str] | None = None,
    oldest_job: datetime | None = None,
) -> str:
    decisions = decide([one, *others], rules, held=held or {}, oldest_job=oldest_job, now=NOW)
    return next(decision.action for decision in decisions if decision.image is one)


OLD = Rules(older_than_days=180)


@pytest.mark.parametrize(
    ("one", "rules", "expected"),
    [
        (image(1, "v1"), OLD, "retire"),
        (image(1, "v1"), Rules(), "keep"),
        (image(1, "v1", days=100), OLD, "keep"),
        (image(1, "v1", days=None), OLD, "keep"),
        (image(1, "latest", "v1"), OLD, "keep"),
        (image(1, "v1"), Rules(older_than_days=180, protect=("app/1.0",)), "keep"),
        (image(1, "v1"), Rules(older_than_days=180, protect=("app/*:v1",)), "keep"),
        (image(1, "v1"), Rules(older_than_days=180, only=("other*",)), "keep"),
        (image(1, "v1"), Rules(older_than_days=180, only=("app/1.*",)), "retire"),
        (image(1, "v1", deprecated="x", removal="2026-12-01"), OLD, "keep"),
        (image(1, "v1", deprecated="x", removal="2026-11-01"), OLD, "retire"),
        (image(1, "latest", deprecated="x", removal="2026-11-01"), OLD, "keep"),
        (image(1, "latest", deprecated="x", removal="2026-11-01"), Rules(expired=True), "retire"),
        (image(1, "latest", deprecated="x"), Rules(expired=True), "keep"),
        (image(1, retired=10), OLD, "wait"),
        (image(1, retired=31), OLD, "delete"),
        (image(1, retired=31), Rules(grace_days=60), "wait"),
        (image(1, retired=31), Rules(protect=(f"sha256:{1:064x}",)), "wait"),
        (image(1, "latest", retired=31), OLD, "keep"),
    ],
)
def test_one_image(one: Image, rules: Rules, expected: str) -> None:
    assert action(one, rules) == expected


def test_the_newest_of_a_name_stay_over_its_versions() -> None:
    images = [image(number, "v1", days=900 - 100 * number, version=f"{number}.0") for number in range(1, 6)]
    decisions = decide(images, Rules(keep=2), held={}, oldest_job=None, now=NOW)
    assert [one.action for one in decisions] == ["retire", "retire", "retire", "keep", "keep"]
    assert freed_bytes(decisions, "retire") == 300


def test_bytes_that_another_image_has_are_not_freed() -> None:
    shared = "sha256:" + "a" * 64
    images = [
        image(1, "v1", layer=shared),
        image(2, "v1", layer=shared, version="2"),
        image(3, "latest", layer=shared, version="3"),
    ]
    decisions = decide(images, OLD, held={}, oldest_job=None, now=NOW)
    assert [one.action for one in decisions] == ["retire", "retire", "keep"] and freed_bytes(
        decisions, "retire"
    ) == 0
    assert freed_bytes(decisions[:2], "retire") == 100


def test_who_holds_a_digest_keeps_it() -> None:
    one = image(1, "v1")
    held = {one.entry.digest: "locked by uenv.lock"}
    assert action(one, OLD, held=held) == "keep"
    assert action(image(1, retired=99), OLD, held=held) == "wait"


def test_a_job_from_before_the_retirement_keeps_an_image_from_being_deleted() -> None:
    assert action(image(1, retired=40), OLD, oldest_job=NOW - timedelta(days=41)) == "wait"
    assert action(image(1, retired=40), OLD, oldest_job=NOW - timedelta(days=39)) == "delete"


def test_the_queue() -> None:
    digest = "sha256:" + "b" * 64
    queue = parse_queue(f"12|2026-11-20T10:00:00|(null)\n13|2026-11-01T10:00:00|uenv {digest}\n")
    assert queue.jobs == 2 and queue.digests == {digest}
    assert queue.oldest is not None and queue.oldest.day == 1 and queue.oldest.tzinfo is not None
    assert parse_queue("\n").oldest is None
    with pytest.raises(ResourceMissing):
        parse_queue("12|N/A|x")
