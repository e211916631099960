"""``uenvd-publish trace``: record which bytes of an image a program reads, and attach that to the image as ``uenv/prefetch``."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from uenvd import protocol
from uenvd.errors import DaemonUnreachable, ManifestError, TestsFailed, UsageError
from uenvd.oci.attach import attach, json_content
from uenvd.oci.manifest import squashfs_layer
from uenvd.oci.trace import MAX_TRACE_BYTES, PREFETCH_TYPE, encode_trace, parse_trace
from uenvd.publish.console import say, show
from uenvd.publish.options import add_registry_options, add_site_options, open_registry
from uenvd.publish.source import add_label, find_image

_SOCKET: Final = Path("/run/uenvd/control")
_WAIT_S: Final = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options. What is run in the image comes behind ``--``."""
    parser.usage = "%(prog)s LABEL [OPTIONS] (-- PROGRAM [ARGUMENTS] | --from FILE)"
    add_label(parser)
    parser.add_argument(
        "--from", dest="file", type=Path, metavar="FILE", help="attach this trace instead of recording one"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the trace to a file, too")
    parser.add_argument(
        "--socket",
        type=Path,
        default=Path(os.environ.get("UENVD_SOCKET", _SOCKET)),
        metavar="PATH",
        help=f"of the uenvd that records; default {_SOCKET}. The image must not be in its cache",
    )
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Record or read, attach; the digest of the attachment goes to stdout."""
    if (arguments.file is None) == (not arguments.program):
        raise UsageError("give either --from FILE or a program to run, after --")
    with closing(open_registry(arguments)) as remote:
        target = find_image(arguments, remote)
        size_bytes = squashfs_layer(remote.manifest(target.repository, target.digest)).size_bytes
        if arguments.file is not None:
            data = _read(arguments.file)
        else:
            label = target.repository.split("/")
            name = f"{label[0]}::{label[3]}/{label[4]}@{target.digest}"
            data = encode_trace(record(arguments.socket, name, target.digest, arguments.program))
        ranges = parse_trace(data, size_bytes)
        if not ranges:
            raise ManifestError("the trace names nothing of the image")
        if arguments.out is not None:
            arguments.out.write_bytes(data)
        say(f"{sum(end - first for first, end in ranges)} of {size_bytes} bytes in {len(ranges)} pieces")
        digest = attach(
            remote, target.repository, target.digest, PREFETCH_TYPE, [json_content("trace.json", data)]
        )
    say(f"attached to {target.repository}@{target.digest}")
    show(digest)
    return 0


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise UsageError(f"{path} is too large for a trace")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def record(path: Path, uenv: str, digest: str, program: list[str]) -> list[tuple[int, int]]:
    """Run a program in an image that the uenvd at ``path`` does not have; return the bytes that were read, in order.

    Raises `DaemonUnreachable`, `TestsFailed` when the program fails, `UsageError` when the image was in the cache, and uenvd's errors.
    """
    with closing(_Connection(path)) as uenvd:
        lease = uenvd.ask("mount", uenv=uenv)["lease"]
        uenvd.ask("wait", lease=lease)
        words = [sys.executable, "-m", "uenvd.ctl.main", "run", uenv, "--", *program]
        status = subprocess.run(words, check=False, env={**os.environ, "UENVD_SOCKET": str(path)}).returncode
        if status != 0:
            raise TestsFailed(
                f"the program ended with status {status}; nothing is attached",
                hint=f"see what it needs: uenvctl run {uenv} -- {shlex.join(program)}",
            )
        traces = [one for one in uenvd.ask("trace", lease=lease)["traces"] if one["digest"] == digest]
    if not traces:
        raise UsageError(
            "the image was in the cache already, so nothing was recorded",
            hint=f"as root: uenvctl image evict {uenv}; then try again",
        )
    return [(int(first), int(end)) for first, end in traces[0]["ranges"]]


class _Connection:
    """To uenvd; the lease is its. Descriptors that come are not taken."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_WAIT_S)
        self._reader = protocol.FrameReader(protocol.MAX_REPLY_BYTES)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise DaemonUnreachable(f"no uenvd answers on {path}: {error.strerror}") from error

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 -- any JSON value
        try:
            self._socket.sendall(protocol.encode(protocol.request(op, **fields)))
            while True:
                frame = self._reader.next_frame()
                if frame is None:
                    data = self._socket.recv(65536)
                    if not data:
                        raise DaemonUnreachable("uenvd closed the connection")
                    self._reader.feed(data)
                elif "event" not in frame:
                    protocol.raise_failure(frame)
                    return frame
        except OSError as error:
            raise DaemonUnreachable(f"uenvd does not answer: {error}") from error

    def close(self) -> None:
        self._socket.close()
