"""Commit statuses at GitHub, Gitea, Forgejo and GitLab: one request each, made again where that can help.

Sources: GitHub REST "Create a commit status", Gitea API ``/repos/{owner}/{repo}/statuses/{sha}``, GitLab "Set the pipeline status of a commit".
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import quote, urlsplit

import requests

from uenvd.errors import StatusNotPosted, UsageError

ForgeKind = Literal["github", "gitea", "gitlab"]
KINDS: Final[tuple[ForgeKind, ...]] = ("github", "gitea", "gitlab")
State = Literal["pending", "running", "success", "failure", "error", "canceled"]
STATES: Final[tuple[State, ...]] = ("pending", "running", "success", "failure", "error", "canceled")

MAX_DESCRIPTION: Final = 140
"""Characters; GitHub refuses more."""
MAX_CONTEXT: Final = 255
MAX_URL: Final = 255
"""GitLab's bound on ``target_url``."""
PATIENCE_S: Final = 60.0
"""For one status, all attempts together."""
REQUEST_S: Final = 15.0
FIRST_WAIT_S: Final = 0.5
_MAX_REPLY_BYTES: Final = 1 << 20

_GITHUB_STATE: Final[dict[State, str]] = {
    "pending": "pending", "running": "pending", "success": "success", "failure": "failure", "error": "error", "canceled": "error",
}  # fmt: skip
_GITLAB_STATE: Final[dict[State, str]] = {
    "pending": "pending", "running": "running", "success": "success", "failure": "failed", "error": "failed", "canceled": "canceled",
}  # fmt: skip


@dataclass(frozen=True)
class Status:
    """What is said of a commit. The description is cut to `MAX_DESCRIPTION` characters on one line."""

    context: str
    state: State
    description: str = ""
    target_url: str | None = None


@dataclass(frozen=True)
class Forge:
    """Where statuses go.

    Args:
        kind: which API.
        api: its base: ``https://api.github.com``, ``https://HOST/api/v1`` (Gitea, Forgejo), ``https://HOST/api/v4`` (GitLab).
        project: ``owner/name``, or GitLab's number.
        sha: the commit, 40 or 64 hex digits.
        token: it appears in no message.

    """

    kind: ForgeKind
    api: str
    project: str
    sha: str
    token: str = field(repr=False)

    def __post_init__(self) -> None:
        """Check what would otherwise go into a URL. Raises `UsageError`."""
        parts = urlsplit(self.api)
        if parts.scheme != "https" and not (
            parts.scheme == "http" and parts.hostname in {"localhost", "127.0.0.1", "::1"}
        ):
            raise UsageError(f"{self.api!r} is no https address", hint="a token is sent there")
        if not parts.hostname or parts.query or parts.fragment or parts.username:
            raise UsageError(f"{self.api!r} is no address of an API")
        if not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", self.sha):
            raise UsageError(f"{self.sha!r} is no full commit id", hint="say --sha with all 40 digits")
        pattern = r"\d+|[\w.-]+(/[\w.-]+)+" if self.kind == "gitlab" else r"[\w.-]+/[\w.-]+"
        if not re.fullmatch(pattern, self.project, re.ASCII) or ".." in self.project:
            raise UsageError(f"{self.project!r} is no project", hint="OWNER/NAME, or GitLab's number")
        if not self.token or not self.token.isprintable() or not self.token.isascii() or " " in self.token:
            raise UsageError("the token is empty, or holds characters that no token has")


