"""Reports as text, page, JUnit and comparison, from figures that are known."""

from __future__ import annotations

import base64
import json
import math
import re
import xml.etree.ElementTree as xml
from html.parser import HTMLParser

import numpy as np
import pytest

from edgeattn import conditions, records, report
from edgeattn.accuracy import Comparison, band
from edgeattn.errors import (
    AccuracyError,
    BuildError,
    IncompatibleError,
    LatencyError,
    MissingError,
    UnsupportedError,
    UsageError,
)
from edgeattn.gates import judge
from edgeattn.latency import Timing, Warmup, stability, summarise
from edgeattn.records import Report

QUIET = {"busy_s": 0.0, "own_s": 0.0, "clock_s": 0.0, "throttle_count": 0}


def timing(name: str, milliseconds: float, count: int) -> Timing:
    """Return a quiet timing around `milliseconds`."""
    values = milliseconds * np.random.default_rng(0).permutation(np.linspace(0.98, 1.02, count))
    starts = np.cumsum(values) / 1e3
    return Timing(name, Warmup(0.5, 60, True, milliseconds / 1e3), tuple(np.array_split(values, 20)), (starts,))


def compared(name: str, noise: float, nan: int = 0) -> Comparison:
    """Return a comparison of eight samples whose error is `noise`."""
    rng = np.random.default_rng(0)
    comparison = Comparison(name, "float32", classify=True)
    for position in range(8):
        reference = rng.standard_normal((1, 50)).astype(np.float32)
        found = reference + noise * rng.standard_normal((1, 50)).astype(np.float32)
        found[0, :nan] = np.nan
        comparison.update(f"cat-{position}.png", reference, found)
    return comparison


def backend(name: str, comparison: Comparison | None, verdict: str, reason: str = "") -> dict:
    """Return a backend entry; candidates have a band."""
    outputs = [comparison.metrics()] if comparison else []
    if verdict != "reference":
        outputs = [{**output, "band": {"limit": 5e-6, "source": "floor of fp32"}} for output in outputs]
    code = {"pass": 0, "reference": 0}.get(verdict, 6)
    return {
        "name": name, "precision": "fp32", "role": "candidate", "verdict": verdict, "reason": reason,
        "exit_code": code, "outputs": outputs, "modules": [],
    }  # fmt: skip


def result(found: Timing, baseline: Timing) -> dict:
    """Return a latency entry."""
    return {
        "backend": found.name, "precision": "fp32", "scope": "e2e", "graph": False, "batch": 1,
        **summarise(found, baseline), **stability(found, QUIET, QUIET),
        "load_s": 0.25, "memory_mib": 81.0, "energy_mj": None, "energy_rail": None, "samples_file": "validate-0001.npz",
    }  # fmt: skip


def make(noise: float = 4e-7, verdict: str = "pass", nan: int = 0, ort_ms: float = 2.5) -> tuple[Report, dict]:
    """Return a report of one backend beside PyTorch, and its arrays."""
    comparison, torch, ort = compared("logits", noise, nan), timing("torch", 10.0, 300), timing("ort", ort_ms, 1200)
    metrics = comparison.metrics()
    judged = [judge("nan", metrics, 0.0, "none allowed", "ort"), judge("rel", metrics, 5e-6, "floor of fp32", "ort")]
    state = {**conditions.state(), "cpu_mhz": 2600, "temp_c": 51.0}
    spec = {
        "name": "image", "dtype": "float32", "dims": [{"size": size} for size in (1, 3, 8, 8)],
        "preprocess": {"mean": [0.5] * 3, "std": [0.25] * 3},
    }  # fmt: skip
    document = {
        "schema": "edgeattn.validate/1", "verdict": verdict, "exit_code": 0 if verdict == "pass" else 6,
        "bundle": "tiny-fp32.edgeattn", "bundle_sha256": "0" * 64, "edgeattn": "0.1.0",
        "command": ["edgeattn", "validate", "tiny fp32.edgeattn"], "started": "2026-01-01T00:00:00Z",
        "duration_s": 12.5,
        "host": {"device": "Test <CPU>", "os": "Linux", "python": "3.10.1", "cores": 4, "packages": {"numpy": "2.0"}},
        "state": {"before": state, "after": state, "background_cores": 0.1, "threads": 2, "affinity": [0, 1]},
        "model": {"family": "test", "variant": "tiny", "source": "here", "weights_sha256": "seeded"},
        "precision": "fp32", "export_options": {"dims": ["batch=1:4"]}, "inputs": [spec],
        "reference": {"source": "torch fp32", "note": ""},
        "data": {"source": "8 pictures", "samples": 8}, "warnings": ["seeded weights"], "skipped": [],
        "gates": [gate.as_dict() for gate in judged],
        "backends": [backend("torch", None, "reference"), backend("ort", comparison, verdict)],
        "results": [result(torch, torch), result(ort, torch)], "blame": None,
        "html": {"file": None, "skipped": None}, "samples_file": "validate-0001.npz",
    }  # fmt: skip
    arrays = {"error/ort/logits": np.array(comparison.errors), "worst/ort/image": np.zeros((1, 3, 8, 8), np.float32)}
    for found in (torch, ort):
        arrays |= {f"latency/{found.name}/ms": found.samples, f"latency/{found.name}/start_s": found.times}
    return Report(records.plain(document)), arrays


