"""``uenvd-publish build DIR LABEL``: a scientist's own recipe becomes an image that only he can use, until he decides otherwise.

By default nothing leaves the user's account: the image goes into an OCI image layout below ``$XDG_DATA_HOME`` that only he reads, and gets a
file name that is its label (`uenvd.own`). Where the site has a namespace for each user in its registry, it goes there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Final

from uenvd.errors import AuditFailed, LabelError, NotFound, StorageError, UnknownLabel, UsageError
from uenvd.label import Label
from uenvd.oci.files import storage_errors, write_atomically
from uenvd.oci.index import LATEST
from uenvd.oci.manifest import squashfs_layer
from uenvd.oci.reference import parse_registry, repository_of
from uenvd.oci.remote import Remote, open_remote
from uenvd.own import (
    FACTS_SUFFIX,
    NAMESPACE,
    SUFFIX,
    Facts,
    image_path,
    images_directory,
    store_directory,
)
from uenvd.publish.build import Site, build, builder_of, identity
from uenvd.publish.build.audit import summary
from uenvd.publish.build.inputs import default_cache
from uenvd.publish.built import publish_built
from uenvd.publish.console import reporter, say, show, show_json
from uenvd.publish.elsewhere import run_elsewhere
from uenvd.publish.explain import against_image
from uenvd.publish.options import (
    BUILD,
    DEPLOY,
    REGISTRY_OPTIONS,
    need_system,
    need_uarch,
    open_registry,
    parse_site_label,
    refuse,
    system_of,
    uarch_of,
)
from uenvd.publish.pipeline.identity import tag_of
from uenvd.publish.pipeline.stages import find_digest, passed_before
from uenvd.publish.push import Target, check_tag
from uenvd.publish.recipe import Recipe, load_recipe
from uenvd.publish.releases import refresh_repository
from uenvd.publish.test import clean, tell
from uenvd.publish.testing import Wishes, examine, pull_back, require_pass
from uenvd.publish.twice import require_same

USER_NAMESPACE_VARIABLE: Final = "UENVD_USER_NAMESPACE"
"""A site's namespace for each user in its registry, with ``%u`` for the user's name: ``user-%u``. Unset: images stay in the user's account."""
LAYOUT: Final = "oci"
BUILDS: Final = "builds"
ANY_SYSTEM: Final = "local"
"""System in the local layout, where the user names none: it is his machine, whatever its name."""


@dataclass(frozen=True)
class Place:
    """Where a user's image goes."""

    open: Callable[[], Remote]
    """Opens the registry, or the user's own store."""
    repository: str
    label: Label
    """With all parts that the repository has, and the tag, if one was said."""
    images: Path | None
    """Directory of image files; None in a registry."""

    @cached_property
    def remote(self) -> Remote:
        """The registry or store, opened when it is first asked for; who asks closes it."""
        return self.open()

    @property
    def name(self) -> str:
        """The label by which the image is asked for."""
        label = self.label._replace(system=None, uarch=None)
        return str(label if self.images is not None else self.label)


def user_name() -> str:
    """Return the user's name as the kernel and the user database know it. Raises `UsageError` for a user that has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError as error:
        raise UsageError(f"the user {os.getuid()} has no name here") from error


def user_namespace(pattern: str, user: str) -> str:
    """Return a user's namespace. Raises `UsageError` for a pattern that would be the same for two users."""
    if pattern.count("%u") != 1:
        raise UsageError(
            f"${USER_NAMESPACE_VARIABLE} is {pattern!r}, which does not hold %u", hint="for example user-%u"
        )
    return pattern.replace("%u", user)


