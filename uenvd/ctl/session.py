"""A session: the images in a mount namespace of the command's own, and the views in its environment.

For an ordinary user the mount namespace belongs to a user namespace of his; nothing here needs privilege. The order is fixed: workers for
files start in the outer namespaces; then this process (which must be single-threaded) leaves them; then it mounts, attaches, and becomes
the command. Whatever fails ends the process, and with it the namespace and the workers: there is nothing to undo.

What is mounted is the truth about a session, never a variable: `mounted_images` reads /proc/self/mountinfo.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from uenvd import mounts
from uenvd.ctl.client import Client
from uenvd.ctl.output import Progress, mention_files, note
from uenvd.ctl.overlay import attach_copies, ssh_includes
from uenvd.ctl.own import as_file, name_of
from uenvd.errors import (
    LabelError,
    MountConflict,
    MountFailed,
    MountPointError,
    NoMetadata,
    ProtocolError,
    ResourceMissing,
    SessionError,
    UenvError,
    UnknownView,
)
from uenvd.label import Description, Label, ViewName, parse_descriptions, parse_views
from uenvd.views import (
    EnvOp,
    ImageMeta,
    applied_key,
    applied_views,
    apply_ops,
    clean_mount,
    ops_from_wire,
    select_views,
    view_ops,
    with_restore,
)

if TYPE_CHECKING:
    from uenvd.ctl.files import Worker

SOURCE_PREFIX = "uenvd:"
NO_VIEW = "none"
"""As ``--view``: no view at all, no default one either."""
IDMAP_S = 1.0
"""How long a session of files only waits for the daemon to map the user's groups; it works without."""


class Mounted(NamedTuple):
    """An image that is mounted in this namespace; ``source`` is a digest or the path of a file."""

    source: str
    mount: str


class Part(NamedTuple):
    """One image of a session, ready to be attached. ``source`` is its digest, or the path of a file."""

    mount_fd: int
    mount: str
    label: str
    name: str
    source: str
    digest: str | None
    identity: str
    """What stands for its bytes in the key of applied views."""


class Plan(NamedTuple):
    """What the user asked for."""

    descriptions: tuple[Description, ...]
    views: tuple[ViewName, ...]
    use_default: bool = True
    """Whether the default view of an image of which no view is named is applied."""

    @classmethod
    def parse(cls, uenv: str, views: str | None) -> Plan:
        """Parse the command line's texts. Raises `LabelError`, `MountPointError`, `MountConflict`."""
        descriptions = tuple(as_file(one, os.environ) for one in parse_descriptions(uenv))
        for one in descriptions:
            if one.mount is not None and clean_mount(one.mount) is None:
                raise MountPointError(
                    f"{one.mount} cannot be a mount point",
                    hint="a mount point is an absolute path without '..'",
                )
            if one.label is not None and one.label.name is None and one.label.digest is None:
                raise LabelError(f"'{one}' names no environment")
        mention_files(descriptions)
        files = [os.path.realpath(one.path) for one in descriptions if one.path is not None]
        for path in files:
            if files.count(path) > 1:
                raise MountConflict(f"{path} is named twice", hint="name it once")
        if views is not None and views.strip() == NO_VIEW:
            return cls(descriptions, (), use_default=False)
        return cls(descriptions, parse_views(views) if views is not None else ())

    @property
    def files(self) -> list[Description]:
        """The images that are files of the user's own."""
        return [one for one in self.descriptions if one.path is not None]

    @property
    def labels(self) -> list[Description]:
        """The images that come through the daemon."""
        return [one for one in self.descriptions if one.label is not None]


# --- what is mounted ----------------------------------------------------------------------------------------------------------------


def parse_mountinfo(text: str, uid: int) -> list[Mounted]:
    """Return the images in a text of the form of /proc/self/mountinfo (proc(5)), topmost ones only, in its order.

    Only mounts of root's and of the user ``uid``'s own count: any user may have fusermount3 make a FUSE mount with whatever source he likes,
    which others then see in their tables (fs/fuse/inode.c: fuse_show_options tells whose it is, ``user_id``).
    """
    trusted = {"user_id=0", f"user_id={uid}"}
    found: dict[str, str] = {}
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        before, after = head.split(" "), tail.split(" ")
        if len(before) < 5 or len(after) < 2:
            continue
        mount, source = _unescaped(before[4]), _unescaped(after[1])
        found.pop(mount, None)
        options = after[2].split(",") if len(after) > 2 else ()
        if (
            after[0].startswith("fuse")
            and source.startswith(SOURCE_PREFIX)
            and not trusted.isdisjoint(options)
        ):
            found[mount] = source.removeprefix(SOURCE_PREFIX)
    return [Mounted(source, mount) for mount, source in found.items()]


