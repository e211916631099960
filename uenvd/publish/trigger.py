"""``uenvd-publish trigger``: a comment starts a plan, if its author may. What a CI service does, as one command inside any CI.

Who may start what is read from the *base* branch: a merge request that adds its author to the list changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from uenvd.errors import StatusNotPosted, StorageError, UenvError, UsageError
from uenvd.publish import run as run_command
from uenvd.publish.console import say, show_json
from uenvd.publish.plan import DEFAULT_SITE, Plan, git, load_plan
from uenvd.publish.plan.changes import changes_since
from uenvd.publish.plan.comment import (
    ALLOW_FILE,
    COMMAND,
    EXAMPLE,
    Comment,
    Pipeline,
    parse_allow_list,
    parse_comment,
    permit,
)
from uenvd.publish.plan.forges import Forge, State, Status, post_status
from uenvd.publish.plan.show import require_none, say_problems
from uenvd.publish.status import add_forge_options, job_url, need_forge

MAX_EVENT_BYTES: Final = 16 << 20
MAX_LOG_BYTES: Final = 256 << 20


@dataclass
class Record:
    """A line of the log."""

    user: str
    comment: str
    base: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    head: str = ""
    base_commit: str = ""
    replay_of: str | None = None
    cells: dict[str, list[str]] = field(default_factory=dict)
    """Pipeline -> ids."""
    decision: str = "refused"
    """``refused``, ``planned`` (``--dry-run``), ``started``, then ``passed`` or ``failed``."""
    reason: str | None = None


@dataclass(frozen=True)
class Start:
    """One pipeline that is to be started."""

    pipeline: Pipeline
    plan: Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    what = parser.add_argument_group("what")
    what.add_argument(
        "comment", metavar="COMMENT", nargs="?", help=f"its first line counts: {EXAMPLE}; - reads stdin"
    )
    what.add_argument(
        "--user", metavar="NAME", help="who wrote it, as the forge says (not as the comment says)"
    )
    what.add_argument(
        "--event",
        type=Path,
        metavar="FILE",
        help="both, from the forge's event: $GITHUB_EVENT_PATH, or GitLab's note hook",
    )
    what.add_argument(
        "--replay", metavar="ID", help="both, from a line of --log: checked anew, for the same commit only"
    )
    what.add_argument(
        "--base",
        metavar="BRANCH",
        required=True,
        help="the branch that the change is for, in this clone: origin/main",
    )
    what.add_argument(
        "--allow",
        default=ALLOW_FILE,
        metavar="FILE",
        help=f"the allow-list, read from BASE; default: {ALLOW_FILE}",
    )
    what.add_argument(
        "--repository",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="the checkout of the change; default: here",
    )
    what.add_argument(
        "--command",
        default=COMMAND,
        dest="words",
        metavar="WORDS",
        help=f"how commands begin; default: {COMMAND}",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, as JSON")
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="append a line of JSON for each trigger, also a refused one"
    )
    parser.add_argument(
        "--status", action="store_true", help="post the status of each pipeline as a whole, SITE/PIPELINE"
    )
    parser.add_argument(
        "--site",
        default=DEFAULT_SITE,
        metavar="NAME",
        help=f"first part of contexts; default: {DEFAULT_SITE}",
    )
    parser.add_argument(
        "--with",
        action="append",
        default=[],
        dest="extra",
        metavar="ARGUMENT",
        help="a further argument of uenvd-publish run",
    )
    add_forge_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Start what the comment asks for; the status is that of the run. A comment that is no command is none of our business: 0."""
    record = _record(arguments)
    forge: Forge | None = None
    directory = arguments.repository.absolute()
    try:
        comment = parse_comment(record.comment, arguments.words)
        if comment is None:
            say("no command")
            return 0
        starts = _decide(arguments, directory, comment, record)
        if arguments.status and not arguments.dry_run:
            forge = need_forge(arguments)
    except UenvError as error:
        record.reason = error.message
        _append(arguments.log, record)
        raise
    record.decision = "planned" if arguments.dry_run else "started"
    _append(arguments.log, record)
    if arguments.dry_run:
        show_json({**asdict(record), "commands": [_words(arguments, start) for start in starts]})
        return 0
    say(f"trigger {record.id}: {sum(len(start.plan.cells) for start in starts)} cells for {record.user}")
    status = 1
    try:
        status = _run_all(arguments, starts, comment, forge)
    finally:
        record.decision = "failed" if status else "passed"
        _append(arguments.log, record)
    return status


def _record(arguments: argparse.Namespace) -> Record:
    given = [arguments.comment is not None, arguments.event is not None, arguments.replay is not None]
    if sum(given) != 1:
        raise UsageError("one of COMMENT, --event and --replay says what to do")
    if arguments.event is not None:
        if arguments.user is not None:
            raise UsageError("--event says who wrote the comment; --user is for COMMENT")
        user, text = _of_event(arguments.event)
        return Record(user, text, arguments.base)
    if arguments.replay is not None:
        if arguments.log is None:
            raise UsageError("--replay needs --log FILE")
        if arguments.user is not None:
            raise UsageError("--replay says who wrote the comment; --user is for COMMENT")
        former = _find(arguments.log, arguments.replay)
        head = git.resolve(arguments.repository.absolute(), "HEAD")
        if former["head"] and former["head"] != head:
            raise UsageError(
                f"trigger {arguments.replay} was for {former['head'][:12]}, this is {head[:12]}",
                hint=f"git checkout {former['head']}",
            )
        return Record(former["user"], former["comment"], arguments.base, replay_of=arguments.replay)
    if not arguments.user:
        raise UsageError("who wrote the comment?", hint="say --user NAME, as the forge says; or --event FILE")
    return Record(arguments.user, _stdin() if arguments.comment == "-" else arguments.comment, arguments.base)


