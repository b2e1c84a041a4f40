"""``curate models``: list, fetch and verify weights."""

import argparse
import json
import sys
from typing import Any

from curation.cli.options import add_command, prefixed
from curation.errors import UsageError


def add_models(commands: Any) -> None:
    """Declare the command."""
    models = add_command(commands, "models", _models_list, "list, fetch and verify model weights")
    actions = models.add_subparsers(title="commands", metavar="COMMAND")
    listing = add_command(actions, "list", _models_list, "what there is: what for, licence, where it is")
    listing.add_argument("--json", action="store_true", help="as JSON, with citations and URLs")
    fetch = add_command(actions, "fetch", _models_fetch, "download what is pinned, checked and resumed")
    fetch.add_argument("name", help="a name of `curate models list`, all, or https://…#sha256=HEX")
    fetch.add_argument("--sha256", metavar="HEX", help="pin this digest for a name that has none")
    fetch.add_argument(
        "--trust-first-download", action="store_true", help="pin what arrives for a name that has no digest"
    )
    fetch.add_argument(
        "--accept-license", action="append", default=[], metavar="ID", help="accept a non-commercial licence"
    )
    verify = add_command(actions, "verify", _models_verify, "hash what is here again, and look into the files")
    verify.add_argument("name", nargs="*", help="names or paths; default: everything that is here")


def _models_list(options: argparse.Namespace) -> int:
    from curation.models.weights import locate, registered

    found = [(entry, locate(entry)) for entry in registered()]
    if getattr(options, "json", False):
        rows = [
            {
                "name": entry.name,
                "role": entry.role,
                "license": entry.license,
                "non_commercial": entry.non_commercial,
                "citation": entry.citation,
                "url": entry.url or None,
                "state": where.state,
                "path": None if where.path is None else str(where.path),
            }
            for entry, where in found
        ]
        print(json.dumps(rows, indent=1))
        return 0
    for entry, where in found:
        print(f"{entry.name:<20} {entry.role:<6} {entry.license:<30} {where.state:<13} {where.path or where.advice}")
    return 0


def _models_fetch(options: argparse.Namespace) -> int:
    from curation.errors import WeightsError
    from curation.models.weights import fetch, locate, registered
    from curation.progress.download import download_reporter

    names, failed = [options.name], False
    if options.name == "all":
        if options.sha256 or options.trust_first_download:
            raise UsageError("--sha256 and --trust-first-download are for one name")
        states = {entry.name: locate(entry) for entry in registered()}
        names = [name for name, where in states.items() if where.state in ("installed", "cached", "not fetched")]
        for name in states.keys() - set(names):
            print(f"curate: weights {name} skipped: {states[name].advice}", file=sys.stderr)
    for name in names:
        try:
            with download_reporter(sys.stderr) as progress:
                weights = fetch(
                    name,
                    options.accept_license,
                    sha256=options.sha256 or "",
                    trust_first_download=options.trust_first_download,
                    progress=progress,
                )
        except WeightsError as error:
            failed = True
            print(prefixed(str(error)), file=sys.stderr)
        else:
            print(f"{weights.name}  {weights.sha256}  {weights.path}", flush=True)
    return 1 if failed else 0


def _models_verify(options: argparse.Namespace) -> int:
    from curation.models.verify import verify

    results = verify(options.name)
    for result in results:
        print(f"{'ok' if result.ok else 'BAD':<4} {result.name}  {result.detail}")
    return 0 if results and all(result.ok for result in results) else 1
