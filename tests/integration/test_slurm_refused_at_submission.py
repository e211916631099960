"""What can be known early is refused early: text on the terminal, a failure status, nothing queued."""

from __future__ import annotations

import time

import pytest

from support.slurmsite import Site, told

CASES = [
    (
        ["--uenv=nope/1"],
        ["uenv: no image matches nope/1", "uenv: hint: list what there is with: uenvctl image find"],
    ),
    (["--uenv=app/1", "--view=zz"], ["uenv: app/1 has no view zz", "uenv: hint: it has: default, develop"]),
    (["--view=default"], ["uenv: --view needs an image", "uenv: hint: add --uenv=LABEL"]),
    (
        ["--uenv=none", "--view=default"],
        ["uenv: --uenv=none has no views", "uenv: hint: leave out --view, or name an image"],
    ),
    (["--uenv=b\udcff"], ["uenv: labels, views and paths must be UTF-8 text"]),
]


@pytest.mark.parametrize(("options", "text"), CASES, ids=lambda value: "".join(map(ascii, value))[:40])
def test_srun_sbatch_and_salloc_refuse(site: Site, options: list[str], text: list[str]) -> None:
    before = site.cluster.submit("#!/bin/bash\ntrue\n")
    for command in (
        ["srun", *options, "true"],
        ["sbatch", *options, "--wrap=true"],
        ["salloc", *options, "true"],
    ):
        done = site.cluster.run(command, user=site.user)
        assert (done.returncode, done.stdout) == (1, ""), command
        lines = [line for line in told(done) if not line.startswith(("sbatch: error", "salloc: error"))]
        assert lines == text, command
    assert site.requests("mount") == []
    assert site.cluster.submit("#!/bin/bash\ntrue\n") == before + 1, "nothing was submitted in between"


def test_text_of_several_lines_keeps_its_columns(site: Site) -> None:
    message = "unexpected symbol\n  app?\n     ^"
    site.update(
        fail={"resolve": {"code": "label-syntax", "exit_status": 67, "message": message, "hint": "x\x1b[31m"}}
    )
    done = site.srun("--uenv=app?", "true")
    assert told(done) == ["uenv: unexpected symbol", "uenv:   app?", "uenv:      ^", "uenv: hint: x?[31m"]


def test_srun_in_a_job_refuses_only_itself(site: Site) -> None:
    state, output = site.batch(
        "srun --uenv=nope/1 true; echo status $?; srun which-app", "--uenv=app/1", "--view=default"
    )
    assert state == "COMPLETED"
    lines = output.splitlines()
    assert lines[0] == "uenv: no image matches nope/1"
    assert lines[-2:] == ["status 1", "app-1"]


def test_wrong_plugstack_line_harms_only_who_uses_the_option(site: Site) -> None:
    site.configure(sokket="/nowhere")
    assert site.srun("true").returncode == 0
    done = site.srun("--uenv=app/1", "true")
    assert done.returncode == 1
    assert told(done)[0] == "uenv: wrong argument 'sokket=/nowhere' of uenvd_spank.so in plugstack.conf"


def test_listener_that_is_not_uenvd(site: Site) -> None:
    site.configure(peer_uid=12345)
    done = site.srun("--uenv=app/1", "true")
    assert done.returncode == 1
    assert (
        told(done)[0]
        == f"uenv: who listens on {site.cluster.control_socket} is not uenvd: it runs as uid 0, not 12345"
    )


@pytest.mark.parametrize(
    "raw",
    [
        "\n",
        "garbage\n",
        "[]\n",
        '{"ok":1}\n',
        '{"ok":true}\n',
        '{"ok":false}\n',
        '{"ok":true,"resolved":5}\n',
        "[" * 5000 + "\n",
    ],
)
def test_malformed_answers(site: Site, raw: str) -> None:
    site.update(raw={"resolve": raw})
    done = site.srun("--uenv=app/1", "true")
    assert done.returncode == 1
    assert told(done)[0].startswith("uenv: an answer of uenvd is malformed: ")


def test_answer_without_end_and_answer_too_long(site: Site) -> None:
    site.configure(timeout_ms=300)
    site.update(raw={"resolve": '{"ok":true'})
    start = time.monotonic()
    done = site.srun("--uenv=app/1", "true")
    assert done.returncode == 1
    assert told(done)[0] == "uenv: uenvd does not answer in time"
    assert time.monotonic() - start < 2
    site.configure()
    site.update(raw={"resolve": "x" * (5 << 20) + "\n"})
    done = site.srun("--uenv=app/1", "true")
    assert told(done)[0] == "uenv: an answer of uenvd is longer than 4194304 bytes"