def asked(arguments: argparse.Namespace, *, make: bool = True) -> tuple[Recipe, Place]:
    """Return the recipe that the options name, and where its image goes; ``make`` says whether the directories are made.

    Raises `UsageError`, `LabelError`, `RecipeError`, `StorageError`.
    """
    environ = os.environ
    label = _with_namespace(parse_site_label(arguments, arguments.label), environ)
    if label.namespace == NAMESPACE and arguments.against is None:
        refuse(
            arguments,
            REGISTRY_OPTIONS,
            f"is for a registry, and {label._replace(system=None, uarch=None)} stays in your account",
            hint=f"a namespace of the registry in LABEL: user::{label.name}/...; or later: uenvd-publish copy",
        )
    recipe = load_recipe(arguments.recipe, version=label.version)
    return recipe, place_of(arguments, label, recipe, environ, make=make)


def _with_namespace(label: Label, environ: Mapping[str, str]) -> Label:
    """Return a label with the namespace that it is given if it says none: the user's in the registry, where the site has such, else his own."""
    if label.namespace is not None:
        return label
    pattern = environ.get(USER_NAMESPACE_VARIABLE, "")
    return label._replace(namespace=user_namespace(pattern, user_name()) if pattern else NAMESPACE)


def place_of(
    arguments: argparse.Namespace, label: Label, recipe: Recipe, environ: Mapping[str, str], *, make: bool
) -> Place:
    """Return where the image of a label with a namespace goes. Raises `UsageError`, `LabelError`, `StorageError`."""
    if label.digest is not None or label.system == "*":
        raise UsageError(
            f"{arguments.label!r} is no label to build under", hint="name/version, or name/version:tag"
        )
    if label.name != recipe.name:
        raise UsageError(
            f"the recipe's name is {recipe.name!r}, not {label.name!r}",
            hint=f"say {recipe.name}/{recipe.version}",
        )
    label = label._replace(version=recipe.version)
    if label.tag is not None:
        check_tag(label.tag)
    if label.namespace in {BUILD, DEPLOY}:
        raise UsageError(
            f"{label.namespace!r} is for everybody: what is there goes through the site's pipeline",
            hint=f"leave it out; the image is yours then, and is called {NAMESPACE}::{label.name}/{label.version}",
        )
    if label.namespace != NAMESPACE:
        return _in_registry(arguments, label)
    return _in_account(arguments, label, environ, make=make)


def _in_registry(arguments: argparse.Namespace, label: Label) -> Place:
    label = label._replace(
        system=label.system or need_system(arguments), uarch=label.uarch or need_uarch(arguments)
    )
    return Place(partial(open_registry, arguments), _repository(label), label, None)


def _in_account(
    arguments: argparse.Namespace, label: Label, environ: Mapping[str, str], *, make: bool
) -> Place:
    label = label._replace(
        namespace=NAMESPACE,
        system=label.system or system_of(arguments) or ANY_SYSTEM,
        uarch=label.uarch or uarch_of(arguments) or platform.machine(),
    )
    store = own_store(environ) if make else _store(environ)
    address = parse_registry(f"oci-layout:{store / LAYOUT}")
    return Place(partial(open_remote, address), _repository(label), label, Path(images_directory(environ)))


def _repository(label: Label) -> str:
    return repository_of(
        label.namespace or "", label.system or "", label.uarch or "", label.name or "", label.version or ""
    )


def own_store(environ: Mapping[str, str]) -> Path:
    """Return the user's own store, which is made readable by nobody else. Raises `UsageError`, `StorageError`."""
    store = _store(environ)
    with storage_errors(store, "make"):
        made = not store.exists()
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        if made:
            store.chmod(0o700)  # whatever the umask takes away
        status = store.stat()
    if status.st_uid != os.getuid():
        raise StorageError(f"{store} belongs to another user", hint="name another directory: XDG_DATA_HOME")
    if status.st_mode & 0o077:
        say(f"note: others may look into {store}; to keep them out: chmod go= {store}")
    return store


def _store(environ: Mapping[str, str]) -> Path:
    name = store_directory(environ)
    if not name:
        raise UsageError("neither $XDG_DATA_HOME nor $HOME says where your own images are to be")
    return Path(name)