def _unescaped(field: str) -> str:
    head, *rest = field.split("\\")
    return head + "".join(
        chr(int(piece[:3], 8)) + piece[3:] if piece[:3].isdigit() and len(piece) >= 3 else "\\" + piece
        for piece in rest
    )


def mounted_images() -> list[Mounted]:
    """Return the images that are mounted in this process's namespace."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123 - pathlib is slow to import
        return parse_mountinfo(file.read(), os.getuid())


def refuse_inside_session(command: str) -> None:
    """Raise `SessionError` inside a session."""
    inside = mounted_images()
    if inside:
        what = ", ".join(f"{one.source} at {one.mount}" for one in inside)
        way_out = (
            "in a job: srun --uenv=LABEL, which replaces the environment"
            if "SLURM_JOB_ID" in os.environ
            else "leave it first: exit"
        )
        raise SessionError(f"cannot {command} inside a session: mounted already is {what}", hint=way_out)


# --- the namespace ------------------------------------------------------------------------------------------------------------------


def enter_namespace(client: Client | None) -> None:
    """Leave for a new mount namespace (and, but for root, a new user namespace) whose mounts nobody else sees.

    The daemon, if there is a connection to it, maps the user's groups; else only uid and primary gid are mapped. Raises `ResourceMissing`,
    `MountFailed`.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0 or not _unshared(mounts.CLONE_NEWNS):
        try:
            mounts.unshare(mounts.CLONE_NEWUSER | mounts.CLONE_NEWNS)
        except OSError as error:
            raise ResourceMissing(
                f"cannot make a user namespace: {error.strerror}",
                hint="the site's administrators can allow them: sysctl user.max_user_namespaces (and, where it exists, "
                "kernel.unprivileged_userns_clone=1)",
            ) from error
        if not _mapped_by_daemon(client):
            try:
                mounts.map_self(uid, gid)
            except MountFailed:
                if (os.geteuid(), os.getegid()) != (uid, gid):  # else a slow daemon has done it meanwhile
                    raise
    try:
        mounts.make_rslave("/")
    except OSError as error:
        raise MountFailed(f"cannot make the mounts of this session private: {error.strerror}") from error


def _unshared(flags: int) -> bool:
    try:
        mounts.unshare(flags)
    except PermissionError:  # a container's root without CAP_SYS_ADMIN
        return False
    return True


def _mapped_by_daemon(client: Client | None) -> bool:
    if client is None:
        return False
    try:
        client.call("idmap", answer_s=IDMAP_S)
    except UenvError:
        return False
    return True


def attach(parts: Iterable[Part]) -> None:
    """Attach the images, outer mount points first. Raises `MountConflict`, `MountPointError`, `MountFailed`."""
    ordered = sorted(parts, key=lambda part: part.mount.split("/"))
    for first, second in itertools.pairwise(ordered):
        if first.mount == second.mount:
            raise MountConflict(
                f"{first.label} and {second.label} both want to be mounted at {first.mount}",
                hint="give one of them another mount point: LABEL:/path",
            )
    for part in ordered:
        try:
            target = os.path.realpath(part.mount)
            if not stat.S_ISDIR(os.stat(target).st_mode):  # noqa: PTH116 - pathlib is slow to import
                raise NotADirectoryError(errno.ENOTDIR, "it is no directory")
            mounts.move_mount(part.mount_fd, target)
        except OSError as error:
            raise _attach_error(part, error) from error
        finally:
            os.close(part.mount_fd)


def _attach_error(part: Part, error: OSError) -> UenvError:
    message = f"cannot mount {part.label} at {part.mount}"
    if error.errno == errno.ENOENT:
        return MountPointError(
            f"{message}: there is no such directory",
            hint=f"ask the site's administrators to make it (mkdir {part.mount}), or use a directory of your own: {part.label}:/path",
        )
    if error.errno in (errno.ENOTDIR, errno.EACCES, errno.ELOOP):
        return MountPointError(
            f"{message}: {error.strerror}", hint=f"use another directory: {part.label}:/path"
        )
    return MountFailed(f"{message}: {error.strerror}")


