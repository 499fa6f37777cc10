"""Seeded weights against the published rule; checkpoints in every wrapping and with every kind of damage."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeattn.errors import UsageError
from edgeattn.model import MODELS, Checkpoint
from edgeattn.seeding import seeded_value
from edgeattn.weights import check_weights, load_checkpoint, seed_weights, state_sha256

GOLDEN = Path(__file__).parent / "golden"
PLAIN = Checkpoint()


def _fill() -> Any:
    """Import the published rule, which shares no code with the package."""
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fill = _fill()


class Small(nn.Module):
    """A convolution, a norm and a linear layer: every kind of state-dict entry."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)


@pytest.fixture
def saved() -> dict[str, torch.Tensor]:
    """Return weights that no seed gives."""
    module = Small()
    with torch.no_grad():
        for index, value in enumerate(module.state_dict().values()):
            value.copy_(torch.arange(value.numel()).reshape(value.shape) + index)
    return dict(module.state_dict())


def _same(module: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())


def _save(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "w.pth", **options)
    return folder / "w.pth"


SYNTHETIC = [
    ("running_mean", (5,)), ("a.running_var", (5,)), ("stage2.0.ls.gamma", (4, 1, 1)), ("stage2.1.ls.gamma", (4, 1, 1)),
    ("x.base_scale.weight", (1, 6, 1, 1)), ("x.wavelet_scale.0.weight", (1, 6, 1, 1)), ("m.A_logs", (6, 1)),
    ("m.Ds", (6,)), ("m.dt_projs_bias", (2, 3)), ("m.dt_projs_weight", (2, 3, 4)), ("m.x_proj_weight", (2, 5, 3)),
    ("pos_embedding", (7, 3)), ("m.wt_filter", (4, 1, 2, 2)), ("m.iwt_filter", (4, 1, 2, 2)), ("swt_filter", (4, 2)),
    ("ffn.pw2.bn.weight", (4,)), ("proj.1.bn.weight", (4,)), ("b.dw0.m.bn.weight", (4,)), ("b.conv.m.bn.weight", (4,)),
    ("norm.weight", (9,)), ("norm.bias", (9,)), ("scalar", ()), ("in_proj_weight", (12, 4)), ("in_proj_weight", (12,)),
    ("heads.0.hm.1.bias", (3,)), ("heads.0.hm.1.bias", (2,)), ("h.heatmap.1.bias", (4,)), ("h.dim.1.bias", (3,)),
    ("heads.0.hm.1.weight", (3, 8, 3, 3)), ("heads.0.hm.0.weight", (3, 8, 3, 3)), ("h.heatmap_head.1.weight", (2, 8)),
    ("h.dim.1.weight", (3, 8, 3, 3)), ("h.iou.0.weight", (1, 8, 3, 3)), ("e.position_embedding_head.0.weight", (8, 2)),
    ("p.position_embedding_head.3.weight", (8, 8)),
    ("a.qkv.c.weight", (8, 4, 1, 1)), ("a.qk.conv.weight", (8, 4, 1, 1)),
    ("v.pfn_layers.0.linear.weight", (6, 11)), ("v.pfn_layers.0.linear.weight", (6, 10)), ("conv.weight", (4, 3, 3, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("key", "shape"), SYNTHETIC, ids=[f"{key}-{len(shape)}" for key, shape in SYNTHETIC])
def test_seeded_value_is_bit_identical_to_the_rule(key: str, shape: tuple[int, ...]) -> None:
    ours, theirs = seeded_value(key, shape), fill.fill_value(key, shape)
    if theirs is None:
        assert ours is None
        return
    assert ours is not None
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs, strict=True)


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.json")), ids=lambda file: file.stem)
def test_seeded_weights_of_every_golden_variant(file: Path) -> None:
    layout = json.loads(file.read_text())["state_dict"]
    entries = [(key, shape) for key, shape, dtype in layout if dtype.startswith("float")]
    assert entries
    for key, shape in entries:
        np.testing.assert_array_equal(seeded_value(key, shape), fill.fill_value(key, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_seed_weights_fills_a_module_of_any_float_type(dtype: torch.dtype) -> None:
    module = Small().to(dtype)
    module.bn.num_batches_tracked.fill_(7)
    seed_weights(module)
    for key, value in module.state_dict().items():
        expected = fill.fill_value(key, value.shape) if value.is_floating_point() else np.int64(7)
        assert torch.equal(value, torch.as_tensor(expected).to(value.dtype)), key


def test_state_sha256_sees_names_values_and_types() -> None:
    module, other = Small(), Small()
    seed_weights(module)
    seed_weights(other)
    assert state_sha256(module) == state_sha256(other)
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    renamed = nn.ModuleDict({"conv": module.conv, "norm": module.bn, "head": module.head})
    digests = {state_sha256(each) for each in (module, other, renamed, Small().double())}
    assert len(digests) == 4


Wrap = Callable[[dict[str, torch.Tensor]], Any]
WRAPPINGS: dict[str, tuple[Wrap, Checkpoint, str]] = {
    "bare": (lambda state: state, PLAIN, ""),
    "authors": (lambda state: {"weights": state, "epoch": 3}, Checkpoint("", ("weights",)), "weights"),
    "usual": (lambda state: {"state_dict": state, "epoch": 3}, PLAIN, "state_dict"),
    "first of two": (
        lambda state: {"net": {key: -value for key, value in state.items()}, "net_E": state},
        Checkpoint("", ("net_E", "net")),
        "net_E",
    ),
    "averaged first": (lambda state: {"model": {"a": torch.ones(1)}, "model_ema": state}, PLAIN, "model_ema"),
    "empty wrapper": (lambda state: {"net_E": {}, "net": state}, Checkpoint("", ("net_E", "net")), "net"),
    "data parallel": (lambda state: {f"module.{key}": value for key, value in state.items()}, PLAIN, ""),
    "compiled": (lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()}, PLAIN, ""),
    "training script": (
        lambda state: {"model": state, "args": argparse.Namespace(lr=1e-3), "best": np.float64(72.8)},
        PLAIN,
        "model",
    ),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", WRAPPINGS)
def test_wrappings(case: str, legacy: bool, saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    wrap, checkpoint, wrapper = WRAPPINGS[case]
    path = _save(tmp_path, wrap(saved), _use_new_zipfile_serialization=not legacy)
    module = Small()
    loaded = load_checkpoint(module, path, checkpoint)
    assert _same(module, saved)
    assert loaded.fits
    assert (loaded.wrapper, loaded.matched) == (wrapper, len(saved))


def test_safetensors_under_any_name(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(saved, tmp_path / "w.bin")
    module = Small()
    assert load_checkpoint(module, tmp_path / "w.bin", PLAIN).fits
    assert _same(module, saved)


def test_flop_counter_entries_are_ignored(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    extra = {f"{name}total_{what}": torch.zeros(1) for name in ("", "conv.") for what in ("ops", "params")}
    path = _save(tmp_path, saved | extra)
    loaded = load_checkpoint(Small(), path, Checkpoint(ignore=("total_ops", "total_params")))
    assert loaded.fits
    assert loaded.ignored == tuple(sorted(extra))
    with pytest.raises(UsageError, match="4 unexpected"):
        load_checkpoint(Small(), path, PLAIN)


def test_matrices_become_convolutions(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = _save(tmp_path, saved | {"conv.weight": saved["conv.weight"][:, :, 0, 0]})
    module = Small()
    assert load_checkpoint(module, path, PLAIN).reshaped == ("conv.weight",)
    assert _same(module, saved)


def test_half_precision_is_widened(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = _save(tmp_path, {key: value.half() if value.ndim else value for key, value in saved.items()})
    module = Small()
    assert load_checkpoint(module, path, PLAIN).fits
    assert module.conv.weight.dtype == torch.float32
    assert _same(module, saved)


def test_model_of_the_catalogue_reads_its_authors_file(tmp_path: Path) -> None:
    model = MODELS.get("shvit_s1")
    module = model.build()
    seed_weights(module)
    path = _save(tmp_path, {"model": module.state_dict()})
    other = model.build()
    load_checkpoint(other, path, model.checkpoint)
    assert state_sha256(other) == state_sha256(module)
    assert check_weights("shvit_s1", path).fits
    found = check_weights("shvit_s2", path)
    assert not found.fits
    assert found.mismatched


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.json")), ids=lambda file: file.stem)
def test_released_layouts_load_strictly(file: Path, tmp_path: Path) -> None:
    golden = json.loads(file.read_text())
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    state = {key: torch.ones(shape, dtype=dtypes[dtype]) for key, shape, dtype in golden["state_dict"]}
    counters = {f"{key.rpartition('.')[0]}.total_{what}": torch.zeros(1) for key in state for what in ("ops", "params")}
    released = golden["released_checkpoint"]
    entries = state | (counters if "total_ops" in released["drop_keys"] else {})
    other = {key: torch.zeros(1) for key in state}
    averaged, wrapped = {"net": other, "net_E": entries}, {"model": entries, "model_ema": other}
    content = averaged if "net_E" in released["container"] else wrapped if released["container"] == "model" else entries
    model = MODELS.get(golden["variant"])
    module = model.build()
    assert load_checkpoint(module, _save(tmp_path, content), model.checkpoint).fits
    assert _same(module, state)


def _other_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    changed = {("head.w" if key == "head.weight" else key): value for key, value in state.items()}
    return changed | {"conv.weight": torch.zeros(6, 3, 1, 1), "bn.num_batches_tracked": torch.tensor(1.5)}


def test_strict_by_default_with_every_difference_named(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = _save(tmp_path, {"model": _other_keys(saved)})
    module = Small()
    before = state_sha256(module)
    with pytest.raises(UsageError) as caught:
        load_checkpoint(module, path, PLAIN)
    text = str(caught.value)
    assert caught.value.code == "EA0123"
    assert f"{path}: does not fit the model: 1 missing, 1 unexpected, 2 of another shape; 6 fit" in text
    for line in (
        "missing (1): head.weight",
        "unexpected (1): head.w",
        "conv.weight [6, 3, 1, 1] for [4, 3, 1, 1]",
        "bn.num_batches_tracked [] for [] int64",
        "--allow-partial",
    ):
        assert line in text
    assert state_sha256(module) == before


def test_allow_partial_takes_what_fits_and_seeds_the_rest(saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = _save(tmp_path, _other_keys(saved))
    module, seeded = Small(), Small()
    seed_weights(seeded)
    loaded = load_checkpoint(module, path, PLAIN, allow_partial=True)
    assert (loaded.missing, loaded.unexpected) == (("head.weight",), ("head.w",))
    assert torch.equal(module.head.bias, saved["head.bias"])
    assert torch.equal(module.head.weight, seeded.head.weight)
    assert torch.equal(module.conv.weight, seeded.conv.weight)


def test_long_lists_are_shortened(tmp_path: Path) -> None:
    path = _save(tmp_path, {f"layer.{index}": torch.zeros(1) for index in range(500)})
    with pytest.raises(UsageError) as caught:
        load_checkpoint(Small(), path, PLAIN, allow_partial=True)
    assert "500 unexpected; 0 fit" in caught.value.message
    assert "... and 496 more" in caught.value.why
    assert len(str(caught.value)) < 1000
    assert not any("allow-partial" in hint for hint in caught.value.hints)


class Payload:
    """What a hostile file holds: reading it runs a command of its choice."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


def _text(path: Path, _: dict[str, torch.Tensor]) -> None:
    path.write_text("some notes, no weights")


def _truncated(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-500])


def _truncated_legacy(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-20])


def _truncated_safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-8])


def _flipped(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    place = content.find(state["head.weight"].numpy().tobytes())
    assert place > 0
    content[place + 5] ^= 0x10
    path.write_bytes(content)


def _program(path: Path, _: dict[str, torch.Tensor]) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


UNREADABLE: dict[str, tuple[Callable[[Path, dict[str, torch.Tensor]], Any], str, str]] = {
    "empty": (lambda path, _: path.touch(), "EA0121", "an empty file"),
    "text": (_text, "EA0121", "neither PyTorch nor safetensors"),
    "web page": (lambda path, _: path.write_text("<!DOCTYPE html>"), "EA0121", "a web page"),
    "folder": (lambda path, _: path.mkdir(), "EA0120", "a folder"),
    "absent": (lambda path, _: None, "EA0120", "no such weight file"),
    "truncated": (_truncated, "EA0121", "truncated or corrupt"),
    "truncated legacy": (_truncated_legacy, "EA0121", "truncated or corrupt"),
    "truncated safetensors": (_truncated_safetensors, "EA0121", "truncated or corrupt"),
    "flipped bit": (_flipped, "EA0121", "truncated or corrupt"),
    "whole module": (lambda path, _: torch.save(Small(), path), "EA0122", "Small"),
    "hostile": (lambda path, _: torch.save({"model": Payload()}, path), "EA0122", "nothing in a weight file is run"),
    "plain pickle": (lambda path, _: path.write_bytes(pickle.dumps(Payload(), 2)), "EA012[12]", "w.pth"),
    "program": (_program, "EA0122", "a saved program"),
    "arrays": (lambda path, _: np.savez(path.open("wb"), a=np.ones(2)), "EA0122", "without PyTorch weights"),
    "list": (lambda path, _: torch.save([1, 2], path), "EA0122", "holds a list"),
    "no tensors": (lambda path, _: torch.save({"epoch": 3}, path), "EA0122", "its entries: epoch"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_files(
    case: str, saved: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, code, words = UNREADABLE[case]
    path = tmp_path / "w.pth"
    make(path, saved)
    module = Small()
    before = state_sha256(module)
    with pytest.raises(UsageError) as caught:
        load_checkpoint(module, path, PLAIN, allow_partial=True)
    assert re.fullmatch(code, caught.value.code)
    assert words in caught.value.message
    assert str(path) in caught.value.message
    assert state_sha256(module) == before
    assert not Path("touched").exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_no_cut_of_a_file_ends_in_a_traceback(legacy: bool, saved: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = _save(tmp_path, saved, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for size in range(0, len(content), len(content) // 60):
        path.write_bytes(content[:size])
        with pytest.raises(UsageError, match=re.escape(str(path))):
            load_checkpoint(Small(), path, PLAIN)
