import os
import struct
import subprocess
from pathlib import Path

import pytest

from uenvd.errors import FormatError, UsageError
from uenvd.publish.contents import MAX_PROBES, read_contents


def elf(machine: int, *, big: bool = False) -> bytes:
    ident = b"\x7fELF" + bytes([2, 2 if big else 1, 1]) + bytes(9)
    return ident + struct.pack(">HH" if big else "<HH", 2, machine) + bytes(200)


def squash(tmp_path: Path, files: dict[str, bytes], *options: str) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
        (tree / name).chmod(0o755)
    out = tmp_path / "image.squashfs"
    environ = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    subprocess.run(
        ["mksquashfs", tree, out, "-quiet", "-no-progress", "-mkfs-time", "1700000000", *options],
        check=True,
        env=environ,
    )
    return out


@pytest.mark.parametrize(
    ("files", "architecture"),
    [
        ({"bin/tool": elf(62)}, "x86_64"),
        ({"env/default/bin/tool": elf(183), "a/b/lib64/libx.so.1": elf(183), "bin/x": elf(62)}, "aarch64"),
        ({"lib/x.so": elf(22, big=True)}, "s390x"),
        ({"bin/tool": elf(4711)}, "elf-machine-4711"),
        ({"bin/script": b"#!/bin/sh\n" + bytes(100)}, None),
        ({"share/firmware": elf(243)}, None),
        ({"readme": b"x"}, None),
        ({}, None),
    ],
)
def test_the_architecture_is_that_of_the_programs(
    tmp_path: Path, files: dict[str, bytes], architecture: str | None
) -> None:
    assert read_contents(squash(tmp_path, files)).architecture == architecture


def test_many_scripts_do_not_take_for_ever(tmp_path: Path) -> None:
    files = {f"bin/a{number}": b"#!/bin/sh\n" + bytes(100) for number in range(MAX_PROBES + 10)}
    assert read_contents(squash(tmp_path, files | {"bin/zzz": elf(62)})).architecture is None


def test_metadata_and_time(tmp_path: Path) -> None:
    env = b'{"name":"app","description":"d","mount":"/user-environment","views":{"default":{"env":{"version":1,"values":{"scalar":{"A":"b"}}}}}}'
    contents = read_contents(squash(tmp_path, {"meta/env.json": env}))
    assert contents.meta is not None
    assert (contents.meta.name, contents.meta.mount) == ("app", "/user-environment")
    assert [view.name for view in contents.meta.views] == ["default"]
    assert contents.created == "2023-11-14T22:13:20Z"


def test_without_metadata(tmp_path: Path) -> None:
    assert read_contents(squash(tmp_path, {"meta/env.json": b"no json"})).meta is None


def test_what_is_no_squashfs(tmp_path: Path) -> None:
    image = squash(tmp_path, {"bin/tool": elf(62)})
    cut = tmp_path / "cut"
    cut.write_bytes(image.read_bytes()[:200])
    text = tmp_path / "text"
    text.write_bytes(b"hello" * 100)
    for path in (cut, text):
        with pytest.raises(FormatError, match=str(path)):
            read_contents(path)
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match=str(path)):
            read_contents(path)
