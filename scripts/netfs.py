#!/usr/bin/env python3
"""Run tests/netfs (or what the arguments name) where a real NFS server and clients are: in a small machine of their own. ``make netfs``.

    scripts/netfs.py [ARGUMENT OF PYTEST ...]

QEMU starts Debian's kernel, which has the NFS client and server whatever this machine's kernel has. The machine's file system is this one's,
read-only, with a layer in memory on top: so it runs this checkout and .venv, and nothing of what it does stays. Without KVM
(``UENVD_NETFS_ACCEL=kvm`` asks for it) the processor is emulated, about ten times slower than real.

Needs root, x86_64, and Debian packages, which it installs when they are missing (no service of theirs is started). The kernel is
downloaded once, and kept below ``/var/tmp``. Ends with the status of pytest; 99 if the machine itself failed.
"""

from __future__ import annotations

import gzip
import lzma
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PACKAGES: Final = (
    "qemu-system-x86",
    "busybox-static",
    "nfs-kernel-server",
    "nfs-common",
    "rpcbind",
    "iproute2",
    "e2fsprogs",
)
MODULES: Final = (
    *("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_rng", "crc32c_generic", "ext4", "loop"),
    *("nfsv3", "nfsv4", "nfsd", "veth", "bridge", "fuse", "squashfs"),
)
KERNELS: Final = Path("/var/tmp")
LIMIT_S: Final = float(os.environ.get("UENVD_NETFS_LIMIT", "2400"))
FAILED: Final = 99
MEMORY_MIB: Final = 2560
_STATUS: Final = b"uenvd-netfs-status"

# Root of the initial file system: modules, then the machine's own root under a layer in memory.
INIT: Final = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
while read m; do $B insmod /modules/$m || echo "no module $m"; done < /modules/order
$B mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /host
$B mount -t tmpfs -o mode=755 layer /layer; $B mkdir /layer/upper /layer/work
$B mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /new
$B mkdir -p /new/proc /new/sys /new/dev
for d in proc sys dev; do $B mount --move /$d /new/$d; done
$B cp /inside /new/inside
exec $B switch_root /new /bin/bash /inside
"""

INSIDE: Final = """
for d in /tmp /run /var/tmp; do mount -t tmpfs -o mode=1777 tmpfs $d; done
mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; mount -t tmpfs tmpfs /dev/shm
chmod 666 /dev/fuse; ip link set lo up; hostname server
echo 'uenvd-netfs:x:4711:4711::/nonexistent:/usr/sbin/nologin' >> /etc/passwd
cd {checkout}
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 UENVD_NETFS=1 HOME=/root PATH=$PATH:/usr/sbin:/sbin
{command} < /dev/null
echo "{status} $?"
sleep 60
"""


def main(arguments: Sequence[str]) -> int:
    """Do it; return the status of pytest."""
    if os.geteuid() != 0 or platform.machine() != "x86_64":
        print("netfs: needs root (packages, a file system of other users) on x86_64", file=sys.stderr)
        return FAILED
    checkout = Path(__file__).resolve().parents[1]
    python = checkout / ".venv/bin/python"
    if any(checkout.is_relative_to(hidden) for hidden in ("/tmp", "/var/tmp", "/run", "/dev")):
        print(
            f"netfs: {checkout} is hidden in the machine, which has its own /tmp, /var/tmp and /run",
            file=sys.stderr,
        )
        return FAILED
    install()
    kernel, modules = get_kernel()
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    command = shlex.join(map(str, [*pytest, *(arguments or ["tests/netfs"])]))
    with tempfile.TemporaryDirectory(prefix="uenvd-netfs-") as directory:
        initial = Path(directory) / "initial"
        initial.write_bytes(gzip.compress(archive(files(modules, checkout, command)), 1))
        return start(kernel, initial)


def install() -> None:
    """Install the packages that are missing, without starting what they bring."""
    asked = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\n", *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    )
    there = {line.split()[1] for line in asked.stdout.splitlines() if line.startswith("installed ")}
    if missing := [name for name in PACKAGES if name not in there]:
        print("netfs: installing", *missing, flush=True)
        with no_services():
            quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            subprocess.run(["apt-get", "-qq", "update"], check=True)
            subprocess.run(
                ["apt-get", "-qq", "-y", "--no-install-recommends", "install", *missing],
                check=True,
                env=quiet,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )


@contextmanager
def no_services() -> Iterator[None]:
    """Keep packages from starting services while they are installed (deb-systemd-invoke(1), invoke-rc.d(8))."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            policy.unlink()


