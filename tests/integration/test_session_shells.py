"""``uenvctl start`` with whatever shell the user has, and whatever his shell's files do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.sessions import MOUNT, SYSTEM_PATH, UENVCTL, SessionSite, session_site

pytestmark = pytest.mark.usefixtures("node")

VIEW = f"{MOUNT}/bin:{MOUNT}/more bin"
PROMPT = r"\[app\.squashfs\] "


@pytest.fixture(scope="module")
def site_for_all() -> Iterator[SessionSite]:
    if os.geteuid() != 0:
        pytest.skip("needs root to make an ordinary user")
    with session_site() as made:
        yield made


@pytest.fixture
def site(site_for_all: SessionSite) -> Iterator[SessionSite]:
    """The site with an empty home before and after."""
    yield site_for_all
    for path in sorted(site_for_all.user.home.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def _files(site: SessionSite) -> None:
    """Give every shell a file of the user's that sets a prompt."""
    site.write(".bashrc", "PS1='mine> '\nalias hi='echo from bashrc'\n")
    site.write(".zshrc", "PS1='mine> '\nalias hi='echo from zshrc'\n")
    site.write(".zshenv", "export FROM_ZSHENV=yes\n")
    site.write(".tcshrc", 'set prompt = "mine> "\nalias hi echo from tcshrc\n')
    site.write(
        ".config/fish/config.fish",
        "function fish_prompt; echo -n 'mine> '; end\nfunction hi; echo from fishrc; end\n",
    )
    site.write(".local/share/fish/fish_history", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh", "fish"])
def test_the_prompt_shows_the_session_after_the_users_files(site: SessionSite, shell: str) -> None:
    _files(site)
    path = f"/usr/bin/{shell}"
    with site.start("--view=default", site.image, env=site.environ(SHELL=path)) as terminal:
        terminal.expect(PROMPT + "mine> ")
        terminal.type("hi; say; echo status-$WORD")
        terminal.expect(f"^from {shell}rc")
        terminal.expect("^hello")
        terminal.expect("^status-hello")
        terminal.expect(PROMPT + "mine> ")
        terminal.type("exit 7")
        assert terminal.finish() == 7
    assert "uenvctl" not in terminal.text


@pytest.mark.parametrize(("shell", "prompt"), [("/bin/sh", r"[$%#>] "), ("/bin/dash", r"\$ ")])
def test_plain_shells(site: SessionSite, shell: str, prompt: str) -> None:
    with site.start("--view=default", site.image, env=site.environ(SHELL=shell)) as terminal:
        terminal.expect(PROMPT + prompt)
        terminal.type("say; exit 3")
        terminal.expect("^hello")
        assert terminal.finish() == 3


@pytest.mark.parametrize("shell", ["/no/such/shell", "/usr/sbin/nologin", "bash", "/etc/passwd", "/usr"])
def test_a_shell_that_cannot_be_run(site: SessionSite, shell: str) -> None:
    done = site.run(
        UENVCTL, "start", "--view=default", site.image, stdin="say; echo $0\n", env=site.environ(SHELL=shell)
    )
    assert (done.returncode, done.stdout) == (0, "hello\n/bin/bash\n")
    assert (
        done.stderr == f"uenvctl: $SHELL is {shell}, which is no shell that can be run; this is /bin/bash\n"
    )


def test_without_shell_variable(site: SessionSite) -> None:
    environ = site.environ()
    del environ["SHELL"]
    done = site.run(UENVCTL, "start", "--view=default", site.image, stdin="say; echo $0\n", env=environ)
    assert (done.stdout, done.stderr) == ("hello\n/bin/bash\n", "")


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "tcsh", "fish"])
def test_commands_piped_in(site: SessionSite, shell: str) -> None:
    environ = site.environ(SHELL=f"/usr/bin/{shell}")
    done = site.run(UENVCTL, "start", "--view=default", site.image, stdin="say\nexit 5\n", env=environ)
    assert (done.returncode, done.stdout, done.stderr) == (5, "hello\n", "")


def test_variables_of_ours_do_not_reach_the_users_programs(site: SessionSite) -> None:
    for shell in ("bash", "zsh"):
        with site.start(site.image, env=site.environ(SHELL=f"/usr/bin/{shell}")) as terminal:
            terminal.type("env | grep -i -e uenvctl_ -e _uenvd -e zdotdir; echo end-$?")
            terminal.expect("^end-1")
            terminal.type("exit")
            terminal.finish()


