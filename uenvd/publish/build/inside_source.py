"""The builder ``source``, inside the sandbox: each package is unpacked, patched, compiled and installed at the final prefix, without network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from uenvd.publish.build import metadata, toolchain, unpack
from uenvd.publish.build.relocate import objects, relocate
from uenvd.publish.build.workshop import Workshop, step
from uenvd.publish.recipe import SourcePackage

NETWORK: Final = False
_ARCHIVE: Final = b"!<arch>\n"
_BATCH: Final = 200
_UNWANTED: Final = ("**/*.la", "**/__pycache__", "**/share/info/dir")
"""What names build-time paths, is made by the time of the day, or is rewritten by whoever installs next."""


def make(shop: Workshop) -> dict[str, Any]:
    """Build; return nothing that the parent does not know."""
    recipe = shop.recipe
    assert recipe.source is not None
    programs = shop.workspace / "tools"
    if shop.order.debs:
        step(f"unpacking a tool chain of {len(shop.order.debs)} Debian packages")
        root = shop.workspace / "toolchain"
        toolchain.unpack(shop.order.debs, root, shop.prefix, shop.run)
        libraries = toolchain.library_directories(root)
        toolchain.wrap_compilers(root, shop.environment["PATH"], programs)
        shop.root = root
    else:
        libraries = [toolchain.runtime_of_machine(shop.workspace / "runtime", shop.run)]
        toolchain.wrap_compilers(Path("/"), shop.environment["PATH"], programs)
    (shop.workspace / "source").mkdir()
    for environment in recipe.environments:
        target = Path(metadata.view_root(recipe, environment))
        for name in ("bin", "lib"):
            (target / name).mkdir(parents=True, exist_ok=True)
        for package in environment.packages:
            _Package(shop, package, target).build()
    shop.hook()
    _tidy(shop, strip=recipe.source.strip)
    step("making run paths relative")
    first = Path(metadata.view_root(recipe, recipe.environments[0]))
    relocate(shop.prefix, first / "lib", libraries, shop.rules, shop.run)
    for environment in recipe.environments:
        for name in ("bin", "lib"):
            place = Path(metadata.view_root(recipe, environment), name)
            if not any(place.iterdir()):
                place.rmdir()
    shop.describe()
    shop.squash()
    return {}


class _Package:
    """One package on its way."""

    def __init__(self, shop: Workshop, package: SourcePackage, target: Path) -> None:
        self.shop = shop
        self.package = package
        self.target = target
        self.top = shop.workspace / "source" / package.name
        self.place = self.top / package.directory
        self.jobs = package.jobs or len(os.sched_getaffinity(0))
        self.variables = _variables(shop, target) | {
            name: self._filled(value) for name, value in package.environment
        }

    def build(self) -> None:
        """Do all of it. Raises `BuildFailed`."""
        package = self.package
        step(f"unpacking {package.name} {package.version}")
        files = {name: Path(path) for name, path in self.shop.order.sources.items()}
        patches = unpack.unpack(package.source, files, self.top)
        patches += [self._copied(file) for file in package.patches]
        for patch in patches:
            self._run("patch", "-p1", "--batch", "--forward", "-i", str(patch), cwd=self.top)
        unpack.settle_times(self.top, self.shop.recipe.date_s)
        step(f"building {package.name} {package.version}")
        getattr(self, f"_by_{package.system}")()
        shutil.rmtree(self.top)

    def _by_configure(self) -> None:
        program = self.place / "configure"
        if program.is_file():
            program.chmod(0o755)  # repacked archives lose it
        self._run("./configure", f"--prefix={self.target}", *self._all(self.package.options))
        self._make()

    def _by_make(self) -> None:
        self._make(f"PREFIX={self.target}", f"prefix={self.target}")

    def _make(self, *settings: str) -> None:
        package = self.package
        self._run("make", f"-j{self.jobs}", *settings, *self._all(package.make))
        if package.check:
            self._run("make", *settings, *self._all(package.check))
        self._run("make", *settings, *self._all(package.install))

    def _by_cmake(self) -> None:
        build = str(self.top / "uenvd-cmake")
        self._run(
            "cmake", "-S", str(self.place), "-B", build, f"-DCMAKE_INSTALL_PREFIX={self.target}", "-DCMAKE_INSTALL_LIBDIR=lib",
            "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_RPATH={self.target}/lib", *self._all(self.package.options),
        )  # fmt: skip
        targets = [word for name in self._all(self.package.make) for word in ("--target", name)]
        self._run("cmake", "--build", build, "--parallel", str(self.jobs), *targets)
        for name in self._all(self.package.check):
            self._run("cmake", "--build", build, "--target", name)
        self._run("cmake", "--install", build)

    def _by_meson(self) -> None:
        build = str(self.top / "uenvd-meson")
        self._run(
            "meson", "setup", build, str(self.place), f"--prefix={self.target}", "--libdir=lib", "--buildtype=release",
            "--wrap-mode=nodownload", *self._all(self.package.options),
        )  # fmt: skip
        self._run("ninja", "-C", build, f"-j{self.jobs}", *self._all(self.package.make))
        for name in self._all(self.package.check):
            self._run("meson", "test", "-C", build, name)
        self._run("meson", "install", "-C", build, "--no-rebuild")

    def _by_script(self) -> None:
        script = self._copied(self.package.script)
        script.chmod(0o755)
        self.variables |= {
            "UENV_MOUNT": str(self.shop.prefix),
            "UENV_ROOT": str(self.target),
            "UENV_JOBS": str(self.jobs),
        }
        self._run(str(script))

    def _copied(self, file: str) -> Path:
        """Return a file of the recipe where programs of the tool chain can read it."""
        copy = self.shop.workspace / "files" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.shop.recipe.directory / file, copy)
        return copy

    def _all(self, words: Iterable[str]) -> list[str]:
        return [self._filled(word) for word in words]

    def _filled(self, text: str) -> str:
        return text.replace("$@mount@", str(self.shop.prefix)).replace("$@view_path@", str(self.target))

    def _run(self, *command: str, cwd: Path | None = None) -> None:
        self.shop.follow(command, cwd=cwd or self.place, variables=self.variables)


def _variables(shop: Workshop, target: Path) -> dict[str, str]:
    """Return what lets a package find those built before it, and be found at run time."""
    return {
        "PATH": f"{shop.workspace}/tools:{target}/bin:{shop.environment['PATH']}",
        "CPATH": f"{target}/include",
        "LIBRARY_PATH": f"{target}/lib",
        "LD_RUN_PATH": f"{target}/lib",
        "PKG_CONFIG_PATH": f"{target}/lib/pkgconfig:{target}/share/pkgconfig",
        "CMAKE_PREFIX_PATH": str(target),
        "ACLOCAL_PATH": f"{target}/share/aclocal",
    }


def _tidy(shop: Workshop, *, strip: bool) -> None:
    for pattern in _UNWANTED:
        for path in sorted(shop.prefix.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    if not strip:
        return
    step("stripping")
    found = objects(shop.prefix)
    linked = [path for path, facts in found.items() if facts.needed or facts.soname or facts.interpreter]
    plain = [path for path in found if path not in set(linked)]
    for path in sorted(shop.prefix.rglob("*.a")):
        with path.open("rb") as file:
            if not path.is_symlink() and file.read(len(_ARCHIVE)) == _ARCHIVE:
                plain.append(path)
    _strip(shop, linked, "--strip-unneeded")
    _strip(shop, plain, "--strip-debug", "--enable-deterministic-archives")


def _strip(shop: Workshop, paths: Sequence[Path], *options: str) -> None:
    for first in range(0, len(paths), _BATCH):
        names = [str(path) for path in paths[first : first + _BATCH]]
        for path in names:
            Path(path).chmod(Path(path).stat().st_mode | 0o200)
        shop.follow(["strip", *options, *names], cwd=shop.workspace)
