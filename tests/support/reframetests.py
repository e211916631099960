"""Small images with ReFrame tests in them: shell tests that pass, fail, crash the loader, hang."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from support.publishing import env_json, make_squashfs

HEAD = """
import reframe as rfm
import reframe.utility.sanity as sn
"""

SAYS = (
    HEAD
    + '''
@rfm.simple_test
class Says(rfm.RunOnlyRegressionTest):
    """The image's program is found by the view, and only there."""
    valid_systems = ['*']
    valid_prog_environs = ['+speaks']
    executable = 'say; echo word is $WORD; command -v python3'

    @sanity_function
    def said(self):
        return sn.all([
            sn.assert_found(r'^{word}$', self.stdout),
            sn.assert_found(r'word is {word}', self.stdout),
            sn.assert_found(r'^/usr/bin/python3$', self.stdout),
        ])
'''
)

FAILS = (
    HEAD
    + """
@rfm.simple_test
class Fails(rfm.RunOnlyRegressionTest):
    valid_systems = ['*']
    valid_prog_environs = ['+speaks']
    executable = 'say'

    @sanity_function
    def said(self):
        return sn.assert_found(r'something else', self.stdout)
"""
)

HOST = (
    HEAD
    + """
@rfm.simple_test
class NotMounted(rfm.RunOnlyRegressionTest):
    valid_systems = ['*']
    valid_prog_environs = ['+plain']
    executable = 'ls -A /user-environment | wc -l; echo word is $WORD.'

    @sanity_function
    def nothing(self):
        return sn.all([sn.assert_found(r'^0$', self.stdout), sn.assert_found(r'word is [.]', self.stdout)])
"""
)

HANGS = (
    HEAD
    + """
@rfm.simple_test
class Hangs(rfm.RunOnlyRegressionTest):
    valid_systems = ['*']
    valid_prog_environs = ['+speaks']
    executable = 'touch {flag}; exec sleep 987'

    @sanity_function
    def never(self):
        return True
"""
)

UNLOADABLE = HEAD + "import no_such_module\n"

CRASHES = HEAD + "import os\nos._exit(77)\n"

MEASURES = (
    HEAD
    + """
@rfm.simple_test
class Measures(rfm.RunOnlyRegressionTest):
    valid_systems = ['*']
    valid_prog_environs = ['+speaks', '+plain']
    executable = 'echo rate: {rate} MB/s, word $(say 2>/dev/null || echo none)'
    reference = {
        'demo': {'rate': ({rate}, -0.05, None, 'MB/s')},
        'other': {'rate': (50, -0.05, None, 'MB/s')},
    }

    @sanity_function
    def said(self):
        word = 'none' if self.current_environ.name == 'host' else '{word}'
        return sn.assert_found('word ' + word, self.stdout)

    @performance_function('MB/s')
    def rate(self):
        return sn.extractsingle('rate: ([0-9.]+) MB', self.stdout, 1, float)
"""
)
"""The same test with the image and on the plain host, with references for two systems."""

ENVIRONMENTS = """\
default:
  features: [speaks]
  views: [default]
"""

WITH_HOST = ENVIRONMENTS + "host:\n  features: [plain]\n  uenv: false\n"


def image_with_tests(
    path: Path,
    name: str = "app",
    word: str = "hello",
    *,
    environments: str | None = ENVIRONMENTS,
    default_view: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    **tests: str,
) -> Path:
    """Make an image with a program `say` and with these tests (file name without .py -> source).

    ``default_view``: variables of one more view that is loaded where nobody names a view. ``files``: further files.
    """
    values = {
        "list": {"PATH": [{"op": "prepend", "value": ["/user-environment/bin"]}]},
        "scalar": {"WORD": word},
    }
    views: dict[str, object] = {"default": values}
    if default_view is not None:
        views["hostile"] = {"list": {}, "scalar": dict(default_view)}
    meta = json.loads(env_json(name, views=views))
    if default_view is not None:
        meta["default-view"] = "hostile"
    contents: dict[str, bytes | str] = {
        "bin/say": f"#!/bin/sh\necho {word}\n",
        "python/json.py": "raise SystemExit('the wrong json')\n",
    }
    if environments is not None:
        contents["meta/extra/reframe.yaml"] = environments
    for test, source in tests.items():
        contents[f"meta/extra/reframe/{test}.py"] = source.replace("{word}", word)
    contents |= files or {}
    return make_squashfs(path, contents, meta=json.dumps(meta).encode())
