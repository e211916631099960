"""The process that builds, inside its private namespaces: ``python -m uenvd.publish.build.inside``, started by `builder`.

Reads one JSON object from stdin (`Order`), writes JSON lines to stdout: ``{"step": text}`` as it goes, at the end ``{"done": {...}}`` or
``{"error": {code, message, hint}}``. Its stderr is the build log; so is that of every program that it runs.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, Final, Protocol, cast

from uenvd.errors import BuildFailed, InternalError, StorageFull, UenvError
from uenvd.publish.build.sandbox import alone, die_with_parent, enter
from uenvd.publish.build.workshop import Order, Workshop, tell
from uenvd.publish.recipe import load_recipe

_NO_SPACE: Final = frozenset({28, 122})


class Inside(Protocol):
    """A module ``uenvd.publish.build.inside_NAME``."""

    NETWORK: bool
    """Whether the builder's programs fetch things themselves."""

    def make(self, shop: Workshop) -> dict[str, Any]:
        """Build the image; return what the parent wants to know."""
        ...


def main() -> int:
    """Return the exit status: 0 when "done" was said, else 1."""
    die_with_parent()
    os.umask(0o022)
    try:
        order = Order(**json.load(sys.stdin))
        recipe = load_recipe(Path(order.recipe), version=order.version)
        builder = cast("Inside", importlib.import_module(f"uenvd.publish.build.inside_{recipe.builder}"))
        enter(recipe.mount, Path(order.new_root), order.size_bytes, network=builder.NETWORK)
        alone()
        tell({"done": builder.make(Workshop(order, recipe))})
    except UenvError as error:
        print(f"{type(error).__name__}: {error.message}", file=sys.stderr)
        tell({"error": {"code": error.code, "message": error.message, "hint": error.hint}})
    except OSError as error:
        traceback.print_exc()
        full = error.errno in _NO_SPACE
        kind: type[UenvError] = StorageFull if full else BuildFailed
        hint = "the image is built in memory, and there is not enough of it" if full else ""
        tell({"error": {"code": kind.code, "message": f"the build failed: {error}", "hint": hint}})
    except Exception as error:  # noqa: BLE001  # the edge of this process: the parent reports it
        traceback.print_exc()
        message = f"unexpected fault in the build: {type(error).__name__}: {error}"
        hint = "the build log has the details"
        tell({"error": {"code": InternalError.code, "message": message, "hint": hint}})
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
