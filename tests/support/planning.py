"""The site of tests/vectors/ci, copied and made a git repository."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SITE = Path(__file__).parents[1] / "vectors" / "ci" / "site"


class Site:
    """A copy of the site in a directory of its own; a context manager is not needed: pytest removes the directory."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "site"
        shutil.copytree(SITE, self.root, symlinks=True)

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    def replace(self, path: str, old: str, new: str) -> int:
        """Replace a text that is there once; return its line."""
        file = self.root / path
        text = file.read_text()
        assert text.count(old) == 1, (path, old, text.count(old))
        file.write_text(text.replace(old, new))
        return text[: text.index(old)].count("\n") + 1

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def git(self, *words: str) -> str:
        nobody = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
        names = {
            f"GIT_{who}_{what}": "test@site.example"
            for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        done = subprocess.run(
            ["git", "-C", str(self.root), *words],
            env={**os.environ, **nobody, **names},
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.strip()

    def commit(self, message: str = "change") -> str:
        """Commit everything; return the commit."""
        if not (self.root / ".git").exists():
            self.git("init", "--quiet", "--initial-branch=main")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)
        return self.git("rev-parse", "HEAD")

    def branch(self, name: str = "feature") -> None:
        """Begin a branch."""
        self.git("checkout", "--quiet", "-b", name)
