"""The script of the smoke tests, run by the shell on trees with one fault each."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from uenvd.errors import ConfigError
from uenvd.publish.smoke import OK, PROBLEM, SmokeTests, check_views, parse_smoke, scripts
from uenvd.views import EnvOp, ImageMeta, View

ENVIRON = {"PATH": "/usr/bin:/bin", "HOME": "/"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    root = tmp_path / "it's a mount"
    (root / "bin").mkdir(parents=True)
    (root / "bin/say").write_text("#!/bin/sh\necho $WORD\n")
    (root / "bin/say").chmod(0o755)
    shutil.copy("/bin/true", root / "bin/elf")
    return root


def view(image: Path, *more: EnvOp, loadable: bool = True) -> View:
    ops: list[EnvOp] = [("prepend", "PATH", (f"{image}/bin",)), ("set", "WORD", "it's"), *more]
    return View("default", "", tuple(ops), loadable)


def smoke(image: Path, tests: SmokeTests | None = None, one: View | None = None) -> str:
    meta = ImageMeta("app", "", str(image), None, (one or view(image),))
    (script,) = scripts(meta, str(image), tests or SmokeTests(), ENVIRON)
    work = image.parent / "work"
    work.mkdir(exist_ok=True)
    (work / "s.sh").write_text(script.text)
    done = subprocess.run(
        ["sh", "s.sh"], cwd=work, env=ENVIRON, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stderr == ""
    assert (done.returncode == 0) == (OK in done.stdout)
    assert (done.returncode == 0) == (PROBLEM not in done.stdout)
    return done.stdout


def test_a_sound_image_passes(image: Path) -> None:
    assert f"{OK}: 2 programs, 0 libraries, 2 commands" in smoke(
        image, SmokeTests({"default": ('say | grep -q "it\'s"', 'test -z "$LD_LIBRARY_PATH"')})
    )


def test_an_image_without_views(image: Path) -> None:
    (script,) = scripts(None, str(image), SmokeTests(), ENVIRON)
    (image.parent / "s.sh").write_text(script.text)
    done = subprocess.run(
        ["sh", "s.sh"], cwd=image.parent, env=ENVIRON, capture_output=True, text=True, check=False
    )
    assert (done.returncode, f"{OK}: 2 programs" in done.stdout) == (0, True), done


def _link(image: Path) -> None:
    (image / "bin/dead").symlink_to("/nowhere/at/all")


def _interpreter(image: Path) -> None:
    (image / "bin/py").write_text("#!/opt/builder/bin/python3 -I\n")
    (image / "bin/py").chmod(0o755)


def _env(image: Path) -> None:
    (image / "bin/py").write_text("#!/usr/bin/env no-such-python\n")
    (image / "bin/py").chmod(0o755)


def _empty(image: Path) -> None:
    shutil.rmtree(image)
    image.mkdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_link, "bin/dead leads nowhere"),
        (_interpreter, "bin/py: there is no /opt/builder/bin/python3"),
        (_env, "bin/py: there is no no-such-python"),
        (_empty, "nothing is mounted at"),
    ],
)
def test_each_fault_is_a_problem(image: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(image)
    assert said in smoke(image)


def test_a_library_that_is_missing(image: Path, tmp_path: Path) -> None:
    (tmp_path / "lib.c").write_text("int f(void) { return 0; }\n")
    (tmp_path / "main.c").write_text("int f(void); int main(void) { return f(); }\n")
    (image / "lib").mkdir()
    soname = "-Wl,-soname,libspecial.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", soname, "-o", image / "lib/libspecial.so.1", tmp_path / "lib.c"],
        check=True,
    )
    subprocess.run(
        ["gcc", "-o", image / "bin/user", tmp_path / "main.c", image / "lib/libspecial.so.1", f"-Wl,-rpath,{image}/lib"], check=True
    )  # fmt: skip
    assert "3 programs, 1 libraries" in smoke(image)
    (image / "lib/libspecial.so.1").unlink()
    assert "bin/user: libspecial.so.1 is not found" in smoke(image)
    # What comes with a driver may be missing, if the recipe says so.
    assert OK in smoke(image, SmokeTests(host_libraries=("libspecial.so.*",)))


@pytest.mark.parametrize(
    ("command", "said"),
    [("false", "false: status 1"), ("no-such-program", "not found"), ("say; exit 3", "it's")],
)
def test_a_command_that_fails(image: Path, command: str, said: str) -> None:
    assert said in smoke(image, SmokeTests({"default": (command,)}))


def test_a_view_that_leads_nowhere_or_cannot_be_loaded(image: Path) -> None:
    other = View("default", "", (("prepend", "PATH", (f"{image}/none/bin",)),))
    assert "nothing that the view default puts into PATH is in the image" in smoke(image, one=other)
    assert "does not say what the view default does" in smoke(image, one=view(image, loadable=False))


def test_the_hosts_tools_are_used_whatever_the_view_does(image: Path) -> None:
    for name in ("ls", "head", "od", "tr", "sed", "grep"):
        (image / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (image / "bin" / name).chmod(0o755)
    assert OK in smoke(image)


def test_what_a_recipe_may_add() -> None:
    text = "commands:\n  default: [python3 --version]\nhost_libraries: [libfabric.so.*]\n"
    tests = parse_smoke(text, "smoke.yaml")
    assert tests == SmokeTests({"default": ("python3 --version",)}, ("libfabric.so.*",))
    assert check_views(tests, None) == "default"
    assert check_views(tests, ImageMeta("a", "", None, None, (View("default", "", ()),))) is None
    for wrong, message in (
        ("commands: {default: {a: b}}", "smoke.yaml:1: commands.default"),
        ("host_libraries: ['a;b']", "no pattern"),
        ("comands: {}", "smoke.yaml:1: comands"),
    ):
        with pytest.raises(ConfigError, match=r"smoke\.yaml:1") as caught:
            parse_smoke(wrong, "smoke.yaml")
        assert message in caught.value.message
