"""Stages as jobs of a cluster that only FirecREST (version 2) leads to: scripts are submitted, followed and cancelled through pyfirecrest.

No image passes through FirecREST: the script carries the configuration and the cell's recipe, and the job pushes to the registry itself. A job
of a run that died is known by its working directory, whose name is the task's key. Dependencies are directives of the script.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import logging
import os
import posixpath
import shlex
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from uenvd.errors import ConfigError, DispatchFailed, ResourceMissing
from uenvd.publish.pipeline.executors import JobState, Output, Phase
from uenvd.publish.pipeline.executors.script import batch_script, directives
from uenvd.publish.pipeline.executors.slurm import ended
from uenvd.publish.pipeline.files import JobFiles
from uenvd.publish.pipeline.tasks import Task
from uenvd.publish.pipeline.waiting import Waker
from uenvd.publish.plan import Plan
from uenvd.publish.provenance import ci_variables
from uenvd.publish.recipe.model import NOT_PART_OF_A_RECIPE

POLL_S: Final = 10.0
PATIENCE_S: Final = 600.0
"""How long FirecREST may fail before a run gives up; jobs go on."""
REQUEST_S: Final = 30.0
RATE_LIMIT_RETRIES: Final = 5
"""How often a request is made again after 429; each pause is what the answer says, 10 s where it says nothing."""
MAX_SCRIPT_BYTES: Final = 3 << 20
"""slurmctld takes scripts of 4 MiB (max_script_size)."""
_MAX_LOG_BYTES: Final = 256 << 10
NOT_LISTED_S: Final = 120.0
"""How long a job may be unknown after it was submitted: FirecREST asks Slurm's accounting, which learns of jobs a little later."""
_CANCEL_S: Final = 60.0
_VARIABLES: Final = ("FIRECREST_URL", "AUTH_TOKEN_URL", "FIRECREST_CLIENT_ID", "FIRECREST_CLIENT_SECRET")
_QUEUED: Final = ("PENDING", "REQUEUED", "CONFIGURING", "SPECIAL_EXIT")
_LIVING: Final = ("RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT")
_OUT: Final = "result.out"
_LOG: Final = "messages.log"


