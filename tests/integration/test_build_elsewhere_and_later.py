"""The same recipe built by somebody else, elsewhere, on another day: the same bytes. And builds that fail say why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.building import (
    DOWNLOADS,
    Wheel,
    library_that_lives_later,
    make_cache,
    make_recipe,
    make_wheel,
    needed_packages,
)
from support.publishing import image_meta
from support.users import TestUser, ordinary_user
from uenvd.errors import AuditFailed, BuildFailed, DigestMismatch
from uenvd.publish.build import Built, build
from uenvd.publish.recipe import load_recipe

PROGRAMS = Path(sys.executable).parent
MOUNT = "/nowhere-on-this-machine/deeper"
"""Builds need no such directory."""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that every user can enter."""
    if os.geteuid() != 0:
        pytest.skip("needs root: makes an ordinary user")
    missing = needed_packages()
    if missing:
        pytest.skip(f"the packages of the interpreter are neither in {DOWNLOADS} nor to be had: {missing}")
    import tempfile

    with tempfile.TemporaryDirectory(prefix="uenvd-test-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def wheel(place: Path) -> Wheel:
    return make_wheel(place)


@pytest.fixture(scope="module")
def cache(place: Path, wheel: Wheel) -> Path:
    return make_cache(place / "cache", wheel)


@pytest.fixture(scope="module")
def first(place: Path, wheel: Wheel, cache: Path) -> Built:
    """Built by root, here, now."""
    recipe = make_recipe(place / "first", wheel, mount=MOUNT)
    return build(load_recipe(recipe), place / "first/out", cache=cache)


@pytest.fixture(scope="module")
def user(place: Path) -> Iterator[TestUser]:
    with ExitStack() as stack:
        yield stack.enter_context(ordinary_user(place))


def as_user(
    user: TestUser, *command: str | Path, host_name: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    words = [
        "setpriv", "--reuid", str(user.uid), "--regid", str(user.gid), "--clear-groups", *map(str, command),
    ]  # fmt: skip
    if host_name:
        words = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host_name, *words]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=120, cwd=user.home, env={**user.environ(), **variables}
    )  # fmt: skip


