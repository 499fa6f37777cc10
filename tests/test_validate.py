"""Validation of a bundle so small that it takes milliseconds: real graph, real original, real backends, real faults."""

from __future__ import annotations

import errno
import json
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
import referencing
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import edgeattn.contenders
import edgeattn.packages
from edgeattn import backends, records
from edgeattn.bundle import Bundle, write_manifest
from edgeattn.errors import (
    AccuracyError,
    IncompatibleError,
    LatencyError,
    MissingError,
    UnsupportedError,
    UsageError,
)
from edgeattn.session import load
from edgeattn.trial import open_stream
from edgeattn.validate import bench, validate

SIZE, CLASSES = 16, 20
QUICK = {"duration": 0.05, "html": False, "require_stable": False, "threads": 2}
SCHEMAS = {path.name: json.loads(path.read_text()) for path in Path(records.__file__).parent.glob("schema_*.json")}
PREPROCESS = {"resize": 18, "crop": SIZE, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}


class Tiny(nn.Module):
    """A convolution, the mean over pixels, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, CLASSES)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(image).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def program():
    return torch.export.export(Tiny().eval(), (torch.zeros(1, 3, SIZE, SIZE),))


@pytest.fixture
def make(tmp_path, program):
    """Return a function that writes a bundle; `damage` changes the weights of the graph but not the original."""

    def write(name="tiny", *, precision="fp32", damage=lambda weights: None, io="float32", promised=CLASSES) -> Path:
        folder = tmp_path / f"{name}.edgeattn"
        for part in ("reference", "golden"):
            (folder / part).mkdir(parents=True)
        module = Tiny().eval()
        torch.export.save(program, folder / "reference" / "model.pt2")
        weights = {key: value.numpy().copy() for key, value in module.state_dict().items()}
        damage(weights)
        onnx.save(graph(weights, precision, io), folder / "model.onnx")
        images = np.random.default_rng(0).standard_normal((2, 1, 3, SIZE, SIZE)).astype(np.float32)
        with torch.inference_mode():
            logits = np.stack([module(torch.from_numpy(image)).numpy() for image in images])
        np.savez(folder / "golden" / "inputs.npz", image=images)
        np.savez(folder / "golden" / "outputs.npz", logits=logits)
        write_manifest(folder, manifest(precision, promised))
        return folder

    return write


def graph(weights, precision, io):
    """Return the exported form of Tiny, computing in `precision`."""
    inner = np.float16 if precision == "fp16" else np.float32
    kind, outside = (helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype in (inner, io))
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=kind),
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["y"], transB=1),
        helper.make_node("Cast", ["y"], ["logits"], to=outside),
    ]
    initial = [numpy_helper.from_array(value.astype(inner), name) for name, value in weights.items()]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIZE, SIZE])
    logits = helper.make_tensor_value_info("logits", outside, [1, len(weights["head.bias"])])
    body = helper.make_graph(nodes, "tiny", [image], [logits], initial)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def manifest(precision, classes):
    """Return what the bundle promises."""
    dims = [{"size": size} for size in (1, 3, SIZE, SIZE)]
    return {
        "name": f"tiny-{precision}",
        "model": {"family": "test", "variant": "tiny", "source": "tests", "weights_sha256": "own"},
        "inputs": [{"name": "image", "dtype": "float32", "dims": dims, "preprocess": PREPROCESS}],
        "outputs": [{"name": "logits", "dtype": "float32", "dims": [{"size": 1}, {"size": classes}]}],
        **{key: [] for key in ("ops", "targets", "stages")},
        "precision": precision,
        "tool_versions": {},
        "options": {},
    }  # fmt: skip


def by_name(entries, name, key="name"):
    """Return the entry of a report that is called `name`."""
    return next(entry for entry in entries if entry[key] == name)


def check_schema(document, verb):
    """Validate a document against the shipped schema of its verb."""
    registry = referencing.Registry().with_resources(
        (name, referencing.Resource.from_contents(schema)) for name, schema in SCHEMAS.items()
    )
    jsonschema.Draft202012Validator(SCHEMAS[f"schema_{verb}.json"], registry=registry).validate(document)


def scale_head(weights):
    """Change one weight of the classifier by far more than rounding."""
    weights["head.weight"][3, 2] += 0.05


def test_a_healthy_bundle_passes(make):
    report = validate(make(), **QUICK)
    assert (report["verdict"], report["exit_code"], report["data"]["samples"]) == ("pass", 0, 10)
    check_schema(report, "validate")
    assert report.path.name == "validate-0001.json"
    assert json.loads(report.path.read_text()) == report
    assert by_name(report["results"], "ort", "backend")["ratio"]["to"] == "torch"
    assert [gate["name"] for gate in report["gates"]] == ["shape", "nan", "rel"]
    report.raise_for_verdict()


def test_the_error_is_that_of_a_second_computation(make):
    folder = make(precision="fp16")
    report = validate(folder, latency=False, data="seed:5", samples=4, **QUICK)
    session, module = load(folder, "ort"), Tiny().eval()
    wanted, found, half = [], [], []
    for sample in open_stream(Bundle.open(folder), "seed:5", 4).samples():
        image = torch.from_numpy(sample.feeds["image"])
        with torch.inference_mode():
            wanted.append(module(image).double().numpy())
            half.append(Tiny().eval().half()(image.half()).double().numpy())
        found.append(session(sample.feeds["image"]).astype(np.float64))

    def scaled(values):
        return float(np.sqrt(np.mean((np.array(values) - wanted) ** 2)) / np.sqrt(np.mean(np.array(wanted) ** 2)))

    output = by_name(report["backends"], "ort")["outputs"][0]
    assert output["scaled_err"] == pytest.approx(scaled(found), rel=1e-6)
    assert output["band"]["limit"] == pytest.approx(max(2.0**-11, 4 * scaled(half)), rel=1e-6)
    assert by_name(report["backends"], "torch16")["outputs"][0]["scaled_err"] == pytest.approx(scaled(half), rel=1e-6)
    assert report["results"] == []


def test_a_wrong_weight_fails_and_is_not_timed(make):
    report = validate(make(damage=scale_head), **QUICK)
    assert (report["verdict"], report["exit_code"]) == ("fail", 6)
    check_schema(report, "validate")
    assert [gate["name"] for gate in report["gates"] if not gate["pass"]] == ["rel"]
    output = by_name(report["backends"], "ort")["outputs"][0]
    assert output["worst_index"][1] == 3
    assert [result["backend"] for result in report["results"]] == ["torch"]
    assert "ort is not timed: its accuracy failed" in report["warnings"]
    with pytest.raises(AccuracyError, match="rel"):
        report.raise_for_verdict()


def test_nan_fails_whatever_the_other_gates_allow(make):
    def damage(weights):
        weights["head.bias"][7] = np.nan

    report = validate(make(damage=damage), gates=["rel=1e9"], latency=False, **QUICK)
    assert report["exit_code"] == 6
    output = by_name(report["backends"], "ort")["outputs"][0]
    assert (output["nan"], output["worst_index"]) == (10, [0, 7])
    assert by_name(report["gates"], "rel")["pass"]
    check_schema(report, "validate")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"io": "float16"}, "dtype float16, expected float32"),
        (
            {"damage": lambda weights: weights.update({k: weights[k][:19] for k in ("head.weight", "head.bias")})},
            "shape",
        ),
    ],
    ids=["dtype", "shape"],
)
def test_wrong_form_fails(make, options, text):
    report = validate(make(**options), gates=["rel=1e9"], latency=False, **QUICK)
    assert report["exit_code"] == 6
    gate = by_name(report["gates"], "shape")
    assert not gate["pass"]
    assert text in gate["limit_source"]
    check_schema(report, "validate")


def test_explicit_gates_replace_the_band_and_say_so(make):
    folder = make(damage=scale_head)
    wide = validate(folder, gates=["rel=0.5", "top1=10%", "snr=3", "cosine=0.9", "abs=9"], latency=False, **QUICK)
    assert wide["exit_code"] == 0
    assert by_name(wide["gates"], "rel")["limit_source"] == "given with --gate"
    assert {gate["name"] for gate in wide["gates"]} == {"shape", "nan", "rel", "top1", "snr", "cosine", "abs"}
    for strict in ("rel=1e-9", "abs=1e-6", "cosine=0.9999999", "snr=80", "top1=1.0"):
        report = validate(folder, gates=["rel=0.5", strict], latency=False, **QUICK)
        assert report["exit_code"] == 6, strict


class Slowed:
    """ONNX Runtime with a wait before every call."""

    def __init__(self, wait):
        self.wait, self.count = wait, 0

    def __call__(self, *arguments):
        runner = backends.OrtRunner(*arguments)
        run = runner.run

        def slow(arrays):
            self.count += 1
            time.sleep(self.wait(self.count))
            return run(arrays)

        runner.run = slow
        return runner


def test_a_slow_candidate_fails_its_maximum(make, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "ort", Slowed(lambda count: 0.02))
    folder = make()
    report = validate(folder, maximum=["p50=10ms"], **QUICK)
    assert (report["verdict"], report["exit_code"]) == ("fail", 7)
    gate = by_name(report["gates"], "p50")
    assert gate["value"] > 20
    assert by_name(report["backends"], "ort")["outputs"][0]["band"]["limit"] == 5e-6
    with pytest.raises(LatencyError, match=r"p50 .* ms, limit 10 ms"):
        report.raise_for_verdict()
    assert validate(folder, maximum=["p50=30s", "memory=100GiB"], **QUICK)["exit_code"] == 0


def test_p99_without_enough_samples_fails(make, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "ort", Slowed(lambda count: 0.002))
    report = validate(make(), maximum=["p99=10s"], **QUICK)
    assert report["exit_code"] == 7
    assert by_name(report["gates"], "p99")["value"] is None
    assert "1000 samples" in by_name(report["gates"], "p99")["limit_source"]


def test_unstable_fails_only_where_stability_is_required(make, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "ort", Slowed(lambda count: 0.02 if count % 2 else 0.002))
    folder = make()
    tolerant = validate(folder, **QUICK)
    assert tolerant["exit_code"] == 0
    assert any("latency of ort is unstable" in text for text in tolerant["warnings"])
    strict = validate(folder, **{**QUICK, "require_stable": None}, maximum=["p50=30s"])
    assert (strict["verdict"], strict["exit_code"]) == ("unstable", 7)
    check_schema(strict, "validate")


def test_a_named_backend_that_cannot_run_fails(make):
    report = validate(make(), backends=["ort", "rtx"], latency=False, **QUICK)
    assert (report["verdict"], report["exit_code"]) == ("fail", 3)
    assert by_name(report["backends"], "ort")["verdict"] == "pass"
    assert by_name(report["backends"], "rtx")["verdict"] == "fail"
    with pytest.raises(MissingError, match="rtx"):
        report.raise_for_verdict()


def test_skipped_is_not_passed(make, monkeypatch):
    def missing(*arguments):
        raise MissingError("EA0201", "onnxruntime is not installed")

    monkeypatch.setitem(backends.BACKENDS, "ort", missing)
    report = validate(make(), **QUICK)
    assert (report["verdict"], report["exit_code"]) == ("skipped", 3)
    assert report["skipped"] == [{"backend": "ort", "reason": "onnxruntime is not installed"}]
    check_schema(report, "validate")


def test_a_backend_that_breaks_while_running_fails(make, monkeypatch):
    def broken(count):
        if count > 4:
            raise RuntimeError("device lost\nlong story")
        return 0

    monkeypatch.setitem(backends.BACKENDS, "ort", Slowed(broken))
    report = validate(make(), latency=False, **QUICK)
    assert report["exit_code"] == 6
    assert "device lost" in by_name(report["backends"], "ort")["reason"]


def test_a_graph_that_the_backend_refuses_is_a_build_failure(make):
    folder = make()
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "model.onnx").write_bytes(b"no graph")
    write_manifest(folder, document)
    assert validate(folder, latency=False, **QUICK)["exit_code"] == 5


@pytest.mark.parametrize("file", ["model.onnx", "reference/model.pt2", "golden/inputs.npz"])
def test_damage_is_incompatible(make, file):
    folder = make()
    with (folder / file).open("ab") as stream:
        stream.write(b"x")
    try:
        code = validate(folder, latency=False, **QUICK)["exit_code"]
    except IncompatibleError as error:
        code = error.exit_code
    assert code == 8


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([], 0), ([0, 0], 0), ([6, 7], 6), ([7, 0], 7), ([7, 6, 3], 3), ([3, 4], 4), ([4, 5], 5), ([6, 8, 5], 8)],
)
def test_precedence_of_exit_codes(codes, expected):
    assert records.worst_exit(codes) == expected


def test_without_torch_the_recorded_outputs_are_the_reference(make, monkeypatch):
    def missing(bundle):
        raise MissingError("EA0201", "torch is not installed")

    monkeypatch.setattr(edgeattn.contenders.Original, "load", missing)
    folder = make()
    report = validate(folder, **QUICK)
    assert (report["verdict"], report["reference"]["source"], report["data"]["samples"]) == ("pass", "recorded", 2)
    assert "torch is not installed" in report["reference"]["note"]
    assert by_name(report["results"], "ort", "backend")["ratio"] is None
    check_schema(report, "validate")
    with pytest.raises(MissingError, match="needs the PyTorch original"):
        validate(folder, data="seed:1", **QUICK)
    assert validate(make("bad", damage=scale_head), **QUICK)["exit_code"] == 6


def test_a_copy_without_the_original_is_compared_with_recorded_outputs(make):
    folder = make()
    (folder / "reference" / "model.pt2").unlink()
    report = validate(folder, latency=False, **QUICK)
    assert (report["verdict"], report["reference"]["source"]) == ("pass", "recorded")


def edited(path, backend, **changes):
    """Store a changed copy of a report: another error or another latency in the past."""
    document = json.loads(path.read_text())
    if "scaled_err" in changes:
        by_name(document["backends"], backend)["outputs"][0]["scaled_err"] = changes["scaled_err"]
    if "p50_ms" in changes:
        by_name(document["results"], backend, "backend")["p50_ms"] = changes["p50_ms"]
    place = path.with_name("old.json")
    place.write_text(json.dumps(document))
    return place


def test_regression_against_a_stored_report(make):
    folder = make(precision="fp16")
    first = validate(folder, **QUICK)
    generous = edited(first.path, "ort", p50_ms=1e4)
    assert validate(folder, versus=generous, regress="3%", **QUICK)["exit_code"] == 0
    faster = edited(first.path, "ort", p50_ms=1e-6)
    slower = validate(folder, versus=faster, regress="3%", **QUICK)
    assert slower["exit_code"] == 7
    assert [gate["limit_source"] for gate in slower["gates"] if not gate["pass"]] == ["3 % over old.json"]
    better = edited(first.path, "ort", p50_ms=1e4, scaled_err=1e-5)
    assert validate(folder, versus=better, regress="3%", **QUICK)["exit_code"] == 6


def test_reports_are_numbered_and_never_replaced(make, tmp_path):
    folder = make()
    names = [validate(folder, latency=False, **QUICK).path.name for _ in range(2)]
    assert names == ["validate-0001.json", "validate-0002.json"]
    own = tmp_path / "own.json"
    assert validate(folder, latency=False, output=own, **QUICK).path == own
    assert own.with_suffix(".npz").is_file()
    with pytest.raises(UsageError, match="already exists"):
        validate(folder, latency=False, output=own, **QUICK)
    assert validate(folder, latency=False, output=own, force=True, **QUICK)["exit_code"] == 0


def test_a_full_disk_leaves_nothing(make, monkeypatch):
    folder = make()

    def full(*arguments, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(MissingError, match="disk full"):
        validate(folder, latency=False, **QUICK)
    assert list((folder / "reports").iterdir()) == []


def test_an_unwritable_place_is_found_before_the_work(make, monkeypatch):
    folder = make()
    (folder / "reports").write_text("not a folder")
    monkeypatch.setattr("edgeattn.trial.Trial.compare", lambda *_: pytest.fail("measured before checking"))
    with pytest.raises(MissingError, match="cannot write"):
        validate(folder, **QUICK)


def test_raw_samples_are_kept(make):
    report = validate(make(), **QUICK)
    arrays = records.read(report.path)[1]
    result = by_name(report["results"], "ort", "backend")
    times = arrays["latency/ort/ms"]
    assert (len(times), np.median(times)) == (result["n"], pytest.approx(result["p50_ms"]))
    assert (np.diff(arrays["latency/ort/start_s"]) > 0).all()
    errors = arrays["error/ort/logits"]
    assert len(errors) == report["data"]["samples"]
    assert arrays["worst/ort/image"].shape == (1, 3, SIZE, SIZE)


def test_data_sources(make, tmp_path):
    folder = make()
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "inputs.npz", image=rng.standard_normal((3, 3, SIZE, SIZE)).astype(np.float32))
    (tmp_path / "photos").mkdir()
    for index in range(5):
        pixels = rng.integers(0, 255, (30, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    for data, samples, count in (
        ("seed:3", None, 8),
        (tmp_path / "photos", None, 5),
        (tmp_path / "photos", 2, 2),
        (None, 3, 3),
    ):
        report = validate(folder, data=data, samples=samples, latency=False, **QUICK)
        assert (report["exit_code"], report["data"]["samples"]) == (0, count)
    with pytest.raises(UsageError, match="no such data"):
        validate(folder, data=tmp_path / "nothing", latency=False, **QUICK)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"level": "modules"}, UnsupportedError, "outputs only"),
        ({"latency": False, "maximum": ["p50=1ms"]}, UsageError, "--no-latency"),
        ({"regress": "3%"}, UsageError, "add --vs"),
        ({"versus": "nowhere.json"}, UsageError, "does not exist"),
        ({"gates": ["map=0.5"]}, UsageError, "no such gate"),
        ({"backends": ["orrt"]}, UsageError, "did you mean ort"),
        ({"samples": 0}, UsageError, "at least 1"),
        ({"threads": 0}, UsageError, "1 or more"),
        ({"duration": "0s"}, UsageError, "must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_unusable_options(make, options, kind, message):
    with pytest.raises(kind, match=message):
        validate(make(), **{**QUICK, **options})


def test_both_sides_get_the_same_threads(make, monkeypatch):
    seen = {}
    before = torch.get_num_threads()

    def spy(bundle, device, threads):
        seen.update(ort=threads, torch=torch.get_num_threads())
        return backends.OrtRunner(bundle, device, threads)

    monkeypatch.setitem(backends.BACKENDS, "ort", spy)
    report = validate(make(), latency=False, **{**QUICK, "threads": 1})
    assert seen == {"ort": 1, "torch": 1}
    assert report["state"]["threads"] == 1
    assert torch.get_num_threads() == before


def test_junit_has_one_case_per_gate(make, tmp_path):
    report = validate(make(damage=scale_head), latency=False, junit=tmp_path / "gates.xml", **QUICK)
    suite = xml.parse(tmp_path / "gates.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    assert len(suite.findall("testcase")) == len(report["gates"])
    assert "limit 5e-06" in suite.find("testcase/failure").get("message")


def test_bench_measures_latency_alone(make):
    report = bench(make(), **{**QUICK, "duration": 1})
    assert (report["verdict"], report["data"]["samples"], report["gates"]) == ("pass", 0, [])
    check_schema(report, "bench")
    assert report.path.name == "bench-0001.json"
    assert report["command"][3:] == ["--threads", "2", "--no-require-stable", "--duration", "1s"]
    assert {result["backend"] for result in report["results"]} == {"torch", "ort"}
    assert min(result["n"] for result in report["results"]) >= 200


def test_bench_keeps_promises_too(make):
    report = bench(make(), maximum=["p50=1us"], **QUICK)
    assert report["exit_code"] == 7
    check_schema(report, "bench")


def test_the_page_is_written_beside_the_report(make):
    report = validate(make(), **{**QUICK, "html": None})
    page = report.path.with_suffix(".html")
    assert report["html"] == {"file": page.name, "skipped": None}
    assert "PASS" in page.read_text()


def test_a_missing_package_skips_the_page_or_fails_when_it_was_asked_for(make, monkeypatch):
    def missing(name):
        if name == "jinja2":
            raise MissingError("EA0201", "jinja2 is not installed", hints=["pip install 'edgeattn[report]'"])

    monkeypatch.setattr("edgeattn.report.require", missing)
    folder = make()
    report = validate(folder, latency=False, **{**QUICK, "html": None})
    assert report["exit_code"] == 0
    assert report["html"]["file"] is None
    assert "jinja2 is not installed" in report["html"]["skipped"]
    with pytest.raises(MissingError, match="jinja2"):
        validate(folder, latency=False, **{**QUICK, "html": True})


@pytest.mark.parametrize(
    ("damage", "options", "code"),
    [
        (lambda weights: None, [], 0),
        (scale_head, [], 6),
        (lambda weights: None, ["--max", "p50=1us"], 7),
        (lambda weights: None, ["--backend", "tensorrt"], 3),
    ],
    ids=["pass", "accuracy", "latency", "environment"],
)
def test_exit_codes_from_the_command_line(make, damage, options, code):
    from edgeattn.cli import app

    folder = make(damage=damage)
    quick = ["--duration", "50ms", "--no-html", "--no-require-stable"]
    done = CliRunner().invoke(app, ["validate", str(folder), *quick, *options, "--json"])
    document = json.loads(done.stdout)
    assert (done.exit_code, document["exit_code"]) == (code, code)
    check_schema(document, "validate")
    shown = CliRunner().invoke(app, ["report", "show", str(folder)])
    assert (
        shown.stdout.splitlines()[-1].endswith(f"verdict: {'PASS' if code == 0 else 'FAIL'} (accuracy, latency)")
        or code == 3
    )


def test_errors_match_their_schema(make):
    from edgeattn.cli import app

    done = CliRunner().invoke(app, ["validate", str(make()), "--gate", "rel", "--json"])
    document = json.loads(done.stdout)
    assert (done.exit_code, document["error"]["code"]) == (2, "EA0170")
    check_schema(document, "error")


def test_schemas_refuse_what_contradicts_itself(make):
    report = validate(make(), latency=False, **QUICK)
    for change in ({"exit_code": 6}, {"verdict": "fail"}, {"gates": [{**report["gates"][0], "pass": False}]}):
        with pytest.raises(jsonschema.ValidationError):
            check_schema({**report, **change}, "validate")
    missing = {key: value for key, value in report.items() if key != "backends"}
    with pytest.raises(jsonschema.ValidationError):
        check_schema(missing, "validate")


def test_every_schema_is_one():
    assert {name.removeprefix("schema_").removesuffix(".json") for name in SCHEMAS} >= {
        "export", "validate", "bench", "run", "inspect", "doctor", "error",
    }  # fmt: skip
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