def test_zdotdir_of_the_user(site: SessionSite) -> None:
    site.write("z/.zshrc", "PS1='z> '\n")
    home = site.user.home
    with site.start(site.image, env=site.environ(SHELL="/bin/zsh", ZDOTDIR=f"{home}/z")) as terminal:
        terminal.expect(PROMPT + "z> ")
        terminal.type("echo at-$ZDOTDIR; zsh -ic 'echo in-$ZDOTDIR'")
        terminal.expect(rf"^at-{home}/z")
        terminal.expect(rf"^in-{home}/z")
        terminal.type("exit")
        terminal.finish()


def test_prompts_that_are_made_anew_each_time(site: SessionSite) -> None:
    site.write(".bashrc", "PROMPT_COMMAND='PS1=\"made> \"'\n")
    site.write(".zshrc", "precmd() { PS1='made> ' }\n")
    for shell in ("bash", "zsh"):
        with site.start(site.image, env=site.environ(SHELL=f"/usr/bin/{shell}")) as terminal:
            terminal.expect(PROMPT + "made> ")
            terminal.type("true")
            terminal.expect(PROMPT + "made> ")
            terminal.type("exit")
            terminal.finish()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_startup_file_that_shadows_the_view(site: SessionSite, shell: str) -> None:
    for name in ("say", "other"):
        site.write(f"bin/{name}", "#!/bin/sh\necho shadow\n", mode=0o755)
    site.write(f".{shell}rc", f"export PATH={site.user.home}/bin:$PATH\n")
    with site.start("--view=default", site.image, env=site.environ(SHELL=f"/usr/bin/{shell}")) as terminal:
        terminal.expect(
            rf"^uenvctl: ~/\.{shell}rc puts other programs before those of the session: {site.user.home}/bin/say$"
        )
        terminal.expect("^hint: ")
        terminal.type("say")
        terminal.expect("^shadow")
        terminal.type("exit")
        terminal.finish()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_startup_file_that_resets_path(site: SessionSite, shell: str) -> None:
    site.write(f".{shell}rc", f"PATH={SYSTEM_PATH}\n")
    with site.start("--view=default", site.image, env=site.environ(SHELL=f"/usr/bin/{shell}")) as terminal:
        terminal.expect(rf"^uenvctl: ~/\.{shell}rc has removed {VIEW} from PATH; it was put back")
        terminal.type('echo "<$PATH>"; say')
        terminal.expect(f"^<{VIEW}:{SYSTEM_PATH}")
        terminal.expect("^hello")
        terminal.type("exit")
        terminal.finish()


@pytest.mark.parametrize(
    "rc",
    [
        "export PATH=$PATH:/opt/late\n",
        "export PATH=$HOME/empty:$PATH\n",
        'if [ -z "$UENV_MOUNT_LIST" ]; then export PATH=$HOME/bin:$PATH; fi\n',
    ],
)
def test_a_startup_file_that_does_no_harm(site: SessionSite, rc: str) -> None:
    site.write("bin/say", "#!/bin/sh\necho shadow\n", mode=0o755)
    site.write(".bashrc", rc)
    with site.start("--view=default", site.image) as terminal:
        terminal.type("say; exit")
        terminal.expect("^hello")
        terminal.finish()
    assert "uenvctl: " not in terminal.text


def test_the_systems_bashrc_is_read_once(site: SessionSite) -> None:
    rc = site.directory / "bash.bashrc"
    rc.write_text("echo system file\n")
    with site.start(site.image, replaced={"/etc/bash.bashrc": rc}) as terminal:
        terminal.type("exit")
        terminal.finish()
    assert terminal.text.count("system file") == 1


def test_a_session_in_a_session_is_refused_with_a_way_out(site: SessionSite) -> None:
    for command in (["start"], ["run"]):
        done = site.inside(UENVCTL, *command, site.image, "true") if command == ["run"] else site.inside(
            UENVCTL, *command, site.image
        )  # fmt: skip
        assert done.returncode == 93
        assert f"mounted already is {site.image} at {MOUNT}" in done.stderr
        assert "hint: leave it first: exit" in done.stderr
    done = site.inside("env", "SLURM_JOB_ID=1", UENVCTL, "start", site.image)
    assert "hint: in a job: srun --uenv=LABEL" in done.stderr


def test_nothing_is_left_in_the_home(site: SessionSite) -> None:
    with site.start(site.image, env=site.environ(SHELL="/usr/bin/zsh")) as terminal:
        terminal.type("exit")
        terminal.finish()
    left: list[Path] = list(site.user.home.iterdir())
    assert left == []
