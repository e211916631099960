import errno
import os
import threading
from pathlib import Path

import pytest

from uenvd.errors import NotFound, StorageError, StorageFull
from uenvd.oci.files import locked, pieces_of, read_bounded, storage_error, write_atomically


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new", durable=False)
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_lock_keeps_the_others_out_and_patience_ends(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        with (
            pytest.raises(StorageError, match="locked by another"),
            locked(tmp_path / "lock", patience_s=0.05),
        ):
            pytest.fail("two holders")
        waiter = threading.Thread(target=lambda: locked(tmp_path / "lock").__enter__())
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive()
    waiter.join(5)
    assert not waiter.is_alive()


def test_reads_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(tmp_path / "file", 5) == b"12345"
    with pytest.raises(StorageError):
        read_bounded(tmp_path / "file", 4)
    assert b"".join(pieces_of(tmp_path / "file", 2, lambda: None, "x")) == b"345"
    with pytest.raises(NotFound, match="gone"):
        list(pieces_of(tmp_path / "none", 0, lambda: None, "gone"))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EROFS, StorageError),
        (errno.EACCES, StorageError),
        (errno.EIO, StorageError),
    ],
)
def test_storage_errors_say_what_where_and_what_to_do(number: int, kind: type[StorageError]) -> None:
    error = storage_error(OSError(number, os.strerror(number)), Path("/cache/x"), "writing")
    assert type(error) is kind
    assert "/cache/x" in str(error) and os.strerror(number) in str(error) and error.hint
