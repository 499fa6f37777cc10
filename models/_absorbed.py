"""Exact rewritings of attention layers into linear ones, computed in float64 and cast to the dtype they came in."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from edgeattn.models._layers import norm_affine, set_weights


def linear_of(conv: nn.Conv1d, norm: nn.BatchNorm1d | None = None) -> nn.Linear:
    """Return the linear layer equal to a pointwise 1-D convolution with bias, and the norm behind it."""
    assert conv.bias is not None
    weight, bias = conv.weight.detach()[:, :, 0].double(), conv.bias.detach().double()
    if norm is not None:
        scale, shift = norm_affine(norm)
        weight, bias = weight * scale[:, None], bias * scale + shift
    return linear(weight, bias, like=conv.weight)


def linear(weight: Tensor, bias: Tensor, like: Tensor | None = None) -> nn.Linear:
    """Return the layer with this weight and bias, in the dtype of `like` or its own."""
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight if like is None else like)
    return set_weights(layer, weight.detach(), bias.detach())


def turned(conv: nn.Conv2d) -> nn.Conv2d:
    """Return the convolution that does to a map what `conv` does to the transposed map."""
    assert conv.bias is not None
    return set_weights(copy.deepcopy(conv), conv.weight.detach().transpose(2, 3), conv.bias.detach())


def _projections(attention: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights and the biases of q, k and v, in float64."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    assert weight is not None
    return list(weight.detach().double().chunk(3)), list(bias.detach().double().chunk(3))


def single_token(attention: nn.MultiheadAttention) -> nn.Linear:
    """Return attention over one token as the linear layer it is: its softmax is one."""
    weights, biases = _projections(attention)
    out, shift = attention.out_proj.weight.detach().double(), attention.out_proj.bias.detach().double()
    return linear(out @ weights[2], out @ biases[2] + shift, like=attention.out_proj.weight)


def absorbed(attention: nn.MultiheadAttention) -> tuple[nn.Linear, nn.Linear]:
    """Return the layers from a query to what its heads ask of raw keys, and from attended raw keys to the output."""
    (q, k, v), (q_bias, _, v_bias) = _projections(attention)
    heads, width = attention.num_heads, attention.embed_dim
    depth = width // heads
    out, shift = attention.out_proj.weight.detach().double(), attention.out_proj.bias.detach().double()
    q, k, v = (matrix.reshape(heads, depth, width) for matrix in (q, k, v))
    asked = k.transpose(1, 2) @ q * depth**-0.5  # [heads, width, width]
    asked_bias = (k.transpose(1, 2) @ q_bias.reshape(heads, depth, 1)).flatten() * depth**-0.5
    split = out.reshape(width, heads, depth).transpose(0, 1)  # [heads, width, depth]
    given = (split @ v).transpose(0, 1).reshape(width, heads * width)
    like = attention.out_proj.weight
    return linear(asked.flatten(0, 1), asked_bias, like), linear(given, out @ v_bias + shift, like)
