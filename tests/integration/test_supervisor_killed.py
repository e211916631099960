"""One image's supervisor and workers, each harm by itself: who had a request in hand is killed, hangs, crashes on it; and what a worker may do."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import images
from support.fusetools import NOBODY, Session, open_to_all, session, until
from support.supervised import Parent, group_of, supervised, wait_gone
from uenvd.fuse.protocol import Negotiated
from uenvd.fuse.slots import Slots
from uenvd.handover import SLOTS_PER_WORKER, Message

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="plays the daemon, which is root")

HARM = """
import json, mmap, os, sys, time
import uenvd.fuse.channel as channel
from uenvd.fuse.answers import Answers
from uenvd.fuse.slots import Slot
def attack():
    import ctypes, errno, mmap, resource, signal, socket
    libc = ctypes.CDLL(None, use_errno=True)
    def attempt(function, *args):
        try: function(*args)
        except OSError as error: return errno.errorcode[error.errno]
        except ValueError: return 'EPERM'  # how resource.setrlimit says it
        return 'done'
    def call(number, *args):
        return 'done' if libc.syscall(ctypes.c_long(number), *args) >= 0 else errno.errorcode[ctypes.get_errno()]
    def thread():
        import threading
        told = []
        one = threading.Thread(target=told.append, args=(1,)); one.start(); one.join()
        assert told
    parent = os.getppid()
    return {
        'open': attempt(os.open, '/etc/hostname', os.O_RDONLY), 'open a directory': attempt(os.open, '/', os.O_RDONLY | os.O_DIRECTORY),
        'write': attempt(os.open, '/tmp/x', os.O_WRONLY | os.O_CREAT), 'unlink': attempt(os.unlink, '/tmp/x'), 'stat': attempt(os.lstat, '/etc'),
        'list': attempt(os.listdir, '/'), 'exec': attempt(os.execv, '/bin/true', ['true']), 'fork': attempt(os.fork), 'vfork': call(58),
        'clone a process': call(56, 17, 0, 0, 0, 0), 'unix socket': attempt(socket.socket, socket.AF_UNIX), 'socketpair': attempt(socket.socketpair),
        'internet socket': attempt(socket.socket, socket.AF_INET), 'netlink': attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW),
        'accept': attempt(os.close, 10**6) and call(288, 5, 0, 0, 0), 'kill the parent': attempt(os.kill, parent, 9),
        'stop itself': attempt(os.kill, os.getpid(), 19),
        'ptrace': call(101, 16, parent, 0, 0), 'memory of the parent': call(310, parent, 0, 0, 0, 0, 0), 'pidfd': attempt(os.pidfd_open, parent),
        'mount': call(165, b'none', b'/mnt', b'tmpfs', 0, 0), 'open_tree': call(428, -1, b'/', 1), 'unshare': call(272, 0x10000000),
        'setns': call(308, 0, 0), 'bpf': call(321, 0, 0, 0), 'io_uring': call(425, 1, 0), 'memfd': attempt(os.memfd_create, 'x'),
        'executable memory': call(9, 0, 4096, mmap.PROT_READ | mmap.PROT_EXEC, 0x22, -1, 0), 'setuid': attempt(os.setuid, 0),
        'undumpable no more': call(157, 4, 1, 0, 0, 0), 'another filter': call(317, 0, 0, 0),
        'limits': attempt(resource.setrlimit, resource.RLIMIT_NOFILE, (9, 9)),
        'tty': call(16, 0, 0x5412, 0), 'priority': attempt(os.setpriority, 0, 0, 5), 'chroot': attempt(os.chroot, '/'), 'keyctl': call(250, 0, -3, 0),
        'allowed: thread': attempt(thread), 'allowed: time': attempt(time.sleep, 0.001),
    }
doomed = mmap.mmap(-1, 1)
init = channel.Channel.__init__
def __init__(self, *args, **named):
    if doomed[0]: os._exit(5)
    init(self, *args, **named)
channel.Channel.__init__ = __init__
if os.environ.get('UENVD_TEST_IMPATIENT'):
    import uenvd.fuse.workforce as workforce
    workforce._HOPELESS_S, workforce._MAX_DELAY_S = 0.0, 0.01
