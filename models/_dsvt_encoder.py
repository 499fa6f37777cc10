"""Encoder layers of DSVT: attention inside sets of voxels, feed-forward, and embeddings of the place in a window.

Paper: Wang et al., "DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets", CVPR 2023, sections 3.2 and 3.3.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeattn.kernels import set_attention
from edgeattn.models._layers import fold_children, set_weights


@dataclass(frozen=True)
class Partition:
    """The voxels in the windows of one configuration; index n - 1 is the spare row.

    inds int32 [2, sets, set_size] (y-major, x-major), slot int32 [2, n] (flat place of each voxel's first entry),
    position int32 [n] ((iz*wy + iy)*wx + ix inside the window) and count int32 [1], the true number of sets.
    """

    inds: Tensor
    slot: Tensor
    position: Tensor
    count: Tensor


class SetAttention(nn.Module):
    """Attention inside sets and a feed-forward, each with a skip and a norm behind it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, inds: Tensor, slot: Tensor) -> Tensor:
        """Map x [n, c] with position embedding [n, c], inds int32 [sets, set_size], slot int32 [n] to [n, c]."""
        found = self.out_proj(self.attend(x, position, inds, slot))
        x = self.norm1(x + found)
        out: Tensor = self.norm2(x + self.linear2(functional.gelu(self.linear1(x))))
        return out

    def attend(self, x: Tensor, position: Tensor, inds: Tensor, slot: Tensor) -> Tensor:
        """Return the attention of every voxel before the output projection, [n, c]."""
        placed, heads = x + position, self.self_attn.num_heads
        q, k, v = (
            functional.linear(value, weight, bias)
            for value, weight, bias in zip((placed, placed, x), *projections(self.self_attn), strict=True)
        )
        found: Tensor = set_attention.op(q, k, v, inds, slot, num_heads=heads, scale=(x.shape[1] // heads) ** -0.5)
        return found

    @property
    def out_proj(self) -> nn.Linear:
        """Return the output projection of the attention."""
        return self.self_attn.out_proj


def projections(attention: nn.MultiheadAttention) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the weights of q, k and v, [c, c] each, and their biases, [c] each."""
    return attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)


class EncoderLayer(nn.Module):
    """Set attention with feed-forward, and one more skip and norm around both."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.win_attn = SetAttention(width, heads, hidden)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, inds: Tensor, slot: Tensor) -> Tensor:
        """Map x [n, c] with position embedding [n, c], inds int32 [sets, set_size], slot int32 [n] to [n, c]."""
        out: Tensor = self.norm(x + self.win_attn(x, position, inds, slot))
        return out

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the layer for inference."""
        return DeployedLayer(self)


class DeployedLayer(nn.Module):
    """An encoder layer for inference: score scale in the weights of q, and every bias that can move has moved.

    A bias of k adds the same to all scores of a query, so softmax ignores it. Weights sum to one, so the bias of v
    passes to the output projection. That of linear2 is added by norm1, whose result is the feed-forward's shortcut,
    and taken off again in linear1: the shortcut is then the third operand of one Gemm.
    """

    def __init__(self, original: EncoderLayer) -> None:
        super().__init__()
        inner = original.win_attn
        self.heads = inner.self_attn.num_heads
        (q, k, v), (q_bias, _, v_bias) = projections(inner.self_attn)
        scale = (q.shape[0] // self.heads) ** -0.5
        out, first, second, norm = map(doubled, (inner.out_proj, inner.linear1, inner.linear2, inner.norm1))
        self.q = linear_like(q, q.double() * scale, q_bias.double() * scale)
        self.k, self.v = linear_like(q, k), linear_like(q, v)
        self.out_proj = linear_like(q, out.weight, out.bias + out.weight @ v_bias.double())
        self.linear1 = linear_like(q, first.weight, first.bias - first.weight @ second.bias)
        self.linear2 = linear_like(q, second.weight)
        self.norm1, self.norm2, self.norm = map(copy.deepcopy, (inner.norm1, inner.norm2, original.norm))
        with torch.no_grad():
            self.norm1.bias.copy_(norm.bias + second.bias)

    def forward(self, x: Tensor, position: Tensor, inds: Tensor, slot: Tensor) -> Tensor:
        """Map x [n, c] with position embedding [n, c], inds int32 [sets, set_size], slot int32 [n] to [n, c]."""
        placed = x + position
        found = set_attention.op(self.q(placed), self.k(placed), self.v(x), inds, slot, num_heads=self.heads, scale=1.0)
        y = self.norm1(x + self.out_proj(found))
        hidden = functional.gelu(self.linear1(y))
        y = self.norm2(torch.addmm(y, hidden, self.linear2.weight.t()))
        out: Tensor = self.norm(x + y)
        return out


def doubled(layer: nn.Module) -> Any:
    """Return a copy in float64 whose parameters need no gradients."""
    return copy.deepcopy(layer).double().requires_grad_(False)


def linear_like(like: Tensor, weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear layer with these weights, in the dtype and on the device of `like`."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, dtype=like.dtype, device=like.device)
    return set_weights(layer, weight.detach(), layer.weight if bias is None else bias.detach())


class Block(nn.Module):
    """Two encoder layers on the sets of one window configuration: y-major, then x-major."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.encoder_list = nn.ModuleList(EncoderLayer(width, heads, hidden) for _ in range(2))

    def forward(self, x: Tensor, positions: Sequence[Tensor], inds: Tensor, slot: Tensor) -> Tensor:
        """Map x [n, c], an embedding [n, c] per layer, inds int32 [2, sets, set_size], slot int32 [2, n] to [n, c]."""
        for axis, layer in enumerate(self.encoder_list):
            x = layer(x, positions[axis], inds[axis], slot[axis])
        return x


class PositionEmbedding(nn.Module):
    """Embedding of a voxel's place relative to the middle of its window, two axes where the window is flat."""

    def __init__(self, window: Sequence[int], width: int) -> None:
        super().__init__()
        self.window = tuple(window)
        self.axes = axes = 3 if window[2] > 1 else 2
        self.position_embedding_head = nn.Sequential(
            nn.Linear(axes, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, position: Tensor) -> Tensor:
        """Map the place inside the window, int [n], to [n, width]."""
        offsets = window_offsets(position, self.window)[:, : self.axes]
        embedded: Tensor = self.position_embedding_head(offsets.to(next(self.parameters())))
        return embedded

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the same as a table: a window has few places."""
        like = next(self.parameters())
        wide = copy.deepcopy(self).double().eval()
        with torch.no_grad():
            rows = wide(torch.arange(math.prod(self.window), device=like.device))
        return PositionTable(rows.to(like.dtype))


def window_offsets(position: Tensor, window: Sequence[int]) -> Tensor:
    """Return (x, y, z) in cells relative to the middle of the window for places int [n]: float64 [n, 3]."""
    wx, wy, wz = window
    cells = torch.stack([position % wx, position // wx % wy, position // (wx * wy)], 1)
    return cells - torch.tensor([wx / 2, wy / 2, wz / 2], dtype=torch.float64, device=position.device)


class PositionTable(nn.Module):
    """Position embeddings by lookup: one row per place inside the window."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self, position: Tensor) -> Tensor:
        """Map the place inside the window, int32 [n], to [n, width]."""
        return functional.embedding(position, self.rows)


class BlocksOnly(nn.Module):
    """The transformer blocks of one stage alone, with the inputs and the output of the authors' deployed part.

    For those who keep their own voxel encoder and set partition; voxel and set counts may be dynamic.
    """

    def __init__(self, blocks: nn.ModuleList, norms: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks
        self.norms = norms

    def forward(
        self,
        src: Tensor,
        set_voxel_inds_tensor_shift_0: Tensor,
        set_voxel_inds_tensor_shift_1: Tensor,
        set_voxel_masks_tensor_shift_0: Tensor,
        set_voxel_masks_tensor_shift_1: Tensor,
        pos_embed_tensor: Tensor,
    ) -> Tensor:
        """Map voxel features [n, c] to [n, c].

        Per shift: inds int32 [2, sets, set_size] and masks bool of that shape, true where an entry repeats the one
        before it. pos_embed_tensor is [blocks, 2, n, c].
        """
        inds = (set_voxel_inds_tensor_shift_0, set_voxel_inds_tensor_shift_1)
        masks = (set_voxel_masks_tensor_shift_0, set_voxel_masks_tensor_shift_1)
        slots = [first_slots(*given, src.shape[0]) for given in zip(inds, masks, strict=True)]
        x, positions = src, pos_embed_tensor.flatten(0, 1).unbind(0)
        for number, (block, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            shift, own = number % 2, positions[2 * number : 2 * number + 2]
            x = norm(x + block(x, own, inds[shift], slots[shift]))
        return x

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the inference form."""
        return fold_children(self, align)


def first_slots(inds: Tensor, mask: Tensor, voxels: int) -> Tensor:
    """Return the flat place of every voxel's unmasked entry in inds[0] and inds[1]: int32 [2, voxels]."""
    rows = inds.flatten(1)
    # Masked entries go to a spare place, so that no place that is read is written twice.
    target = torch.where(mask.flatten(1), voxels, rows).long()
    places = torch.arange(rows.shape[1], dtype=torch.int32, device=inds.device).expand(2, -1)
    slot = torch.zeros(2, voxels + 1, dtype=torch.int32, device=inds.device)
    return slot.scatter(1, target, places)[:, :voxels]
