"""A stand-in for uenvd that does what a test tells it: the control protocol, with prepared directories as images.

Run as a process of its own (``python standin.py SOCKET STATE REQUESTS``) so that it can be stopped and killed like the real one. STATE is a JSON
file, read anew for every request (see `State`); every request is appended to REQUESTS, and ``end of lease`` when a connection that
mounted ends. The mounts it hands out are detached
clones of bind mounts, real ones.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_DIGEST = re.compile(r"@(sha256:[0-9a-f]+)")
_TICK_S = 0.2
_DEADLINE_S = 10.0


@dataclass
class State:
    """How the stand-in behaves.

    ``tags``: label -> digest. ``images``: digest -> {"dir", "mount", "views": {name: ops}, "guard", "default_view"}.
    ``notes``: what resolve and mount have to say.
    ``waiting``: mounts are handed out without their bytes; ``wait`` sends events until it is false again.
    ``fail``: operation -> error body that answers it. ``extra_fds``: so many descriptors more (or less) than announced.
    ``raw``: operation -> text sent instead of an answer.
    """

    tags: dict[str, str] = field(default_factory=dict)
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    waiting: bool = False
    fail: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra_fds: int = 0
    raw: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Refused(Exception):
    def __init__(self, code: str, exit_status: int, message: str, hint: str) -> None:
        super().__init__(message)
        self.body = {"code": code, "exit_status": exit_status, "message": message, "hint": hint}


def _load(path: str) -> State:
    return State(**json.loads(Path(path).read_text()))


def _images(state: State, uenv: str, view: str | None) -> list[dict[str, Any]]:
    found = []
    for text in uenv.split(","):
        head, _, mount = text.partition(":/")
        digest = _DIGEST.search(head)
        label = _DIGEST.sub("", head)
        key = digest.group(1) if digest else state.tags.get(label, "")
        if not label:  # a session knows no name
            label = next((tag for tag, meant in state.tags.items() if meant == key), "")
        if key not in state.images:
            raise _Refused(
                "unknown-label",
                68,
                f"no image matches {label}",
                "list what there is with: uenvctl image find",
            )
        image = state.images[key]
        if view not in (None, "none") and view not in image["views"]:
            raise _Refused(
                "unknown-view", 70, f"{label} has no view {view}", f"it has: {', '.join(image['views'])}"
            )
        found.append(
            {**image, "label": label, "digest": key, "mount": f"/{mount}" if mount else image["mount"]}
        )
    return found


def _env(images: list[dict[str, Any]], view: str | None) -> dict[str, Any]:
    ops: list[Any] = []
    keys = []
    for image in images:
        name = view if view is not None else image.get("default_view")
        chosen = name if name in image["views"] else ""
        ops += image["views"].get(chosen, [])
        keys.append(f"{image['digest']}[{chosen}]")
    return {"env": ops, "applied": ";".join(keys)}


class _Peer:
    def __init__(self, sock: socket.socket, state_path: str, log_path: str) -> None:
        self._sock = sock
        self._state_path = state_path
        self._log_path = log_path

    def serve(self) -> None:
        buffer = b""
        last: dict[str, Any] = {}
        with self._sock, contextlib.suppress(OSError):
            while data := self._sock.recv(65536):
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    last = json.loads(line)
                    self._answer(last)
        if last.get("op") == "mount":
            self._note({"op": "end of lease"})

    def _note(self, entry: dict[str, Any]) -> None:
        with open(self._log_path, "a") as log:
            log.write(json.dumps(entry) + "\n")

    def _send(self, frame: dict[str, Any], fds: list[int] | None = None) -> None:
        data = json.dumps(frame).encode() + b"\n"
        if fds:
            sent = self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            data = data[sent:]
        self._sock.sendall(data)

    def _answer(self, request: dict[str, Any]) -> None:
        creds = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        peer_uid = int.from_bytes(creds[4:8], sys.byteorder)
        self._note({**request, "peer_uid": peer_uid})
        state = _load(self._state_path)
        operation = request["op"]
        if operation in state.raw:
            self._sock.sendall(state.raw[operation].encode())
            return
        try:
            if operation in state.fail:
                self._send({"ok": False, "error": state.fail[operation]})
            else:
                getattr(self, f"_{operation}")(request, state)
        except _Refused as refused:
            self._send({"ok": False, "error": refused.body})

    def _resolve(self, request: dict[str, Any], state: State) -> None:
        images = _images(state, request["uenv"], request.get("view"))
        resolved = ",".join(f"{image['label']}@{image['digest']}:{image['mount']}" for image in images)
        self._send({"ok": True, "resolved": resolved, "images": [], "notes": state.notes})

    def _mount(self, request: dict[str, Any], state: State) -> None:
        from uenvd import mounts

        images = sorted(
            _images(state, request["uenv"], request.get("view")), key=lambda image: image["mount"]
        )
        described = [
            {
                "mount": image["mount"],
                "digest": image["digest"],
                "label": image["label"],
                "source": f"uenvd:{image['digest']}",
                "guard": image.get("guard", "listed"),
            }
            for image in images
        ]
        lease = request["uenv"].encode().hex()[:32] + f"/{request.get('view') or ''}"
        fds = [mounts.open_tree_clone(image["dir"]) for image in images]
        fds += [mounts.open_tree_clone(images[0]["dir"]) for _ in range(state.extra_fds)]
        sent = fds[: len(fds) + state.extra_fds] if state.extra_fds < 0 else fds
        env = {"env": None, "applied": ""} if state.waiting else _env(images, request.get("view"))
        _leases[lease] = _env(images, request.get("view"))
        answer = {
            "ok": True,
            "lease": lease,
            "state": "waiting" if state.waiting else "ready",
            "mounts": described,
        }
        try:
            self._send({**answer, **env, "notes": state.notes}, sent)
        finally:
            for fd in fds:
                os.close(fd)

    def _wait(self, request: dict[str, Any], state: State) -> None:
        done = 0
        while _load(self._state_path).waiting:
            done += 1_000_000
            message = f"pulling app/1: {done // 1_000_000} of 91 MB"
            self._send(
                {
                    "event": "progress",
                    "phase": "pull",
                    "done_bytes": done,
                    "total_bytes": 91_000_000,
                    "message": message,
                }
            )
            time.sleep(_TICK_S)
        if request["lease"] not in _leases:
            raise _Refused("session", 93, "no such lease", "")
        self._send({"ok": True, **_leases[request["lease"]], "notes": []})


_leases: dict[str, dict[str, Any]] = {}


def main() -> None:
    """Serve until killed."""
    socket_path, state_path, log_path = sys.argv[1:]
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(socket_path)
        os.chmod(socket_path, 0o666)
        listener.listen(64)
        while True:
            peer, _ = listener.accept()
            threading.Thread(target=_Peer(peer, state_path, log_path).serve, daemon=True).start()


class StandIn:
    """The parent's side: start, command, observe, end."""

    def __init__(self, workdir: Path, socket_path: Path) -> None:
        self.socket_path = socket_path
        self.state = State()
        self._dir = workdir
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens; nothing happens when it runs."""
        if self._process is not None:
            self.update()
            return
        self._dir.mkdir(exist_ok=True)
        self.update()
        self.socket_path.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [
                *(sys.executable, __file__, str(self.socket_path)),
                *(str(self._dir / "state.json"), str(self._dir / "requests.jsonl")),
            ],
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + _DEADLINE_S
        while not self.socket_path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the stand-in did not start")
            time.sleep(0.005)

    def update(self, **changes: Any) -> None:
        """Change how it behaves from the next request on (and for those that wait)."""
        for name, value in changes.items():
            setattr(self.state, name, value)
        fresh = self._dir / "state.new"
        fresh.write_text(json.dumps(asdict(self.state)))
        fresh.rename(self._dir / "state.json")

    def requests(self, op: str | None = None) -> list[dict[str, Any]]:
        """Return the requests so far (of one kind), each with ``peer_uid``."""
        path = self._dir / "requests.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [frame for frame in map(json.loads, lines) if op is None or frame["op"] == op]

    def forget_requests(self) -> None:
        """Start counting requests anew."""
        (self._dir / "requests.jsonl").unlink(missing_ok=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP it for the time of a with block."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it; its socket stays, with nobody listening."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