def answer(self, request, length):
    text = bytes(request[40:length])
    if text.startswith(b'slow') and not os.environ.get('UENVD_TEST_MILD') and attempt[0] == 1: time.sleep(60)
    while text.startswith(b'spin') and attempt[0] == 1: pass
    if text.startswith(b'poison'): os._exit(3)
    if text.startswith(b'doom'): doomed[0] = 1; os._exit(5)
    if text.startswith(b'attack'): os.write(2, b'ATTACK' + json.dumps(attack()).encode() + b'\\n')
    if text.startswith(b'daze'): os.readv = hang
    return real_answer(self, request, length)
def hang(*_args):
    while True: pass
def begin(self):
    attempt[0] = real_begin(self)
    return attempt[0]
def begin_first(self):
    attempt[0] = 1
    real_begin_first(self)
attempt = [0]
real_answer, Answers.answer = Answers.answer, answer
real_begin, Slot.begin = Slot.begin, begin
real_begin_first, Slot.begin_first = Slot.begin_first, begin_first
if os.environ.get('UENVD_TEST_SUICIDE'):
    import mmap, signal
    once, end = mmap.mmap(-1, 1), signal.pidfd_send_signal
    def first_time(descriptor, number):
        if not once[0]: once[0] = 1; os._exit(1)
        return end(descriptor, number)
    signal.pidfd_send_signal = first_time
