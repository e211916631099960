"""Software compiled at its final prefix: the same bytes by whoever, wherever, whenever; without network; without anything of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from support.building import DOWNLOADS, library_that_lives_later
from support.sources import make_source_recipe, make_tarball, small_chain
from support.users import TestUser, ordinary_user
from uenvd.errors import BuildFailed, DigestMismatch, UenvError, UnknownLabel
from uenvd.oci.attach import META_TYPE, attach, directory_content
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import no_progress, open_remote
from uenvd.publish.build import Built, Site, build
from uenvd.publish.build.inputs import fetch_packages
from uenvd.publish.explain import why_not_there
from uenvd.publish.main import main
from uenvd.publish.push import Target, push_image
from uenvd.publish.recipe import load_recipe
from uenvd.publish.recipe.lockfile import read_interpreter_lock

PROGRAMS = Path(sys.executable).parent
SITE = Site(memory_bytes=1 << 29)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that every user can enter."""
    with tempfile.TemporaryDirectory(prefix="uenvd-test-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def tarball(place: Path) -> Path:
    make_tarball(place / "tiny-1.0.tar.gz")
    return place / "tiny-1.0.tar.gz"


@pytest.fixture(scope="module")
def first(place: Path, tarball: Path) -> Built:
    """Built here, now, by whoever runs the tests."""
    return build(
        load_recipe(make_source_recipe(place / "first", tarball)),
        place / "first/out",
        cache=place / "cache",
        site=SITE,
    )


@pytest.fixture(scope="module")
def user(place: Path) -> Iterator[TestUser]:
    if os.geteuid() != 0:
        pytest.skip("needs root: makes an ordinary user")
    with ExitStack() as stack:
        yield stack.enter_context(ordinary_user(place))


def test_same_digest_by_an_ordinary_user_elsewhere_and_later(
    place: Path, tarball: Path, first: Built, user: TestUser
) -> None:
    recipe = make_source_recipe(user.home / "another/path", tarball)
    (user.home / "build.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom uenvd.publish.build import Site, build\nfrom uenvd.publish.recipe import load_recipe\n"
        "print(build(load_recipe(Path(sys.argv[1])), Path('out'), cache=Path('cache'), site=Site(memory_bytes=1 << 29),\n"
        f"    environment={{'LD_PRELOAD': {str(library_that_lives_later(place))!r}}}).digest)\n"
    )
    words = [
        "setpriv",
        "--reuid",
        str(user.uid),
        "--regid",
        str(user.gid),
        "--clear-groups",
        str(PROGRAMS / "python"),
        "build.py",
        str(recipe),
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=user.home, env=user.environ(), timeout=120
    )
    assert done.stdout.strip() == first.digest, done.stderr


def session(image: Path, view: str, script: str, tmp_path: Path) -> str:
    done = subprocess.run(
        [PROGRAMS / "uenvctl", "run", image, "--view", view, "--", "sh", "-c", script],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60,
        env={"PATH": os.defpath, "HOME": str(tmp_path), "UENVD_SOCKET": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_programs_run_and_hold_nothing_of_the_build(first: Built, tmp_path: Path) -> None:
    assert session(first.image, "default", "tiny", tmp_path) == "42 7 tiny/tiny.c\n"
    listing = subprocess.run(
        ["unsquashfs", "-l", first.image], capture_output=True, text=True, check=True
    ).stdout
    assert "lib/libtiny.a\n" in listing
    assert "lib/libgfortran.so.5\n" in listing, "the compiler's libraries come along"
    assert "libtiny.la" not in listing


def test_users_compile_against_it(first: Built, tmp_path: Path) -> None:
    (tmp_path / "c.c").write_text(
        '#include <tiny.h>\n#include <stdio.h>\nint main(void) { return printf("%d\\n", tiny()) < 0; }\n'
    )
    (tmp_path / "f.f90").write_text("program f\n  use tinyf\n  print '(I0)', tiny_fortran()\nend program\n")
    script = "gcc c.c $(pkg-config --cflags --libs tiny) -o c && gfortran -I$CPATH f.f90 -ltiny -o f && env -i ./c && env -i ./f"
    assert session(first.image, "develop", script, tmp_path) == "42\n7\n"


def test_a_second_build_finds_it_there(first: Built, place: Path) -> None:
    assert build(
        load_recipe(place / "first/tiny/1.0"), place / "first/out", cache=place / "cache", site=SITE
    ).reused


def test_only_the_pinned_tool_chain_is_seen(place: Path, tarball: Path, tmp_path: Path) -> None:
    lock = tmp_path / "chain.lock"
    lock.write_text(small_chain())
    try:
        fetch_packages(read_interpreter_lock(lock), DOWNLOADS, lambda _text: None)
    except UenvError as error:
        pytest.skip(f"the packages are neither in {DOWNLOADS} nor to be had: {error.message}")
    package = "build: script\n      script: build"
    recipe = make_source_recipe(
        tmp_path, tarball, chain="toolchain.lock", package=package, hook="test ! -e /usr/bin/gcc"
    )
    config = recipe / "config.yaml"
    config.write_text(config.read_text() + "  strip: false\n")
    (recipe / "toolchain.lock").write_text(lock.read_text())
    (recipe / "build").write_text(
        '#!/bin/sh\nset -eu\nls -A / > "$UENV_ROOT/bin/seen"\ncat tiny.h\ntest ! -e /usr/bin/python3 -a ! -e /var/tmp -a -c /dev/null\n'
        'test "$(readlink /bin)" = usr/bin\n'
    )
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "debs").symlink_to(DOWNLOADS / "debs")
    built = build(load_recipe(recipe), tmp_path / "out", cache=cache, site=SITE)
    seen = subprocess.run(
        ["unsquashfs", "-cat", built.image, "env/default/bin/seen"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = {
        "bin",
        "dev",
        "etc",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "proc",
        "sbin",
        "tmp",
        "uenvd-build",
        "user-environment",
        "usr",
    }
    assert set(seen.split()) == expected


FAILURES = [
    ("build: configure\n      make: [nothing]", "No rule to make target 'nothing'"),
    ("build: script\n      script: build", "no network here"),
    ("build: configure\n      patches: [build]", "Only garbage was found in the patch input"),
]


@pytest.mark.parametrize(("package", "words"), FAILURES, ids=["make", "network", "patch"])
def test_a_build_that_fails_says_its_last_words(
    place: Path, tarball: Path, tmp_path: Path, package: str, words: str
) -> None:
    recipe = make_source_recipe(tmp_path, tarball)
    (recipe / "build").write_text(
        "#!/bin/sh\ngetent hosts localhost.example || cat < /dev/tcp/127.0.0.1/80 || echo no network here; exit 3\n"
    )
    path = recipe / "environments.yaml"
    path.write_text(path.read_text().replace("build: configure\n      check: [check]", package))
    with pytest.raises(BuildFailed, match=r"tiny-1\.0\.log") as caught:
        build(load_recipe(recipe), tmp_path / "out", cache=place / "cache", site=SITE)
    assert words in caught.value.message
    assert [left.name for left in (tmp_path / "out").iterdir()] == ["tiny-1.0.log"]


_CMAKE = {
    "CMakeLists.txt": "cmake_minimum_required(VERSION 3.10)\nproject(one C)\nadd_library(one SHARED tiny.c)\ninstall(TARGETS one)\n"
    "install(FILES tiny.h DESTINATION include)\nadd_custom_target(check COMMAND test -e ${CMAKE_CURRENT_SOURCE_DIR}/patched)\n",
}
_MESON = {
    "deeper/meson.build": "project('two', 'c')\none = meson.get_compiler('c').find_library('one')\n"
    "executable('two', 'two.c', dependencies: one, install: true)\n",
    "deeper/two.c": '#include <stdio.h>\n#include <tiny.h>\nint main(void) { return printf("%d %s\\n", tiny(), NAME) < 0; }\n',
}
_TWO = """tiny:
  packages:
    - {name: one, version: 1, source: one.tar.gz, build: cmake, check: [check], patches: [new.patch]}
    - name: two
      version: 2
      source: two.tar.gz
      build: meson
      directory: deeper
      options: [--strip]
      environment: {CFLAGS: -DNAME='"$@view_path@"'}
  views:
    default:
"""
_PATCH = "--- /dev/null\n+++ b/patched\n@@ -0,0 +1 @@\n+yes\n"


def test_one_package_by_cmake_and_one_by_meson_that_needs_it(tmp_path: Path) -> None:
    make_tarball(tmp_path / "one.tar.gz", _CMAKE)
    make_tarball(tmp_path / "two.tar.gz", _MESON)
    recipe = make_source_recipe(tmp_path, tmp_path / "one.tar.gz")
    (recipe / "environments.yaml").write_text(_TWO)
    (recipe / "new.patch").write_text(_PATCH)
    places = [word for name in ("one", "two") for word in ("--source", f"file://{tmp_path}/{name}.tar.gz")]
    assert main(["lock", str(recipe), *places, "--cache", str(tmp_path / "cache")]) == 0
    built = build(load_recipe(recipe), tmp_path / "out", cache=tmp_path / "cache", site=SITE)
    assert session(built.image, "default", "two", tmp_path) == "42 /user-environment/env/default\n"


def test_other_bytes_under_a_pinned_name(tarball: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny-1.0.tar.gz"
    other.write_bytes(tarball.read_bytes())
    recipe = make_source_recipe(tmp_path, other)
    make_tarball(other, {"tiny.h": "exchanged\n"})
    with pytest.raises(DigestMismatch, match="is not what the recipe pins"):
        build(load_recipe(recipe), tmp_path / "out", cache=tmp_path / "cache", site=SITE)


@pytest.mark.parametrize(
    "hook", ["", 'date +%N > "$UENV_ROOT/lib/when"; touch "$UENV_ROOT/lib/always"'], ids=["same", "differs"]
)
def test_check_builds_twice_and_names_what_differs(
    place: Path,
    tarball: Path,
    tmp_path: Path,
    hook: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UENVD_BUILD_MEMORY", "512M")
    recipe = make_source_recipe(tmp_path, tarball, hook=hook, package="build: script\n      script: build")
    (recipe / "build").write_text("#!/bin/sh\n")
    words = ["build", str(recipe), "--out", str(tmp_path / "out"), "--cache", str(place / "cache")]
    status = main([*words, "--check"])
    said = capsys.readouterr().err
    if not hook:
        assert (status, "the same image: sha256:" in said) == (0, True)
    else:
        assert status == BuildFailed.exit_status
        assert "env/default/lib/when: other content\n" in said
        assert "always" not in said
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []
    # Why the next one is built.
    assert main([*words, "--explain"]) == 0
    assert capsys.readouterr().out == ""
    (recipe / "build").write_text("#!/bin/sh\n# changed\n")
    assert main([*words, "--explain"]) == 0
    assert capsys.readouterr().out == "the recipe's file build has other contents\n"


def test_the_registry_says_why_its_image_will_not_do(
    first: Built, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = f"oci-layout:{tmp_path / 'registry'}"
    with closing(open_remote(parse_registry(registry))) as remote:
        repository = "build/here/any/tiny/1.0"
        pushed = push_image(
            remote, first.image, Target(repository, "content-1"), hashing=no_progress, progress=no_progress
        )
        attach(remote, repository, pushed.digest, META_TYPE, [directory_content(first.meta_dir, "meta")])
        recipe = tmp_path / "tiny/1.0"
        shutil.copytree(place / "first/tiny/1.0", recipe)
        assert why_not_there(load_recipe(recipe), remote, repository) == []
        hook = recipe / "post-install"
        hook.write_text("#!/bin/sh\n")
        assert why_not_there(load_recipe(recipe), remote, repository, environment={"CFLAGS": "-O3"}) == [
            "the recipe's file post-install is new",
            "the variable CFLAGS is new",
        ]
        assert why_not_there(load_recipe(recipe), remote, "build/here/any/tiny/2.0") == []
    words = ["build", str(recipe), "--explain", "--registry", registry, "--against"]
    assert main([*words, "build::tiny/1.0:content-1@here%any"]) == 0
    assert capsys.readouterr().out == "the recipe's file post-install is new\n"
    assert main([*words, "build::tiny/1.0:gone@here%any"]) == UnknownLabel.exit_status