def reasons(recipe: Recipe, place: Place, site: Site) -> list[str]:
    """Return why a build would make an image, a line for each reason; none if the one that is there would be taken. Raises the remote's errors."""
    with closing(place.remote) as remote:
        if find_digest(remote, place.repository, content_tag(recipe, place.label)) is not None:
            return []
        digest = find_digest(remote, place.repository, place.label.tag or LATEST)
        if digest is None:
            return [f"there is no image {place.name} yet"]
        found = against_image(recipe, remote, place.repository, digest, site=site)
    return found or [f"nothing says that {place.name} was built from this recipe"]


@contextmanager
def own_image(
    arguments: argparse.Namespace, text: str, environ: Mapping[str, str]
) -> Iterator[tuple[Remote, str, str]]:
    """Open the store in which an image of the user's own is; yield it, the repository and the digest. Raises `LabelError`, `UnknownLabel`."""
    label = parse_site_label(arguments, text)
    if label.name is None or label.version is None:
        raise LabelError(f"'{text}' names no image", hint=f"{NAMESPACE}::NAME/VERSION, or with :TAG")
    place = _in_account(arguments, label, environ, make=False)
    with closing(place.remote) as remote:
        digest = label.digest or find_digest(remote, place.repository, label.tag or LATEST)
        if digest is None:
            raise UnknownLabel(
                f"there is no image {place.name} of your own",
                hint=f"list them: uenvctl image ls {NAMESPACE}::",
            )
        yield remote, place.repository, digest


def run(arguments: argparse.Namespace, site: Site) -> int:
    """Build, publish in private, test, and name the image; its label and digest go to stdout."""
    recipe, place = asked(arguments)
    environ = os.environ
    with closing(place.remote):
        tag = content_tag(recipe, place.label)
        anew = arguments.again or arguments.check
        digest = None if anew else find_digest(place.remote, place.repository, tag)
        if digest is not None:
            say(f"{recipe.label} was built from the same recipe already (--again builds it anew)")
        else:
            digest = _build(arguments, site, recipe, place, tag, environ)
        if arguments.elsewhere:
            _use_elsewhere(place, digest, recipe, environ)
        remark = passed_before(place.remote, place.repository, digest)
        if arguments.no_tests:
            remark = None
        elif remark is None:
            remark = _test(place, digest, environ)
        _name(place, digest, remark)
    say(_how_to_use(place))
    if arguments.json:
        show_json(
            {
                "label": place.name,
                "digest": digest,
                "registry": str(place.remote.address),
                "repository": place.repository,
                "file": None if place.images is None else str(_file(place)),
                "tests": remark,
            }
        )
    else:
        show(f"{place.name} {digest}")
    return 0


def content_tag(recipe: Recipe, label: Label) -> str:
    """Return the tag of what a recipe becomes for a machine: equal for equal inputs."""
    builder = builder_of(recipe)
    machine = "" if builder.pins_machine(recipe) else f"{label.system}/{label.uarch}"
    return tag_of(recipe.fingerprint(), identity(builder), recipe.mount, {}, machine)


def _build(
    arguments: argparse.Namespace,
    site: Site,
    recipe: Recipe,
    place: Place,
    tag: str,
    environ: Mapping[str, str],
) -> str:
    """Build and publish under the content tag; return the digest. After a failure the log stays."""
    out = own_store(environ) / BUILDS / f"{recipe.name}-{recipe.version}"
    cache = arguments.cache or default_cache()
    anew = arguments.again or arguments.check
    say(f"building {recipe.label} ({recipe.format})")
    built = build(recipe, out, cache=cache, say=_tell, again=arguments.again, site=site)
    if built.findings:
        say(f"the audit found {built.findings} dependencies on its host, which are noted with the image")
    if arguments.check:
        require_same(recipe, built, cache=cache, tell=_tell, site=site)
    done = publish_built(
        place.remote,
        place.repository,
        built,
        [] if anew else [tag],
        hashing=reporter("hashing"),
        pushing=reporter("storing"),
    )
    if anew:
        # Built anew from the same inputs it can be another image: then this is the one from now on.
        _retag(place, done.digest, tag)
    for note in done.notes:
        say(f"note: {note}")
    shutil.rmtree(out, ignore_errors=True)
    return done.digest


