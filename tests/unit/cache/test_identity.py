"""Whose rights a thread has. Needs root, who alone can act for others."""

import os
import threading
from pathlib import Path

import pytest

from uenvd.cache.identity import CacheUser
from uenvd.errors import ConfigError, StorageError

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for others")


def ids(thread: str = "thread-self") -> tuple[str, str, str]:
    """Return (file system uid, effective capabilities, groups) of a thread."""
    lines = Path(f"/proc/{thread}/status").read_text().splitlines()
    found = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return found["Uid"].split()[3], found["CapEff"], found["Groups"].strip()


@needs_root
def test_files_belong_to_the_user_and_only_in_this_thread(public_dir: Path) -> None:
    public_dir.chmod(0o777)
    before = ids()
    others: list[tuple[str, str, str]] = []
    with CacheUser(NOBODY, NOBODY):
        (public_dir / "file").touch()
        assert ids()[0] == str(NOBODY)
        thread = threading.Thread(target=lambda: others.append(ids()))
        native = threading.main_thread().native_id
        assert native is not None
    thread.start()
    thread.join()
    status = (public_dir / "file").stat()
    assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY)
    assert ids() == before == others[0]


@needs_root
def test_rights_that_override_permissions_are_gone_inside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    user = CacheUser(NOBODY, NOBODY)
    with user:
        with pytest.raises(PermissionError):
            (tmp_path / "secret").read_text()
        with user, pytest.raises(PermissionError):
            (tmp_path / "new").touch()
        with pytest.raises(PermissionError):
            (tmp_path / "secret").read_text()  # still, after the inner one
    assert (tmp_path / "secret").read_text() == "x"


@needs_root
def test_an_error_inside_gives_the_rights_back() -> None:
    before = ids()
    with pytest.raises(ValueError, match="oops"), CacheUser(NOBODY, NOBODY, (1, 2)):
        assert ids()[2] == "1 2"
        raise ValueError("oops")
    assert ids() == before


def test_without_a_user_nothing_changes() -> None:
    before = ids()
    with CacheUser():
        assert ids() == before


def test_a_process_that_may_not_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from uenvd.cache import identity

    monkeypatch.setattr(identity, "_current", lambda: (1, 1))
    with pytest.raises(StorageError, match="may not act"), CacheUser(NOBODY, NOBODY):
        pass


def test_a_user_that_nobody_knows_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"cache\.user"):
        CacheUser.named("no-such-user")
    assert CacheUser.named("nobody").uid == NOBODY
