"""The catalogue shows what anybody may write into a registry: nothing of it may become a script, a command, a path or an endless page."""

from __future__ import annotations

import json
from pathlib import Path

import html5lib
import pytest

from support.browser import in_frames
from support.catalogues import perf_report, publish_site
from support.publishing import Publisher, make_squashfs
from uenvd.oci.attach import META_TYPE, REFRAME_TYPE, Content, attach, json_content
from uenvd.publish.catalogue.site import LISTING
from uenvd.publish.main import main
from uenvd.publish.sbom import SBOM_TYPE

EVIL = "</script></style><script>top.hit = 1</script><img src=x onerror='top.hit = 1'>\"'><svg onload=top.hit=1>\u202egpj.\x1b]0;x\x07"
COMMAND = "default; rm -rf ~ $(top) `top`"
HTML = "{http://www.w3.org/1999/xhtml}"


@pytest.fixture
def registry(tmp_path: Path) -> str:
    address = f"oci-layout:{tmp_path}/layout"
    hostile = {
        "text": EVIL,
        "views": {COMMAND: EVIL, EVIL: EVIL},
        "versions": {"1.0": {"numpy": "1.0"}, "2.0": {"numpy": "2.0"}},
        "tests": lambda _step, _fast: {
            EVIL: {"x": (1.0, None, None, None, EVIL)},
            "odd": {EVIL: (-1e300, 1e-300, -5.0, 5.0, "")},
        },
    }
    publisher = publish_site(address, tmp_path, {"evil": hostile})
    remote, place = publisher.remote, "deploy/daint/gh200/evil/2.0"
    digest = remote.resolve(place, "v1")
    components = [
        {"name": EVIL, "version": EVIL},
        {"name": 5},
        "x",
        *({"name": f"p{n}", "version": "1"} for n in range(6000)),
    ]
    bill = json.dumps({"bomFormat": "CycloneDX", "components": components}).encode()
    attach(remote, place, digest, SBOM_TYPE, [json_content("sbom.cdx.json", bill)])
    assert main(["deprecate", "evil/2.0:v1@daint%gh200", EVIL, "--registry", address]) == 0
    return address


def test_hostile_texts_are_texts(registry: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["catalogue", str(out), "--registry", registry, "--title", EVIL]) == 0
    for path in out.glob("*.html"):
        text = path.read_text()
        assert "\u202e" not in text and "\x1b" not in text
        root = html5lib.HTMLParser(strict=True).parse(text)
        scripts = list(root.iter(HTML + "script"))
        assert len(scripts) == 1 and "hit" not in (scripts[0].text or "")
        assert not list(root.iter(HTML + "img"))
        assert not [
            name for element in root.iter() for name in element.attrib if str(name).lower().startswith("on")
        ]
    shown = html5lib.parse((out / "evil.html").read_text())
    commands = ["".join(block.itertext()) for block in shown.iter(HTML + "pre")]
    assert commands and all("rm -rf" not in one.replace(f"'{COMMAND}'", "") for one in commands), commands
    assert len((out / "evil.html").read_text()) < 3_000_000, "6,000 packages are not without bounds"
    found = in_frames(
        out,
        "const one = await frame('index.html', 390); const two = await frame('evil.html', 390);"
        "report({hit: window.hit ?? null, wide: [one, two].map((it) => it.document.documentElement.scrollWidth)});",
    )
    assert found == {"hit": None, "wide": [390, 390]}


def test_the_policy_stops_a_script_that_got_in(registry: str, tmp_path: Path) -> None:
    """Were the escaping ever to fail, the browser would still refuse to run anything but our script."""
    out = tmp_path / "out"
    assert main(["catalogue", str(out), "--registry", registry]) == 0
    page = out / "index.html"
    page.write_text(
        page.read_text().replace(
            "<h1>", "<script>top.hit = 1</script><img src=x onerror='top.hit = 1'><h1>", 1
        )
    )
    found = in_frames(
        out,
        "const it = await frame('index.html', 800); report([window.hit ?? null, !!it.document.querySelector('#systems label')]);",
    )
    assert found == [None, True], "the planted script ran, or ours did not"


def test_damaged_attachments_cost_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"oci-layout:{tmp_path}/layout"
    publisher = Publisher(address)
    image = make_squashfs(tmp_path / "plain.squashfs", {"a": "b"})
    digest = publisher.push(image, "plain/1", "v1", stock=True)
    place = "deploy/demo/zen3/plain/1"
    for kind, name, data in (
        (REFRAME_TYPE, "report.json", b"{"),
        (META_TYPE, "meta", b"no archive"),
        (SBOM_TYPE, "sbom.cdx.json", b"[]"),
    ):
        attach(publisher.remote, place, digest, kind, [Content(name, data)])
    out = tmp_path / "out"
    assert main(["catalogue", str(out), "--registry", address, "--system", "demo"]) == 0
    said = capsys.readouterr().err
    assert "the report of" in said and "the bill of materials of" in said and "the directory meta of" in said
    text = (out / "plain.html").read_text()
    assert "not tested" in text and "No description." in text and "--view" not in text


def test_an_environment_called_index_and_odd_figures(tmp_path: Path) -> None:
    address = f"oci-layout:{tmp_path}/layout"
    figures = {
        "T": {
            "zero": (0.0, None, None, None, "s"),
            "tiny": (1e-300, None, None, None, "s"),
            "huge": (1e308, None, None, None, "B/s"),
        }
    }
    about = {
        "text": "x",
        "views": {"v": ""},
        "versions": {"1": {}, "1.0-rc.1": {}},
        "tests": lambda _step, _fast: figures,
    }
    publish_site(address, tmp_path, {"index": about})
    out = tmp_path / "out"
    assert main(["catalogue", str(out), "--registry", address]) == 0
    assert "index-.html" in (out / "index.html").read_text() and (out / "index-.html").is_file()
    assert perf_report("x", {})


def test_no_directory_of_somebody_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"oci-layout:{tmp_path}/layout"
    Publisher(address).push(make_squashfs(tmp_path / "a.squashfs", {"a": "b"}), "app/1", "v1")
    home = tmp_path / "home"
    home.mkdir()
    (home / "index.html").write_text("mine")
    assert main(["catalogue", str(home), "--registry", address, "--system", "demo"]) == 66
    assert "holds no catalogue" in capsys.readouterr().err and (home / "index.html").read_text() == "mine"
    out = tmp_path / "out"
    assert main(["catalogue", str(out), "--registry", address, "--system", "demo"]) == 0
    (out / "app.html").rename(out / "gone.html")
    listing = json.loads((out / LISTING).read_text())
    (out / LISTING).write_text(
        json.dumps({"pages": [*listing["pages"], "gone.html", "../../etc/passwd", "/x.html"]})
    )
    assert main(["catalogue", str(out), "--registry", address, "--system", "demo"]) == 0
    assert not (out / "gone.html").exists() and (out / "app.html").exists()
