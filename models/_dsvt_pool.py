"""Stage reduction of DSVT's voxel model: attention pooling of the voxels of one column into one.

Paper: Wang et al., "DSVT: Dynamic Sparse Voxel Transformer with Rotated Sets", CVPR 2023, section 3.4.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeattn.models._dsvt_encoder import doubled, linear_like, projections


class StageReduction(nn.Module):
    """The maximum over the slots of a pooled voxel asks its slots, empty ones included; skip and norm behind it."""

    def __init__(self, width: int, heads: int, slots: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.zeros(slots, width))
        self.norm = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, features: Tensor, table: Tensor) -> Tensor:
        """Map features [n, c] and the voxels of every pooled one, int [m, slots] (n - 1: empty), to [m, c]."""
        x = functional.embedding(table, features)  # [m, slots, c]
        return self.pool(x.masked_fill((table == features.shape[0] - 1).unsqueeze(2), 0.0))

    def pool(self, x: Tensor) -> Tensor:
        """Map [m, slots, c], zero in empty slots, to [m, c]."""
        query = x.amax(1)
        weights, biases = projections(self.self_attn)
        inputs = (query, x + self.pos_embedding, x)
        q, k, v = (functional.linear(*given) for given in zip(inputs, weights, biases, strict=True))
        heads, width = self.self_attn.num_heads, query.shape[1] // self.self_attn.num_heads
        shape = (-1, x.shape[1], heads, width)
        scores = (q.unsqueeze(1) * k).reshape(shape).sum(3) * width**-0.5  # [m, slots, heads]
        found = (scores.softmax(1).unsqueeze(3) * v.reshape(shape)).sum(1)
        out: Tensor = self.norm(self.self_attn.out_proj(found.reshape(-1, heads * width)) + query)
        return out

    def deploy(self, align: int = 1) -> nn.Module:
        """Return the form that projects every voxel once, before the slots gather it."""
        return DeployedReduction(self)


class DeployedReduction(nn.Module):
    """Attention pooling for inference.

    The score of a slot's embedding is a linear function of the query, here a layer of its own. The bias of k changes
    no weight, that of v passes to the output projection.
    """

    nothing: Tensor

    def __init__(self, original: StageReduction) -> None:
        super().__init__()
        attention, embedding = doubled(original.self_attn), original.pos_embedding.detach().double()
        (q, k, v), (q_bias, _, v_bias) = projections(attention)
        slots, width = embedding.shape
        self.heads, like = attention.num_heads, original.self_attn.in_proj_weight
        scale = (width // self.heads) ** -0.5
        own = torch.arange(width, device=like.device) // (width // self.heads) == torch.arange(
            self.heads, device=like.device
        ).unsqueeze(1)  # [heads, c]
        places = ((embedding @ k.t()).unsqueeze(1) * own).reshape(slots * self.heads, width) * scale
        self.q = linear_like(like, q * scale, q_bias * scale)
        self.place = linear_like(like, places @ q, places @ q_bias)
        self.k, self.v = linear_like(like, k), linear_like(like, v)
        out = attention.out_proj
        self.out_proj = linear_like(like, out.weight, out.bias + out.weight @ v_bias)
        self.norm = copy.deepcopy(original.norm)
        self.register_buffer("nothing", like.new_zeros(1, width).detach())

    def forward(self, features: Tensor, table: Tensor) -> Tensor:
        """Map features [n, c] and the voxels of every pooled one, int32 [m, slots] (n - 1: empty), to [m, c]."""
        base = torch.cat([features[:-1], self.nothing])
        x, k, v = (functional.embedding(table, rows) for rows in (base, self.k(base), self.v(base)))
        query = x.amax(1)
        heads = (table.shape[0], table.shape[1], self.heads, -1)
        scores = (self.q(query).unsqueeze(1) * k).reshape(heads).sum(3) + self.place(query).reshape(heads[:3])
        found = (scores.softmax(1).unsqueeze(3) * v.reshape(heads)).sum(1)
        out: Tensor = self.norm(self.out_proj(found.flatten(1)) + query)
        return out
