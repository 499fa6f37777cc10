"""Validation of a small detector: boxes matched, stages compared and timed, real faults found where they are."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys

import jsonschema
import numpy as np
import onnx
import pytest
import referencing
from onnx import numpy_helper
from tiny import registered

from edgeattn import records
from edgeattn import report as reports
from edgeattn.bundle import Bundle, write_manifest
from edgeattn.errors import AccuracyError, UsageError
from edgeattn.matching import Matching
from edgeattn.pipeline import export_model
from edgeattn.reference import Original
from edgeattn.session import load
from edgeattn.stage_errors import StageError, comparable, pair
from edgeattn.trial import open_stream
from edgeattn.validate import bench, validate

tiny, crowded = registered("pillar"), registered("crowded")
QUICK = {"duration": 0.05, "html": False, "require_stable": False, "threads": 1}
STILL = {**QUICK, "latency": False, "samples": 1}
STAGES = ["voxels", "vfe", "backbone_3d", "backbone_2d", "dense_head"]
SCHEMAS = {path.name: json.loads(path.read_text()) for path in records.Path(records.__file__).parent.glob("schema_*")}


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """Return a function that exports the detector once per precision."""
    made = {}

    def export(precision="fp32"):
        if precision not in made:
            folder = tmp_path_factory.mktemp("exported") / f"{tiny}-{precision}.edgeattn"
            made[precision] = export_model(tiny, precision=precision, output=folder, check=False).path
        return made[precision]

    return export


@pytest.fixture
def copy(exported, tmp_path):
    """Return a function that copies a bundle; `damage` changes its graph, and the manifest says that is right."""

    def write(damage=None, precision="fp32"):
        folder = tmp_path / "copy.edgeattn"
        shutil.copytree(exported(precision), folder, ignore=shutil.ignore_patterns("reports"))
        if damage is not None:
            model = onnx.load(folder / "model.onnx")
            damage(model)
            onnx.save(model, folder / "model.onnx")
            write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
        return folder

    return write


def weight(name, change):
    """Return damage to one weight."""

    def damage(model):
        tensor = next(each for each in model.graph.initializer if each.name == name)
        values = change(numpy_helper.to_array(tensor)).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return damage


def shifted_cells(model):
    """Let the cells begin 2 cm further on."""
    function = next(each for each in model.functions if each.name.startswith("EdgeVoxelize"))
    constant = next(node.attribute[0].t for node in function.node if node.op_type == "Constant")
    low = numpy_helper.to_array(constant)
    assert low.ravel().tolist() == pytest.approx([-6.4, -6.4, -2.0])
    constant.CopyFrom(numpy_helper.from_array(low + np.float32(0.02)))


def check_schema(document, verb):
    """Validate a document against the shipped schema of its verb."""
    registry = referencing.Registry().with_resources(
        (name, referencing.Resource.from_contents(schema)) for name, schema in SCHEMAS.items()
    )
    jsonschema.Draft202012Validator(SCHEMAS[f"schema_{verb}.json"], registry=registry).validate(document)


def entry(report, name):
    """Return the entry of a backend."""
    return next(backend for backend in report["backends"] if backend["name"] == name)


def gate(report, name, output="boxes"):
    """Return a gate."""
    return next(each for each in report["gates"] if (each["name"], each["output"]) == (name, output))


def failed(report):
    """Return the stages and outputs whose gates failed, in order."""
    return list(dict.fromkeys(each["output"] for each in report["gates"] if not each["pass"]))


def test_a_healthy_detector_passes(exported):
    report = validate(exported(), **{**QUICK, "html": None})
    assert (report["verdict"], report["data"]["samples"], report["blame"]) == ("pass", 6, None)
    check_schema(report, "validate")
    assert json.loads(report.path.read_text()) == report
    ort = entry(report, "ort")
    assert (ort["detections"]["matched"], ort["detections"]["candidates"], ort["cut_err"]) == (1.0, 1.0, 0.0)
    assert ort["detections"]["boxes"]["matched"] > 100
    assert ort["detections"]["score_difference"] < 1e-5
    assert list(dict.fromkeys(each["stage"] for each in ort["modules"])) == STAGES
    assert {each["name"] for each in ort["modules"] if each["integer"]} == {
        "voxels.index", "voxels.coords", "backbone_3d.3",
    }  # fmt: skip
    assert all(each["scaled_err"] == 0 for each in ort["modules"] if each["integer"])
    assert all(0 < each["scaled_err"] < 5e-6 for each in ort["modules"] if not each["integer"])
    assert gate(report, "matched")["limit"] == 0.99
    assert "boxes mean nothing" in report["warnings"][0]
    check_times(report)
    check_page(report)


def check_times(report):
    """Every stage of both is timed, and together they take about as long as the whole."""
    assert {result["backend"]: result["batch"] for result in report["results"]} == {"torch": 1, "ort": 1}
    for result in report["results"]:
        assert [part["name"] for part in result["stages"]] == [*STAGES, "decode"]
        total = sum(part["p50_ms"] for part in result["stages"])
        assert 0.2 < total / result["p50_ms"] < 5
    text = reports.show(report)
    assert re.search(r"\nbackbone_3d +\d\.\de-07 \(5\.0e-06\) +[\d.]+ ms +[\d.]+ ms\n", text)
    assert re.search(r"\nboxes: ort finds (\d+), PyTorch \1; \1 match at IoU 0\.99 \(100\.0 %\)", text)


def check_page(report):
    """The page shows the worst cloud from above, with both sets of boxes."""
    page = report.path.with_suffix(".html").read_text()
    address = re.search(r'<img class="above" src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert address is not None
    picture = base64.b64decode(address[1]).decode()
    assert picture.count("PolyCollection_") >= 2
    assert "data:image/png" in picture, "the points are pixels"
    assert "<h2>Boxes</h2>" in page
    assert "<h2>Stages</h2>" in page
    arrays = records.read(report.path)[1]
    assert arrays["boxes/ort/expected"].shape == arrays["boxes/ort/found"].shape
    assert reports.html(*records.read(report.path)) == page
    assert 'class="above"' not in reports.html(report, {})


@pytest.mark.parametrize(
    ("damage", "stage"),
    [
        (shifted_cells, "voxels"),
        (weight("vfe.point.weight", lambda values: 1.01 * values), "vfe"),
        (weight("backbone_3d.stage_0.2.encoder_list.1.linear1.weight", lambda values: 1.01 * values), "backbone_3d"),
        (weight("backbone_2d.blocks.1.0.conv2.weight", lambda values: 1.01 * values), "backbone_2d"),
        (weight("dense_head.heads_list.0.dim.1.bias", lambda values: values + 0.01), "dense_head"),
    ],
    ids=STAGES,
)
def test_a_fault_is_found_in_its_stage(copy, damage, stage):
    report = validate(copy(damage), **STILL)
    assert (report["verdict"], report["exit_code"]) == ("fail", 6)
    check_schema(report, "validate")
    assert report["blame"]["module"] == stage
    assert failed(report)[0].split(".")[0] == stage
    assert f"the first stage that differs is {stage}" in reports.show(report)
    with pytest.raises(AccuracyError, match=f"ort {stage}"):
        report.raise_for_verdict()


def test_indices_stay_exact_whatever_the_user_allows(copy):
    gates = ["rel=1e9", "matched=0", "candidates=0"]
    report = validate(copy(shifted_cells), gates=gates, **STILL)
    assert report["exit_code"] == 6
    assert set(failed(report)) <= {"voxels.index", "voxels.coords", "backbone_3d.3"}


def test_nan_in_a_box_is_not_lost_in_the_matching(copy):
    damage = weight("dense_head.heads_list.0.dim.1.bias", lambda values: np.nan * values)
    report = validate(copy(damage), gates=["matched=0"], **STILL)
    assert report["exit_code"] == 6
    assert not gate(report, "nan")["pass"]
    assert entry(report, "ort")["detections"]["candidates"] == 0


def test_half_precision_is_measured_against_what_pytorch_keeps(exported):
    report = validate(exported("fp16"), **{**QUICK, "latency": False})
    assert report["exit_code"] == 0
    check_schema(report, "validate")
    own, ort = entry(report, "torch16"), entry(report, "ort")
    for name in ("candidates", "matched"):
        expected = min(0.99, 1 - 4 * (1 - own["detections"][name]))
        assert gate(report, name)["limit"] == pytest.approx(expected)
    half = {each["name"]: each["scaled_err"] for each in own["modules"]}
    for each in ort["modules"]:
        limit = 0.0 if each["integer"] else max(2.0**-11, 4 * half[each["name"]])
        assert each["band"]["limit"] == pytest.approx(limit)
    assert all(each["scaled_err"] > 1e-5 for each in ort["modules"] if not each["integer"])


def test_explicit_gates_replace_the_limits(exported, tmp_path):
    report = validate(exported(), gates=["matched=100%", "rel=1e-9"], **STILL)
    assert (gate(report, "matched")["limit"], gate(report, "matched")["limit_source"]) == (1.0, "given with --gate")
    assert gate(report, "matched")["pass"]
    assert {"vfe", "backbone_2d", "boxes"} <= set(failed(report))
    classifier = Bundle(tmp_path, {"name": "tiny", "inputs": [], "outputs": []}, "")
    with pytest.raises(UsageError, match="finds no boxes"):
        validate(classifier, gates=["matched=99%"])


def test_clouds_that_do_not_fit_are_said(exported, tmp_path):
    random = np.random.default_rng(0)
    for name, count, reach in (("full", 2500, 6.0), ("small", 400, 2.0)):
        points = random.uniform(-1, 1, (count, 5)).astype(np.float32) * (reach, reach, 1, 1, 1)
        np.save(tmp_path / f"{name}.npy", points.astype(np.float32))
    report = validate(exported(), data=tmp_path, latency=False, **QUICK)
    told = [text for text in report["warnings"] if "does not fit" in text]
    assert len(told) == 1
    assert "full.npy does not fit: points: 2500 found, 2000 fit, 500 lost; voxels of stage 0: " in told[0]
    assert report["exit_code"] == 6, "what is lost is missing from the result"
    (tmp_path / "full.npy").unlink()
    small = validate(exported(), data=tmp_path, latency=False, **QUICK)
    assert (small["exit_code"], small["data"]["samples"]) == (0, 1)


def test_without_the_original_the_boxes_are_those_recorded(copy):
    folder = copy()
    (folder / "reference" / "weights.safetensors").unlink()
    report = validate(folder, latency=False, **QUICK)
    assert (report["verdict"], report["reference"]["source"], report["data"]["samples"]) == ("pass", "recorded", 3)
    check_schema(report, "validate")
    assert entry(report, "ort")["detections"]["matched"] == 1.0
    assert entry(report, "ort")["modules"] == []


def test_without_onnx_the_boxes_alone_are_compared(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "edgeattn.stages", None)
    report = validate(exported(), **STILL)
    assert (report["verdict"], entry(report, "ort")["modules"]) == ("pass", [])
    assert any("the stages are not compared" in text for text in report["warnings"])


def test_a_graph_without_module_names_is_compared_as_far_as_it_goes(copy):
    def forget(model):
        for node in model.graph.node:
            del node.metadata_props[:]

    report = validate(copy(forget), **STILL)
    assert report["verdict"] == "pass"
    told = [text for text in report["warnings"] if "its values are not in the graph" in text]
    assert len(told) == len(STAGES)
    assert gate(report, "matched")["pass"]


def test_bench_times_the_stages(exported):
    report = bench(exported(), **{**QUICK, "duration": 0.01})
    check_schema(report, "bench")
    for result in report["results"]:
        assert [part["name"] for part in result["stages"]] == [*STAGES, "decode"]
    assert re.search(r"\ndecode +[\d.]+ ms +[\d.]+ ms\n", reports.show(report))


def test_watching_leaves_no_hook(exported, monkeypatch):
    seen = []
    loaded = Original.load.__func__
    monkeypatch.setattr(Original, "load", classmethod(lambda *given: seen.append(loaded(*given)) or seen[-1]))
    validate(exported(), **STILL)
    assert seen
    assert not any(part._forward_hooks for part in seen[0].module.modules())


def test_default_clouds_have_three_densities(exported):
    bundle = Bundle.open(exported())
    stream = open_stream(bundle, None, None)
    names = [sample.name for sample in stream.samples()]
    assert names == ["golden-0", "golden-1", "golden-2", "seed:0/0", "seed:0/1", "seed:0/2"]


class TestMatching:
    """Matching of results that are known."""

    @pytest.fixture
    def results(self, exported):
        bundle = Bundle.open(exported())
        sample = open_stream(bundle, None, 1).first()
        with load(bundle, "ort") as session:
            outputs = {name: value.copy() for name, value in session(dict(sample.feeds)).items()}
        return Matching(bundle.detector, bundle.inputs[0]), sample.feeds, outputs

    def test_another_order_is_the_same(self, results):
        matching, feeds, expected = results
        turned = {name: value[::-1] if name != "counts" else value for name, value in expected.items()}
        first, second = matching.update("a", feeds, expected, turned)
        assert all((first[name] == second[name]).all() for name in expected)
        assert (matching.figures()["candidates"], matching.figures()["matched"]) == (1.0, 1.0)

    def test_a_moved_box_and_a_wrong_score_count(self, results):
        matching, feeds, expected = results
        found = {name: value.copy() for name, value in expected.items()}
        best = int(expected["scores"].argmax())
        found["boxes"][best, 0] += 0.5
        found["scores"][np.argsort(expected["scores"])[-2]] += 0.001
        matching.update("a", feeds, expected, found)
        figures, number = matching.figures(), int((expected["labels"] > 0).sum())
        assert figures["candidates"] == pytest.approx((number - 1) / number)
        assert figures["boxes"]["matched"] < figures["boxes"]["expected"]
        assert figures["score_difference"] == pytest.approx(0.001, rel=0.01)

    def test_shares_are_over_all_samples_and_the_worst_is_kept(self, results):
        matching, feeds, expected = results
        empty = {**expected, "labels": np.zeros_like(expected["labels"])}
        for name, found in (("a", expected), ("b", empty), ("c", expected)):
            matching.update(name, feeds, expected, found)
        figures = matching.figures()
        assert figures["candidates"] == pytest.approx(2 / 3)
        assert (figures["worst_sample"], figures["worst_share"], figures["samples"]) == ("b", 0.0, 3)

    @pytest.mark.parametrize("fault", ["shape", "nan"])
    def test_what_has_no_order_is_compared_as_it_is(self, results, fault):
        matching, feeds, expected = results
        boxes = expected["boxes"][:-1] if fault == "shape" else np.full_like(expected["boxes"], np.nan)
        found = {**expected, "boxes": boxes}
        assert matching.update("a", feeds, expected, found) == (expected, found)
        assert matching.figures()["matched"] == 0.0

    def test_two_empty_results_agree(self, results):
        matching, feeds, expected = results
        empty = {**expected, "labels": np.zeros_like(expected["labels"])}
        matching.update("a", feeds, empty, empty)
        assert (matching.figures()["matched"], matching.figures()["boxes"]["expected"]) == (1.0, 0)


def test_stage_errors_are_those_of_the_definition():
    random = np.random.default_rng(0)
    error, differences, references = StageError("s", "s", False), [], []
    for name in ("a", "b"):
        expected = random.standard_normal((3, 1000))
        found = expected + (1e-3 if name == "b" else 1e-6) * random.standard_normal(expected.shape)
        error.update(name, expected, found)
        differences.append(found - expected)
        references.append(expected)
    found = error.metrics()
    wanted = np.sqrt(np.mean(np.square(differences)) / np.mean(np.square(references)))
    assert found["scaled_err"] == pytest.approx(wanted)
    assert found["abs_max"] == pytest.approx(np.abs(differences).max())
    assert found["worst_sample"] == "b"
    error.update("c", expected, np.full_like(expected, np.nan))
    assert error.metrics()["scaled_err"] == np.inf
    error.update("d", expected, expected[:2])
    assert error.metrics()["problems"] == ["d: shape [2, 1000], expected [3, 1000]"]


def test_values_of_one_shape_are_told_apart_and_spare_rows_left_out():
    random = np.random.default_rng(0)
    values = {name: random.standard_normal((1, 2, 4, 4)) for name in ("center", "rot")}
    rows = random.standard_normal((6, 3))
    given = np.concatenate([rows[:5], random.standard_normal((4, 3))])
    expected = {**values, "rows": rows, "same": np.zeros((6, 4), np.int32)}
    found = {"x": values["rot"] + 1e-6, "y": given, "z": values["center"]}
    pairs = pair(expected, found)
    assert pairs == {"center": "z", "rot": "x", "rows": "y"}
    both = comparable(expected, {label: found[name] for label, name in pairs.items()})
    assert set(both) == set(pairs)
    assert (both["rows"][0] == both["rows"][1]).all()
    assert len(both["rows"][0]) == 5


def test_proposals_are_compared_in_one_order():
    random = np.random.default_rng(0)
    expected = {name: random.standard_normal((1, width, 20)) for name, width in (("center", 2), ("heat", 5))}
    order = random.permutation(20)
    found = {name: value[..., order] + 1e-4 for name, value in expected.items()}
    found["center"][..., 3] += 7.0  # another proposal: the share of boxes counts it, not the error
    both = comparable(expected, found)
    assert both["heat"][0].shape == (1, 5, 19)
    for mine, theirs in both.values():
        assert np.abs(theirs - mine).max() < 2e-4
    wrong = {name: value + 1.0 for name, value in found.items()}
    assert comparable(expected, wrong)["heat"][1] is wrong["heat"], "nothing alike: compared as it is"


@pytest.mark.slow
def test_the_other_heads_and_backbones_are_compared_too(crowded, tmp_path):
    folder = tmp_path / "crowded.edgeattn"
    export_model(crowded, precision="fp16", output=folder, check=False)
    report = validate(folder, latency=False, **QUICK)
    assert report["exit_code"] == 0
    ort = entry(report, "ort")
    assert {each["stage"] for each in ort["modules"]} == set(STAGES)
    assert {"dense_head.center", "dense_head.vel", "dense_head.query_label"} <= {
        each["name"] for each in ort["modules"]
    }
