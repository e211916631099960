"""What a session is made of, without making one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from uenvd.ctl import overlay, session
from uenvd.ctl.overlay import included_patterns
from uenvd.ctl.session import Mounted, Part, Plan, parse_mountinfo, refuse_inside_session, session_environment
from uenvd.ctl.shells import choose, first_files, interactive, short_name
from uenvd.errors import LabelError, MountConflict, MountPointError, SessionError
from uenvd.label import Description, Label, ViewName
from uenvd.views import ImageMeta, View

DIGEST = "sha256:" + "ab" * 32
HOST = (
    "23 28 0:21 / /proc rw,nosuid - proc proc rw\n28 1 259:2 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
)


def test_images_in_mountinfo() -> None:
    text = HOST + (
        f"63 43 0:39 / /user-environment ro,nosuid,nodev,relatime - fuse.uenvd uenvd:{DIGEST} ro,user_id=0\n"
        "64 43 0:40 / /user\\040tools ro master:5 shared:2 - fuse.uenvd uenvd:/home/ada/x\\134y.squashfs ro,user_id=7,group_id=1\n"
        "65 43 0:41 / /other rw - fuse.sshfs host:/ rw\n"
        "66 43 0:42 / /tmp/uenvd:fake rw - tmpfs uenvd:fake rw\n"
    )
    assert parse_mountinfo(text, 7) == [
        Mounted(DIGEST, "/user-environment"),
        Mounted("/home/ada/x\\y.squashfs", "/user tools"),
    ]


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ("rw,user_id=0,group_id=0", True),
        ("user_id=7", True),
        ("rw,user_id=70", False),
        ("xuser_id=0", False),
        ("ro", False),
    ],
)
def test_mounts_of_other_users_are_not_believed(options: str, counts: bool) -> None:
    assert bool(parse_mountinfo(f"63 43 0:39 / /m ro - fuse.uenvd uenvd:{DIGEST} {options}\n", 7)) == counts


def test_only_the_topmost_mount_counts() -> None:
    line = "63 43 0:39 / /m ro - fuse.uenvd uenvd:{} ro,user_id=0\n"
    assert parse_mountinfo(line.format("a") + line.format("b"), 7) == [Mounted("b", "/m")]
    assert parse_mountinfo(line.format("a") + "64 63 0:40 / /m rw - tmpfs none rw\n", 7) == []


@pytest.mark.parametrize(
    "text",
    ["", "\n", "x", " - ", "1 2 3 4 /m - fuse.uenvd", "1 2 3 4 /m\\9 - fuse.uenvd uenvd:\\x1 ro", "\\ - \\"],
)
def test_odd_mountinfo(text: str) -> None:
    parse_mountinfo(text, 7)


def test_this_process_is_in_no_session() -> None:
    refuse_inside_session("run")


def test_the_way_out_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "mounted_images", lambda: [Mounted(DIGEST, "/user-environment")])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SessionError, match=f"{DIGEST} at /user-environment") as caught:
        refuse_inside_session("run")
    assert "exit" in caught.value.hint
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(SessionError) as caught:
        refuse_inside_session("run")
    assert "srun" in caught.value.hint


def test_plan() -> None:
    plan = Plan.parse("app/1:v1,./x.squashfs:/m", "app:default,v")
    assert plan.labels == [Description(Label("app", "1", "v1"))]
    assert plan.files == [Description(None, "./x.squashfs", "/m")]
    assert plan.views == (ViewName("app", "default"), ViewName(None, "v"))
    assert Plan.parse(f"@{DIGEST}", None).views == ()


@pytest.mark.parametrize(
    ("uenv", "views", "kind"),
    [
        ("a?", None, LabelError),
        ("a", "", LabelError),
        ("a:./m", None, MountPointError),
        ("a:/", None, MountPointError),
        ("a:/x/../y", None, MountPointError),
        ("./a,.//a:/m", None, MountConflict),
    ],
)
def test_plans_that_cannot_be(uenv: str, views: str | None, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        Plan.parse(uenv, views)


def test_one_file_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(MountConflict, match="named twice"):
        Plan.parse(f"{tmp_path}/a,{tmp_path}/b:/m", None)


def test_views_of_files_and_labels_are_told_apart() -> None:
    meta = ImageMeta("mine", "", "/m", None, (View("default", "", ()), View("only", "", ())))
    plan = Plan.parse("app,./x", "only,app:default,mine:default,other")
    mine, theirs = session._split_views(plan, [(None, meta)])
    assert list(map(str, mine)) == ["only", "mine:default"]
    assert list(map(str, theirs)) == ["app:default", "other"]
    assert session._split_views(Plan.parse("./x", "other"), [(None, meta)]) == ([ViewName(None, "other")], [])


def test_environment_of_a_session() -> None:
    parts = [
        Part(-1, "/user-environment", "app/1:v1@demo%zen3", "app", DIGEST, DIGEST, DIGEST),
        Part(-1, "/m", "./x.squashfs", "mine", "/home/ada/x.squashfs", None, "/home/ada/x.squashfs@1.2"),
    ]
    applied = f"/home/ada/x.squashfs@1.2[a,b];{DIGEST}[default];unknown[z]"
    environ = {"PATH": "/bin", "GONE": "1"}
    result = session_environment(
        environ, parts, [("unset", "GONE"), ("prepend", "PATH", ("/u/bin",))], applied
    )
    assert result == {
        "PATH": "/u/bin:/bin",
        "UENV_APPLIED": applied,
        "UENV_MOUNT_LIST": f"{DIGEST}:/user-environment,/home/ada/x.squashfs:/m",
        "UENV_LABEL": "app/1:v1@demo%zen3,./x.squashfs",
        "UENV_DIGEST": f"{DIGEST},",
        "UENV_VIEW": "/m:mine:a,/m:mine:b,/user-environment:app:default",
    }
    assert environ == {"PATH": "/bin", "GONE": "1"}


MOUNT = {"mount": "/m", "label": "app/1", "digest": DIGEST}


@pytest.mark.parametrize(
    "mounts",
    [
        None,
        {},
        [],
        [3],
        [{}],
        [MOUNT, MOUNT],
        [{**MOUNT, "mount": "relative"}],
        [{**MOUNT, "mount": "/a/../b"}],
        [{**MOUNT, "label": None}],
        [{**MOUNT, "digest": 3}],
    ],
    ids=str,
)
def test_malformed_mounts_of_the_daemon(mounts: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        session._parts({"mounts": mounts}, [7])
    assert session._parts({"mounts": [MOUNT]}, [7]) == [Part(7, "/m", "app/1", "app", DIGEST, DIGEST, DIGEST)]


def test_the_users_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose({"SHELL": "/bin/sh"}) == ("/bin/sh", None)
    assert choose({})[0].startswith("/")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert choose({"SHELL": ""}) == ("/bin/bash", None)
    for odd in ("/usr/sbin/nologin", "/bin/false", "bash", "/no/such", "/etc/passwd", "/etc"):
        shell, remark = choose({"SHELL": odd})
        assert shell == "/bin/bash"
        assert remark == f"$SHELL is {odd}, which is no shell that can be run; this is /bin/bash"


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("python-sci/2026.11:v1@demo%zen3", "python-sci/2026.11"),
        ("app@demo", "app"),
        ("app%zen3", "app"),
        ("./dir/x.squashfs", "x.squashfs"),
        ("/a b/$(touch x)`y`\\w'\".squashfs", "touchxyw.squashfs"),
        ("app!!/1%n", "app/1"),
    ],
)
def test_names_in_the_prompt_have_nothing_that_a_shell_treats_specially(label: str, name: str) -> None:
    assert short_name(label) == name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh", "csh", "dash", "ksh", "sh", "nushell"])
def test_how_shells_are_started(shell: str) -> None:
    start = interactive(f"/usr/bin/{shell}", "app/1:v1,./x.squashfs", {"ZDOTDIR": "/z", "PS1": "> "})
    assert start.command[0] == f"/usr/bin/{shell}"
    told = " ".join([*start.command, *start.environ.values()])
    assert ("[app/1,x.squashfs] " in told) == (shell not in ("tcsh", "csh", "nushell"))
    for word in start.command[1:]:
        assert not word.startswith("/") or os.path.exists(word)


def test_csh_is_told_by_its_first_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from uenvd.ctl import shells

    monkeypatch.setattr(shells, "CSH_START", str(tmp_path / "csh.cshrc"))
    assert first_files("/bin/tcsh", "app/1") == {}
    (tmp_path / "csh.cshrc").write_text("umask 22")
    (text,) = first_files("/bin/tcsh", "app/1").values()
    assert text.startswith(b"umask 22\nif ($?prompt) ")
    assert b"[app/1] " in text
    assert first_files("/bin/bash", "app/1") == {}


def test_include_lines_of_ssh() -> None:
    text = (
        'Include a.conf\n  include /x/*.conf /y.conf\nINCLUDE="/quoted"\n# Include /no\nIncludes /no\n'
        "Include ~/.ssh/mine %d/token ${HOME}/env\nHost x\n\tInclude\tlate\n"
    )
    assert included_patterns(text) == [
        "/etc/ssh/a.conf", "/x/*.conf", "/y.conf", "/quoted", "/etc/ssh/late",
    ]  # fmt: skip


def test_ssh_files_are_found_through_includes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    main = tmp_path / "ssh_config"
    main.write_text(f"Include {tmp_path}/d/*.conf\nInclude {tmp_path}/no/such\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/1.conf").write_text(f"Include {tmp_path}/d/1.conf {tmp_path}/policy\n")
    (tmp_path / "d/.hidden.conf").write_text("x\n")
    (tmp_path / "d/2.conf").symlink_to(tmp_path / "policy")
    (tmp_path / "d/3.conf").write_text("writable\n")
    (tmp_path / "d/3.conf").chmod(0o666)
    os.mkfifo(tmp_path / "d/4.conf")
    (tmp_path / "policy").write_text("Ciphers x\n")
    monkeypatch.setattr(overlay, "SSH_ROOTS", (str(main), str(tmp_path / "none")))
    if os.geteuid() != 0:
        assert overlay.ssh_includes() == {}
        return
    assert overlay.ssh_includes() == {
        str(tmp_path / "d/1.conf"): f"Include {tmp_path}/d/1.conf {tmp_path}/policy\n".encode(),
        str(tmp_path / "policy"): b"Ciphers x\n",
    }
