"""Picture file -> pixels for the vision tower, and the text around pictures (Gemma 3 report, section 2.1). No torch.

    file or bytes ─ size checked ─▶ upright RGB ─ pan and scan ─▶ views ─ resized, scaled ─▶ (views, 3, size, size)

Pixels are those of the public Gemma 3 processor (the Pillow one of transformers): bilinear with antialiasing to a
square whatever the shape, in whole grey levels, then x / 127.5 - 1. Its torchvision sibling resizes in its own
arithmetic: one grey level (2/255 after scaling) apart at up to a quarter of the values of a noisy picture.

Files come from anywhere, so nothing is decoded before its size is known, and only formats with plain decoders are
opened. Orientation tags are applied, transparency is laid on white, CMYK and palettes become RGB, 16 bits become 8.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

PictureSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image
Pixels: TypeAlias = NDArray[np.float32]

START_OF_IMAGE = "<start_of_image>"
"""Where a picture stands in a text."""

MAX_PIXELS = 1 << 26
"""8,192 x 8,192: decoding one takes 200 to 500 MB. A file that claims more is refused unread."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_BEGINNINGS = {
    b"%PDF": "a PDF",
    b"\x1f\x8b": "compressed (perhaps an .svgz)",
    b"\x89PNG\r\n\x1a\n": "a PNG that is damaged or without pixels",
    b"\xff\xd8\xff": "a JPEG that is damaged or without pixels",
    b"GIF8": "a GIF that is damaged or without pixels",
    b"BM": "a BMP that is damaged or without pixels",
}
_DAMAGE = (OSError, SyntaxError, EOFError, ValueError, IndexError, TypeError, struct.error, zlib.error)
"""What decoders raise on broken files."""


@dataclass(frozen=True)
class PanAndScan:
    """When a long picture is read in crops besides the whole; the defaults are the public processor's.

    A picture at least `min_ratio` times as long as wide is cut into round(ratio) crops along its length, at most
    `max_crops` (and at least 2), unless a crop would be shorter than `min_crop_size` pixels.
    """

    min_crop_size: int = 256
    max_crops: int = 4
    min_ratio: float = 1.2

    def __post_init__(self) -> None:
        if self.min_crop_size < 1 or self.max_crops < 1 or self.min_ratio <= 0:
            raise ValueError(f"{self} makes no sense; sizes and counts are at least 1, the ratio is above 0")