"""
"""``sitecustomize`` of the supervisor: requests that do harm to the worker that gets them."""

ASKERS = (
    "[globals().update(askers=[]), [askers.append(pid) for i in range(6) for pid in [os.fork()] "
    "if pid or os.closerange(0, 3) or os._exit(os.path.lexists(f'/mnt/no{i}') or not os.path.lexists('/mnt/file'))]][0]"
)
"""Six processes that look for files."""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    open_to_all()
    with tempfile.TemporaryDirectory() as base:
        path = Path(base)
        path.chmod(0o755)
        (path / "tree").mkdir()
        (path / "tree" / "file").write_text("content\n")
        (path / "tree" / "big").write_bytes(images.content(3 << 20, 1))
        images.make_image(path / "tree", path / "i").chmod(0o644)
        (path / "harm").mkdir()
        (path / "harm" / "sitecustomize.py").write_text(HARM)
        yield path


@pytest.fixture
def parent(place: Path, tmp_path: Path) -> Iterator[Parent]:
    with supervised(tmp_path) as made:
        made.env = {"PYTHONPATH": str(place / "harm")}  # type: ignore[attr-defined]
        yield made


def serve(parent: Parent, place: Path) -> None:
    parent.start(env=parent.env)  # type: ignore[attr-defined]
    parent.give_image(place / "i")
    parent.serving()


def ask(user: Session, expression: str) -> None:
    """Begin an evaluation; `answer` has its result."""
    assert user.process.stdin is not None
    user.process.stdin.write(expression + "\n")
    user.process.stdin.flush()


def answer(user: Session) -> Any:
    assert user.process.stdout is not None
    return json.loads(user.process.stdout.readline())


def taken(parent: Parent, *, begun: bool) -> list[int]:
    """Return the slots with a request; with ``begun`` those in which work on it has begun."""
    count = parent.duty.workers * SLOTS_PER_WORKER
    with mmap.mmap(parent.slots, Slots.size_bytes(count)) as memory:
        slots = Slots(memory, count)
        found = [i for i, slot in enumerate(slots) if slot.busy() and (slot.attempts or not begun)]
        del slots
    return found


def busy(parent: Parent) -> list[int]:
    return taken(parent, begun=True)


def any_waiting(parent: Parent) -> bool:
    return bool(taken(parent, begun=False))


def test_one_can_stand_in_the_root_while_the_image_is_pulled(parent: Parent, place: Path) -> None:
    parent.start()
    parent.until(lambda p: p.state and p.state.negotiated)
    with session(NOBODY, parent.mount, "/mnt") as user:
        assert user.eval("os.chdir('/mnt')") is None
        assert user.eval("os.stat('.').st_mode") == 0o40755
        ask(user, "open('/mnt/file').read()")
        until(lambda: any_waiting(parent), "the request is taken")
        parent.give_image(place / "i")
        assert answer(user) == "content\n"
        assert user.eval("os.stat('/mnt').st_mode") == (place / "tree").stat().st_mode


def test_who_waits_for_an_image_can_be_killed(parent: Parent) -> None:
    parent.start()
    parent.until(lambda p: p.state and p.state.negotiated)
    with session(NOBODY, parent.mount, "/mnt") as user:
        ask(user, "open('/mnt/file').read()")
        until(lambda: any_waiting(parent), "the request is taken")
        user.process.kill()
        assert user.process.wait(10) == -signal.SIGKILL
        until(lambda: not any_waiting(parent), "the request is answered")
    assert parent.state is not None
    assert parent.state.phase == "attending"


def test_supervisors_and_users_are_killed_while_the_image_is_pulled(place: Path, tmp_path: Path) -> None:
    """Who still waits when the image comes gets his answer; who was killed is gone, whatever became of his request."""
    with supervised(tmp_path, grace_s=30.0) as parent:
        parent.start()
        parent.until(lambda p: p.state and p.state.negotiated and p.state.standby)
        with session(NOBODY, parent.mount, "/mnt") as user:
            user.eval(ASKERS)
            until(lambda: len(taken(parent, begun=False)) == 6, "all requests are taken")
            for number in range(6):
                assert parent.state is not None
                os.kill(parent.state.pid, signal.SIGKILL)
                user.eval(f"os.kill(askers[{number}], 9)" if number < 3 else "None")
                assert parent.connect()
                parent.until(lambda p: p.state.standby)
                assert user.eval("os.stat('/mnt').st_mode") == 0o40755
            assert user.eval("[os.waitpid(pid, 0)[1] for pid in askers[:3]]") == [9] * 3
            parent.give_image(place / "i")
            assert user.eval("[os.waitpid(pid, 0)[1] for pid in askers[3:]]") == [0] * 3
            until(lambda: not any_waiting(parent), "nothing is left in the slots")


@pytest.mark.parametrize("victim", ["worker", "supervisor", "worker and supervisor"])
def test_request_in_hand_is_answered_by_the_successor(place: Path, tmp_path: Path, victim: str) -> None:
    with supervised(tmp_path) as parent:
        parent.env = {"PYTHONPATH": str(place / "harm")}  # type: ignore[attr-defined]
        serve(parent, place)
        with session(NOBODY, parent.mount, "/mnt") as user:
            ask(user, "os.path.lexists('/mnt/slow')")
            (slot,) = until(lambda: busy(parent), "a worker has the request in hand")
            assert parent.state is not None
            worker = parent.state.workers[slot // SLOTS_PER_WORKER]
            for pid in {"worker": [worker], "supervisor": [parent.state.pid]}.get(
                victim, [worker, parent.state.pid]
            ):
                os.kill(pid, signal.SIGKILL)
            assert answer(user) is False
            assert len(user.eval("open('/mnt/file').read()")) == 8
            until(lambda: not busy(parent), "nothing is left in the slots")


@pytest.mark.parametrize("how", ["spin", "stopped"])
def test_worker_that_hangs_is_replaced(place: Path, tmp_path: Path, how: str) -> None:
    with supervised(tmp_path, hang_s=0.6, workers=1) as parent:
        parent.env = {"PYTHONPATH": str(place / "harm")}  # type: ignore[attr-defined]
        serve(parent, place)
        assert parent.state is not None
        (before,) = parent.state.workers
        with session(NOBODY, parent.mount, "/mnt") as user:
            if how == "stopped":
                os.kill(before, signal.SIGSTOP)
                assert user.eval("open('/mnt/file').read()") == "content\n"
            else:
                assert user.eval("os.path.lexists('/mnt/spin')") is False
        parent.until(lambda p: p.state is not None and p.state.deaths == 1 and p.state.workers)
        assert parent.state.workers != (before,)


def test_request_that_kills_its_workers_is_an_error_and_costs_the_others_nothing(
    parent: Parent, place: Path
) -> None:
    serve(parent, place)
    with session(NOBODY, parent.mount, "/mnt") as user:
        assert user.eval("os.listdir('/mnt/poison')") == {"errno": errno.EIO}
        assert user.eval("open('/mnt/file').read()") == "content\n"
    parent.until(lambda p: p.state is not None and p.state.deaths == 3)


def test_many_requests_that_kill_their_workers_cost_the_others_nothing(place: Path, tmp_path: Path) -> None:
    """However many workers end soon after their start: as long as each has begun a request, it is the request's fault."""
    with supervised(tmp_path) as parent:
        parent.env = {"PYTHONPATH": str(place / "harm"), "UENVD_TEST_IMPATIENT": "1"}  # type: ignore[attr-defined]
        serve(parent, place)
        with session(NOBODY, parent.mount, "/mnt") as user:
            for number in range(5):
                assert user.eval(f"os.listdir('/mnt/poison{number}')") == {"errno": errno.EIO}
            assert user.eval("open('/mnt/file').read()") == "content\n"
        parent.until(lambda p: p.state is not None and p.state.deaths == 15)
        assert parent.state is not None
        assert parent.state.phase == "serving"


