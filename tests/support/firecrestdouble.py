"""A FirecREST version 2 in a thread, for pyfirecrest: tokens that expire, jobs that are processes of this machine, refusals on demand.

Of each request it checks what the real one checks: method, path, bearer token, body. A job is its script, run by bash in its working
directory; of its ``#SBATCH`` lines job name, output, error and ``afterok`` dependencies count.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

CLIENT = "test-client"
SECRET = "s3cret-of-the-client"


@dataclass
class DoubleJob:
    """A job: ``state`` as Slurm names it."""

    id: int
    system: str
    name: str
    directory: str
    script: str
    options: Mapping[str, str]
    state: str = "PENDING"
    exit_code: int = 0
    process: subprocess.Popen[bytes] | None = None


@dataclass
class Double:
    """What it knows. ``busy`` requests are answered 429 first; ``token_s`` is how long a token is good.

    ``faults``: pairs of a request's beginning (``GET /compute/alpha/jobs/``) and a status; each is answered once, by the first request that
    begins so.
    """

    url: str = ""
    token_s: float = 300.0
    busy: int = 0
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    jobs: dict[int, DoubleJob] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[tuple[str, int]] = field(default_factory=list)
    forgotten: set[int] = field(default_factory=set)
    """Jobs that are not in the list any more, only asked for by their numbers."""
    late: int = 0
    """How many questions about jobs are answered as if those that are submitted now were unknown: accounting is behind."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    closed: bool = False

    def variables(self) -> dict[str, str]:
        """Return the environment of a client."""
        return {
            "FIRECREST_URL": self.url,
            "AUTH_TOKEN_URL": f"{self.url}/token",
            "FIRECREST_CLIENT_ID": CLIENT,
            "FIRECREST_CLIENT_SECRET": SECRET,
        }

    def submit(self, system: str, directory: str, script: str) -> DoubleJob:
        """Queue a job."""
        options = {}
        for line in script.splitlines():
            if line.startswith("#SBATCH "):
                (word,) = shlex.split(line.removeprefix("#SBATCH "))
                name, _equals, value = word.removeprefix("--").partition("=")
                options[name] = value.replace("%%", "%")
        with self.lock:
            job = DoubleJob(1000 + len(self.jobs), system, options["job-name"], directory, script, options)
            self.jobs[job.id] = job
            self.step()
        return job

    def step(self) -> None:
        """Note what has ended, start what may run."""
        with self.lock:
            for job in self.jobs.values():
                if job.process is not None and job.state == "RUNNING":
                    status = job.process.poll()
                    if status is not None:
                        job.state, job.exit_code = "COMPLETED" if status == 0 else "FAILED", abs(status)
                if job.state == "PENDING" and not self.closed:
                    self._begin(job)

    def _begin(self, job: DoubleJob) -> None:
        match = re.fullmatch(r"afterok:(\d+)", job.options.get("dependency", ""))
        if match is not None:
            before = self.jobs[int(match[1])]
            if before.state in ("PENDING", "RUNNING"):
                return
            if before.state != "COMPLETED":
                job.state = "CANCELLED"
                return
        script = Path(job.directory) / "script.sh"
        script.write_text(job.script)
        with Path(job.options["output"]).open("wb") as out, Path(job.options["error"]).open("wb") as err:
            job.process = subprocess.Popen(
                ["bash", script],
                cwd=job.directory,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        job.state = "RUNNING"

    def cancel(self, job: DoubleJob) -> None:
        """End a job."""
        with self.lock:
            if job.process is not None and job.process.poll() is None:
                job.process.terminate()
                try:
                    job.process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(job.process.pid, signal.SIGKILL)
                    job.process.wait()
            if job.state in ("PENDING", "RUNNING"):
                job.state = "CANCELLED"

    def close(self) -> None:
        """End all jobs."""
        with self.lock:
            self.closed = True
            for job in self.jobs.values():
                self.cancel(job)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    double: Double

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        double = self.double
        double.requests.append(f"{method} {parts.path}")
        if parts.path == "/token":
            form = {key: values[0] for key, values in parse_qs(body.decode()).items()}
            wanted = {"grant_type": "client_credentials", "client_id": CLIENT, "client_secret": SECRET}
            if form != wanted:
                self._answer(401, {"error": "unauthorized_client"})
                return
            token = secrets.token_hex(16)
            double.tokens[token] = time.monotonic() + double.token_s
            self._answer(200, {"access_token": token, "expires_in": double.token_s})
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if double.tokens.get(token, 0.0) < time.monotonic():
            self._answer(401, {"message": "the token is not valid"})
            return
        if double.busy > 0:
            double.busy -= 1
            self._answer(429, {"message": "too many requests"}, {"Retry-After": "0"})
            return
        request = f"{method} {parts.path}"
        for fault in double.faults:
            if request.startswith(fault[0]):
                double.faults.remove(fault)
                self._answer(fault[1], {"errorType": "error", "message": "a fault on demand"})
                return
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self._route(method, parts.path.strip("/").split("/"), query, json.loads(body) if body else {})

    def _route(self, method: str, path: list[str], query: dict[str, str], body: dict[str, Any]) -> None:
        double = self.double
        if path[0] == "filesystem" and path[2:] == ["ops", "mkdir"] and method == "POST":
            Path(body["sourcePath"]).mkdir(parents=body["parent"], exist_ok=True)
            self._answer(201, {"output": {"name": body["sourcePath"]}})
        elif path[0] == "filesystem" and path[2:] == ["ops", "tail"] and method == "GET":
            file = Path(query["path"])
            if not file.exists():
                self._answer(404, {"message": "no such file"})
                return
            content = file.read_bytes()[-int(query["bytes"]) :].decode(errors="replace")
            self._answer(200, {"output": {"content": content, "contentType": "bytes"}})
        elif path[0] == "compute" and path[2] == "jobs":
            double.step()
            self._jobs(method, path, body)
        else:
            self._answer(404, {"message": "no such endpoint"})

    def _jobs(self, method: str, path: list[str], body: dict[str, Any]) -> None:
        double, system = self.double, path[1]
        if method == "POST" and len(path) == 3:
            job = body["job"]
            if not Path(job["working_directory"]).is_dir():
                self._answer(400, {"message": "the working directory does not exist"})
                return
            self._answer(201, {"jobId": double.submit(system, job["working_directory"], job["script"]).id})
            return
        with double.lock:
            mine = [job for job in double.jobs.values() if job.system == system]
            if double.late > 0 and method == "GET":
                double.late -= 1
                mine = []
        if len(path) == 4:
            mine = [job for job in mine if str(job.id) == path[3]]
            if not mine:
                self._answer(404, {"message": "Job not found"})
                return
        if method == "DELETE" and len(path) == 4:
            double.cancel(mine[0])
            self._answer(204, None)
            return
        if len(path) == 3:
            mine = [job for job in mine if job.id not in double.forgotten]
        # The real one says null where there are none.
        self._answer(200, {"jobs": [_shown(job) for job in mine] or None})

    def _answer(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("f7t-appversion", "2.4.0")
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _shown(job: DoubleJob) -> dict[str, Any]:
    return {
        "jobId": job.id,
        "name": job.name,
        "status": {
            "state": job.state,
            "stateReason": "None",
            "exitCode": job.exit_code,
            "interruptSignal": 0,
        },
        "workingDirectory": job.directory,
        "cluster": job.system,
    }


@contextlib.contextmanager
def firecrest_double(**settings: Any) -> Iterator[Double]:
    """Run one on a free port of the loopback interface; its jobs end with it."""
    double = Double(**settings)
    handler = type("Handler", (_Handler,), {"double": double})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    double.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield double
    finally:
        double.close()
        server.shutdown()
        server.server_close()
        thread.join()