def test_same_digest_by_an_ordinary_user_elsewhere_and_later(
    place: Path, wheel: Wheel, cache: Path, first: Built, user: TestUser
) -> None:
    recipe = make_recipe(user.home / "another/path", wheel, mount=MOUNT)
    later = library_that_lives_later(place)
    script = (
        "import os, sys, pathlib\n"
        "from uenvd.publish.build import build\n"
        "from uenvd.publish.recipe import load_recipe\n"
        "os.umask(0o077)\n"
        "recipe, out, cache, later = map(pathlib.Path, sys.argv[1:])\n"
        "print(build(load_recipe(recipe), out, cache=cache, environment={'LD_PRELOAD': str(later)}).digest)\n"
    )
    done = as_user(
        user, sys.executable, "-c", script, recipe, user.home / "out", cache, later,
        host_name="another-host", LD_PRELOAD=str(later), TZ="Asia/Tokyo",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == first.digest
    there = json.loads((user.home / "out/tiny-1.0.meta/configure.json").read_text())
    here = json.loads((first.meta_dir / "configure.json").read_text())
    assert (there["user"], there["host"]) == (user.name, "another-host")
    assert there["time"][:4] > here["time"][:4], "its clock was 400 days on"
    assert here["recipe"] == there["recipe"]
    assert "packages" in (user.home / "out/tiny-1.0.meta/build.log").read_text()
    assert not list((user.home / "out").glob(".build-*"))
    assert not Path(MOUNT).exists()


def test_what_is_in_it(first: Built) -> None:
    meta = image_meta(first.image)
    assert meta is not None
    assert (meta.name, meta.mount, meta.default_view) == ("tiny", MOUNT, None)
    views = {view.name: {op[1]: op for op in view.ops} for view in meta.views}
    assert views["default"]["PATH"] == ("prepend", "PATH", (f"{MOUNT}/env/default/bin",))
    assert views["develop"]["TINY_ROOT"] == ("set", "TINY_ROOT", f"{MOUNT}/env/default")
    assert views["develop"]["UNWANTED"] == ("unset", "UNWANTED")
    assert "CPATH" in views["develop"], "a virtual environment has include/"
    assert views["develop"]["CPATH"] == ("prepend", "CPATH", (f"{MOUNT}/env/default/include",))
    host = json.loads((first.meta_dir / "host.json").read_text())
    assert host["loader"] == ["/lib64/ld-linux-x86-64.so.2"]
    assert "libc.so.6" in host["libraries"]
    assert host["glibc"].startswith("2.")
    assert (first.meta_dir / "recipe/interpreter.lock").is_file()
    statistics = subprocess.run(
        ["unsquashfs", "-s", first.image], capture_output=True, text=True, check=True
    ).stdout
    assert "Compression zstd" in statistics
    assert "Number of fragments 0" in statistics


@pytest.fixture
def inside(
    first: Built, user: TestUser, node: None
) -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    """Run a script in a session of the image; its mount point exists for the test only."""
    Path(MOUNT).mkdir(parents=True)
    try:
        yield lambda script: as_user(
            user, PROGRAMS / "uenvctl", "run", first.image, "--view", "default", "--", "bash", "-c", script,
            UENVD_SOCKET="/nonexistent", PATH=f"{PROGRAMS}:{os.defpath}",
        )  # fmt: skip
    finally:
        Path(MOUNT).rmdir()
        Path(MOUNT).parent.rmdir()


def test_python_and_venv_work_inside(
    inside: Callable[[str], subprocess.CompletedProcess[str]], user: TestUser
) -> None:
    environment = user.home / "venv"
    done = inside(
        f"set -e; tiny; command -v python3; python3 -m venv {environment}; {environment}/bin/pip --version; "
        f"{environment}/bin/python3 -c 'import sys; print(sys.base_prefix)'; tr a-z A-Z < /etc/hostname > /dev/null; "
        "python3 -c 'import sys; print([path for path in sys.path if path and not path.startswith(sys.argv[1])])' "
        f"{MOUNT}; {environment}/bin/python -c 'import tiny' 2>&1 | tail -1"
    )
    assert done.returncode == 0, done.stderr
    said, program, pip, base, foreign, alone = done.stdout.splitlines()
    assert said == "tiny says 42"
    assert program == f"{MOUNT}/env/default/bin/python3"
    assert pip.startswith("pip 23.") and str(environment) in pip
    assert base == f"{MOUNT}/python-3.11"
    assert foreign == "[]", "nothing of the host's Python is on the path"
    assert alone == "ModuleNotFoundError: No module named 'tiny'", "of one's own means of one's own"


def test_a_plain_venv_on_top_of_the_view(
    inside: Callable[[str], subprocess.CompletedProcess[str]], user: TestUser, first: Built
) -> None:
    """It has the view's packages, the user's before them; outside it says which uenv to start."""
    environment = user.home / "on-top"
    use = f"{environment}/bin/python -c 'import tiny; print(tiny.__file__)'"
    made = inside(f"python3 -m venv --system-site-packages --without-pip {environment} && {use}")
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout == f"{MOUNT}/env/default/lib/python3.11/site-packages/tiny.py\n"
    own = environment / "lib/python3.11/site-packages/tiny.py"
    own.write_text("")
    assert inside(use).stdout == f"{own}\n"
    outside = as_user(user, f"{environment}/bin/python", "-c", "1")
    assert outside.returncode == 93
    assert f"python: this virtual environment needs the uenv {first.image}:{MOUNT}" in outside.stderr
    assert f"hint: start it: uenvctl start --view=tiny:default {first.image}:{MOUNT}" in outside.stderr


def test_built_once(first: Built, cache: Path) -> None:
    recipe = load_recipe(first.image.parent.parent / "tiny/1.0")
    again = build(recipe, first.image.parent, cache=cache)
    assert again.reused
    assert again.digest == first.digest


def test_the_command_prints_image_and_digest(first: Built) -> None:
    recipe = first.image.parent.parent / "tiny/1.0"
    done = subprocess.run(
        [PROGRAMS / "uenvd-publish", "build", recipe, "--out", first.image.parent],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{first.image} {first.digest}\n"


def test_other_bytes_under_a_pinned_name(place: Path, wheel: Wheel, tmp_path: Path) -> None:
    """A wheel that was exchanged in the cache is not used; pip, asked again, cannot find it (there is no such package)."""
    exchanged = make_cache(tmp_path / "cache", make_wheel(tmp_path, {"evil.py": b""}))
    recipe = load_recipe(make_recipe(tmp_path, wheel))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(exchanged / "wheels"))
        with pytest.raises(DigestMismatch, match="tiny"):
            build(recipe, tmp_path / "out", cache=exchanged)
        patch.delenv("PIP_FIND_LINKS")
        with pytest.raises(BuildFailed, match="pip cannot fetch"):
            build(recipe, tmp_path / "out", cache=exchanged)
    assert not (tmp_path / "out/tiny-1.0.squashfs").exists()


@pytest.mark.parametrize(
    ("post_install", "error", "words"),
    [
        ("echo lost; exit 3", BuildFailed, ["status 3", "lost", "tiny-1.0.log"]),
        ('ln -s /usr/lib "$UENV_ROOT/out"', AuditFailed, ["env/default/out", "link", "/usr/lib"]),
        ("getent hosts example.org || curl http://127.0.0.1", BuildFailed, ["status"]),
    ],
)
def test_a_build_that_fails_leaves_no_image(
    wheel: Wheel, cache: Path, tmp_path: Path, post_install: str, error: type[BuildFailed], words: list[str]
) -> None:
    recipe = load_recipe(make_recipe(tmp_path, wheel, post_install=post_install))
    with pytest.raises(error) as caught:
        build(recipe, tmp_path / "out", cache=cache)
    assert [word for word in words if word not in str(caught.value)] == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny-1.0.log"]


def test_a_library_that_nothing_provides(wheel: Wheel, cache: Path, tmp_path: Path) -> None:
    script = (
        'cp /bin/true "$UENV_ROOT/bin/needy"; patchelf --add-needed libmissing.so.1 "$UENV_ROOT/bin/needy"'
    )
    recipe = load_recipe(make_recipe(tmp_path, wheel, post_install=script))
    with pytest.raises(BuildFailed, match=r"bin/needy needs libmissing\.so\.1") as caught:
        build(recipe, tmp_path / "out", cache=cache)
    assert "host-libraries" in caught.value.hint
