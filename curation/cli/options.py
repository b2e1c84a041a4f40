"""What the commands share: how options are declared, and what is asked and said."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from curation.errors import UsageError


def add_command(
    commands: Any, name: str, command: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Declare a command and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def add_set(parser: argparse.ArgumentParser) -> None:
    """Declare ``--set``."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: --set fetch.timeout_s=10"
    )


def share(text: str) -> float:
    """Parse a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text}")
    return value


def whole(text: str) -> int:
    """Parse a whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text}")
    return int(text)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


class Version(argparse.Action):
    """Looks the version up only when it is asked for: reading package metadata takes longer than the help."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help=options.get("help"))

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        """Print it and end."""
        from curation import __version__

        print(f"curate {__version__}")
        parser.exit()


def agreed(costs: Sequence[str], yes: bool, what: str = "--redo throws this away and does it again") -> bool:
    """Say what is about to be lost, and ask."""
    if not costs:
        return True
    print(f"{what}:", *(f"  {line}" for line in costs), sep="\n", file=sys.stderr)
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError("add --yes to agree")
    return input("go on? [y/N] ").strip().lower() in ("y", "yes")


def prefixed(message: str) -> str:
    """Return the lines of a message, each with the name of the command."""
    return "\n".join(f"curate: {line}" for line in message.splitlines())
