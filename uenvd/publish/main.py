"""The console script ``uenvd-publish``: put images into a registry.

The digest of the image goes to stdout, everything else to stderr; the exit status is that of the error tree.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from uenvd import __version__
from uenvd.errors import ConfigError, InternalError, UenvError, UnknownLabel, UsageError
from uenvd.errors import NotFound as NotInRegistry
from uenvd.oci.credentials import read_token_file
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import Progress, Remote, open_remote
from uenvd.publish.push import MOVING_TAGS, Target, move_tag, push_image, target_of

PROGRAM = "uenvd-publish"
_INTERRUPTED = 130
_BAR_EVERY_S = 0.2
_LINE_EVERY_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except UenvError as error:
        _say(f"{PROGRAM}: {error.message}")
        if error.hint:
            _say(f"hint: {error.hint}")
        return error.exit_status
    except KeyboardInterrupt:
        _say(f"{PROGRAM}: interrupted; what was uploaded so far is not visible to anybody")
        return _INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _INTERRUPTED
    except Exception as error:
        if os.environ.get("UENVD_DEBUG"):
            raise
        _say(f"{PROGRAM}: unexpected fault: {type(error).__name__}: {error}")
        _say("hint: this is a bug; UENVD_DEBUG=1 in the environment shows where")
        return InternalError.exit_status
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message, hint=f"{self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Publish uenv images.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    push = commands.add_parser("push", help="push a squashfs file under a label", allow_abbrev=False)
    push.add_argument("file", metavar="FILE", type=Path, help="the squashfs image")
    push.add_argument("label", metavar="LABEL", help="[namespace::]name/version:tag@system%%uarch")
    push.add_argument(
        "--also-tag",
        action="append",
        default=[],
        metavar="TAG",
        help="one more tag, such as latest; may be repeated",
    )
    push.add_argument(
        "--architecture",
        metavar="ARCH",
        help="as uname -m says it; default: that of the programs in the image",
    )
    _common(push)
    push.set_defaults(run=_push)

    tag = commands.add_parser("tag", help="give an image one more tag, or move latest", allow_abbrev=False)
    tag.add_argument(
        "label",
        metavar="LABEL",
        help="the image: [namespace::]name/version:tag@system%%uarch, or …@sha256:… for :tag",
    )
    tag.add_argument("tag", metavar="TAG", help="the new tag")
    _common(tag)
    tag.set_defaults(run=_tag)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    moving = ", ".join(sorted(MOVING_TAGS))
    parser.add_argument(
        "--registry", metavar="URL", help="https://HOST[/PREFIX] or oci-layout:DIR; default $UENVD_REGISTRY"
    )
    parser.add_argument(
        "--namespace", metavar="NS", help="of the label, where it has none itself; default deploy"
    )
    parser.add_argument(
        "--force", action="store_true", help=f"take a tag other than {moving} from the image that has it"
    )
    parser.add_argument(
        "--auth-file",
        type=Path,
        metavar="FILE",
        help="credentials in docker's format; default: docker's places",
    )
    parser.add_argument("--username", metavar="NAME", help="for --token-file; default $USER")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="a token or password in a file that only you can read"
    )
    parser.add_argument(
        "--ca-file",
        type=Path,
        metavar="FILE",
        help="certificate authorities of the registry; default: the system's",
    )


def _push(arguments: argparse.Namespace) -> int:
    target = target_of(arguments.label, arguments.namespace)
    remote = _open(arguments)
    try:
        started = time.monotonic()
        pushed = push_image(
            remote,
            arguments.file,
            target,
            also_tags=arguments.also_tag,
            architecture=arguments.architecture,
            force=arguments.force,
            hashing=_reporter("hashing"),
            progress=_reporter("pushing"),
        )
    finally:
        remote.close()
    for note in pushed.notes:
        _say(f"note: {note}")
    tags = ", ".join([target.reference, *arguments.also_tag])
    _say(
        f"pushed {arguments.file} to {remote.address}, {target.repository}: {tags} ({time.monotonic() - started:.1f} s)"
    )
    sys.stdout.write(pushed.digest + "\n")
    return 0


def _tag(arguments: argparse.Namespace) -> int:
    target: Target = target_of(arguments.label, arguments.namespace, digest_allowed=True)
    remote = _open(arguments)
    try:
        digest = move_tag(remote, target, arguments.tag, force=arguments.force)
    except NotInRegistry as error:
        raise UnknownLabel(
            f"there is no such image: {error.message}", hint="check the label and the registry"
        ) from error
    finally:
        remote.close()
    _say(f"{target.repository}:{arguments.tag} is now {digest}")
    sys.stdout.write(digest + "\n")
    return 0


def _open(arguments: argparse.Namespace) -> Remote:
    address = arguments.registry or os.environ.get("UENVD_REGISTRY")
    if not address:
        raise ConfigError(
            "no registry was named",
            hint="say --registry oci-layout:DIR or --registry https://HOST, or set UENVD_REGISTRY",
        )
    credential = None
    if arguments.token_file is not None:
        username = arguments.username or os.environ.get("USER") or os.environ.get("LOGNAME")
        if not username:
            raise UsageError("--token-file needs a user name", hint="say --username NAME")
        credential = read_token_file(arguments.token_file, username)
    elif arguments.username is not None:
        raise UsageError(
            "--username is for --token-file",
            hint="passwords are not taken from the command line: everybody can see it",
        )
    return open_remote(
        parse_registry(address),
        credential=credential,
        auth_file=arguments.auth_file,
        ca_file=arguments.ca_file,
    )


def _reporter(doing: str) -> Progress:
    """Return a progress callback: a line that is rewritten on a terminal, one every 10 s elsewhere."""
    live = sys.stderr.isatty()
    last = time.monotonic()

    def report(done_bytes: int, total_bytes: int) -> None:
        nonlocal last
        now = time.monotonic()
        complete = done_bytes >= total_bytes
        if not complete and now - last < (_BAR_EVERY_S if live else _LINE_EVERY_S):
            return
        last = now
        percent = 100 * done_bytes // total_bytes if total_bytes else 100
        text = f"{doing} {percent:3d} % of {total_bytes / 1e6:.1f} MB"
        if live:
            sys.stderr.write(f"\r{text}" + ("\n" if complete else ""))
            sys.stderr.flush()
        elif not complete:
            _say(text)

    return report


def _say(text: str) -> None:
    clean = "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
    try:
        print(clean, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main())