def load_picture(source: PictureSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB picture from a file name, the bytes of a file, or a Pillow image.

    Raises ValueError for what is no single picture of a known format (SVG, PDF, animations), claims more than
    `max_pixels`, or is damaged; OSError (FileNotFoundError and its like) where a file cannot be read.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the picture", max_pixels)
    name = "the picture" if isinstance(source, bytes) else str(os.fspath(source))
    with BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        with warnings.catch_warnings(), _as_value_error(name, file):
            warnings.simplefilter("ignore")  # Pillow warns of sizes and odd metadata; sizes are checked below
            image = Image.open(file, formats=FORMATS)
        with image:
            return _upright_rgb(image, name, max_pixels)


def views(image: Image.Image, size: int, pan_and_scan: PanAndScan | None = None) -> Pixels:
    """Pixels (1 + crops, 3, size, size) in [-1, 1]: the whole picture, and after it its crops, if any."""
    boxes = crop_boxes(*image.size, pan_and_scan) if pan_and_scan else []
    return np.stack([to_pixels(part, size) for part in (image, *map(image.crop, boxes))])


def to_pixels(image: Image.Image, size: int) -> Pixels:
    """Pixels (3, size, size) in [-1, 1] of an RGB picture, stretched to a square."""
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    levels = np.asarray(resized, dtype=np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray(levels / np.float32(127.5) - np.float32(1.0))


def crop_boxes(width: int, height: int, rule: PanAndScan) -> list[tuple[int, int, int, int]]:
    """(left, upper, right, lower) of each crop, from left to right or from top to bottom; none if none is worth it.

    >>> crop_boxes(900, 300, PanAndScan())
    [(0, 0, 300, 300), (300, 0, 600, 300), (600, 0, 900, 300)]
    """
    long, short = max(width, height), min(width, height)
    if long / short < rule.min_ratio:
        return []
    number = min(math.floor(long / short + 0.5), long // rule.min_crop_size)
    number = min(max(number, 2), rule.max_crops)
    step = math.ceil(long / number)
    if min(step, short) < rule.min_crop_size:
        return []
    spans = [(start, min(start + step, long)) for start in range(0, long, step)]
    return [(a, 0, b, height) if width >= height else (0, a, width, b) for a, b in spans]


def place_pictures(text: str, number: int) -> str:
    """The text with a `<start_of_image>` for each picture: as it is if it has them, else with all in front."""
    marks = text.count(START_OF_IMAGE)
    if marks == 0:
        return START_OF_IMAGE * number + text
    if marks != number:
        raise ValueError(
            f"the text has {marks} {START_OF_IMAGE} and {number} pictures come with it; "
            "give one for each picture, or none to have the pictures in front"
        )
    return text


def split_prompt(text: str, num_crops: Sequence[int]) -> list[str]:
    """The pieces of text between the views of pictures: their ids, with a view's ids in each gap, are the prompt's.

    Every `<start_of_image>` becomes two line breaks, the view, two line breaks; a picture with crops is introduced and
    its crops follow it.

    >>> split_prompt("What is <start_of_image>?", [0])
    ['What is \\n\\n', '\\n\\n?']
    """
    first, *rest = text.split(START_OF_IMAGE)
    if len(rest) != len(num_crops):
        raise ValueError(f"the text has {len(rest)} {START_OF_IMAGE} for {len(num_crops)} pictures; give one for each")
    view = f"\n\n{START_OF_IMAGE}\n\n"
    whole = first
    for crops, following in zip(num_crops, rest, strict=True):
        if crops:
            whole += f"Here is the original image {view} and here are some crops to help you see better "
            whole += " ".join([view] * crops)
        else:
            whole += view
        whole += following
    return whole.split(START_OF_IMAGE)


def _upright_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} has {width} x {height} pixels; a picture needs at least one")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width} x {height} pixels, more than the {max_pixels:,} that are read; make it smaller first"
        )
    with warnings.catch_warnings(), _as_value_error(name):
        warnings.simplefilter("ignore")
        if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo with a preview behind it
            raise ValueError(f"{name} is animated or has several pages; save the one that is meant by itself")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bits(image, name)
    if image.mode == "F":
        raise ValueError(f"{name} holds fractions, whose range is unknown; save it with 8 or 16 bits per channel")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey levels 0..65535 to 0..255. (Pillow itself would cut off all above 255; colours it scales when it reads.)"""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65_535:
        raise ValueError(
            f"{name} has grey levels {levels.min()}..{levels.max()}; expected 0..65535: save it in 16 bits"
        )
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


@contextlib.contextmanager
def _as_value_error(name: str, file: IO[bytes] | None = None) -> Iterator[None]:
    """Says in one way what Pillow says in many. `file`, when it is being opened, tells what it is instead."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} claims too many pixels to be read ({error}); make it smaller first") from error
    except UnidentifiedImageError as error:
        what = "not known as a picture" if file is None else _guess(file)
        raise ValueError(f"{name} is {what}; give a whole picture as {', '.join(FORMATS)}") from error
    except _DAMAGE as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name} is damaged or cut off ({error}); fetch or save it again") from error


def _guess(file: IO[bytes]) -> str:
    file.seek(0)
    head = file.read(1024)
    if not head:
        return "empty"
    if b"<svg" in head.lower():
        return "an SVG, which is a drawing to be rendered"
    if head[4:8] == b"ftyp":
        return "an AVIF, HEIC or video file"
    return next((what for start, what in _BEGINNINGS.items() if head.startswith(start)), "not known as a picture")
