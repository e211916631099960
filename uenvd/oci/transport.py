"""HTTP to one registry: `oras.provider.Registry.do_request` with timeouts, real retries, bounded bodies and our errors.

What is replaced of oras-py and why: its retry ladder sleeps 131 s and knows no Retry-After (bypassed), it has no timeouts (own adapter), it
answers a challenge for one repository only (`uenvd.oci.auth`), it reads error bodies without bound.
"""

from __future__ import annotations

import email.utils
import http.client
import logging
import os
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

import oras.provider
import requests
import requests.adapters
import urllib3
import urllib3.exceptions

import uenvd
from uenvd.errors import NotFound, RegistryDenied, RegistryError, RegistryUnreachable, UenvError
from uenvd.oci.auth import ScopedAuth
from uenvd.oci.credentials import Keyring
from uenvd.oci.reference import RegistryAddress
from uenvd.oci.remote import never
from uenvd.oci.watch import DeadlineOver, ReadStalled, Watch, current, install, watching

MAX_ERROR_BYTES: Final = 64 << 10
MAX_REDIRECTS: Final = 5
PIECE_BYTES: Final = 1 << 20

_ATTEMPTS: Final = 4
_BACKOFF_S: Final = 0.25
_RETRY_AFTER_CAP_S: Final = 30.0
_TRANSIENT: Final = frozenset({429, 500, 502, 503, 504})
_EXPIRED: Final = frozenset({400, 401, 403, 404, 410})
_FOREIGN = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
)
_SYSTEM_CA_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
)

