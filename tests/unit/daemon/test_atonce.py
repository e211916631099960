"""Answers that are given again: only while they would be the same, and never where more than the asker's ids decides."""

from __future__ import annotations

import time
from typing import Any

import pytest

from uenvd.config import AccessRule, Config, RegistryConfig, SignatureConfig
from uenvd.daemon.atonce import MAX_ANSWERS, Answered
from uenvd.daemon.meanings import Meanings
from uenvd.daemon.question import Question
from uenvd.label import Label

TTL_S = 60.0


def config(**fields: Any) -> Config:
    return Config(system="demo", registry=RegistryConfig("-"), resolve_ttl_s=TTL_S, **fields)


def question(age_s: float | None = None, *, refresh: bool = False) -> Question:
    asked = Question(float("inf"), refresh)
    asked.oldest_s = age_s
    return asked


def test_an_answer_is_as_old_as_the_oldest_it_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    answered = Answered[str](config(), Meanings(TTL_S))
    answered.keep("fresh", "a", question())
    answered.keep("older", "b", question(TTL_S - 10))
    answered.keep("stale", "c", question(TTL_S + 10))
    assert [answered.recall(one) for one in ("fresh", "older", "stale", "never")] == ["a", "b", None, None]
    monkeypatch.setattr(time, "time", lambda: now + 20)
    assert [answered.recall(one) for one in ("fresh", "older")] == ["a", None]
    monkeypatch.setattr(time, "time", lambda: now - 20)  # somebody set the clock back
    assert answered.recall("fresh") is None


def test_an_answer_may_be_kept_for_less_than_the_registrys(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    answered = Answered[str](config(), Meanings(TTL_S), 5.0)
    answered.keep("a", "a", question())
    monkeypatch.setattr(time, "time", lambda: now + 6)
    assert answered.recall("a") is None


def test_news_from_the_registry_make_all_answers_old() -> None:
    meanings = Meanings(TTL_S)
    answered = Answered[str](config(), meanings)
    answered.keep("a", "a", question())
    meanings.clear()
    assert answered.recall("a") is None
    answered.keep("a", "b", question())
    assert answered.recall("a") == "b"
    answered.clear()
    assert answered.recall("a") is None


def test_what_came_with_a_note_or_insisted_on_fresh_answers_is_not_kept() -> None:
    answered = Answered[str](config(), Meanings(TTL_S))
    noted = question()
    noted.note("it is deprecated")
    answered.keep("noted", "a", noted)
    answered.keep("insisted", "a", question(refresh=True))
    assert answered.recall("noted") is None
    assert answered.recall("insisted") is None


@pytest.mark.parametrize(
    "fields",
    [
        {"access": (AccessRule(Label(namespace="deploy"), ("staff",)),)},
        {"signatures": SignatureConfig(required=("deploy",))},
    ],
)
def test_nothing_is_kept_where_rights_or_signatures_are_looked_at_each_time(fields: dict[str, Any]) -> None:
    answered = Answered[str](config(**fields), Meanings(TTL_S))
    answered.keep("a", "a", question())
    assert answered.recall("a") is None


def test_only_so_many_are_kept() -> None:
    answered = Answered[int](config(), Meanings(TTL_S))
    for number in range(MAX_ANSWERS + 1):
        answered.keep(number, number, question())
    assert answered.recall(0) is None
    assert answered.recall(MAX_ANSWERS) == MAX_ANSWERS
