"""``uenvd-publish build``: recipe -> image file."""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from uenvd.errors import AuditFailed, BuildFailed, UsageError
from uenvd.publish.build import Built, Site, build
from uenvd.publish.build.audit import summary
from uenvd.publish.build.builder import FINDINGS
from uenvd.publish.build.compare import differences, shown
from uenvd.publish.build.inputs import default_cache
from uenvd.publish.build.kinds import MIRROR_VARIABLE, PROGRAMS_VARIABLE, SYSTEM_VARIABLE
from uenvd.publish.console import say, show, show_json
from uenvd.publish.elsewhere import run_elsewhere
from uenvd.publish.explain import against_directory, against_image
from uenvd.publish.options import add_registry_options, add_site_options, open_registry
from uenvd.publish.recipe import Recipe, load_recipe
from uenvd.publish.source import find_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="the recipe's directory")
    parser.add_argument(
        "label",
        metavar="LABEL",
        nargs="?",
        help="build for yourself, as name/version[:tag]: the image is tested, stored where only you can use it, and found by "
        "uenvctl and srun --uenv; without it: a file",
    )
    parser.add_argument("--no-tests", action="store_true", help="with LABEL: do not test the image")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path(),
        help="where the image goes; default: the working directory",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where downloads are kept; default $UENVD_CACHE_DIR, else ~/.cache/uenvd-publish",
    )
    parser.add_argument(
        "--again", action="store_true", help="build also when the directory has the image of this very recipe"
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="build nothing: say why a build would make an image, that is which inputs are others than last time",
    )
    parser.add_argument(
        "--against",
        metavar="LABEL",
        help="with --explain: compare with this image of the registry; default: with the image in --out",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="build twice, and fail unless both images are the same; tell which files differ",
    )
    parser.add_argument(
        "--run",
        dest="elsewhere",
        action="store_true",
        help="use the image, too, as audit --run does: as another user, where nothing of this machine is",
    )
    parser.add_argument("--json", action="store_true", help="print image, digest, metadata and log as JSON")
    _add_site_of_builders(parser)
    add_site_options(parser)
    add_registry_options(parser)


def _add_site_of_builders(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipes for Stackinator")
    group.add_argument(
        "--stack-config",
        action="append",
        default=[],
        metavar="[FORMAT=]PROGRAM",
        help=f"an installed Stackinator; may be repeated, the one that takes the recipe is used; default ${PROGRAMS_VARIABLE}, "
        "else every stack-config on PATH",
    )
    group.add_argument(
        "--system-config",
        type=Path,
        metavar="DIR",
        help=f"the system's (cluster's) configuration; default ${SYSTEM_VARIABLE}",
    )
    group.add_argument(
        "--mirror", type=Path, metavar="FILE", help=f"build caches and mirrors; default ${MIRROR_VARIABLE}"
    )


def site_of(arguments: argparse.Namespace) -> Site:
    """Return what the options and the environment say of this machine. Raises `UsageError`."""
    site = Site.of(os.environ)
    return replace(
        site,
        stack_configs=tuple(arguments.stack_config) or site.stack_configs,
        system=arguments.system_config or site.system,
        mirror=arguments.mirror or site.mirror,
    )


def run(arguments: argparse.Namespace) -> int:
    """Build; the image's path and digest go to stdout."""
    site = site_of(arguments)
    if arguments.label is not None:
        from uenvd.publish import user_build

        return user_build.run(arguments, site)
    recipe = load_recipe(arguments.recipe)
    if arguments.explain:
        return _explain(arguments, recipe, site)
    if arguments.against:
        raise UsageError("--against is for --explain", hint="say both, or neither")
    say(f"building {recipe.label} ({recipe.format})")
    built = build(
        recipe,
        arguments.out,
        cache=arguments.cache or default_cache(),
        say=lambda text: say(f"  {text}"),
        again=arguments.again,
        site=site,
    )
    if built.findings:
        say(f"the audit found {built.findings} dependencies on its host: {built.meta_dir / FINDINGS}")
    if built.reused:
        say(f"{built.image} is the image of this very recipe already (--again builds it anew)")
    else:
        say(f"built {built.image.stat().st_size / 1e6:.1f} MB in {built.seconds:.1f} s")
    if arguments.elsewhere:
        findings = run_elsewhere(built.image, recipe.mount)
        if findings:
            raise AuditFailed(f"the image does not work elsewhere:\n{summary(findings)}")
        say("its smoke tests pass elsewhere, too")
    if arguments.check:
        _check(arguments, recipe, built, site)
    if arguments.json:
        show_json(
            {
                "image": str(built.image),
                "digest": built.digest,
                "meta": str(built.meta_dir),
                "log": str(built.log),
                "lock": str(built.lock),
                "label": recipe.label,
            }
        )
    else:
        show(f"{built.image} {built.digest}")
    return 0


def _explain(arguments: argparse.Namespace, recipe: Recipe, site: Site) -> int:
    if arguments.against:
        with closing(open_registry(arguments)) as remote:
            there = find_image(arguments, remote, arguments.against)
            reasons = against_image(recipe, remote, there.repository, there.digest, site=site)
    else:
        reasons = against_directory(recipe, arguments.out.absolute(), site=site)
    if arguments.json:
        show_json({"label": recipe.label, "build": bool(reasons), "reasons": reasons})
        return 0
    for reason in reasons:
        show(reason)
    if not reasons:
        say(f"nothing changed: the image of {recipe.label} that is there would be made again")
    return 0


def _check(arguments: argparse.Namespace, recipe: Recipe, built: Built, site: Site) -> None:
    """Build once more, elsewhere, and compare. Raises `BuildFailed` with the files that differ."""
    say("building it once more, in another directory")
    with tempfile.TemporaryDirectory(prefix=".check-", dir=built.image.parent) as name:
        second = build(
            recipe, Path(name), cache=arguments.cache or default_cache(), say=lambda text: say(f"  {text}"), again=True, site=site,
        )  # fmt: skip
        if second.digest == built.digest:
            say(f"the same image: {built.digest}")
            return
        lines = differences(built.image, second.image)
    raise BuildFailed(
        f"two builds of {recipe.label} made two images: {built.digest} and {second.digest}\n"
        + (shown(lines) if lines else "  all files are equal: the squashfs file itself differs"),
        hint="docs/recipes.md says what usually differs, and what to do about it",
    )
