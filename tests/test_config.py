"""Configuration: the order of its sources, and every mistake named with its place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgeattn.__main__ import run
from edgeattn.config import resolve
from edgeattn.console import Result
from edgeattn.errors import MissingError, UsageError
from edgeattn.options import SCHEMA

KNOWN = {
    "export": {"target": list, "precision": str, "check": bool},
    "validate": {"samples": int, "share": float, "max": list, "junit": Path},
}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def settings(verb="export", *, file=None, given=(), **environment):
    return resolve(verb, KNOWN, file=file, settings=given, environment=environment)


def test_nothing_is_configured_by_default():
    assert settings(PATH="/bin") == {}


def test_order_of_sources(tmp_path):
    (tmp_path / "edgeattn.toml").write_text('[export]\nprecision = "fp16"\ntarget = ["orin"]\ncheck = false\n')
    assert settings() == {"precision": "fp16", "target": ["orin"], "check": False}
    assert settings(EDGEATTN_EXPORT_PRECISION="bf16")["precision"] == "bf16"
    found = settings(given=["export.precision=fp32", "check=yes"], EDGEATTN_EXPORT_PRECISION="bf16")
    assert found == {"precision": "fp32", "target": ["orin"], "check": True}


def test_a_section_of_another_verb_is_checked_but_not_used(tmp_path):
    (tmp_path / "edgeattn.toml").write_text("[validate]\nsamples = 4\n")
    assert settings("export") == {}
    assert settings("validate") == {"samples": 4}
    (tmp_path / "edgeattn.toml").write_text('[validate]\nsamples = "many"\n')
    with pytest.raises(UsageError, match="whole number"):
        settings("export")


def test_named_file_and_pyproject(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n[tool.edgeattn.export]\nprecision = "fp16"\n')
    (tmp_path / "other.toml").write_text('[export]\nprecision = "bf16"\n')
    assert settings() == {"precision": "fp16"}
    assert settings(file=tmp_path / "other.toml") == {"precision": "bf16"}
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n')
    assert settings() == {}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("validate.samples", "12", 12),
        ("validate.share", "0.5", 0.5),
        ("validate.max", "p50=4ms, p99=6ms", ["p50=4ms", "p99=6ms"]),
        ("export.check", "off", False),
        ("validate.junit", "a/b.xml", Path("a/b.xml")),
        ("export.precision", "fp16", "fp16"),
    ],
)
def test_text_is_read_by_type(key, text, value):
    verb, name = key.split(".")
    assert settings(verb, given=[f"{key}={text}"]) == {name: value}
    assert settings(verb, **{f"EDGEATTN_{verb}_{name}".upper(): text}) == {name: value}


def test_repeated_settings_of_a_list_add_up():
    assert settings(given=["target=orin", "target=thor"]) == {"target": ["orin", "thor"]}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("exprt.precision=fp16", "exprt: no such section; did you mean export"),
        ("precison=fp16", "export.precison: no such setting; did you mean precision"),
        ("precision", "write KEY=VALUE"),
        ("check=maybe", "not true or false"),
        ("validate.samples=1.5", "not a whole number"),
    ],
)
def test_mistakes_in_settings(given, words):
    with pytest.raises(UsageError, match=words) as caught:
        settings(given=[given])
    assert caught.value.code == "EA0151"


@pytest.mark.parametrize("variable", ["EDGEATTN_EXPORT_PRECISON", "EDGEATTN_EXPRT_PRECISION", "EDGEATTN_EXPORT"])
def test_mistakes_in_the_environment(variable):
    with pytest.raises(UsageError) as caught:
        settings(**{variable: "fp16"})
    assert variable in caught.value.where or "export" in caught.value.message


def test_the_cache_is_no_setting():
    assert settings(EDGEATTN_CACHE="/tmp") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[export\n", "not valid TOML"),
        ('precision = "fp16"\n', "stand in a section"),
        ("[export]\nprecison = 1\n", "did you mean precision"),
        ("[export]\ncheck = 1\n", "not true or false"),
        ("[export]\ntarget = 3\n", "not a list"),
        ("[validate]\nsamples = true\n", "not a whole number"),
        ("[validate]\njunit = 3\n", "not a path"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, words):
    (tmp_path / "edgeattn.toml").write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        settings()
    assert "edgeattn.toml" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        settings(file=tmp_path / "none.toml")


def test_python_without_a_toml_reader(tmp_path, monkeypatch):
    (tmp_path / "edgeattn.toml").write_text("[export]\n")
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingError, match=r"3\.11 or the package tomli"):
        settings()


class TestVerbs:
    """The same through the command line, on the verb with every kind of option."""

    @pytest.fixture
    def seen(self, monkeypatch):
        """Catch what `run` is called with."""
        import edgeattn.inference

        calls = []
        monkeypatch.setattr(edgeattn.inference, "run_inputs", lambda *args, **kw: calls.append(kw) or Result("done"))
        return calls

    def test_flag_beats_settings_beats_environment_beats_file(self, seen, tmp_path, monkeypatch, capsys):
        base = ["run", "bundle", "photo.jpg"]
        (tmp_path / "edgeattn.toml").write_text('[run]\ntop = 1\nbackend = "torch"\n')
        assert run(base) == 0
        monkeypatch.setenv("EDGEATTN_RUN_TOP", "2")
        assert run(base) == 0
        assert run([*base, "--set", "top=3"]) == 0
        assert run([*base, "--set", "run.top=3", "--top", "4"]) == 0
        assert run(["--set", "top=5", *base, "--set", "threads=2"]) == 0
        assert [(call["top"], call["backend"]) for call in seen] == [(top, "torch") for top in (1, 2, 3, 4, 5)]
        assert seen[-1]["threads"] == 2
        assert capsys.readouterr().out == "done\n" * 5

    def test_a_flag_equal_to_its_default_still_wins(self, seen, tmp_path):
        (tmp_path / "edgeattn.toml").write_text("[run]\ntop = 1\n")
        assert run(["run", "bundle", "photo.jpg", "--top", "5"]) == 0
        assert seen[0]["top"] == 5

    def test_a_mistake_stops_every_verb(self, tmp_path, capsys):
        (tmp_path / "edgeattn.toml").write_text("[run]\ntpo = 1\n")
        assert run(["models", "list"]) == 2
        assert "run.tpo: no such setting; did you mean top" in capsys.readouterr().err

    def test_every_option_has_a_key(self):
        assert {"export", "validate", "bench", "run", "inspect", "doctor"} == set(SCHEMA)
        assert SCHEMA["export"]["keep_fp32"] is list
        assert SCHEMA["export"]["check"] is bool
        assert SCHEMA["validate"]["max"] is list
        assert SCHEMA["validate"]["samples"] is int
        assert SCHEMA["validate"]["vs"] is Path
        assert "model" not in SCHEMA["export"]
