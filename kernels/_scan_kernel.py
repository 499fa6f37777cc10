"""Pieces of the selective scan's kernel: loads, step sizes, and the scan of a tile in either direction.

A tile is [channels, tokens]. A lane holds runs of four tokens: a recurrence is then serial inside a lane, and one
element in four takes part in the logarithmic scan over the lanes (a quarter of the shuffles, half of the registers).
"""

from __future__ import annotations

from edgeattn.kernels._triton import jit, tl


@jit
def load_tokens(rows, start, length, C: tl.constexpr, BL: tl.constexpr):
    """Return the tokens from `start` on, [C, BL] in float32, of the row at pointer `rows`: one, or one for every lane.

    A lane reads its four tokens one by one, because rows need not be aligned. Lanes are numbered flat, so that any
    compiler lays them along the tokens. Positions past the end are clamped: a mask costs twice the instructions, and
    every value is one of the row.
    """
    first = start + 4 * (tl.arange(0, C * BL // 4) % (BL // 4))
    a = tl.load(rows + tl.minimum(first, length - 1))
    b = tl.load(rows + tl.minimum(first + 1, length - 1))
    c = tl.load(rows + tl.minimum(first + 2, length - 1))
    d = tl.load(rows + tl.minimum(first + 3, length - 1))
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [C, BL]).to(tl.float32)


@jit
def softplus(x):
    """Return log(1 + exp(x)) with full relative precision: steps near 0.001 are common, and GPU logarithms are not.

    log(1 + z) / z for z = exp(-|x|) <= 1 is interpolated at ten Chebyshev points of [0, 1]: 1.3e-7 in float32.
    """
    z = tl.exp(-tl.abs(x))
    high = -0.152696699 + z * (0.105436236 + z * (-0.0563736111 + z * (0.0195425265 - z * 0.00317605701)))
    series = 1.0 + z * (-0.499998927 + z * (0.333297104 + z * (-0.249516159 + z * (0.196632743 + z * high))))
    return tl.maximum(x, 0.0) + z * series


@jit
def compose(decay, drive, next_decay, next_drive):
    """Return the map h -> decay h + drive followed by the next one."""
    return decay * next_decay, drive * next_decay + next_drive


@jit
def states_of(decay, drive, entering, BACK: tl.constexpr):
    """Return every state [c, BL] of h = decay h + drive from `entering` [c], and the last one [c]."""
    products, sums = tl.associative_scan((decay, drive), 1, compose, reverse=BACK)
    states = sums + products * entering[:, None]
    last = 0 if BACK else decay.shape[1] - 1
    columns = tl.arange(0, decay.shape[1])
    return states, tl.sum(tl.where(columns[None, :] == last, states, 0.0), 1)


@jit
def take(table, column):
    """Return one column [c] of `table` [c, width], which lies in registers."""
    columns = tl.arange(0, table.shape[1])
    return tl.sum(tl.where(columns[None, :] == column, table, 0.0), 1)


@jit
def put(table, column, values):
    """Return `table` [c, width] with `values` [c] in one column."""
    columns = tl.arange(0, table.shape[1])
    return tl.where(columns[None, :] == column, values[:, None], table)


@jit
def visit(
    x,
    tensors,
    place,
    start,
    running,
    way: tl.constexpr,
    WAYS: tl.constexpr,
    k: tl.constexpr,
    s: tl.constexpr,
    soft: tl.constexpr,
):
    """Scan a tile x in one direction: return what it adds to y, and `running` with the states that leave the tile.

    State n of direction i is in column i s + n of `running` [c, width]; bit i of WAYS is 1 if i goes backwards.
    """
    delta, A, Bm, Cm, Dskip, delta_bias = tensors
    item, channels, lanes, d, length = place
    source = item * k + way
    step = load_tokens(delta + (source * d + lanes) * length, start, length, x.shape[0], x.shape[1])
    step += tl.load(delta_bias + way * d + channels)[:, None]
    if soft:
        step = softplus(step)
    # A step of zero leaves the state as it is: that of the last token reaches the end of the tile.
    step = tl.where((start + tl.arange(0, x.shape[1]) < length)[None, :], step, 0.0)
    y = x * tl.load(Dskip + way * d + channels)[:, None]
    for n in range(s):
        rate = tl.load(A + (way * d + channels) * s + n) * 1.4426950408889634  # log2(e)
        enter = load_tokens(Bm + (source * s + n) * length, start, length, x.shape[0], x.shape[1])
        leave = load_tokens(Cm + (source * s + n) * length, start, length, x.shape[0], x.shape[1])
        entering = take(running, way * s + n)
        decay = tl.exp2(step * rate[:, None])
        states, last = states_of(decay, step * x * enter, entering, ((WAYS >> way) & 1) == 1)
        running = put(running, way * s + n, last)
        y += states * leave
    return y, running


@jit
def retreat(
    u,
    tensors,
    place,
    start,
    running,
    WAYS: tl.constexpr,
    j: tl.constexpr,
    k: tl.constexpr,
    s: tl.constexpr,
    soft: tl.constexpr,
    BL: tl.constexpr,
):
    """Return `running` with the states that leave the BL tokens from `start` on the left, in backward directions."""
    item, _, lanes, d, length = place
    for way in tl.static_range(k):
        if (WAYS >> way) & 1:
            x = load_tokens(u + ((item * j + way % j) * d + lanes) * length, start, length, running.shape[0], BL)
            _, running = visit(x, tensors, place, start, running, way, WAYS, k, s, soft)
    return running
