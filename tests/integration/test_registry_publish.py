"""``uenvd-publish`` as a program, against docker-registry, a layout and a registry that is not there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.registry import PASSWORD, USER, FakeRegistry, RealRegistry, docker_registry, free_port
from uenvd.oci.chunks import verify_file
from uenvd.oci.manifest import parse_config, squashfs_layer
from uenvd.oci.reference import parse_registry
from uenvd.oci.remote import open_remote

LABEL = "app/1.0:v1@demo%zen3"
REPOSITORY = "deploy/demo/zen3/app/1.0"

Publish = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealRegistry]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two images: both for x86_64, the first with metadata."""
    made = []
    for number in range(2):
        directory = tmp_path_factory.mktemp("image")
        tree = directory / "tree"
        (tree / "bin").mkdir(parents=True)
        (tree / "bin/tool").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\x3e\x00" + bytes(100))
        (tree / "bin/tool").chmod(0o755)
        (tree / "ballast").write_bytes(os.urandom(600_000))
        if number == 0:
            (tree / "meta").mkdir()
            (tree / "meta/env.json").write_text('{"name":"app","mount":"/user-environment","views":{}}')
        made.append(directory / f"{number}.squashfs")
        environ = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
        subprocess.run(["mksquashfs", tree, made[-1], "-quiet", "-no-progress"], check=True, env=environ)
    return made


@pytest.fixture(params=["http", "layout"])
def address(request: pytest.FixtureRequest, tmp_path: Path, real: RealRegistry) -> str:
    return (
        f"oci-layout:{tmp_path}/layout"
        if request.param == "layout"
        else f"{real.url}/{tmp_path.name.replace('_', '-')}"
    )


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    def run(*words: object, **environ: str) -> subprocess.CompletedProcess[str]:
        keep = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "USER": USER}
        return subprocess.run(
            [sys.executable, "-m", "uenvd.publish.main", *map(str, words)],
            capture_output=True,
            text=True,
            env=keep | environ,
            timeout=60,
            check=False,
        )

    return run


def test_push_and_tag(publish: Publish, address: str, images: list[Path]) -> None:
    done = publish("push", images[0], LABEL, "--registry", address, "--also-tag", "latest")
    assert done.returncode == 0, done.stderr
    digest = done.stdout.strip()
    remote = open_remote(parse_registry(address))
    assert remote.tags(REPOSITORY) == ["latest", "v1"]
    manifest = remote.manifest(REPOSITORY, "latest")
    assert manifest.digest == digest
    layer = squashfs_layer(manifest)
    assert layer.annotations["org.opencontainers.image.title"] == "store.squashfs"
    assert layer.size_bytes == images[0].stat().st_size
    config = parse_config(remote.small_blob(REPOSITORY, manifest.config, 1 << 20))
    assert config is not None and config.meta is not None
    assert (config.architecture, config.meta.name, config.image_digest) == ("x86_64", "app", layer.digest)
    assert config.chunks is not None
    data = images[0].read_bytes()
    verify_file(config.chunks, lambda pos, size: data[pos : pos + size])

    again = publish("push", images[0], LABEL, UENVD_REGISTRY=address)
    assert (again.returncode, again.stdout.strip()) == (0, digest), "the same file is the same image"

    other = publish("push", images[1], LABEL, "--registry", address)
    assert (
        other.returncode == 66 and digest in other.stderr and "--force" in other.stderr and not other.stdout
    )
    second = publish("push", images[1], "app/1.0:v2@demo%zen3", "--registry", address)
    assert second.returncode == 0 and "no usable meta/env.json" in second.stderr
    assert remote.resolve(REPOSITORY, "latest") == digest
    moved = publish("tag", "app/1.0:v2@demo%zen3", "latest", "--registry", address)
    assert moved.returncode == 0 and moved.stdout == second.stdout
    assert remote.resolve(REPOSITORY, "latest") == second.stdout.strip()
    assert publish("tag", "app/1.0:v2@demo%zen3", "v1", "--registry", address).returncode == 66
    pinned = publish("tag", f"app/1.0@demo%zen3@{digest}", "v3", "--registry", address)
    assert pinned.stdout.strip() == digest == remote.resolve(REPOSITORY, "v3")
    forced = publish("push", images[1], LABEL, "--registry", address, "--force")
    assert forced.returncode == 0 and remote.resolve(REPOSITORY, "v1") == second.stdout.strip()
    missing = publish("tag", "app/1.0:v9@demo%zen3", "latest", "--registry", address)
    assert missing.returncode == 68 and "v9" in missing.stderr


