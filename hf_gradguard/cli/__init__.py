"""The command line: `gradguard COMMAND`. Each command is one file here and one entry in `commands`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from hf_gradguard import __version__


class Command(Protocol):
    """What a module of this package has to have to be a command."""

    name: str
    help: str
    example: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the command's own arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Does it; returns the exit code. A ValueError, OSError or ModuleNotFoundError is the user's to mend."""


def commands() -> tuple[Command, ...]:
    """All commands, in the order in which the help lists them."""
    from hf_gradguard.cli import compare, demo, fold, patches, report

    return (demo, patches, fold, report, compare)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 for done, 2 for a request that can't be met.

    Args:
        argv: the words after `gradguard`; by default those of this process.
    """
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that can't show a sign must not end the command
    command: Command = args.command
    try:
        code = command.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads this has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        return _complain(command, str(error))
    except ModuleNotFoundError as error:
        if error.name not in ("altair", "vl_convert"):
            raise
        return _complain(command, f"{error.name} is not installed; pip install 'hf-gradguard[report]'")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradguard",
        description="See and guard the gradient of every layer.",
        epilog="gradguard COMMAND --help tells more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands():
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help[:1].upper() + command.help[1:] + ".",
            epilog=f"example: {command.example}",
        )
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser


def _complain(command: Command, message: str) -> int:
    print(f"gradguard {command.name}: {' '.join(message.split())}", file=sys.stderr)
    return 2
