"""Export end to end: catalogue models, user modules and .pt2 files become checked bundles; failures leave nothing."""

import filecmp
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgeattn.errors import AccuracyError, IncompatibleError, UnsupportedError, UsageError
from edgeattn.model import MODELS
from edgeattn.pipeline import export_model

# One variant per family in the default run, at float32 and float16; the rest are slow.
FIRST = ["ghostnetv2_1.0", "shvit_s1", "emov2_1m", "mobilemamba_t2"]
OPS = {
    "ghostnetv2": {"EdgeUpsampleGateMul"},
    "shvit": {"EdgeSingleHeadAttention"},
    "emov2": {"EdgeHybridWindowAttention"},
    "mobilemamba": {"EdgeSelectiveScan", "EdgeHaarDwt", "EdgeHaarIdwt"},
    "dsvt": {
        "EdgeVoxelize", "EdgeSegmentMean", "EdgeSegmentMax", "EdgeSetPartition", "EdgeSetAttention", "EdgeBevScatter",
    },
}  # fmt: skip
MORE_OPS = {"dsvt_waymo_voxel": {"EdgeVoxelPool"}}
# The others take as long again, and the slow run has them.
QUICK_DYNAMIC = ["shvit_s1", "mobilemamba_t2"]
RTX = find_spec("tensorrt_rtx") is not None
variants = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in MODELS.names()]
)


def measured(bundle):
    return json.loads((bundle.path / "reports" / "export.json").read_text())["measured"]


@variants
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_variant_exports(name, precision, tmp_path):
    bundle = export_model(name, output=tmp_path / "out", precision=precision)
    figures = measured(bundle)["check"]
    assert figures["scaled_err"] <= figures["band"]
    assert figures["tensorrt_rtx"]["verdict"] == ("pass" if RTX else "skipped")
    found = {op["name"] for op in bundle.manifest["ops"]}
    assert found == OPS[MODELS.get(name).family] | MORE_OPS.get(name, set())
    bundle.verify()
    graph = onnx.load(bundle.file("model.onnx"))
    onnx.checker.check_model(graph, full_check=True)
    types = {tensor.data_type for tensor in graph.graph.initializer}
    assert (onnx.TensorProto.FLOAT16 in types) == (precision == "fp16")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK_DYNAMIC else pytest.mark.slow) for name in FIRST]
)
def test_dynamic_batch_and_size(name, tmp_path):
    size = MODELS.get(name).inputs[0].dims[2]
    ranges = ["batch=1:3:2", f"height={size - 64}:{size + 32}:{size}", f"width={size - 32}:{size + 64}:{size}"]
    bundle = export_model(name, output=tmp_path / "out", dims=ranges)
    figures = measured(bundle)["check"]
    assert figures["scaled_err"] <= figures["band"]
    assert [dim["name"] for dim in bundle.manifest["inputs"][0]["dims"] if "name" in dim] == [
        "batch",
        "height",
        "width",
    ]
    assert bundle.outputs[0].dims[0].name == "batch"
    session = onnxruntime.InferenceSession(bundle.file("model.onnx"))
    odd = np.random.default_rng(0).standard_normal((3, 3, size - 31, size + 17)).astype(np.float32)
    assert session.run(None, {"image": odd})[0].shape == (3, 1000)


def test_orin_gets_float16_and_says_what_is_not_built(tmp_path):
    bundle = export_model("shvit_s1", output=tmp_path / "out", targets=["orin", "thor"])
    assert bundle.precision == "fp16"
    assert [target["kernels"] for target in bundle.manifest["targets"]] == ["not built", "not built"]
    precision = json.loads(bundle.file("precision.json").read_text())
    reasons = {entry["reason"] for entry in precision["nodes"].values() if entry["dtype"] == "float32"}
    assert any("computed in float32" in reason for reason in reasons)


