"""The error tree: what clients and scripts rely on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from uenvd.errors import UenvError, all_errors, by_code


def test_codes_and_exit_statuses_are_unique() -> None:
    errors = all_errors()
    assert len({cls.code for cls in errors}) == len(errors)
    assert len({cls.exit_status for cls in errors}) == len(errors)


def test_exit_statuses_stay_clear_of_shells_and_signals() -> None:
    assert all(64 <= cls.exit_status <= 113 for cls in all_errors())


def test_every_class_says_what_it_means() -> None:
    assert all(
        cls.__doc__ and cls.__doc__ != UenvError.__doc__ for cls in all_errors() if cls is not UenvError
    )


def test_code_of_a_newer_peer_is_still_an_error() -> None:
    assert by_code("not-invented-yet") is UenvError
    assert all(by_code(cls.code) is cls for cls in all_errors())


def test_the_reference_page_is_what_the_tree_says() -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, root / "scripts" / "errors_page.py", "--check"], check=True)
