"""Wheels -> a virtual environment of the image's own interpreter; byte code that is the same in every build."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from uenvd.errors import BuildFailed
from uenvd.publish.build.interpreter import Interpreter
from uenvd.publish.build.relocate import Run


def install(
    python: Interpreter, root: Path, requirements: Path, wheels: Sequence[str], workspace: Path, run: Run
) -> None:
    """Make a virtual environment at its final path and install the wheels into it, each checked against its pinned hash."""
    run(str(python.program), "-I", "-m", "venv", "--without-pip", "--symlinks", str(root))
    if not wheels:
        return
    directory = workspace / f"wheels-{root.name}"
    directory.mkdir()
    for wheel in wheels:
        (directory / Path(wheel).name).symlink_to(wheel)
    run(
        f"{root}/bin/python3", "-I", f"{python.pip}/pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
        "--no-cache-dir", "--require-hashes", "--no-warn-script-location", "--find-links", str(directory),
        "--requirement", str(requirements),
    )  # fmt: skip


def renew_records(root: Path) -> None:
    """Bring the RECORD of each installed package up to date with files that were changed or removed since."""
    for record in sorted(root.glob("lib/python3.*/site-packages/*.dist-info/RECORD")):
        site = record.parent.parent
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for row in csv.reader(io.StringIO(record.read_text())):
            path = site / row[0]
            if not row[1]:
                writer.writerow(row)
            elif path.is_file():
                data = path.read_bytes()
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                writer.writerow([row[0], f"sha256={digest}", str(len(data))])
        record.write_text(text.getvalue())


def compile_bytecode(python: Interpreter, prefix: Path, environment: Mapping[str, str]) -> None:
    """Compile all modules; their byte code is never checked against the source, as nothing changes in an image.

    One process for each tree, each in sorted order: what a process has compiled before can change the bytes of what follows, so a pool
    of workers would make two builds differ. Files that do not compile (test data, templates) are left as they are.
    """
    trees = [python.root / "lib", *sorted((prefix / "env").glob("*/lib"))]
    running = [
        subprocess.Popen(
            [
                str(python.program), "-I", "-m", "compileall", "-qq", "-f", "--invalidation-mode", "unchecked-hash", str(tree),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=dict(environment),
        )
        for tree in trees
        if tree.is_dir()
    ]  # fmt: skip
    for process in running:
        # 1: some file did not compile.
        if process.wait() not in {0, 1}:
            raise BuildFailed(f"compiling byte code ended with status {process.returncode}")