class Page(HTMLParser):
    """What a page refers to, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def cells(line: str) -> list[str]:
    """Split a row of a table at its gaps."""
    return re.split(r" {3,}", line.strip())


def test_the_table_has_the_documented_columns() -> None:
    lines = report.show(make()[0]).splitlines()
    assert cells(lines[0]) == [
        "backend", "outputs", "scaled err (band)", "cosine", "top-1", "NaN", "p50 e2e", "p99 e2e", "vs torch",
        "verdict",
    ]  # fmt: skip
    assert cells(lines[1]) == ["torch", "-", "(reference)", "-", "-", "-", "10.00 ms", "-", "1.0x", "-"]
    row = cells(lines[2])
    assert row[:2] == ["ort", "1"]
    assert re.fullmatch(r"[34]\.\de-07 \(5\.0e-06\)", row[2])
    assert row[3:6] == ["1.000000", "8/8", "0"]
    assert row[6] == "2.50 ms"
    assert row[8:] == ["4.0x", "PASS"]
    assert lines[-1] == "verdict: PASS (accuracy, latency)"
    assert "2 of 4 threads, 2600 MHz, 51 C" in lines[-2]


def test_without_a_thousand_samples_the_tail_is_p95() -> None:
    document, _ = make()
    document["results"] = document["results"][:1]
    assert "p95 e2e" in report.show(document)


def test_a_failure_names_gate_value_and_limit() -> None:
    text = report.show(make(noise=0.3, verdict="fail", nan=2)[0])
    assert "ort logits: nan 16, limit 0 (none allowed)" in text
    assert re.search(r"ort logits: rel 0\.\d+, limit 5e-06 \(floor of fp32\)", text)
    assert text.splitlines()[-1] == "verdict: FAIL (accuracy, latency)"


def test_numbers_that_are_not_finite_are_text_in_json() -> None:
    document, _ = make(noise=0.0)
    assert document["backends"][1]["outputs"][0]["snr_db"] == "inf"
    json.dumps(document, allow_nan=False)
    assert math.isinf(records.number("inf"))
    assert report.show(document)


def test_bench_table_has_intervals() -> None:
    document, _ = make()
    document["schema"] = "edgeattn.bench/1"
    lines = report.show(document).splitlines()
    assert cells(lines[0])[2:7] == ["p50", "p90", "p95", "p99", "max"]
    assert re.search(r"4\.0x \((3\.9|4\.0)\d-4\.0\d\)", lines[2])


def test_documents_of_other_verbs_are_outlined() -> None:
    text = report.show({"schema": "edgeattn.export/1", "verdict": "pass", "stages": [1, 2]})
    assert "2 entries" in text


def test_diff_tells_how_much_changed() -> None:
    old, new = make()[0], make(noise=8e-7, ort_ms=5.0)[0]
    changes = report.diff(old, new)
    assert changes["outputs"][0]["factor"] == pytest.approx(2.0, rel=0.05)
    assert {entry["backend"]: round(entry["factor"], 2) for entry in changes["latencies"]} == {"torch": 1.0, "ort": 2.0}
    text = report.show_diff(changes)
    assert "+100.0 %" in text
    assert text.splitlines()[-1] == "verdict: pass -> pass"
    new["backends"][1]["name"] = "rtx"
    assert report.diff(old, new)["only_new"] == ["rtx"]


def test_junit_tells_failures_from_skips(tmp_path) -> None:
    document, _ = make(noise=0.3, verdict="fail")
    document["backends"].append(backend("rtx", None, "skipped", "rtx is not installed"))
    report.junit(document, tmp_path / "junit.xml")
    suite = xml.parse(tmp_path / "junit.xml").getroot()
    assert [suite.get(key) for key in ("tests", "failures", "skipped")] == ["3", "1", "1"]
    assert suite.find("testcase/skipped").get("message") == "rtx is not installed"


def test_the_page_needs_no_network_and_tells_the_verdict_first() -> None:
    document, arrays = make()
    text = report.html(document, arrays)
    page = Page(text)
    assert page.references
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert page.text.index("PASS") < page.text.index("What was compared")
    for expected in ("2.50 ms", "4.0x", "limit 5.0e-06", "Test <CPU>", "seeded weights", "cat-", "8 pictures"):
        assert expected in page.text, expected
    assert "edgeattn validate 'tiny fp32.edgeattn'" in page.text
    assert "edgeattn export tiny --precision fp32 --dim batch=1:4 -o 'tiny fp32.edgeattn'" in page.text
    pictures = [base64.b64decode(item.partition(",")[2]) for item in page.references]
    assert sum(picture.startswith(b"<?xml") for picture in pictures) == 4
    assert sum(picture.startswith(b"\x89PNG") for picture in pictures) == 1


def test_the_page_of_a_failure_names_it_before_anything_else() -> None:
    text = Page(report.html(*make(noise=0.3, verdict="fail", nan=1))).text
    assert text.index("ort logits: rel") < text.index("What was compared")
    assert "FAIL" in text


def test_a_page_without_its_samples_says_so() -> None:
    page = Page(report.html(make()[0], {}))
    assert "validate-0001.npz is not beside the report" in page.text


def test_the_same_report_gives_the_same_page() -> None:
    document, arrays = make()
    assert report.html(document, arrays) == report.html(document, arrays)


def test_pages_are_for_measurements_only() -> None:
    with pytest.raises(UsageError, match="only reports of validate and bench"):
        report.html({"schema": "edgeattn.export/1"}, {})


def test_stored_reports_are_found_again(tmp_path) -> None:
    document, arrays = make()
    (tmp_path / "reports").mkdir()
    for _ in range(2):
        path = records.save(document, arrays, tmp_path / "reports")
    found, samples = records.read(tmp_path)
    assert path.name == "validate-0002.json"
    assert (found, found.path, found.verb) == (document, path, "validate")
    assert (samples["latency/ort/ms"] == arrays["latency/ort/ms"]).all()
    assert report.show(found).splitlines()[-1].startswith(f"report: {path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a readable report"), ("[]", "no schema"), ('{"a": 1}', "no schema"), (None, "does not exist")],
)
def test_unreadable_reports(tmp_path, content, message) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        records.read(path)


def test_a_report_names_no_samples_outside_its_folder(tmp_path) -> None:
    document, arrays = make()
    np.savez(tmp_path / "secret.npz", **arrays)
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / "report.json"
    path.write_text(json.dumps({**document, "samples_file": "../secret.npz"}))
    assert records.read(path)[1] == {}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (3, MissingError), (4, UnsupportedError), (5, BuildError), (6, AccuracyError), (7, LatencyError),
        (8, IncompatibleError),
    ],
)  # fmt: skip
def test_a_verdict_becomes_the_exception_of_its_exit_code(code, kind) -> None:
    document, _ = make(noise=0.3, verdict="fail")
    document["exit_code"] = code
    with pytest.raises(kind, match=r"tiny-fp32\.edgeattn: fail: ort logits: rel") as caught:
        document.raise_for_verdict()
    assert caught.value.exit_code == code


def test_times_keep_their_digits() -> None:
    shown = [report.milliseconds(value) for value in (None, 0.0123, 0.5, 12.345, 1234.5)]
    assert shown == ["-", "0.012 ms", "0.50 ms", "12.35 ms", "1234 ms"]


def test_bands_are_those_of_the_reports() -> None:
    assert band("fp32").limit == make()[0]["backends"][1]["outputs"][0]["band"]["limit"]
