"""The site configuration with which ReFrame tests one image. Pure.

Two things are kept apart: the environment of ReFrame itself, which is the tool's own, and that of the tests. Views reach the tests by
``prepare_cmds``, lines in the scripts that ReFrame generates, never by ``env_vars``, which ReFrame sets in its own process: an image's
``PYTHONPATH`` or ``LD_LIBRARY_PATH`` would change the interpreter that runs it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from uenvd.errors import UnknownView
from uenvd.label import ViewName, parse_views
from uenvd.publish.reframe.environments import TestEnvironment
from uenvd.views import APPLIED, ImageMeta, apply_ops, select_views, view_ops

LAUNCHER: Final = "uenvd-mpiexec"
"""Our launcher of local tests: MPI's where a test has several tasks, none else (`uenvd.publish.reframe.inside` registers it)."""
LOCAL: Final = "local"
_SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class SlurmJobs:
    """How tests become jobs of Slurm."""

    uenv: str
    """The value of ``--uenv``: the image by its digest."""
    source: str
    """What the image's mount says that it is, ``uenvd:sha256:…``."""
    options: tuple[str, ...] = ()
    """For sbatch, such as ``--account=x``."""
    partition: str = "slurm"
    """Its name in the report and for ReFrame's references."""
    backend: Literal["slurm", "squeue"] = "slurm"
    """How ReFrame follows jobs: ``slurm`` needs accounting (sacct)."""


@dataclass(frozen=True)
class Site:
    """What is tested where."""

    name: str
    """Of the image, for names of environments."""
    meta: ImageMeta | None
    system: str
    uarch: str | None
    environ: Mapping[str, str]
    """In which local tests start, before the views."""
    workdir: Path
    """Where ReFrame keeps everything; absolute."""
    test_limit_s: float
    """For a test that has no time limit of its own."""
    slurm: SlurmJobs | None = None

    @property
    def partition(self) -> str:
        """The name of the one partition."""
        return identifier(self.slurm.partition) if self.slurm else LOCAL

    @property
    def target(self) -> str:
        """The value of ``--system``."""
        return f"{identifier(self.system)}:{self.partition}"


def environment_name(site: Site, environment: TestEnvironment) -> str:
    """Return ReFrame's name of an environment: ``<image>_<environment>``; that of the plain host has no image in it."""
    return identifier(f"{site.name}_{environment.name}" if environment.uenv else environment.name)


def identifier(text: str) -> str:
    """Return a text as ReFrame wants the names of systems, partitions and environments."""
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", text)
    return clean if clean[:1].isalpha() or clean[:1] == "_" else f"_{clean}"


def configuration(site: Site, environments: Sequence[TestEnvironment]) -> dict[str, Any]:
    """Return the document for ``reframe -C``. Raises `UnknownView` if an environment names a view that the image has not."""
    partition: dict[str, Any] = {
        "name": site.partition,
        "descr": "jobs of Slurm" if site.slurm else "processes of this machine",
        "environs": [environment_name(site, environment) for environment in environments],
        "features": ["uenv", *(["remote"] if site.slurm else [])],
        "time_limit": _duration(site.test_limit_s),
        "extras": {"uarch": site.uarch or ""},
    }
    if site.slurm is None:
        partition |= {"scheduler": "local", "launcher": LAUNCHER, "max_jobs": 1}
    else:
        partition |= {
            "scheduler": site.slurm.backend,
            "launcher": "srun",
            "access": list(site.slurm.options),
            "max_jobs": 8,
            "resources": [
                {"name": "uenv", "options": ["--uenv={uenv}"]},
                {"name": "uenv_views", "options": ["--view={views}"]},
            ],
        }
        if site.uarch:
            partition["processor"] = {"arch": site.uarch}
    return {
        "systems": [
            {
                "name": identifier(site.system),
                "descr": "where an image is tested",
                "hostnames": [".*"],
                "modules_system": "nomod",
                "prefix": str(site.workdir),
                "partitions": [partition],
            }
        ],
        "environments": [_environment(site, environment) for environment in environments],
        "general": [
            {
                "remote_detect": False,
                "colorize": False,
                "keep_stage_files": True,
                "purge_environment": False,
                "save_log_files": False,
                "topology_prefix": str(site.workdir / "topology"),
                "report_file": str(report_path(site.workdir)),
            }
        ],
        "logging": [
            {
                "perflog_compat": False,
                "handlers": [
                    _log_file(site.workdir / "reframe.log", "debug"),
                    _log_file(warnings_path(site.workdir), "warning"),
                ],
                "handlers_perflog": [
                    {
                        "type": "filelog",
                        "prefix": "%(check_system)s/%(check_partition)s",
                        "basedir": str(site.workdir / "perflogs"),
                        "level": "info",
                        "format": "%(check_job_completion_time)s|%(check_display_name)s|%(check_perfvalues)s",
                    }
                ],
            }
        ],
    }


