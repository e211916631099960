"""``uenvd-publish list`` and ``show``: what a system has, and all that is known of one image."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from uenvd.label import Label, parse_namespaced_label
from uenvd.oci.attach import attachments
from uenvd.oci.index import LATEST, Entry
from uenvd.oci.manifest import CREATED
from uenvd.oci.reference import split_repository
from uenvd.publish.comparison import performance_of
from uenvd.publish.console import say, show, show_json, show_table
from uenvd.publish.options import (
    DEPLOY,
    add_registry_options,
    add_site_options,
    need_system,
    open_registry,
    refuse,
    uarch_of,
)
from uenvd.publish.releases import describe, read_all
from uenvd.publish.source import add_label, find_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of both commands."""
    if parser.prog.endswith(" list"):
        parser.add_argument(
            "label",
            nargs="?",
            default="",
            metavar="LABEL",
            help="only what this may mean; the name is a prefix",
        )
        parser.add_argument("--namespace", default=DEPLOY, metavar="NS", help=f"default {DEPLOY}")
    else:
        add_label(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show; the table or JSON goes to stdout."""
    return _list(arguments) if arguments.command == "list" else _show(arguments)


def _list(arguments: argparse.Namespace) -> int:
    wanted = parse_namespaced_label(arguments.label) if arguments.label else Label()
    wanted = wanted._replace(uarch=wanted.uarch or uarch_of(arguments))
    if wanted.namespace not in {None, arguments.namespace}:
        refuse(
            arguments, ("namespace",), f"and the label, which is of {wanted.namespace!r}, say two namespaces"
        )
    namespace = wanted.namespace or arguments.namespace
    system = wanted.system or need_system(arguments)
    wanted = wanted._replace(namespace=None, system=None)
    with closing(open_registry(arguments)) as remote:
        index = read_all(remote, namespace, system, say)
    entries = [entry for _key, entry in sorted(index.entries.items()) if _matches(wanted, entry)]
    if arguments.json:
        show_json(
            {"namespace": namespace, "system": system, "images": [entry.to_json() for entry in entries]}
        )
    elif entries:
        show_table(
            ("uenv", "uarch", "digest", "MB", "date", "tests", "views"),
            [_row(entry) for entry in entries],
        )
    else:
        say(f"no image of {namespace}/{system} is called so")
    return 0


def _label(entry: Entry) -> Label:
    parts = split_repository(entry.repository)
    assert parts is not None  # `Entry` is made from one
    return Label(name=parts[3], version=parts[4], uarch=parts[2], system=parts[1], namespace=parts[0])


def _matches(wanted: Label, entry: Entry) -> bool:
    label = _label(entry)._replace(digest=entry.digest)
    return any(wanted.matches(label._replace(tag=tag), name_prefix=True) for tag in entry.tags or (None,))


def _row(entry: Entry) -> tuple[str, ...]:
    label = _label(entry)
    # The immutable tags first: they are what a job script should name.
    tags = ",".join(sorted(entry.tags, key=lambda tag: (tag == LATEST, tag)))
    tests = entry.verdict + (" (deprecated)" if entry.deprecated else "")
    views = "?" if entry.views is None else ",".join(name for name, _text in entry.views) or "-"
    return (
        f"{label.name}/{label.version}:{tags}",
        f"%{label.uarch}",
        entry.digest.removeprefix("sha256:")[:12],
        f"{entry.size_bytes / 1e6:.1f}",
        (entry.date or "-")[:10],
        tests,
        views,
    )


def _show(arguments: argparse.Namespace) -> int:
    with closing(open_registry(arguments)) as remote:
        source = find_image(arguments, remote)
        tags = [
            tag
            for tag in remote.tags(source.repository)
            if remote.resolve(source.repository, tag) == source.digest
        ]
        entry = describe(remote, source.repository, source.digest, tags)
        found = attachments(remote, source.repository, source.digest)
        compared = performance_of(remote, source.repository, source.digest)
    attached: list[dict[str, Any]] = [
        {
            "type": manifest.artifact_type or manifest.config.media_type,
            "digest": manifest.digest,
            "created": manifest.annotations.get(CREATED),
        }
        for manifest in found
    ]
    if arguments.json:
        show_json(
            entry.to_json()
            | {
                "repository": entry.repository,
                "attachments": attached,
                "performance": compared.to_json() if compared else None,
            }
        )
        return 0
    label = _label(entry)
    show(f"image        {label.name}/{label.version}@{label.system}%{label.uarch} in {label.namespace}/")
    show(f"digest       {entry.digest}")
    show(f"tags         {', '.join(entry.tags) or '-'}")
    show(f"squashfs     {entry.layer_digest} ({entry.size_bytes / 1e6:.1f} MB)")
    show(f"built        {entry.date or '-'}")
    show(f"mount point  {entry.mount or 'not known'}")
    show(f"tests        {entry.verdict}{f': {entry.remark}' if entry.remark else ''}")
    for line in compared.lines() if compared is not None else ():
        show(f"performance  {line}")
    if entry.deprecated:
        show(f"deprecated   {entry.deprecated}")
    for name, text in entry.views or ():
        default = " (default)" if name == entry.default_view else ""
        show(f"view         {name}{default}{f': {text}' if text else ''}")
    for one in attached:
        show(f"attached     {one['type']}  {(one['created'] or '-')[:19]}  {one['digest']}")
    return 0
