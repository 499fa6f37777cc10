"""The command line from the outside: results on stdout, errors in one form, exit codes, nothing half-written."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeattn.__main__ import run
from edgeattn.bundle import Bundle

VERBS = ("export", "validate", "bench", "run", "inspect", "doctor")
NESTED = (
    "models list",
    "models show",
    "models check",
    "ops list",
    "ops show",
    "ops check",
    "report show",
    "report diff",
    "report html",
)
TINY = """
import os, time, torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))

class Slow(Tiny):
    def forward(self, x):
        open("begun", "w").close()
        time.sleep(60)
        return super().forward(x)

def broken():
    return "no module"
"""


@dataclass(frozen=True)
class Done:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def document(self):
        """Return the one JSON document on stdout."""
        return json.loads(self.out)

    @property
    def first(self):
        """Return the first line of the error."""
        return next(line for line in self.err.splitlines() if line.startswith("error"))


@pytest.fixture
def cli(capsys):
    """Return a function that runs a command line in this process."""

    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


def outside(*arguments, cwd=None, limit=None, **variables):
    """Run a command line as a process of its own; `limit` is the size in bytes above which no file can grow."""
    command = [sys.executable, "-m", "edgeattn", *map(str, arguments)]
    restrict = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **variables},
        preexec_fn=restrict,
        timeout=120,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def without(folder, *packages):
    """Return the environment of an interpreter that does not find `packages`."""
    (folder / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def find_spec(name, path=None, target=None):\n"
        f"    return None if name.partition('.')[0] in {packages!r} else find(name, path, target)\n"
        "PathFinder.find_spec = staticmethod(find_spec)\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a user's module, images and labels."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tinymodel_cli.py").write_text(TINY)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    (folder / "names.txt").write_text("\n".join(f"class {index}" for index in range(1000)) + "\n")
    return folder


@pytest.fixture(scope="module")
def exported(place):
    """Return what `edgeattn export shvit_s1` said as a process of its own."""
    return outside("export", "shvit_s1", "--labels", "names.txt", "--no-check", cwd=place)


@pytest.fixture(scope="module")
def bundle(exported, place):
    assert exported.code == 0, exported.err
    return place / "shvit_s1-fp32.edgeattn"


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy.edgeattn")


class TestHelp:
    def test_is_fast(self):
        """Processor time, not wall time: other tests run beside this one."""
        times = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert outside("--help").code == 0
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(times) < 0.3

    @pytest.mark.parametrize("verb", [*VERBS, *NESTED])
    def test_every_verb_has_an_example(self, cli, verb):
        done = cli(*verb.split(), "--help")
        assert done.code == 0
        assert f"Example: edgeattn {verb}" in " ".join(done.out.split())

    @pytest.mark.parametrize("arguments", [(), ("models",), ("ops",), ("report",)])
    def test_no_verb_shows_the_verbs(self, cli, arguments):
        done = cli(*arguments)
        assert done.code == 0
        assert "Commands:" in done.out

    def test_version(self, cli):
        from edgeattn import __version__

        assert cli("--version").out == f"edgeattn {__version__}\n"
        assert cli("doctor", "--version").out == f"edgeattn {__version__}\n"


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("exprt", "x"), "export"),
            (("export",), "Missing argument"),
            (("export", "shvit_s1", "--wieghts", "x"), "--weights"),
            (("run", "b", "i", "--top", "many"), "--top"),
            (("run", "b", "i", "--top", "0"), "--top"),
            (("doctor", "--color", "blue"), "auto, always, never"),
        ],
    )
    def test_wrong_options(self, cli, arguments, words):
        done = cli(*arguments)
        assert done.code == 2
        assert done.first.startswith("error[EA0150]: ")
        assert words in done.err
        assert not done.out

    def test_json_document_of_a_usage_error(self, cli):
        done = cli("export", "--json", "--nonsense")
        assert done.code == 2
        assert done.document["error"]["code"] == "EA0150"
        assert done.document["schema"] == "edgeattn.export/1"

    def test_unknown_model_names_near_ones(self):
        done = outside("export", "shvit_s9")
        assert done.code == 2
        assert re.fullmatch(r"error\[EA0101\]: shvit_s9: no such model; did you mean .*shvit_s\d.*\?", done.first)
        assert "Traceback" not in done.err
        assert not done.out

    def test_json_document_of_an_error(self, cli):
        done = cli("models", "show", "shvit_s9", "--json")
        assert done.code == done.document["exit_code"] == 2
        assert done.document["verdict"] == "error"
        assert done.document["error"]["code"] == "EA0101"
        assert done.first

    def test_debug_shows_the_traceback(self, cli):
        assert "Traceback" in cli("models", "show", "shvit_s9", "--debug").err
        assert "Traceback" not in cli("models", "show", "shvit_s9").err


class TestExport:
    def test_stdout_is_the_table_and_stderr_the_story(self, exported, bundle):
        lines = exported.out.splitlines()
        assert lines[0].split()[:4] == ["shvit_s1", "fp32", "portable", "image=1x3x224x224"]
        assert [line.split()[0] for line in lines[1:4]] == ["trace", "translate", "passes"]
        assert f"next:   edgeattn validate {bundle.name}" in lines
        assert any("seeded" in line for line in lines)
        assert "trace      torch.export ..." in exported.err.splitlines()[0]

    def test_existing_output(self, cli, bundle, monkeypatch):
        monkeypatch.chdir(bundle.parent)
        before = Bundle.open(bundle).sha256
        done = cli("export", "shvit_s1")
        assert done.code == 2
        assert "already exists" in done.first
        assert "--force" in done.err
        assert Bundle.open(bundle).sha256 == before

    def test_unwritable_output(self, cli):
        done = cli("export", "shvit_s1", "-o", "/proc/x.edgeattn", "--no-check")
        assert done.code == 3
        assert done.first.startswith("error[EA0202]: /proc/x.edgeattn: cannot be written")

    def test_dry_run_writes_nothing(self, cli, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done = cli("export", "shvit_s1", "--target", "orin", "--dry-run", "--json")
        assert done.code == 0
        assert done.document["options"]["precision"] == "fp16"
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            (("--weights", "nowhere.pth"), 2, "no such weight file"),
            (("--weights", "photo.png"), 2, "photo.png"),
            (("--target", "oryn"), 2, "did you mean orin"),
            (("--precision", "int3"), 2, "int3"),
            (("--precision", "bf16"), 4, "bf16"),
            (("--until", "lunch"), 2, "no such stage"),
            (("--input", "picture=1x3x224x224"), 2, "inputs are image"),
            (("--input", "image=1x3x224"), 2, "needs 4 sizes"),
            (("--dim", "depth=1:4"), 2, "depth"),
            (("--precision-plan", "names.txt"), 2, "not a precision plan"),
        ],
    )
    def test_bad_options(self, cli, place, tmp_path, monkeypatch, arguments, code, words):
        monkeypatch.chdir(place)
        before = sorted(place.iterdir())
        done = cli("export", "shvit_s1", "-o", tmp_path / "out.edgeattn", *arguments)
        assert (done.code, words in done.err) == (code, True), done.err
        assert "Traceback" not in done.err
        assert not list(tmp_path.iterdir())
        assert sorted(place.iterdir()) == before

    @pytest.mark.parametrize("cut", [0, 1, 1000])
    def test_truncated_checkpoint(self, cli, bundle, tmp_path, cut):
        whole = (bundle / "reference" / "weights.safetensors").read_bytes()
        (tmp_path / "weights.safetensors").write_bytes(whole[: cut * len(whole) // 2000])
        done = cli("export", "shvit_s1", "--weights", tmp_path / "weights.safetensors", "-o", tmp_path / "out")
        assert done.code == 2
        assert "weights.safetensors" in done.first
        assert not (tmp_path / "out").exists()

    def test_weights_of_another_model(self, cli, bundle, tmp_path):
        weights = bundle / "reference" / "weights.safetensors"
        done = cli("export", "shvit_s2", "--weights", weights, "-o", tmp_path / "out")
        assert done.code == 2
        assert "does not fit" in done.first
        assert cli("models", "check", "shvit_s1", weights).code == 0
        assert cli("models", "check", "shvit_s2", weights).code == 2

    @pytest.mark.parametrize(
        ("model", "words"),
        [
            ("nowhere:Tiny", "cannot be imported"),
            ("tinymodel_cli:Big", "cannot be imported"),
            ("tinymodel_cli:broken", "not a torch.nn.Module"),
            ("nowhere.pt2", "no such file"),
        ],
    )
    def test_wrong_user_model(self, cli, place, monkeypatch, model, words):
        monkeypatch.chdir(place)
        done = cli("export", model, "--input", "x=1x3x8x8") if ":" in model else cli("export", model)
        assert done.code == 2
        assert words in done.err

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_interrupted(self, place, tmp_path, number, code):
        shutil.copy(place / "tinymodel_cli.py", tmp_path)
        command = [
            sys.executable,
            "-m",
            "edgeattn",
            "export",
            "tinymodel_cli:Slow",
            "--input",
            "x=1x3x8x8",
            "--no-check",
        ]
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as child:
            deadline = time.monotonic() + 60
            while not (tmp_path / "begun").exists():
                assert child.poll() is None, child.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
            child.send_signal(number)
            assert child.wait(timeout=30) == code
            assert "Traceback" not in child.stderr.read()
        assert not [path for path in tmp_path.iterdir() if "edgeattn" in path.name]

    def test_file_size_limit(self, place, tmp_path):
        shutil.copy(place / "tinymodel_cli.py", tmp_path)
        arguments = ("export", "tinymodel_cli:Tiny", "--input", "x=1x3x8x8", "--no-check")
        done = outside(*arguments, cwd=tmp_path, limit=1500, PYTHONDONTWRITEBYTECODE="1")
        assert done.code == 3, done.err
        assert done.first.startswith("error[EA0203]: Tiny-fp32.edgeattn: disk full")
        assert not [path for path in tmp_path.iterdir() if "edgeattn" in path.name]

    @pytest.mark.parametrize("file", ["model.onnx", "precision.json", "outputs.npz", "manifest.json"])
    def test_disk_full_at_any_file(self, cli, place, tmp_path, monkeypatch, file):
        monkeypatch.chdir(place)
        opened = open

        def full(path, mode="r", *rest, **options):
            if "w" in mode and str(path).endswith(file):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return opened(path, mode, *rest, **options)

        monkeypatch.setattr(builtins, "open", full)
        monkeypatch.setattr(io, "open", full)
        done = cli("export", "tinymodel_cli:Tiny", "--input", "x=1x3x8x8", "--no-check", "-o", tmp_path / "out")
        assert done.code == 3, done.err
        assert "EA0203" in done.first
        assert not list(tmp_path.iterdir())


class TestRun:
    def test_top_five_with_names(self, cli, bundle, place):
        done = cli("run", bundle, place / "photo.png")
        lines = done.out.splitlines()
        assert done.code == 0
        assert "seeded" in lines[0]
        assert lines[1] == "photo.png"
        rows = [re.fullmatch(r" +(\d+) +(\d+\.\d+)%  class (\d+)", line) for line in lines[2:]]
        assert len(rows) == 5
        assert all(row[1] == row[3] for row in rows)
        shares = [float(row[2]) for row in rows]
        assert shares == sorted(shares, reverse=True)

    def test_backends_agree_and_outputs_are_saved(self, cli, bundle, place, tmp_path):
        for backend in ("ort", "torch"):
            output = tmp_path / f"{backend}.npz"
            done = cli("run", bundle, place / "photo.png", "--backend", backend, "-o", output, "--top", 3, "--json")
            assert done.document["backend"] == backend
            assert len(done.document["results"][0]["top"]) == 3
        with np.load(tmp_path / "ort.npz") as ort, np.load(tmp_path / "torch.npz") as eager:
            assert ort["logits"].shape == (1, 1, 1000)
            np.testing.assert_allclose(ort["logits"], eager["logits"], rtol=1e-4, atol=1e-4)
        assert cli("run", bundle, place / "photo.png", "-o", tmp_path / "ort.npz").code == 2

    def test_arrays(self, cli, bundle, tmp_path):
        np.savez(tmp_path / "in.npz", image=np.zeros((2, 1, 3, 224, 224), np.float32))
        done = cli("run", bundle, tmp_path / "in.npz", "--json", "-q")
        assert [len(entry["top"]) for entry in done.document["results"]] == [5, 5]
        assert not done.err

    @pytest.mark.parametrize(
        ("file", "words"),
        [("broken.jpg", "broken.jpg"), ("nowhere.jpg", "nowhere.jpg"), ("names.txt", "not an image")],
    )
    def test_wrong_image(self, bundle, place, file, words):
        done = outside("run", bundle, place / file)
        assert done.code == 2
        assert words in done.first
        assert "Traceback" not in done.err

    @pytest.mark.parametrize(
        "array", [np.zeros((1, 3, 200, 224), np.float32), np.zeros((1, 3, 224, 224), np.int32), np.zeros(3, np.float32)]
    )
    def test_wrong_shape_or_dtype(self, cli, bundle, tmp_path, array):
        np.savez(tmp_path / "in.npz", image=array)
        done = cli("run", bundle, tmp_path / "in.npz")
        assert done.code == 2
        assert "image" in done.first

    def test_wrong_name(self, cli, bundle, tmp_path):
        np.savez(tmp_path / "in.npz", picture=np.zeros((1, 3, 224, 224), np.float32))
        assert "inputs are image" in cli("run", bundle, tmp_path / "in.npz").first

    def test_labels_that_do_not_fit(self, cli, bundle, place, tmp_path):
        (tmp_path / "few.txt").write_text("cat\ndog\n")
        done = cli("run", bundle, place / "photo.png", "--labels", tmp_path / "few.txt")
        assert done.code == 2
        assert "2 labels for 1000 classes" in done.first

    @pytest.mark.parametrize(
        "command",
        [
            "run {} photo.png",
            "validate {} --no-latency --no-html --data seed:0 --samples 1",
            "bench {} --duration 50ms --no-html",
            "inspect {}",
        ],
    )
    def test_corrupt_bundle(self, cli, copy, place, monkeypatch, command):
        monkeypatch.chdir(place)
        graph = copy / "model.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"x")
        done = cli(*command.format(copy).split())
        assert done.code == 8
        assert "model.onnx: changed" in done.out + done.err

    @pytest.mark.parametrize(
        ("damage", "code"), [("truncate", 8), ("schema", 8), ("remove graph", 8), ("remove manifest", 2)]
    )
    def test_damaged_bundle(self, cli, copy, place, damage, code):
        manifest = copy / "manifest.json"
        if damage == "truncate":
            manifest.write_bytes(manifest.read_bytes()[:500])
        elif damage == "schema":
            manifest.write_text(manifest.read_text().replace("edgeattn.bundle/1", "edgeattn.bundle/9"))
        else:
            (copy / "model.onnx" if damage == "remove graph" else manifest).unlink()
        done = cli("run", copy, place / "photo.png", "--json")
        assert done.code == done.document["exit_code"] == code

    @pytest.mark.parametrize("backend", ["tensorrt", "rtx"])
    def test_a_backend_to_come(self, cli, bundle, place, backend):
        done = cli("run", bundle, place / "photo.png", "--backend", backend)
        assert done.code == 3
        assert "nothing falls back" in done.err


class TestMissingPackages:
    def test_base_install(self, bundle, place, tmp_path):
        """With numpy and typer alone, everything that works does, and everything else names its extra."""
        base = without(
            tmp_path, "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors", "PIL", "triton"
        )
        assert outside("--help", **base).code == 0
        for arguments in (
            ("export", "shvit_s1"),
            ("run", bundle, place / "photo.png"),
            ("inspect", bundle),
            ("ops", "list"),
        ):
            done = outside(*arguments, cwd=tmp_path, **base)
            assert done.code == 3, done.err
            assert "error[EA020" in done.first
            assert "pip install 'edgeattn[cpu]'" in done.err
            assert "Traceback" not in done.err

    def test_running_needs_no_torch(self, bundle, tmp_path):
        blocked = without(tmp_path, "torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "PIL")
        np.savez(tmp_path / "in.npz", image=np.zeros((1, 3, 224, 224), np.float32))
        done = outside("run", bundle, tmp_path / "in.npz", **blocked)
        assert done.code == 0, done.err
        assert outside("run", bundle, tmp_path / "in.npz", "--backend", "torch", **blocked).code == 3

    def test_images_need_pillow(self, bundle, place, tmp_path):
        done = outside("run", bundle, place / "photo.png", **without(tmp_path, "PIL"))
        assert done.code == 3
        assert "PIL is not installed" in done.first


class TestListings:
    def test_models(self, cli):
        from edgeattn.model import MODELS

        document = cli("models", "list", "--json").document
        assert [entry["name"] for entry in document["models"]] == MODELS.names()
        assert "shvit_s1" in cli("models", "list").out
        assert cli("models", "show", "shvit_s1", "--json").document["parameters"] == 6_330_808

    def test_ops(self, cli):
        from edgeattn.op import OPS

        document = cli("ops", "list", "--json").document
        assert [entry["name"] for entry in document["ops"]] == OPS.names()
        for op in OPS:
            shown = cli("ops", "show", op.name)
            assert op.onnx_name in shown.out
            assert op.text in shown.out
        assert "did you mean" in cli("ops", "show", "single_head").first

    def test_ops_of_a_model(self, cli, place, monkeypatch):
        monkeypatch.chdir(place)
        done = cli("ops", "check", "tinymodel_cli:Tiny", "--input", "x=1x3x8x8", "--target", "orin", "--json")
        assert done.code == 0
        assert done.document["operators"]["Conv"] == 1
        assert done.document["refused"] == {"orin": []}

    def test_inspect_bundle(self, cli, bundle):
        document = cli("inspect", bundle, "--json", "--modules", "--layers").document
        graph = document["graph"]
        assert document["bundle_sha256"] == Bundle.open(bundle).sha256
        assert graph["custom"]["EdgeSingleHeadAttention"]["count"] == 9
        assert sum(graph["ops"].values()) == graph["nodes"] == len(graph["layers"])
        assert sum(entry["nodes"] for entry in graph["modules"].values()) == graph["nodes"]
        assert graph["expanded"] > graph["nodes"]
        text = cli("inspect", bundle, "--modules", "--layers").out
        assert "EdgeSingleHeadAttention" in text
        assert "blocks2.3.mixer" in text

    def test_inspect_graph_alone(self, cli, bundle, tmp_path):
        assert cli("inspect", bundle / "model.onnx", "--json").document["kind"] == "onnx"
        (tmp_path / "bad.onnx").write_bytes(b"\x00garbage")
        done = cli("inspect", tmp_path / "bad.onnx")
        assert done.code == 2
        assert "not a readable ONNX file" in done.first

    def test_dry_runs(self, cli, bundle):
        for verb in ("validate", "bench"):
            before = sorted(bundle.rglob("*"))
            document = cli(verb, bundle, "--dry-run", "--json").document
            assert document["dry_run"] is True
            assert sorted(bundle.rglob("*")) == before


class TestProcess:
    def test_a_bug_leaves_its_traceback_in_a_file(self, cli, monkeypatch):
        monkeypatch.setattr("edgeattn.catalogue.models", lambda: {}["bug"])
        done = cli("models", "list", "--json")
        assert done.code == 1
        assert not done.out
        assert "Traceback" not in done.err
        saved = Path(re.search(r"where: (\S+)", done.err)[1])
        assert "KeyError: 'bug'" in saved.read_text()
        saved.unlink()

    def test_what_libraries_print_stays_off_stdout(self, cli, monkeypatch):
        from edgeattn import catalogue

        models = catalogue.models
        monkeypatch.setattr("edgeattn.catalogue.models", lambda: print("chatter") or models())
        done = cli("models", "list", "--json")
        assert done.document["models"]
        assert "chatter" in done.err

    def test_closed_pipe(self):
        command = f"{sys.executable} -m edgeattn ops list --json | head -c 1"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
        assert done.stdout == "{"
        assert not done.stderr

    def test_log_file(self, cli, tmp_path):
        cli("models", "show", "shvit_s9", "--log-file", tmp_path / "log.txt")
        assert "EA0101" in (tmp_path / "log.txt").read_text()
        assert cli("models", "list", "--log-file", tmp_path / "a" / "log.txt").code == 2

    def test_colour(self, cli, monkeypatch):
        assert "\x1b[31m" in cli("models", "show", "x", "--color", "always").err
        assert "\x1b" not in cli("models", "show", "x", "--color", "never").err
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        monkeypatch.setenv("NO_COLOR", "1")
        assert "\x1b" not in cli("models", "show", "x").err

    def test_common_options_before_and_after_the_verb(self, cli):
        before, after = cli("--json", "models", "list"), cli("models", "list", "--json")
        between = cli("models", "--json", "list")
        assert before.document == after.document == between.document


class TestDoctor:
    def test_here(self, cli):
        done = cli("doctor", "--json")
        checks = {check["name"]: check["status"] for check in done.document["checks"]}
        assert checks["python"] == checks["torch"] == checks["onnxruntime"] == "ok"
        assert done.code == (3 if "fail" in checks.values() else 0)
        assert len(cli("doctor").out.splitlines()) >= len(checks)

    def test_what_is_missing_has_a_remedy(self, cli, monkeypatch):
        import importlib.metadata

        version = importlib.metadata.version

        def lacking(name):
            if name in ("onnxscript", "tensorrt_rtx"):
                raise importlib.metadata.PackageNotFoundError(name)
            return "2.0.0" if name == "torch" else version(name)

        monkeypatch.setattr(importlib.metadata, "version", lacking)
        done = cli("doctor", "--target", "orin", "--json")
        found = {check["name"]: check for check in done.document["checks"]}
        assert done.code == 3
        assert found["torch"]["status"] == "fail"
        assert ">=2.11" in found["torch"]["found"]
        assert found["onnxscript"]["status"] == "fail"
        assert "pip install" in found["onnxscript"]["remedy"]
        assert found["extra rtx"]["status"] == "warn"

    def test_unknown_target(self, cli):
        assert "did you mean orin" in cli("doctor", "--target", "oryn").first
