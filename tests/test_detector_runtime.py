"""A detector at run time: clouds into `Session.detect` and `edgeattn run`, and the options of `edgeattn export`."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny import registered, tiny_cloud

import edgeattn
from edgeattn.__main__ import run
from edgeattn.boxes import Detections, match, suppress_center
from edgeattn.detection import pack
from edgeattn.errors import UsageError
from edgeattn.pipeline import export_model

tiny = registered("pillar")


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    return export_model(tiny, output=tmp_path_factory.mktemp("detection") / "tiny.edgeattn", check=False)


@pytest.fixture(scope="module")
def session(bundle):
    with edgeattn.load(bundle, backend="ort", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return one cloud in every format, by suffix, in a folder of its own."""
    folder, cloud = tmp_path_factory.mktemp("clouds"), tiny_cloud(300)
    cloud.tofile(folder / "sweep.bin")
    np.save(folder / "sweep.npy", cloud.astype(np.float64))
    np.savez(folder / "sweep.npz", points=cloud, stamp=np.zeros(3))
    return {path.suffix: path for path in sorted(folder.iterdir())}


def same(found, expected):
    for part in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
    return True


class TestSession:
    @pytest.mark.parametrize("kind", [".bin", ".npy", ".npz", "str", "torch", "list", "fortran", "call"])
    def test_takes_clouds_of_any_kind(self, session, files, kind):
        cloud = tiny_cloud(300)
        given = {
            **files,
            "str": str(files[".bin"]),
            "torch": torch.from_numpy(cloud),
            "list": cloud.tolist(),
            "fortran": np.asfortranarray(cloud),
            "call": cloud,
        }[kind]
        found = session(given) if kind == "call" else session.detect(given)
        assert isinstance(found, Detections)
        assert isinstance(found.boxes, np.ndarray)
        assert 0 < len(found) <= 50
        assert found.warnings == ()
        assert set(found.name) <= {"Vehicle", "Pedestrian", "Cyclist"}
        assert same(found, session.detect(cloud))

    def test_is_what_the_original_finds(self, session, bundle):
        """The other backend runs the PyTorch original of the bundle."""
        with edgeattn.load(bundle, backend="torch", threads=1) as original:
            for count in (1, 300, 1000):
                expected, found = original.detect(tiny_cloud(count, 5)), session.detect(tiny_cloud(count, 5))
                assert match(found, expected).share == 1.0
                assert match(found, expected).score_difference < 1e-5

    def test_raw_outputs_of_named_inputs(self, session):
        feeds, _ = pack(tiny_cloud(300), session.inputs[0])
        raw = session(feeds)
        assert raw.keys() == ("boxes", "scores", "labels", "counts")
        found = suppress_center(Detections(raw["boxes"], raw["scores"], raw["labels"]))
        assert same(session.detect(tiny_cloud(300)), found)

    def test_too_many_points(self, session):
        cloud = tiny_cloud(2300, reach=3.0)
        found = session.detect(cloud)
        assert found.warnings == ("points: 2300 found, 2000 fit, 300 lost",)
        assert same(found, session.detect(cloud[:2000]))
        with pytest.raises(UsageError, match=r"EA0148.*300 lost"):
            session.detect(cloud, strict_capacity=True)

    def test_too_many_voxels(self, session):
        warnings = session.detect(tiny_cloud(2000)).warnings
        assert len(warnings) == 1
        assert warnings[0].startswith("voxels of stage 0: 1")
        with pytest.raises(UsageError, match=r"EA0148.*voxels of stage 0"):
            session.detect(tiny_cloud(2000), strict_capacity=True)

    def test_strict_takes_what_fits(self, session):
        assert same(session.detect(tiny_cloud(300), strict_capacity=True), session.detect(tiny_cloud(300)))

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, session, value):
        cloud = tiny_cloud(10)
        cloud[4, 1] = value
        with pytest.raises(UsageError, match=r"EA0147.*1 of 10 points.*row 4"):
            session.detect(cloud)

    @pytest.mark.parametrize("shape", [(10, 4), (10, 6), (50,), (2, 10, 5), (0,)])
    def test_wrong_columns(self, session, shape):
        with pytest.raises(UsageError, match=r"EA0146\]: points: expects \[points x 5\]"):
            session.detect(np.zeros(shape, np.float32))

    def test_wrong_file(self, session, tmp_path):
        with pytest.raises(UsageError, match=r"EA0146.*no rows of 5"):
            session.detect(tiny_file(tmp_path / "odd.bin", 7))
        with pytest.raises(UsageError, match=r"EA0146.*no such point cloud"):
            session.detect(tmp_path / "absent.bin")

    @pytest.mark.parametrize("cloud", [tiny_cloud(0), tiny_cloud(50) + 500], ids=["empty", "outside"])
    @pytest.mark.parametrize("strict", [False, True])
    def test_nothing_in_the_range(self, session, cloud, strict):
        found = session.detect(cloud, strict_capacity=strict)
        assert len(found) == 0
        assert found.boxes.shape == (0, 7)
        assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int32)
        assert (found.name, found.warnings) == ([], ())

    def test_submitted_clouds_are_checked_now_and_found_later(self, session):
        clouds = [tiny_cloud(300), tiny_cloud(40)]
        waiting = [session.submit(cloud) for cloud in clouds]
        clouds[0][:] = 0
        assert same(waiting[0].result(), session.detect(tiny_cloud(300)))
        assert same(waiting[1].result(), session.detect(tiny_cloud(40)))
        with pytest.raises(UsageError, match="EA0146"):
            session.submit(np.zeros((3, 4), np.float32))

    def test_several_threads_at_once(self, session):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda seed: session.detect(tiny_cloud(200, seed % 2)), range(8)))
        for seed, each in enumerate(found):
            assert same(each, found[seed % 2])
        assert len(found[0]) != 0

    def test_closed(self, bundle):
        session = edgeattn.load(bundle, backend="ort", threads=1)
        session.close()
        with pytest.raises(UsageError, match="EA0136"):
            session.detect(tiny_cloud(3))