def _stdin() -> str:
    with open(0, encoding="utf-8", errors="replace", closefd=False) as file:
        return file.read(MAX_EVENT_BYTES)


def _of_event(path: Path) -> tuple[str, str]:
    """Return author and text of a new comment: GitHub's and Gitea's ``issue_comment``, GitLab's ``note``."""
    try:
        with path.open("rb") as file:
            event = json.loads(file.read(MAX_EVENT_BYTES))
        if event.get("object_kind") == "note":
            user, text = event["user"]["username"], event["object_attributes"]["note"]
        else:
            if event["action"] != "created":
                return str(event["comment"]["user"]["login"]), ""
            user, text = event["comment"]["user"]["login"], event["comment"]["body"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path} is no event of a comment: {type(error).__name__}: {error}",
            hint="GitHub and Gitea: on: issue_comment, $GITHUB_EVENT_PATH; GitLab: the payload of a comment webhook",
        ) from error
    if not isinstance(user, str) or not isinstance(text, str) or not user:
        raise UsageError(f"{path} does not say who wrote which comment")
    return user, text


def _decide(arguments: argparse.Namespace, directory: Path, comment: Comment, record: Record) -> list[Start]:
    """Return what is to be started. Raises `TriggerRefused` where that is not allowed, `UsageError` where it means nothing."""
    base = git.resolve(directory, record.base)
    record.base_commit, record.head = base, git.resolve(directory, "HEAD")
    text = git.show(directory, base, arguments.allow)
    where = f"{record.base}:{arguments.allow}"
    pipelines = permit(comment, record.user, {} if text is None else parse_allow_list(text, where), where)
    starts = []
    for pipeline in pipelines:
        plan = _select(load_plan(directory / pipeline.config), comment, base)
        record.cells[pipeline.name] = [cell.id for cell in plan.cells]
        errors = plan.errors
        say_problems(errors)
        require_none(errors)
        if plan.cells:
            starts.append(Start(pipeline, plan))
    if not starts:
        raise UsageError(
            "the comment asks for nothing that there is",
            hint="without uenv=NAME:VERSION it is what the branch changes; uenvd-publish plan lists all cells",
        )
    return starts


def _select(plan: Plan, comment: Comment, base: str) -> Plan:
    wanted = comment.selectors.get("uenv")
    if wanted is None:
        plan = changes_since(plan, base).plan
    return plan.select(
        () if wanted is None else (wanted,),
        system=comment.selectors.get("system"),
        uarch=comment.selectors.get("uarch"),
    )


def _words(arguments: argparse.Namespace, start: Start) -> list[str]:
    """Return the arguments of ``uenvd-publish run``. Cells are named one by one: what was decided is what runs."""
    forge = {
        "--forge": arguments.forge,
        "--api": arguments.api,
        "--project": arguments.project,
        "--sha": arguments.sha,
        "--status-token-file": arguments.status_token_file,
    }
    return [
        *("--config", str(start.plan.config)),
        *("--site", arguments.site),
        *(word for option, value in forge.items() if value is not None for word in (option, str(value))),
        *start.pipeline.arguments,
        *arguments.extra,
        "--",
        *(cell.id for cell in start.plan.cells),
    ]


def _run_all(
    arguments: argparse.Namespace, starts: Sequence[Start], comment: Comment, forge: Forge | None
) -> int:
    worst = 0
    failed: UenvError | None = None
    for start in starts:
        context = f"{arguments.site}/{start.pipeline.name}"
        cells = f"{len(start.plan.cells)} cells"
        _post(forge, context, "running", cells)
        status = 1
        state: State = "error"
        try:
            parser = argparse.ArgumentParser(
                prog="uenvd-publish run", allow_abbrev=False, exit_on_error=False
            )
            run_command.add_arguments(parser)
            parser.set_defaults(default_of=parser.get_default)
            with _environment(comment.variables):
                status = run_command.run(_parse(parser, _words(arguments, start)))
            state = "failure" if status else "success"
        except UenvError as error:
            # One pipeline that fails does not stop the others.
            state = "failure"
            say(f"{start.pipeline.name}: {error.message}")
            failed, status = error, error.exit_status
        finally:
            _post(forge, context, state, cells)
        worst = worst or status
    if failed is not None and len(starts) == 1:
        raise failed
    return worst


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    try:
        parsed, rest = parser.parse_known_args(words)
    except (argparse.ArgumentError, SystemExit) as error:
        raise UsageError(f"uenvd-publish run does not take these arguments: {error}") from error
    if rest:
        raise UsageError(
            f"uenvd-publish run does not take {rest[0]!r}",
            hint="see arguments: in the allow-list, and --with",
        )
    return parsed


def _post(forge: Forge | None, context: str, state: State, text: str) -> None:
    """Post, if there is where to; a forge that does not answer does not stop the run."""
    if forge is None:
        return
    try:
        post_status(forge, Status(context, state, text, job_url(os.environ)))
    except StatusNotPosted as error:
        say(f"note: {error.message}")


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a while."""
    former = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _append(path: Path | None, record: Record) -> None:
    """Append a line in one write: lines of triggers that run at the same time do not mix."""
    if path is None:
        return
    line = json.dumps(asdict(record), sort_keys=True) + "\n"
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def _find(path: Path, wanted: str) -> dict[str, Any]:
    """Return the last line about a trigger. A line that was cut off is passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[-MAX_LOG_BYTES:]
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    found = None
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("id") == wanted:
            found = entry
    if found is None or not all(isinstance(found.get(key), str) for key in ("user", "comment", "head")):
        raise UsageError(f"{path} has no trigger {wanted!r}")
    return found
