"""The generated configuration: valid for ReFrame itself, and views reach tests only by their scripts."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from uenvd.errors import UnknownView
from uenvd.label import parse_views
from uenvd.publish.reframe.environments import TestEnvironment
from uenvd.publish.reframe.inside import Spec, is_mounted
from uenvd.publish.reframe.session import login_environ, require_reframe
from uenvd.publish.reframe.site import Site, SlurmJobs, configuration, identifier, view_commands
from uenvd.views import ImageMeta, View

META = ImageMeta(
    "app",
    "",
    "/user-environment",
    "default",
    (
        View(
            "default",
            "",
            (
                ("prepend", "PATH", ("/user-environment/bin",)),
                ("prepend", "PYTHONPATH", ("/user-environment/it's",)),
                ("set", "HOME_OF_APP", "a 'b' $c `d`"),
                ("unset", "PYTHONHOME"),
                ("set", "no-shell-name", "x"),
            ),
        ),
        View("more", "", (("append", "PATH", ("/user-environment/more",)),)),
    ),
)
ENVIRON = {"PATH": "/usr/bin:/bin", "PYTHONHOME": "/x"}
DEFAULT = TestEnvironment("default", ("mpi",), ("default",), ("echo activated",), cc="mpicc", extras={"n": 2})
HOST = TestEnvironment("host", ("plain",), uenv=False)
JOBS = SlurmJobs("build::app/1@d%z@sha256:1", "uenvd:sha256:1", ("--account=x",), "nodes")


def site(slurm: SlurmJobs | None = None, name: str = "app") -> Site:
    return Site(name, META, "demo", "zen3", ENVIRON, Path("/work dir"), 3725.0, slurm)


def valid(document: dict[str, Any]) -> dict[str, Any]:
    """Check against ReFrame's own schema."""
    schema = json.loads(resources.files("reframe").joinpath("schemas/config.json").read_text())
    jsonschema.validate(document, schema)
    return document


def test_local_tests_get_views_by_their_scripts() -> None:
    document = valid(configuration(site(), [DEFAULT, HOST]))
    ((system,), (default, host)) = document["systems"], document["environments"]
    (partition,) = system["partitions"]
    assert (system["name"], partition["name"], partition["scheduler"]) == ("demo", "local", "local")
    assert partition["environs"] == ["app_default", "host"]
    assert partition["time_limit"] == "1h2m5s"
    assert default["features"] == ["mpi", "uenv"]
    assert host["features"] == ["plain"]
    assert "env_vars" not in json.dumps(document)  # ReFrame would set them in its own process
    script = "\n".join([*default["prepare_cmds"], "env -0"])
    done = subprocess.run(
        ["bash", "-c", script],
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    first, _newline, variables = done.stdout.partition("\n")
    environ = dict(entry.split("=", 1) for entry in variables.split("\0") if entry)
    assert first == "activated"
    assert environ["PATH"] == "/user-environment/bin:/usr/bin:/bin"
    assert environ["PYTHONPATH"] == "/user-environment/it's"
    assert environ["HOME_OF_APP"] == "a 'b' $c `d`"
    assert "PYTHONHOME" not in environ
    assert "UENV_APPLIED" not in environ
    assert host["prepare_cmds"] == []


def test_jobs_get_image_and_views_as_options() -> None:
    document = valid(configuration(site(JOBS), [DEFAULT, TestEnvironment("bare"), HOST]))
    (partition,) = document["systems"][0]["partitions"]
    default, bare, host = document["environments"]
    assert (partition["name"], partition["launcher"], partition["access"]) == (
        "nodes",
        "srun",
        ["--account=x"],
    )
    assert partition["resources"] == [
        {"name": "uenv", "options": ["--uenv={uenv}"]},
        {"name": "uenv_views", "options": ["--view={views}"]},
    ]
    assert default["resources"] == {"uenv": {"uenv": JOBS.uenv}, "uenv_views": {"views": "default"}}
    assert bare["resources"] == {"uenv": {"uenv": JOBS.uenv}}
    assert "resources" not in host
    assert default["prepare_cmds"][0].startswith("grep -qF -- ' uenvd:sha256:1 ' /proc/self/mountinfo")
    assert not any("export" in line for line in default["prepare_cmds"])


def test_a_job_that_has_not_got_the_image_ends() -> None:
    (default,) = configuration(site(JOBS), [TestEnvironment("default")])["environments"]
    script = "\n".join([*default["prepare_cmds"], "echo ran"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (125, "")
    assert "the image under test is not mounted here" in done.stderr


def test_a_view_that_is_not_there_is_told_with_its_environment() -> None:
    wrong = TestEnvironment("dev", views=("develop",))
    for slurm in (None, JOBS):
        with pytest.raises(UnknownView, match="environment dev: there is no view 'develop'") as caught:
            configuration(site(slurm), [wrong])
        assert "app:default" in caught.value.hint


def test_several_views_and_none() -> None:
    assert view_commands(META, (), ENVIRON) == []
    assert view_commands(META, parse_views("app:more"), ENVIRON) == [
        "export PATH=/usr/bin:/bin:/user-environment/more"
    ]
    assert view_commands(None, (), ENVIRON) == []


def test_names_are_made_fit() -> None:
    assert [identifier(name) for name in ("a/1.0", "7zip", "x_y-z", "")] == ["a_1_0", "_7zip", "x_y-z", "_"]
    document = valid(configuration(site(name="prgenv-gnu"), [DEFAULT]))
    assert document["environments"][0]["name"] == "prgenv-gnu_default"
    assert "prgenv" in document["environments"][0]["features"]


def test_the_mount_is_recognised_by_its_source() -> None:
    table = (
        "28 1 0:25 / / rw - ext4 /dev/sda1 rw\n"
        "90 28 0:51 / /user-environment ro,nosuid - fuse.uenvd uenvd:/tmp/a\\040b ro\n"
        "91 28 0:52 / /x ro - tmpfs uenvd:/tmp/c ro\n"
    )
    assert is_mounted("uenvd:/tmp/a b", table)
    assert not is_mounted("uenvd:/tmp/a", table)
    assert not is_mounted("uenvd:/tmp/c", table)


def test_a_session_file_is_the_users_only(tmp_path: Path) -> None:
    path = tmp_path / "session.json"
    spec = Spec(("-r",), {"A": "1"}, None)
    spec.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Spec.load(path) == spec


def test_tests_start_as_after_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/tool/bin/python")
    environ = {
        "PATH": "/tool/bin:relative:/opt/slurm/bin:/usr/bin",
        "HOME": "/home/a",
        "LC_ALL": "C",
        "SBATCH_ACCOUNT": "x",
        "SLURM_CONF": "/c",
        "SLURM_JOB_ID": "1",
        "SECRET": "s",
        "KEPT": "k",
        "PYTHONPATH": "/p",
        "LD_LIBRARY_PATH": "/l",
        "UENV_APPLIED": "x",
    }
    assert login_environ(environ, ("KEPT",)) == {
        "PATH": "/opt/slurm/bin:/usr/bin",
        "HOME": "/home/a",
        "LC_ALL": "C",
        "SBATCH_ACCOUNT": "x",
        "SLURM_CONF": "/c",
        "KEPT": "k",
    }
    assert login_environ({})["PATH"] == "/usr/local/bin:/usr/bin:/bin"


def test_reframe_is_here() -> None:
    assert require_reframe() == metadata.version("reframe-hpc")