# --- the images ---------------------------------------------------------------------------------------------------------------------


def build(
    plan: Plan,
    socket_path: str,
    environ: Mapping[str, str],
    *,
    refresh: bool = False,
    copies: Mapping[str, bytes] | None = None,
) -> tuple[dict[str, str], Client | None]:
    """Make the session: enter the namespace, attach the images.

    ``copies`` are files (path, content) that the session sees in place of the machine's, besides those of `overlay`.
    Returns the environment for the command, and the connection that is the lease (``None`` without images of the daemon).
    """
    workers = _start_workers(len(plan.files))
    client = Client(socket_path) if plan.labels else _courtesy(socket_path)
    changed = {**ssh_includes(), **(copies or {})} if os.geteuid() != 0 else copies or {}
    enter_namespace(client)
    attach_copies(changed)
    parts, metas = _serve_files(plan.files, workers)
    ops: list[EnvOp] = []
    keys: list[str] = []
    mine, theirs = _split_views(plan, metas)
    if parts:
        selected = select_views(metas, mine, use_default=plan.use_default)
        ops += view_ops(selected)
        keys.append(applied_key([part.identity for part in parts], selected))
    if plan.labels and client is not None:
        _refuse_shared_views(client, plan, mine)
        added, remote_ops, key = _from_daemon(client, plan, theirs, refresh=refresh)
        parts += added
        ops += remote_ops
        keys.append(key)
    elif client is not None:
        client.close()
        client = None
    attach(parts)
    return session_environment(environ, parts, with_restore(ops), ";".join(keys)), client


def _start_workers(count: int) -> list[Worker]:
    """Start a worker for each file, in the namespaces that are about to be left."""
    if not count:
        return []
    from uenvd.ctl.files import Worker  # a session of labels needs nothing of it

    return [Worker() for _ in range(count)]


def _serve_files(
    files: Sequence[Description], workers: Sequence[Worker]
) -> tuple[list[Part], list[tuple[Label | None, ImageMeta | None]]]:
    """Mount the files in the present user namespace. Returns them and their metadata. Raises `NoMetadata` and what `Worker.serve` raises."""
    parts: list[Part] = []
    metas: list[tuple[Label | None, ImageMeta | None]] = []
    for worker, one in zip(workers, files, strict=True):
        path = os.path.realpath(one.path or "")
        mount_fd, meta, notes = worker.serve(path, str(one.path))
        worker.close()
        for text in notes:
            note(text)
        mount = clean_mount(one.mount) or (meta.mount if meta is not None else None)
        if mount is None:
            raise NoMetadata(
                f"{one.path} does not say where it wants to be mounted",
                hint=f"name a mount point: {one.path}:/user-environment",
            )
        name = meta.name if meta is not None else path.rpartition("/")[2]
        parts.append(
            Part(mount_fd, mount, name_of(str(one.path), os.environ), name, path, None, _identity(path))
        )
        metas.append((None, meta))
    return parts, metas


def _courtesy(socket_path: str) -> Client | None:
    """Connect to a daemon that a session of files can do without."""
    try:
        return Client(socket_path, connect_s=IDMAP_S)
    except UenvError:
        return None


def _identity(path: str) -> str:
    """Return what tells this state of a file from another, for the key of applied views."""
    status = os.stat(path)  # noqa: PTH116 - pathlib is slow to import
    return f"{path}@{status.st_size:x}.{status.st_mtime_ns:x}"


def _split_views(
    plan: Plan, metas: Sequence[tuple[Label | None, ImageMeta | None]]
) -> tuple[list[ViewName], list[ViewName]]:
    """Tell the views of the files from those that the daemon has to find; all are the files' when there is no label."""
    if not plan.labels:
        return list(plan.views), []
    mine: list[ViewName] = []
    theirs: list[ViewName] = []
    labels = {one.label.name for one in plan.labels if one.label is not None}
    for wanted in plan.views:
        try:
            select_views(metas, [wanted], use_default=False)
        except UnknownView:
            found = False
        else:
            found = True
        (mine if found and wanted.uenv not in labels else theirs).append(wanted)
    return mine, theirs


