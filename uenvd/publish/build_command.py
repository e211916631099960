"""``uenvd-publish build``: recipe -> image file."""

from __future__ import annotations

import argparse
from pathlib import Path

from uenvd.publish.build import build
from uenvd.publish.build.inputs import default_cache
from uenvd.publish.console import say, show, show_json
from uenvd.publish.recipe import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="the recipe's directory")
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
    parser.add_argument("--json", action="store_true", help="print image, digest, metadata and log as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build; the image's path and digest go to stdout."""
    recipe = load_recipe(arguments.recipe)
    say(f"building {recipe.label} ({recipe.format})")
    built = build(
        recipe,
        arguments.out,
        cache=arguments.cache or default_cache(),
        say=lambda text: say(f"  {text}"),
        again=arguments.again,
    )
    if built.reused:
        say(f"{built.image} is the image of this very recipe already (--again builds it anew)")
    else:
        say(f"built {built.image.stat().st_size / 1e6:.1f} MB in {built.seconds:.1f} s")
    if arguments.json:
        show_json(
            {
                "image": str(built.image),
                "digest": built.digest,
                "meta": str(built.meta_dir),
                "log": str(built.log),
                "label": recipe.label,
            }
        )
    else:
        show(f"{built.image} {built.digest}")
    return 0
