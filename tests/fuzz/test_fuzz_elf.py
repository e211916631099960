"""Damaged ELF files: the parser gives facts or a ValueError, nothing else, and soon."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from uenvd.publish.build import elf

SOUND = next(
    path for path in (Path("/bin/true"), Path("/usr/bin/env"), Path("/bin/sh")) if path.exists()
).read_bytes()
MAX_S = 5.0


def parse(data: bytes) -> None:
    began_s = time.monotonic()
    with contextlib.suppress(ValueError):
        elf.parse(data)
    assert time.monotonic() - began_s < MAX_S


def test_the_sound_one_is_understood() -> None:
    facts = elf.parse(SOUND)
    assert facts is not None
    assert any(soname.startswith("libc.so") for soname in facts.needed)
    assert facts.interpreter is not None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, min(len(SOUND), 1 << 15) - 1), st.integers(0, 255)), min_size=1, max_size=12
    )
)
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SOUND)
    for position, value in changes:
        data[position] = value
    parse(bytes(data))


@settings(max_examples=100, deadline=None)
@given(st.integers(4, 63), st.binary(min_size=1, max_size=8))
def test_changed_header(position: int, value: bytes) -> None:
    data = bytearray(SOUND)
    data[position : position + len(value)] = value
    parse(bytes(data))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, len(SOUND)))
def test_cut_off(length: int) -> None:
    parse(SOUND[:length])
