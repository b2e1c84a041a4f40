"""The command line: ``curate``. The only package that parses arguments or prints.

Exit codes: 0 done; 1 failed; 2 wrong use (arguments or settings); 130 interrupted, the next run goes on.
What is heavy (torch, faiss, ray) is imported by the command that needs it, so that ``--help`` answers at once.
"""

import argparse
import atexit
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from curation.cli.models import add_models
from curation.cli.options import Version, prefixed
from curation.cli.runs import add_demo, add_run, add_upkeep
from curation.cli.training import add_training
from curation.errors import CurationError, UsageError
from curation.processes import leave_pandas_out, log_to_stderr

_EXAMPLES = """examples:
  curate demo                                        see everything work on a small website
  curate run --config my.yaml --run runs/my          crawl to manifest; run again to go on
  curate run --run runs/my --stage dedup --set dedup.threshold=0.7
  curate status --run runs/my                        what is done, stale and left
  curate train --manifest runs/my/manifest.parquet --config configs/dinov2/tiny.yaml --output runs/my/train
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow each other down on shared cores
    options = _parser().parse_args(arguments)
    log_to_stderr(logging.INFO if options.verbose else logging.WARNING)
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except UsageError as error:
        print(prefixed(str(error)), file=sys.stderr)
        return 2
    except CurationError as error:
        print(prefixed(str(error)), file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        how = str(error) or "what was finished is kept, and the same command goes on"
        print(f"curate: interrupted; {how}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def entry() -> None:
    """Run the command line and end the process.

    What is registered for the end of a process is run, but libraries' C++ globals are not torn down: their threads may
    still be there, and were seen to abort one in ten processes whose work was done.
    """
    _open_closed_streams()
    leave_pandas_out()
    code = main()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def _open_closed_streams() -> None:
    """Open what whoever started this process has closed: else a file of ours gets its number, and the messages."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="curate",
        description="Curate image datasets from crawled pages, and train DINOv2 on them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, help="print the version")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_run(commands)
    add_upkeep(commands)
    add_models(commands)
    add_training(commands)
    add_demo(commands)
    return parser
