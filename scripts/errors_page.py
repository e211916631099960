"""Write docs/errors.md from the error tree; `--check` fails when the page is not what the tree says."""

from __future__ import annotations

import sys
from pathlib import Path

from uenvd.errors import all_errors

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"


def text() -> str:
    """Return the page."""
    rows = sorted(
        (cls for cls in all_errors() if cls.__subclasses__() == [] or cls.code != "error"),
        key=lambda cls: cls.exit_status,
    )
    lines = [
        "# Errors",
        "",
        "Made by `scripts/errors_page.py`. Every program of uenvd ends with the exit status of the error that it met, and prints its",
        "message and, where there is one, a line `hint: ...`. `code` is what the control protocol carries. A command that `uenvctl run` or",
        "`srun` started has its own exit status; 126 and 127 mean, as in a shell, that it could not be executed or was not found. In a Slurm",
        "step a failing environment ends the task with status 1.",
        "",
        "| exit status | code | meaning | default hint |",
        "|---|---|---|---|",
    ]
    for cls in rows:
        meaning = " ".join((cls.__doc__ or "").split())
        lines.append(f"| {cls.exit_status} | `{cls.code}` | {meaning} | {cls.default_hint} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check; return the exit status."""
    if "--check" in sys.argv:
        if PAGE.read_text() != text():
            print(f"{PAGE} is not up to date: run scripts/errors_page.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