def _refuse_shared_views(client: Client, plan: Plan, mine: Sequence[ViewName]) -> None:
    """Raise `UnknownView` if a view that was found in a file, and is not said to be its, is also one of a label's image."""
    unsaid = {one.view for one in mine if one.uenv is None}
    if not unsaid:
        return
    images = client.call("resolve", uenv=",".join(map(str, plan.labels))).frame.get("images")
    for image in images if isinstance(images, list) else ():
        views = image.get("views") if isinstance(image, dict) else None
        shared = unsaid.intersection(view for view in views or () if isinstance(view, str))
        if shared:
            raise UnknownView(
                f"the view '{min(shared)}' is ambiguous: a file and {image.get('label')} have one",
                hint="say which one you mean: --view=uenv:view",
            )


def _from_daemon(
    client: Client, plan: Plan, views: Sequence[ViewName], *, refresh: bool
) -> tuple[list[Part], list[EnvOp], str]:
    """Ask the daemon for the mounts of the labels and wait until they can be used."""
    reply = client.call(
        "mount",
        uenv=",".join(map(str, plan.labels)),
        view=",".join(map(str, views)) or (None if plan.use_default else NO_VIEW),
        refresh=refresh or None,
    )
    frame = reply.frame
    try:
        parts = _parts(frame, reply.descriptors)
    except (ValueError, TypeError, KeyError) as error:
        for descriptor in reply.descriptors:
            os.close(descriptor)
        raise ProtocolError(f"uenvd's answer to 'mount' is malformed: {error}") from error
    _notes(frame)
    if frame.get("state") == "waiting":
        with Progress() as progress:
            frame = client.call("wait", answer_s=5.0, lease=frame.get("lease"), on_event=progress).frame
        _notes(frame)
    try:
        applied = frame["applied"]
        if not isinstance(applied, str):
            raise TypeError("'applied' is no string")
        return parts, ops_from_wire(frame["env"]), applied
    except (ValueError, TypeError, KeyError) as error:
        raise ProtocolError(f"uenvd's environment is malformed: {error}") from error


def _parts(frame: Mapping[str, Any], descriptors: Sequence[int]) -> list[Part]:
    raw_mounts = frame["mounts"]
    if not isinstance(raw_mounts, list) or len(raw_mounts) != len(descriptors):
        raise ValueError("as many descriptors as mounts are needed")
    parts = []
    for raw, descriptor in zip(raw_mounts, descriptors, strict=True):
        mount, label, digest = raw["mount"], raw["label"], raw["digest"]
        if clean_mount(mount) != mount or not isinstance(label, str) or not isinstance(digest, str | None):
            raise ValueError("a mount has no proper mount point, label or digest")
        source = digest or label
        parts.append(Part(descriptor, mount, label, label.partition("/")[0], source, digest, source))
    return parts


def _notes(frame: Mapping[str, Any]) -> None:
    notes = frame.get("notes")
    for text in notes if isinstance(notes, list) else ():
        note(str(text))


# --- the environment and the command ------------------------------------------------------------------------------------------------


def session_environment(
    environ: Mapping[str, str], parts: Sequence[Part], ops: Iterable[EnvOp], applied: str
) -> dict[str, str]:
    """Return the command's environment: the views applied, and the variables by which scripts recognise a session.

    ``UENV_MOUNT_LIST`` is ``source:mount,…``, ``UENV_VIEW`` is ``mount:uenv:view,…``, ``UENV_LABEL`` and ``UENV_DIGEST`` are comma
    lists in the same order (a file has no digest: an empty place).
    """
    result = dict(environ)
    for name, value in apply_ops(ops, applied, environ).items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = value
    by_identity = {part.identity: part for part in parts}
    result["UENV_MOUNT_LIST"] = ",".join(f"{part.source}:{part.mount}" for part in parts)
    result["UENV_LABEL"] = ",".join(part.label for part in parts)
    result["UENV_DIGEST"] = ",".join(part.digest or "" for part in parts)
    result["UENV_VIEW"] = ",".join(
        f"{by_identity[identity].mount}:{by_identity[identity].name}:{view}"
        for identity, views in applied_views(applied)
        if identity in by_identity
        for view in views
    )
    return result
