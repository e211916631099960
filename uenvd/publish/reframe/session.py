"""One run of ReFrame as a process of its own: started in the mount, watched, ended in time, and made to leave a report whatever happens."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Final

from uenvd.errors import ReportError, ResourceMissing
from uenvd.publish.reframe.environments import TestEnvironment
from uenvd.publish.reframe.inside import MARK, NOT_MOUNTED, Spec
from uenvd.publish.reframe.report import MAX_REPORT_BYTES, empty_report, judge, with_problem
from uenvd.publish.reframe.site import Site, configuration, report_path, warnings_path

SESSION_CASE: Final = "reframe-session"
"""Name of the made-up test case that stands for the session in a report."""
_POLITE_S: Final = 20.0
"""How long ReFrame may take to cancel its jobs after SIGINT."""
_TAIL_LINES: Final = 15
_PROGRESS = re.compile(r"^\[ +(?:OK|FAIL|SKIP|XFAIL|XPASS|ABORT|PASSED|FAILED|ABORTED|RUN) +\]")
_UNSEEN = re.compile(r"skipping test|skipping incompatible|does not exist|not copyable")
"""ReFrame's warnings about tests that it leaves out, and then does not count."""

_KEPT_VARIABLES: Final = (
    *("HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TERM", "TZ", "TMPDIR", "XDG_RUNTIME_DIR"),
    *("SLURM_CONF", "SLURM_MPI_TYPE", "UENVD_SOCKET"),
)
_KEPT_PREFIXES: Final = ("LC_", "SBATCH_")


@dataclass(frozen=True)
class Outcome:
    """What came of a session."""

    report: bytes
    """Always a valid report; what happened to the session itself is a failed case in it."""
    problems: tuple[str, ...]
    """What happened to the session itself, a line each."""
    log: Path
    """What ReFrame printed."""
    seconds: float


def require_reframe() -> str:
    """Return the version of ReFrame. Raises `ResourceMissing` without one."""
    if importlib.util.find_spec("reframe") is None:
        raise ResourceMissing(
            "ReFrame is not installed beside uenvd-publish",
            hint="install it into the same environment: pip install 'uenvd[publish]'",
        )
    return metadata.version("reframe-hpc")


def login_environ(environ: Mapping[str, str], passed: Sequence[str] = ()) -> dict[str, str]:
    """Return the environment in which tests start: that of a plain login, so that neither secrets nor the tool's own Python are in it.

    ``passed`` names further variables to be kept.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if name in _KEPT_VARIABLES or name in passed or name.startswith(_KEPT_PREFIXES)
    }
    # Both as it was called and what that leads to: what tests call `python3` must not be the interpreter of this tool.
    tool = {str(Path(sys.executable).parent), str(Path(sys.prefix, "bin"))}
    tool |= {os.path.realpath(place) for place in tool}
    tool -= {"/usr/bin", "/bin", "/usr/local/bin"}
    path = [
        place
        for place in environ.get("PATH", "").split(":")
        if place.startswith("/") and place not in tool and os.path.realpath(place) not in tool
    ]
    return {**kept, "PATH": ":".join(path) or "/usr/local/bin:/usr/bin:/bin"}


def run_session(
    site: Site,
    environments: Sequence[TestEnvironment],
    tests: Sequence[Path],
    *,
    entry: Sequence[str],
    source: str | None,
    limit_s: float,
    say: Callable[[str], None],
) -> Outcome:
    """Run all tests that select one of these environments.

    Args:
        site: what is tested where; its ``workdir`` exists and has no session's files in it.
        environments: all with the image or all without.
        tests: files and directories of tests, absolute.
        entry: the words that come before the command so that it runs inside the mount; may be empty.
        source: what must be mounted there (``uenvd:…``); None if nothing.
        limit_s: for the whole session.
        say: gets a line for each test.

    Raises:
        UnknownView: an environment names a view that the image has not.
        ResourceMissing: there is no ReFrame.

    """
    version = require_reframe()
    log = site.workdir / "reframe.out"
    if not tests:
        log.touch()
        return Outcome(empty_report(version, time.time()), (), log, 0.0)
    mark = uuid.uuid4().hex
    settings = site.workdir / "site.yaml"
    settings.write_text(json.dumps(configuration(site, environments), indent=1))  # JSON is YAML
    arguments = ["-C", str(settings), "--system", site.target, "--prefix", str(site.workdir), "-R"]
    for path in tests:
        arguments += ["-c", str(path)]
    if site.slurm is not None:
        # Otherwise ReFrame compiles here, outside of the job and so outside of the image.
        arguments += ["-S", "build_locally=0"]
    arguments += ["--max-retries=0", "--nocolor", "-r"]
    spec = site.workdir / "session.json"
    Spec(tuple(arguments), {**site.environ, MARK: mark}, source).save(spec)
    # `env -i`: what the session adds (the image's default view) must not reach this interpreter's start either.
    command = [
        *entry,
        "/usr/bin/env",
        "-i",
        sys.executable,
        "-I",
        "-m",
        "uenvd.publish.reframe.inside",
        str(spec),
    ]
    began_s = time.monotonic()
    began_unix_s = time.time()
    status, timed_out = _watch(command, site, mark, log, limit_s, say)
    problems = _problems(site, status, timed_out, limit_s, log)
    report = _report(site, version, began_unix_s, problems)
    if status not in (0, NOT_MOUNTED) and not problems and judge(report).passing:
        problems.append(f"ReFrame ended with status {status} although its report passes")
    for number, problem in enumerate(problems):
        report = with_problem(report, SESSION_CASE + (f"-{number + 1}" if number else ""), problem)
    return Outcome(report, tuple(problems), log, time.monotonic() - began_s)


def _watch(
    command: Sequence[str], site: Site, mark: str, log: Path, limit_s: float, say: Callable[[str], None]
) -> tuple[int, bool]:
    """Run the command to its end, or to the limit; return its status and whether it was ended. Nothing of it is left then."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=site.workdir,
            env={**site.environ, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout, file, say), daemon=True)
        reader.start()
        timed_out = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(process)
            if site.slurm is None:
                _kill_marked(mark)
            reader.join(_POLITE_S)
    return process.returncode, timed_out


