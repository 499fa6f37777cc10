"""ONNX statements for `h_t = a_t h_(t-1) + b_t` along a static axis: many tokens per operator, few operators."""

import math

from edgeattn.kernels._statements import Statements

_UNROLLED = 10  # up to this length plain unrolling has fewer nodes


def chunk_of(length: int) -> int:
    """Return the steps per chunk of the outermost level."""
    return length if length <= _UNROLLED else math.isqrt(length - 1) + 1


def two_level(body: Statements, log_decay: str, decay: str, drive: str, chunks: int, steps: int) -> str:
    """Append the recurrence over values [b, k, chunks, steps, d]; return all states in the same layout.

    Chunks are scanned at once from zero; their last states, carried on, enter every later step with the product of
    decays since the chunk began: exp of a running sum, which a triangular product gives for all steps.
    """
    local = _unrolled(body, decay, drive, 3, steps)
    states = body.add("Concat", *local, axis=3)
    if chunks == 1:
        return states
    lower = [[float(column <= row) for column in range(steps)] for row in range(steps)]
    since = body.add("Exp", body.add("MatMul", body.const(lower, "float"), log_decay))
    last = body.add("Gather", since, body.const([steps - 1]), axis=3)  # [b, k, chunks, 1, d]
    carried = _unrolled(body, last, local[-1], 2, chunks)[:-1]
    entering = body.add("Concat", *carried, axis=2)
    entering = body.add("Pad", entering, body.const([0, 0, 1, 0, 0, 0, 0, 0, 0, 0]))  # nothing enters the first
    return body.add("Add", states, body.add("Mul", since, entering))


def _unrolled(body: Statements, decay: str, drive: str, axis: int, count: int) -> list[str]:
    """Append one step after the other along `axis`; return the states."""
    decays, states = body.split(decay, axis, count), body.split(drive, axis, count)
    for t in range(1, count):
        states[t] = body.add("Add", body.add("Mul", decays[t], states[t - 1]), states[t])
    return states