# oras-py logs to its own handler on stderr; what is worth saying is said by our exceptions. urllib3 logs addresses with their
# signatures when a program logs everything.
logging.getLogger("oras.logger").disabled = True
for _name in ("urllib3", "requests"):
    logging.getLogger(_name).setLevel(logging.ERROR)


Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Reply:
    """A complete answer with a bounded body."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class _Adapter(requests.adapters.HTTPAdapter):
    def __init__(self, timeout_connect_s: float, timeout_read_s: float) -> None:
        self._timeouts = (timeout_connect_s, timeout_read_s)
        super().__init__(pool_connections=8, pool_maxsize=16, max_retries=0)
        install(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **proxy_kwargs: Any) -> Any:  # noqa: ANN401 -- as in the base class
        manager = super().proxy_manager_for(proxy, **proxy_kwargs)
        install(manager)
        return manager

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:  # noqa: ANN401
        connect, read = self._timeouts
        watch = current()
        if watch is not None:
            watch.check()
            connect, read = watch.remaining(connect), watch.remaining(read)
        kwargs["timeout"] = (connect, read)
        response = super().send(request, *args, **kwargs)
        if response.status_code >= 300:
            _bound_body(response)
        return response


def _bound_body(response: requests.Response) -> None:
    """Read at most 64 KiB of the body of an error or a redirection, where ``requests`` would read all of it into memory.

    The body of a 416 is not read at all: docker-registry 2.8.2 announces the length of the whole blob and sends 33 bytes.
    """
    if response.status_code == 416:
        response.raw.close()
        body = b""
    else:
        body = response.raw.read(MAX_ERROR_BYTES, decode_content=False)
        if len(body) == MAX_ERROR_BYTES:
            response.raw.close()
        else:
            response.raw.release_conn()
    response._content = body  # ``content`` returns it, and the redirection code reads no more
    response._content_consumed = True  # type: ignore[attr-defined]


class Transport(oras.provider.Registry):  # type: ignore[misc]
    """Requests to one registry. Safe to use from several threads."""

    auth: ScopedAuth

    def __init__(
        self,
        address: RegistryAddress,
        *,
        keyring: Keyring,
        ca_file: Path | None,
        timeout_connect_s: float,
        timeout_read_s: float,
        deadline_s: float | None,
    ) -> None:
        verify: bool | str = True if address.plain_http else _ca_bundle(ca_file)
        super().__init__(address.host, insecure=address.plain_http, tls_verify=verify, auth_backend="uenvd")
        self.address = address
        self._keyring = keyring
        self.timeout_read_s = timeout_read_s
        self._deadline_s = deadline_s
        # Without this, requests takes passwords from ~/.netrc.
        self.session.trust_env = False
        self.session.proxies = requests.utils.get_environ_proxies(address.base_url, no_proxy=None)
        self.session.max_redirects = MAX_REDIRECTS
        # Blobs are hashed as they are sent; a compressed transfer would only cost time.
        self.session.headers.update(
            {"User-Agent": f"uenvd/{uenvd.__version__}", "Accept-Encoding": "identity"}
        )
        adapter = _Adapter(timeout_connect_s, timeout_read_s)
        self.session.mount("https://", adapter)
        self.session.mount("http://", adapter)
        self.auth.registry = address.host
        self.auth.is_ours = self.is_ours
        self.auth.registry_is_https = not address.plain_http
        self.auth.tls_verify = verify

    def url(self, path: str) -> str:
        """Return the URL of ``/v2/<path>``."""
        return f"{self.address.base_url}/v2/{path}"

    def is_ours(self, url: str) -> bool:
        """Tell whether a URL leads to the registry itself (same scheme, host and port)."""
        try:
            parts = urlsplit(url)
            own = urlsplit(self.address.base_url)
            return (parts.scheme, parts.hostname, _port(parts)) == (own.scheme, own.hostname, _port(own))
        except ValueError:
            return False

    @contextmanager
    def watch(self, seconds: float | None, cancelled: Callable[[], bool] = never) -> Iterator[Watch]:
        """Bound the calls of this thread; see `Remote.deadline`. An outer deadline that ends sooner stays in force."""
        outer = current()
        ends = [time.monotonic() + seconds] if seconds is not None else []
        if outer is not None:
            if outer.deadline is not None:
                ends.append(outer.deadline)
            inner = cancelled

            def cancelled() -> bool:
                return inner() or outer.cancelled()

        with watching(Watch(min(ends, default=None), cancelled, self.timeout_read_s)) as watch:
            yield watch

    def bounded(self) -> AbstractContextManager[Watch]:
        """Return `watch` with the default deadline of metadata calls, or with none inside another watch."""
        return self.watch(self._deadline_s if current() is None else None)

    def fetch(
        self,
        method: str,
        url: str,
        *,
        scope: str,
        what: str,
        limit_bytes: int = MAX_ERROR_BYTES,
        headers: Mapping[str, str] | None = None,
        data: object = None,
        accept: frozenset[int] = frozenset({200}),
        repeat: bool = True,
    ) -> Reply:
        """Send a request and read the answer, at most ``limit_bytes`` of it; repeat after transient failures if ``repeat``.

        ``scope`` names repository and action (for the token); ``what`` names the thing in messages. An answer outside ``accept`` is
        raised as the error that it stands for.
        """

        def once() -> Reply:
            response = self._send(method, url, scope=scope, headers=headers, data=data)
            try:
                if response.status_code not in accept:
                    raise self._refusal(response, what)
                body = self._read(response, limit_bytes, what)
                return Reply(response.status_code, response.headers, body, response.url or url)
            finally:
                response.close()

        with self.bounded() as watch, self.errors(what):
            return self.repeatedly(once, watch) if repeat else once()

    def open(
        self, url: str, *, scope: str, what: str, headers: Mapping[str, str], accept: frozenset[int]
    ) -> requests.Response:
        """Send a GET and return the answer with its body unread; not repeated. Call inside `watch` and `errors`."""
        response = self._send("GET", url, scope=scope, headers=headers, data=None)
        if response.status_code not in accept:
            try:
                raise self._refusal(response, what)
            finally:
                response.close()
        return response

    def repeatedly(self, once: Callable[[], Answer], watch: Watch) -> Answer:
        """Call ``once`` until it gives an answer, at most four times, with growing pauses or those that the registry asks for.

        Where not even a connection comes about, twice: a registry that is down should be known to be so in a moment.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return once()
            except _Again as again:
                error: Exception = again.error
                pause_s = again.after_s
            except (
                requests.ConnectionError,
                urllib3.exceptions.ProtocolError,
                requests.exceptions.ChunkedEncodingError,
            ) as failure:
                if isinstance(failure, requests.Timeout | requests.exceptions.SSLError):
                    raise
                error, pause_s = failure, None
                if attempt > 0 and _never_connected(failure):
                    raise
            if attempt == _ATTEMPTS - 1:
                raise error
            if pause_s is None:
                pause_s = _BACKOFF_S * 2**attempt * random.uniform(0.7, 1.3)  # noqa: S311 -- spreads clients, no secret
            elif watch.deadline is None:
                pause_s = min(pause_s, _RETRY_AFTER_CAP_S)
            if watch.deadline is not None and time.monotonic() + pause_s >= watch.deadline:
                raise error
            watch.sleep(pause_s)
        raise AssertionError("unreachable")

    def _send(
        self, method: str, url: str, *, scope: str, headers: Mapping[str, str] | None, data: object
    ) -> requests.Response:
        sent = dict(headers or {})
        if not self.is_ours(url):
            # An upload may continue at another host: our credentials are not for it.
            elsewhere: requests.Response = self.session.request(
                method, url, data=data, headers=sent, stream=True, verify=self._tls_verify
            )
            return elsewhere
        self.auth.enter(scope, self._keyring.find(scope.rpartition(":")[0]))
        sent.update(self.auth.get_auth_header())
        undecorated = oras.provider.Registry.do_request.__wrapped__
        response: requests.Response = undecorated(self, url, method, data=data, headers=sent, stream=True)
        return response

    def _read(self, response: requests.Response, limit_bytes: int, what: str) -> bytes:
        if response.status_code >= 300:
            return bytes(response.content)  # was read by the adapter
        data = bytearray()
        while True:
            piece = response.raw.read1(PIECE_BYTES, decode_content=False)
            if not piece:
                break
            data += piece
            if len(data) > limit_bytes:
                raise RegistryError(
                    f"{self._host}: {what} has more than the {limit_bytes} bytes that are allowed"
                )
        announced = response.headers.get("Content-Length", "")
        if response.request.method != "HEAD" and announced.isdigit() and int(announced[:19]) != len(data):
            # Not every version of urllib3 says so itself.
            raise urllib3.exceptions.ProtocolError("the body is shorter than announced")
        return bytes(data)

    def _refusal(self, response: requests.Response, what: str) -> Exception:
        status = response.status_code
        said = _registry_says(response)
        text = f"{self._host}: {what}: {said}" if said else f"{self._host}: {what}: HTTP {status}"
        if not self.is_ours(response.url or "") and status in _EXPIRED:
            # Signed addresses expire, each kind of storage says so in its own way: the registry gives a new one.
            return _Again(
                RegistryUnreachable(f"{self._host}: {what}: its storage answers HTTP {status}"), None
            )
        if status in {401, 403}:
            return RegistryDenied(text)
        if status in {404, 410}:
            return NotFound(f"{self._host}: {what} is not there" + (f" ({said})" if said else ""))
        if status in _TRANSIENT:
            return _Again(RegistryUnreachable(f"{text} (HTTP {status})"), _retry_after_s(response))
        return RegistryError(text)

    @property
    def _host(self) -> str:
        return self.address.host

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turn every foreign exception of the block into one of our tree; ``what`` names the thing in messages."""
        try:
            yield
        except _Again as again:
            again.error.retry_after_s = again.after_s
            raise again.error from None
        except DeadlineOver:
            raise RegistryUnreachable(f"{self._host} did not answer in time ({what})") from None
        except ReadStalled as error:
            raise RegistryUnreachable(f"{self._host}: {what}: {error}") from None
        except RegistryDenied:
            # Somebody may log in anew or renew a token while we run: look again the next time.
            self._keyring.forget()
            self.auth.forget()
            raise
        except UenvError:
            raise
        except requests.exceptions.SSLError as error:
            raise RegistryUnreachable(
                f"{self._host}: the TLS connection failed: {_tls_reason(error)}",
                hint="check the registry's certificate and this machine's certificate authorities, or the address (http or https)",
            ) from None
        except requests.exceptions.TooManyRedirects:
            raise RegistryError(f"{self._host}: {what}: more than {MAX_REDIRECTS} redirections") from None
        except requests.Timeout:
            raise RegistryUnreachable(f"{self._host} did not answer in time ({what})") from None
        except _FOREIGN as error:
            # Not chained and not quoted: URLs in these texts may hold signatures.
            raise RegistryUnreachable(f"{self._host}: {what}: {_reason(error)}") from None


class _Again(Exception):
    """A refusal that may pass: the error to raise in the end, and how long the registry asks to wait."""

    def __init__(self, error: RegistryUnreachable, after_s: float | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s


def _retry_after_s(response: requests.Response) -> float | None:
    """Parse Retry-After (RFC 9110, 10.2.3): seconds or a date; None without a usable one."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()) if value else None
    except (ValueError, OverflowError):
        return None


