"""An image file to a network input, as the authors' evaluation scripts do it: resize, centre crop, scale, normalise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeattn.errors import UsageError
from edgeattn.model import Preprocess
from edgeattn.packages import require

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))


def load_image(
    path: str | Path, preprocess: Preprocess | Mapping[str, Any], size: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """Return the image at `path` as float32 [1, 3, height, width], normalised.

    `size` is (height, width), by default the square crop of `preprocess`; the resize keeps its ratio to the crop.
    Orientation tags are followed, an alpha channel is dropped, 16-bit grey is scaled to 8. Raises EA0141 for a file
    that is no readable image.
    """
    plan = preprocess if isinstance(preprocess, Preprocess) else Preprocess(**preprocess)
    height, width = size or (plan.crop, plan.crop)
    image = _crop(_resize(_read(Path(path)), plan, height, width), height, width)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)  # [h, w, 3]
    normalised = (pixels - np.array(plan.mean, np.float32)) / np.array(plan.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None])


def _read(path: Path) -> Image.Image:
    """Return the upright image in 8-bit RGB."""
    require("PIL")
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise UsageError("EA0141", f"{path}: {'a folder, not an image' if path.is_dir() else 'no such image'}")
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        foreign = isinstance(error, UnidentifiedImageError)
        what = "not an image" if foreign else "truncated, corrupt or unsupported image"
        raise UsageError("EA0141", f"{path}: {what}", why="" if foreign else str(error).split("\n")[0]) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode; Pillow itself would clip 16-bit grey to white."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def _resize(image: Image.Image, plan: Preprocess, height: int, width: int) -> Image.Image:
    """Resize so that a centred height x width keeps the field of view that the square crop has."""
    from PIL import Image

    filter_ = Image.Resampling[plan.interpolation.upper()]
    wide, high = image.size
    if height == width:
        short = plan.resize * height // plan.crop
        # The longer side is cut off to an integer, never rounded: torchvision's rule.
        target = (short, short * high // wide) if wide <= high else (short * wide // high, short)
    else:
        factor = max(height / high, width / wide) * plan.resize / plan.crop
        target = (max(width, int(wide * factor)), max(height, int(high * factor)))
    return image.resize(target, filter_)


def _crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut out the centre; half-pixel offsets go to the even side, and what lies outside is black."""
    wide, high = image.size
    left, top = _offset(wide, width), _offset(high, height)
    return image.crop((left, top, left + width, top + height))


def _offset(size: int, crop: int) -> int:
    return round((size - crop) / 2) if size >= crop else -((crop - size) // 2)
