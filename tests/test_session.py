"""The runtime API: every public call on every backend, the same numbers from all, and errors before any work."""

from __future__ import annotations

import io
import json
import shutil
import sys
import threading
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import edgeattn
from edgeattn.backends import BACKENDS, usable
from edgeattn.bundle import MANIFEST, Bundle, write_manifest
from edgeattn.errors import BuildError, IncompatibleError, MissingError, UnsupportedError, UsageError
from edgeattn.originals import load_program, original
from edgeattn.session import Session, load
from edgeattn.tensors import Outputs

TINY = '''
import torch
from torch import nn

class Tiny(nn.Module):
    """Two inputs, two outputs, one of them a pooled map, and a dynamic batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, image, shift):
        pooled = torch.relu(self.conv(image)).mean((2, 3))
        return self.head(pooled) + shift, pooled
'''


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a bundle of a user's module: image [N, 3, 8, 8] and shift [N, 5], N from 1 to 4."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tinymodel_session.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = edgeattn.export_model(
            "tinymodel_session:Tiny",
            output=folder / "tiny.edgeattn",
            inputs=("image=Nx3x8x8", "shift=Nx5"),
            dims=("N=1:4:2",),
            check=False,
        )
    assert isinstance(made, Bundle)
    return made


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """Return a bundle of a catalogue model, seeded."""
    path = tmp_path_factory.mktemp("catalogue") / "shvit_s1.edgeattn"
    return edgeattn.export_model("shvit_s1", output=path, check=False)


@pytest.fixture
def copy(tiny, tmp_path):
    """Return the path of a copy of the small bundle that a test may damage."""
    return shutil.copytree(tiny.path, tmp_path / "copy.edgeattn")


@pytest.fixture(params=sorted(BACKENDS))
def session(request, tiny):
    with load(tiny, request.param) as opened:
        yield opened


def feeds(batch=2):
    rng = np.random.default_rng(batch)
    image = rng.standard_normal((batch, 3, 8, 8), dtype=np.float32)
    return {"image": image, "shift": rng.standard_normal((batch, 5), dtype=np.float32)}


def expected(tiny, inputs):
    with torch.inference_mode():
        results = original(tiny)(*(torch.from_numpy(array) for array in inputs.values()))
    return [result.numpy() for result in results]


class Capsule:
    """An array that speaks DLPack and nothing else."""

    def __init__(self, array):
        self._array, self.dtype, self.shape = array, array.dtype, array.shape

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class Namespaced(Capsule):
    """An array of a library that follows the array API standard."""

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=lambda array: Namespaced(np.from_dlpack(array)))


class TestResults:
    @pytest.mark.parametrize("batch", [1, 2, 4])
    def test_agrees_with_the_original(self, session, tiny, batch):
        inputs = feeds(batch)
        for found, wanted in zip(session(inputs), expected(tiny, inputs), strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)

    def test_agrees_with_the_golden_outputs(self, session, tiny):
        inputs, outputs = tiny.arrays("golden/inputs.npz"), tiny.arrays("golden/outputs.npz")
        for index in range(3):
            found = session({name: values[index] for name, values in inputs.items()})
            for name, values in outputs.items():
                np.testing.assert_allclose(found[name], values[index], rtol=1e-5, atol=1e-6)

    def test_names_dtypes_and_order_are_those_of_the_manifest(self, session, tiny):
        found = session(feeds())
        assert isinstance(found, Outputs)
        assert isinstance(found, tuple)
        assert found.keys() == tuple(entry["name"] for entry in tiny.manifest["outputs"])
        assert found[0] is found[found.keys()[0]] is found.values()[0]
        assert list(dict(found)) == list(found.keys())
        assert dict(found.items()).keys() == dict(found).keys()
        assert len(found[:1]) == 1
        first, second = found
        assert (first.shape, second.shape) == ((2, 5), (2, 8))

    def test_inputs_by_name_in_any_order_or_by_position(self, session):
        inputs = feeds()
        named = session({"shift": inputs["shift"], "image": inputs["image"]})
        positional = session(inputs["image"], inputs["shift"])
        np.testing.assert_array_equal(named[0], positional[0])

    @pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, Capsule, Namespaced])
    def test_same_kind_out(self, session, kind):
        inputs = feeds()
        wanted = session(inputs)[0]
        found = session({name: kind(array) for name, array in inputs.items()})[0]
        expected_type = {torch.from_numpy: torch.Tensor, Namespaced: Namespaced}.get(kind)
        if expected_type is not None:
            assert isinstance(found, expected_type)
        else:
            assert hasattr(found, "__dlpack__")
        np.testing.assert_array_equal(np.from_dlpack(found), wanted)

    @pytest.mark.parametrize("form", ["fortran", "read-only", "reversed", "step", "gradient"])
    def test_any_memory_layout(self, session, form):
        inputs = feeds()
        image = inputs["image"]
        wanted = session(inputs)[0]
        if form == "fortran":
            changed = np.asfortranarray(image)
        elif form == "read-only":
            changed = image.copy()
            changed.flags.writeable = False
        elif form == "reversed":
            changed = image[:, :, ::-1].copy()[:, :, ::-1]
        elif form == "step":
            changed = np.repeat(image, 2, axis=3)[..., ::2]
        else:
            changed = torch.from_numpy(image).requires_grad_()
        np.testing.assert_array_equal(np.asarray(session(changed, inputs["shift"])[0]), wanted)

    def test_inputs_are_left_alone(self, session):
        inputs = feeds()
        before = {name: array.copy() for name, array in inputs.items()}
        session(inputs)
        for name in inputs:
            np.testing.assert_array_equal(inputs[name], before[name])


