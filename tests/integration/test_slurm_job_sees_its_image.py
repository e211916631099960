"""What a job gets: its image at the mount point on every node, its view once, and nothing that it did not ask for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.cluster import poll
from support.slurmsite import DIGEST_1, DIGEST_2, DIGEST_TOOLS, Site, mount_namespace, told


def test_options_are_in_the_help_of_all_three_programs(site: Site) -> None:
    for program in ("srun", "sbatch", "salloc"):
        text = site.cluster.run([program, "--help"]).stdout
        assert re.search(r"--uenv=label\[,label...\]", text), program
        assert re.search(r"--view=view\[,view...\]", text), program


def test_without_the_option_nobody_is_asked(site: Site) -> None:
    done = site.srun("bash", "-c", f"ls -A {site.mount}; env")
    assert done.returncode == 0
    assert "UENV" not in done.stdout
    state, output = site.batch(f"srun ls -A {site.mount}; echo done")
    assert (state, output) == ("COMPLETED", "done\n")
    assert [request for daemon in site.daemons for request in daemon.requests()] == []


def test_image_is_seen_inside_and_not_outside(site: Site) -> None:
    script = (
        f"cat {site.mount}/hello; readlink /proc/self/ns/mnt; grep -c ' {site.mount} ' /proc/self/mountinfo"
    )
    done = site.srun("--uenv=app/1", "bash", "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    hello, namespace, mounts = done.stdout.splitlines()
    assert (hello, mounts) == ("hello from app-1", "1")
    assert namespace != mount_namespace()
    assert list(site.mount.iterdir()) == []
    assert site.leaks() == []


def test_while_the_step_runs_other_jobs_see_an_empty_directory(site: Site) -> None:
    held = site.cluster.popen(
        ["srun", "--uenv=app/1", "-w", "node1", "bash", "-c", "echo up; sleep 60"], user=site.user
    )
    assert held.stdout is not None
    assert held.stdout.readline() == "up\n"
    other = site.srun("-w", "node1", "ls", "-A", str(site.mount), user=site.other)
    assert (other.returncode, other.stdout) == (0, "")
    second = site.srun("--uenv=app/2", "-w", "node1", "cat", f"{site.mount}/hello", user=site.other)
    assert second.stdout == "hello from app-2\n"
    assert site.leaks() == []


def test_two_nodes_four_tasks(site: Site) -> None:
    done = site.srun(
        "-N2",
        "--ntasks-per-node=2",
        "--uenv=app/1",
        "--view=default",
        "bash",
        "-c",
        'echo "$(hostname) $(which-app)"',
    )
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["node1 app-1"] * 2 + ["node2 app-1"] * 2
    assert all(len(site.nodes[node].requests("mount")) == 1 for node in site.cluster.nodes)


def test_root_speaks_for_the_user_on_the_node_and_the_user_for_himself_before(site: Site) -> None:
    assert site.srun("--uenv=app/1", "--view=default", "true").returncode == 0
    (asked,) = site.login.requests("resolve")
    assert (asked["peer_uid"], asked["cwd"]) == (site.user.uid, str(site.cluster.scratch))
    (mounted,) = site.nodes["node1"].requests("mount")
    assert (mounted["peer_uid"], mounted["uid"]) == (0, site.user.uid)
    assert mounted["uenv"] == f"app/1@{DIGEST_1}:{site.mount}"
    assert mounted["job"]["step"] == 0


def test_view_is_applied_to_the_task_and_variables_describe_it(site: Site) -> None:
    done = site.srun(
        "--uenv=app/1", "--view=default", "env", "-0", env={"PATH": "/usr/bin:/bin", "TOOLCONFLICT": "1"}
    )
    environ = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    assert environ["PATH"] == f"{site.mount}/bin:/usr/bin:/bin"
    assert (environ["APP_HOME"], environ["APP_LIST"], environ["TOOLCONFLICT"]) == (
        str(site.mount),
        "a:b",
        "1",
    )
    assert environ["UENV_MOUNT_LIST"] == f"{DIGEST_1}:{site.mount}"
    assert environ["UENV_VIEW"] == f"{site.mount}:app:default"
    assert (environ["UENV_LABEL"], environ["UENV_DIGEST"]) == ("app/1", DIGEST_1)
    developed = site.srun("--uenv=app/1", "--view=develop", "env", env={"TOOLCONFLICT": "1"}).stdout
    assert "APP_DEVELOP=1\n" in developed
    assert "TOOLCONFLICT" not in developed.replace("SLURM_", "")


def test_several_images(site: Site) -> None:
    done = site.srun("--uenv=tools/1,app/1", "cat", f"{site.mount}/hello", f"{site.tools_mount}/hello")
    assert done.stdout == "hello from app-1\nhello from tools-1\n"


def test_explicit_mount_point(site: Site) -> None:
    done = site.srun(
        f"--uenv=app/1:{site.tools_mount}", "bash", "-c", f"cat {site.tools_mount}/hello; ls -A {site.mount}"
    )
    assert done.stdout == "hello from app-1\n"


def test_batch_script_and_its_sruns(site: Site) -> None:
    state, output = site.batch(
        f"cat {site.mount}/hello; which-app; echo $PATH; srun -n2 which-app; srun -N1 -n1 bash -c 'echo $PATH; echo $APP_LIST'",
        *("-N2", "--ntasks=2", "--uenv=app/1", "--view=default"),
    )
    lines = output.splitlines()
    assert state == "COMPLETED"
    assert lines[:2] == ["hello from app-1", "app-1"]
    assert lines[3:5] == ["app-1", "app-1"]
    assert lines[2] == lines[5], "the view was applied twice"
    assert lines[6:] == ["a:b"]


def test_options_as_directives_in_the_script(site: Site) -> None:
    state, output = site.batch("#SBATCH --uenv=app/1 --view=default\nwhich-app")
    assert (state, output) == ("COMPLETED", "app-1\n")


def test_a_job_keeps_its_image_when_the_tag_moves(site: Site) -> None:
    flag = site.cluster.scratch / "moved"
    flag.unlink(missing_ok=True)
    job = site.cluster.submit(
        f"#!/bin/bash\nuntil [ -e {flag} ]; do sleep 0.05; done\nsrun cat {site.mount}/hello\n",
        "--uenv=app/1",
        user=site.user,
    )
    site.update(tags={"app/1": DIGEST_2})
    flag.touch()
    assert site.cluster.wait_job(job).state == "COMPLETED"
    assert (site.cluster.scratch / f"slurm-{job}.out").read_text() == "hello from app-1\n"
    assert site.nodes["node1"].requests("resolve") == [], (
        "a nested srun reuses what was resolved at submission"
    )
    assert site.srun("--uenv=app/1", "cat", f"{site.mount}/hello").stdout == "hello from app-2\n"


def test_nested_srun_needs_no_daemon_that_answers_users(site: Site) -> None:
    site.nodes["node1"].update(
        fail={"resolve": {"code": "internal", "exit_status": 65, "message": "not today", "hint": ""}}
    )
    state, output = site.batch("srun which-app", "--uenv=app/1", "--view=default")
    assert (state, output) == ("COMPLETED", "app-1\n")


@pytest.mark.parametrize("export", ["NONE", "NIL", "HOME,LANG"])
def test_export_none_keeps_the_image(site: Site, export: str) -> None:
    state, output = site.batch(
        f"cat {site.mount}/hello; echo $APP_HOME; /usr/bin/srun /bin/cat {site.mount}/hello",
        *(f"--export={export}", "--uenv=app/1", "--view=default"),
    )
    assert (state, output) == ("COMPLETED", f"hello from app-1\n{site.mount}\nhello from app-1\n")


def test_salloc_command_and_its_srun(site: Site) -> None:
    done = site.cluster.run(
        [
            "salloc",
            "-Q",
            "--uenv=app/1",
            "--view=default",
            "bash",
            "-c",
            f"ls -A {site.mount}; srun which-app",
        ],
        user=site.user,
    )
    assert (done.returncode, done.stdout) == (0, "app-1\n")


def test_srun_below_srun_inherits(site: Site) -> None:
    done = site.srun("--uenv=app/1", "--view=default", "--overlap", "srun", "--overlap", "-Q", "which-app")
    assert (done.returncode, done.stdout) == (0, "app-1\n"), done.stderr


def test_srun_replaces_what_it_inherits(site: Site) -> None:
    script = f"""
        srun --uenv=app/2 bash -c 'cat {site.mount}/hello; echo "$UENV_VIEW"; srun --overlap -Q cat {site.mount}/hello'
        srun --uenv=app/1 bash -c 'cat {site.mount}/hello; echo "$UENV_VIEW"'
        srun --view=develop bash -c 'cat {site.mount}/hello; echo "$UENV_VIEW $APP_DEVELOP"'
    """
    state, output = site.batch(script, "--uenv=app/1", "--view=default")
    assert state == "COMPLETED"
    assert output.splitlines() == [
        *("hello from app-2", "", "hello from app-2"),
        *("hello from app-1", f"{site.mount}:app:default"),
        *("hello from app-1", f"{site.mount}:app:develop 1"),
    ]


def test_none_drops_what_it_inherits(site: Site) -> None:
    script = f"srun --uenv=none bash -c 'ls -A {site.mount}; env | grep ^UENV_; srun --overlap -Q ls -A {site.mount}'; echo end"
    state, output = site.batch(script, "--uenv=app/1")
    assert (state, output) == ("COMPLETED", "end\n")
    state, output = site.batch(f"ls -A {site.mount}; srun ls -A {site.mount}; echo end", "--uenv=none")
    assert (state, output) == ("COMPLETED", "end\n")
    assert len(site.requests("mount")) == 1


def test_scripts_own_changes_survive_a_nested_srun(site: Site) -> None:
    script = "export PATH=/mine:$PATH APP_HOME=/my/home; srun bash -c 'echo $PATH; echo $APP_HOME'"
    state, output = site.batch(script, "--uenv=app/1", "--view=default")
    path, home = output.splitlines()
    assert state == "COMPLETED"
    assert path.startswith(f"/mine:{site.mount}/bin:")
    assert home == "/my/home"


def test_lease_lives_as_long_as_the_step(site: Site) -> None:
    flag = site.cluster.scratch / "go"
    flag.unlink(missing_ok=True)
    script = f"echo up; until [ -e {flag} ]; do sleep 0.05; done"
    held = site.cluster.popen(
        ["srun", "-Q", "-w", "node1", "--uenv=app/1", "bash", "-c", script], user=site.user
    )
    assert held.stdout is not None
    assert held.stdout.readline() == "up\n"
    daemon = site.nodes["node1"]
    assert (len(daemon.requests("mount")), daemon.requests("end of lease")) == (1, [])
    flag.touch()
    held.communicate(timeout=10)
    assert poll(lambda: len(daemon.requests("end of lease")) == 1, 5)


def test_no_descriptor_of_the_plugin_reaches_the_task(site: Site) -> None:
    plain, given = (site.srun(*option, "ls", "/proc/self/fd").stdout for option in ([], ["--uenv=app/1"]))
    assert plain == given


def test_relative_path_goes_to_the_daemon_with_the_directory(site: Site) -> None:
    done = site.srun("--uenv=./x.squashfs", "true")
    assert done.returncode == 1
    (asked,) = site.login.requests("resolve")
    assert (asked["uenv"], asked["cwd"]) == ("./x.squashfs", str(site.cluster.scratch))
    assert told(done)[0] == "uenv: no image matches ./x.squashfs"


def test_an_executable_that_exists_only_in_the_image(site: Site) -> None:
    done = site.srun("--uenv=app/1", "-D", str(site.mount), f"{site.mount}/bin/which-app")
    assert (done.returncode, done.stdout) == (0, "app-1\n")
    assert not Path(f"{site.mount}/bin/which-app").exists()


def test_job_array(site: Site) -> None:
    job = site.cluster.submit(
        f"#!/bin/bash\ncat {site.mount}/hello\n", "--array=1-3", "--uenv=app/1", user=site.user
    )
    outputs = [site.cluster.scratch / f"slurm-{job}_{number}.out" for number in (1, 2, 3)]
    assert poll(lambda: site.cluster.jobs() == [] and all(path.exists() for path in outputs), 20)
    assert [path.read_text() for path in outputs] == ["hello from app-1\n"] * 3


def test_tools_view_of_one_image_among_several(site: Site) -> None:
    site.update(
        images={
            **site.login.state.images,
            DIGEST_TOOLS: {**site.login.state.images[DIGEST_TOOLS], "views": {"default": []}},
        }
    )
    done = site.srun(
        "--uenv=app/1,tools/1", "--view=default", "bash", "-c", 'echo "$UENV_VIEW"; echo "$UENV_DIGEST"'
    )
    assert done.stdout.splitlines() == [
        f"{site.tools_mount}:tools:default,{site.mount}:app:default"
        if str(site.tools_mount) < str(site.mount)
        else f"{site.mount}:app:default,{site.tools_mount}:tools:default",
        f"{DIGEST_1},{DIGEST_TOOLS}",
    ]


def test_srun_from_a_session_in_a_user_namespace(site: Site) -> None:
    command = [
        "unshare",
        "--user",
        "--map-current-user",
        "srun",
        "-Q",
        "--uenv=app/1",
        "--view=default",
        "which-app",
    ]
    done = site.cluster.run(command, user=site.user)
    assert (done.returncode, done.stdout) == (0, "app-1\n"), done.stderr