def _tell(text: str) -> None:
    say(f"  {text}")


def _use_elsewhere(place: Place, digest: str, recipe: Recipe, environ: Mapping[str, str]) -> None:
    """Use the image as another user, where nothing of this machine is. Raises `AuditFailed` and what `run_elsewhere` raises."""
    with ExitStack() as stack:
        if place.images is not None:
            image = _blob(place, digest)
        else:
            base = own_store(environ) / BUILDS
            base.mkdir(exist_ok=True)
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=base))
            manifest = place.remote.manifest(place.repository, digest)
            image = pull_back(place.remote, place.repository, manifest, Path(directory), reporter("reading"))
        findings = run_elsewhere(image, recipe.mount)
    if findings:
        raise AuditFailed(f"the image does not work elsewhere:\n{summary(findings)}")
    say("its smoke tests pass elsewhere, too")


def _test(place: Place, digest: str, environ: Mapping[str, str]) -> str:
    """Test the image; return how many tests passed. Raises `TestsFailed`."""
    base = own_store(environ) / BUILDS
    base.mkdir(exist_ok=True)
    workdir = Path(tempfile.mkdtemp(prefix="test-", dir=base)).resolve()
    passing = False
    try:
        wishes = Wishes(workdir, through="file")
        tested = examine(
            place.remote, Target(place.repository, digest), wishes, say=say, progress=reporter("reading")
        )
        tell(tested)
        passing = tested.passing
    finally:
        clean(workdir, keep=not passing)
    require_pass(tested)
    return str(tested.verdict)


def _name(place: Place, digest: str, remark: str | None) -> None:
    """Give the image its label; only now anybody finds it by that. A private label may move: sessions and jobs hold digests, or open files."""
    for tag in dict.fromkeys((place.label.tag or LATEST, LATEST)):
        _retag(place, digest, tag)
    if place.images is None:
        refresh_repository(place.remote, place.repository, say, fresh=[digest])
        return
    blob = _blob(place, digest)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    facts = Facts(
        digest,
        place.label.system,
        place.label.uarch,
        now,
        "passed" if remark is not None else "untested",
        remark,
    )
    for file in dict.fromkeys((_file(place), _file(replace(place, label=place.label._replace(tag=None))))):
        with storage_errors(file, "make"):
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_name(f".{file.name}.{os.getpid()}")
            new.unlink(missing_ok=True)
            try:
                os.link(blob, new)
            except OSError:  # a file system without hard links
                shutil.copyfile(blob, new)
            new.rename(file)
            # A rename between two names of one file does nothing, and leaves both.
            new.unlink(missing_ok=True)
            text = json.dumps(facts._asdict(), indent=1) + "\n"
            write_atomically(
                file.with_name(file.name.removesuffix(SUFFIX) + FACTS_SUFFIX), text.encode(), durable=False
            )


def _blob(place: Place, digest: str) -> Path:
    """Return the squashfs file of an image in the account's layout."""
    layer = squashfs_layer(place.remote.manifest(place.repository, digest)).digest
    return Path(place.remote.address.path) / "blobs/sha256" / layer.removeprefix("sha256:")


def _retag(place: Place, digest: str, tag: str) -> None:
    manifest = place.remote.manifest(place.repository, digest)
    try:
        if place.remote.resolve(place.repository, tag) == digest:
            return
    except NotFound:
        pass
    place.remote.push_manifest(place.repository, tag, manifest.raw, manifest.media_type)


def _file(place: Place) -> Path:
    path = image_path(str(place.images), place.label)
    assert path is not None
    return Path(path)


def _how_to_use(place: Place) -> str:
    lines = [f"it is yours: {place.name}", f"  uenvctl start {place.name}", f"  srun --uenv={place.name} ..."]
    if place.images is not None:
        lines.append(f"  its file: {_file(place)}")
    return "\n".join(lines)
