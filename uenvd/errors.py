"""The one error tree.

A class states what went wrong in general: its ``code`` (stable, used on the wire), its ``exit_status`` (unique, what a
command line tool ends with) and a default ``hint`` (what the reader can do). An instance adds the particular message.
Foreign exceptions are mapped to this tree once, in the shell that meets them; anything else that escapes is a bug.

Exit statuses lie in 64..113: below are the shell's and the command's own, above are signals.
"""

from __future__ import annotations

from typing import ClassVar


class UenvError(Exception):
    """Root of the tree. ``str(error)`` is one or more lines for a human, without trailing newline."""

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 64
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint

    def __str__(self) -> str:
        return self.message


class InternalError(UenvError):
    """A fault of this program, not of its user or its peers."""

    code = "internal"
    exit_status = 65
    default_hint = "this is a bug in uenvd; its log has the details"


class UsageError(UenvError):
    """The command line or the request is malformed."""

    code = "usage"
    exit_status = 66


class LabelError(UsageError):
    """A label, description or view list does not follow the grammar; the message holds a caret."""

    code = "label-syntax"
    exit_status = 67
    default_hint = "a label is name/version:tag@system%uarch, for example prgenv-gnu/23.11:v1"


class UnknownLabel(UenvError):
    """No image in the registry matches the label."""

    code = "unknown-label"
    exit_status = 68
    default_hint = "list what there is with: uenvctl image find"


class AmbiguousLabel(UenvError):
    """More than one image matches; the message holds the table of candidates."""

    code = "ambiguous-label"
    exit_status = 69
    default_hint = "add the version, :tag or %uarch of the one you want"


class UnknownView(UenvError):
    """The image has no such view, or several of the images have one."""

    code = "unknown-view"
    exit_status = 70


class RegistryUnreachable(UenvError):
    """The registry does not answer, or not in time."""

    code = "registry-unreachable"
    exit_status = 71
    default_hint = "try again later; images that are already on this node can still be used by digest"
    retry_after_s: float | None = None
    """How long the registry asks to be left alone, where it says so."""


class RegistryDenied(UenvError):
    """The registry refuses the credentials, or asks for some."""

    code = "registry-denied"
    exit_status = 72
    default_hint = "check the credentials that uenvd uses for this registry"


class RegistryError(UenvError):
    """The registry answered, but with an error or with something that is not the protocol."""

    code = "registry-error"
    exit_status = 73


class NotFound(RegistryError):
    """The registry has no such repository, tag, manifest or blob."""

    code = "not-found"
    exit_status = 74


class DigestMismatch(UenvError):
    """Bytes do not have the digest that was asked for; they were thrown away."""

    code = "digest-mismatch"
    exit_status = 75
    default_hint = "the registry or something in between serves damaged data; nothing of it was used"


class FormatError(UenvError):
    """Bytes that are no valid squashfs image (or not one that can be served)."""

    code = "bad-image"
    exit_status = 76
    default_hint = "check the file with: unsquashfs -s FILE"


class ManifestError(UenvError):
    """A manifest or its metadata is malformed, or is not that of a uenv image."""

    code = "bad-manifest"
    exit_status = 77


class DaemonUnreachable(UenvError):
    """Nobody listens on the control socket, or the peer there is not uenvd."""

    code = "daemon-unreachable"
    exit_status = 78
    default_hint = "ask the site's administrators to start it: systemctl start uenvd"


class DaemonTimeout(UenvError):
    """uenvd listens but does not answer in time."""

    code = "daemon-timeout"
    exit_status = 79
    default_hint = "uenvd may be stopped or overloaded; try again or tell the site's administrators"


class ProtocolError(UenvError):
    """A frame on the control socket breaks the protocol."""

    code = "protocol"
    exit_status = 80
    default_hint = "uenvd and its client may be of different versions"


class MountPointError(UenvError):
    """The mount point is missing, is no directory or may not be used."""

    code = "mount-point"
    exit_status = 81


class MountConflict(UsageError):
    """Two images ask for one mount point, or one image is named twice."""

    code = "mount-conflict"
    exit_status = 82


class NoMetadata(UenvError):
    """The image does not say where it wants to be mounted and the user did not either."""

    code = "no-metadata"
    exit_status = 83
    default_hint = "name a mount point: LABEL:/user-environment"


class AccessDenied(UenvError):
    """The user may not use this image, file or request."""

    code = "access-denied"
    exit_status = 84


class WrongArchitecture(UenvError):
    """The image is for another processor architecture than this node's."""

    code = "wrong-architecture"
    exit_status = 85


class ConfigError(UenvError):
    """The configuration is wrong; the message names file, line and key."""

    code = "config"
    exit_status = 86


