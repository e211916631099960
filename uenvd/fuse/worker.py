"""uenvd-fs: the process that serves one squashfs image.

``uenvd-fs IMAGE MOUNTPOINT [-f] [-o OPTION,...]`` mounts and serves an image by itself, as ``squashfuse_ll`` does; `uenvd.fuse.standalone`.

``--supervised FD`` is for a parent that made the mount (the daemon, or uenvctl); `uenvd.handover` is the contract. Such a process may be
started long before it is needed: it loads everything first and then waits for its setup. EOF in place of a setup ends it, status 0. It
confines itself before it looks at the image, reports once, and serves until the kernel says ENODEV: status 0.
"""

from __future__ import annotations

import logging
import socket
import sys


def main(argv: list[str] | None = None) -> int:
    """Console script."""
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    try:
        if len(arguments) == 2 and arguments[0] == "--supervised" and arguments[1].isdecimal():
            with socket.socket(fileno=int(arguments[1])) as channel:
                from uenvd.fuse.libfuse import supervised

                return supervised(channel)
        from uenvd.fuse.standalone import run  # neither needs what the other does

        return run(arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