def get_kernel() -> tuple[Path, Path]:
    """Return Debian's kernel and the directory of its modules, downloaded if they are not there."""
    depends = subprocess.run(
        ["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, check=True
    )
    found = re.search(r"Depends: (linux-image-(\S+))", depends.stdout)
    if found is None:
        raise SystemExit("netfs: apt knows no linux-image-amd64")
    package, version = found.groups()
    place = KERNELS / f"uenvd-netfs-{version}"
    if not place.exists():
        print(f"netfs: downloading {package}", flush=True)
        with tempfile.TemporaryDirectory(prefix="uenvd-netfs-", dir=KERNELS) as directory:
            subprocess.run(["apt-get", "-qq", "download", package], check=True, cwd=directory)
            (file,) = Path(directory).glob("*.deb")
            unpacked = Path(directory) / "unpacked"
            subprocess.run(["dpkg-deb", "-x", file, unpacked], check=True)
            unpacked.chmod(0o755)
            unpacked.rename(place)
    return place / f"boot/vmlinuz-{version}", place / f"lib/modules/{version}"


def files(modules: Path, checkout: Path, command: str) -> dict[str, bytes]:
    """Return name -> content of the initial file system; a directory has none."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("netfs: busybox is missing")
    found: dict[str, bytes] = dict.fromkeys(
        ("proc", "sys", "dev", "host", "new", "layer", "bin", "modules"), b""
    )
    found["init"] = INIT.encode()
    found["inside"] = INSIDE.format(
        checkout=shlex.quote(str(checkout)), command=command, status=_STATUS.decode()
    ).encode()
    found["bin/busybox"] = Path(busybox).read_bytes()
    order = in_order(modules)
    for path in order:
        data = path.read_bytes()
        found[f"modules/{path.name.removesuffix('.xz')}"] = (
            lzma.decompress(data) if path.suffix == ".xz" else data
        )
    found["modules/order"] = "".join(f"{path.name.removesuffix('.xz')}\n" for path in order).encode()
    return found


def in_order(modules: Path) -> list[Path]:
    """Return the files of `MODULES` with all that they need, what is needed first; what the kernel has built in is left out."""
    known = {path.name.partition(".")[0].replace("-", "_"): path for path in modules.rglob("*.ko*")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = known.get(name.replace("-", "_"))
        if path is None or path in order:
            return
        data = path.read_bytes()
        needs = re.search(
            rb"(?:^|\0)depends=([^\0]*)\0", lzma.decompress(data) if path.suffix == ".xz" else data
        )
        for needed in needs.group(1).decode().split(",") if needs else ():
            add(needed)
        order.append(path)

    for name in MODULES:
        add(name)
    return order


def archive(content: dict[str, bytes]) -> bytes:
    """Return a cpio archive as the kernel unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    out = bytearray()
    for number, (name, data) in enumerate((*content.items(), ("TRAILER!!!", b"")), 1):
        path = name.encode() + b"\0"
        mode = 0o100755 if data else 0o040755
        numbers = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        out += b"070701" + b"".join(b"%08x" % value for value in numbers) + path
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def start(kernel: Path, initial: Path) -> int:
    """Run the machine and show what it says; return the status that it reports."""
    accelerator = os.environ.get("UENVD_NETFS_ACCEL", "tcg,thread=multi")
    share = "local,id=root,path=/,security_model=passthrough,readonly=on,multidevs=remap"
    process = subprocess.Popen(
        ["qemu-system-x86_64", "-M", "q35", "-accel", accelerator, "-cpu", "max", "-smp", "2", "-m", str(MEMORY_MIB),
         "-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio",
         "-kernel", kernel, "-initrd", initial, "-append", "console=ttyS0 loglevel=3 panic=-1",
         "-fsdev", share, "-device", "virtio-9p-pci,fsdev=root,mount_tag=root", "-device", "virtio-rng-pci"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    status, text = FAILED, b""
    limit = threading.Timer(LIMIT_S, process.kill)
    limit.start()
    try:
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 65536):
            text += piece
            found = re.search(rb"%s (\d+)\r?\n" % _STATUS, text)
            line = text[text.rfind(b"\n") + 1 :]
            begun = len(line) if line.startswith(_STATUS) or _STATUS.startswith(line) else 0
            end = found.start() if found else len(text) - begun
            sys.stdout.buffer.write(text[:end])
            sys.stdout.buffer.flush()
            text = text[end:]
            if found:
                status = int(found[1])
                break  # nothing is to be kept: the power is simply switched off
    finally:
        limit.cancel()
        process.kill()
        process.wait()
    if status == FAILED:
        print(f"netfs: the machine ended without a result (limit {LIMIT_S:g} s)", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