def report_path(workdir: Path) -> Path:
    """Return where ReFrame writes its report."""
    return workdir / "report.json"


def warnings_path(workdir: Path) -> Path:
    """Return where ReFrame's warnings are."""
    return workdir / "warnings.log"


def _log_file(path: Path, level: str) -> dict[str, Any]:
    return {
        "type": "file",
        "name": str(path),
        "level": level,
        "format": "%(levelname)s: %(message)s",
        "append": False,
    }


def _environment(site: Site, environment: TestEnvironment) -> dict[str, Any]:
    features = list(environment.features)
    if environment.uenv:
        features.append("uenv")
        if site.name.startswith("prgenv"):
            features.append("prgenv")  # as CSCS's configuration: what its tests of compilers select
    body: dict[str, Any] = {
        "name": environment_name(site, environment),
        "features": list(dict.fromkeys(features)),
        "extras": environment.extras,
        "prepare_cmds": [*_preparation(site, environment), *environment.activation],
    }
    for key, compiler in (("cc", environment.cc), ("cxx", environment.cxx), ("ftn", environment.ftn)):
        if compiler is not None:
            body[key] = compiler
    if site.slurm is not None and environment.uenv:
        body["resources"] = {"uenv": {"uenv": site.slurm.uenv}}
        if environment.views:
            body["resources"]["uenv_views"] = {"views": ",".join(environment.views)}
    return body


def _preparation(site: Site, environment: TestEnvironment) -> list[str]:
    """Return the lines that make the environment, or that make sure of what Slurm made."""
    if not environment.uenv:
        return []
    views = wanted_views(site, environment)
    if site.slurm is None:
        return view_commands(site.meta, views, site.environ)
    source = shlex.quote(f" {site.slurm.source} ")
    return [
        f"grep -qF -- {source} /proc/self/mountinfo || {{ echo 'the image under test is not mounted here' >&2; exit 125; }}"
    ]


def wanted_views(site: Site, environment: TestEnvironment) -> tuple[ViewName, ...]:
    """Return the views of an environment. Raises `UnknownView` if the image has not got them."""
    views = parse_views(",".join(environment.views)) if environment.views else ()
    try:
        select_views([(None, site.meta)], views, use_default=False)
    except UnknownView as error:
        raise UnknownView(f"environment {environment.name}: {error.message}", hint=error.hint) from error
    return views


def view_commands(meta: ImageMeta | None, views: Sequence[ViewName], environ: Mapping[str, str]) -> list[str]:
    """Return shell lines that do to ``environ`` what the views do. Raises `UnknownView`."""
    ops = view_ops(select_views([(None, meta)], views, use_default=False))
    lines = []
    for name, value in apply_ops(ops, "", environ).items():
        if name == APPLIED or not _SHELL_NAME.fullmatch(name):
            continue  # no shell has such a variable
        lines.append(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")
    return lines


def _duration(seconds: float) -> str:
    whole = max(1, round(seconds))
    return f"{whole // 3600}h{whole % 3600 // 60}m{whole % 60}s"
