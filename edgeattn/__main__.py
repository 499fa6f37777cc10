"""`python -m edgeattn`, and the `edgeattn` command: run the command line and turn what is left over into exit codes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

INTERRUPTED = 130


def main() -> None:
    """Run the command line of this process and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing escapes but an exit that a signal asked for."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # The reader has gone (`| head`): Python must not complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: Sequence[str]) -> int:
    import typer

    from edgeattn.cli import app

    # The class of all errors that typer raises for a command line; where it lives differs between releases.
    usage: type[Exception] = typer.BadParameter.__mro__[2]
    try:
        code = typer.main.get_command(app).main(list(arguments), prog_name="edgeattn", standalone_mode=False)
    except usage as error:
        return _usage(error, arguments)
    except typer.Abort:
        return _interrupted()
    return code if isinstance(code, int) else 0


def _usage(error: Any, arguments: Sequence[str]) -> int:
    """Report a command line that cannot be parsed in the form of all other errors."""
    from edgeattn.console import print_error
    from edgeattn.errors import UsageError
    from edgeattn.registry import near

    context = getattr(error, "ctx", None)
    path = context.command_path if context else "edgeattn"
    first, *rest = error.format_message().splitlines() or ["wrong usage"]
    unknown = re.fullmatch(r"No such command '(.*)'\.", first)
    if unknown and context:
        first += near(unknown[1], list(context.command.commands))  # older releases of typer suggest nothing
    ours = UsageError("EA0150", first, why=" ".join(rest), hints=[f"{path} --help"])
    verb = path.removeprefix("edgeattn").strip().replace(" ", ".") or "usage"
    return print_error(verb, ours, as_json="--json" in arguments, color="auto", stream=sys.stdout)


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    main()