def request_of(forge: Forge, status: Status) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Return the URL, the headers and the JSON body of the POST that sets a status."""
    base = forge.api.rstrip("/")
    description = " ".join(status.description.split())
    if len(description) > MAX_DESCRIPTION:
        description = description[: MAX_DESCRIPTION - 1] + "…"
    if not status.context or len(status.context) > MAX_CONTEXT:
        raise UsageError(f"a context has 1 to {MAX_CONTEXT} characters, not {len(status.context)}")
    body: dict[str, Any] = {"context": status.context, "description": description}
    if status.target_url is not None:
        if urlsplit(status.target_url).scheme not in {"http", "https"} or len(status.target_url) > MAX_URL:
            raise UsageError(
                f"{status.target_url!r} cannot be linked to",
                hint=f"an http address of at most {MAX_URL} characters",
            )
        body["target_url"] = status.target_url
    headers = {"Accept": "application/json", "User-Agent": "uenvd-publish"}
    if forge.kind == "gitlab":
        body["name"] = body.pop("context")
        body["state"] = _GITLAB_STATE[status.state]
        headers["PRIVATE-TOKEN"] = forge.token
        url = f"{base}/projects/{quote(forge.project, safe='')}/statuses/{forge.sha}"
    else:
        body["state"] = _GITHUB_STATE[status.state]
        url = f"{base}/repos/{forge.project}/statuses/{forge.sha}"
        if forge.kind == "github":
            headers |= {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28"}
            headers["Authorization"] = f"Bearer {forge.token}"
        else:
            headers["Authorization"] = f"token {forge.token}"
    return url, headers, body


def post_status(
    forge: Forge,
    status: Status,
    *,
    patience_s: float = PATIENCE_S,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Set a status; posting the same one again is no error.

    Made again, with growing pauses or as long as ``Retry-After`` says, where the forge does not answer, is overloaded (429, 5xx) or limits
    the rate; at most `patience_s` in all. Raises `StatusNotPosted`, `UsageError`.
    """
    url, headers, body = request_of(forge, status)
    deadline = clock() + patience_s
    wait_s = FIRST_WAIT_S
    with requests.Session() as session:
        # Neither ~/.netrc nor a redirect decides who gets the token; proxies of the environment are used.
        session.auth = _NoAuth()
        while True:
            fault, pause_s = _attempt(session, url, headers, body, max(1.0, deadline - clock()))
            if fault is None:
                return
            pause_s = wait_s if pause_s is None else pause_s
            if pause_s < 0 or clock() + pause_s >= deadline:
                host = urlsplit(url).netloc
                raise StatusNotPosted(f"{host} did not take the status {status.context}: {fault}")
            sleep(pause_s)
            wait_s = min(2 * wait_s, REQUEST_S)


class _NoAuth(requests.auth.AuthBase):
    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        return r


def _attempt(
    session: requests.Session, url: str, headers: dict[str, str], body: dict[str, Any], left_s: float
) -> tuple[str | None, float | None]:
    """Return what went wrong (None: nothing) and after how long to try again: seconds, None for as usual, negative for never."""
    try:
        with session.post(
            url,
            json=body,
            headers=headers,
            timeout=min(REQUEST_S, left_s),
            allow_redirects=False,
            stream=True,
        ) as reply:
            if reply.status_code in {200, 201}:
                return None, None
            text = reply.raw.read(_MAX_REPLY_BYTES, decode_content=True).decode(errors="replace")
    except requests.RequestException as error:
        return f"no answer ({type(error).__name__})", None
    except (OSError, ValueError) as error:
        return f"no answer that can be read ({type(error).__name__})", None
    code = reply.status_code
    # GitLab refuses a transition to the state that it has already.
    if code == 400 and re.search(r"Cannot transition status via :\w+ from :(\w+)", text):
        current = re.search(r"from :(\w+)", text)
        if current is not None and current[1] == body["state"]:
            return None, None
    reason = " ".join(text.split())[:200]
    said = f"{code} {reply.reason}" + (f": {reason}" if reason else "")
    limited = code == 403 and (
        reply.headers.get("X-RateLimit-Remaining") == "0" or "Retry-After" in reply.headers
    )
    if code == 429 or code >= 500 or limited:
        return said, _retry_after(reply.headers.get("Retry-After"))
    if code in {401, 403, 404}:
        said += " (is the token allowed to set statuses of this project?)"
    return said, -1.0


def _retry_after(value: str | None) -> float | None:
    return float(value) if value is not None and re.fullmatch(r"\d{1,6}", value) else None
