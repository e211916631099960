"""Own images (``mine::``) in every command that takes one: used where that has a meaning, else refused, and never asked of uenvd."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.publishing import simple_image
from uenvd.ctl import complete
from uenvd.ctl.main import main
from uenvd.errors import DaemonUnreachable, LockError, UnknownLabel, UsageError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simple_image(tmp_path_factory.mktemp("built") / "tiny.squashfs", "tiny", "hello")


@pytest.fixture
def images(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of images of a user without a uenvd: whatever asks for one fails."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("UENVD_SOCKET", str(tmp_path / "no/socket"))
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "share/uenv/images"
    (directory / "tiny/1.0").mkdir(parents=True)
    shutil.copy(built, directory / "tiny/1.0.squashfs")
    shutil.copy(built, directory / "tiny/1.0/old.squashfs")
    return directory


@pytest.mark.parametrize(
    "command",
    ["run mine::none/1 true", "start mine::none/1", "image inspect mine::none/1", "diff mine::none/1 mine::tiny",
     "kernel install mine::none/1", "run mine::tiny/1.0,mine::none/1 true"],
)  # fmt: skip
def test_one_that_is_not_there(command: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == UnknownLabel.exit_status
    said = capsys.readouterr().err
    assert said == (
        f"uenvctl: there is no own image none/1 in {images}\n"
        "hint: list them: uenvctl image ls mine::; build it: uenvd-publish build RECIPE none/1\n"
    )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("image pull mine::tiny/1.0", "mine::tiny/1.0 is an image of your own: there is nothing to pull"),
        ("lock mine::tiny", "mine::tiny is an image of your own: only images of the registry can be locked"),
        ("image evict mine::tiny/1.0", "it is not in the cache\nhint: remove its file with: rm"),
        ("image pin mine::tiny/1.0", "it is not in the cache\nhint: such images are not evicted"),
        ("image unpin mine::tiny/1.0", "it is not in the cache"),
        ("image find mine::ti", "not in the registry\nhint: uenvctl image ls mine::ti"),
    ],
)  # fmt: skip
def test_where_it_has_no_meaning(
    command: str, said: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == UsageError.exit_status
    assert said in capsys.readouterr().err


def test_they_are_inspected_and_compared(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "inspect", "mine::tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["label"], facts["mount"]) == ("mine::tiny/1.0", "/user-environment")
    assert main(["diff", "mine::tiny/1.0:old", "mine::tiny"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["mine::tiny/1.0:old", "mine::tiny/1.0"]


def test_a_lock_file_leaves_them_alone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "uenv.lock").write_text('{"version": 1, "images": []}')
    assert main(["diff", "--locked", "mine::tiny/1.0:old", "mine::tiny"]) == 0
    assert main(["diff", "--locked", "mine::tiny", "tiny"]) == LockError.exit_status


def offered(line: str, environ: dict[str, str], ask: complete.Ask) -> list[str]:
    return [word for word, _about in complete.complete(line.split(" "), ask, environ).candidates]


def test_they_are_offered(images: Path, tmp_path: Path) -> None:
    environ = {"XDG_DATA_HOME": str(tmp_path / "share")}

    def nobody(op: str, **fields: object) -> dict[str, object]:
        raise DaemonUnreachable("nobody")

    def uenvd(op: str, **fields: object) -> dict[str, object]:
        assert not str(fields["uenv"]).startswith("mine"), "uenvd knows nothing of them"
        return {"records": [{"name": "tool", "version": "1", "tag": "v1"}]}

    mine = ["mine::tiny/1.0", "mine::tiny/1.0:old"]
    for command in ("run", "start", "diff", "image inspect", "image ls"):
        assert offered(f"{command} ", environ, nobody) == mine
        assert offered(f"{command} ", environ, uenvd) == [*mine, "tool/1:v1"]
        assert offered(f"{command} mine::t", environ, uenvd) == mine
        assert offered(f"{command} t", environ, uenvd) == ["tool/1:v1"]
    for command in ("lock", "image pull", "image find", "image evict", "image pin"):
        assert offered(f"{command} ", environ, uenvd) == ["tool/1:v1"]
    assert offered("run tool,mi", environ, uenvd) == [f"tool,{one}" for one in mine]
    assert offered("run mine::tiny/1.0 --view=", environ, uenvd) == [
        *("--view=none", "--view=default", "--view=plain")
    ]
    with pytest.raises(UnknownLabel):
        offered("run mine::none --view=", environ, uenvd)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("status --metrics --json", "--metrics has a form of its own"),
        ("status --metrics --no-header", "--metrics has a form of its own"),
        ("image ls --here --refresh", "--here does not ask the registry"),
        ("diff --all a b", "--all is for --files"),
        ("lock --check a/1", "--check looks at the whole file"),
    ],
)
def test_options_that_exclude_each_other(
    command: str, said: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == UsageError.exit_status
    assert said in capsys.readouterr().err