def test_plan_is_honoured(tmp_path):
    first = export_model("shvit_s1", output=tmp_path / "first", precision="fp16", check=False)
    document = json.loads(first.file("precision.json").read_text())
    node = next(name for name, entry in document["nodes"].items() if entry["dtype"] == "float16")
    document["nodes"][node]["dtype"] = "float32"
    (tmp_path / "plan.json").write_text(json.dumps(document))
    second = export_model(
        "shvit_s1", output=tmp_path / "second", precision="fp16", precision_plan=tmp_path / "plan.json", check=False
    )
    changed = json.loads(second.file("precision.json").read_text())["nodes"][node]
    assert changed == {"dtype": "float32", "reason": "precision plan"}
    with pytest.raises(UsageError, match="EA0114"):
        export_model("shvit_s1", output=tmp_path / "x", precision="fp16", precision_plan=first.file("manifest.json"))


class Small(nn.Module):
    """A user's network: convolution, norm, channel-first attention, a head behind a norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 4, 4)
        self.norm = nn.BatchNorm2d(24)
        self.qkv = nn.Conv2d(24, 40, 1)
        self.last = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 11)

    def forward(self, image):
        x = self.norm(self.stem(image))
        q, k, v = self.qkv(x).flatten(2).split([8, 8, 24], 1)
        attention = ((q.transpose(1, 2) @ k) * 8**-0.5).softmax(-1)
        return self.head(self.last((v @ attention.transpose(1, 2)).mean(-1)))


def seeded_small():
    torch.manual_seed(0)
    module = Small()
    module.last.running_mean.uniform_(-1, 1)
    return module


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """Work in a folder that holds a user's package."""
    (tmp_path / "mynet.py").write_text(
        "import torch\n"
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_export import seeded_small as build\n"
        "class Unsupported(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.special.bessel_j0(x)\n"
        "class Fixed(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x + torch.ones(2, 4)\n"
        "number = lambda: 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mynet", None)


def test_user_factory_and_pt2_file(user_folder):
    bundle = export_model("mynet:build", inputs=["image=1x3x32x48"])
    assert bundle.path.name == "build-fp32.edgeattn"
    assert bundle.manifest["model"]["family"] == "user"
    passes = next(stage for stage in bundle.manifest["stages"] if stage["name"] == "passes")["passes"]
    assert {each["name"] for each in passes if each["rewrites"]} >= {"fold_norms", "capture_attention"}
    image = torch.randn(1, 3, 32, 48)
    program = torch.export.export(seeded_small().eval(), (image,))
    torch.export.save(program, "small.pt2")
    other = export_model("small.pt2", precision="fp16")
    assert other.path.name == "small-fp16.edgeattn"
    found = onnxruntime.InferenceSession(other.file("model.onnx")).run(None, {"image": image.numpy()})[0]
    np.testing.assert_allclose(found, seeded_small().eval()(image).detach(), atol=5e-3)


def test_user_factory_with_a_range(user_folder):
    bundle = export_model("mynet:build", inputs=["image=Nx3x32x48"], dims=["N=1:8"])
    assert [dim.name for dim in bundle.inputs[0].dims] == ["N", "", "", ""]


