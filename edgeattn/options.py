"""The options common to all verbs, and the decorator that makes a function a verb: parse, configure, run, print."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO, Union, get_args, get_origin, get_type_hints

import typer

from edgeattn import __version__, config
from edgeattn.console import Result, print_crash, print_error, print_result
from edgeattn.errors import EdgeAttnError, UsageError
from edgeattn.packages import missing
from edgeattn.progress import Progress

_COLORS = ("auto", "always", "never")
_FORMAT = "%(levelname)s %(name)s: %(message)s"
# The options that configuration can set, by verb: filled by the decorator.
SCHEMA: dict[str, dict[str, type]] = {}


def _version(show: bool) -> None:
    if show:
        print(f"edgeattn {__version__}")
        raise typer.Exit


@dataclass(frozen=True)
class Common:
    """The options that every verb takes, before or after its name."""

    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="Say more; -vv for everything.")] = 0
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but results and errors.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False
    log_file: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the whole log to a file.")] = None
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress on stderr.")] = True
    color: Annotated[str, typer.Option(metavar="WHEN", help="auto, always or never.")] = "auto"
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings; else edgeattn.toml here.")] = None
    set: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="One setting; repeatable.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and say what would be done; do nothing.")] = False
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False

    def merged(self, later: Mapping[str, Any]) -> Common:
        """Return these options with those given further right on the command line."""
        changed = {name: value for name, value in later.items() if value != _DEFAULTS[name]}
        if self.set and changed.get("set"):
            changed["set"] = [*self.set, *changed["set"]]
        return dataclasses.replace(self, **changed)

    def tracker(self) -> Progress:
        """Return the progress display that these options ask for."""
        return Progress(enabled=self.progress and not self.quiet)

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Send the log to stderr (warnings, more with -v) and, all of it, to the log file while the verb runs."""
        handlers: list[logging.Handler] = [logging.StreamHandler()]
        handlers[0].setLevel(logging.ERROR if self.quiet else max(logging.DEBUG, logging.WARNING - 10 * self.verbose))
        if self.log_file:
            try:
                handlers.append(logging.FileHandler(self.log_file, encoding="utf-8"))
            except OSError as error:
                raise UsageError("EA0152", f"{self.log_file}: cannot be written: {error.strerror}") from error
        logger = logging.getLogger("edgeattn")
        logger.setLevel(logging.DEBUG)
        for handler in handlers:
            handler.setFormatter(logging.Formatter(_FORMAT))
            logger.addHandler(handler)
        try:
            yield
        finally:
            for handler in handlers:
                logger.removeHandler(handler)
                handler.close()


_DEFAULTS = {entry.name: entry.default for entry in dataclasses.fields(Common)}


def group(app: typer.Typer, summary: str, *, hidden: bool = False) -> None:
    """Make `app` take the common options before its verbs, and print its help when no verb follows."""

    def take(ctx: typer.Context, **given: Any) -> None:
        ctx.obj = (ctx.obj or Common()).merged(given)
        if ctx.invoked_subcommand is None:
            print(ctx.get_help())
            raise typer.Exit

    _declare(take, _common_parameters(hidden), summary)
    app.callback(invoke_without_command=True)(take)


def verb(
    app: typer.Typer, path: str, example: str, *, configurable: bool = True
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register `function(common, ...) -> Result` as the verb `path`; its docstring is the help.

    The last word of `path` is the name in `app`. Options not given as flags come from configuration.
    """

    def take(function: Callable[..., Result]) -> Callable[..., Result]:
        name = path.replace(" ", ".")
        own = _own_parameters(function)
        keys = _configured(own) if configurable else {}
        if configurable:
            SCHEMA[name] = dict(keys.values())

        def run(ctx: typer.Context, **given: Any) -> None:
            common = (ctx.obj or Common()).merged({option: given.pop(option) for option in _DEFAULTS})
            flags = {key for key in given if getattr(ctx.get_parameter_source(key), "name", "") == "COMMANDLINE"}
            raise typer.Exit(_run(name, function, common, given, flags, keys))

        _declare(run, [*own, *_common_parameters(True)], inspect.getdoc(function) or "")
        epilog = f"Example: {example}. Common options, such as --json and -q: edgeattn --help"
        app.command(path.split()[-1], epilog=epilog)(run)
        return function

    return take


def _run(
    name: str,
    function: Callable[..., Result],
    common: Common,
    given: dict[str, Any],
    flags: set[str],
    keys: Mapping[str, tuple[str, type]],
) -> int:
    """Run a verb and return its exit code. stdout is for the result alone: what libraries print goes to stderr."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as log:
        try:
            log.enter_context(common.logged())
            if common.color not in _COLORS:
                raise UsageError("EA0150", f"--color {common.color}: must be one of {', '.join(_COLORS)}")
            settings = config.resolve(
                name, SCHEMA, file=common.config, settings=common.set or (), environment=os.environ
            )
            filled = {
                key: settings[set_by] for key, (set_by, _) in keys.items() if set_by in settings and key not in flags
            }
            result = function(common, **{**given, **filled})
            print_result(name, result, as_json=common.json, stream=stdout)
        except BrokenPipeError:
            raise
        except Exception as error:
            return _report(name, error, common, stdout)
        return result.exit_code


def _report(name: str, error: Exception, common: Common, stdout: TextIO) -> int:
    """Print an error in one line and return its exit code; a missing package names its extra."""
    if common.debug:
        traceback.print_exception(error)
    known = missing(error) if isinstance(error, ModuleNotFoundError) else error
    if isinstance(known, EdgeAttnError):
        return print_error(name, known, as_json=common.json, color=common.color, stream=stdout)
    return print_crash(error)


def _common_parameters(hidden: bool) -> list[inspect.Parameter]:
    """Return the common options as parameters of a command; hidden ones work but do not crowd its help."""
    hints = get_type_hints(Common, include_extras=True)
    parameters = []
    for name, default in _DEFAULTS.items():
        kind, option = get_args(hints[name])
        option = copy.copy(option)
        option.hidden = hidden
        annotation: Any = Annotated[kind, option]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return parameters


def _own_parameters(function: Callable[..., Result]) -> list[inspect.Parameter]:
    """Return the parameters of a verb after the first, which takes the common options."""
    # Not get_type_hints: Python 3.10 wraps what has the default None in another Optional.
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    return [entry.replace(kind=inspect.Parameter.KEYWORD_ONLY) for entry in own]


def _declare(function: Callable[..., None], parameters: list[inspect.Parameter], doc: str) -> None:
    """Give `function` the signature that typer reads."""
    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    function.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    function.__annotations__ = {entry.name: entry.annotation for entry in (context, *parameters)}
    function.__doc__ = doc


def _configured(parameters: list[inspect.Parameter]) -> dict[str, tuple[str, type]]:
    """Return, per option, the key it has in configuration (its long flag) and the type of its value."""
    keys = {}
    for entry in parameters:
        kind, information = get_args(entry.annotation)
        if type(information).__name__ == "OptionInfo":
            # In an annotation, the first positional argument of Option is no default but a flag.
            declared = (information.default, *(information.param_decls or ()))
            flags = [flag for flag in declared if isinstance(flag, str) and flag.startswith("--")]
            flag = flags[0].partition("/")[0].removeprefix("--").replace("-", "_") if flags else entry.name
            keys[entry.name] = (flag, _plain_type(kind))
    return keys


def _plain_type(kind: Any) -> type:
    """Return bool, int, float, str, Path or list for the annotation of an option: `list[str] | None` is a list."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is list:
        return list
    plain: type = kind
    return plain
