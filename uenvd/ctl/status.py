"""``uenvctl status``: the session that one is in, as the kernel tells it, and the state of uenvd."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from uenvd.ctl import output
from uenvd.ctl.arguments import FLAG, parse
from uenvd.ctl.client import Client, socket_path
from uenvd.ctl.own import name_of
from uenvd.ctl.session import Mounted, mounted_images
from uenvd.errors import UenvError, UsageError

HELP = """\
usage: uenvctl status

Show which images are mounted for this shell (by asking the kernel, not the environment), and whether uenvd runs on
this node and what it serves. The exit status is 0 also when it does not run.

  --json         {"session": [...], "daemon": {...} or null, "error": text or null}, see docs/json.md
  --metrics      uenvd's counters as Prometheus reads them, and nothing else
  --no-header    the table of images without its header
  --socket PATH  uenvd's control socket, default $UENVD_SOCKET or /run/uenvd/control

examples:
  uenvctl status
  uenvctl status --json
"""

OPTIONS = {"--json": FLAG, "--metrics": FLAG, "--no-header": FLAG}
TAKES = ()


def main(argv: Sequence[str]) -> int:
    """Handle the command; return the exit status."""
    arguments = parse(argv, command="status", options=OPTIONS)
    if "--help" in arguments.flags:
        print(HELP, end="")
        return 0
    if "--metrics" in arguments.flags:
        if not arguments.flags.isdisjoint(("--json", "--no-header")):
            raise UsageError("--metrics has a form of its own", hint="leave out --json and --no-header")
        with Client(socket_path(arguments.values.get("--socket"), os.environ)) as client:
            output.data(str(client.call("metrics").frame.get("text")).rstrip())
        return 0
    daemon: dict[str, Any] | None = None
    problem: UenvError | None = None
    try:
        with Client(socket_path(arguments.values.get("--socket"), os.environ)) as client:
            daemon = client.call("status").frame
            daemon.pop("ok")
    except UenvError as error:
        problem = error
    labels = {str(one.get("digest")): str(one.get("label")) for one in _images(daemon)}
    session = [(one, labels.get(one.source) or name_of(one.source, os.environ)) for one in mounted_images()]
    if "--json" in arguments.flags:
        output.data_json(
            {
                "session": [{**one._asdict(), "label": label} for one, label in session],
                "daemon": daemon,
                "error": None if problem is None else problem.message,
            }
        )
        return 0
    rows = [*_session_rows(session), *_daemon_rows(daemon, problem)]
    output.data(output.table((), rows))
    images = [_image_row(one) for one in _images(daemon)]
    if images:
        header = (
            () if "--no-header" in arguments.flags else ("image", "state", "users", "fetched(MB)", "size(MB)")
        )
        output.data(output.table(header, images, right=frozenset({2, 3, 4})))
    return 0


def _images(daemon: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    images = daemon.get("images") if daemon else None
    return [one for one in images if isinstance(one, dict)] if isinstance(images, list) else []


def _session_rows(session: Sequence[tuple[Mounted, str]]) -> list[tuple[str, str]]:
    if not session:
        return [("session:", "none")]
    rows: list[tuple[str, str]] = []
    for one, label in session:
        digest = f" ({one.source})" if label != one.source else ""
        rows.append(("session:" if not rows else "", f"{label} at {one.mount}{digest}"))
    views = os.environ.get("UENV_VIEW", "")
    if views:
        rows.append(("views:", ", ".join(view.partition(":")[2] for view in views.split(","))))
    return rows


def _daemon_rows(daemon: Mapping[str, Any] | None, problem: UenvError | None) -> list[tuple[str, str]]:
    if daemon is None:
        return [("uenvd:", problem.message if problem is not None else "unknown")]
    facts = [
        str(daemon.get("version")),
        *(f"{name} {daemon[name]}" for name in ("system", "uarch", "registry") if daemon.get(name)),
    ]
    rows = [("uenvd:", ", ".join(facts))]
    cache = daemon.get("cache")
    if isinstance(cache, dict):
        used, free = (cache.get(name) for name in ("used_bytes", "free_bytes"))
        sizes = [
            f"{output.megabytes(size)} MB {word}"
            for size, word in ((used, "used"), (free, "free"))
            if isinstance(size, int)
        ]
        rows.append(("cache:", ", ".join([str(cache.get("path")), *sizes])))
    metrics = daemon.get("metrics")
    if isinstance(metrics, dict):
        rows.append(("activity:", _activity(metrics)))
    return rows


def _activity(metrics: Mapping[str, Any]) -> str:
    """Return what the daemon did since it started, in a line."""

    def number(name: str) -> float:
        value = metrics.get(name)
        return value if isinstance(value, int | float) else 0

    def plural(count: float, word: str) -> str:
        return f"{count:.0f} {word}{'' if count == 1 else 's'}"

    parts = [plural(number("mounts"), "mount")]
    if number("mounts"):
        parts[0] += f" ({number('hits') / number('mounts'):.0%} here already)"
    if number("pulls"):
        parts.append(
            f"{plural(number('pulls'), 'pull')} ({output.megabytes(int(number('pulled_bytes')))} MB)"
        )
    if number("ready_median_s"):
        parts.append(f"half ready within {_duration(number('ready_median_s'))}")
    failed = number("failed_requests") + number("failed_images")
    if failed:
        parts.append(plural(failed, "failure"))
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(number("since")))
    return f"{', '.join(parts)} since {since}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.0f} s"


def _image_row(one: Mapping[str, Any]) -> tuple[str, ...]:
    done, total = one.get("done_bytes"), one.get("total_bytes")
    return (
        str(one.get("label") or one.get("digest")),
        str(one.get("state")),
        str(one.get("leases")),
        output.megabytes(done) if isinstance(done, int) else "",
        output.megabytes(total) if isinstance(total, int) else "",
    )
