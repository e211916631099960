"""Chromium without a window, for tests that look at pages as people do."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root, and the pages are ours
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-prefers-reduced-motion",
)


def chromium(directory: Path, *words: str, timeout_s: float = 90) -> str:
    """Run Chromium with a profile of its own; return what it writes to stdout."""
    done = subprocess.run(
        ["chromium", *_FLAGS, f"--user-data-dir={directory}/chromium", *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=True,
    )
    return done.stdout


def in_frames(directory: Path, script: str) -> Any:
    """Run a script in a page beside which other pages of ``directory`` can be opened in frames; return what it hands to ``report``.

    The script may use ``await frame(FILE, WIDTH)``: an iframe of that many CSS pixels, whose media queries see that width, and which
    the script may look into.
    """
    harness = directory / "harness.html"
    harness.write_text(
        "<!DOCTYPE html><meta charset=utf-8><title>harness</title><pre id=out></pre><script type=module>\n"
        "const report = (value) => { document.getElementById('out').textContent = JSON.stringify(value); };\n"
        "const frame = (file, width) => new Promise((done) => { const it = document.createElement('iframe');\n"
        " it.style.width = width + 'px'; it.style.height = '900px'; it.style.border = '0';\n"
        " it.onload = () => done(it.contentWindow); it.src = file; document.body.append(it); });\n"
        f"try {{ {script} }} catch (error) {{ report({{error: String(error)}}); }}\n</script>"
    )
    try:
        dom = chromium(
            directory,
            "--allow-file-access-from-files",
            "--virtual-time-budget=20000",
            "--dump-dom",
            harness.as_uri(),
        )
    finally:
        harness.unlink()
    found = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None and found[1], f"the script did not come to its end: {dom[-2000:]}"
    return json.loads(html.unescape(found[1]))
