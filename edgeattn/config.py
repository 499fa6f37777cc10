"""Configuration: option values from `--set`, the environment and a file, for the options not given as flags."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeattn.errors import MissingError, UsageError
from edgeattn.registry import near

PREFIX = "EDGEATTN_"
_FILES = ("edgeattn.toml", "pyproject.toml")
# Not an option of a verb: where caches live.
_RESERVED = {"EDGEATTN_CACHE"}
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")

# Verb to option to the type of its value: bool, int, float, str, Path or list (of text).
Schema = Mapping[str, Mapping[str, type]]


def resolve(
    verb: str, schema: Schema, *, file: Path | None, settings: Sequence[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Return the configured options of `verb`: file, overridden by environment, overridden by `--set KEY=VALUE`.

    A key is `verb.option`, in the environment EDGEATTN_VERB_OPTION; `--set` also takes the option alone. Raises EA0151
    for an unknown key or a value of the wrong type, wherever it stands and whichever verb runs.
    """
    values: dict[str, Any] = {}
    for section, key, value, place in (*_from_file(file, schema), *_from_environment(environment, schema)):
        if section == verb:
            values[key] = _convert(value, schema[section][key], f"{section}.{key}", place)
    given: dict[str, Any] = {}
    for section, key, value in _from_settings(verb, settings, schema):
        found = _convert(value, schema[section][key], f"{section}.{key}", "--set")
        if section == verb:
            given[key] = given.get(key, []) + found if isinstance(found, list) else found
    return values | given


def _from_file(path: Path | None, schema: Schema) -> Iterator[tuple[str, str, Any, str]]:
    """Read `path`, or the first configuration file in the current folder."""
    chosen = path or next((Path(name) for name in _FILES if Path(name).is_file()), None)
    if chosen is None:
        return
    for section, entries in _read(chosen).items():
        if not isinstance(entries, dict):
            raise UsageError("EA0151", f"{section}: settings stand in a section: [export]", where=str(chosen))
        for key, value in entries.items():
            name = _known(section, key, schema, str(chosen))
            _convert(value, schema[section][name], f"{section}.{name}", str(chosen))
            yield section, name, value, str(chosen)


def _from_environment(environment: Mapping[str, str], schema: Schema) -> Iterator[tuple[str, str, Any, str]]:
    for variable in sorted(environment):
        if not variable.startswith(PREFIX) or variable in _RESERVED:
            continue
        section, _, key = variable.removeprefix(PREFIX).lower().partition("_")
        yield section, _known(section, key, schema, f"environment: {variable}"), environment[variable], variable


def _from_settings(verb: str, settings: Sequence[str], schema: Schema) -> Iterator[tuple[str, str, str]]:
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError("EA0151", f"--set {setting}: write KEY=VALUE")
        section, dot, key = name.strip().partition(".")
        section, key = (section, key) if dot else (verb, section)
        yield section, _known(section, key, schema, f"--set {setting}"), value


def _known(section: str, key: str, schema: Schema, place: str) -> str:
    """Return the key as the schema spells it."""
    if section not in schema:
        raise UsageError("EA0151", f"{section}: no such section{near(section, list(schema))}", where=place)
    name = key.replace("-", "_")
    if name not in schema[section]:
        suggestion = near(name, list(schema[section]))
        raise UsageError("EA0151", f"{section}.{name}: no such setting{suggestion}", where=place)
    return name


def _read(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file: all of it, or `[tool.edgeattn]` of a pyproject."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("EA0151", f"{path}: cannot be read: {error}") from error
    shared = path.name == "pyproject.toml"
    if shared and "[tool.edgeattn" not in text:
        return {}
    reader = _toml()
    try:
        document: dict[str, Any] = reader.loads(text)
    except ValueError as error:
        raise UsageError("EA0151", f"{path}: not valid TOML: {error}") from error
    section: dict[str, Any] = document.get("tool", {}).get("edgeattn", {}) if shared else document
    return section


def _toml() -> Any:
    """Return the TOML reader: in the standard library from Python 3.11."""
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    hints = ["pip install tomli", "or use --set and EDGEATTN_ variables"]
    raise MissingError("EA0201", "a configuration file needs Python 3.11 or the package tomli", hints=hints)


def _convert(value: Any, kind: type, name: str, place: str) -> Any:
    """Return `value` as the type of the option: text is read, everything else must already have the type."""
    try:
        if isinstance(value, str):
            return _from_text(value, kind)
        if kind is list and isinstance(value, list):
            return [str(item) for item in value]
        if kind is not list and isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
            return value
        if kind is float and type(value) is int:
            return float(value)
        # A number or a truth value as the text that a flag would take: `max = 4`.
        if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        raise ValueError
    except ValueError:
        raise UsageError("EA0151", f"{name}: {value!r} is not {_WORDS[kind]}", where=place) from None


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list: "a list of texts",
}


def _from_text(text: str, kind: type) -> Any:
    if kind is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError
        return text.lower() in _TRUE
    return kind(text)