def test_skopeo_copies_what_was_published(
    publish: Publish, address: str, images: list[Path], tmp_path: Path
) -> None:
    done = publish("push", images[0], LABEL, "--registry", address)
    parsed = parse_registry(address)
    name = (
        f"oci:{parsed.path}:{REPOSITORY}:v1"
        if parsed.kind == "layout"
        else f"docker://{parsed.host}/{parsed.prefix}/{REPOSITORY}:v1"
    )
    subprocess.run(
        ["skopeo", "copy", "-q", "--src-tls-verify=false", name, f"dir:{tmp_path}/dir"], check=True
    )
    manifest = json.loads((tmp_path / "dir/manifest.json").read_bytes())
    layer = manifest["layers"][0]["digest"].removeprefix("sha256:")
    assert (tmp_path / "dir" / layer).read_bytes() == images[0].read_bytes()
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["push"], 66, "required"),
        (["frobnicate"], 66, "invalid choice"),
        (["push", "{image}", "app", "--registry", "{layout}"], 66, "does not say"),
        (["push", "{image}", "app/1:v1@@demo", "--registry", "{layout}"], 67, "^"),
        (["push", "{image}", LABEL], 86, "UENVD_REGISTRY"),
        (["push", "{image}", LABEL, "--registry", "ftp://x"], 86, "oci-layout"),
        (["push", "/etc/passwd", LABEL, "--registry", "{layout}"], 76, "not a squashfs"),
        (["push", "/none", LABEL, "--registry", "{layout}"], 66, "No such file"),
        (["push", "{image}", "app/1:v1@demo%gh200", "--registry", "{layout}"], 85, "aarch64"),
        (["push", "{image}", LABEL, "--registry", "{layout}", "--also-tag", "a b"], 66, "no valid tag"),
        (["push", "{image}", LABEL, "--registry", "{down}"], 71, "refused"),
        (["push", "{image}", LABEL, "--registry", "oci-layout:/proc/none"], 87, "/proc/none"),
        (["push", "{image}", LABEL, "--registry", "{layout}", "--username", "x"], 66, "--token-file"),
        (["tag", LABEL, "latest", "--registry", "{layout}"], 71, "no image layout"),
    ],
)  # fmt: skip
def test_errors_have_a_line_and_a_status(
    publish: Publish, tmp_path: Path, images: list[Path], words: list[str], status: int, says: str
) -> None:
    names = {
        "image": str(images[0]),
        "layout": f"oci-layout:{tmp_path}/layout",
        "down": f"http://127.0.0.1:{free_port()}",
    }
    done = publish(*(word.format(**names) for word in words))
    assert done.returncode == status, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_credentials_come_from_files_and_are_not_shown(
    publish: Publish, tmp_path: Path, images: list[Path]
) -> None:
    with docker_registry(tmp_path / "registry", htpasswd=True) as registry:
        denied = publish("push", images[0], LABEL, "--registry", registry.url)
        assert denied.returncode == 72 and "hint:" in denied.stderr
        token = tmp_path / "token"
        token.write_text(PASSWORD)
        token.chmod(0o644)
        assert (
            publish("push", images[0], LABEL, "--registry", registry.url, "--token-file", token).returncode
            == 86
        )
        token.chmod(0o600)
        done = publish(
            "push", images[0], LABEL, "--registry", registry.url, "--token-file", token, "--username", USER
        )
        assert done.returncode == 0, done.stderr
        token.write_text("wrong-" + PASSWORD)
        wrong = publish("push", images[0], LABEL, "--registry", registry.url, "--token-file", token)
        assert wrong.returncode == 72
        for each in (denied, done, wrong):
            assert PASSWORD not in each.stdout + each.stderr


def test_ctrl_c_is_clean(tmp_path: Path, images: list[Path]) -> None:
    import signal
    import time

    with FakeRegistry() as fake:
        fake.spoil("/uploads/", method="PUT", silent=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "uenvd.publish.main", "push", images[0], LABEL, "--registry", fake.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            end = time.monotonic() + 20
            while not fake.count("PUT", "/uploads/"):
                assert time.monotonic() < end
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10)
        finally:
            process.kill()
        assert process.returncode == 130
        assert b"interrupted" in errors and b"Traceback" not in errors
