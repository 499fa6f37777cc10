"""Every classifier of the catalogue against the authors' numbers, and its deploy form against itself."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgeattn.data import seeded_images
from edgeattn.model import MODELS
from edgeattn.op import decomposed
from edgeattn.weights import seed_weights

GOLDEN = Path(__file__).parent / "golden"
# One variant per family in the default run; all of them where it costs nothing.
FIRST = ["ghostnetv2_1.0", "shvit_s1", "emov2_1m", "mobilemamba_t2"]
CLASSIFIERS = [name for name in MODELS.names() if MODELS.get(name).detector is None]
WITH_GOLDEN = [name for name in CLASSIFIERS if (GOLDEN / f"{name}.json").exists()]
# Largest difference over largest value (golden/README.md); the reference was computed in float64.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-6}
each_dtype = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
with_golden = pytest.mark.parametrize("name", WITH_GOLDEN)
each_model = pytest.mark.parametrize("name", CLASSIFIERS)
variants = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in CLASSIFIERS]
)


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text()), np.load(GOLDEN / f"{name}.npz")


def seeded(name, dtype=torch.float32):
    module = MODELS.get(name).build().eval()
    seed_weights(module)
    return module.to(dtype)


def golden_image(seed, height, width):
    """Return the image of the golden files, whose recipe is in golden/fill.py."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    return torch.from_numpy(fill.make_image(seed, height, width))


def error(found, expected):
    expected = torch.as_tensor(np.asarray(expected)).double()
    return float((found.double() - expected).abs().max() / expected.abs().max())


def test_golden_files_of_all_four_families_are_there():
    assert {MODELS.get(name).family for name in WITH_GOLDEN} == {"ghostnetv2", "shvit", "emov2", "mobilemamba"}
    assert len(WITH_GOLDEN) == 7


@with_golden
def test_state_dict_is_the_authors(name):
    layout, _ = golden(name)
    found = MODELS.get(name).build().state_dict()
    listed = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in found.items()]
    assert listed == layout["state_dict"]


@with_golden
def test_published_figures(name):
    layout, _ = golden(name)
    model = MODELS.get(name)
    assert model.parameters == layout["params_total"]
    assert model.macs == layout["macs_measured"]
    assert list(model.inputs[0].dims[2:]) == [layout["input"]["height"], layout["input"]["width"]]
    assert model.top1 is None or model.top1 == layout["reported"]["top1"]


@each_model
def test_parameter_count(name):
    model = MODELS.get(name)
    assert sum(parameter.numel() for parameter in model.build().parameters()) == model.parameters


@each_model
def test_multiply_accumulates(name):
    """Convolutions and matrix products at the default resolution, counted on shapes alone."""
    model = MODELS.get(name)
    with torch.device("meta"):
        module, image = model.build().eval(), torch.zeros(model.inputs[0].dims)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, decomposed():
        module(image)
    assert counter.get_total_flops() == 2 * model.macs


@with_golden
@each_dtype
@pytest.mark.parametrize("form", ["original", "deploy", "aligned"])
def test_logits(name, dtype, form):
    layout, arrays = golden(name)
    module = seeded(name, dtype)
    if form != "original":
        module = module.deploy(16 if form == "aligned" else 1)
    entry, other = layout["input"], layout["input_alt"]
    images = torch.cat([golden_image(seed, entry["height"], entry["width"]) for seed in entry["seeds"]])
    with torch.no_grad():
        assert error(module(images.to(dtype)), arrays["logits"]) <= LIMITS[dtype]
        alternative = golden_image(other["seed"], other["height"], other["width"]).to(dtype)
        assert error(module(alternative), arrays["logits_alt"]) <= LIMITS[dtype]


@with_golden
@each_dtype
def test_stage_activations(name, dtype):
    layout, arrays = golden(name)
    module = seeded(name, dtype)
    found = {}
    for label, place in layout["activations"].items():
        part = module.get_submodule(place["module"])
        part.register_forward_hook(lambda _, __, value, label=label: found.update({label: value.detach()}))
    entry = layout["input"]
    images = torch.cat([golden_image(seed, entry["height"], entry["width"]) for seed in entry["seeds"]])
    with torch.no_grad():
        module(images.to(dtype))
    for label, place in layout["activations"].items():
        value = found[label]
        assert list(value.shape) == place["shape"]
        flat, step = value.flatten(), max(1, value.numel() // 64)
        largest = float(arrays[f"act.{label}.stats"][2])
        sample = torch.from_numpy(arrays[f"act.{label}.sample"]).to(dtype)
        assert float((flat[: 64 * step : step][:64] - sample).abs().max()) <= LIMITS[dtype] * largest, label
        stats = torch.stack([value.mean(), value.std(correction=0), value.abs().max()])
        wanted = torch.from_numpy(arrays[f"act.{label}.stats"]).to(dtype)
        assert float((stats - wanted).abs().max()) <= 10 * LIMITS[dtype] * largest, label


def sizes(name):
    """Return native, odd and non-square sizes; for the larger variants what float64 does in seconds."""
    native = MODELS.get(name).inputs[0].dims[2]
    if name not in FIRST:
        return [(160, 129)]
    return [(native, native), (native // 2 + 21, native // 2 + 64), (160, 129)]


@variants
@pytest.mark.parametrize("align", [1, 16])
def test_deploy_is_exact(name, align):
    module = seeded(name, torch.float64)
    before = copy.deepcopy(module.state_dict())
    deployed = module.deploy(align)
    for height, width in sizes(name):
        images = torch.from_numpy(seeded_images(3, (2, 3, height, width))).double()
        with torch.no_grad():
            assert error(deployed(images), module(images)) <= 1e-10, (height, width)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items()), "original was changed"


@variants
def test_batch_is_one_image_at_a_time(name):
    module = seeded(name, torch.float64)
    images = torch.from_numpy(seeded_images(4, (3, 3, 144, 176))).double()
    with torch.no_grad():
        alone = torch.cat([module(images[i : i + 1]) for i in range(3)])
        assert error(module(images), alone) <= 1e-12


@pytest.mark.parametrize("name", FIRST)
def test_gradients_reach_every_parameter(name):
    """The originals can be trained: ops have gradients, and no deploy trick hides in the forward pass."""
    module = MODELS.get(name).build().train()
    module(torch.randn(2, 3, 96, 96)).square().mean().backward()
    without = [key for key, value in module.named_parameters() if value.requires_grad and value.grad is None]
    assert not without