@pytest.mark.parametrize(
    ("model", "options", "error", "text"),
    [
        ("shvit_s9", {}, UsageError, "EA0101.*did you mean shvit_s"),
        ("nothing:here", {"inputs": ["x=1x3"]}, UsageError, "EA0101.*cannot be imported"),
        ("mynet:absent", {"inputs": ["x=1x3"]}, UsageError, "EA0101.*absent"),
        ("mynet:number", {"inputs": ["x=1x3"]}, UsageError, "EA0101.*not a torch.nn.Module"),
        ("mynet:build", {}, UsageError, "EA0111.*give its inputs"),
        ("missing.pt2", {}, UsageError, "EA0101.*no such file"),
        ("mynet.pt2", {}, UsageError, "EA0109.*not a readable exported program"),
        ("shvit_s1", {"inputs": ["image=1x3"]}, UsageError, "EA0111.*needs 4 sizes"),
        ("shvit_s1", {"inputs": ["picture=1x3x8x8"]}, UsageError, "EA0111.*inputs are image"),
        ("shvit_s1", {"inputs": ["image=1x3xHx224"]}, UsageError, "EA0111.*H has no range"),
        ("shvit_s1", {"dims": ["batch=8:1"]}, UsageError, "EA0111.*min <= opt <= max"),
        ("shvit_s1", {"dims": ["depth=1:8"]}, UsageError, "EA0111.*depth: no such size"),
        ("shvit_s1", {"precision": "int7"}, UsageError, "EA0111.*not one of"),
        ("shvit_s1", {"precision": "bf16"}, UnsupportedError, "EA0405"),
        ("shvit_s1", {"targets": ["orion"]}, UsageError, "EA0102.*did you mean orin"),
        ("shvit_s1", {"until": "later"}, UsageError, "EA0111.*no such stage"),
        ("mynet:Unsupported", {"inputs": ["x=2x4"]}, UnsupportedError, r"EA0401.*special_bessel_j0(.|\n)*mynet.py:6"),
        ("mynet:Fixed", {"inputs": ["x=nx4"], "dims": ["n=2:8"]}, AccuracyError, "EA0703.*n = 2"),
    ],
)
def test_what_cannot_be_compiled_leaves_nothing(user_folder, model, options, error, text):
    (user_folder / "mynet.pt2").write_bytes(b"not a zip file")
    with pytest.raises(error, match=text):
        export_model(model, output="out", **options)
    assert sorted(path.name for path in user_folder.iterdir() if path.name != "__pycache__") == [
        "mynet.pt2",
        "mynet.py",
    ]


@pytest.mark.parametrize("until", ["trace", "translate", "passes", "precision"])
def test_stopping_early_writes_no_bundle(until, tmp_path):
    summary = export_model("shvit_s1", output=tmp_path / "out", until=until, dump_passes=tmp_path / "dump")
    assert summary["stages"][-1]["name"] == until
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "dump").exists() == (until in ("passes", "precision"))


def test_dry_run_does_nothing(tmp_path):
    summary = export_model("shvit_s1", output=tmp_path / "out", dry_run=True, dims=["batch=1:4"])
    assert summary["inputs"][0]["dims"][0] == {"name": "batch", "min": 1, "opt": 1, "max": 4}
    assert not list(tmp_path.iterdir())


def test_two_exports_are_byte_identical(tmp_path):
    """Other process, other hash seed, other folder: same bytes in every file but the report."""
    code = "from edgeattn.pipeline import export_model; export_model('shvit_s1', output='out', precision='fp16')"
    folders = [tmp_path / "a", tmp_path / "longer-name"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True)
    first, second = (folder / "out" for folder in folders)
    names = sorted(path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file())
    same, different, errors = filecmp.cmpfiles(first, second, names, shallow=False)
    assert (different, errors) == (["reports/export.json"], [])
    assert {"model.onnx", "manifest.json", "golden/outputs.npz", "reference/weights.safetensors"} <= set(same)
    content = b"".join((first / name).read_bytes() for name in ("model.onnx", "manifest.json", "reports/export.json"))
    assert str(tmp_path).encode() not in content
    assert os.path.expanduser("~").encode() not in content


def test_damaged_graph_is_noticed(tmp_path):
    bundle = export_model("shvit_s1", output=tmp_path / "out", check=False)
    with (tmp_path / "out" / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    with pytest.raises(IncompatibleError, match=r"EA0904.*model.onnx"):
        bundle.verify("model.onnx")


def test_wrong_graph_is_refused(tmp_path, monkeypatch):
    """The last check compares with the original, so a deploy form that is wrong never becomes a bundle."""
    from edgeattn import pipeline

    def wrong(module, align):
        deployed = module.deploy(align)
        with torch.no_grad():
            next(deployed.parameters()).mul_(1.001)
        return deployed.eval()

    monkeypatch.setattr(pipeline, "deploy", wrong)
    with pytest.raises(AccuracyError, match="EA0704"):
        export_model("shvit_s1", output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
