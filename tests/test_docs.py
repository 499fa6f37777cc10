"""The README is true: its commands run, its links to files exist, its printed output is what the commands print."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edgeattn.model import MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("  #")[0].strip() for line in README.splitlines() if line.startswith("edgeattn ")]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(command, folder, **options):
    words = [sys.executable, "-m", *shlex.split(command)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True, timeout=600, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the first command of the README has been run."""
    place = tmp_path_factory.mktemp("readme")
    assert COMMANDS[0] == "edgeattn export shvit_s1"
    place.joinpath("stdout.txt").write_text(run(COMMANDS[0], place).stdout)
    return place


def shape(text):
    """Return printed output with every number removed: measured figures differ, the form must not."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.]+(e[-+]\d+)?", "N", text)).strip()


def test_the_two_commands_print_what_the_readme_shows(folder):
    shown = README.split("<!-- output -->")[1].split("<!-- /output -->")[0]
    lines = [line for line in (folder / "stdout.txt").read_text().splitlines() if line.startswith("  ")]
    assert len(lines) >= 6
    for line in lines:
        assert shape(line) in shape(shown), line
    assert COMMANDS[1] == "edgeattn validate shvit_s1-fp32.edgeattn"
    printed = run(COMMANDS[1] + " --duration 0.5s", folder).stdout
    assert "verdict: PASS" in printed
    assert shape(printed.splitlines()[0]) in shape(shown)


def test_python_example_runs(folder):
    code = (
        "import torch\nimage = torch.zeros(1, 3, 224, 224).numpy()\n" + EXAMPLES[0] + "assert logits.shape == (1, 1000)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=300)


@pytest.mark.parametrize("command", [each for each in COMMANDS[2:] if "export" in each])
def test_export_examples_are_understood(command, folder):
    """The long ones as dry runs: every option is parsed and the model resolved, nothing is downloaded."""
    words = command.replace("--weights official", "").replace("mypackage.mymodule:build", "mymodule:build")
    (folder / "mymodule.py").write_text("import torch\nbuild = lambda: torch.nn.Conv2d(3, 4, 1)\n")
    if "mymodel.pt2" in words:
        pytest.skip("the file in the example is the reader's own: test_export.py exports one")
    run(words + " --dry-run", folder)


def test_every_variant_and_file_named_in_the_readme_exists():
    for prefix, rest in re.findall(
        r"`((?:ghostnetv2|emov2|shvit|mobilemamba|dsvt)_\w[\w.]*)`((?: `_\w[\w.]*`)*)", README
    ):
        family = prefix.partition("_")[0]
        for name in [prefix, *(family + suffix for suffix in re.findall(r"`(_\w[\w.]*)`", rest))]:
            assert name in MODELS, name
    for path in re.findall(r"`((?:kernels|models|export|edgeattn|tests)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("place", "name"), [("table", "export"), ("dsvt", "dsvt"), ("dsvt_front", "dsvt_front")])
def test_tables_are_the_recorded_ones(place, name):
    """The tables of measured results are the files that the benchmarks wrote."""
    shown = README.split(f"<!-- {place} -->")[1].split(f"<!-- /{place} -->")[0].strip()
    assert shown == (ROOT / "tests" / "results" / f"bench_{name}.md").read_text().strip()