class FirecrestExecutor:
    """Implements `Executor`.

    ``client`` is a ``firecrest.v2.Firecrest``; ``words(task, place)`` are those of the stage's command when the configuration is at ``place``;
    ``extras`` are further files that are put there, by their names there; ``environ`` is what the run knows of its CI job.
    """

    name = "firecrest"
    queues = True

    def __init__(
        self,
        client: Any,  # noqa: ANN401 -- of an optional package
        plan: Plan,
        files: JobFiles,
        waker: Waker,
        words: Callable[[Task, str], Sequence[str]],
        *,
        directory: str,
        command: str = "uenvd-publish",
        system: str | None = None,
        options: Sequence[str] = (),
        poll_s: float = POLL_S,
        extras: Mapping[str, Path] = MappingProxyType({}),
        environ: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.poll_s = poll_s
        self._extras = dict(extras)
        self._exports = [
            f"export {name}={shlex.quote(value)}" for name, value in ci_variables(environ).items()
        ]
        self._client = client
        self._plan = plan
        self._files = files
        self._waker = waker
        self._words = words
        self._directory = directory
        self._remote_command = command
        self._system = system
        self._options = tuple(options)
        self._reached_s = time.monotonic()
        self._ended: dict[str, JobState] = {}
        self._new: dict[str, float] = {}
        """When the jobs were submitted that FirecREST has not listed yet; monotonic."""

    # A job's name at this executor is its number with its cluster, for clusters number their jobs each for itself.

    def find(self, tasks: Sequence[Task]) -> Mapping[str, str]:
        """Return the jobs of an earlier run that still wait or run."""
        keys = {task.key for task in tasks}
        found = {}
        for system in {self._system_of(task) for task in tasks}:
            for job in self._ask("list jobs", partial(self._client.job_info, system)):
                key = posixpath.basename(str(job.get("workingDirectory") or "").rstrip("/"))
                if key in keys and _phase(job) is not Phase.ENDED:
                    found[key] = f"{system}:{job['jobId']}"
        return found

    def free(self) -> bool:
        """Whether a job can be submitted: always."""
        return True

    def start(self, task: Task, after: str | None) -> str:
        """Make the job's directory and submit its script."""
        system = self._system_of(task)
        place = posixpath.join(self._directory, task.key)
        self._files.clear(task)
        number = after.partition(":")[2] if after is not None else None
        options = directives(
            task, posixpath.join(place, _OUT), posixpath.join(place, _LOG), after=number, extra=self._options
        )
        inputs = posixpath.join(place, "inputs")
        script = batch_script(
            task,
            [*self._remote_command.split(), *self._words(task, inputs)],
            options,
            before=[*self._exports, *unpack_lines(pack(self._plan, task, self._extras), inputs)],
        )
        if len(script) > MAX_SCRIPT_BYTES:
            raise DispatchFailed(
                f"{task.name}: the recipe makes a script of {len(script)} bytes, more than the {MAX_SCRIPT_BYTES} that are submitted",
                hint="a recipe is text: does its directory hold something else?",
            )
        self._ask("make a directory", lambda: self._client.mkdir(system, place, create_parents=True))
        answer = self._ask("submit a job", lambda: self._client.submit(system, place, script_str=script))
        job = f"{system}:{answer['jobId']}"
        self._new[job] = time.monotonic()
        return job

    def states(self, jobs: Mapping[str, Task]) -> Mapping[str, JobState]:
        """Return the states of jobs. Raises `DispatchFailed` when there was no answer for `PATIENCE_S`."""
        found = {job: self._ended[job] for job in jobs if job in self._ended}
        open_jobs = [job for job in jobs if job not in found]
        for system in {job.partition(":")[0] for job in open_jobs}:
            mine = {job for job in open_jobs if job.startswith(f"{system}:")}
            try:
                listed = self._ask("list jobs", partial(self._client.job_info, system))
            except DispatchFailed:
                if time.monotonic() - self._reached_s > PATIENCE_S:
                    raise
                found |= {job: JobState(Phase.QUEUED, None, "FirecREST does not answer") for job in mine}
                continue
            seen = {f"{system}:{job['jobId']}": job for job in listed}
            for job in mine:
                found[job] = self._state(job, seen.get(job))
        return found

    def _state(self, job: str, said: Mapping[str, Any] | None) -> JobState:
        if said is None:
            try:
                said = self._one(job)
            except DispatchFailed as error:
                # No answer says nothing of the job: it may still run.
                return JobState(Phase.QUEUED, None, error.message)
        if said is not None:
            self._new.pop(job, None)
        if said is None:
            if time.monotonic() - self._new.get(job, float("-inf")) < NOT_LISTED_S:
                return JobState(Phase.QUEUED, None, "FirecREST does not list it yet")
            state = JobState(Phase.ENDED, None, "FirecREST does not know the job any more")
        elif (phase := _phase(said)) is not Phase.ENDED:
            reason = str(said["status"].get("stateReason") or "")
            return JobState(phase, None, "" if reason == "None" else reason)
        else:
            status = said["status"]
            code, killer = status.get("exitCode"), status.get("interruptSignal")
            state = ended(_word(said), f"{code if code is not None else 1}:{killer or 0}")
        self._ended[job] = state
        return state

    def _one(self, job: str) -> Mapping[str, Any] | None:
        """Ask for one job that is not in the list any more; None where FirecREST says that there is none. Raises `DispatchFailed`."""
        import firecrest

        def ask() -> Any:  # noqa: ANN401 -- JSON of the API
            try:
                return self._client.job_info(system, number)
            except firecrest.FirecrestException as error:
                if error.responses[-1].status_code == 404:
                    return []
                raise

        system, _colon, number = job.partition(":")
        listed = self._ask("ask for a job", ask)
        return next((one for one in listed if str(one["jobId"]) == number), None)

    def output(self, job: str, task: Task) -> Output:
        """Fetch what an ended job printed, and keep it here."""
        system = job.partition(":")[0]
        place = posixpath.join(self._directory, task.key)
        texts = []
        for name in (_OUT, _LOG):
            path = posixpath.join(place, name)
            try:
                tail = self._ask(
                    "read a log",
                    partial(self._client.tail, system, path, num_bytes=_MAX_LOG_BYTES),
                )
                texts.append(str(tail.get("content", "")) if isinstance(tail, dict) else str(tail or ""))
            except DispatchFailed as error:
                texts.append("" if name == _OUT else f"(the log cannot be read: {error.message})\n")
        self._files.keep(task, *texts)
        return self._files.output(task)

    def cancel(self, jobs: Mapping[str, Task]) -> None:
        """Cancel jobs and wait until they have ended."""
        for job in jobs:
            if job not in self._ended:
                system, _colon, number = job.partition(":")
                self._ask(
                    "cancel a job",
                    partial(self._client.cancel_job, system, number),
                )
        deadline = time.monotonic() + _CANCEL_S
        while time.monotonic() < deadline:
            if all(state.phase is Phase.ENDED for state in self.states(jobs).values()):
                return
            time.sleep(min(1.0, self.poll_s))

    def wait(self, seconds: float) -> None:
        """Sleep, but not shorter than FirecREST likes to be asked."""
        self._waker.wait(max(seconds, self.poll_s))

    def close(self) -> None:
        """Close the connections; jobs go on."""
        self._client.close_session()

    def _system_of(self, task: Task) -> str:
        return self._system or task.cell.system

    def _ask(self, what: str, request: Callable[[], Any]) -> Any:  # noqa: ANN401 -- JSON of the API
        """Make a request. Raises `DispatchFailed` for every way in which it can fail, without what could be a secret."""
        import firecrest
        import httpx
        import requests

        try:
            answer = request()
        except firecrest.FirecrestException as error:
            response = error.responses[-1]
            hint = ""
            if isinstance(error, firecrest.ClientsCredentialsException) or response.status_code in (401, 403):
                hint = "check FIRECREST_CLIENT_ID, FIRECREST_CLIENT_SECRET and AUTH_TOKEN_URL, and what this client may do"
            raise DispatchFailed(
                f"FirecREST would not {what}: {response.status_code} {_reason(response)}", hint=hint
            ) from error
        except (httpx.HTTPError, requests.RequestException) as error:
            raise DispatchFailed(
                f"FirecREST cannot be asked to {what}: {type(error).__name__}",
                hint="check FIRECREST_URL and the network; jobs go on, and the same command finds them again",
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise DispatchFailed(
                f"FirecREST answered with something else when asked to {what}: {error!r}"
            ) from error
        self._reached_s = time.monotonic()
        return answer


def firecrest_executor(
    plan: Plan,
    files: JobFiles,
    waker: Waker,
    words: Callable[[Task, str], Sequence[str]],
    arguments: argparse.Namespace,
    extras: Mapping[str, Path],
) -> FirecrestExecutor:
    """Return the executor that options and environment describe. Raises `ResourceMissing` without pyfirecrest, `ConfigError`."""
    try:
        import firecrest
    except ImportError as error:
        raise ResourceMissing(
            "pyfirecrest is not installed beside uenvd-publish",
            hint="install it into the same environment: pip install 'uenvd[firecrest]'",
        ) from error
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"to reach FirecREST the environment must have {', '.join(missing)}")
    if arguments.remote_dir is None or not arguments.remote_dir.startswith("/"):
        raise ConfigError(
            "where on the cluster may jobs keep their logs?", hint="say --remote-dir /scratch/…/uenv-run"
        )
    url, token_url, client, secret = (os.environ[name] for name in _VARIABLES)
    authorization = firecrest.ClientCredentialsAuth(client, secret, token_url)
    authorization.timeout = REQUEST_S
    authorization.disable_client_logging = True
    api = firecrest.v2.Firecrest(url, authorization)
    api.timeout = REQUEST_S
    api.num_retries_rate_limit = RATE_LIMIT_RETRIES
    api.disable_client_logging = True
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return FirecrestExecutor(
        api,
        plan,
        files,
        waker,
        words,
        directory=arguments.remote_dir.rstrip("/"),
        command=arguments.remote_command,
        system=arguments.remote_system,
        options=arguments.sbatch_option,
        extras=extras,
        environ=os.environ,
        **({} if arguments.poll is None else {"poll_s": arguments.poll}),
    )


def pack(plan: Plan, task: Task, extras: Mapping[str, Path] = MappingProxyType({})) -> bytes:
    """Return a gzipped tar archive of the configuration, the cell's recipe, with links to files outside of it followed, and ``extras``.

    Equal for equal files.
    """
    buffer = io.BytesIO()
    recipe = task.cell.recipe
    base = posixpath.join("recipes", task.cell.name, recipe_path(task))

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(member.name).parts
        if any(part in NOT_PART_OF_A_RECIPE for part in parts):
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mtime = 0
        member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
        return member

    with tarfile.open(fileobj=buffer, mode="w", dereference=True) as archive:
        text = one_cell(task)
        member = tarfile.TarInfo("config.yaml")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
        archive.add(recipe, base, filter=plain)
        for name, path in extras.items():
            archive.add(path, name, filter=plain)
    return gzip.compress(buffer.getvalue(), mtime=0)


def recipe_path(task: Task) -> str:
    """Return where the recipe is put below ``recipes/<name>/``: the image's version is read from its path."""
    parts = task.cell.recipe.parts
    return parts[-1] if parts[-2:-1] == (task.cell.name,) else "/".join(parts[-2:])


def one_cell(task: Task) -> bytes:
    """Return a configuration that has this cell only (JSON is YAML): what else the site's file says is not sent about."""
    cell = task.cell
    target: dict[str, object] = {"uarch": cell.uarch, "variables": dict(cell.variables)}
    if cell.partition is not None:
        target["partition"] = cell.partition
    body = {
        "clusters": {cell.system: {"targets": [target], "no_bwrap": cell.no_bwrap}},
        "uenvs": {
            cell.name: {
                cell.version: {
                    "recipes": {cell.uarch: recipe_path(task)},
                    "deploy": {cell.system: [cell.uarch]} if cell.deploy else {},
                    "mount": cell.mount,
                }
            }
        },
    }
    return json.dumps(body, indent=1).encode()


def unpack_lines(packed: bytes, place: str) -> list[str]:
    """Return the lines of a script that unpack an archive at ``place``."""
    text = base64.encodebytes(packed).decode()
    quoted = shlex.quote(place)
    return [
        f"mkdir -p {quoted} || exit 1",
        f"base64 -d <<'END_OF_INPUTS' | tar -xz -C {quoted} --no-same-owner || exit 1",
        f"{text}END_OF_INPUTS",
    ]


def _word(job: Mapping[str, Any]) -> str:
    state = job["status"]["state"]
    return str(state[0] if isinstance(state, list) and state else state).partition(",")[0].split()[0].upper()


def _phase(job: Mapping[str, Any]) -> Phase:
    word = _word(job)
    return Phase.QUEUED if word in _QUEUED else Phase.RUNNING if word in _LIVING else Phase.ENDED


def _reason(response: Any) -> str:  # noqa: ANN401 -- of httpx or requests
    """Return what an answer says went wrong, short."""
    try:
        body = response.json()
    except ValueError:
        return ""
    text = body.get("message") or body.get("error") or "" if isinstance(body, dict) else ""
    return str(text)[:300]
