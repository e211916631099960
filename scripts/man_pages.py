"""Write man/*.1 from the help texts of uenvctl; ``--check`` fails when the pages are not what the texts say.

A help text has paragraphs: ``usage:`` lines first; indented lines that begin with ``-`` are options; ``examples:`` and what follows is shown as it
is. Source of the macros: man(7) of groff.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from uenvd import __version__
from uenvd.ctl.main import COMMANDS, GROUPS, HELP
from uenvd.errors import all_errors

DIRECTORY = Path(__file__).parent.parent / "man"
MADE_BY = '.\\" Made by scripts/man_pages.py from the texts of uenvctl --help.\n'


def escaped(text: str) -> str:
    """Return text that groff shows as it is."""
    text = (
        text.replace("\\", "\\e")
        .replace("-", "\\-")
        .replace("'", "\\(aq")
        .replace("^", "\\(ha")
        .replace("~", "\\(ti")
    )
    return "\\&" + text if text.startswith(".") else text


def paragraphs(help_text: str) -> Iterator[list[str]]:
    """Yield the blocks of lines between empty lines."""
    for block in help_text.strip("\n").split("\n\n"):
        yield block.split("\n")


def synopsis(lines: list[str]) -> str:
    """Return the usage lines as a section."""
    usages = [line.removeprefix("usage:").strip() for line in lines]
    return ".SH SYNOPSIS\n" + ".br\n".join(f".B {escaped(usage)}\n" for usage in usages)


def definitions(lines: list[str]) -> str:
    """Return lines of the form ``  TERM   text`` (and continuations) as a list."""
    found = []
    for line in lines:
        term, gap, text = line.strip().partition("  ")
        if line.startswith("   ") and not gap:
            found[-1] += f"{escaped(line.strip())}\n"
            continue
        found.append(f".TP\n.B {escaped(term)}\n{escaped(text.strip())}\n")
    return "".join(found)


def body(help_text: str) -> str:
    """Return the sections of one help text."""
    first, *rest = paragraphs(help_text)
    parts = [synopsis(first)]
    description: list[str] = []
    options: list[str] = []
    examples: list[str] = []
    for lines in rest:
        if lines[0] == "examples:" or examples:
            examples += lines[1:] if lines[0] == "examples:" else ["", *lines]
        elif lines[0].lstrip().startswith("-") and lines[0].startswith("  "):
            options.append(definitions(lines))
        elif lines[0].startswith("  "):
            description.append(definitions(lines))
        else:
            description.append(".PP\n" + "".join(f"{escaped(line)}\n" for line in lines))
    if description:
        parts.append(".SH DESCRIPTION\n" + "".join(description))
    if options:
        parts.append(".SH OPTIONS\n" + "".join(options))
    if examples:
        shown = "".join(f"{escaped(line.removeprefix('  '))}\n" for line in examples)
        parts.append(f".SH EXAMPLES\n.EX\n{shown}.EE\n")
    return "".join(parts)


def head(name: str, about: str) -> str:
    """Return the beginning of a page."""
    return (
        f'{MADE_BY}.TH {escaped(name).upper()} 1 "" "uenvd {__version__}" "User Commands"\n.ad l\n'
        f".SH NAME\n{escaped(name)} \\- {escaped(about)}\n"
    )


def main_page() -> str:
    """Return uenvctl(1)."""
    rows = sorted({(cls.exit_status, " ".join((cls.__doc__ or "").split())) for cls in all_errors()})
    statuses = "".join(f".TP\n.B {status}\n{escaped(text)}\n" for status, text in rows)
    names = sorted(page_name(command) for command in COMMANDS)
    return (
        head("uenvctl", "scientific software environments for your shell")
        + body(HELP)
        + ".SH EXIT STATUS\nA command that was run has its own. If uenvctl itself fails:\n"
        + statuses
        + ".TP\n.B 126, 127\nThe command that was to be run cannot be executed, or was not found.\n"
        + ".SH ENVIRONMENT\n"
        + definitions(
            [
                "  UENVD_SOCKET  the control socket, as --socket",
                "  NO_COLOR  no colours, whatever the terminal can do",
                "  SHELL  what 'uenvctl start' starts",
            ]
        )
        + ".SH FILES\n"
        + definitions(
            [
                "  /run/uenvd/control  uenvd's control socket",
                "  uenv.lock  what a project's labels mean: see uenvctl-lock(1)",
            ]
        )
        + ".SH SEE ALSO\n"
        + "".join(f".BR {escaped(name)} (1)\n" for name in names)
    )


def page_name(command: str) -> str:
    """Return the name of a command's page."""
    return "uenvctl-" + command.replace(" ", "-")


def about(command: str) -> str:
    """Return what the list of commands says about one."""
    (line,) = [line for line in HELP.splitlines() if line.startswith(f"  {command} ")]
    return line[30:].strip()


def pages() -> dict[str, str]:
    """Return file name -> content."""
    found = {"uenvctl.1": main_page()}
    for command, module in COMMANDS.items():
        text = importlib.import_module(f"uenvd.ctl.{module}").HELP
        found[f"{page_name(command)}.1"] = (
            head(page_name(command), about(command)) + body(text) + ".SH SEE ALSO\n.BR uenvctl (1)\n"
        )
    assert all(command.partition(" ")[0] in GROUPS for command in COMMANDS if " " in command)
    return found


def main() -> int:
    """Write or check; return the exit status."""
    wanted = pages()
    there = {path.name: path.read_text() for path in DIRECTORY.glob("*.1")}
    if "--check" in sys.argv:
        if there != wanted:
            print(f"{DIRECTORY} is not up to date: run scripts/man_pages.py", file=sys.stderr)
            return 1
        return 0
    DIRECTORY.mkdir(exist_ok=True)
    for name in there.keys() - wanted.keys():
        (DIRECTORY / name).unlink()
    for name, text in wanted.items():
        (DIRECTORY / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
