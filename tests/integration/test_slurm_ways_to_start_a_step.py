"""Every way in which people start steps gives the same environment: nothing is lost on the way, nothing is there that was not asked for."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from support.cluster import poll
from support.slurmsite import DIGEST_1, DIGEST_2, DIGEST_TOOLS, Site, told


def _on_terminal(site: Site, command: list[str], typed: str, *, timeout_s: float = 30.0) -> tuple[int, str]:
    """Run a command on a terminal of its own, type into it; return its status and everything that it showed."""
    leader, follower = pty.openpty()
    try:
        process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            cwd=site.cluster.scratch,
            env=site.cluster.environ(site.user, {"TERM": "dumb", "PS1": "$ "}),
            user=site.user.uid,
            group=site.user.gid,
            extra_groups=site.user.groups,
        )
        os.close(follower)
        os.write(leader, typed.encode())
        os.set_blocking(leader, False)
        shown = b""

        def ended() -> bool:
            nonlocal shown
            try:
                while data := os.read(leader, 65536):
                    shown += data
            except BlockingIOError:
                pass
            except OSError:  # EIO: the last holder of the terminal is gone
                return process.poll() is not None
            return process.poll() is not None

        if not poll(ended, timeout_s):
            process.kill()
        return process.wait(), shown.decode(errors="replace").replace("\r\n", "\n")
    finally:
        os.close(leader)


def test_several_programs_in_one_step(site: Site) -> None:
    programs = site.cluster.scratch / "programs.conf"
    programs.write_text(f"0 cat {site.mount}/hello\n1-2 which-app\n")
    done = site.srun("-n3", "--uenv=app/1", "--view=default", "--multi-prog", str(programs))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["app-1", "app-1", "hello from app-1"]


def test_program_that_is_broadcast(site: Site) -> None:
    program = site.cluster.scratch / "broadcast.sh"
    program.write_text(f"#!/bin/sh\ncat {site.mount}/hello\n")
    program.chmod(0o755)
    target = site.cluster.scratch / "broadcast.copy"
    done = site.srun("-N1", "--uenv=app/1", f"--bcast={target}", str(program))
    assert (done.returncode, done.stdout) == (0, "hello from app-1\n"), done.stderr
    target.unlink(missing_ok=True)


def test_interactive_terminal(site: Site) -> None:
    command = ["srun", "-Q", "--pty", "--uenv=app/1", "--view=default", "bash", "--norc", "-i"]
    status, shown = _on_terminal(site, command, "which-app; echo $UENV_LABEL; tty; exit 7\n")
    assert status == 7, shown
    assert "\napp-1\napp/1\n/dev/pts/" in shown


def test_interactive_step_of_salloc(site: Site) -> None:
    command = ["salloc", "-Q", "--uenv=app/1", "--view=default"]
    typed = f"cat {site.mount}/hello; srun -Q --overlap which-app; echo on $SLURMD_NODENAME; exit\n"
    status, shown = _on_terminal(site, command, typed)
    assert status == 0, shown
    assert "hello from app-1\n" in shown
    assert "\napp-1\n" in shown
    assert re.search(r"\non node[12]\n", shown)


def test_sattach_sees_the_output_and_changes_nothing(site: Site) -> None:
    flag = site.cluster.scratch / "attached"
    flag.unlink(missing_ok=True)
    script = f"until [ -e {flag} ]; do sleep 0.02; done; srun which-app"
    script = f"srun bash -c 'echo up; until [ -e {flag} ]; do sleep 0.02; done; which-app'; {script}"
    job = site.cluster.submit(f"#!/bin/bash\n{script}\n", "--uenv=app/1", "--view=default", user=site.user)
    output = site.cluster.scratch / f"slurm-{job}.out"
    assert poll(lambda: output.exists() and "up" in output.read_text(), 10)
    attached = site.cluster.popen(["sattach", f"{job}.0"], user=site.user)
    assert poll(lambda: attached.poll() is None and len(site.nodes["node1"].requests("mount")) == 2, 5)
    flag.touch()
    said, _errors = attached.communicate(timeout=10)
    assert site.cluster.wait_job(job).state == "COMPLETED"
    assert output.read_text() == "up\napp-1\napp-1\n"
    assert said in ("app-1\n", "up\napp-1\n", "")  # how much of it an attacher gets is Slurm's affair


def test_functions_and_odd_variables_survive(site: Site) -> None:
    environ = {"BASH_FUNC_greet%%": "() { echo greeted; }", "not-posix.name": "kept", "EMPTY": ""}
    script = "greet; env | grep -e ^not-posix -e ^EMPTY="
    for arguments in (["--uenv=app/1", "--view=default"], ["--uenv=app/1", "--view=develop"]):
        done = site.srun(*arguments, "bash", "-c", script, env=environ)
        assert sorted(done.stdout.splitlines()) == ["EMPTY=", "greeted", "not-posix.name=kept"], done.stderr


def test_scalars_with_a_common_prefix_are_told_apart(site: Site) -> None:
    environ = {"TOOLCONFLICT": "1", "TOOLCONFLICTS": "2"}
    done = site.srun("--uenv=app/1", "--view=develop", "bash", "-c", "env | grep ^TOOLC", env=environ)
    assert done.stdout == "TOOLCONFLICTS=2\n"


@pytest.mark.parametrize("kind", ["srun", "sbatch"])
def test_variables_alone_mean_nothing(site: Site, kind: str) -> None:
    """UENV_MOUNT_LIST of a session that is not there, or that somebody made up: no image, and no word."""
    environ = {
        "UENV_MOUNT_LIST": f"{DIGEST_1}:{site.mount}",
        "UENV_VIEW": f"{site.mount}:app:default",
        "UENV_LABEL": "app/1",
    }
    if kind == "srun":
        done = site.srun("ls", "-A", str(site.mount), env=environ)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    else:
        assert site.batch(f"ls -A {site.mount}; echo end", env=environ) == ("COMPLETED", "end\n")
    assert site.requests("resolve") == []


def test_default_view_and_opting_out_of_it(site: Site) -> None:
    images = site.login.state.images
    site.update(images={**images, DIGEST_1: {**images[DIGEST_1], "default_view": "default"}})
    script = 'echo "$APP_HOME $UENV_VIEW"'
    applied = f"{site.mount} {site.mount}:app:default\n"
    assert site.srun("--uenv=app/1", "bash", "-c", script).stdout == applied
    assert site.srun("--uenv=app/1", "--view=none", "bash", "-c", script).stdout == " \n"
    nested = f"{script}; srun bash -c '{script}'; srun --view=default bash -c '{script}'"
    assert site.batch(nested, "--uenv=app/1") == ("COMPLETED", applied * 3)
    state, output = site.batch(nested, "--uenv=app/1", "--view=none")
    assert (state, output) == ("COMPLETED", f" \n \n{applied}")
    assert site.batch(f"srun --view=none bash -c '{script}'", "--uenv=app/2", "--view=none")[1] == " \n"


def test_many_images_have_no_fixed_limit(site: Site) -> None:
    """Fourteen images: their list is longer than the 1024 bytes at which other tools break."""
    base = site.cluster.dir / "many"
    base.mkdir(exist_ok=True)
    count = 14
    image = site.login.state.images[DIGEST_TOOLS]
    digests = [f"sha256:{number:064x}" for number in range(count)]
    for number in range(count):
        (base / f"place{number}").mkdir(exist_ok=True)
    site.update(
        tags={f"tool{number}/1": digest for number, digest in enumerate(digests)},
        images={digest: {**image, "mount": str(base / f"place{n}")} for n, digest in enumerate(digests)},
    )
    labels = ",".join(f"tool{number}/1" for number in range(count))
    script = f'cat {base}/*/hello | sort | uniq -c; echo "${{#UENV_MOUNT_LIST}}"; srun --overlap -Q cat {base}/*/hello'
    done = site.srun("--overlap", f"--uenv={labels}", "bash", "-c", script)
    first, length, *nested = done.stdout.splitlines()
    assert first.split() == [str(count), "hello", "from", "tools-1"], done.stderr
    assert int(length) > 1024
    assert nested == ["hello from tools-1"] * count


def test_an_image_inside_another(site: Site) -> None:
    inner = site.cluster.dir / "images" / "app-1" / "bin"
    images = site.login.state.images
    site.update(images={**images, DIGEST_TOOLS: {**images[DIGEST_TOOLS], "mount": f"{site.mount}/bin"}})
    for order in ("app/1,tools/1", "tools/1,app/1"):
        done = site.srun(f"--uenv={order}", "cat", f"{site.mount}/hello", f"{site.mount}/bin/hello")
        assert done.stdout == "hello from app-1\nhello from tools-1\n", done.stderr
    assert (inner / "which-app").exists()


def test_note_is_shown_once(site: Site) -> None:
    site.update(notes=["app/1 is deprecated: use app/2"])
    done = site.srun("-N2", "-n4", "--uenv=app/1", "true")
    assert (done.returncode, told(done)) == (0, ["uenv: app/1 is deprecated: use app/2"])
    submitted = site.cluster.sbatch("#!/bin/bash\nsrun true\n", "--uenv=app/1", user=site.user)
    assert submitted.stderr == "uenv: app/1 is deprecated: use app/2\n"
    job = int(submitted.stdout)
    assert site.cluster.wait_job(job).state == "COMPLETED"
    assert (site.cluster.scratch / f"slurm-{job}.out").read_text() == ""


def test_each_task_of_an_array_has_the_image_of_the_submission(site: Site) -> None:
    job = site.cluster.submit(
        f"#!/bin/bash\nsrun cat {site.mount}/hello\n", "--array=1-2", "--hold", "--uenv=app/1", user=site.user
    )
    site.update(tags={"app/1": DIGEST_2})
    site.cluster.run(["scontrol", "release", str(job)])
    outputs = [site.cluster.scratch / f"slurm-{job}_{number}.out" for number in (1, 2)]
    assert poll(lambda: site.cluster.jobs() == [] and all(path.exists() for path in outputs), 20)
    assert [path.read_text() for path in outputs] == ["hello from app-1\n"] * 2


def test_srun_in_srun_in_a_batch_job_keeps_one_of_everything(site: Site) -> None:
    """Each of the levels applies the view; none adds a second entry or resets what the level above has changed."""
    inner = 'export PATH=/inner:$PATH; srun --overlap -Q bash -c "echo \\$PATH; echo \\$APP_LIST"'
    script = f"export PATH=/outer:$PATH APP_LIST=mine:$APP_LIST; srun --overlap bash -c {shlex.quote(inner)}"
    state, output = site.batch(script, "--uenv=app/1", "--view=default")
    path, app_list = output.splitlines()
    assert state == "COMPLETED"
    assert path.split(":")[:3] == ["/inner", "/outer", f"{site.mount}/bin"]
    assert path.split(":").count(f"{site.mount}/bin") == 1
    assert app_list == "mine:a:b"


def test_sbatch_and_salloc_in_a_job_inherit_with_a_note(site: Site) -> None:
    note = "uenv: inherited from this job: app/1:"
    script = f"""
        inner=$(sbatch --parsable --wrap='cat {site.mount}/hello' -o {site.cluster.scratch}/inner.out)
        echo $inner
        sbatch --parsable --uenv=app/2 --wrap='cat {site.mount}/hello' -o {site.cluster.scratch}/other.out
        printf '#!/bin/bash\n#SBATCH --uenv=app/2\ncat {site.mount}/hello\n' |
            sbatch --parsable -o {site.cluster.scratch}/directive.out
        sbatch --parsable --uenv=none --wrap='ls -A {site.mount}' -o {site.cluster.scratch}/none.out
    """
    state, output = site.batch(script, "--uenv=app/1")
    said, *jobs = output.splitlines()
    assert state == "COMPLETED"
    assert said.startswith(note)
    assert said.endswith(" (none of it with --uenv=none)")
    for job in jobs:
        assert site.cluster.wait_job(int(job)).state == "COMPLETED"
    names = ("inner", "other", "directive", "none")
    results = [Path(site.cluster.scratch / f"{name}.out").read_text() for name in names]
    assert results == ["hello from app-1\n", "hello from app-2\n", "hello from app-2\n", ""]
    inner = [
        "env",
        "-u",
        "SLURM_JOB_ID",
        "-u",
        "SLURM_JOBID",
        "salloc",
        "-Q",
        "srun",
        "cat",
        f"{site.mount}/hello",
    ]
    done = site.cluster.run(["salloc", "-Q", "--uenv=app/1", *inner], user=site.user)
    assert done.stdout == "hello from app-1\n"
    assert note in done.stderr
