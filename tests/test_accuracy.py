"""Metrics against a second computation over the whole data, bands, and what must always fail."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgeattn import gates
from edgeattn.accuracy import FLOORS, Comparison, band
from edgeattn.errors import UsageError

SAMPLES, CLASSES = 12, 100


def pairs(seed: int = 0, noise: float = 1e-3) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return reference and candidate logits of varying magnitude."""
    rng = np.random.default_rng(seed)
    found = []
    for position in range(SAMPLES):
        reference = (position + 1) * rng.standard_normal((1, CLASSES)).astype(np.float32)
        found.append((reference, reference + noise * rng.standard_normal((1, CLASSES)).astype(np.float32)))
    return found


def compare(stream: list[tuple[np.ndarray, np.ndarray]], dtype: str = "float32") -> Comparison:
    """Feed a whole stream to a classifier's comparison."""
    comparison = Comparison("logits", dtype, classify=True)
    for position, (reference, candidate) in enumerate(stream):
        comparison.update(f"s{position}", reference, candidate)
    return comparison


def test_streamed_metrics_equal_those_of_the_whole() -> None:
    stream = pairs()
    metrics = compare(stream).metrics()
    reference = np.concatenate([a for a, _ in stream]).astype(np.float64)
    found = np.concatenate([b for _, b in stream]).astype(np.float64)
    error = found - reference
    assert metrics["scaled_err"] == pytest.approx(np.sqrt((error**2).mean()) / np.sqrt((reference**2).mean()))
    assert metrics["abs_max"] == pytest.approx(np.abs(error).max())
    cosine = (reference * found).sum() / np.linalg.norm(reference) / np.linalg.norm(found)
    assert metrics["cosine"] == pytest.approx(cosine, abs=1e-12)
    assert metrics["snr_db"] == pytest.approx(10 * np.log10((reference**2).sum() / (error**2).sum()))
    assert (metrics["nan"], metrics["inf"], metrics["problems"]) == (0, 0, [])
    assert sum(metrics["histogram"]["counts"]) + metrics["histogram"]["exact"] == SAMPLES * CLASSES


def test_agreement_counts_rows() -> None:
    rng = np.random.default_rng(1)
    reference, found = rng.standard_normal((40, CLASSES)), rng.standard_normal((40, CLASSES))
    found[:30] = reference[:30]  # ten rows are unrelated
    top1 = (reference.argmax(1) == found.argmax(1)).mean()
    top5 = np.mean([best in order[-5:] for best, order in zip(reference.argmax(1), found.argsort(1), strict=True)])
    metrics = compare([(reference, found)], "float64").metrics()
    assert (metrics["top1"], metrics["top5"], metrics["rows"]) == (top1, top5, 40)
    assert 0.7 < top1 < 0.9


def test_feature_maps_have_no_top1() -> None:
    comparison = Comparison("features", "float32", classify=True)
    comparison.update("a", np.ones((1, 64, 7, 7), np.float32), np.ones((1, 64, 7, 7), np.float32))
    assert comparison.metrics()["top1"] is None


def test_worst_sample_and_index_are_named() -> None:
    stream = pairs()
    stream[7][1][0, 42] += 5.0
    metrics = compare(stream).metrics()
    assert (metrics["worst_sample"], metrics["worst_index"]) == ("s7", [0, 42])
    assert metrics["worst_top5"]["reference"] == np.argsort(-stream[7][0][0])[:5].tolist()


def test_identical_outputs_are_exact() -> None:
    metrics = compare([(a, a) for a, _ in pairs()]).metrics()
    assert (metrics["scaled_err"], metrics["abs_max"], metrics["top1"]) == (0.0, 0.0, 1.0)
    assert metrics["snr_db"] == math.inf
    assert metrics["cosine"] == pytest.approx(1.0, abs=1e-15)
    assert metrics["histogram"]["exact"] == SAMPLES * CLASSES


