"""The test file of ReFrame for the smoke tests (`uenvd.publish.smoke`), written beside what it needs.

The file that ReFrame loads is a constant: what differs from image to image is data. Each script is one test, in one environment of the image,
whatever that has loaded: the script loads its own view.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from uenvd.publish.reframe.environments import TestEnvironment
from uenvd.publish.reframe.report import BUILT_IN
from uenvd.publish.smoke import OK, PROBLEM, Script

FILE: Final = "uenv_smoke.py"
PLAN: Final = "smoke.json"
OWN_ENVIRONMENT: Final = TestEnvironment("smoke")
"""For images that name no environment of their own."""

_TEST: Final = '''\
"""Tests that every image gets; written by uenvd-publish."""

import json
from pathlib import Path

import reframe as rfm
import reframe.utility.sanity as sn
from reframe.core.exceptions import SanityError

_PLAN = json.loads((Path(__file__).parent / "smoke.json").read_text())


@rfm.simple_test
class UenvSmoke(rfm.RunOnlyRegressionTest):
    descr = "The view loads, libraries resolve, declared commands run"
    view = parameter(_PLAN["views"])
    valid_systems = ["*"]
    valid_prog_environs = [_PLAN["environment"]]
    sourcesdir = "scripts"
    num_tasks = 1

    @run_after("init")
    def choose(self):
        self.executable = "sh"
        self.executable_opts = ["./" + _PLAN["scripts"][self.view]]

    @sanity_function
    def said(self):
        return _verdict(self.stdout, self.stderr)


@sn.deferrable
def _verdict(out, err):
    lines = Path(str(out)).read_text(errors="replace").splitlines()
    problems = [line[len(_PLAN["problem"]):].strip() for line in lines if line.startswith(_PLAN["problem"])]
    if problems:
        raise SanityError("; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else ""))
    if not any(line.startswith(_PLAN["ok"]) for line in lines):
        last = Path(str(err)).read_text(errors="replace").strip().splitlines()[-1:]
        raise SanityError("the script did not come to its end" + (f": {last[0]}" if last else ""))
    return True
'''


def write_tests(directory: Path, scripts: Sequence[Script], environment: str) -> Path:
    """Write the test file and its scripts into a directory of their own, which is made; return the file's path.

    Args:
        directory: replaced if it is there.
        scripts: one test each.
        environment: ReFrame's name of the environment in which they run.

    """
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "scripts").mkdir(parents=True)
    names: dict[str, str] = {}
    for number, script in enumerate(scripts):
        view = script.view or "none"
        names[view] = f"view-{number}.sh"
        (directory / "scripts" / names[view]).write_text(script.text)
    plan = {
        "environment": environment,
        "views": list(names),
        "scripts": names,
        "problem": PROBLEM,
        "ok": OK,
    }
    (directory / PLAN).write_text(json.dumps(plan))
    path = directory / FILE
    path.write_text(_TEST)
    assert BUILT_IN in _TEST
    return path
