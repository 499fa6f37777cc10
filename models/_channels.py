"""Where the deploy form of a model keeps each channel, so that maps can be padded to what a runtime is fast at."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeattn.models._layers import fuse_conv_norm


@dataclass(frozen=True)
class Channels:
    """How the deploy form stores a map: the place of each channel among `width`; what lies elsewhere is never read."""

    places: tuple[int, ...]
    width: int

    @staticmethod
    def joined(count: int, align: int) -> Channels:
        """Store `count` channels side by side, up to a multiple of `align`."""
        return Channels(tuple(range(count)), -(-count // align) * align)

    @staticmethod
    def halves(count: int, align: int) -> Channels:
        """Store both halves of `count` channels, each up to a multiple of `align`."""
        first = Channels.joined((count + 1) // 2, align)
        second = tuple(first.width + place for place in first.places)
        return Channels((first.places + second)[:count], 2 * first.width)


def folded(layers: nn.Sequential) -> list[nn.Conv2d]:
    """Return the convolutions of a chain, each with the norm that follows it folded in."""
    chain = list(layers)
    return [
        fuse_conv_norm(conv, norm)
        for conv, norm in itertools.pairwise(chain)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    ]


def identity(depthwise: nn.Conv2d) -> nn.Conv2d:
    """Return a depthwise convolution of the same geometry whose only tap, the centre, is one."""
    weight = nn.init.dirac_(torch.empty_like(depthwise.weight), depthwise.groups)
    return _like(depthwise, weight, torch.zeros_like(weight[:, 0, 0, 0]))


def stack(first: nn.Conv2d, second: nn.Conv2d, rows: int) -> nn.Conv2d:
    """Return one convolution with the first `rows` outputs of both, one after the other."""
    pair = (_parts(first), _parts(second))
    weight, bias = (torch.cat(parts)[:rows] for parts in zip(*pair, strict=True))
    return _like(first, weight, bias)


def store(conv: nn.Conv2d, inputs: Channels, outputs: Channels) -> nn.Conv2d:
    """Return `conv`, pointwise or depthwise, between stored maps; the outputs at no place of a channel are zero."""
    source, shift = _parts(conv)
    rows, columns = list(outputs.places), [0] if conv.groups > 1 else list(inputs.places)
    weight = source.new_zeros(outputs.width, 1 if conv.groups > 1 else inputs.width, *source.shape[2:])
    bias = source.new_zeros(outputs.width)
    weight[torch.tensor(rows)[:, None], columns] = source
    bias[rows] = shift
    return _like(conv, weight, bias)


def _parts(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert conv.bias is not None
    return conv.weight.detach(), conv.bias.detach()


def _like(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a convolution with these weights and the geometry of `conv`, depthwise if that one is."""
    made = copy.deepcopy(conv).eval()
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    made.groups = len(weight) if conv.groups > 1 else 1
    made.in_channels, made.out_channels = weight.shape[1] * made.groups, len(weight)
    return made
