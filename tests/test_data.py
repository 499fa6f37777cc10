"""Images in every mode and size, folders, archives, seeded data: the same samples in the same order, or an error."""

from __future__ import annotations

import json
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeattn.data import open_data, read_labels, seeded_images, seeded_input
from edgeattn.errors import MissingError, UsageError
from edgeattn.image import load_image
from edgeattn.model import Preprocess
from edgeattn.tensors import Dim, TensorSpec

# Nothing but resize and crop: pixels come out as value / 255.
PLAIN = Preprocess(16, 16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _spec(
    *sizes: int, name: str = "image", dtype: str = "float32", preprocess: Preprocess | None = PLAIN
) -> TensorSpec:
    dims = tuple(map(Dim.fixed, sizes))
    return TensorSpec(name, dtype, dims, asdict(preprocess) if preprocess else None)


IMAGE = _spec(1, 3, 16, 16)


def _picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _pixels(path: Path, preprocess: Preprocess = PLAIN, **options: Any) -> np.ndarray:
    """Return the loaded image as 8-bit [h, w, 3]."""
    return np.round(load_image(path, preprocess, **options)[0].transpose(1, 2, 0) * 255).astype(np.uint8)


def _error(function: Callable[[], Any], code: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        function()
    assert caught.value.code == code
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("width", "height", "resize", "target", "box"),
    [
        # The longer side is truncated (341.33 -> 341), an offset of half a pixel goes to the even side.
        (640, 480, 256, (341, 256), (58, 16, 282, 240)),
        (480, 640, 256, (256, 341), (16, 58, 240, 282)),
        (500, 375, 224, (298, 224), (37, 0, 261, 224)),
        (333, 500, 230, (230, 345), (3, 60, 227, 284)),
        (227, 224, 224, (227, 224), (2, 0, 226, 224)),
        (225, 224, 224, (225, 224), (0, 0, 224, 224)),
        (30, 30, 256, (256, 256), (16, 16, 240, 240)),
    ],
)
def test_geometry_is_that_of_the_evaluation_scripts(
    width: int, height: int, resize: int, target: tuple[int, int], box: tuple[int, int, int, int], tmp_path: Path
) -> None:
    picture = _picture(width, height)
    picture.save(tmp_path / "a.png")
    plan = Preprocess(resize, 224, mean=PLAIN.mean, std=PLAIN.std)
    expected = np.asarray(picture.resize(target, Image.Resampling.BICUBIC).crop(box))
    np.testing.assert_array_equal(_pixels(tmp_path / "a.png", plan), expected)


def test_crop_beyond_the_image_is_black(tmp_path: Path) -> None:
    Image.new("RGB", (20, 30), "white").save(tmp_path / "a.png")
    pixels = _pixels(tmp_path / "a.png", Preprocess(11, 16, mean=PLAIN.mean, std=PLAIN.std))
    assert [int(column.max()) for column in pixels.transpose(1, 0, 2)] == [0, 0, *[255] * 11, 0, 0, 0]


def test_normalisation(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (255, 0, 51)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", Preprocess(16, 16))
    assert (image.shape, image.dtype, image.flags.c_contiguous) == ((1, 3, 16, 16), np.float32, True)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(image[0, :, 3, 5], expected, rtol=1e-6)


def test_other_sizes_keep_the_field_of_view(tmp_path: Path) -> None:
    picture = _picture(100, 80)
    picture.save(tmp_path / "a.png")
    plan = Preprocess(20, 16, mean=PLAIN.mean, std=PLAIN.std)
    square = picture.resize((50, 40), Image.Resampling.BICUBIC).crop((9, 4, 41, 36))
    np.testing.assert_array_equal(_pixels(tmp_path / "a.png", plan, size=(32, 32)), np.asarray(square))
    wide = picture.resize((80, 64), Image.Resampling.BICUBIC).crop((8, 16, 72, 48))
    np.testing.assert_array_equal(_pixels(tmp_path / "a.png", plan, size=(32, 64)), np.asarray(wide))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "YCbCr"])
def test_every_colour_mode(mode: str, tmp_path: Path) -> None:
    picture = _picture(16, 16).convert(mode)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    picture.save(path)
    with Image.open(path) as stored:
        expected = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(_pixels(path), expected)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(_pixels(tmp_path / "a.png")[..., 1].reshape(-1), np.arange(256))


