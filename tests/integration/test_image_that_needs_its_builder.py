"""An image that depends on the machine that built it: each planted fault is found, and nothing in a sound one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.publishing import env_json

PREFIX = "/user-environment"
PROGRAM = Path(sys.executable).parent / "uenvd-publish"
LOADER = "/lib64/ld-linux-x86-64.so.2"
Plant = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a program, a library of its own, scripts, links and byte code, all as they should be."""
    tree = tmp_path_factory.mktemp("sound")
    work = tmp_path_factory.mktemp("work")
    for name in ("bin", "lib", "meta"):
        (tree / name).mkdir()
    (work / "own.c").write_text("int own(void) { return 7; }\n")
    (work / "main.c").write_text("int own(void);\nint main(void) { return own(); }\n")
    library, program = tree / "lib/libown.so.1", tree / "bin/program"
    run("gcc", "-shared", "-fPIC", "-Wl,-soname,libown.so.1", "-o", library, work / "own.c")
    run("gcc", "-o", program, work / "main.c", library, "-Wl,-rpath,$ORIGIN/../lib")
    (tree / "lib/libown.so").symlink_to("libown.so.1")
    (tree / "bin/python3").symlink_to(f"{PREFIX}/bin/program")
    script(tree / "bin/script", f"#!{PREFIX}/bin/python3\n")
    script(tree / "bin/shell", "#!/bin/sh\n")
    script(tree / "bin/env", "#!/usr/bin/env python3\n")
    (tree / "lib/module.py").write_text("x = 1\n")
    run(
        "/usr/bin/python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", tree, "-p", PREFIX,
        tree / "lib",
    )  # fmt: skip
    (tree / "meta/env.json").write_bytes(env_json("sound"))
    return tree


