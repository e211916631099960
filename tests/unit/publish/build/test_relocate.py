"""Run paths: what a change must do, on values only."""

from __future__ import annotations

from uenvd.publish.build.elf import Elf
from uenvd.publish.build.relocate import plan

PREFIX = "/user-environment"
PLACES = {"libown.so.1": (f"{PREFIX}/env/default/lib",), "libz.so.1": (f"{PREFIX}/python-3.11/lib",)}


def elf(*needed: str, run_path: tuple[str, ...] = (), has_rpath: bool = False) -> Elf:
    return Elf("x86_64", None, None, needed, run_path, has_rpath, None)


def run_path(facts: Elf, path: str = f"{PREFIX}/env/default/bin/program") -> tuple[str, ...] | None:
    change = plan(path, facts, PLACES, [PREFIX])
    return None if change is None else change.run_path


def test_what_is_right_stays_as_it_is() -> None:
    assert run_path(elf("libc.so.6")) is None
    assert run_path(elf("libown.so.1", run_path=("$ORIGIN/../lib",))) is None
    assert run_path(elf("libown.so.1", run_path=("${ORIGIN}/../lib",))) is None


def test_a_library_of_the_image_is_reached_relative_to_the_object() -> None:
    assert run_path(elf("libown.so.1", "libz.so.1")) == ("$ORIGIN/../lib", "$ORIGIN/../../../python-3.11/lib")
    assert run_path(elf("libown.so.1"), f"{PREFIX}/env/default/lib/libother.so") == ("$ORIGIN",)


def test_what_leads_out_of_the_image_is_dropped() -> None:
    foreign = ("/opt/builder/lib", "", "$ORIGIN/../../../../usr/lib", "lib", "/user-environment-2/lib")
    assert run_path(elf("libown.so.1", run_path=(*foreign, "$ORIGIN/../lib"))) == ("$ORIGIN/../lib",)
    assert run_path(elf(run_path=foreign)) == ()


def test_absolute_paths_inside_become_relative_and_single() -> None:
    absolute = f"{PREFIX}/env/default/lib"
    assert run_path(elf("libown.so.1", run_path=(absolute, f"{absolute}/"))) == ("$ORIGIN/../lib",)


def test_an_rpath_stays_one() -> None:
    change = plan(f"{PREFIX}/lib/a.so", elf("libz.so.1", run_path=("/x",), has_rpath=True), PLACES, [PREFIX])
    assert change is not None
    assert change.rpath
