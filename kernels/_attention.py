"""Attention over an index policy: the loads, online softmax and products that the attention kernels share.

An op's kernel states its policy: where the rows of its queries and keys are, which keys count for which query, and
where results go. Here is what one program does with a block of them (Milakov and Gimelshein, arXiv 1805.02867; Dao et
al., arXiv 2205.14135): scores, softmax and sums in float32, products in the type of the inputs.
"""

from __future__ import annotations

from edgeattn.kernels._triton import jit, tl

__all__ = ["absorb", "begin", "load_rows", "store_rows"]


@jit
def load_rows(tensor, places, inside, pitch, step, first, width: tl.constexpr, BLOCK: tl.constexpr):
    """Load BLOCK channels, from `first` on, of the rows at `places`: [rows, BLOCK], zero outside.

    Channel j of row p is at `p * pitch + j * step`: a map has pitch 1 and step h w, a table of voxels step 1.
    """
    channels = first + tl.arange(0, BLOCK)[None, :]
    return tl.load(
        tensor + places[:, None] * pitch + channels * step, mask=inside[:, None] & (channels < width), other=0.0
    )


@jit
def store_rows(tensor, rows, places, inside, pitch, step, first, width: tl.constexpr, BLOCK: tl.constexpr):
    """Store [rows, BLOCK] to where `load_rows` would read it, in the type of the tensor."""
    channels = first + tl.arange(0, BLOCK)[None, :]
    place = tensor + places[:, None] * pitch + channels * step
    tl.store(place, rows.to(tensor.dtype.element_ty), mask=inside[:, None] & (channels < width))


@jit
def begin(BN: tl.constexpr, BE: tl.constexpr):
    """Return the state of BN queries before any key: highest score, sum of weights, sum of weighted values."""
    # Finite, so that a block without a key that counts leaves the state as it is instead of making it NaN.
    return tl.full([BN], -3e38, tl.float32), tl.zeros([BN], tl.float32), tl.zeros([BN, BE], tl.float32)


@jit
def absorb(top, total, mixed, queries, keys, values, keep, scale: tl.constexpr):
    """Return the state after a block of keys: queries [BN, d], keys [BM, d], values [BM, e], keep [BN or 1, BM]."""
    # ieee: TF32 would cost float32 callers three digits. Scores count in powers of two: exp2 is one instruction.
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * 1.4426950408889634)
    scores = tl.where(keep, scores, float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - peak[:, None])
    shrink = tl.exp2(top - peak)
    weights = weights.to(values.dtype)  # before they are summed: what rounding adds, the division takes off again
    total = total * shrink + tl.sum(weights.to(tl.float32), 1)
    mixed = tl.dot(weights, values, mixed * shrink[:, None], input_precision="ieee")
    return peak, total, mixed
