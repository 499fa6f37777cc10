"""ONNX statements for `h_t = exp(g_t) h_(t-1) + x_t` along a static axis: many tokens per operator, few operators.

Values are [b, k, l, d] in natural order; direction 0 of the k visits the tokens forwards, 1 backwards.
"""

import math
from collections.abc import Sequence

from edgeattn.kernels._statements import Statements

# A triangular product needs exp of sums of log decays in both directions: nine tokens, counted from the middle one,
# with each log decay held above -16 (an error of 1e-7 of the state) stay within exp(64).
_PRODUCT_TOKENS = 9
_PRODUCT_RANGE = 64.0


def recurrence(body: Statements, log_decay: str, drive: str, directions: Sequence[int], length: int, width: int) -> str:
    """Append the recurrence; return all states, [b, k, l, d]."""
    if length <= _PRODUCT_TOKENS:
        return _product(body, log_decay, drive, directions, length)
    steps = math.isqrt(length - 1) + 1
    visits = _visits(directions, length, -(-length // steps) * steps)
    flat = body.const([0, len(directions) * length, width])
    chunks = body.const([[row[start : start + steps] for start in range(0, len(row), steps)] for row in visits])
    # Gathering rows costs a tenth of a negative-step Slice, and pads and cuts into chunks on the way.
    log_decay, drive = (
        body.add("Gather", body.add("Reshape", value, flat), chunks, axis=1) for value in (log_decay, drive)
    )  # [b, k, chunks, steps, d]
    states = _two_level(body, log_decay, drive, len(visits[0]) // steps, steps)
    padded = len(directions) * len(visits[0])
    return body.add(
        "Gather",
        body.add("Reshape", states, body.const([0, padded, width])),
        body.const(_returns(directions, visits, length)),
        axis=1,
    )


def _product(body: Statements, log_decay: str, drive: str, directions: Sequence[int], length: int) -> str:
    """Append `h_t = r_t sum_(s <= t) x_s / r_s` with r_t = exp(sum of g between the middle token and t)."""
    middle = (length - 1) // 2
    until = [[[float(before >= 0) for before in _ahead(way, t, length)] for t in range(length)] for way in directions]
    centre = [row[length - 1 - middle if way else middle] for way, row in zip(directions, until, strict=True)]
    since = [
        [[a - b for a, b in zip(row, mid, strict=True)] for row in rows]
        for rows, mid in zip(until, centre, strict=True)
    ]
    floor = -_PRODUCT_RANGE / max(length - 1 - middle, 1)
    held = body.add("Clip", log_decay, body.const(floor, "float"))
    decay = body.add("Exp", body.add("MatMul", body.const(since, "float"), held))
    entered = body.add("MatMul", body.const(until, "float"), body.add("Div", drive, decay))
    return body.add("Mul", decay, entered)


def _ahead(way: int, t: int, length: int) -> list[int]:
    """Return for every token how many steps before token t it is visited, negative if later."""
    return [s - t if way else t - s for s in range(length)]


def _two_level(body: Statements, log_decay: str, drive: str, chunks: int, steps: int) -> str:
    """Append the recurrence over [b, k, chunks, steps, d] in visiting order; return all states in that layout.

    Chunks are scanned at once from zero; their last states, carried on, enter every later step with the product of
    decays since the chunk began: exp of a running sum, which a triangular product gives for all steps.
    """
    local = _unrolled(body, body.add("Exp", log_decay), drive, 3, steps)
    states = body.add("Concat", *local, axis=3)
    lower = [[float(s <= t) for s in range(steps)] for t in range(steps)]
    since = body.add("Exp", body.add("MatMul", body.const(lower, "float"), log_decay))
    last = body.add("Gather", since, body.const([steps - 1]), axis=3)  # [b, k, chunks, 1, d]
    carried = _unrolled(body, last, local[-1], 2, chunks)[:-1]
    entering = body.add("Pad", body.add("Concat", *carried, axis=2), body.const([0, 0, 1, *[0] * 7]))
    return body.add("Add", states, body.add("Mul", since, entering))


def _unrolled(body: Statements, decay: str, drive: str, axis: int, count: int) -> list[str]:
    """Append one step after the other along `axis`; return the states."""
    decays, states = body.split(decay, axis, count), body.split(drive, axis, count)
    for t in range(1, count):
        states[t] = body.add("Add", body.add("Mul", decays[t], states[t - 1]), states[t])
    return states


def _visits(directions: Sequence[int], length: int, padded: int) -> list[list[int]]:
    """Return the row of [k l] visited at every step per direction; steps past the end revisit the last, unread."""
    orders = [range(length - 1, -1, -1) if way else range(length) for way in directions]
    return [
        [place + length * k for place in (*order, *[order[-1]] * (padded - length))] for k, order in enumerate(orders)
    ]


def _returns(directions: Sequence[int], visits: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Return for every direction and token the row of [k steps] that holds its state."""
    padded = len(visits[0])
    return [[k * padded + (length - 1 - t if way else t) for t in range(length)] for k, way in enumerate(directions)]