class TestChecks:
    @pytest.fixture(autouse=True)
    def _no_work(self, request):
        """Fail when the model runs or converts anything although an input is wrong."""
        if "session" in request.fixturenames:
            runner = request.getfixturevalue("session")._runner
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(runner, "run", lambda *_: pytest.fail("the model ran"))
                patch.setattr(runner, "adopt", lambda *_: pytest.fail("an input was converted"))
                yield
        else:
            yield

    @pytest.mark.parametrize("dtype", ["float64", "float16", "int32", ">f4"])
    def test_dtype(self, session, dtype):
        inputs = feeds()
        with pytest.raises(UsageError, match="image: expects float32") as caught:
            session(inputs["image"].astype(dtype), inputs["shift"])
        assert caught.value.code == "EA0132"

    def test_torch_dtype(self, session):
        inputs = feeds()
        with pytest.raises(UsageError, match="expects float32, got bfloat16"):
            session(torch.from_numpy(inputs["image"]).bfloat16(), inputs["shift"])

    @pytest.mark.parametrize(
        ("shape", "words"),
        [
            ((5, 3, 8, 8), "N=1..4"),
            ((0, 3, 8, 8), "N=1..4"),
            ((2, 4, 8, 8), "axis 1 must be 3"),
            ((2, 3, 8, 9), "axis 3 must be 8"),
            ((3, 8, 8), r"expects \[N=1..4 x 3 x 8 x 8\], got \[3 x 8 x 8\]"),
            ((), "expects"),
        ],
    )
    def test_shape_with_the_allowed_range(self, session, shape, words):
        with pytest.raises(UsageError, match=words) as caught:
            session(np.zeros(shape, np.float32), np.zeros((2, 5), np.float32))
        assert caught.value.code == "EA0133"

    def test_one_name_one_size(self, session):
        with pytest.raises(UsageError, match=r"axis 0 \(N\) is 3, but 2 elsewhere"):
            session(np.zeros((2, 3, 8, 8), np.float32), np.zeros((3, 5), np.float32))

    @pytest.mark.parametrize("value", [[[1.0]], 1.0, None, "x"])
    def test_kind(self, session, value):
        with pytest.raises(UsageError, match=f"got {type(value).__name__}") as caught:
            session(value, feeds()["shift"])
        assert caught.value.code == "EA0131"

    @pytest.mark.parametrize("arguments", [(), (1,), (1, 2, 3), ({"image": 1},), ({"image": 1, "shift": 2, "x": 3},)])
    def test_names_and_count(self, session, arguments):
        with pytest.raises(UsageError, match="image, shift") as caught:
            session(*arguments)
        assert caught.value.code == "EA0130"

    def test_submit_checks_at_once(self, session):
        with pytest.raises(UsageError, match="image, shift"):
            session.submit({})


