"""Make the pictures of docs/guide.md: what a scientist types at a terminal and what really comes, drawn as SVG into docs/images.

Run it as root after a change of what uenvctl or the plugin say: ``.venv/bin/python scripts/terminal_pictures.py``. It starts a Slurm cluster,
a uenvd for the login node and one for each compute node, and an ordinary user's shell at a pseudo-terminal, and types. Everything is private and
gone at the end. Names of the machine, the user and temporary directories are replaced by those of a story; nothing else is touched.
"""

from __future__ import annotations

import contextlib
import html
import json
import random
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "tests"))

from support.cluster import Cluster, missing, running_cluster  # noqa: E402
from support.daemon import running_daemon  # noqa: E402
from support.publishing import Publisher, env_json, make_squashfs  # noqa: E402
from support.slurmsite import built_plugin  # noqa: E402
from support.terminal import Terminal, terminal  # noqa: E402
from support.users import TestUser, ordinary_user  # noqa: E402

IMAGES = CHECKOUT / "docs" / "images"
PROGRAMS = Path(sys.prefix).resolve() / "bin"
MOUNT = "/user-environment"
COLUMNS = 104
PROMPT = "ada@login1:~$ "
BASHRC = f"PS1='{PROMPT}'\nbind 'set enable-bracketed-paste off'\nunset PROMPT_COMMAND HISTFILE\n"

FONT_PX, WIDTH_PX, LINE_PX, MARGIN_PX = 14, 8.43, 19, 16
COLOURS = {"31": "#ff7b72", "32": "#7ee787", "33": "#e3b341", "34": "#79c0ff", "36": "#76e3ea"}
TEXT, DIM, TYPED, BACKGROUND = "#d8dee4", "#8b949e", "#ffffff", "#161b22"


@dataclass(frozen=True)
class Scene:
    """One picture: its file's name, its title, what is typed."""

    name: str
    title: str
    commands: Sequence[str]


SCENES = (
    Scene(
        "find",
        "What there is",
        ("uenvctl image find solver", "uenvctl image inspect solver/2.1"),
    ),
    Scene(
        "start",
        "A session",
        ("uenvctl start --view=default solver/2.1", "solver", "uenvctl status", "exit", "solver"),
    ),
    Scene(
        "job",
        "A job",
        (
            "srun -N2 --uenv=solver/2.1 --view=default solver",
            "cat job.sh",
            "sbatch --wait --uenv=solver/2.1 --view=default job.sh",
            "cat job.out",
        ),
    ),
    Scene(
        "mistakes",
        "Mistakes are told before anything starts",
        (
            "srun --uenv=solver/9 solver",
            "srun --uenv=solver/2.1 --view=defualt solver",
            "uenvctl run solver/2.1@@x true",
            "uenvctl start --view=default solver/2.1",
            "uenvctl start solver/2.0",
            "exit",
        ),
    ),
)
JOB = f"#!/bin/bash -l\n#SBATCH -n2 -o job.out\nsrun solver\nls {MOUNT}\n"


def publish(directory: Path, registry: str) -> None:
    """Put the story's images into a registry."""
    publisher = Publisher(registry)
    views = {
        "default": {"list": {"PATH": [{"op": "prepend", "value": [f"{MOUNT}/bin"]}]}, "scalar": {}},
        "develop": {"list": {}, "scalar": {"SOLVER_DEBUG": "1"}},
    }
    meta = json.loads(env_json("solver", views=views))
    meta["description"] = "a solver of large sparse systems"
    meta["views"]["default"]["description"] = "the programs in PATH"
    meta["views"]["develop"]["description"] = "checks of everything, slow"
    for version in ("2.0", "2.1"):
        program = f'#!/bin/sh\necho "solver {version} on $(cat /proc/sys/kernel/hostname)"\n'
        image = make_squashfs(
            directory / f"solver-{version}.squashfs",
            {"bin/solver": program, "share/matrix": random.Random(version).randbytes(24 << 20)},
            meta=json.dumps(meta).encode(),
        )
        publisher.push(image, f"solver/{version}", "v1", "latest")


@contextlib.contextmanager
def site() -> Iterator[tuple[Cluster, TestUser]]:
    """Start everything."""
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(running_cluster(nodes=2, namespaces=True, shared=True))
        user = stack.enter_context(ordinary_user(cluster.dir))
        plugin = cluster.dir / "uenvd_spank.so"
        plugin.write_bytes(built_plugin().read_bytes())
        plugin.chmod(0o755)
        cluster.set_plugstack(f"required {plugin} socket={cluster.control_dir / 'control'}")
        registry = f"oci-layout:{cluster.dir / 'registry'}"
        publish(cluster.dir, registry)
        places = {
            "login": cluster.control_dir,
            **{node: cluster.node_control_dir(node) for node in cluster.nodes},
        }
        for name, directory in places.items():
            stack.enter_context(
                running_daemon(cluster.dir / f"uenvd-{name}", registry, control=directory / "control")
            )
        yield cluster, user


