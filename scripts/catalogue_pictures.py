"""Draw docs/images/catalogue-*.png: the catalogue of a made-up site in Chromium, at the width of a desk and of a phone."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.browser import chromium  # noqa: E402
from support.catalogues import publish_site  # noqa: E402
from uenvd.publish.main import main as publish  # noqa: E402

PICTURES = {
    "desk": ("index.html", 1280, 760, ()),
    "search": ("index.html#q=hdf5", 1280, 620, ()),
    "environment": ("prgenv-gnu.html", 1280, 1640, ()),
    "performance": ("prgenv-gnu.html", 1280, 4600, ()),
    "dark": ("python-sci.html", 1280, 1000, ("--force-dark-mode",)),
    "phone": ("quantum-espresso.html", 500, 1000, ()),
}


def main() -> int:
    """Draw all."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        registry = f"oci-layout:{directory}/registry"
        publish_site(registry, directory)
        site = directory / "site"
        status = publish(["catalogue", str(site), "--registry", registry])
        for name, (page, width, height, more) in PICTURES.items():
            picture = ROOT / "docs" / "images" / f"catalogue-{name}.png"
            file, _, fragment = page.partition("#")
            address = (site / file).as_uri() + (f"#{fragment}" if fragment else "")
            chromium(
                directory,
                *more,
                "--virtual-time-budget=3000",
                f"--window-size={width},{height}",
                f"--screenshot={picture}",
                address,
            )
    end_of(ROOT / "docs" / "images" / "catalogue-performance.png", 1120)
    return status


def end_of(path: Path, height: int) -> None:
    """Cut a picture of a whole page down to its last part."""
    with Image.open(path) as picture:
        whole = picture.convert("RGB")
    pixels = whole.load()
    empty = pixels[2, whole.height - 1]
    rows = (
        row
        for row in range(whole.height - 1, 0, -1)
        if any(pixels[x, row] != empty for x in range(0, 1280, 7))
    )
    last = min(whole.height, next(rows) + 24)
    whole.crop((0, max(0, last - height), whole.width, last)).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
