"""The pictures of a report page: vector charts and the worst input, each as a data address that needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from edgeattn.boxes import corners, rectangles

Array = NDArray[Any]
# Distinguishable for colour-blind readers and in grey print; backends keep theirs on every chart.
COLORS = {"torch": "#7a8591", "torch.compile": "#b7791f", "torch16": "#a8927a", "torch-bf16": "#a8927a"}
_PALETTE = ("#1f6fb2", "#2f8f5b", "#c2570c", "#7d4fa0")
_LIMIT = "#b42318"
_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#98a2b3",
    "axes.labelcolor": "#475467", "xtick.color": "#475467", "ytick.color": "#475467", "axes.grid": True,
    "grid.color": "#e4e7ec", "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
    "svg.fonttype": "path", "svg.hashsalt": "edgeattn", "axes.titlesize": 9, "legend.fontsize": 8.5,
}  # fmt: skip
_WIDTH, _HEIGHT = 5.4, 2.7
_MOST_POINTS = 1500
# A cloud from above: side of the picture, and how many of its points are drawn.
_ABOVE = 8.0
_MOST_CLOUD_POINTS = 60_000
# The share of elements that is the thickness of a line: rarer bins do not widen the axis.
_VISIBLE = 5e-4
# Below this a float32 error is no error; exact samples are drawn here, as a logarithmic axis has no zero.
_SMALLEST = 1e-12


def color(name: str) -> str:
    """Return the colour of a backend."""
    known = ("ort", "tensorrt", "rtx")
    return COLORS.get(name) or _PALETTE[known.index(name) if name in known else -1]


def sample_errors(errors: Mapping[str, Array], limits: Mapping[str, float]) -> str:
    """Draw the scaled error of every sample per backend, with the band; samples that are not finite sit at the top."""
    with _chart("sample, in order", "scaled error") as (figure, axes):
        for name, values in errors.items():
            finite = np.isfinite(values)
            shown = np.where(finite, np.maximum(values, _SMALLEST), np.nan)
            position = np.arange(1, len(values) + 1)
            axes.plot(
                position, shown, marker=".", linewidth=0.8, color=color(name), label=name, rasterized=len(values) > 2000
            )
            if not finite.all():
                top = [0.97] * int((~finite).sum())
                place = axes.get_xaxis_transform()
                axes.plot(position[~finite], top, "x", color=_LIMIT, transform=place, label=f"{name}: not finite")
        for limit in sorted(set(limits.values())):
            if limit > 0:
                axes.axhline(limit, color=_LIMIT, linewidth=1, linestyle=(0, (4, 3)), label=f"limit {limit:.1e}")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        _widen(axes)
        _legend(axes)
        return _svg(figure)


def error_histogram(histograms: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw how many output elements have which error, relative to the RMS of their reference."""
    with _chart("error of an element / RMS of the reference", "share of elements") as (figure, axes):
        for name, histogram in histograms.items():
            counts = np.array(histogram["counts"], float)
            total = counts.sum() + histogram["exact"]
            edges = 10 ** (histogram["log10_low"] + histogram["log10_step"] * np.arange(len(counts) + 1))
            exact = f" ({100 * histogram['exact'] / total:.0f} % exact)" if total and histogram["exact"] else ""
            axes.stairs(counts / max(1.0, total), edges, color=color(name), fill=True, alpha=0.25)
            axes.stairs(counts / max(1.0, total), edges, color=color(name), label=name + exact)
            used = np.flatnonzero(counts > total * _VISIBLE)
            if len(used):
                axes.set_xlim(edges[max(0, used[0] - 2)], edges[min(len(edges) - 1, used[-1] + 3)])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        _legend(axes)
        return _svg(figure)


def distribution(times: Mapping[str, Array]) -> str:
    """Draw one row per backend: every call, the middle half as a box, and the median."""
    height = 1.1 + 0.55 * len(times)
    with _chart("milliseconds per call", "", height) as (figure, axes):
        random = np.random.default_rng(0)
        for row, (name, values) in enumerate(times.items()):
            chosen = values[np.linspace(0, len(values) - 1, min(len(values), _MOST_POINTS)).astype(int)]
            jitter = row + random.uniform(-0.26, 0.26, len(chosen))
            axes.plot(chosen, jitter, ".", color=color(name), alpha=0.25, markersize=3, rasterized=True)
            p25, p50, p75 = np.percentile(values, (25, 50, 75))
            axes.plot([p25, p75], [row, row], color="#101828", linewidth=5, alpha=0.75, solid_capstyle="butt")
            axes.plot([p50], [row], "o", color="white", markeredgecolor="#101828", markersize=5)
        axes.set_yticks(range(len(times)), list(times))
        axes.set_ylim(len(times) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        _time_axis(axes, "x", times)
        return _svg(figure)


def timeline(times: Mapping[str, Array], starts: Mapping[str, Array]) -> str:
    """Draw every call at the second it began: drift and disturbances show as steps and bursts."""
    with _chart("seconds since the first round", "milliseconds per call") as (figure, axes):
        for name, values in times.items():
            chosen = np.linspace(0, len(values) - 1, min(len(values), _MOST_POINTS)).astype(int)
            place = starts[name][chosen]
            axes.plot(place, values[chosen], ".", color=color(name), label=name, rasterized=True, markersize=3)
        _time_axis(axes, "y", times)
        _legend(axes)
        return _svg(figure)


def picture(values: Array, preprocess: Mapping[str, Any] | None) -> str | None:
    """Return the first image of an input [n, 3, h, w] as PNG, normalisation undone; None for another shape."""
    if values.ndim != 4 or values.shape[1] != 3:
        return None
    image = np.nan_to_num(values[0].astype(np.float64).transpose(1, 2, 0))
    if preprocess:
        image = image * np.array(preprocess["std"]) + np.array(preprocess["mean"])
    else:
        image = (image - image.min()) / max(1e-12, float(np.ptp(image)))
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, image.clip(0, 1), format="png")
    return _address("image/png", buffer.getvalue())