class TestCalls:
    def test_info(self, session, tiny):
        assert session.info.backend in BACKENDS
        assert session.info.device == "cpu"
        assert session.info.bundle_sha256 == tiny.sha256
        assert session.info.precision == "fp32"
        assert session.inputs == tiny.inputs
        assert session.outputs == tiny.outputs
        assert "tiny.edgeattn" in repr(session)

    def test_submit(self, session):
        many = [feeds(batch) for batch in (1, 2, 3, 4)] * 3
        futures = [session.submit(inputs) for inputs in many]
        for inputs, future in zip(many, futures, strict=True):
            np.testing.assert_array_equal(future.result(timeout=30)[0], session(inputs)[0])

    def test_one_session_from_many_threads(self, session):
        many = [feeds(1 + index % 4) for index in range(8)]
        wanted = [session(inputs)[0] for inputs in many]
        start = threading.Barrier(8)

        def work(index):
            start.wait()
            return [session(many[index])[0] for _ in range(25)]

        with ThreadPoolExecutor(8) as pool:
            for index, results in enumerate(pool.map(work, range(8))):
                for found in results:
                    np.testing.assert_array_equal(found, wanted[index])

    def test_bound_buffers_are_filled_and_returned(self, session):
        inputs, wanted = feeds(), session(feeds())
        name = wanted.keys()[1]
        buffer = np.full((2, 8), np.nan, np.float32)
        session.bind(outputs={name: buffer})
        found = session(inputs)
        assert found[name] is buffer
        np.testing.assert_array_equal(buffer, wanted[name])
        np.testing.assert_array_equal(found[0], wanted[0])
        session.bind()
        assert session(inputs)[name] is not buffer

    def test_bound_torch_buffer(self, session):
        wanted = session(feeds())
        buffer = torch.full((2, 5), float("nan"))
        session.bind({wanted.keys()[0]: buffer})
        assert session(feeds())[0] is buffer
        np.testing.assert_array_equal(buffer.numpy(), wanted[0])

    def test_wrong_buffers(self, session):
        name = session.outputs[0].name
        with pytest.raises(UsageError, match="no such output"):
            session.bind({"nothing": np.zeros((2, 5), np.float32)})
        with pytest.raises(UsageError, match="buffer of float32"):
            session.bind({name: np.zeros((2, 5))})
        session.bind({name: np.zeros((3, 5), np.float32)})
        with pytest.raises(UsageError, match="bound buffer"):
            session(feeds(2))

    def test_a_clone_shares_the_weights_and_nothing_else(self, session):
        wanted = session(feeds())
        clone = session.clone()
        session.bind({wanted.keys()[0]: np.zeros((2, 5), np.float32)})
        assert clone(feeds())[0] is not session(feeds())[0]
        session.close()
        np.testing.assert_array_equal(clone(feeds())[0], wanted[0])
        clone.close()

    def test_closed(self, tiny):
        with load(tiny) as session:
            future = session.submit(feeds())
        assert future.done()
        for call in (lambda: session(feeds()), lambda: session.submit(feeds()), session.clone):
            with pytest.raises(UsageError, match="closed"):
                call()
        session.close()

    def test_warmup_and_bench(self, session):
        session.warmup(2)
        measured = session.bench(duration="50ms")
        assert measured["scope"] == "e2e"
        assert 0 < measured["p50_ms"] <= measured["max_ms"]
        with pytest.raises(UsageError, match="not a duration"):
            session.bench(duration="soon")

    def test_what_a_cpu_has_not(self, session):
        with pytest.raises(UnsupportedError, match="no CUDA graphs") as caught:
            session.capture_graph()
        assert caught.value.exit_code == 4
        with session.stream(None):
            session(feeds())
        with pytest.raises(UnsupportedError, match="no streams"), session.stream(object()):
            pytest.fail("entered")


