"""A session is a good place to work: the tools of every day do in it what they do outside, and what cannot work fails at once."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import running_daemon
from support.sessions import MOUNT, UENVCTL, SessionSite, session_site

pytestmark = pytest.mark.usefixtures("node")


@pytest.fixture(scope="module")
def site() -> Iterator[SessionSite]:
    """A user with two groups; uenvd runs, as it does on every node of a site."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make an ordinary user")
    with session_site() as made:
        layout = made.directory / "layout"
        layout.mkdir()
        with running_daemon(made.directory / "uenvd", f"oci-layout:{layout}") as daemon:
            yield dataclasses.replace(made, socket=daemon.socket_path)


def _both(site: SessionSite, *command: str) -> tuple[str, str]:
    """Run a command outside and inside; return what it says."""
    outside, inside = site.run(*command), site.inside(*command)
    assert (outside.returncode, inside.returncode) == (0, 0), outside.stderr + inside.stderr
    return outside.stdout, inside.stdout


def test_id(site: SessionSite) -> None:
    outside, inside = _both(site, "sh", "-c", "id -un; id -gn; id -Gn | tr ' ' '\\n' | sort")
    assert inside == outside
    assert len(outside.splitlines()) == 4


def test_a_file_for_a_project_group(site: SessionSite) -> None:
    (group,) = site.user.groups
    done = site.inside(
        "sh", "-c", f"echo x >new; chgrp {group} new; chmod g+s .; stat -c '%u %g' new; rm new"
    )
    assert (done.stdout, done.stderr) == (f"{site.user.uid} {group}\n", "")


def test_copies_and_archives_keep_owner_mode_and_time(site: SessionSite) -> None:
    (group,) = site.user.groups
    script = (
        f"mkdir d; echo x >d/f; chgrp {group} d/f; chmod 640 d/f; touch -d 2020-01-01 d/f; cp -a d e; tar cf d.tar d; "
        "mkdir t; tar xpf d.tar -C t; cp -p d/f g; stat -c '%u %g %a %Y' d/f e/f t/d/f g; rm -r d e t g d.tar"
    )
    outside, inside = _both(site, "sh", "-c", script)
    assert inside == outside
    copied, archived = inside.splitlines()[1], inside.splitlines()[2]
    assert copied == f"{site.user.uid} {group} 640 1577836800"
    assert archived == f"{site.user.uid} {site.user.gid} 640 1577836800"  # as tar does for everybody but root


# --- ssh ----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ssh_files(site: SessionSite) -> dict[str, Path]:
    """A site's ssh configuration, as distributions have it: included files, one of which includes another."""
    etc = site.directory / "ssh"
    etc.mkdir()
    (etc / "policy.conf").write_text("Ciphers aes256-ctr\n")
    directory = etc / "ssh_config.d"
    directory.mkdir()
    (directory / "10-site.conf").write_text("Host login*\n  User projectuser\n  ForwardAgent yes\n")
    (directory / "20-policy.conf").write_text(f"Include {etc}/policy.conf\n")
    main = etc / "ssh_config"
    main.write_text("Include /etc/ssh/ssh_config.d/*.conf\nHost *\n  HashKnownHosts yes\n")
    return {"/etc/ssh/ssh_config.d": directory, "/etc/ssh/ssh_config": main}


def test_ssh_with_a_sites_include(site: SessionSite, ssh_files: dict[str, Path]) -> None:
    outside = site.run("ssh", "-G", "login1", replaced=ssh_files)
    inside = site.inside("ssh", "-G", "login1", replaced=ssh_files)
    assert (inside.returncode, inside.stdout, inside.stderr) == (0, outside.stdout, outside.stderr)
    lines = inside.stdout.splitlines()
    for line in ("user projectuser", "forwardagent yes", "ciphers aes256-ctr", "hashknownhosts yes"):
        assert line in lines


