"""``uenvd-publish build``: recipe -> image file."""

from __future__ import annotations

import argparse
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from uenvd.errors import AuditFailed
from uenvd.label import parse_namespaced_label
from uenvd.own import NAMESPACE
from uenvd.publish.build import Site, build
from uenvd.publish.build.audit import summary
from uenvd.publish.build.builder import FINDINGS
from uenvd.publish.build.inputs import default_cache
from uenvd.publish.build.kinds import MIRROR_VARIABLE, PROGRAMS_VARIABLE, SYSTEM_VARIABLE
from uenvd.publish.console import say, show, show_json
from uenvd.publish.elsewhere import run_elsewhere
from uenvd.publish.explain import against_directory, against_image
from uenvd.publish.options import (
    REGISTRY_OPTIONS,
    SITE_OPTIONS,
    add_registry_options,
    add_site_options,
    open_registry,
    refuse,
)
from uenvd.publish.recipe import Recipe, load_recipe
from uenvd.publish.source import find_image
from uenvd.publish.twice import require_same


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
        help="without LABEL: where the image goes; default: the working directory",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where downloads are kept; default $UENVD_CACHE_DIR, else ~/.cache/uenvd-publish",
    )
    parser.add_argument(
        "--again", action="store_true", help="build also when the image of this very recipe is there"
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="build nothing: say why a build would make an image, that is which inputs are others than last time",
    )
    parser.add_argument(
        "--against",
        metavar="LABEL",
        help="with --explain: compare with this image, of the registry or your own (mine::...); default: with the image of LABEL, "
        "without one with that in --out",
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
    _refuse_without_effect(arguments)
    site = site_of(arguments)
    if arguments.explain:
        return _explain(arguments, site)
    if arguments.label is not None:
        from uenvd.publish import user_build

        return user_build.run(arguments, site)
    recipe = load_recipe(arguments.recipe)
    say(f"building {recipe.label} ({recipe.format})")
    built = build(
        recipe,
        arguments.out or Path(),
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
        cache = arguments.cache or default_cache()
        require_same(recipe, built, cache=cache, tell=lambda text: say(f"  {text}"), site=site)
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


def _refuse_without_effect(arguments: argparse.Namespace) -> None:
    """Refuse options that say nothing beside the others. Raises `UsageError`."""
    if arguments.explain:
        refuse(
            arguments,
            ("again", "check", "run=elsewhere", "no-tests"),
            "has no meaning with --explain, which builds nothing",
            hint="leave out one of the two",
        )
    else:
        refuse(arguments, ("against",), "is for --explain", hint="say both, or neither")
    if arguments.label is not None:
        refuse(
            arguments,
            ("out",),
            "is for a build without LABEL: an image with a label goes into your own store",
            hint="leave out one of the two",
        )
        return
    refuse(arguments, ("no-tests",), "is for LABEL: without one nothing is tested")
    if arguments.against is None:
        refuse(
            arguments,
            (*REGISTRY_OPTIONS, *SITE_OPTIONS),
            "has no meaning for a file: nothing is pushed",
            hint="with a LABEL the image is stored under it; uenvd-publish push, run: into a registry",
        )
    else:
        refuse(
            arguments, ("out",), "and --against name two images to compare with", hint="say one of the two"
        )


def _explain(arguments: argparse.Namespace, site: Site) -> int:
    """Show why an image would be built."""
    from uenvd.publish import user_build

    if arguments.label is not None:
        recipe, place = user_build.asked(arguments, make=False)
        label = place.name
    else:
        recipe, place = load_recipe(arguments.recipe), None
        label = recipe.label
    if arguments.against is not None:
        reasons = _reasons_against(arguments, recipe, site)
    elif place is not None:
        reasons = user_build.reasons(recipe, place, site)
    else:
        reasons = against_directory(recipe, (arguments.out or Path()).absolute(), site=site)
    if arguments.json:
        show_json({"label": label, "build": bool(reasons), "reasons": reasons})
        return 0
    for reason in reasons:
        show(reason)
    if not reasons:
        say(f"nothing changed: the image of {label} that is there would be made again")
    return 0


def _reasons_against(arguments: argparse.Namespace, recipe: Recipe, site: Site) -> list[str]:
    """Return how the image of a recipe would differ from that of ``--against``. Raises what `find_image` raises, and the registry's errors."""
    if parse_namespaced_label(arguments.against).namespace == NAMESPACE:
        refuse(arguments, REGISTRY_OPTIONS, f"is for a registry, and {arguments.against} is in your account")
        from uenvd.publish.user_build import own_image  # what it needs takes a while to import

        with own_image(arguments, arguments.against, os.environ) as (remote, repository, digest):
            return against_image(recipe, remote, repository, digest, site=site)
    with closing(open_registry(arguments)) as remote:
        there = find_image(arguments, remote, arguments.against)
        return against_image(recipe, remote, there.repository, there.digest, site=site)
