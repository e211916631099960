"""The console script ``uenvd-publish``: build, test and publish images.

Results go to stdout, everything else to stderr; the exit status is that of the error tree. Only the module of the command that was
asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final, NamedTuple

from uenvd import __version__
from uenvd.errors import InternalError, ResourceMissing, UenvError, UsageError
from uenvd.oci.credentials import forbid_core_dumps
from uenvd.publish.console import say

PROGRAM = "uenvd-publish"
_INTERRUPTED = 130


class Command(NamedTuple):
    """Where a command is (a module with ``add_arguments`` and ``run``), what it does in a line, and how it is used."""

    module: str
    summary: str
    example: str
    runs_program: bool = False
    """Behind ``--`` comes a program with its arguments, whatever they look like: ``arguments.program``."""


COMMANDS: Final[dict[str, Command]] = {
    "validate": Command(
        "uenvd.publish.validate",
        "check recipes, or a whole site's configuration with its recipes, without building anything",
        "uenvd-publish validate recipes/python-sci/2026.11",
    ),
    "plan": Command(
        "uenvd.publish.plan_command",
        "show what a site's configuration asks to be built, or write it as a pipeline for GitLab or GitHub",
        "uenvd-publish plan 'prgenv-*' --changed origin/main",
    ),
    "status": Command(
        "uenvd.publish.status",
        "post the status of a commit to GitHub, Gitea, Forgejo or GitLab",
        "uenvd-publish status success --cell app/1.0-daint/gh200 --stage test",
    ),
    "trigger": Command(
        "uenvd.publish.trigger",
        "start what a comment asks for, if its author may",
        "uenvd-publish trigger --user alice --base origin/main 'cscs-ci run alps;system=eiger;uarch=zen2;uenv=app:1.0'",
    ),
    "lock": Command(
        "uenvd.publish.lock",
        "pin the Debian packages and source files of a recipe to what they are now",
        "uenvd-publish lock recipes/python-sci/2026.11",
    ),
    "build": Command(
        "uenvd.publish.build_command",
        "build the image of a recipe",
        "uenvd-publish build recipes/python-sci/2026.11 --out images",
    ),
    "audit": Command(
        "uenvd.publish.audit_command",
        "see what in an image depends on the machine that built it",
        "uenvd-publish audit images/python-sci-2026.11.squashfs",
    ),
    "push": Command(
        "uenvd.publish.push_command",
        "push a squashfs file under a label",
        "uenvd-publish push store.squashfs build::app/1.0:4711@daint%gh200",
    ),
    "tag": Command(
        "uenvd.publish.tag",
        "give an image one more tag, or move latest",
        "uenvd-publish tag app/1.0:v2@daint%gh200 latest",
    ),
    "attach": Command(
        "uenvd.publish.attach",
        "attach files or a directory to an image",
        "uenvd-publish attach build::app/1.0:4711@daint%gh200 ./meta --type uenv/meta",
    ),
    "trace": Command(
        "uenvd.publish.trace",
        "record what a program reads of an image, and attach it, so that later jobs on empty caches start sooner",
        "uenvd-publish trace app/1.0:v1@daint%gh200 -- python -c 'import numpy'",
        runs_program=True,
    ),
    "discover": Command(
        "uenvd.publish.discover",
        "list what is attached to an image",
        "uenvd-publish discover app/1.0:v1@daint%gh200 --json",
    ),
    "copy": Command(
        "uenvd.publish.copy",
        "copy an image, with what is attached to it, within or between registries",
        "uenvd-publish copy -r build::app/1.0:4711@daint%gh200 test::app/1.0:v1@daint%gh200",
    ),
    "test": Command(
        "uenvd.publish.test",
        "test an image with ReFrame and attach the report",
        "uenvd-publish test app/1.0:4711@daint%gh200",
    ),
    "run": Command(
        "uenvd.publish.run",
        "build, push, test and, if asked, deploy: a recipe, or a plan here, on Slurm, through FirecREST",
        "uenvd-publish run recipes/app/1.0 --system daint --uarch gh200 --deploy v1",
    ),
    "deploy": Command(
        "uenvd.publish.deploy_command",
        "release an image whose tests have passed",
        "uenvd-publish deploy app/1.0:4711@daint%gh200 --tag v1",
    ),
    "promote": Command(
        "uenvd.publish.promote",
        "release an image if the site's policy allows it",
        "uenvd-publish promote app/1.0:4711@daint%gh200 --policy policy.yaml --tag v1 --dry-run",
    ),
    "rollback": Command(
        "uenvd.publish.rollback",
        "let latest go back to the release before",
        "uenvd-publish rollback app/1.0@daint%gh200",
    ),
    "evidence": Command(
        "uenvd.publish.evidence_command",
        "attach bill of materials, provenance and build log to an image",
        "uenvd-publish evidence build::app/1.0:4711@daint%gh200 --image store.squashfs --log build.log",
    ),
    "sign": Command(
        "uenvd.publish.sign",
        "sign an image",
        "uenvd-publish sign app/1.0:v1@daint%gh200 --key release.key",
    ),
    "verify": Command(
        "uenvd.publish.sign",
        "check the signature of an image",
        "uenvd-publish verify app/1.0:v1@daint%gh200 --keys /etc/uenvd/keys",
    ),
    "keygen": Command(
        "uenvd.publish.sign",
        "make a pair of keys for signatures",
        "uenvd-publish keygen release.key",
    ),
    "deprecate": Command(
        "uenvd.publish.deprecate",
        "mark a released image as one that should not be used any more",
        "uenvd-publish deprecate app/1.0:v1@daint%gh200 'wrong BLAS' --successor app/1.0:v2 --date 2027-03-31",
    ),
    "list": Command(
        "uenvd.publish.show",
        "list the images of a system",
        "uenvd-publish list --system daint",
    ),
    "show": Command(
        "uenvd.publish.show",
        "show what is known of one image",
        "uenvd-publish show app/1.0:v1@daint%gh200",
    ),
    "catalogue": Command(
        "uenvd.publish.catalogue.command",
        "write a web site of all environments, from the registry alone",
        "uenvd-publish catalogue public/",
    ),
    "retire": Command(
        "uenvd.publish.retire",
        "take old images away by rules, never one that is in use; shows what it would do unless told to do it",
        "uenvd-publish retire 'app/*' --keep 3 --older-than 180 --locked ~/projects",
    ),
    "drift": Command(
        "uenvd.publish.drift",
        "compare what a site's configuration wants deployed with what is in the registry",
        "uenvd-publish drift --config config.yaml",
    ),
    "storage": Command(
        "uenvd.publish.storage",
        "show what each environment takes in the registry; shared blobs are counted once",
        "uenvd-publish storage --system daint",
    ),
    "reindex": Command(
        "uenvd.publish.reindex",
        "make the index of a system anew from the registry",
        "uenvd-publish reindex --system daint",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    try:
        words, program = _split(list(sys.argv[1:] if argv is None else argv))
        arguments = _parser(words).parse_args(words)
        arguments.program = program
        forbid_core_dumps(private=False)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except UenvError as error:
        say(f"{PROGRAM}: {error.message}")
        if error.hint:
            say(f"hint: {error.hint}")
        return error.exit_status
    except KeyboardInterrupt:
        say(f"{PROGRAM}: interrupted; what was uploaded so far is not visible to anybody")
        return _INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _INTERRUPTED
    except Exception as error:
        if os.environ.get("UENVD_DEBUG"):
            raise
        say(f"{PROGRAM}: unexpected fault: {type(error).__name__}: {error}")
        say("hint: this is a bug; UENVD_DEBUG=1 in the environment shows where")
        return InternalError.exit_status
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message, hint=f"{self.prog} --help")


def _import(name: str) -> ModuleType:
    """Import a command. Raises `ResourceMissing` where the packages of the extra ``publish`` are not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "uenvd":
            raise
        raise ResourceMissing(
            f"the Python package {error.name} is missing",
            hint="install uenvd with what publishing needs: uenvd[publish]",
        ) from error


def _asked(words: Sequence[str]) -> str | None:
    return next((word for word in words if not word.startswith("-")), None)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words for us, and those of the program to run. (argparse would look for our options among them.)"""
    command = COMMANDS.get(_asked(words) or "")
    if command is None or not command.runs_program or "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Build, test and publish uenv images.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = _asked(words)
    for name, command in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary[:1].upper() + command.summary[1:] + ".",
            epilog=f"example: {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == asked:
            module = _import(command.module)
            module.add_arguments(one)
            one.set_defaults(run=module.run, command=name, default_of=one.get_default)
    return parser


if __name__ == "__main__":
    sys.exit(main())
