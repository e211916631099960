"""An environment as a kernel of Jupyter: found, started and interrupted by the real jupyter_client; refused where it could not work."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.publishing import env_json, make_squashfs
from support.uenvctl import UENVCTL, Desk, desk

pytestmark = pytest.mark.usefixtures("node")

CLIENT = """
import os, sys
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import start_new_kernel
assert "mine" in KernelSpecManager().find_kernel_specs()
manager, client = start_new_kernel(kernel_name="mine", startup_timeout=60)
said = []
def hook(message):
    if message["msg_type"] == "stream":
        said.append(message["content"]["text"])
try:
    code = "import os; print(os.environ['WORD'], open('/user-environment/word').read(), os.environ['UENV_LABEL'])"
    reply = client.execute_interactive(code, timeout=60, output_hook=hook)
    assert reply["content"]["status"] == "ok", reply
    interrupt = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    reply = client.execute_interactive(interrupt, timeout=60, output_hook=hook)
    assert reply["content"]["ename"] == "KeyboardInterrupt", reply
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
print("".join(said), end="")
"""


@pytest.fixture(scope="module")
def me() -> Iterator[Desk]:
    with desk() as made:
        views = {
            name: {
                "list": {"PATH": [{"op": "prepend", "value": [f"/user-environment/{name}/bin"]}]},
                "scalar": {"WORD": name},
            }
            for name in ("good", "bare", "none-such")
        }
        make_squashfs(
            made.directory.parent / "sci.squashfs",
            {
                "word": "hello",
                "good/bin/python3": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
                "bare/bin/python3": '#!/bin/sh\nexec /usr/bin/python3 -S -I "$@"\n',
            },
            meta=env_json("sci", views=views),
            options=(
                "-p",
                "good/bin m 755 0 0",
                "-p",
                "bare/bin m 755 0 0",
                "-action",
                "chmod(a+x)@name(python3)",
            ),
        )
        yield made


IMAGE = "../sci.squashfs"


def test_a_notebook_runs_in_the_environment(me: Desk) -> None:
    installed = me.uenvctl("kernel", "install", "--view=good", "--name=mine", IMAGE, "--json")
    assert installed.returncode == 0, installed.stderr
    facts = json.loads(installed.stdout)
    assert facts["path"] == str(me.user.home / ".local/share/jupyter/kernels/mine")
    spec = json.loads((Path(facts["path"]) / "kernel.json").read_text())
    assert spec["argv"] == facts["argv"]
    assert spec["argv"][0] == UENVCTL
    assert spec["display_name"] == f"{IMAGE} (good)"
    # The client runs in another directory than the one in which the kernel was installed.
    done = me.command([sys.executable, "-c", CLIENT], cwd=me.user.home, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"good hello {me.directory.parent / 'sci.squashfs'}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--view=bare", IMAGE], 95, "has no ipykernel"),
        (["--view=good", "--python=snake", IMAGE], 95, "no such interpreter in its PATH: snake"),
        (["--view=nope", IMAGE], 70, "nope"),
        (["--view=good", "--name=../x", IMAGE], 66, "cannot be the name of a kernel"),
        (["--view=good", "--prefix=/proc/nowhere", IMAGE], 87, "cannot be written"),
        (["./missing.squashfs"], 66, "missing.squashfs"),
    ],
)
def test_a_kernel_that_could_not_start_is_not_installed(
    me: Desk, arguments: list[str], status: int, says: str
) -> None:
    done = me.uenvctl("kernel", "install", *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (me.user.home / ".local/share/jupyter/kernels/nope").exists()


def test_not_inside_a_session(me: Desk) -> None:
    done = me.uenvctl("run", "--view=good", IMAGE, "--", UENVCTL, "kernel", "install", IMAGE)
    assert done.returncode == 93