def tiny_file(path, numbers):
    np.zeros(numbers, np.float32).tofile(path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a bundle that takes no clouds."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "plain_runtime.py").write_text("import torch\nbuild = torch.nn.ReLU\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return export_model("plain_runtime:build", output=folder / "out", inputs=("x=2x5",), check=False)


def test_model_without_clouds_detects_nothing(plain):
    with (
        edgeattn.load(plain, backend="ort") as session,
        pytest.raises(UsageError, match=r"EA0143.*no point cloud"),
    ):
        session.detect(tiny_cloud(3))


class TestCommand:
    """`edgeattn run` and the options of `edgeattn export`."""

    @pytest.fixture
    def cli(self, capsys):
        def call(*arguments):
            code = run([str(argument) for argument in arguments])
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        return call

    def test_run_prints_the_best_boxes(self, cli, bundle, files):
        code, out, _ = cli("run", bundle.path, files[".bin"], "--top", "3", "--backend", "ort")
        lines = out.splitlines()
        assert code == 0
        assert lines[0] == "seeded weights, not trained: the boxes mean nothing"
        assert lines[1].startswith(f"{files['.bin']}: ")
        assert lines[2].split() == ["score", "x", "y", "z", "dx", "dy", "dz", "heading"]
        assert len(lines) == 6
        scores = [float(line.split()[1]) for line in lines[3:]]
        assert scores == sorted(scores, reverse=True)

    def test_run_as_json_and_saved(self, cli, bundle, files, session, tmp_path):
        folder, saved = files[".bin"].parent, tmp_path / "out.npz"
        code, out, _ = cli("run", bundle.path, folder, "--json", "-o", saved)
        document = json.loads(out)
        found = session.detect(tiny_cloud(300))
        assert (code, document["exit_code"], document["verdict"]) == (0, 0, "pass")
        assert [entry["input"] for entry in document["results"]] == [str(path) for path in files.values()]
        for entry in document["results"]:
            assert (entry["count"], entry["warnings"], len(entry["boxes"])) == (len(found), [], 5)
            best = entry["boxes"][0]
            assert best["score"] == pytest.approx(found.scores.max())
            assert best["name"] == ("Vehicle", "Pedestrian", "Cyclist")[best["label"] - 1]
        stored = np.load(saved)
        for path in files.values():
            for part in ("boxes", "scores", "labels"):
                np.testing.assert_array_equal(stored[f"{path}/{part}"], getattr(found, part))

    def test_strict_capacity(self, cli, bundle, tmp_path):
        tiny_cloud(2100, reach=3.0).tofile(tmp_path / "many.bin")
        code, out, _ = cli("run", bundle.path, tmp_path / "many.bin")
        assert code == 0
        assert out.splitlines()[-1] == "  warning: points: 2100 found, 2000 fit, 100 lost"
        saved = tmp_path / "out.npz"
        code, out, err = cli("run", bundle.path, tmp_path / "many.bin", "--strict-capacity", "-o", saved)
        assert (code, out) == (2, "")
        assert f"error[EA0148]: {tmp_path / 'many.bin'} does not fit: points: 2100 found, 2000 fit, 100 lost" in err
        assert not saved.exists()

    def test_empty_cloud(self, cli, bundle, tmp_path):
        code, out, _ = cli("run", bundle.path, tiny_file(tmp_path / "empty.bin", 0))
        assert (code, out.splitlines()[1:]) == (0, [f"{tmp_path / 'empty.bin'}: 0 boxes"])

    def test_labels_name_the_classes(self, cli, bundle, files, tmp_path):
        labels = tmp_path / "names.txt"
        labels.write_text("car\nwalker\nbike\n")
        code, out, _ = cli("run", bundle.path, files[".bin"], "--labels", labels, "--json")
        assert code == 0
        assert {box["name"] for box in json.loads(out)["results"][0]["boxes"]} <= {"car", "walker", "bike"}
        labels.write_text("car\n")
        code, _, err = cli("run", bundle.path, files[".bin"], "--labels", labels)
        assert code == 2
        assert "error[EA0145]: 1 labels for 3 classes" in err

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (("shvit_s1", "--max-points", "5"), "EA0115]: shvit_s1: takes no point clouds"),
            (("shvit_s1", "--max-voxels", "5"), "EA0115]: shvit_s1: takes no point clouds"),
            (("shvit_s1", "--max-sets", "5"), "EA0115]: shvit_s1: takes no point clouds"),
            (("shvit_s1", "--profile-from", "."), "EA0115]: --profile-from: shvit_s1 takes no point clouds"),
            (("shvit_s1", "--split", "blocks"), "EA0115]: --split blocks"),
            (("dsvt_tiny", "--max-voxels", "5", "--max-voxels", "6"), "EA0115]: --max-voxels: once, or once for each"),
            (("dsvt_tiny", *("--max-sets", "5") * 3), "EA0115]: --max-sets: once, or once for each of 2 shifts; got 3"),
            (("dsvt_tiny", "--max-points", "0"), "EA0150]"),
            (("dsvt_tiny", "--dim", "batch=1:4"), "EA0111]: dsvt_tiny: its inputs are fixed"),
            (("dsvt_tiny", "--profile-from", "nowhere"), "EA0140]: nowhere: no such folder"),
        ],
    )
    def test_options_that_do_not_fit(self, cli, tiny, arguments, text, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code, out, err = cli("export", *arguments)
        assert (code, out) == (2, "")
        assert text in err
        assert not list(tmp_path.iterdir())

    def test_strict_capacity_without_clouds(self, cli, plain):
        code, _, err = cli("run", plain.path, "x.png", "--strict-capacity")
        assert code == 2
        assert "error[EA0115]: --strict-capacity" in err
