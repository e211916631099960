"""Ranges of a blob over HTTP: what the answer to a request for one says, and its body."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, cast

import requests

from uenvd.errors import DigestMismatch, RegistryError, RegistryUnreachable
from uenvd.oci.transport import Transport
from uenvd.oci.watch import Response

OPEN_READS: Final = 2.0
"""How many read timeouts the head of an answer may take: it may come in drips, or by way of a redirection."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


class HttpRange:
    """`uenvd.oci.remote.BlobRange` over HTTP."""

    trusted = True

    def __init__(
        self,
        http: Transport,
        response: requests.Response,
        first_byte: int,
        end_byte: int,
        what: str,
        cancelled: Callable[[], bool],
        *,
        ignores_range: bool,
    ) -> None:
        self.first_byte = first_byte
        self.end_byte = end_byte
        self.ignores_range = ignores_range
        self._http = http
        self._response = response
        self._body = cast("Response", response.raw._original_response)
        self._what = what
        self._cancelled = cancelled
        self._left_bytes = end_byte - first_byte

    def readinto(self, buffer: memoryview) -> int:
        """See `BlobRange.readinto`."""
        # The watch belongs to the thread that reads, and only while it reads.
        with self._http.watch(None, self._cancelled), self._http.errors(self._what):
            count = self._body.receive_into(buffer[: self._left_bytes])
            if not count:
                raise RegistryUnreachable(
                    f"{self._http.address.host}: {self._what}: the transfer broke off {self._left_bytes} bytes too early"
                )
        self._left_bytes -= count
        return count

    def close(self) -> None:
        """See `BlobRange.close`."""
        if self._left_bytes == 0 and self._body.isclosed():
            self._response.raw.release_conn()
        else:
            self._response.raw.close()
            self._response.close()


def sent_range(
    response: requests.Response, first_byte: int, end_byte: int, size_bytes: int, what: str
) -> tuple[int, int]:
    """Check the answer to a request for ``[first_byte, end_byte)`` of a blob; return which bytes its body has.

    A part of the range is an answer (RFC 9110, 14.4), and so is the whole blob. Raises `RegistryError` for another range, `DigestMismatch`
    for a blob of another size.
    """
    if response.status_code == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if match is None:
            raise RegistryError(f"{what}: the registry sent a part of it without saying which")
        first, end, total = int(match.group(1)), int(match.group(2)) + 1, match.group(3)
        if not first <= first_byte < end or total not in {"*", str(size_bytes)}:
            raise RegistryError(f"{what}: the registry sent another part of it than the one asked for")
        return first, min(end, end_byte)
    length = response.headers.get("Content-Length", "")
    if length.isascii() and length.isdigit() and int(length[:19]) != size_bytes:
        raise DigestMismatch(f"{what}: the registry has {length} bytes, the manifest says {size_bytes}")
    return 0, size_bytes
