"""Copied into images, as ``venv/_on_image.py`` of their standard library: what their ``python -m venv`` does besides.

A view is a virtual environment, and one that is made with its Python stands on the *base* of that (venv.EnvBuilder.ensure_directories:
``sys._base_executable``): with ``--system-site-packages`` the packages of the view would be missing. They are added by a ``.pth`` file (documentation
of `site`), after the user's own. And ``uenvctl venv`` is asked to mark it, so that it says which uenv it needs where that is not mounted.

Python 3.9 and newer; imports nothing of uenvd.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias
    from venv import EnvBuilder

    Create: TypeAlias = Callable[[EnvBuilder, "str | bytes | os.PathLike[str] | os.PathLike[bytes]"], None]

PATH_FILE = "_view_of_the_image.pth"
ELSEWHERE = "/opt/uenvd/bin:/usr/local/bin:/usr/bin"
"""Where ``uenvctl`` is looked for after ``PATH``."""
MARK_S = 20.0


def on_image(create: Create) -> Create:
    """Return `venv.EnvBuilder.create` with what is said above; the environment is made also when that fails."""

    def create_on_image(
        builder: EnvBuilder, env_dir: str | bytes | os.PathLike[str] | os.PathLike[bytes]
    ) -> None:
        create(builder, env_dir)
        directory = os.path.abspath(os.fsdecode(env_dir))  # noqa: PTH100
        library = os.path.join("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
        if builder.system_site_packages and _is_view(sys.prefix):
            view = os.path.join(sys.prefix, library)
            with open(os.path.join(directory, library, PATH_FILE), "w", encoding="utf-8") as file:  # noqa: PTH123
                file.write(f"import site; site.addsitedir({view!r})\n")
        if os.environ.get("UENV_MOUNT_LIST"):
            _mark(directory)

    return create_on_image


def _is_view(prefix: str) -> bool:
    """Whether this is a view's Python: a virtual environment on the Python of the same image (``IMAGE/python-3.N``)."""
    image = os.path.dirname(sys.base_prefix)  # noqa: PTH120
    return prefix != sys.base_prefix and prefix.startswith(os.path.join(image, "env") + os.sep)


def _mark(directory: str) -> None:
    program = shutil.which("uenvctl", path=f"{os.environ.get('PATH', '')}:{ELSEWHERE}")
    if program is None:
        return
    try:
        subprocess.run(
            [program, "venv", directory],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=MARK_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return
