"""The tests of CSCS's own plugin, on real parts: two applications and a tool, images side by side, and every way to ask for them wrongly.

The images, views and variables are those of its test suite (app/42.0, app/43.0, tool/17.3.2), so that the two can be compared.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.daemon import Client
from support.publishing import Publisher, env_json, make_squashfs
from support.slurmcentre import MOUNT_POINT, Centre
from support.slurmcentre import TOOLS_MOUNT_POINT as TOOLS
from support.slurmsite import told

pytestmark = pytest.mark.usefixtures("node")

UENVCTL = str(Path(sys.executable).parent / "uenvctl")
BOTH = "--uenv=app/42.0,tool"


@dataclass(frozen=True)
class Catalogue:
    """What was pushed."""

    digests: dict[str, str]
    own_file: Path


def _views(mount: str, name: str, **scalars: str | None) -> dict[str, object]:
    return {
        name: {
            "list": {"PATH": [{"op": "prepend", "value": [f"{mount}/bin"]}]},
            "scalar": scalars,
        }
    }


@pytest.fixture(scope="module")
def catalogue(centre_for_all: Centre) -> Iterator[Catalogue]:
    directory = centre_for_all.cluster.dir / "reference"
    directory.mkdir()
    publisher = Publisher(centre_for_all.registry.url)
    made = {}
    for label, mount in (("app/42.0", MOUNT_POINT), ("app/43.0", MOUNT_POINT), ("tool/17.3.2", TOOLS)):
        name, _slash, version = label.partition("/")
        views = _views(mount, name, **{f"{name.upper()}VAR": version})
        if name == "tool":
            views |= _views(mount, "wombat", TOOLCONFLICT=None, TOOLVAR="wombat")
        image = make_squashfs(
            directory / f"{name}-{version}.squashfs",
            {f"bin/{name}": f"#!/bin/sh\necho {label}\n"},
            meta=env_json(name, mount=mount, views=views),
        )
        made[label] = publisher.push(image, label, "v1")
    yield Catalogue(made, directory / "app-42.0.squashfs")


def mounted(centre: Centre, *options: str) -> str:
    """Return what is mounted in a step, one ``place source`` a line."""
    done = centre.srun(*options, "findmnt", "-t", "fuse.uenvd", "-rno", "TARGET,SOURCE")
    return done.stdout


def test_each_image_is_where_it_wants_to_be(centre: Centre, catalogue: Catalogue) -> None:
    assert mounted(centre) == ""
    application = f"{MOUNT_POINT} uenvd:{catalogue.digests['app/42.0']}\n"
    tool = f"{TOOLS} uenvd:{catalogue.digests['tool/17.3.2']}\n"
    assert mounted(centre, "--uenv=app/42.0:v1") == application
    assert mounted(centre, "--uenv=tool") == tool
    assert sorted(mounted(centre, BOTH).splitlines(keepends=True)) == [application, tool]
    assert mounted(centre, f"--uenv=tool:{MOUNT_POINT}") == tool.replace(TOOLS, MOUNT_POINT)
    assert mounted(centre, f"--uenv={catalogue.own_file}:{TOOLS}").startswith(f"{TOOLS} uenvd:")


def test_views_of_both(centre: Centre, catalogue: Catalogue) -> None:
    environ = {"TOOLCONFLICT": "1", "TOOLCONFLICTS": "2"}
    script = 'app; tool; echo "$APPVAR ${TOOLVAR-} ${TOOLCONFLICT-unset} $TOOLCONFLICTS"; echo "$UENV_VIEW"'
    for views, said in (
        ("app,tool", "42.0 17.3.2 1 2"),
        ("app,tool:tool", "42.0 17.3.2 1 2"),
        ("app:app,wombat", "42.0 wombat unset 2"),
    ):
        done = centre.srun(BOTH, f"--view={views}", "bash", "-c", script, env=environ)
        assert done.returncode == 0, done.stderr
        *programs, variables, names = done.stdout.splitlines()
        assert (programs, variables) == (["app/42.0", "tool/17.3.2"], said)
        last = views.rpartition(",")[2].rpartition(":")[2]
        assert names == f"{MOUNT_POINT}:app:app,{TOOLS}:tool:{last}"


def test_a_step_that_replaces_the_image_leaves_nothing_of_the_old_one(
    centre: Centre, catalogue: Catalogue
) -> None:
    find = "findmnt -t fuse.uenvd -rno TARGET"
    state, output = centre.batch(
        f"app; srun app; srun --uenv=tool --view=tool bash -c 'tool; {find}'; srun --uenv=app/43.0 --view=app app; {find}",
        "--uenv=app/42.0",
        "--view=app",
    )
    assert (state, output.splitlines()) == (
        "COMPLETED",
        ["app/42.0", "app/42.0", "tool/17.3.2", TOOLS, "app/43.0", MOUNT_POINT],
    )


MISTAKES = [
    (["--uenv=app"], r"app/42\.0:v1.*app/43\.0:v1"),
    (["--uenv=wombat"], r"'wombat'"),
    (["--uenv=app/42.0:v9"], r"app/42\.0:v9"),
    (["--uenv=app/42.0@elsewhere"], r"elsewhere"),
    (["--uenv=tool", "--view=tools"], r"tools.*hint: .*tool"),
    ([BOTH, "--view=wombat:tool"], r"wombat.*hint: .*tool:tool"),
    (["--view=tool"], r"--view needs an image"),
    (["--uenv="], r"expected a label .* found the end"),
    (["--uenv=a:b:c"], r"a:b:c.*\^"),
    (["--uenv=a?"], r"a\?.*\^"),
    (["--uenv=app:"], r"app:.*\^"),
    (["--uenv=app/42.0:v1@demo%zen3+"], r"zen3\+.*\^"),
    ([f"--uenv=app/42.0:{MOUNT_POINT},tool:{MOUNT_POINT}"], rf"{MOUNT_POINT}"),
    ([f"--uenv=app/42.0,app/42.0:{TOOLS}"], r"are the same image.*name it once"),
    (["--uenv=app/42.0,app/43.0"], rf"{MOUNT_POINT}"),
]
"""Options, and what is said to them."""


@pytest.mark.parametrize(("options", "says"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_mistakes_are_told_at_submission(
    centre: Centre, catalogue: Catalogue, options: list[str], says: str
) -> None:
    """Status 1, the reason, and nothing in the queue."""
    before = centre.cluster.submit("#!/bin/bash\ntrue\n")
    done = centre.srun(*options, "echo", "ran")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert re.search(says, " ".join(told(done)), re.DOTALL), done.stderr
    assert all(line.startswith("uenv: ") for line in told(done)), done.stderr
    assert centre.cluster.submit("#!/bin/bash\ntrue\n") == before + 1


@pytest.mark.parametrize(
    ("path", "says"),
    [("./no.squashfs", "no.squashfs: No such file or directory"), ("/etc/passwd", "not a squashfs image")],
)
def test_files_are_looked_at_where_they_are_needed(
    centre: Centre, catalogue: Catalogue, path: str, says: str
) -> None:
    """A path may lead to a file on the node's own disk; so it is the node that says what is wrong with it, before anything runs."""
    uenv = f"--uenv={path}:{MOUNT_POINT}"
    done = centre.srun(uenv, "echo", "ran")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    reason, hint = [line for line in told(done) if line.startswith("uenv: ")]
    assert reason.startswith("uenv: node") and says in reason
    assert hint.startswith("uenv: hint: check ")
    state, output = centre.batch("echo ran", uenv)
    assert (state, says in output, "ran\n" in output) == ("FAILED", True, False)


