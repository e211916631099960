"""``uenvd-publish status``: post the status of a commit, one context for each cell, so that branch protection can demand it.

`forge_of_environment` and `status_of` are for whoever runs a plan and posts as it goes.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from uenvd.errors import UsageError
from uenvd.oci.credentials import read_token_file
from uenvd.publish.console import say, show, show_json
from uenvd.publish.options import refuse
from uenvd.publish.plan import DEFAULT_SITE, STAGES, Cell, Stage, load_plan
from uenvd.publish.plan.forges import KINDS, STATES, Forge, ForgeKind, State, Status, post_status, request_of

TOKEN_VARIABLES: Final[dict[ForgeKind, tuple[str, ...]]] = {
    "github": ("UENVD_STATUS_TOKEN", "GITHUB_TOKEN", "GH_TOKEN"),
    "gitea": ("UENVD_STATUS_TOKEN", "GITEA_TOKEN", "FORGEJO_TOKEN", "GITHUB_TOKEN"),
    "gitlab": ("UENVD_STATUS_TOKEN", "GITLAB_TOKEN"),
}
"""A job's own CI_JOB_TOKEN cannot set statuses at GitLab."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("state", metavar="STATE", choices=STATES, help=", ".join(STATES))
    what = parser.add_argument_group("what")
    what.add_argument("--cell", metavar="ID", help="the cell, name/version-system/uarch: its context")
    what.add_argument("--context", metavar="TEXT", help="another context")
    what.add_argument("--stage", choices=STAGES, help="begins the description")
    what.add_argument("--description", default="", metavar="TEXT", help="at most 140 characters are shown")
    what.add_argument("--url", metavar="URL", help="where the details are; default: the CI job's page")
    what.add_argument(
        "--config",
        type=Path,
        default=Path("config.yaml"),
        metavar="FILE",
        help="with --cell: the site's configuration",
    )
    what.add_argument(
        "--site",
        default=DEFAULT_SITE,
        metavar="NAME",
        help=f"first part of contexts; default: {DEFAULT_SITE}",
    )
    add_forge_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be posted, as JSON")


FORGE_OPTIONS: Final = ("forge", "api", "project", "sha", "status-token-file")


def add_forge_options(parser: argparse.ArgumentParser) -> None:
    """Add where statuses go; inside GitHub's, Gitea's and GitLab's CI all of it but the token is known."""
    group = parser.add_argument_group("forge")
    group.add_argument(
        "--forge", choices=KINDS, help="which API (gitea: Forgejo too); default: that of the CI job"
    )
    group.add_argument("--api", metavar="URL", help="its address, https://HOST/api/v1 or /api/v4")
    group.add_argument("--project", metavar="OWNER/NAME", help="the project")
    group.add_argument("--sha", metavar="COMMIT", help="the commit, all digits")
    group.add_argument(
        "--status-token-file",
        type=Path,
        metavar="FILE",
        help="the token, in a file that only you can read; else $UENVD_STATUS_TOKEN",
    )


def run(arguments: argparse.Namespace) -> int:
    """Post one status; its context goes to stdout."""
    if (arguments.cell is None) == (arguments.context is None):
        raise UsageError("a status needs a context", hint="say --cell ID or --context TEXT")
    if arguments.cell is not None:
        cell = load_plan(arguments.config).cell(arguments.cell)
        status = status_of(
            cell, arguments.state, arguments.description, arguments.stage, arguments.url, site=arguments.site
        )
    else:
        refuse(arguments, ("config", "site"), "is for --cell, and --context says all of the context")
        words = f"{arguments.stage}: {arguments.description}" if arguments.stage else arguments.description
        status = Status(arguments.context, arguments.state, words, arguments.url or job_url(os.environ))
    forge = need_forge(arguments)
    if arguments.dry_run:
        url, _, body = request_of(forge, status)
        show_json({"url": url, "body": body})
        return 0
    post_status(forge, status)
    say(f"{status.state}: {status.context} at {forge.project}@{forge.sha[:12]}")
    show(status.context)
    return 0


def status_of(
    cell: Cell,
    state: State,
    description: str = "",
    stage: Stage | None = None,
    url: str | None = None,
    *,
    site: str = DEFAULT_SITE,
) -> Status:
    """Return the status of a cell; without ``url`` it links to the CI job, where this is one."""
    words = f"{stage}: {description}" if stage and description else description or stage or ""
    return Status(cell.context(site), state, words, url or job_url(os.environ))


def forge_of(arguments: argparse.Namespace) -> Forge | None:
    """Return the forge that the options and the environment name; None without a token or a commit. Raises `UsageError`, `ConfigError`."""
    token = None
    if arguments.status_token_file is not None:
        token = read_token_file(arguments.status_token_file, "status").secret
    return forge_of_environment(
        os.environ,
        kind=arguments.forge,
        api=arguments.api,
        project=arguments.project,
        sha=arguments.sha,
        token=token,
    )


def need_forge(arguments: argparse.Namespace) -> Forge:
    """Return `forge_of`. Raises `UsageError` without one."""
    forge = forge_of(arguments)
    if forge is None:
        raise UsageError(
            "no forge was named, and this is no job of GitHub, Gitea or GitLab with a token",
            hint="say --forge, --api, --project, --sha, and give the token as $UENVD_STATUS_TOKEN or --status-token-file",
        )
    return forge


def forge_of_environment(
    environ: Mapping[str, str],
    *,
    kind: ForgeKind | None = None,
    api: str | None = None,
    project: str | None = None,
    sha: str | None = None,
    token: str | None = None,
) -> Forge | None:
    """Return the forge of a CI job, by the variables that it sets; None where it is none or has no token. Raises `UsageError`."""
    kind = kind or _kind(environ)
    if kind is None:
        return None
    if kind == "gitlab":
        api = api or environ.get("CI_API_V4_URL")
        project = project or environ.get("CI_PROJECT_ID")
        sha = sha or environ.get("CI_COMMIT_SHA")
    else:
        api = api or environ.get("GITHUB_API_URL") or ("https://api.github.com" if kind == "github" else None)
        project = project or environ.get("GITHUB_REPOSITORY")
        sha = sha or environ.get("GITHUB_SHA")
    token = token or next((environ[name] for name in TOKEN_VARIABLES[kind] if environ.get(name)), None)
    if not (api and project and sha and token):
        return None
    return Forge(kind, api, project, sha, token)


def _kind(environ: Mapping[str, str]) -> ForgeKind | None:
    if environ.get("GITLAB_CI"):
        return "gitlab"
    # Gitea and Forgejo set GitHub's variables, too.
    if environ.get("GITEA_ACTIONS") or environ.get("FORGEJO_ACTIONS"):
        return "gitea"
    return "github" if environ.get("GITHUB_ACTIONS") else None


def job_url(environ: Mapping[str, str]) -> str | None:
    """Return the page of the CI job."""
    if environ.get("CI_JOB_URL"):
        return environ["CI_JOB_URL"]
    parts = [environ.get(name, "") for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_RUN_ID")]
    url = f"{parts[0]}/{parts[1]}/actions/runs/{parts[2]}"
    return url if all(parts) and re.match(r"https?://", url) else None
