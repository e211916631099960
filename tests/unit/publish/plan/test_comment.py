"""The grammar of comments, and who may start what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uenvd.errors import TriggerRefused, UsageError
from uenvd.publish.plan.comment import Comment, Pipeline, parse_allow_list, parse_comment, permit

ALLOW = """
pipelines:
  alps:
    users: [alice, bob]
    variables: [SLURM_ACCOUNT]
    arguments: [--executor, slurm]
  tools:
    users: [alice]
    config: tools/config.yaml
"""


def parsed(text: str) -> tuple[tuple[str, ...], dict[str, str], dict[str, str]]:
    comment = parse_comment(text)
    assert comment is not None
    return comment.pipelines, dict(comment.selectors), dict(comment.variables)


@pytest.mark.parametrize(
    ("text", "pipelines", "selectors", "variables"),
    [
        (
            "cscs-ci run alps;system=eiger;uarch=zen2;uenv=prgenv-gnu:23.11", ("alps",),
            {"system": "eiger", "uarch": "zen2", "uenv": "prgenv-gnu/23.11"}, {},
        ),
        ("cscs-ci run alps", ("alps",), {}, {}),
        ("cscs-ci run alps\nthank you; all = good, bye", ("alps",), {}, {}),
        ("  cscs-ci   run  alps , tools ; uenv = app ", ("alps", "tools"), {"uenv": "app"}, {}),
        ("cscs-ci run alps,alps;uenv=app/1.0", ("alps",), {"uenv": "app/1.0"}, {}),
        ("cscs-ci run alps;SLURM_ACCOUNT=a b", ("alps",), {}, {"SLURM_ACCOUNT": "a b"}),
        ("cscs-ci run alps\r\nmore", ("alps",), {}, {}),
    ],
)  # fmt: skip
def test_commands(
    text: str, pipelines: tuple[str, ...], selectors: dict[str, str], variables: dict[str, str]
) -> None:
    assert parsed(text) == (pipelines, selectors, variables)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "please cscs-ci run alps",
        "cscs-ci runalps",
        "cscs-ci",
        "\ncscs-ci run alps",
        "> cscs-ci run alps",
    ],
)
def test_what_is_no_command(text: str) -> None:
    assert parse_comment(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "cscs-ci run",
        "cscs-ci run ;system=eiger",
        "cscs-ci run alps,",
        "cscs-ci run alps tools",
        "cscs-ci run alps;",
        "cscs-ci run alps;system",
        "cscs-ci run alps;system=",
        "cscs-ci run alps;=eiger",
        "cscs-ci run alps;system=a=b",
        "cscs-ci run alps;system=a,b",
        "cscs-ci run alps;system=eiger;system=daint",
        "cscs-ci run alps;system=*",
        "cscs-ci run alps;uenv=app:1:2",
        "cscs-ci run alps;uenv=$(reboot)",
        "cscs-ci run alps;1X=y",
        "cscs-ci run alps;X=\x1b[2J",
        "cscs-ci run ../alps",
        "cscs-ci run alps;X=" + "y" * 5000,
    ],
)
def test_commands_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_comment(text)


@given(st.text(max_size=200))
def test_any_text(tail: str) -> None:
    for text in (tail, f"cscs-ci run {tail}", f"cscs-ci run alps;{tail}"):
        try:
            comment = parse_comment(text)
        except UsageError:
            continue
        if comment is not None:
            assert comment.pipelines
            assert all(value.isprintable() and value for value in comment.variables.values())


def test_the_allow_list() -> None:
    allowed = parse_allow_list(ALLOW, "file")
    assert allowed["alps"] == Pipeline(
        "alps",
        frozenset({"alice", "bob"}),
        "config.yaml",
        frozenset({"SLURM_ACCOUNT"}),
        ("--executor", "slurm"),
    )
    assert allowed["tools"].config == "tools/config.yaml"


def ask(text: str, user: str = "alice") -> list[str]:
    comment = parse_comment(text)
    assert isinstance(comment, Comment)
    return [pipeline.name for pipeline in permit(comment, user, parse_allow_list(ALLOW, "file"), "main:file")]


def test_who_may() -> None:
    assert ask("cscs-ci run alps,tools") == ["alps", "tools"]
    assert ask("cscs-ci run alps;SLURM_ACCOUNT=x", "bob") == ["alps"]


@pytest.mark.parametrize(
    ("text", "user", "reason"),
    [
        ("cscs-ci run alps", "mallory", "'mallory' may not start 'alps'"),
        ("cscs-ci run alps", "Alice", "may not start"),
        ("cscs-ci run alps", "alice ", "may not start"),
        ("cscs-ci run alps", "", "may not start"),
        ("cscs-ci run alps,tools", "bob", "'bob' may not start 'tools'"),
        ("cscs-ci run other", "alice", "no pipeline 'other'"),
        ("cscs-ci run alps;LD_PRELOAD=x", "alice", "may not set LD_PRELOAD"),
        ("cscs-ci run alps,tools;SLURM_ACCOUNT=x", "alice", "may not set SLURM_ACCOUNT for 'tools'"),
    ],
)
def test_who_may_not(text: str, user: str, reason: str) -> None:
    with pytest.raises(TriggerRefused, match=reason):
        ask(text, user)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("pipelines: {alps: {}}", "file:1: pipelines.alps.users"),
        ("pipelines:\n  alps:\n    users: ['*']", "file:3: pipelines.alps.users"),
        ("pipelines:\n  alps:\n    users: [a]\n    variables: [PATH]", "file:4: pipelines.alps.variables"),
        ("pipelines:\n  alps:\n    users: [a]\n    variables: [UENVD_REGISTRY]", "file:4"),
        ("pipelines:\n  alps:\n    users: [a]\n    config: ../x", "file:4: pipelines.alps.config"),
        ("pipelines:\n  alps:\n    user: [a]", "file:2: pipelines.alps.users"),
        ("pipeline: {}", "file:1: pipeline"),
        ("[", "not valid YAML"),
    ],
)
def test_an_allow_list_that_cannot_be_read_allows_nothing(text: str, where: str) -> None:
    with pytest.raises(TriggerRefused, match=where.replace(".", r"\.")):
        parse_allow_list(text, "file")
