"""A stand-in for Spack: a git repository whose ``bin/spack`` makes a store, as Stackinator's Makefiles ask for it. And stand-ins for stack-config."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path

_SPACK = r'''#!/usr/bin/python3
"""Makes packages out of nothing: a program that says its name, a compiler that is the machine's."""
import hashlib, os, re, sys
from pathlib import Path

STORE = Path(os.environ.get("STUB_STORE", "/user-environment"))
words = [word for word in sys.argv[1:] if not word.startswith("--color")]
env = None
while words and words[0] in ("-e", "-C"):
    if words[0] == "-e":
        env = Path(words[1])
    words = words[2:]


def specs():
    text = (env / "spack.yaml").read_text()
    block = text.partition("specs:")[2].partition("\n  view")[0]
    found = re.findall(r"^\s*- ([a-z][\w.-]*@?[\w.]*)", block, re.M)
    return found + (["squashfs"] if env.name == "bootstrap" and "squashfs" not in found else [])


def prefix(spec):
    name = re.match(r"[\w-]+", spec)[0]
    digest = hashlib.sha256(f"{env.name} {name}".encode()).hexdigest()[:7]
    return STORE / "linux-stub" / f"{name}-{digest}"


def install():
    for spec in specs():
        name, place = re.match(r"[\w-]+", spec)[0], prefix(spec)
        (place / "bin").mkdir(parents=True, exist_ok=True)
        program = place / "bin" / name
        if name == "squashfs":
            (place / "bin" / "mksquashfs").unlink(missing_ok=True)
            (place / "bin" / "mksquashfs").symlink_to("/usr/bin/mksquashfs")
        elif not program.exists():
            program.write_text(f"#!/bin/sh\necho {name} of the stub\n")
            program.chmod(0o755)
        (place / ".spack").mkdir(exist_ok=True)
    view = re.search(r"root: (\S+)", (env / "spack.yaml").read_text())
    if view:
        (Path(view[1]) / "bin").mkdir(parents=True, exist_ok=True)
        for spec in specs():
            for program in (prefix(spec) / "bin").iterdir():
                link = Path(view[1]) / "bin" / program.name
                if not link.is_symlink():
                    link.symlink_to(program)


command = words[0] if words else ""
if command == "--version":
    print("0.21.0")
elif command == "arch":
    print("linux-debian12-x86_64")
elif command == "concretize":
    (env / "spack.lock").write_text("{}")
elif command == "install":
    install()
elif command == "find":
    wanted = [word for word in words[1:] if not word.startswith("-") and "{" not in word]
    for spec in specs():
        if not wanted or any(re.match(r"[\w-]+", one)[0] == re.match(r"[\w-]+", spec)[0] for one in wanted):
            print(prefix(spec))
elif command == "env" and words[1] == "depfile":
    place = Path(words[words.index("-o") + 1])
    target = words[words.index("--make-target-prefix") + 1]
    place.write_text(f"{target}/env:\n\t$(SPACK) -e ./{place.parent} install\n\tmkdir -p {target}\n\ttouch {target}/env\n")
elif command == "env" and words[1] == "activate":
    env = Path(words[-1])
    view = re.search(r"root: (\S+)", (env / "spack.yaml").read_text())[1]
    print(f"export PATH={view}/bin:/usr/bin:/bin;")
    print("export SPACK_ENV=/somewhere;")
    print("alias despacktivate='spack env deactivate';")
elif command == "compiler":
    place = Path(os.environ["SPACK_USER_CONFIG_PATH"])
    place.mkdir(parents=True, exist_ok=True)
    (place / "compilers.yaml").write_text(
        "compilers:\n- compiler:\n    spec: gcc@12.3\n    paths: {cc: " + str(words[-1]) + "/gcc}\n"
    )
elif command == "external":
    place = Path(os.environ["SPACK_USER_CONFIG_PATH"])
    place.mkdir(parents=True, exist_ok=True)
    (place / "packages.yaml").write_text("packages: {}\n")
elif command == "config":
    place = Path(os.environ["SPACK_USER_CONFIG_PATH"])
    place.mkdir(parents=True, exist_ok=True)
    with (place / "config.yaml").open("a") as file:
        file.write("# " + words[-1] + "\n")