def test_transparent_pixels_keep_their_colour(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert _pixels(tmp_path / "a.png")[0, 0].tolist() == [10, 20, 30]


def test_orientation_tag_is_followed(tmp_path: Path) -> None:
    picture = _picture(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    picture.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(_pixels(tmp_path / "a.png"), np.rot90(np.asarray(picture), -1))


def _broken_image(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        _picture(64, 64).save(folder / name)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        return folder / name

    return make


def _float_image(folder: Path) -> Path:
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "a.tif")
    return folder / "a.tif"


def _notes(folder: Path) -> Path:
    (folder / "a.jpg").write_text("some notes")
    return folder / "a.jpg"


BAD_IMAGES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (lambda folder: folder / "a.jpg", "no such image"),
    "folder": (lambda folder: folder, "a folder"),
    "text": (_notes, "not an image"),
    "truncated jpeg": (_broken_image("a.jpg"), "truncated"),
    "truncated png": (_broken_image("a.png"), "truncated"),
    "truncated bmp": (_broken_image("a.bmp"), "truncated"),
    "floats": (_float_image, "unsupported"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_named(case: str, tmp_path: Path) -> None:
    make, words = BAD_IMAGES[case]
    path = make(tmp_path)
    error = _error(lambda: load_image(path, PLAIN), "EA0141")
    assert words in error.message
    assert str(path) in error.message


def test_missing_pillow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MissingError, match="PIL is not installed") as caught:
        load_image(tmp_path / "a.png", PLAIN)
    assert "edgeattn[cpu]" in caught.value.hints[0]


@pytest.mark.parametrize("shape", [(1, 3, 224, 224), (2, 3, 97, 131), (1, 3, 1, 1)])
def test_seeded_images(shape: tuple[int, ...]) -> None:
    images = seeded_images(5, shape)
    assert (images.shape, images.dtype) == (shape, np.float32)
    np.testing.assert_array_equal(images, seeded_images(5, shape))
    assert np.abs(images - seeded_images(6, shape)).max() > 0.1
    assert images.min() >= -2.2
    assert images.max() <= 2.7


def test_seeded_images_look_natural() -> None:
    image = seeded_images(0, (1, 3, 256, 256))[0]
    assert 0.4 < image.std() < 1.2
    neighbours = np.corrcoef(image[0, :, 1:].reshape(-1), image[0, :, :-1].reshape(-1))[0, 1]
    assert neighbours > 0.9
    assert np.corrcoef(image[0].reshape(-1), image[1].reshape(-1))[0, 1] > 0.5
    power = np.abs(np.fft.rfft2(image.mean(0))) ** 2
    bands = [power[low : 2 * low, low : 2 * low].mean() for low in (4, 16, 64)]
    assert bands[0] > 4 * bands[1] > 16 * bands[2] > 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32"])
def test_seeded_inputs_that_are_no_images(dtype: str) -> None:
    value = seeded_input(3, (4, 50), dtype)
    assert (value.shape, value.dtype.name) == ((4, 50), dtype)
    assert len(np.unique(value)) > 1
    assert not dtype.startswith("int") or set(np.unique(value)) == {0, 1}


def test_seeded_data_by_default() -> None:
    data = open_data(None, [IMAGE], seed=7)
    samples = list(data)
    assert (len(data), len(samples), data.seeded) == (8, 8, True)
    assert len({name for name, _ in samples}) == 8
    assert len({arrays["image"].tobytes() for _, arrays in samples}) == 8
    again = list(open_data("seed:7", [IMAGE], samples=3))
    assert len(again) == 3
    for (name, arrays), (other, others) in zip(again, samples, strict=False):
        assert name == other
        np.testing.assert_array_equal(arrays["image"], others["image"])


def test_dynamic_sizes_take_their_best_value() -> None:
    dims = (Dim("batch", 1, 2, 8), Dim.fixed(3), Dim("height", 16, 32, 64), Dim.fixed(16))
    ((_, arrays),) = open_data(None, [TensorSpec("image", "float32", dims)], samples=1)
    assert arrays["image"].shape == (2, 3, 32, 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return class folders with an image each in several formats, and files that are none."""
    root = tmp_path / "val"
    for index, name in enumerate(["b/2.png", "a/10.jpg", "a/9.JPEG", "c/d/1.bmp", "0.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        _picture(20, 16, index).save(root / name)
    (root / "notes.txt").touch()
    (root / ".hidden.png").touch()
    (root / ".thumbs").mkdir()
    (root / ".thumbs" / "1.png").touch()
    return root


def test_folder_in_a_fixed_order(folder: Path) -> None:
    data = open_data(folder, [IMAGE])
    names = ["0.png", "a/10.jpg", "a/9.JPEG", "b/2.png", "c/d/1.bmp"]
    assert [name for name, _ in data] == names
    assert (len(data), data.seeded) == (5, False)
    for name, arrays in data:
        np.testing.assert_array_equal(arrays["image"], load_image(folder / name, PLAIN))
    assert data.description == "5 of 5 images in val"


def test_samples_are_spread_over_the_folder(folder: Path) -> None:
    data = open_data(str(folder), [IMAGE], samples=2)
    assert [name for name, _ in data] == ["0.png", "a/9.JPEG"]
    assert data.description == "2 of 5 images in val"


def test_batches_are_filled_from_the_start(folder: Path) -> None:
    data = open_data(folder, [_spec(2, 3, 16, 16)])
    assert [name for name, _ in data] == ["0.png, a/10.jpg", "a/9.JPEG, b/2.png", "c/d/1.bmp, 0.png"]
    assert {arrays["image"].shape for _, arrays in data} == {(2, 3, 16, 16)}


def test_single_image_at_another_size_and_type(folder: Path) -> None:
    ((name, arrays),) = open_data(folder / "0.png", [_spec(1, 3, 32, 48, dtype="float16")])
    assert (name, arrays["image"].shape, arrays["image"].dtype) == ("0.png", (1, 3, 32, 48), np.float16)


def test_broken_image_is_named_when_its_turn_comes(folder: Path) -> None:
    (folder / "b" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    samples = iter(open_data(folder, [IMAGE]))
    assert [next(samples)[0] for _ in range(3)] == ["0.png", "a/10.jpg", "a/9.JPEG"]
    assert str(folder / "b" / "2.png") in _error(lambda: next(samples), "EA0141").message


BAD_SPECS: dict[str, tuple[str, list[TensorSpec], str, str]] = {
    "absent": ("nowhere", [IMAGE], "EA0140", "no such data"),
    "no seed": ("seed:x", [IMAGE], "EA0140", "wants an integer"),
    "empty folder": ("empty", [IMAGE], "EA0140", "no images in it"),
    "not an image": ("notes.txt", [IMAGE], "EA0141", "not an image"),
    "no image input": ("a.png", [_spec(1, 5, preprocess=None, name="tokens")], "EA0143", "inputs: tokens"),
    "two inputs": ("a.png", [IMAGE, _spec(1, 5, name="scale", preprocess=None)], "EA0143", "image, scale"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_data_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    _picture(16, 16).save(tmp_path / "a.png")
    spec, inputs, code, words = BAD_SPECS[case]
    place = spec if spec.startswith("seed:") else tmp_path / spec
    assert words in _error(lambda: list(open_data(place, inputs)), code).message


def test_no_samples_is_refused() -> None:
    assert "at least 1" in _error(lambda: open_data(None, [IMAGE], samples=0), "EA0140").message


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_samples_along_the_first_axis(save: Callable[..., None], tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 16, 16))
    scales = np.arange(6, dtype=np.uint8).reshape(3, 2)
    save(tmp_path / "a.npz", image=images, scale=scales)
    data = open_data(tmp_path / "a.npz", [IMAGE, _spec(2, name="scale", dtype="int32", preprocess=None)])
    samples = list(data)
    assert [name for name, _ in samples] == ["a.npz[0]", "a.npz[1]", "a.npz[2]"]
    for index, (_, arrays) in enumerate(samples):
        np.testing.assert_array_equal(arrays["image"], images[index : index + 1].astype(np.float32), strict=True)
        np.testing.assert_array_equal(arrays["scale"], scales[index].astype(np.int32), strict=True)
    assert len(list(open_data(tmp_path / "a.npz", data_inputs(samples), samples=2))) == 2


def data_inputs(samples: list[Any]) -> list[TensorSpec]:
    """Return the specifications that fit these samples."""
    return [_spec(*array.shape, name=name, dtype=array.dtype.name) for name, array in samples[0][1].items()]


def test_npz_with_an_axis_of_its_own_for_samples(tmp_path: Path) -> None:
    images = np.ones((3, 2, 3, 16, 16), ">f4")
    np.savez(tmp_path / "a.npz", image=images)
    samples = [arrays["image"] for _, arrays in open_data(tmp_path / "a.npz", [_spec(2, 3, 16, 16)])]
    assert [(array.shape, array.dtype) for array in samples] == [((2, 3, 16, 16), np.dtype("float32"))] * 3
    assert samples[2].min() == 1


def test_npz_is_read_with_constant_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((300, 3, 64, 64), np.float32))
    data = open_data(tmp_path / "a.npz", [_spec(1, 3, 64, 64)])
    tracemalloc.start()
    assert sum(1 for _ in data) == 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000  # the array has 14.7 MB


ONES = np.ones((2, 3, 16, 16), np.float32)
BAD_ARCHIVES: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"images": ONES}, "inputs are image; the file has images"),
    "extra": ({"image": ONES, "labels": np.ones(2)}, "the file has image, labels"),
    "integers": ({"image": ONES.astype(np.uint8)}, "is uint8, the model takes float32"),
    "size": ({"image": ONES[:, :, :, :15]}, "has shape [2, 3, 16, 15], wanted samples of [1 x 3 x 16 x 16]"),
    "rank": ({"image": ONES[0]}, "has shape [3, 16, 16]"),
    "empty": ({"image": ONES[:0]}, "has shape [0, 3, 16, 16]"),
    "objects": ({"image": np.array([None, 1])}, "plain numbers"),
    "columns": ({"image": np.asfortranarray(ONES)}, "C order"),
    "nothing": ({}, "the file has no array"),
}


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_npz_that_does_not_fit(case: str, tmp_path: Path) -> None:
    arrays, words = BAD_ARCHIVES[case]
    np.savez(tmp_path / "a.npz", **arrays)
    error = _error(lambda: open_data(tmp_path / "a.npz", [IMAGE]), "EA0142")
    assert words in error.message
    assert str(tmp_path / "a.npz") in error.message


def test_npz_counts_must_agree(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=ONES, scale=np.ones((3, 2), np.float32))
    inputs = [IMAGE, _spec(2, name="scale", preprocess=None)]
    assert "number of samples" in _error(lambda: open_data(tmp_path / "a.npz", inputs), "EA0142").message
    assert (
        "has shape" in _error(lambda: open_data(tmp_path / "a.npz", [_spec(3, 3, 16, 16), inputs[1]]), "EA0142").message
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_damaged_npz(share: float, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", image=np.random.default_rng(0).standard_normal(ONES.shape))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: int(share * len(content))])
    assert "damaged" in _error(lambda: open_data(tmp_path / "a.npz", [IMAGE]), "EA0142").message


def test_npz_with_flipped_bits(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=ONES)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert "damaged" in _error(lambda: list(open_data(tmp_path / "a.npz", [IMAGE])), "EA0142").message


def test_npz_whose_array_ends_early(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", ONES)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("image.npy", (tmp_path / "image.npy").read_bytes()[:-4])
    data = open_data(tmp_path / "a.npz", [IMAGE])
    assert "ends early" in _error(lambda: list(data), "EA0142").why


LABELS: dict[str, tuple[str, str]] = {
    "lines": ("names.txt", "tench\ngoldfish, gold fish\nshark\n\n"),
    "byte order mark": ("names.txt", "\ufefftench\r\ngoldfish, gold fish\r\nshark"),
    "list": ("names.json", json.dumps(["tench", "goldfish, gold fish", "shark"])),
    "index": ("names.json", json.dumps({"2": "shark", "0": "tench", "1": "goldfish, gold fish"})),
    "ids": ("names.JSON", json.dumps({"0": ["n1", "tench"], "1": ["n2", "goldfish, gold fish"], "2": ["n3", "shark"]})),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(case: str, tmp_path: Path) -> None:
    name, text = LABELS[case]
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_labels(tmp_path / name) == ["tench", "goldfish, gold fish", "shark"]


BAD_LABELS = {
    "absent": ("absent.txt", None, "cannot be read"),
    "empty": ("a.txt", b"\n", "no class name"),
    "binary": ("a.txt", b"\xff\xfe\x00", "cannot be read"),
    "not json": ("a.json", b"{", "cannot be read"),
    "text": ("a.json", b'"tench"', "a JSON list or object"),
    "gap": ("a.json", b'{"0": "a", "2": "b"}', "class 1 has no name"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels(case: str, tmp_path: Path) -> None:
    name, content, words = BAD_LABELS[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = _error(lambda: read_labels(tmp_path / name), "EA0144")
    assert words in error.message
    assert str(tmp_path / name) in error.message