def test_workers_that_end_for_no_request_leave_errors_to_their_users(place: Path, tmp_path: Path) -> None:
    """Each ends before it begins anything. Users get EIO then, now and later, instead of waiting; also from a successor."""
    with supervised(tmp_path) as parent:
        parent.env = {"PYTHONPATH": str(place / "harm"), "UENVD_TEST_IMPATIENT": "1"}  # type: ignore[attr-defined]
        serve(parent, place)
        with session(NOBODY, parent.mount, "/mnt") as user:
            assert user.eval("os.path.lexists('/mnt/doom')") is False  # that is what lexists makes of EIO
            parent.until(lambda p: p.state.phase == "refusing" and p.state.standby)
            assert parent.report is not None
            assert parent.report.error is not None
            assert parent.report.error.code == "worker-failed"
            assert user.eval("open('/mnt/file').read()") == {"errno": errno.EIO}
            assert parent.state is not None
            os.kill(parent.state.pid, signal.SIGKILL)
            assert user.eval("open('/mnt/big').read()") == {"errno": errno.EIO}
        assert parent.process is not None
        parent.let_go()
        wait_gone(parent.process.pid)


def test_worker_that_hangs_without_a_request_is_replaced(place: Path, tmp_path: Path) -> None:
    """Nothing in its slots tells; but requests wait and nobody begins one."""
    with supervised(tmp_path, hang_s=0.6, workers=1) as parent:
        parent.env = {"PYTHONPATH": str(place / "harm")}  # type: ignore[attr-defined]
        serve(parent, place)
        with session(NOBODY, parent.mount, "/mnt") as user:
            assert user.eval("os.path.lexists('/mnt/daze')") is False
            assert user.eval("open('/mnt/file').read()") == "content\n"
        parent.until(lambda p: p.state is not None and p.state.deaths == 1 and p.state.workers)


def test_supervisors_are_killed_one_after_the_other(parent: Parent, place: Path) -> None:
    serve(parent, place)
    assert parent.process is not None
    with session(NOBODY, parent.mount, "/mnt") as user:
        for number in range(6):
            assert parent.state is not None
            victim = parent.state.standby if number % 3 == 2 else parent.state.pid
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            if number % 3 != 2:
                assert parent.connect()
            parent.until(
                lambda p, victim=victim: p.state.standby not in (None, victim) and p.state.pid != victim
            )
            assert (
                user.eval(
                    "os.posix_fadvise(f := os.open('/mnt/big', 0), 0, 0, 4) or len(os.read(f, 9 << 20))"
                )
                == 3 << 20
            )
            parent.serving()


def test_supervisor_killed_with_two_standbys_has_one_successor(place: Path, tmp_path: Path) -> None:
    """It is killed when it has forked a standby in place of another, which it has not ended yet; the new one knows of the image."""
    with supervised(tmp_path) as parent:
        parent.start(env={"PYTHONPATH": str(place / "harm"), "UENVD_TEST_SUICIDE": "1"})
        parent.give_image(place / "i")
        assert parent.process is not None
        group = parent.process.pid
        until(lambda: not parent.hear(), "the supervisor ends")
        parent.process.wait(10)
        assert parent.connect()
        state = parent.serving()
        until(lambda: len(group_of(group)) == 2 + parent.duty.workers, "one supervisor is left")
        with session(NOBODY, parent.mount, "/mnt") as user:
            assert user.eval("open('/mnt/file').read()") == "content\n"
        assert state.pid in group_of(group)