def test_one_name_twice_is_no_reason_to_drop_one(centre: Centre, catalogue: Catalogue) -> None:
    """Two versions at two places are two images; a view that both have must be said exactly."""
    done = centre.srun(
        f"--uenv=app/42.0,app/43.0:{TOOLS}", "sh", "-c", f"{MOUNT_POINT}/bin/app; {TOOLS}/bin/app"
    )
    assert (done.returncode, done.stdout) == (0, "app/42.0\napp/43.0\n"), done.stderr


def test_a_session_in_a_job(centre: Centre, catalogue: Catalogue) -> None:
    """In a job with an image it is refused, with the way out; in one without it needs no terminal, as in any script."""
    socket = f"--socket {centre.cluster.control_socket}"
    start = f"echo app | {UENVCTL} start {socket} --view=app app/43.0; echo status $?"
    state, output = centre.batch(start, "--uenv=app/42.0")
    assert (state, output.splitlines()[-1]) == ("COMPLETED", "status 93")
    assert "in a job: srun --uenv=LABEL, which replaces the environment" in output
    assert centre.batch(start) == ("COMPLETED", "app/43.0\nstatus 0\n")


def test_each_step_is_counted_once(centre: Centre, catalogue: Catalogue) -> None:
    """The batch step and its two sruns, on one of the two nodes; uenvctl and other jobs are not among them."""
    job = centre.cluster.submit(
        "#!/bin/bash\nsrun app; srun --uenv=tool tool; srun --uenv=none true\n",
        *("--uenv=app/42.0", "--view=app", "-w", "node1"),
        user=centre.user,
    )
    centre.finish(job)
    with Client(centre.nodes["node1"].socket_path) as client:
        steps = client.ask("job", job=job)["steps"]
    batch = 2**32 - 5  # slurm/slurm.h: SLURM_BATCH_SCRIPT
    assert [(step["step"], step["label"], step["uid"]) for step in steps] == [
        (batch, "app/42.0:v1@demo%zen3", centre.user.uid),
        (0, "app/42.0:v1@demo%zen3", centre.user.uid),
        (1, "tool/17.3.2:v1@demo%zen3", centre.user.uid),
    ]