class StorageError(UenvError):
    """The cache directory cannot be read or written."""

    code = "storage"
    exit_status = 87


class StorageFull(StorageError):
    """No room left for the image."""

    code = "storage-full"
    exit_status = 88
    default_hint = "free space in the cache, or ask the site's administrators to"


class InUse(UenvError):
    """The image is in use and cannot be removed."""

    code = "in-use"
    exit_status = 89


class MountFailed(UenvError):
    """The kernel refused a mount or a namespace."""

    code = "mount-failed"
    exit_status = 90


class WorkerFailed(UenvError):
    """The process that serves the image ended before it served."""

    code = "worker-failed"
    exit_status = 91
    default_hint = "uenvd's log has the worker's last words"


class LimitExceeded(UenvError):
    """The user has too many connections, mounts or pulls."""

    code = "limit"
    exit_status = 92
    default_hint = "end some of your sessions, or ask for a higher limit"


class SessionError(UenvError):
    """The request does not fit the session (inside one already, or not inside one)."""

    code = "session"
    exit_status = 93


class Cancelled(UenvError):
    """Nobody waits for the operation any more, or uenvd stops."""

    code = "cancelled"
    exit_status = 94


class ResourceMissing(UenvError):
    """The machine lacks something that is needed: a program, /dev/fuse, user namespaces."""

    code = "resource-missing"
    exit_status = 95


class TestsFailed(UenvError):
    """Tests of an image failed, or none were run, or the test program did not come to its end."""

    __test__ = False  # for pytest, which takes every class of this name for tests
    code = "tests-failed"
    exit_status = 105
    default_hint = "the report and the output of the tests say what went wrong"


class ReportError(UenvError):
    """A report of tests is malformed or contradicts itself."""

    code = "bad-report"
    exit_status = 106
    default_hint = "reports are what ReFrame writes with --report-file"


class RecipeError(UenvError):
    """A recipe is wrong; the message names file, line and key."""

    code = "recipe"
    exit_status = 96
    default_hint = "docs/recipes.md describes recipes"


class BuildFailed(UenvError):
    """The image could not be built."""

    code = "build-failed"
    exit_status = 97


class AuditFailed(UenvError):
    """The image depends on the machine that built it, or on what its hosts may not have."""

    code = "audit-failed"
    exit_status = 98
    default_hint = "docs/recipes.md says what each finding means and what to do about it"


class LockError(UenvError):
    """A ``uenv.lock`` is missing, damaged, does not name what was asked for, or does not fit the registry any more."""

    code = "lock"
    exit_status = 111
    default_hint = "make it, or make it anew, with: uenvctl lock UENV"


class UnknownJob(UenvError):
    """This node knows of no step of the job that used an image, or of none that the asker may see."""

    code = "unknown-job"
    exit_status = 112


class DeployRefused(UenvError):
    """The image may not be deployed: its tests did not pass or were not run, or the tag is another image's."""

    code = "deploy-refused"
    exit_status = 110


class PlanFailed(UenvError):
    """Cells of a plan were not built, tested or deployed; the others were."""

    code = "plan-failed"
    exit_status = 104
    default_hint = "each failed job's log is named above; when its cause is mended, the same command does only what is missing"


class DispatchFailed(UenvError):
    """A job could not be submitted, followed or cancelled, or was lost: by Slurm, or by FirecREST."""

    code = "dispatch-failed"
    exit_status = 103


class SignatureRefused(UenvError):
    """The image is not signed, or not by a key that the site believes, and the site demands it."""

    code = "signature"
    exit_status = 113
    default_hint = "ask who published the image to sign it: uenvd-publish sign LABEL --key FILE"


class StatusNotPosted(UenvError):
    """The forge (GitHub, Gitea, Forgejo, GitLab) did not take the status of a commit."""

    code = "status-not-posted"
    exit_status = 107
    default_hint = "what was built and tested is not affected; the status can be posted again"


class TriggerRefused(UenvError):
    """Nothing was started: the comment's author may not, or the comment asks for what the allow-list does not allow."""

    code = "trigger-refused"
    exit_status = 108


def _tree(root: type[UenvError]) -> list[type[UenvError]]:
    found = [root]
    for child in root.__subclasses__():
        found.extend(_tree(child))
    return found


def by_code(code: str) -> type[UenvError]:
    """Return the class with this wire code; `UenvError` for a code of a newer peer."""
    return next((cls for cls in _tree(UenvError) if cls.code == code), UenvError)


def all_errors() -> list[type[UenvError]]:
    """Return every class of the tree, for tests and the reference page."""
    return _tree(UenvError)