def test_ssh_would_not_start_without_the_copies(site: SessionSite, ssh_files: dict[str, Path]) -> None:
    """The negative control: a user namespace alone makes ssh refuse."""
    done = site.run("unshare", "-U", "-c", "ssh", "-G", "login1", replaced=ssh_files)
    assert done.returncode != 0
    assert "Bad owner or permissions" in done.stderr


def test_a_file_that_ssh_would_refuse_outside_is_not_made_good(
    site: SessionSite, ssh_files: dict[str, Path]
) -> None:
    bad = ssh_files["/etc/ssh/ssh_config.d"] / "30-bad.conf"
    bad.write_text("Host *\n  User mallory\n")
    os.chown(bad, 65534, 65534)
    try:
        for done in (
            site.run("ssh", "-G", "login1", replaced=ssh_files),
            site.inside("ssh", "-G", "login1", replaced=ssh_files),
        ):
            assert done.returncode != 0
            assert "Bad owner or permissions" in done.stderr
    finally:
        bad.unlink()


# --- git ----------------------------------------------------------------------------------------------------------------------------------


def test_git(site: SessionSite) -> None:
    script = (
        "git init -q repo && cd repo && git config user.name me && git config user.email me@example.org && "
        "echo x >f && git add f && git commit -qm first && git clone -q . ../clone && git -C ../clone log --oneline | wc -l; "
        "git status --short; rm -rf ../clone ../repo"
    )
    done = site.inside("sh", "-c", script)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_git_in_a_repository_made_outside(site: SessionSite) -> None:
    made = site.run("git", "init", "-q", "outside")
    assert made.returncode == 0, made.stderr
    done = site.inside("git", "-C", "outside", "status", "--short")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- compilers ----------------------------------------------------------------------------------------------------------------------------


def test_c_and_fortran_compile_against_the_image(site: SessionSite) -> None:
    site.write(
        "a.c", '#include <stdio.h>\n#include "answer.h"\nint main(void) { printf("%d\\n", ANSWER); }\n'
    )
    site.write("a.F90", '#include "answer.h"\nprogram a\nprint "(i0)", ANSWER\nend program\n')
    script = (
        f"gcc -Wall -Werror -I{MOUNT}/include -o c a.c && ./c && "
        f"gfortran -Wall -Werror -I{MOUNT}/include -o f a.F90 && ./f"
    )
    done = site.inside("sh", "-c", script)
    assert (done.stdout, done.stderr) == ("42\n42\n", "")


# --- what cannot work ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["sudo", "-n", "true"], ["su", "-c", "true"], ["newgrp", "root"]], ids=lambda words: words[0]
)
def test_becoming_somebody_else_fails_at_once(site: SessionSite, command: list[str]) -> None:
    assert shutil.which(command[0]) is not None
    done = site.inside("sh", "-c", f"{' '.join(command)} </dev/null >/dev/null; echo $? $(id -u)")
    status, uid = done.stdout.split()
    assert (int(status) != 0 or command[0] == "newgrp", int(uid)) == (True, site.user.uid)


def test_the_reason_is_documented() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guide.md").read_text()
    for word in ("sudo", "su", "newgrp"):
        assert f"`{word}`" in guide


# --- where nobody listens -----------------------------------------------------------------------------------------------------------------


def test_standard_streams_that_are_no_terminal(site: SessionSite) -> None:
    done = site.run(UENVCTL, "start", "--view=default", site.image, stdin="say | tr a-z A-Z\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "HELLO\n", "")


def test_no_file_of_the_machine_is_changed(site: SessionSite, ssh_files: dict[str, Path]) -> None:
    directory = ssh_files["/etc/ssh/ssh_config.d"]
    before = subprocess.run(["ls", "-lR", directory], capture_output=True, text=True, check=True).stdout
    site.inside("sh", "-c", "echo x >>/etc/ssh/ssh_config.d/10-site.conf", replaced=ssh_files)
    after = subprocess.run(["ls", "-lR", directory], capture_output=True, text=True, check=True).stdout
    assert after == before
    assert " /etc/ssh/" not in Path("/proc/self/mountinfo").read_text()