def _copy(source: IO[bytes], target: IO[bytes], say: Callable[[str], None]) -> None:
    """Copy ReFrame's output to the log; tell the lines that say how far it is."""
    for line in source:
        with contextlib.suppress(ValueError):  # closed: the log is complete as far as anybody waits for it
            target.write(line)
            target.flush()
        text = line.decode(errors="replace").rstrip()
        if _PROGRESS.match(text) and "[ RUN" not in text:
            say(text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End ReFrame so that it cancels its jobs; by force if it does not."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_POLITE_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _kill_marked(mark: str) -> None:
    """Kill what is left of a session: local tests have sessions of their own, and may have left processes behind."""
    wanted = f"{MARK}={mark}".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if directory.stat().st_uid in (os.getuid(), 0) and wanted in (
                directory / "environ"
            ).read_bytes().split(b"\0"):
                os.kill(int(directory.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue  # it has ended, or is somebody else's


def _problems(site: Site, status: int, timed_out: bool, limit_s: float, log: Path) -> list[str]:
    """Return what went wrong with the session itself."""
    found = []
    if timed_out:
        found.append(f"the tests did not end within {limit_s:.0f} s and were stopped")
    elif status == NOT_MOUNTED:
        found.append("the image was not mounted where the tests ran")
    elif not report_path(site.workdir).exists() and not (status == 0 and _nothing_selected(log)):
        how = f"status {status}" if status >= 0 else f"signal {-status}"
        found.append(f"ReFrame ended with {how} before it wrote a report: {_last_line(log)}")
    try:
        warnings = warnings_path(site.workdir).read_text(errors="replace").splitlines()
    except OSError:
        warnings = []
    for line in warnings:
        if _UNSEEN.search(line):
            found.append(f"tests were left out: {line.partition(': ')[2][:300]}")
    return found


def _nothing_selected(log: Path) -> bool:
    return "] Ran 0/0 test case(s)" in log.read_text(errors="replace")


def _report(site: Site, version: str, began_unix_s: float, problems: list[str]) -> bytes:
    """Return ReFrame's report, or an empty one where there is none; one that cannot be read is a problem."""
    path = report_path(site.workdir)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_REPORT_BYTES + 1)
        judge(raw)
    except FileNotFoundError:
        return empty_report(version, began_unix_s)
    except (OSError, ReportError) as error:
        problems.append(f"ReFrame's report cannot be used: {error}")
        return empty_report(version, began_unix_s)
    return raw


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in tail(log) if line.strip() and not line.startswith("Log file(s)")]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it printed nothing"])[-1][:300]


def tail(log: Path, lines: int = _TAIL_LINES) -> list[str]:
    """Return the end of a log."""
    try:
        return log.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def failure_info(outcome: Outcome) -> str:
    """Return ReFrame's own account of what failed, or its last words where it had no time for one; empty if nothing failed."""
    text = outcome.log.read_text(errors="replace")
    _before, found, after = text.partition("SUMMARY OF FAILURES")
    if found:
        return after.partition("\nLog file(s)")[0].strip("=\n -")
    return "\n".join(["The end of ReFrame's output:", *tail(outcome.log)]) if outcome.problems else ""
