"""Partition of voxels into sets of equal size inside windows (DSVT), for both orders along the axes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeattn.kernels._set_partition import PartitionBody
from edgeattn.kernels._voxels import partition, sample_voxels
from edgeattn.op import Op

op = Op(
    "set_partition",
    "(coords: int32[n 4], num_voxels: int32[1], *, grid: ints, window: ints, shift: ints, set_size: int,"
    " max_sets: int) -> (inds: int32[2 max_sets set_size], slot: int32[2 n], position: int32[n], num_sets: int32[1])",
)


@op.reference
def reference(
    coords: Tensor,
    num_voxels: Tensor,
    *,
    grid: list[int],
    window: list[int],
    shift: list[int],
    set_size: int,
    max_sets: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divide the voxels of every window evenly into sets, in y-major order ([0] of the results) and x-major ([1]).

    coords [n, (0, z, y, x)] of one cloud are in the order of (x, y, z); the first num_voxels rows count, at most n - 1.
    Set k of the m of a window with c voxels holds those of rank floor((k*set_size + j)*c / (m*set_size)), so it may
    repeat an entry; unused sets hold n - 1. slot [2, n]: place of each voxel's first entry in the flat sets, 0 where it
    has none. position [n] = (iz*wy + iy)*wx + ix inside the window, 0 without voxel. num_sets [1] is the true count and
    may exceed max_sets, whose sets beyond are dropped. All int32. grid, window and shift are (x, y, z): no shift along
    z where one window spans it, as it must for the ONNX body (EA0402). Source: DSVT, section 3.2.
    """
    spare = len(coords) - 1
    count = int(num_voxels.clamp(0, spare))
    sets, slot, position, _ = partition(coords[:count], grid, window, shift, set_size)
    inds = F.pad(sets[:, :max_sets], (0, 0, 0, max_sets - min(sets.shape[1], max_sets)), value=spare)
    slot = slot.where(slot < max_sets * set_size, 0)
    padding = (0, len(coords) - count)
    num_sets = torch.tensor([sets.shape[1]], dtype=torch.int32, device=coords.device)
    return inds.int(), F.pad(slot, padding).int(), F.pad(position, padding).int(), num_sets


@op.onnx
def body(dims, attributes, dtype):
    return PartitionBody(dims["n"], attributes).text()


@op.sample
def sample(dims, attributes, generator):
    return sample_voxels(dims["n"], attributes["grid"], generator)


op.cases = [
    dict(n=400, grid=[30, 26, 1], window=[12, 12, 1], shift=[0, 0, 0], set_size=36, max_sets=40),
    dict(n=400, grid=[30, 26, 1], window=[24, 24, 1], shift=[6, 6, 0], set_size=36, max_sets=10),  # too few sets
    dict(n=150, grid=[13, 17, 1], window=[5, 7, 1], shift=[2, 3, 0], set_size=9, max_sets=40),
    dict(n=700, grid=[14, 16, 8], window=[6, 4, 8], shift=[3, 2, 4], set_size=10, max_sets=128),
    dict(n=500, grid=[19, 16, 2], window=[4, 6, 2], shift=[1, 2, 0], set_size=8, max_sets=160),
    dict(n=2, grid=[3, 3, 1], window=[2, 2, 1], shift=[0, 0, 0], set_size=4, max_sets=3),
]