'''

_MAKEFILE = """\
store.squashfs:
\ttest -z "$$STUB_FAILS"
\t$(SANDBOX) mkdir -p {mount}/env/default/bin {mount}/meta
\t$(SANDBOX) printf '\\#!/bin/sh\\necho generation {version} %s\\n' "$(NJOBS)" > {mount}/env/default/bin/hello
\tchmod 755 {mount}/env/default/bin/hello
\ttest -z "$$(ls /tmp)"
\tcp env.json {mount}/meta/env.json
\tdate > {mount}/meta/configure.json
\ttouch $@

cache-force:
\techo pushed > @MIRROR@.pushed
"""
_ENV_JSON = """\
{{"name": "app", "mount": "{mount}", "modules": null, "views": {{"default": {{"root": "{mount}/env/default", "description": "", "env": {{"version": 1,
"values": {{"list": {{"PATH": [{{"op": "prepend", "value": ["{mount}/env/default/bin"]}}]}}, "scalar": {{}}}}}}}}}}}}
"""


def make_spack(directory: Path) -> str:
    """Make the git repository; return its URL."""
    (directory / "bin").mkdir(parents=True)
    (directory / "bin/spack").write_text(_SPACK)
    (directory / "bin/spack").chmod(0o755)
    # What Stackinator reads of a checkout of Spack.
    (directory / "etc/spack/defaults").mkdir(parents=True)
    (directory / "etc/spack/defaults/modules.yaml").write_text("modules:\n  default:\n    roots: {}\n")
    git = ["git", "-C", str(directory), "-c", "user.name=stub", "-c", "user.email=stub@example.org"]
    for words in (["init", "-q", "-b", "releases/v0.21"], ["add", "."], ["commit", "-q", "-m", "stub"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    return f"file://{directory}"


def make_system(directory: Path) -> Path:
    """Make a cluster's configuration."""
    directory.mkdir()
    (directory / "packages.yaml").write_text("packages:\n  gcc:\n    buildable: true\n")
    (directory / "compilers.yaml").write_text("compilers: []\n")
    (directory / "repos.yaml").write_text("repos: [site]\n")
    (directory / "site/packages/sitetool").mkdir(parents=True)
    (directory / "site/repo.yaml").write_text("repo:\n  namespace: site\n")
    (directory / "site/packages/sitetool/package.py").write_text("# nothing\n")
    return directory


def stand_in_stack_config(path: Path, version: str) -> Path:
    """Write a stack-config of another generation: it knows the options of that one only, and prepares a make that needs no Spack."""
    old = int(version.partition(".")[0]) < 6
    known = "--build --recipe --system --mount --no-bwrap " + ("--cache" if old else "--mirror")
    path.write_text(
        textwrap.dedent(f"""\
            #!/usr/bin/python3
            import sys
            from pathlib import Path
            if "--version" in sys.argv:
                sys.exit(print("stackinator version {version}"))
            unknown = [word for word in sys.argv[1:] if word.startswith("--") and word not in {known.split()!r}]
            if unknown:
                sys.exit(f"stack-config: error: unrecognized arguments: {{unknown}}")
            build = Path(sys.argv[sys.argv.index("--build") + 1])
            (build / "spack/bin").mkdir(parents=True, exist_ok=True)
            """)
        + "mirror = sys.argv[sys.argv.index('%s') + 1] if '%s' in sys.argv else 'none'\n"
        % (2 * ("--cache" if old else "--mirror",))
        + "mount = sys.argv[sys.argv.index('--mount') + 1]\n"
        + f"text = {_MAKEFILE.format(mount='@MOUNT@', version=version)!r}\n"
        + "(build / 'Makefile').write_text(text.replace('@MOUNT@', mount).replace('@MIRROR@', mirror))\n"
        + f"text = {_ENV_JSON.format(mount='@MOUNT@')!r}\n"
        + "(build / 'env.json').write_text(text.replace('@MOUNT@', mount))\n"
    )
    path.chmod(0o755)
    return path