def run(*command: str | Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    subprocess.run([str(word) for word in command], check=True, capture_output=True, env=environment)


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def squash(tree: Path, image: Path) -> Path:
    run("mksquashfs", tree, image, "-quiet", "-no-progress", "-all-root", "-noappend")
    return image


def audit(image: Path, *options: str) -> tuple[int, list[dict[str, str]], str]:
    done = subprocess.run(
        [PROGRAM, "audit", image, "--json", *options], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def other_loader(tree: Path) -> None:
    run("patchelf", "--set-interpreter", "/opt/builder/lib/ld-linux-x86-64.so.2", tree / "bin/program")


def foreign_run_path(tree: Path) -> None:
    run("patchelf", "--set-rpath", "$ORIGIN/../lib:/opt/builder/lib", tree / "bin/program")


def leaving_run_path(tree: Path) -> None:
    run("patchelf", "--set-rpath", "$ORIGIN/../lib:$ORIGIN/../../elsewhere", tree / "bin/program")


def empty_run_path(tree: Path) -> None:
    run("patchelf", "--set-rpath", "$ORIGIN/../lib:", tree / "bin/program")


def library_of_the_host(tree: Path) -> None:
    run("patchelf", "--add-needed", "libsomething.so.3", tree / "bin/program")


def library_out_of_reach(tree: Path) -> None:
    run("patchelf", "--remove-rpath", tree / "bin/program")


def library_by_path(tree: Path) -> None:
    run("patchelf", "--replace-needed", "libown.so.1", "/opt/builder/libown.so.1", tree / "bin/program")


def foreign_first_line(tree: Path) -> None:
    script(tree / "bin/script", "#!/opt/builder/bin/python3\n")


def missing_first_line(tree: Path) -> None:
    script(tree / "bin/script", f"#!{PREFIX}/bin/python4\n")


def long_first_line(tree: Path) -> None:
    script(tree / "bin/script", f"#!{PREFIX}/{'./' * 60}bin/python3\n")


def absolute_link(tree: Path) -> None:
    (tree / "lib/out").symlink_to("/usr/lib")


def climbing_link(tree: Path) -> None:
    (tree / "lib/out").symlink_to("../../usr/lib")


def dangling_link(tree: Path) -> None:
    (tree / "lib/out").symlink_to("nothing")


def build_path_in_text(tree: Path) -> None:
    (tree / "lib/config").write_text("compiler = /uenvd-build/bin/cc\n")


def build_path_in_binary(tree: Path) -> None:
    (tree / "lib/data").write_bytes(b"\0\1" * 300_000 + b"/home/builder/work\0")


def closed_file(tree: Path) -> None:
    (tree / "lib/module.py").chmod(0o600)


def closed_directory(tree: Path) -> None:
    (tree / "lib").chmod(0o700)


def setuid(tree: Path) -> None:
    (tree / "bin/shell").chmod(0o4755)


def pipe(tree: Path) -> None:
    os.mkfifo(tree / "lib/pipe")


def dated_byte_code(tree: Path) -> None:
    run("/usr/bin/python3", "-m", "compileall", "-q", "-f", "--invalidation-mode", "timestamp", tree / "lib")


def damaged_program(tree: Path) -> None:
    data = (tree / "lib/libown.so.1").read_bytes()
    (tree / "lib/broken.so").write_bytes(data[:80])


FAULTS: list[tuple[Plant, str, str, str]] = [
    (other_loader, "interpreter", "bin/program", "/opt/builder/lib/ld-linux"),
    (foreign_run_path, "run-path", "bin/program", "/opt/builder/lib is outside"),
    (leaving_run_path, "run-path", "bin/program", "$ORIGIN/../../elsewhere"),
    (empty_run_path, "run-path", "bin/program", "empty entry"),
    (library_of_the_host, "needed", "bin/program", "libsomething.so.3 of the host"),
    (library_out_of_reach, "needed", "bin/program", "(lib/libown.so.1) but not on its run path"),
    (library_by_path, "needed", "bin/program", "/opt/builder/libown.so.1"),
    (foreign_first_line, "shebang", "bin/script", "/opt/builder/bin/python3"),
    (missing_first_line, "shebang", "bin/script", "does not exist"),
    (long_first_line, "shebang", "bin/script", "longer than"),
    (absolute_link, "link", "lib/out", "/usr/lib is absolute"),
    (climbing_link, "link", "lib/out", "leaves the image"),
    (dangling_link, "link", "lib/out", "leads nowhere"),
    (build_path_in_text, "build-path", "lib/config", "/uenvd-build"),
    (build_path_in_binary, "build-path", "lib/data", "/home/builder/work"),
    (closed_file, "permission", "lib/module.py", "0600"),
    (closed_directory, "permission", "lib", "0700"),
    (setuid, "special", "bin/shell", "setuid"),
    (pipe, "special", "lib/pipe", "no file"),
    (dated_byte_code, "bytecode", "lib/__pycache__/module.cpython-311.pyc", "time stamp"),
    (damaged_program, "damaged", "lib/broken.so", "damaged ELF"),
]


@pytest.mark.parametrize(
    ("plant", "kind", "path", "detail"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS]
)
def test_a_planted_fault_is_found(
    sound: Path, tmp_path: Path, plant: Plant, kind: str, path: str, detail: str
) -> None:
    tree = tmp_path / "tree"
    run("cp", "-a", sound, tree)
    plant(tree)
    status, findings, errors = audit(squash(tree, tmp_path / "image"), "--build-path", "/home/builder/work")
    assert [(finding["path"], finding["kind"]) for finding in findings] == [(path, kind)]
    assert detail in findings[0]["detail"]
    assert status == 98
    assert "1 findings" in errors


def test_nothing_is_found_in_a_sound_image(sound: Path, tmp_path: Path) -> None:
    assert audit(squash(sound, tmp_path / "image"))[:2] == (0, [])


def test_a_library_that_the_image_declares_may_be_the_hosts(sound: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    run("cp", "-a", sound, tree)
    library_of_the_host(tree)
    assert audit(squash(tree, tmp_path / "1"), "--allow", "libsome*.so.*")[:2] == (0, [])
    (tree / "meta/host.json").write_text(json.dumps({"version": 1, "allowed": ["libsomething.so.*"]}))
    assert audit(squash(tree, tmp_path / "2"))[:2] == (0, [])


def test_an_image_that_does_not_say_where_it_is_mounted(sound: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    run("cp", "-a", sound, tree)
    (tree / "meta/env.json").unlink()
    image = squash(tree, tmp_path / "image")
    done = subprocess.run([PROGRAM, "audit", image], capture_output=True, text=True, check=False)
    assert done.returncode == 66
    assert "--prefix" in done.stderr
    assert audit(image, "--prefix", PREFIX)[:2] == (0, [])
    status, findings, _errors = audit(image, "--prefix", "/somewhere/else")
    assert status == 98
    assert {finding["kind"] for finding in findings} == {"link", "shebang"}
