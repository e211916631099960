"""The catalogue's pages as people meet them: valid, complete, searchable at a desk and on a phone, readable without scripts and without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import html5lib
import pytest

from support.browser import in_frames
from support.catalogues import SITE, publish_site
from uenvd.publish.main import main

HTML = "{http://www.w3.org/1999/xhtml}"
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("registry")
    address = f"oci-layout:{directory}/layout"
    publish_site(address, directory)
    return address


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, registry: str) -> Path:
    out = tmp_path_factory.mktemp("site") / "public"
    assert main(["catalogue", str(out), "--registry", registry, "--title", "Environments of Demo"]) == 0
    return out


def pages(site: Path) -> Iterator[tuple[Path, ElementTree.Element]]:
    for path in sorted(site.glob("*.html")):
        parser = html5lib.HTMLParser(strict=True)
        yield path, parser.parse(path.read_text())


def test_every_page_is_valid_and_every_link_leads_somewhere(site: Path) -> None:
    found = dict(pages(site))
    assert {path.name for path in found} == {"index.html", *(f"{name}.html" for name in SITE)}
    for path, root in found.items():
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids)), path
        for element in root.iter():
            for name in ("src", "href", "action", "srcset", "style", "onclick"):
                value = element.get(name)
                assert value is None or name == "href", (path, element.tag, name)
            if (target := element.get("href")) is not None:
                parts = urlsplit(target)
                assert not parts.scheme and not parts.netloc, f"{path} goes out to {target}"
                assert not parts.path or (site / parts.path).is_file(), target
                assert not parts.fragment or parts.fragment in ids, target
        assert root.get("lang") == "en"
        assert [element.tag for element in root.iter() if element.tag in {HTML + "h1", HTML + "main"}] == [
            HTML + "main",
            HTML + "h1",
        ]
        for table in root.iter(HTML + "table"):
            assert all(head.get("scope") for head in table.iter(HTML + "th")), path
        for drawing in root.iter("{http://www.w3.org/2000/svg}svg"):
            assert drawing.get("aria-hidden") == "true" or drawing.get("aria-label"), path
        for label in root.iter(HTML + "label"):
            assert label.get("for") in ids


def test_a_page_says_what_a_user_needs(site: Path) -> None:
    text = (site / "prgenv-gnu.html").read_text()
    for version, packages in SITE["prgenv-gnu"]["versions"].items():
        assert f"{version}:v1" in text and packages["gcc"] in text
    assert "uenvctl start --view=default prgenv-gnu/26.3:v1" in text
    assert "srun --uenv=prgenv-gnu/26.3:v1 --view=default COMMAND" in text
    assert "use prgenv-gnu/26.3:v1 instead; it may be removed from 2027-01-31 on" in text
    assert "4 of 4 tests passed" in text and "daint%gh200" in text and "eiger%zen2" in text
    assert "-14.3 %, much worse" in text, "the newest version writes more slowly, and there is no reference"
    assert text.count('<svg class="plot"') == 3
    index = (site / "index.html").read_text()
    assert all(about["text"] in index for about in SITE.values()), "it is all there without a script"


def test_the_same_registry_gives_the_same_bytes(site: Path, registry: str, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["catalogue", str(again), "--registry", registry, "--title", "Environments of Demo"]) == 0
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in site.iterdir()
    }


def test_search_at_a_desk_and_on_a_phone(site: Path) -> None:
    """Nothing scrolls sideways at either width, and the search finds names, packages, machines, and says when there is nothing."""
    files = json.dumps(sorted(path.name for path in site.glob("*.html")))
    found = in_frames(
        site,
        f"""
        const result = {{wide: [], search: {{}}, policy: []}};
        for (const width of {json.dumps(WIDTHS)}) {{
          for (const file of {files}) {{
            const it = await frame(file, width);
            const root = it.document.documentElement;
            for (const one of it.document.querySelectorAll("details")) one.open = true;
            if (root.scrollWidth > width || it.document.body.scrollWidth > width) result.wide.push([file, width, root.scrollWidth]);
          }}
          const it = await frame("index.html", width);
          const page = it.document;
          const query = page.getElementById("query");
          const shown = () => [...page.querySelectorAll(".card:not([hidden]) h2 a")].map((a) => a.textContent);
          const ask = (text) => {{ query.value = text; query.dispatchEvent(new it.Event("input")); return shown(); }};
          const searched = {{all: shown(), name: ask("quantum"), view: ask("jupyter"), words: ask("python 2026.9"), nothing: ask("fortnite")}};
          searched.nothingSaid = page.getElementById("found").textContent;
          searched.box = ask("NetCDF");
          searched.match = page.querySelector(".card:not([hidden]) .match").textContent;
          ask("");
          const eiger = page.querySelector("#systems input[value=eiger]");
          eiger.click();
          searched.eiger = shown();
          page.dispatchEvent(new it.KeyboardEvent("keydown", {{key: "/"}}));
          searched.focus = page.activeElement.id;
          result.search[width] = searched;
        }}
        const direct = await frame("index.html#q=numpy", 390);
        result.direct = [...direct.document.querySelectorAll(".card:not([hidden]) h2 a")].map((a) => a.textContent);
        const one = await frame("prgenv-gnu.html", 390);
        result.buttons = one.document.querySelectorAll(".use button").length;
        report(result);
        """,
    )
    assert "error" not in found, found
    assert found["wide"] == []
    for width in WIDTHS:
        searched = found["search"][str(width)]
        assert searched["all"] == sorted(SITE) == searched["eiger"]
        assert searched["name"] == ["quantum-espresso"] and searched["view"] == ["python-sci"]
        assert searched["words"] == ["python-sci"] and searched["nothing"] == []
        assert "Nothing" in searched["nothingSaid"]
        assert searched["box"] == ["prgenv-gnu"] and searched["focus"] == "query"
        assert searched["match"] == "contains netcdf-c 4.9.3"
    assert found["direct"] == ["python-sci"]
    assert found["buttons"] == 5


def test_text_and_background_can_be_told_apart() -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text, and 1.4.11: 3 to 1 for the lines of charts; in light and dark."""
    style = (Path(__file__).parents[2] / "uenvd/publish/catalogue/templates/style.css").read_text()
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        assert len(colours) > 15
        for text in ("text", "soft", "link", "accent"):
            for back in ("page", "card"):
                assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
        assert (
            contrast(colours["text"], colours["code"]) >= 4.5
            and contrast(colours["text"], colours["chip"]) >= 4.5
        )
        for kind in ("good", "bad", "warn"):
            assert contrast(colours[kind], colours[f"{kind}-back"]) >= 4.5, kind
            assert contrast(colours[kind], colours["card"]) >= 4.5, kind
        for number in range(6):
            assert contrast(colours[f"s{number}"], colours["card"]) >= 3, number


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
