"""The repository as packaged: package map and links agree, packages are flat, imports are light and point downward."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("export", "kernels", "models", "plugins")
SOURCES = sorted(path for folder in ("edgeattn", *PACKAGES) for path in (ROOT / folder).glob("*.py"))
TEXTS = sorted(
    path
    for folder in (".", ".ci", "edgeattn", "tests", *PACKAGES)
    for path in (ROOT / folder).iterdir()
    if path.is_file() and path.suffix in (".py", ".toml", ".md", ".json", ".html", ".cpp", ".h", ".txt", "")
)
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy", "safetensors", "PIL", "tensorrt", "triton")

# Who may import whom: a module imports from earlier rows and from its own.
LAYERS = (
    ("errors", "packages", "registry", "expr", "signature", "hashing", "progress", "listing", "seeding", "tensors"),
    ("boxes", "clouds", "detection", "rounding"),
    ("op", "model", "target"),
    ("kernels", "models"),
    ("capacity", "download", "checkpoint", "weights", "image", "npz", "data", "accuracy", "conditions", "engine"),
    ("bundle",),
    ("originals", "source", "export", "aot", "plugins", "testing"),
)


def _config() -> str:
    return (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", PACKAGES)
def test_package_map_and_link_agree(name):
    link = ROOT / "edgeattn" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert f'"edgeattn.{name}" = "{name}"' in _config()
    assert (ROOT / name / "__init__.py").is_file()


def test_package_list_is_complete():
    listed = re.search(r"packages = \[([^\]]*)\]\n\n\[tool.setuptools.package-dir", _config())
    assert listed is not None
    found = [part.strip().strip('"') for part in listed[1].split(",")]
    assert found == ["edgeattn", *(f"edgeattn.{name}" for name in PACKAGES)]


@pytest.mark.parametrize("name", ["edgeattn", *PACKAGES])
def test_packages_are_flat(name):
    folders = [path.name for path in (ROOT / name).iterdir() if path.is_dir() and not path.is_symlink()]
    assert set(folders) <= {"__pycache__"}


def test_nothing_else_at_the_root():
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and "egg-info" not in path.name}
    allowed = {"README.md", "LICENSE", "Makefile", "pyproject.toml", "edgeattn", "tests", *PACKAGES}
    ignored = {name for name in visible if name.endswith((".edgeattn", ".plan")) or name in ("build", "dist")}
    assert visible - ignored <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_source_file_form(path):
    text = path.read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert first.endswith((".", ":")), "every file opens with one sentence"
    assert len(text.splitlines()) <= 400
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    assert path.stem not in ("utils", "helpers", "common", "base", "manager")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_machine_paths(path):
    text = path.read_text(encoding="utf-8", errors="replace")
    places = "|".join(("work", "home", "root", "Users", "mnt"))
    assert not re.search(rf"(?<![\w.:<])/(?:{places})/\w", text)


def test_import_is_light():
    loaded = _modules_after("import edgeattn")
    assert not loaded & set(HEAVY)


def test_help_is_light():
    loaded = _modules_after("from edgeattn.__main__ import run; run(['export', '--help'])")
    assert not loaded & {*HEAVY, "rich"}


def test_board_modules_need_no_torch():
    """A board has numpy and a runtime: opening a bundle and running it must not ask for more."""
    loaded = _modules_after("import edgeattn; edgeattn.Bundle; edgeattn.load; edgeattn.Session")
    assert loaded & {"numpy"}
    assert not loaded & (set(HEAVY) - {"numpy"})


def test_public_names_exist():
    import edgeattn

    for name in ("Bundle", "EdgeAttnError", "Session", "export_model", "load"):
        assert name in dir(edgeattn)
        assert getattr(edgeattn, name).__name__ == name
    with pytest.raises(AttributeError, match="exporter"):
        _ = edgeattn.exporter


def test_imports_point_downward():
    rank = {name: level for level, row in enumerate(LAYERS) for name in row}
    wrong = []
    for path in SOURCES:
        own = path.stem if path.parent.name == "edgeattn" else path.parent.name
        for target in _top_imports(path):
            if own in rank and rank.get(target, len(LAYERS)) > rank[own]:
                wrong.append(f"{own} imports {target}")
    assert not wrong


def _top_imports(path: Path) -> set[str]:
    """Return the edgeattn modules that `path` imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "edgeattn":
            found |= {entry.name for entry in node.names if not entry.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgeattn."):
            found.add(str(node.module).split(".")[1])
    return found


def _modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('MODULES', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split()[1:])
