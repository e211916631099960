"""What a session has mounted is what its jobs get, by digest, whatever variables say: srun silently, sbatch and salloc with a line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.cluster import Result, poll
from support.publishing import Publisher, simple_image
from support.slurmcentre import MOUNT_POINT, Centre
from support.slurmsite import told

pytestmark = pytest.mark.usefixtures("node")

UENVCTL = str(Path(sys.executable).parent / "uenvctl")
NOTE = "uenv: inherited from this session: deploy::app/1.0:"


def in_session(
    centre: Centre, script: str, *arguments: str, image: str = "app/1.0", env: dict[str, str] | None = None
) -> Result:
    """Run a shell script in a session on the login side."""
    command = [UENVCTL, "run", "--socket", str(centre.login.socket_path), *arguments, image, "--"]
    return centre.cluster.run([*command, "bash", "-c", script], user=centre.user, env=env)


def test_srun_inherits_image_and_view_silently(centre: Centre) -> None:
    script = f"srun -Q -N2 -n2 bash -c 'say; echo $UENV_VIEW; tr : \"\\n\" <<<$PATH | grep -c ^{MOUNT_POINT}'"
    done = in_session(centre, script, "--view=default")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == sorted(["one", f"{MOUNT_POINT}:app:default", "1"] * 2)


def test_srun_inherits_also_that_no_view_was_wanted(centre: Centre) -> None:
    done = in_session(centre, f"srun -Q bash -c 'cat {MOUNT_POINT}/word; echo \" $WORD$UENV_VIEW\"'")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one \n", "")


def test_view_survives_export_none(centre: Centre) -> None:
    done = in_session(centre, f"srun -Q --export=NONE {MOUNT_POINT}/bin/say", "--view=default")
    assert (done.returncode, done.stdout) == (0, "one\n"), done.stderr


def test_sbatch_and_salloc_inherit_with_a_note(centre: Centre) -> None:
    out = centre.cluster.scratch / "session.out"
    script = f"sbatch --parsable -N2 -n2 -o {out} --wrap='say; srun say'; salloc -Q srun say"
    done = in_session(centre, script, "--view=default")
    assert done.returncode == 0, done.stderr
    job, said = done.stdout.splitlines()
    assert said == "one"
    lines = told(done)
    assert len(lines) == 2
    ends = "(none of it with --uenv=none)"
    assert [line for line in lines if not (line.startswith(NOTE) and line.endswith(ends))] == []
    assert "sha256" not in done.stderr
    assert centre.finish(int(job))[0] == "COMPLETED"
    assert out.read_text() == "one\n" * 3


def test_none_drops_and_another_replaces(centre: Centre) -> None:
    publisher = Publisher(centre.registry.url)
    publisher.push(centre.cluster.dir / "two.squashfs", "app/2.0", "v1")
    script = f"""
        srun -Q --uenv=none bash -c 'ls -A {MOUNT_POINT}; echo "${{UENV_LABEL:-nothing}}"'
        srun -Q --uenv=app/2.0 cat {MOUNT_POINT}/word; echo
        srun -Q --view=plain bash -c 'echo $PLAIN'
        SLURM_UENV=app/2.0 srun -Q cat {MOUNT_POINT}/word
    """
    done = in_session(centre, script, "--view=default")
    assert (done.returncode, done.stdout) == (0, "nothing\ntwo\nyes\ntwo"), done.stderr
    assert told(done) == ["uenv: a variable goes before what this session has mounted: app/2.0"]


def test_the_mount_is_believed_and_no_variable(centre: Centre) -> None:
    """The session of an image whose tag has moved; its variables are gone, or tell lies."""
    publisher = Publisher(centre.registry.url)
    first = publisher.remote.manifest("deploy/demo/zen3/app/1.0", "v1").digest
    lies = f"export UENV_MOUNT_LIST=/etc/passwd:/mnt UENV_DIGEST=sha256:{'0' * 64} UENV_LABEL=nope/9 UENV_VIEW=x:y:z"
    marker = centre.cluster.scratch / "moved"
    marker.unlink(missing_ok=True)
    script = f"""
        until [ -e {marker} ]; do sleep 0.02; done
        {lies}; srun -Q cat {MOUNT_POINT}/word; echo
        env -i PATH=$PATH SLURM_CONF=$SLURM_CONF srun -Q bash -c 'cat {MOUNT_POINT}/word; echo " $UENV_DIGEST"'
    """
    command = [
        UENVCTL,
        "run",
        "--socket",
        str(centre.login.socket_path),
        "app/1.0",
        "--",
        "bash",
        "-c",
        script,
    ]
    with centre.cluster.popen(command, user=centre.user) as session:
        try:
            assert poll(lambda: bool(centre.login.ask("status")["leases"]), 10)
            publisher.push(centre.cluster.dir / "two.squashfs", "app/1.0", "v3", "latest")
            marker.touch()
            said, errors = session.communicate(timeout=30)
        finally:
            publisher.retag("app/1.0", first, "latest")
    assert (session.returncode, said) == (0, f"one\none {first}\n"), errors


def test_session_of_a_file_of_ones_own(centre: Centre) -> None:
    own = simple_image(centre.user.home / "mine.squashfs", "mine", "mine")
    own.chmod(0o600)
    os.chown(own, centre.user.uid, centre.user.gid)
    done = in_session(centre, "srun -Q -N2 -n2 say", "--view=default", image=str(own))
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\nmine\n", "")


def test_session_inside_a_job(centre: Centre) -> None:
    """uenvctl in a batch job without an image: its sruns get the session's, and the job's other steps nothing."""
    script = f"""
        {UENVCTL} run --socket {centre.cluster.control_socket} --view=default app/1.0 -- srun -Q --overlap say
        srun -Q --overlap ls -A {MOUNT_POINT}
    """
    assert centre.batch(script) == ("COMPLETED", "one\n")


def test_srun_in_a_session_fails_clearly_without_uenvd(centre: Centre) -> None:
    marker, started = centre.cluster.scratch / "stopped", centre.cluster.scratch / "started"
    for flag in (marker, started):
        flag.unlink(missing_ok=True)
    script = f"touch {started}; until [ -e {marker} ]; do sleep 0.02; done; srun -Q echo ran; echo $?; srun -Q --uenv=none echo ran"
    command = [
        UENVCTL,
        "run",
        "--socket",
        str(centre.login.socket_path),
        "app/1.0",
        "--",
        "bash",
        "-c",
        script,
    ]
    with centre.cluster.popen(command, user=centre.user) as session:
        assert poll(started.exists, 10)
        centre.login.kill()
        try:
            marker.touch()
            said, errors = session.communicate(timeout=30)
        finally:
            centre.login.start()
    assert said == "1\nran\n", errors
    assert errors.startswith("uenv: uenvd is not running: ")