@pytest.mark.parametrize("who", ["supervisor", "standby"])
def test_supervisor_that_is_stopped_is_replaced(place: Path, tmp_path: Path, who: str) -> None:
    with supervised(tmp_path, hang_s=0.3) as parent:
        parent.env = {}  # type: ignore[attr-defined]
        serve(parent, place)
        state = parent.state
        assert state is not None
        assert state.standby is not None
        victim = state.pid if who == "supervisor" else state.standby
        os.kill(victim, signal.SIGSTOP)
        if who == "supervisor":
            until(lambda: not parent.hear(), "the supervisor ends")
            assert parent.connect()
        parent.until(lambda p: p.state.pid != victim and p.state.standby not in (None, victim))
        parent.serving()
        with session(NOBODY, parent.mount, "/mnt") as user:
            assert user.eval("open('/mnt/file').read()") == "content\n"


def test_only_root_may_come_as_a_daemon(parent: Parent, place: Path, public_dir: Path) -> None:
    serve(parent, place)
    assert parent.state is not None
    address = public_dir / "there"
    os.link(parent.address, address)
    address.chmod(0o666)
    code = (
        "import socket, sys\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.settimeout(10); s.connect(sys.argv[1])\n"
        "try: s.send(sys.argv[2].encode()); print(s.recvmsg(65536, 1024)[:2])\n"
        "except (BrokenPipeError, ConnectionResetError): print((b'', []))\n"
    )
    hello = Message("hello", {"adopt": True}).encode().decode()
    for uid, answered in ((NOBODY, False), (0, True)):
        told = subprocess.run(
            [sys.executable, "-c", code, str(address), hello],
            user=uid,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            cwd="/",
        ).stdout
        assert (told.strip() != "(b'', [])") == answered


def test_requests_whose_slots_are_lost_are_sent_again(parent: Parent, place: Path) -> None:
    """All processes are gone, and the shared memory with them: the kernel is asked (FUSE_NOTIFY_RESEND)."""
    serve(parent, place)
    assert parent.state is not None
    assert parent.process is not None
    assert parent.state.negotiated is not None
    if not Negotiated.from_wire(parent.state.negotiated).resend:
        pytest.skip("the kernel has no FUSE_NOTIFY_RESEND (Linux 6.9)")
    first = parent.process
    with session(NOBODY, parent.mount, "/mnt") as user:
        ask(user, "os.path.lexists('/mnt/slow')")
        until(lambda: busy(parent), "a worker has the request in hand")
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        until(lambda: not parent.connect(), "nobody accepts any more")
        parent.forget_slots()
        parent.listen_again()
        image = os.open(place / "i", os.O_RDONLY)
        parent.start(image, slots_lost=True, env=parent.env | {"UENVD_TEST_MILD": "1"})  # type: ignore[attr-defined]
        os.close(image)
        assert answer(user) is False
    wait_gone(first.pid)


def test_all_are_killed_and_others_go_on_with_the_descriptors(parent: Parent, place: Path) -> None:
    serve(parent, place)
    first = parent.process
    assert first is not None
    with session(NOBODY, parent.mount, "/mnt") as user:
        assert user.eval("open('/mnt/file').read()") == "content\n"
        ask(user, "os.path.lexists('/mnt/slow')")
        until(lambda: busy(parent), "a worker has the request in hand")
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        until(lambda: not parent.connect(), "nobody accepts any more")
        parent.listen_again()
        image = os.open(place / "i", os.O_RDONLY)
        parent.start(image)
        os.close(image)
        assert answer(user) is False
        assert len(user.eval("open('/mnt/big', 'rb').read()[::4096].hex()")) == 2 * 768
    wait_gone(first.pid)


def test_without_a_daemon_it_ends_with_its_last_user_after_a_grace_time(parent: Parent, place: Path) -> None:
    serve(parent, place)
    assert parent.process is not None
    assert parent.channel is not None
    with session(NOBODY, parent.mount, "/mnt") as user:
        parent.let_go()
        parent.channel.close()
        with pytest.raises(subprocess.TimeoutExpired):
            parent.process.wait(2 * parent.duty.grace_s)
        assert user.eval("open('/mnt/file').read()") == "content\n"
    assert parent.process.wait(10) == 0
    wait_gone(parent.process.pid)
    assert parent.is_over()