def _registry_says(response: requests.Response) -> str:
    """Return what the registry's error answer (specification, "Error codes") says, printable and short; "" for other bodies."""
    try:
        errors = response.json()["errors"]
        texts = [str(error.get("message") or error.get("code") or "") for error in errors[:3]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""
    text = "; ".join(text for text in texts if text)
    return "".join(char if char.isprintable() else " " for char in text)[:300]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and all that it wraps: as argument, ``reason``, cause or context; each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        found = waiting.pop(0)
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        wrapped = [*found.args, getattr(found, "reason", None), found.__cause__, found.__context__]
        waiting.extend(inner for inner in wrapped if isinstance(inner, BaseException))


def _never_connected(error: BaseException) -> bool:
    return any(isinstance(cause, urllib3.exceptions.NewConnectionError) for cause in _causes(error))


def _reason(error: BaseException) -> str:
    """Say in a few words why a connection failed."""
    for cause in _causes(error):
        if isinstance(cause, urllib3.exceptions.NameResolutionError):
            return "its name cannot be resolved"
        if isinstance(cause, http.client.IncompleteRead):
            return "the transfer broke off"
        if isinstance(cause, requests.exceptions.InvalidURL | requests.exceptions.InvalidSchema):
            return "it redirects to an address that is none"
        if (
            isinstance(cause, OSError)
            and not isinstance(cause, requests.RequestException)
            and cause.errno
            and cause.strerror
        ):
            return cause.strerror.lower()
    return "the connection broke off"


def _tls_reason(error: BaseException) -> str:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"certificate verify failed: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError) and cause.reason:
            return cause.reason.replace("_", " ").lower()
    return "protocol error"


def _ca_bundle(ca_file: Path | None) -> bool | str:
    """Return the file of trusted authorities: the given one, the environment's, the system's (sites add theirs there), certifi's."""
    if ca_file is not None:
        return str(ca_file)
    for variable in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        if os.environ.get(variable):
            return os.environ[variable]
    return next((name for name in _SYSTEM_CA_FILES if Path(name).is_file()), True)


def _port(parts: SplitResult) -> int | None:
    return parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def join(reply: Reply, location: str) -> str:
    """Resolve a Location or Link target against the URL that it came with. Raises `RegistryError` for what is none."""
    try:
        return urljoin(reply.url, location)
    except ValueError as error:
        raise RegistryError("the registry names an address that is none") from error