def play(scene: Scene, cluster: Cluster, user: TestUser) -> str:
    """Type the scene's commands, each when the prompt is there; return what was on the terminal."""
    for name, text in ((".bashrc", BASHRC), ("job.sh", JOB)):
        (user.home / name).write_text(text)
    environ = {
        **cluster.environ(user),
        "PATH": f"{PROGRAMS}:/usr/local/bin:/usr/bin:/bin",
        "UENVD_SOCKET": str(cluster.control_dir / "control"),
        "TERM": "xterm",
        "SLURM_CPUS_PER_TASK": "1",
    }
    become = ["setpriv", "--reuid", str(user.uid), "--regid", str(user.gid), "--clear-groups"]
    with terminal([*become, "bash", "-i"], environ, user.home, columns=COLUMNS) as shell:
        _ready(shell)
        for command in scene.commands:
            shell.type(command)
            _ready(shell)
        text = shell.raw
        shell.type("exit")
        shell.finish()
    replaced = {
        str(user.home): "/home/ada",
        user.name: "ada",
        str(cluster.dir / "registry"): "/srv/registry",
        str(cluster.dir): "/srv",
        f"on {socket.gethostname()}": "on login1",
    }
    for old, new in replaced.items():
        text = text.replace(old, new)
    return text.rpartition(PROMPT)[0].replace("\r", "")


def _ready(shell: Terminal) -> None:
    shell.expect(re.escape(PROMPT) + r"\Z", 60.0)


# --- drawing ------------------------------------------------------------------------------------------------------------------------------


def draw(title: str, text: str) -> str:
    """Return an SVG of a terminal with this text; of its control sequences colours and bold are drawn, the others dropped."""
    text = re.sub(r"\x1b\][^\x07]*\x07|\x1b\[[0-9;?]*[A-Za-ln-z]|\x1b[=>]", "", text)
    lines = [piece for line in text.rstrip("\n").split("\n") for piece in _folded(line)]
    width = round(COLUMNS * WIDTH_PX + 2 * MARGIN_PX)
    height = len(lines) * LINE_PX + 3 * MARGIN_PX + 10
    rows = "".join(
        f'<text x="{MARGIN_PX}" y="{MARGIN_PX * 2 + 16 + (number + 1) * LINE_PX - 5}">{_spans(line)}</text>\n'
        for number, line in enumerate(lines)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">\n'
        f"<title>{html.escape(title)}</title>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="{BACKGROUND}"/>\n'
        f'<g fill="{DIM}"><circle cx="20" cy="18" r="5"/><circle cx="38" cy="18" r="5"/><circle cx="56" cy="18" r="5"/></g>\n'
        f'<g font-family="ui-monospace, \'DejaVu Sans Mono\', Menlo, Consolas, monospace" font-size="{FONT_PX}" fill="{TEXT}" xml:space="preserve">\n'
        f"{rows}</g>\n</svg>\n"
    )


def _folded(line: str) -> list[str]:
    """Split a line where the terminal would; colours are not carried over (what is coloured stands at the beginning of lines)."""
    pieces, seen = [""], 0
    for item in re.findall(r"\x1b\[[0-9;]*m|.", line):
        if len(item) == 1 and seen and seen % COLUMNS == 0:
            pieces.append("")
        pieces[-1] += item
        seen += len(item) == 1
    return pieces


def _spans(line: str) -> str:
    prompt = re.match(rf"(?:\[[^]]+\] )?{re.escape(PROMPT)}", line)
    if prompt:
        typed = line[prompt.end() :]
        return (
            f'<tspan fill="{DIM}">{html.escape(prompt[0])}</tspan>'
            f'<tspan fill="{TYPED}" font-weight="bold">{html.escape(typed)}</tspan>'
        )
    parts = []
    style = ""
    for piece in re.split(r"(\x1b\[[0-9;]*m)", line):
        if piece.startswith("\x1b"):
            codes = piece[2:-1].split(";")
            style = "".join(f' fill="{COLOURS[code]}"' for code in codes if code in COLOURS)
            style += ' font-weight="bold"' if "1" in codes else ""
        elif piece:
            parts.append(f"<tspan{style}>{html.escape(piece)}</tspan>" if style else html.escape(piece))
    return "".join(parts)


def main() -> int:
    """Draw all pictures, or those that are named on the command line."""
    reason = missing()
    if reason:
        print(f"terminal_pictures: {reason}", file=sys.stderr)
        return 1
    IMAGES.mkdir(exist_ok=True)
    wanted = sys.argv[1:] or [scene.name for scene in SCENES]
    with site() as (cluster, user):
        for scene in SCENES:
            if scene.name in wanted:
                text = play(scene, cluster, user)
                (IMAGES / f"{scene.name}.svg").write_text(draw(scene.title, text))
                print(f"--- {scene.name}\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
