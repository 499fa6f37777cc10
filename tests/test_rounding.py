"""PyTorch that stores in half precision: what is rounded, what is kept, and that nothing else changes."""

import pytest
import torch
from tiny import tiny_cloud, tiny_model
from torch import nn

from edgeattn.detection import align
from edgeattn.rounding import StoredAs
from edgeattn.weights import seed_weights

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.register_buffer("offset", torch.tensor(1 / 3))

    def forward(self, x):
        return x * self.factor + self.offset


class Chain(nn.Module):
    """Three steps whose results are all kept: a matrix product, a scale, and a sum in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = Scale(1.7)
        self.last = nn.Sequential(Scale(0.3))
        self.seen = {}

    def forward(self, x):
        self.seen["first"] = x = self.first(x)
        self.seen["middle"] = x = self.middle(x)
        self.seen["last"] = x = self.last(x)
        return x


def fits(value, dtype):
    return torch.equal(value, value.to(dtype).float())


def stored(dtype, *keep):
    module = Chain().eval()
    with torch.no_grad():
        found = StoredAs(module, dtype, keep)
        result = found(torch.randn(6, 4))
    return module, found.module, result


@each_dtype
def test_every_result_and_weight_is_rounded(dtype):
    module, found, result = stored(dtype)
    assert all(fits(value, dtype) for value in (*found.seen.values(), result))
    assert all(fits(value, dtype) for value in (*found.parameters(), *found.buffers()))
    for value, before in zip(found.parameters(), module.parameters(), strict=True):
        assert torch.equal(value, before.to(dtype).float())


@each_dtype
def test_steps_are_those_of_float32_arithmetic(dtype):
    """Each operation in float32 on rounded operands, then rounded once."""
    module, x = Chain().eval(), torch.randn(6, 4)

    def low(value):
        return value.to(dtype).float()

    with torch.no_grad():
        want = low(nn.functional.linear(x, low(module.first.weight), low(module.first.bias)))
        for scale in (module.middle, module.last[0]):
            want = low(low(want * low(scale.factor)) + low(scale.offset))
        assert torch.equal(StoredAs(module, dtype)(x), want)


@each_dtype
@pytest.mark.parametrize("pattern", ["last*", "last.0", "l*"])
def test_kept_modules_are_exact(dtype, pattern):
    module, found, result = stored(dtype, pattern)
    assert fits(found.seen["middle"], dtype)
    assert not fits(result, dtype)
    inner = found.last[0]
    assert torch.equal(inner.factor, module.last[0].factor)
    assert torch.equal(inner.offset, module.last[0].offset)
    assert torch.equal(result, found.seen["middle"] * inner.factor + inner.offset)


def test_what_follows_a_kept_module_is_rounded():
    _, found, result = stored(torch.float16, "middle")
    assert not fits(found.seen["middle"], torch.float16)
    assert fits(result, torch.float16)


def test_a_failure_inside_a_kept_module_ends_the_exception():
    class Failing(nn.Module):
        def forward(self, x):
            if len(x) == 1:
                raise RuntimeError("on purpose")
            return x

    module = StoredAs(nn.Sequential(Failing(), Scale(1.7)), torch.float16, ["0"])
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="on purpose"):
            module(torch.ones(1, 3))
        assert fits(module(torch.rand(2, 3)), torch.float16)


@each_dtype
def test_identity_for_values_that_fit(dtype):
    """Small whole numbers and halves fit both formats, and so do their products and sums."""
    module = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 1.0]]))
        module[0].bias.copy_(torch.tensor([0.5, -1.0]))
        x = torch.tensor([[2.0, 1.0, 4.0], [-1.0, 0.0, 3.0]])
        assert torch.equal(StoredAs(module, dtype)(x), module(x))


def test_the_original_and_the_inputs_are_left_alone():
    module, x = Chain(), torch.randn(6, 4)
    before, given = {key: value.clone() for key, value in module.state_dict().items()}, x.clone()
    with torch.no_grad():
        StoredAs(module, torch.float16)(x)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(x, given)


def test_results_in_place_are_rounded():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x.clone()
            y += 1 / 3
            y[:, 0].mul_(1.7)
            return y

    with torch.no_grad():
        found = StoredAs(InPlace(), torch.float16)(torch.ones(2, 3))
    third = torch.tensor(4 / 3).half().float()
    assert torch.equal(found[0], torch.stack([(third * 1.7).half().float(), third, third]))


def test_views_and_other_types_are_not_rounded():
    class Moves(nn.Module):
        def forward(self, x, wide, index):
            return x.reshape(3, 2).t(), wide / 3, index + 70_000

    x, wide, index = torch.randn(2, 3), torch.ones(2, dtype=torch.float64), torch.arange(3, dtype=torch.int32)
    moved, third, large = StoredAs(Moves(), torch.float16)(x, wide, index)
    assert torch.equal(moved, x.reshape(3, 2).t())
    assert torch.equal(third, wide / 3)
    assert torch.equal(large, index + 70_000)


@pytest.mark.parametrize("kind", ["pillar", "voxel", "crowded"])
def test_detector_keeps_its_coordinates(kind):
    """Counts are exact and boxes move by rounding alone; without the exceptions points change their voxels."""
    model = tiny_model(kind)
    module = model.build().eval()
    seed_weights(module)
    inputs = torch.from_numpy(tiny_cloud(900)), torch.tensor([900], dtype=torch.int32)

    def outputs(module):
        with torch.no_grad():
            return {name: value.numpy() for name, value in zip(model.outputs, module(*inputs), strict=True)}

    expected, found = outputs(module), outputs(StoredAs(module, torch.float16, model.keep_fp32))
    assert found["counts"].tolist() == expected["counts"].tolist()
    ours, theirs, share = align(found, expected)
    assert share > 0.95
    assert 1e-6 < abs(ours["scores"] - theirs["scores"]).max() < 5e-3
    rough = outputs(StoredAs(module, torch.float16))
    assert rough["counts"].tolist() != expected["counts"].tolist()