class TestLoading:
    def test_the_best_backend_is_recorded(self, tiny, monkeypatch):
        assert load(tiny.path).info.backend == usable()[0] == "ort"
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
        assert load(tiny.path).info.backend == "torch"
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingError, match="no backend is usable"):
            load(tiny.path)

    @pytest.mark.parametrize("backend", ["tensorrt", "rtx"])
    def test_backends_to_come_never_fall_back(self, tiny, backend):
        with pytest.raises(MissingError, match=backend) as caught:
            load(tiny, backend)
        assert (caught.value.code, caught.value.exit_code) == ("EA0204", 3)

    def test_unknown_backend(self, tiny):
        with pytest.raises(UsageError, match="did you mean torch"):
            load(tiny, "pytorch")

    @pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:1", "cuda:-1"])
    def test_unknown_device(self, tiny, device):
        with pytest.raises(UsageError, match="no such device"):
            load(tiny, device=device)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    @pytest.mark.parametrize("backend", sorted(BACKENDS))
    def test_missing_device(self, tiny, backend):
        with pytest.raises(MissingError, match="cuda:0") as caught:
            load(tiny, backend, device="cuda")
        assert caught.value.code == "EA0206"

    @pytest.mark.parametrize("package", ["onnxruntime", "torch"])
    def test_missing_package_names_the_extra(self, tiny, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingError, match=f"{package} is not installed") as caught:
            load(tiny, {"onnxruntime": "ort"}.get(package, package))
        assert "edgeattn[cpu]" in caught.value.hints[0]

    def test_threads(self, tiny):
        with pytest.raises(UsageError, match="1 or more"):
            load(tiny, threads=0)
        before = torch.get_num_threads()
        seen = []
        with load(tiny, "torch", threads=before + 1) as session:
            session._runner.module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
            session(feeds())
        assert seen == [before + 1]
        assert torch.get_num_threads() == before

    def test_a_provider_that_falls_back_is_an_error(self, tiny, monkeypatch):
        import onnxruntime

        class Elsewhere(onnxruntime.InferenceSession):
            def get_providers(self):
                return ["SlowExecutionProvider", "CPUExecutionProvider"]

        monkeypatch.setattr(onnxruntime, "InferenceSession", Elsewhere)
        with pytest.raises(MissingError, match="chose SlowExecutionProvider"):
            load(tiny, "ort")

    def test_a_changed_graph_is_refused(self, copy):
        graph = copy / "model.onnx"
        graph.write_bytes(graph.read_bytes()[:-7])
        with pytest.raises(IncompatibleError, match="changed"):
            load(copy, "ort")

    def test_a_graph_the_runtime_refuses(self, copy):
        (copy / "model.onnx").write_bytes(b"not a graph")
        write_manifest(copy, json.loads((copy / MANIFEST).read_text()))
        with pytest.raises(BuildError, match="refuses") as caught:
            load(copy, "ort")
        assert (caught.value.code, caught.value.exit_code) == ("EA0601", 5)

    def test_a_copy_without_the_original(self, copy):
        shutil.rmtree(copy / "reference")
        assert load(copy, "ort")(feeds())
        with pytest.raises(IncompatibleError, match="no PyTorch original") as caught:
            load(copy, "torch")
        assert caught.value.code == "EA0906"

    def test_a_catalogue_model(self, catalogue):
        x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
        with load(catalogue, "ort", threads=2) as ort, load(catalogue, "torch", threads=2) as eager:
            found, wanted = ort(x), eager({"image": x})
        assert isinstance(found, np.ndarray), "a single output is no tuple"
        assert found.shape == (1, 1000)
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()

    def test_weights_of_another_model(self, catalogue, tmp_path):
        path = shutil.copytree(catalogue.path, tmp_path / "other.edgeattn")
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["model"]["variant"] = "shvit_s2"
        write_manifest(path, manifest)
        with pytest.raises(IncompatibleError, match="do not fit shvit_s2") as caught:
            load(path, "torch")
        assert caught.value.code == "EA0907"

    def test_session_type(self, tiny):
        assert isinstance(edgeattn.load(tiny), Session)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "linear.pt2"
    rows = torch.export.Dim("rows", min=1, max=8)
    exported = torch.export.export(nn.Linear(4, 2), (torch.zeros(2, 4),), dynamic_shapes=({0: rows},))
    torch.export.save(exported, path)
    return path


class TestPrograms:
    """Nothing in a bundle is unpickled or evaluated, although the file format of PyTorch would allow both."""

    def rewritten(self, program, target, change):
        """Return a copy of the archive in which `change(name, content)` had its way with every entry."""
        with zipfile.ZipFile(program) as old, zipfile.ZipFile(target, "w") as new:
            for name in old.namelist():
                new.writestr(name, change(name, old.read(name)))
        return target

    def test_a_good_one(self, program):
        assert load_program(program).module()(torch.zeros(3, 4)).shape == (3, 2)

    def test_a_pickled_object(self, program, tmp_path):
        marker = tmp_path / "ran"
        evil = io.BytesIO()
        torch.save(({"x": _Evil(str(marker))},), evil)

        def change(name, content):
            return evil.getvalue() if "sample_inputs" in name else content

        with pytest.raises(UsageError) as caught:
            load_program(self.rewritten(program, tmp_path / "evil.pt2", change))
        assert caught.value.code == "EA0109"
        assert not marker.exists()

    @pytest.mark.parametrize(
        "text",
        [
            "__import__('os').system('touch {}')",
            "Symbol('s0') if open('{}', 'w') else 1",
            'S(\'open("{}", "w")\')',
            "[x for x in (1,)]",
            "(lambda: 1)()",
        ],
    )
    def test_an_expression_that_is_code(self, program, tmp_path, text):
        marker = tmp_path / "ran"

        def change(name, content):
            if not name.endswith(".json") or b"expr_str" not in content:
                return content
            return _with_expression(content, text.format(marker))

        with pytest.raises(UsageError, match=r"size expression|not a readable") as caught:
            load_program(self.rewritten(program, tmp_path / "evil.pt2", change))
        assert caught.value.code == "EA0109"
        assert not marker.exists()

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
    def test_garbage(self, tmp_path, content):
        (tmp_path / "x.pt2").write_bytes(content)
        with pytest.raises(UsageError, match="not a readable exported program"):
            load_program(tmp_path / "x.pt2")


class _Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (self.marker, "w")


def _with_expression(content, text):
    """Replace every symbolic expression in a JSON document."""

    def change(value):
        if isinstance(value, dict):
            return {key: text if key == "expr_str" else change(entry) for key, entry in value.items()}
        return [change(entry) for entry in value] if isinstance(value, list) else value

    return json.dumps(change(json.loads(content)))
