import argparse
from contextlib import closing
from pathlib import Path

import pytest

from uenvd.label import Label
from uenvd.oci.remote import Remote
from uenvd.publish import user_build


def test_where_an_image_goes_is_said_without_opening_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    real = user_build.open_remote

    def note(*arguments: object) -> Remote:
        opened.append(arguments)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(user_build, "open_remote", note)
    words = argparse.Namespace(system="demo", uarch="zen3", label="mine::app/1")
    label = Label(namespace="mine", name="app", version="1")
    place = user_build._in_account(words, label, {"XDG_DATA_HOME": str(tmp_path)}, make=False)
    assert place.name == "mine::app/1"
    assert not opened
    with closing(place.remote) as remote:
        assert place.remote is remote
    assert len(opened) == 1
