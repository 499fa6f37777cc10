"""Bundles: written whole or not at all, the same bytes every time, and checked when they are opened and used."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from edgeattn.bundle import MANIFEST, Bundle, write_manifest, writing
from edgeattn.errors import IncompatibleError, MissingError, UsageError
from edgeattn.tensors import Dim, TensorSpec, read_arrays

MANIFEST_BODY = {
    "name": "tiny-fp32",
    "model": {"family": "user", "variant": "tiny", "source": "here", "weights_sha256": "seeded"},
    "inputs": [
        {"name": "image", "dtype": "float32", "dims": [{"name": "N", "min": 1, "opt": 2, "max": 4}, {"size": 3}]}
    ],
    "outputs": [{"name": "logits", "dtype": "float32", "dims": [{"name": "N", "min": 1, "opt": 2, "max": 4}]}],
    "precision": "fp32",
    "ops": [],
    "targets": [{"name": "portable"}],
    "stages": [],
    "tool_versions": {"edgeattn": "0"},
    "options": {},
}


def fill(folder):
    """Write a small bundle into `folder`."""
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "golden").mkdir()
    np.savez(folder / "golden" / "inputs.npz", image=np.ones((3, 2, 3), np.float32))
    (folder / "reference").mkdir()
    (folder / "reference" / "weights.safetensors").write_bytes(b"weights")
    (folder / "labels.txt").write_text("cat\ndog\n")
    (folder / "reports").mkdir()
    (folder / "reports" / "export.json").write_text("{}")
    write_manifest(folder, MANIFEST_BODY)


def write(final, *, then=lambda folder: None, force=False):
    """Write a small bundle at `final`; `then` runs last, before it gets its name."""
    with writing(final, force) as folder:
        fill(folder)
        then(folder)
    return final


def failing(error, cause=None):
    """Return a function that raises `error`."""

    def fail(folder):
        raise error from cause

    return fail


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "tiny.edgeattn")


def edit(path, **changes):
    """Change the manifest of the bundle at `path`; a value of None removes the key."""
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    kept = {key: value for key, value in manifest.items() if value is not None}
    (path / MANIFEST).write_text(json.dumps(kept))


def leftovers(folder, *expected):
    """Return what lies in `folder` beyond what is expected there."""
    return {item.name for item in folder.iterdir()} - set(expected)


class TestWriting:
    def test_appears_whole_at_the_end(self, tmp_path):
        final = tmp_path / "out.edgeattn"
        with writing(final) as folder:
            fill(folder)
            assert not final.exists()
            assert folder.parent == tmp_path
        assert Bundle.open(final).name == "tiny-fp32"
        assert not leftovers(tmp_path, "out.edgeattn")

    def test_keeps_usual_permissions(self, path):
        umask = os.umask(0)
        os.umask(umask)
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask

    @pytest.mark.parametrize(
        "error", [ValueError("bug"), KeyboardInterrupt(), SystemExit(143), UsageError("EA0101", "x")]
    )
    def test_error_leaves_nothing_and_passes_through(self, tmp_path, error):
        with pytest.raises(type(error)) as caught:
            write(tmp_path / "out.edgeattn", then=failing(error))
        assert caught.value is error
        assert caught.value.__cause__ is None
        assert not leftovers(tmp_path)

    @pytest.mark.parametrize("form", ["bundle", "file", "link", "empty folder"])
    def test_existing_output_is_refused_before_any_work(self, tmp_path, form):
        final = tmp_path / "out.edgeattn"
        if form == "bundle":
            write(final)
        elif form == "file":
            final.write_text("mine")
        elif form == "link":
            final.symlink_to(tmp_path / "nowhere")
        else:
            final.mkdir()
        with pytest.raises(UsageError, match="already exists") as caught, writing(final):
            pytest.fail("work was begun")
        assert (caught.value.code, caught.value.exit_code) == ("EA0105", 2)

    def test_force_replaces_a_bundle_only_at_the_end(self, path):
        before = Bundle.open(path).sha256
        with writing(path, force=True) as folder:
            fill(folder)
            (folder / "extra.txt").write_text("new")
            write_manifest(folder, MANIFEST_BODY)
            assert Bundle.open(path).sha256 == before
        assert "extra.txt" in Bundle.open(path).files
        assert not leftovers(path.parent, path.name)

    def test_force_keeps_the_old_bundle_when_the_new_one_fails(self, path):
        before = Bundle.open(path).sha256
        with pytest.raises(RuntimeError):
            write(path, then=failing(RuntimeError()), force=True)
        assert Bundle.open(path).sha256 == before
        assert not leftovers(path.parent, path.name)

    def test_force_keeps_the_old_bundle_when_the_rename_fails(self, path, monkeypatch):
        before, rename = Bundle.open(path).sha256, os.rename

        def fail_on_the_new(source, target):
            if str(source).endswith(".tmp"):
                raise OSError(errno.EIO, "broken disk")
            rename(source, target)

        monkeypatch.setattr(os, "rename", fail_on_the_new)
        with pytest.raises(OSError, match="broken disk"):
            write(path, force=True)
        assert Bundle.open(path).sha256 == before
        assert not leftovers(path.parent, path.name)

    @pytest.mark.parametrize("form", ["file", "folder"])
    def test_force_never_replaces_what_is_no_bundle(self, tmp_path, form):
        final = tmp_path / "precious"
        if form == "file":
            final.write_text("mine")
        else:
            final.mkdir()
            (final / "thesis.txt").write_text("mine")
        with pytest.raises(UsageError, match="not a bundle") as caught, writing(final, force=True):
            pytest.fail("work was begun")
        assert caught.value.code == "EA0108"
        assert final.exists()

    def test_the_slower_of_two_writers_is_refused(self, tmp_path):
        final = tmp_path / "out.edgeattn"

        def another_process(folder):
            final.mkdir()
            fill(final)

        with pytest.raises(UsageError, match="already exists"):
            write(final, then=another_process)
        assert Bundle.open(final)
        assert not leftovers(tmp_path, final.name)

    def test_missing_parent(self, tmp_path):
        with pytest.raises(UsageError, match="no such folder"), writing(tmp_path / "a" / "b.edgeattn"):
            pytest.fail("work was begun")

    def test_unwritable_parent(self):
        with pytest.raises(MissingError, match="cannot be written") as caught, writing("/proc/out.edgeattn"):
            pytest.fail("work was begun")
        assert (caught.value.code, caught.value.exit_code) == ("EA0202", 3)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_parent_without_permission(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(MissingError, match="Permission denied"), writing(tmp_path / "out.edgeattn"):
            pytest.fail("work was begun")

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            OSError(errno.EFBIG, "File too large"),
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        ],
    )
    def test_full_disk(self, tmp_path, error):
        with pytest.raises(MissingError, match="disk full") as caught:
            write(tmp_path / "out.edgeattn", then=failing(ValueError("the library's own words"), cause=error))
        assert (caught.value.code, caught.value.exit_code) == ("EA0203", 3)
        assert not leftovers(tmp_path)

    def test_a_denied_file_elsewhere_is_not_blamed_on_the_output(self, tmp_path):
        with pytest.raises(PermissionError), writing(tmp_path / "out.edgeattn"):
            raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/weights.pth")

    def test_sigterm_leaves_nothing(self, tmp_path):
        script = (
            "import sys, time; from edgeattn.bundle import writing\n"
            "with writing(sys.argv[1]) as folder:\n"
            "    (folder / 'model.onnx').write_bytes(b'x' * 100); print('ready', flush=True); time.sleep(60)"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "out.edgeattn")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "ready\n"
            assert leftovers(tmp_path)
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=20) == 128 + signal.SIGTERM
        assert not leftovers(tmp_path)

    def test_a_handler_of_the_caller_is_left_alone(self, tmp_path):
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            mine = signal.getsignal(signal.SIGTERM)
            with writing(tmp_path / "out.edgeattn") as folder:
                fill(folder)
                assert signal.getsignal(signal.SIGTERM) is mine
        finally:
            signal.signal(signal.SIGTERM, before)


class TestManifest:
    def test_same_input_same_bytes(self, tmp_path):
        write(tmp_path / "a")
        time.sleep(2.1)  # archives record times in steps of two seconds
        write(tmp_path / "b")
        assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()

    def test_hashes_every_file_but_itself_and_the_reports(self, path):
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {"model.onnx", "golden/inputs.npz", "reference/weights.safetensors", "labels.txt"}
        assert set(manifest["files"]) == expected
        assert manifest["schema"] == "edgeattn.bundle/1"
        assert manifest["engines"] == []
        text = (path / MANIFEST).read_text()
        assert text.endswith("}\n")
        assert list(manifest) == sorted(manifest)

    def test_an_incomplete_manifest_is_a_bug(self, tmp_path):
        with pytest.raises(ValueError, match="precision"):
            write_manifest(tmp_path, {key: value for key, value in MANIFEST_BODY.items() if key != "precision"})


class TestOpening:
    def test_reads_specifications(self, path):
        bundle = Bundle.open(str(path))
        assert bundle.inputs == (TensorSpec("image", "float32", (Dim("N", 1, 2, 4), Dim.fixed(3))),)
        assert str(bundle.inputs[0]) == "image: float32[N=1..4 x 3]"
        assert bundle.inputs[0].shape() == (2, 3)
        assert bundle.labels == ["cat", "dog"]
        assert bundle.arrays("golden/inputs.npz")["image"].shape == (3, 2, 3)
        assert bundle.precision == "fp32"

    def test_sha256_is_that_of_the_manifest(self, path):
        import hashlib

        assert Bundle.open(path).sha256 == hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()

    @pytest.mark.parametrize(
        ("form", "words"), [("nothing", "does not exist"), ("file", "a file"), ("folder", "no manifest")]
    )
    def test_what_is_no_bundle(self, tmp_path, form, words):
        place = tmp_path / "thing"
        if form == "file":
            place.write_text("x")
        elif form == "folder":
            place.mkdir()
        with pytest.raises(UsageError, match=words) as caught:
            Bundle.open(place)
        assert caught.value.code == "EA0106"

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"schema": "edgeattn.bundle/1"}']
    )
    def test_damaged_manifest(self, path, content):
        (path / MANIFEST).write_bytes(content)
        with pytest.raises(IncompatibleError) as caught:
            Bundle.open(path)
        assert caught.value.code in ("EA0901", "EA0902")
        assert caught.value.exit_code == 8

    @pytest.mark.parametrize("key", ["name", "model", "inputs", "outputs", "files", "engines", "options"])
    def test_required_keys(self, path, key):
        edit(path, **{key: None})
        with pytest.raises(IncompatibleError, match="damaged") as caught:
            Bundle.open(path)
        assert key in caught.value.why

    @pytest.mark.parametrize(
        "change",
        [
            {"inputs": [{"name": "x"}]},
            {"inputs": "image"},
            {"outputs": [{"name": "x", "dtype": "float32", "dims": [{}]}]},
            {"files": ["model.onnx"]},
            {"model": "tiny"},
        ],
    )
    def test_wrong_types(self, path, change):
        edit(path, **change)
        with pytest.raises(IncompatibleError) as caught:
            Bundle.open(path)
        assert caught.value.code == "EA0902"

    @pytest.mark.parametrize("schema", ["edgeattn.bundle/2", "edgeattn.bundle/10", "other/1", 1, None])
    def test_other_schema(self, path, schema):
        edit(path, schema=schema)
        with pytest.raises(IncompatibleError) as caught:
            Bundle.open(path)
        assert (caught.value.code, caught.value.exit_code) == ("EA0901", 8)

    def test_minor_schema_and_unknown_keys_are_kept(self, path):
        edit(path, schema="edgeattn.bundle/1.3", later={"a": 1})
        assert Bundle.open(path).manifest["later"] == {"a": 1}

    def test_missing_file(self, path):
        (path / "model.onnx").unlink()
        with pytest.raises(IncompatibleError, match=r"model\.onnx: missing") as caught:
            Bundle.open(path)
        assert caught.value.code == "EA0903"

    def test_reference_may_be_left_out_of_a_copy(self, path):
        (path / "reference" / "weights.safetensors").unlink()
        bundle = Bundle.open(path)
        bundle.verify()
        with pytest.raises(IncompatibleError, match="missing"):
            bundle.file("reference/weights.safetensors")


class TestFiles:
    @pytest.mark.parametrize(
        "relative", ["../secret", "/etc/passwd", "golden/../../secret", "link", "folder/secret", "."]
    )
    def test_never_leaves_the_bundle(self, path, relative):
        (path.parent / "secret").write_text("x")
        (path / "link").symlink_to("../secret")
        (path / "folder").symlink_to("..")
        with pytest.raises(IncompatibleError) as caught:
            Bundle.open(path).file(relative)
        assert caught.value.code == "EA0905"

    def test_a_manifest_cannot_name_files_outside(self, path):
        (path.parent / "secret").write_text("x")
        edit(path, files={"../secret": "0" * 64})
        with pytest.raises(IncompatibleError) as caught:
            Bundle.open(path)
        assert caught.value.code == "EA0905"

    def test_a_linked_bundle_is_fine(self, path, tmp_path):
        (tmp_path / "current").symlink_to(path)
        Bundle.open(tmp_path / "current").verify()

    @pytest.mark.parametrize("content", [b"graphs", b"", b"grap"])
    def test_changed_file(self, path, content):
        bundle = Bundle.open(path)
        (path / "model.onnx").write_bytes(content)
        bundle.verify("labels.txt")
        for files in ((), ("model.onnx",)):
            with pytest.raises(IncompatibleError, match="changed") as caught:
                bundle.verify(*files)
            assert (caught.value.code, caught.value.exit_code) == ("EA0904", 8)

    def test_unrecorded_file(self, path):
        (path / "stray.txt").write_text("x")
        with pytest.raises(IncompatibleError, match="not recorded"):
            Bundle.open(path).verify("stray.txt")

    def test_pickles_are_refused(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
        with pytest.raises(UsageError, match="plain arrays"):
            read_arrays(tmp_path / "a.npz")

    def test_truncated_arrays(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=np.ones(1000))
        (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-50])
        with pytest.raises(UsageError) as caught:
            read_arrays(tmp_path / "a.npz")
        assert caught.value.code == "EA0107"


@pytest.mark.parametrize("dim", [Dim.fixed(7), Dim("N", 1, 2, 8), Dim("h//2")], ids=str)
def test_dims_survive_the_manifest(dim):
    assert Dim.from_dict(dim.as_dict()) == dim


def test_specifications_survive_the_manifest():
    spec = TensorSpec("image", "float16", (Dim("N", 1, 1, 2), Dim.fixed(3)), {"resize": 256, "crop": 224})
    assert TensorSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec
