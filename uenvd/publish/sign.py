"""``uenvd-publish sign``, ``verify`` and ``keygen``: signatures of images."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from uenvd.errors import UsageError
from uenvd.oci.index import LATEST
from uenvd.oci.signatures import KEY_SUFFIX, make_keys, read_keys, read_private_key, sign, verify
from uenvd.publish.console import say, show
from uenvd.publish.options import add_registry_options, add_site_options, open_registry
from uenvd.publish.source import add_label, find_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command that the parser is for."""
    if parser.prog.endswith(" keygen"):
        parser.add_argument(
            "path", type=Path, metavar="FILE", help=f"the private key; the public one is FILE{KEY_SUFFIX}"
        )
        return
    add_label(parser)
    if parser.prog.endswith(" sign"):
        parser.add_argument(
            "--key", required=True, type=Path, metavar="FILE", help="private key, of mode 0600"
        )
        parser.add_argument(
            "--tag",
            action="append",
            default=[],
            metavar="TAG",
            help="the signature holds under this tag only, beside latest and the digest; may be repeated; default: under every tag",
        )
    else:
        parser.add_argument(
            "--keys",
            required=True,
            type=Path,
            metavar="DIR",
            help=f"directory of public keys (*{KEY_SUFFIX})",
        )
    add_site_options(parser)
    add_registry_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make keys, sign or verify; the key's id, the attachment's digest or the key's name goes to stdout."""
    if arguments.command == "keygen":
        public = arguments.path.with_name(arguments.path.name + KEY_SUFFIX)
        show(make_keys(arguments.path, public))
        say(
            f"the private key is {arguments.path}: keep it; {public} is for uenvd's signatures.keys and for policies"
        )
        return 0
    if arguments.command == "sign":
        key = read_private_key(arguments.key)
        with closing(open_registry(arguments)) as remote:
            source = find_image(arguments, remote)
            attached = sign(remote, source.repository, source.digest, key, arguments.tag)
        under = f" for the tag {', '.join(arguments.tag)}" if arguments.tag else ""
        say(f"signed {source.repository}@{source.digest}{under}")
        show(attached)
        return 0
    keys = read_keys(arguments.keys)
    if not keys:
        raise UsageError(f"there is no key (*{KEY_SUFFIX}) in {arguments.keys}")
    with closing(open_registry(arguments)) as remote:
        source = find_image(arguments, remote)
        tag = None if source.tag == LATEST else source.tag
        good = verify(remote, source.repository, source.digest, keys, tag)
    say(f"{source.repository}@{source.digest} is signed by {good.name}")
    show(good.name)
    return 0
