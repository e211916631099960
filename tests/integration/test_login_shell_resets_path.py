"""A login shell inside a session resets PATH: the hooks of etc/ put the view back, once each, in order, and cost nothing elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.sessions import CHECKOUT, MOUNT, UENVCTL, SessionSite, session_site

pytestmark = pytest.mark.usefixtures("node")

ETC = CHECKOUT / "etc"
HOOK = ETC / "zz-uenvd.sh"
SHOW = 'echo "$PATH"; echo "$MANPATH"; echo "$ODD_LIST"; echo "$WORD"'
ODD = "it's:a!b:$HOME:`id`:*"
BEFORE = [f"{MOUNT}/bin", f"{MOUNT}/more bin"]
AFTER = [f"{MOUNT}/last"]


@pytest.fixture(scope="module")
def site() -> Iterator[SessionSite]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make an ordinary user")
    with session_site() as made:
        yield made


@pytest.fixture(scope="module")
def machine(site: SessionSite) -> dict[str, Path]:
    """A machine whose every login shell resets PATH, and which has the hooks."""
    fake = site.directory / "etc"
    for directory in (fake, fake / "profile.d", fake / "vendor_conf.d"):
        directory.mkdir()
    for name in ("profile.d/zz-uenvd.sh", "profile.d/zz-uenvd.csh", "vendor_conf.d/zz-uenvd.fish"):
        shutil.copy(ETC / name.rpartition("/")[2], fake / name)

    (fake / "vendor_conf.d/00-site.fish").write_text("status is-login; and set -gx PATH /usr/bin /bin\n")

    def file(name: str, text: str) -> Path:
        path = fake / name
        path.write_text(text)
        return path

    return {
        "/etc/profile.d": fake / "profile.d",
        "/etc/profile": file(
            "profile",
            'PATH=/usr/bin:/bin\nexport PATH\nfor i in /etc/profile.d/*.sh; do . "$i"; done\nunset i\n',
        ),
        "/etc/csh.login": file(
            "csh.login", "setenv PATH /usr/bin:/bin\nsource /etc/profile.d/zz-uenvd.csh\n"
        ),
        "/etc/zsh/zprofile": file("zprofile", "emulate sh -c '. /etc/profile'\n"),
        "/usr/share/fish/vendor_conf.d": fake / "vendor_conf.d",
    }


def _check(lines: list[str], between: list[str]) -> None:
    path, manpath, odd, word = lines
    assert path == ":".join([*BEFORE, *between, *AFTER])
    assert manpath == f"{MOUNT}/man"
    assert odd == ODD
    assert word == "hello"


@pytest.mark.parametrize(
    ("shell", "options"),
    [("bash", "-lc"), ("sh", "-lc"), ("dash", "-leuc"), ("bash", "-leuc"), ("zsh", "-leuc")],
)
def test_login_shells(site: SessionSite, machine: dict[str, Path], shell: str, options: str) -> None:
    done = site.inside(shell, options, SHOW + "; set", replaced=machine)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    _check(lines[:4], ["/usr/bin", "/bin"])
    leftovers = [line for line in lines if line.startswith("_uenvd")]
    assert not leftovers
    assert done.stderr == ""


def test_fish(site: SessionSite, machine: dict[str, Path]) -> None:
    show = 'string join : -- $PATH; echo "$MANPATH"; echo "$ODD_LIST"; echo "$WORD"'
    done = site.inside("fish", "--login", "-c", show, replaced=machine)
    assert done.returncode == 0, done.stderr
    _check(done.stdout.splitlines(), ["/usr/bin", "/bin"])


def test_tcsh(site: SessionSite, machine: dict[str, Path]) -> None:
    # a csh is a login shell when it has no other argument than -l
    site.write(".login", SHOW.replace('"$PATH"', '"$PATH"') + "\n")
    done = site.inside("tcsh", "-l", stdin="exit\n", replaced=machine)
    lines = [line for line in done.stdout.splitlines() if "tty" not in line and "job control" not in line]
    _check(lines[:4], ["/usr/bin", "/bin"])


def test_a_script_with_a_login_shell(site: SessionSite, machine: dict[str, Path]) -> None:
    script = site.write("job.sh", f"#!/bin/bash -l\nsay\n{SHOW}\n", mode=0o755)
    said, *lines = site.inside(str(script), replaced=machine).stdout.splitlines()
    assert said == "hello"
    _check(lines, ["/usr/bin", "/bin"])


def test_login_shells_in_login_shells(site: SessionSite, machine: dict[str, Path]) -> None:
    done = site.inside("bash", "-lc", f"bash -lc 'sh -lc '\"'\"'{SHOW}'\"'\"", replaced=machine)
    _check(done.stdout.splitlines(), ["/usr/bin", "/bin"])


def test_what_is_there_stays_where_it_is(site: SessionSite, machine: dict[str, Path]) -> None:
    (site.directory / "keeps").write_text(
        f'PATH="/first:{MOUNT}/more bin:/usr/bin:/bin"; export PATH\n. /etc/profile.d/zz-uenvd.sh\n'
    )
    changed = {**machine, "/etc/profile": site.directory / "keeps"}
    done = site.inside("bash", "-lc", 'echo "$PATH"', replaced=changed)
    assert done.stdout == f"{MOUNT}/bin:/first:{MOUNT}/more bin:/usr/bin:/bin:{MOUNT}/last\n"


def test_the_users_own_directories_stay_first(site: SessionSite, machine: dict[str, Path]) -> None:
    profile = site.write(".bash_profile", "export PATH=$HOME/bin:$PATH\n")
    try:
        done = site.inside("bash", "-lc", 'echo "$PATH"', replaced=machine)
    finally:
        profile.unlink()
    assert done.stdout.startswith(f"{site.user.home}/bin:{MOUNT}/bin:")
    done = site.inside("bash", "-c", "PATH=/mine:$PATH; bash -c 'echo \"$PATH\"'", replaced=machine)
    assert done.stdout.startswith(f"/mine:{MOUNT}/bin:")


def test_scalars_are_the_users(site: SessionSite, machine: dict[str, Path]) -> None:
    done = site.inside("bash", "-c", "WORD=mine bash -lc 'echo $WORD'", replaced=machine)
    assert done.stdout == "mine\n"


def test_a_session_without_a_view_restores_nothing(site: SessionSite, machine: dict[str, Path]) -> None:
    stale = site.environ(UENV_RESTORE="PATH=/stale")
    done = site.run(
        UENVCTL, "run", "--view=none", site.image, "bash", "-lc", 'echo "$PATH${UENV_RESTORE-}"',
        replaced=machine, env=stale,
    )  # fmt: skip
    assert done.stdout == "/usr/bin:/bin\n", done.stderr


@pytest.mark.parametrize("shell", ["bash", "sh", "zsh", "fish"])
def test_no_variable_is_believed_outside_a_session(
    site: SessionSite, machine: dict[str, Path], shell: str
) -> None:
    forged = site.environ(UENV_RESTORE="PATH=/forged", UENV_MOUNT_LIST="x:/y")
    show = "string join : -- $PATH" if shell == "fish" else 'echo "$PATH"'
    done = site.run(shell, "-l", "-c", show, env=forged, replaced=machine)
    assert done.stdout == "/usr/bin:/bin\n", done.stderr


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh"])
def test_odd_records_are_passed_over(site: SessionSite, machine: dict[str, Path], shell: str) -> None:
    odd = [
        "PATH;touch never=x",
        "$(touch never)=x",
        "=x",
        "PATH",
        "|||",
        "A B=c|1X=2|PA\nTH=/x",
        "+=x",
        "*=y",
    ]
    show = 'for UENV_RESTORE; do . /etc/profile.d/zz-uenvd.sh; done; echo "$PATH"; echo "${X-none}"; ls'
    done = site.inside(shell, "-c", show, shell, *odd, replaced=machine)
    path, other, *files = done.stdout.splitlines()
    assert path.startswith(f"{MOUNT}/bin:")
    assert "/x" not in path
    assert other == "none"
    assert "never" not in files
    assert done.stderr == ""


def test_outside_a_session_nothing_is_run() -> None:
    """Neither hook starts a process, opens a file or does more than one test where there is no session."""
    text = HOOK.read_text()
    first = next(line for line in text.splitlines() if line and not line.startswith("#"))
    assert first.startswith('if [ -n "${UENV_RESTORE-}" ] && ')
    done = subprocess.run(
        ["/bin/bash", "-xc", f". {HOOK}"],
        env={"PATH": "/nonexistent", "PS4": "+"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"\+ \. \S+\n\++ '\[' -n '' '\]'\n", done.stderr), done.stderr