def birds_eye(points: Array, expected: Array, found: Array, name: str, low: Array, high: Array) -> str:
    """Draw points [n, 3 or more] from above under boxes [m, 7 or more]: of PyTorch, wide, and of `name`, thin on top.

    A line from the middle of a box to its front shows the heading; `low` and `high` are the corners (x, y) of what the
    detector sees.
    """
    with _chart("x in metres", "y in metres", _ABOVE, _ABOVE) as (figure, axes):
        seen = points[((points[:, :2] >= low) & (points[:, :2] <= high)).all(1)]
        chosen = seen[np.linspace(0, len(seen) - 1, min(len(seen), _MOST_CLOUD_POINTS)).astype(int)]
        size = 3.0 if len(chosen) < 5000 else 0.4
        axes.scatter(chosen[:, 0], chosen[:, 1], s=size, c="#98a2b3", linewidths=0, rasterized=True)
        for label, boxes, shade, width in (
            ("PyTorch", expected, "#f0a35e", 2.6),
            (name, found, color(name), 0.9),
        ):
            _boxes(axes, boxes, shade, width, f"{label}: {len(boxes)} boxes")
        axes.set_aspect("equal")
        margin = 0.03 * (high - low)
        axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        _legend(axes)
        return _svg(figure)


def _boxes(axes: Axes, boxes: Array, shade: str, width: float, label: str) -> None:
    """Draw the outlines of boxes [n, 7 or more], and their headings."""
    outlines = corners(rectangles(boxes))
    fronts = np.stack([boxes[:, :2], outlines[:, [0, 3]].mean(1)], 1)
    axes.add_collection(PolyCollection(list(outlines), facecolors="none", edgecolors=shade, linewidths=width))
    axes.add_collection(LineCollection(list(fronts), colors=shade, linewidths=width / 2))
    axes.plot([], [], color=shade, linewidth=width, label=label)


@contextmanager
def _chart(below: str, beside: str, height: float = _HEIGHT, width: float = _WIDTH) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(below)
        axes.set_ylabel(beside)
        yield figure, axes


def _time_axis(axes: Axes, which: str, times: Mapping[str, Array]) -> None:
    """Show milliseconds, logarithmic when the backends lie far apart; say how many calls lie beyond the axis."""
    values = np.concatenate(list(times.values()))
    low, high = float(values.min()), float(np.percentile(values, 99.8))
    medians = [float(np.median(each)) for each in times.values()]
    axis = axes.xaxis if which == "x" else axes.yaxis
    limits = axes.set_xlim if which == "x" else axes.set_ylim
    if max(medians) > 5 * min(medians):
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
        limits(low * 0.8, high * 1.3)
    else:
        limits(0, high * 1.1)
    beyond = int((values > (axes.get_xlim() if which == "x" else axes.get_ylim())[1]).sum())
    if beyond:
        text = f"{beyond} {'call' if beyond == 1 else 'calls'} beyond, up to {values.max():.0f} ms"
        axes.annotate(text, (1, 1), xycoords="axes fraction", ha="right", va="bottom", fontsize=7.5, color="#667085")


def _widen(axes: Axes) -> None:
    """Give a logarithmic axis at least two decades, so that noise does not look like structure."""
    low, high = axes.get_ylim()
    if high / max(low, 1e-300) < 100:
        middle = (low * high) ** 0.5
        low, high = min(low, middle / 10), max(high, middle * 10)
    axes.set_ylim(low / 1.5, high * 1.5)


def _legend(axes: Axes) -> None:
    """Put the legend above the plot, where it covers nothing."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=min(4, len(handles)), borderaxespad=0.2, handlelength=1.6
        )


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=150, transparent=True)
    return _address("image/svg+xml", buffer.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