def test_without_a_daemon_an_image_waits_for_the_next_one(place: Path, tmp_path: Path) -> None:
    with supervised(tmp_path, grace_s=30.0) as parent:
        parent.env = {}  # type: ignore[attr-defined]
        serve(parent, place)
        assert parent.channel is not None
        parent.let_go()
        parent.channel.close()
        parent.report = None
        assert parent.connect(adopt=True)
        parent.until(lambda p: p.report)
        assert {name: len(fds) for name, fds in parent.received.items()} == {
            "fuse": 1,
            "slots": 1,
            "mount": 1,
        }
        with session(NOBODY, parent.received["mount"][0], "/mnt") as user:
            assert user.eval("open('/mnt/file').read()") == "content\n"
        os.close(parent.received["mount"].pop())
        assert parent.process is not None
        assert parent.process.wait(10) == 0


def test_before_its_image_it_does_not_outlive_the_daemon(parent: Parent) -> None:
    parent.start()
    parent.until(lambda p: p.state and p.state.negotiated)
    assert parent.channel is not None
    assert parent.process is not None
    with session(NOBODY, parent.mount, "/mnt") as user:
        ask(user, "open('/mnt/file').read()")
        parent.channel.close()
        os.close(parent.fuse)
        assert answer(user)["errno"] in (errno.ENOTCONN, errno.ECONNABORTED)
    wait_gone(parent.process.pid)


def test_damaged_image_is_reported_and_ends_it(parent: Parent, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"no image" * 1000)
    parent.start()
    parent.give_image(bad)
    parent.until(lambda p: p.report)
    assert parent.report is not None
    assert parent.report.error is not None
    assert parent.report.error.code == "bad-image"
    assert parent.process is not None
    assert parent.process.wait(10) == 0
    wait_gone(parent.process.pid)


def test_what_a_worker_may_do(parent: Parent, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    serve(parent, place)
    with session(NOBODY, parent.mount, "/mnt") as user:
        assert user.eval("os.path.lexists('/mnt/attack')") is False
    told = json.loads(capfd.readouterr().err.partition("ATTACK")[2].splitlines()[0])
    allowed = {name: result for name, result in told.items() if name.startswith("allowed")}
    assert set(allowed.values()) == {"done"}
    refused = {name: result for name, result in told.items() if not name.startswith("allowed")}
    assert {name: result for name, result in refused.items() if result not in ("EPERM", "ENOSYS")} == {}
    assert parent.state is not None
    for pid in (parent.state.pid, *parent.state.workers):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert status["Uid"].split() == [str(NOBODY)] * 4
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")} == {0}
        assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")


def test_every_call_that_serving_needs_is_allowed(place: Path, tmp_path: Path) -> None:
    """With a filter that kills: take-over, hang detection and the end, too."""
    with supervised(tmp_path, hang_s=0.3, nice=3, affinity=(0,)) as parent:
        parent.env = {"UENVD_SECCOMP": "kill"}  # type: ignore[attr-defined]
        serve(parent, place)
        assert parent.state is not None
        with session(NOBODY, parent.mount, "/mnt") as user:
            assert len(user.eval("open('/mnt/big', 'rb').read()[::4096].hex()")) == 2 * 768
            os.kill(parent.state.pid, signal.SIGKILL)
            assert parent.connect()
            state = parent.serving()
            os.kill(state.workers[1], signal.SIGSTOP)
            parent.until(lambda p: p.state.deaths == 1 and len(p.state.workers) == 2)
            for pid in parent.state.workers:
                until(
                    lambda pid=pid: (
                        os.sched_getaffinity(pid) == {0} and os.getpriority(os.PRIO_PROCESS, pid) == 3
                    ),
                    "a worker goes to its place",
                )
            assert user.eval("sorted(os.listdir('/mnt'))") == ["big", "file"]
        parent.let_go()
        parent.say("release")
        assert parent.process is not None
        wait_gone(parent.process.pid)
        assert parent.state.deaths == 1
