"""Who may use which images: the site's rules, and one user's rights under them.

A rule names images and groups. Every rule that an image meets must be satisfied: a namespace for the members of one group may hold an image
for the members of another. What a user may not use he is not told of either, unless he names it himself.

Concurrency: groups are looked up in a thread (the system's database may be on the network) and remembered for `TTL_S`; the table is
replaced as a whole, without a checkpoint.
"""

from __future__ import annotations

import grp
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from uenvd.config import AccessRule
from uenvd.daemon.peer import Identity
from uenvd.errors import AccessDenied
from uenvd.label import Label

log = logging.getLogger(__name__)

TTL_S: Final = 60.0


@dataclass(frozen=True)
class Permit:
    """What one user may do. ``groups`` maps the names in the rules to group ids, as far as the node knows them."""

    owner: Identity
    rules: Sequence[AccessRule]
    groups: Mapping[str, int]

    def missing(self, images: Label) -> AccessRule | None:
        """Return the first rule that keeps the user from images of a repository (a label of all fields but tag and digest)."""
        if self.owner.uid == 0:
            return None
        mine = {self.owner.gid, *self.owner.groups}
        for rule in self.rules:
            if rule.images.matches(images) and not any(self.groups.get(name) in mine for name in rule.groups):
                return rule
        return None

    def allows(self, images: Label) -> bool:
        """Tell whether the user may use images of a repository."""
        return self.missing(images) is None

    def require(self, images: Label) -> None:
        """Raise `AccessDenied` unless the user may use images of a repository."""
        rule = self.missing(images)
        if rule is not None:
            raise AccessDenied(
                f"'{images._replace(tag=None, digest=None)}' is for members of {_either(rule.groups)} only",
                hint="ask the site's administrators for access; `id` shows your groups",
            )


class Access:
    """The rules of this daemon."""

    def __init__(self, rules: Sequence[AccessRule]) -> None:
        self.rules = tuple(rules)
        self._groups: dict[str, int] = {}
        self._looked_up_s = float("-inf")

    async def permit(self, owner: Identity) -> Permit:
        """Return what a user may do now."""
        if self.rules and trio.current_time() - self._looked_up_s > TTL_S:
            names = {name for rule in self.rules for name in rule.groups}
            found = await trio.to_thread.run_sync(look_up_groups, names)
            # A database that is away takes nobody's rights: what it said before is kept.
            self._groups = self._groups | found
            self._looked_up_s = trio.current_time()
            for name in sorted(names - self._groups.keys()):
                log.warning(
                    "access: this node knows no group %r; nobody but root gets what is for it only", name
                )
        return Permit(owner, self.rules, self._groups)


def look_up_groups(names: set[str]) -> dict[str, int]:
    """Return the ids of the groups that the system knows (blocking)."""
    found = {}
    for name in names:
        try:
            found[name] = grp.getgrnam(name).gr_gid
        except (KeyError, OSError):
            continue
    return found


def _either(names: Sequence[str]) -> str:
    return f"group {names[0]}" if len(names) == 1 else f"the groups {', '.join(names)}"