def test_nan_and_inf_are_counted_and_are_the_worst() -> None:
    stream = pairs()
    stream[3][1][0, 5] = np.nan
    stream[4][1][0, 6:8] = np.inf
    metrics = compare(stream).metrics()
    assert (metrics["nan"], metrics["inf"]) == (1, 2)
    assert (metrics["worst_sample"], metrics["worst_index"]) == ("s3", [0, 5])
    assert math.isfinite(metrics["scaled_err"])
    assert not gates.judge("nan", metrics, 0, "", "ort").passed


def test_a_reference_that_is_not_finite_is_seen() -> None:
    stream = pairs()
    stream[0][0][0, 0] = np.inf
    assert compare(stream).metrics()["reference_nonfinite"] == 1


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (np.zeros((1, CLASSES + 1), np.float32), "shape [1, 101], expected [1, 100]"),
        (np.zeros((1, CLASSES), np.float16), "dtype float16, expected float32"),
    ],
    ids=["shape", "dtype"],
)
def test_wrong_shape_or_dtype_is_a_problem(found: np.ndarray, text: str) -> None:
    comparison = compare([(np.zeros((1, CLASSES), np.float32), found)])
    assert comparison.metrics()["problems"] == [f"s0: {text}"]


def test_constant_zero_output_does_not_pass() -> None:
    metrics = compare([(a, np.zeros_like(a)) for a, _ in pairs()]).metrics()
    assert metrics["scaled_err"] == pytest.approx(1.0)
    assert metrics["cosine"] == 0.0
    assert metrics["top1"] < 0.5


@pytest.mark.parametrize("precision", FLOORS)
def test_band_is_the_floor_without_a_measured_error(precision: str) -> None:
    assert band(precision).limit == FLOORS[precision]
    assert "floor" in band(precision).source


def test_band_follows_the_error_of_pytorch_itself() -> None:
    assert band("fp16", 1e-3).limit == pytest.approx(4e-3)
    assert "4 x torch fp16" in band("fp16", 1e-3).source
    assert band("fp16", 1e-6).limit == FLOORS["fp16"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_band_accepts_rounding_and_refuses_mistakes(dtype: str) -> None:
    """One rounding of the outputs passes; a relative mistake of 1 % in one channel in ten does not."""
    stream = [(a, a.astype(np.float64).astype(dtype)) for a, _ in pairs()]
    rounded = compare(stream, dtype).metrics()["scaled_err"]
    limit = band("fp32" if dtype == "float32" else "fp16").limit
    assert rounded <= limit
    wrong = [(a, (a * (1 + 0.01 * (np.arange(CLASSES) % 10 == 0))).astype(dtype)) for a, _ in stream]
    assert compare(wrong, dtype).metrics()["scaled_err"] > limit


def test_gate_options_are_read_with_units() -> None:
    assert gates.accuracy_limits(["rel=1e-3", "top1=99%", "snr=40"]) == {"rel": 1e-3, "top1": 0.99, "snr": 40.0}
    assert gates.latency_limits(["p50=4ms", "p99=0.1s", "memory=2GiB"]) == {"p50": 4.0, "p99": 100.0, "memory": 2048.0}
    assert (gates.share("3%"), gates.share(0.03)) == (pytest.approx(0.03), pytest.approx(0.03))
    assert (gates.seconds("500ms"), gates.seconds(3)) == (0.5, 3.0)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (gates.accuracy_limits, "rell=1", "no such gate; did you mean rel"),
        (gates.accuracy_limits, "rel", "write NAME=VALUE"),
        (gates.accuracy_limits, "rel=abc", "not a number"),
        (gates.accuracy_limits, "rel=1.2.3", "not a number"),
        (gates.latency_limits, "p50=4", "unit of us, ms"),
        (gates.latency_limits, "p50=4MiB", "unit of us, ms"),
        (gates.latency_limits, "p51=4ms", "did you mean p95 or p50"),
    ],
)
def test_unreadable_gates_are_usage_errors(read, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read([text])


def test_an_unmeasured_value_fails_its_gate() -> None:
    assert not gates.at_most("memory", None, 1.0, "", "ort").passed
    assert not gates.at_most("rel", math.nan, 1.0, "", "ort").passed
    assert not gates.at_least("top1", None, 0.5, "", "ort").passed
    assert gates.at_least("snr", math.inf, 40.0, "", "ort").passed
