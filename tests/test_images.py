"""Pictures against the public Gemma 3 processor (Pillow's), and what is refused."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from encore.images import (
    START_OF_IMAGE,
    PanAndScan,
    crop_boxes,
    load_picture,
    place_pictures,
    split_prompt,
    to_pixels,
    views,
)

ORIENTATION = 0x0112


def drawing(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Shapes, a slope of colours and noise, so that resizing has something to get wrong."""
    rng = np.random.default_rng(width * height)
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    levels = np.stack([x, y, 255 - x], axis=-1) * 0.7 + rng.integers(0, 76, (height, width, 3))
    image = Image.fromarray(levels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 5, height // 5, width // 2, height - height // 9), fill=(255, 255, 0), outline=(0, 0, 0))
    draw.line((0, height, width, 0), fill=(0, 0, 255), width=3)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


def saved(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def processor(size: int = 896, **options: object) -> Gemma3ImageProcessorPil:
    return Gemma3ImageProcessorPil(size={"height": size, "width": size}, **options)


def theirs(image: Image.Image, size: int = 896) -> np.ndarray:
    return np.asarray(processor(size)(images=[image], return_tensors="np")["pixel_values"][0])


def within_a_level(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    assert ours.min() >= -1 and ours.max() <= 1
    assert np.abs(ours - expected).max() <= 1e-6  # the bound asked for is 2 / 255


# --- what the processor does


@pytest.mark.parametrize("size", [(896, 896), (640, 480), (333, 1000), (1800, 1300), (40, 9), (1, 1)])
def test_pixels_of_every_shape(size: tuple[int, int]) -> None:
    image = drawing(*size)
    within_a_level(to_pixels(load_picture(saved(image)), 896), theirs(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pixels_of_every_mode(mode: str) -> None:
    image = Image.open(io.BytesIO(saved(drawing(300, 200, mode))))
    assert image.mode == mode
    within_a_level(to_pixels(load_picture(image), 224), theirs(image, 224))


@pytest.mark.parametrize(
    "form, mode, options",
    [
        ("JPEG", "RGB", {"quality": 80}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "CMYK", {}),
        ("TIFF", "YCbCr", {}),
        ("TIFF", "LAB", {}),
        ("TIFF", "RGB", {"compression": "tiff_deflate"}),
        ("PPM", "RGB", {}),
    ],
)
def test_pixels_of_every_format(form: str, mode: str, options: dict, tmp_path: Path) -> None:
    data = saved(drawing(120, 90, mode), form, **options)
    expected = theirs(Image.open(io.BytesIO(data)), 224)
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        within_a_level(to_pixels(load_picture(source), 224), expected)


def test_a_palette_with_a_transparent_colour_is_laid_on_white() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([255, 0, 0, 0, 128, 0])
    image.putpixel((0, 0), 0)
    image = Image.open(io.BytesIO(saved(image, transparency=0)))
    assert image.mode == "P" and image.info["transparency"] == 0
    loaded = load_picture(image)
    assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 0))) == ((255, 255, 255), (0, 128, 0))
    within_a_level(to_pixels(loaded, 14), theirs(image, 14))


def test_half_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 127))
    assert load_picture(saved(image)).getpixel((1, 1)) == (128, 128, 128)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_tags_are_applied(orientation: int, form: str) -> None:
    """The upright picture has its left half black; each tag says how it was turned before it was saved."""
    turned = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    upright = Image.new("RGB", (60, 40), (255, 255, 255))
    upright.paste((0, 0, 0), (0, 0, 30, 40))
    upright.paste((255, 0, 0), (0, 0, 60, 10))  # the top
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = upright if turned is None else upright.transpose(turned)
    loaded = load_picture(saved(stored, form, exif=exif, **({"quality": 100} if form != "PNG" else {})))
    assert loaded.size == (60, 40)
    difference = np.abs(np.asarray(loaded).astype(int) - np.asarray(upright))
    assert np.median(difference) <= 2 and difference.mean() < 6


def test_sixteen_bits_become_eight() -> None:
    """Pillow alone turns all grey levels above 255 to white."""
    levels = np.array([[0, 128, 129, 257 * 100, 65_535]], dtype=np.uint16)
    grey = Image.open(io.BytesIO(saved(Image.fromarray(levels))))
    assert grey.mode.startswith("I")
    assert np.asarray(load_picture(grey))[0].tolist() == [[v] * 3 for v in (0, 0, 1, 100, 255)]
    assert np.asarray(load_picture(saved(Image.fromarray(levels), "TIFF")))[0, :, 0].tolist() == [0, 0, 1, 100, 255]


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_sixteen_bit_colours() -> None:
    data = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 65_535, 25_700, 257, 514, 65_280))
    assert np.asarray(load_picture(data)).tolist() == [[[0, 255, 100], [1, 2, 254 + 1]]]


def test_a_photo_with_a_preview_is_the_photo() -> None:
    """Cameras and telephones write JPEGs with a second, smaller picture behind the first (MPO)."""
    photo, preview = drawing(64, 48), drawing(16, 12)
    data = saved(photo, "MPO", save_all=True, append_images=[preview], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert load_picture(data).size == (64, 48)


def test_the_callers_image_is_left_alone() -> None:
    image = drawing(20, 10)
    load_picture(image).putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)
    assert load_picture(image).size == (20, 10)


# --- pan and scan


@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_crops_are_those_of_the_processor(width: int, height: int) -> None:
    """Places are compared by drawing none: an array of zero bytes per pixel is cropped by both."""
    zeros = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (1, height, width))
    expected = processor().pan_and_scan(zeros, 256, 4, 1.2)
    boxes = crop_boxes(width, height, PanAndScan())
    assert [(lower - upper, right - left) for left, upper, right, lower in boxes] == [c.shape[1:] for c in expected]
    if boxes:
        assert boxes[0][:2] == (0, 0) and boxes[-1][2:] == (width, height)
        along = 0 if width >= height else 1
        assert all(a[along + 2] == b[along] for a, b in pairwise(boxes))


@pytest.mark.parametrize("size", [(1400, 400), (300, 1000), (700, 520), (500, 500), (520, 300)])
def test_pixels_of_crops(size: tuple[int, int]) -> None:
    image = drawing(*size)
    options = dict(pan_and_scan_min_crop_size=256, pan_and_scan_max_num_crops=4, pan_and_scan_min_ratio_to_activate=1.2)
    expected = processor(448, do_pan_and_scan=True, **options)(images=[image], return_tensors="np")
    found = views(load_picture(saved(image)), 448, PanAndScan())
    assert len(found) - 1 == expected["num_crops"][0]
    within_a_level(found, np.asarray(expected["pixel_values"]))
    assert views(image, 448).shape == (1, 3, 448, 448)


@pytest.mark.parametrize("wrong", [{"min_crop_size": 0}, {"max_crops": 0}, {"min_ratio": 0.0}])
def test_senseless_crops_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="makes no sense"):
        PanAndScan(**wrong)


# --- prompts


def test_prompts_are_cut_at_their_pictures() -> None:
    text = f"One {START_OF_IMAGE} two{START_OF_IMAGE}"
    assert split_prompt(text, [0, 0]) == ["One \n\n", "\n\n two\n\n", "\n\n"]
    help_ = "\n\n and here are some crops to help you see better \n\n"
    assert split_prompt(text, [2, 0]) == [
        "One Here is the original image \n\n",
        help_,
        "\n\n \n\n",
        "\n\n two\n\n",
        "\n\n",
    ]
    assert split_prompt("none", []) == ["none"]
    with pytest.raises(ValueError, match="the text has 2 <start_of_image> for 1 pictures"):
        split_prompt(text, [0])


def test_pictures_without_a_place_stand_in_front() -> None:
    assert place_pictures("What?", 2) == f"{START_OF_IMAGE}{START_OF_IMAGE}What?"
    assert place_pictures(f"a{START_OF_IMAGE}b", 1) == f"a{START_OF_IMAGE}b"
    for number in (0, 2):
        with pytest.raises(ValueError, match=f"has 1 <start_of_image> and {number} pictures come with it"):
            place_pictures(f"a{START_OF_IMAGE}b", number)


# --- what is refused

SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
BOMB = png(60_000, 60_000, 8, 2, b"")
ANIMATION = {"save_all": True, "append_images": [drawing(20, 20), Image.new("RGB", (20, 20))]}


BAD = {
    "empty": (b"", "is empty"),
    "noise": (b"not a picture at all" * 9, "not known as a picture"),
    "svg": (SVG, "is an SVG"),
    "late svg": (b"<!-- a long comment -->" * 9 + SVG, "is an SVG"),
    "svgz": (zlib.compress(SVG, wbits=31), "svgz"),
    "pdf": (b"%PDF-1.7\n", "is a PDF"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "an AVIF, HEIC or video"),
    "bomb": (BOMB, r"60000 x 60000 pixels|too many pixels"),
    "large": (png(9000, 9000, 8, 0, b""), r"has 9000 x 9000 pixels, more than the 67,108,864"),
    "no width": (png(0, 5, 8, 0, b""), "a PNG that is damaged or without pixels"),
    "cut png": (saved(drawing(200, 100))[:-4000], "damaged or cut off"),
    "cut jpeg": (saved(drawing(200, 100), "JPEG")[:-1000], "damaged or cut off"),
    "cut head": (saved(drawing(200, 100), "JPEG")[:10], "damaged or cut off|a JPEG that is damaged"),
    "cut gif": (saved(drawing(200, 100, "P"), "GIF")[:-4000], "damaged or cut off"),
    "cut tiff": (saved(drawing(200, 100), "TIFF")[:-30_000], "damaged or cut off"),
    "cut webp": (saved(drawing(200, 100), "WEBP")[:-1000], "damaged|not known"),
    "cut bmp": (saved(drawing(200, 100), "BMP")[:-1000], "damaged or cut off"),
    "bad checksum": (saved(drawing(50, 50)).replace(b"IDAT", b"IDAT\xff", 1), "damaged or cut off"),
    "gif animation": (saved(drawing(20, 20), "GIF", **ANIMATION), "is animated or has several pages"),
    "png animation": (saved(drawing(20, 20), "PNG", **ANIMATION), "is animated"),
    "webp animation": (saved(drawing(20, 20), "WEBP", **ANIMATION), "is animated"),
    "pages": (saved(drawing(20, 20), "TIFF", **ANIMATION), "has several pages"),
    "fractions": (saved(Image.new("F", (3, 3), 0.5), "TIFF"), "holds fractions"),
    "icon": (saved(drawing(32, 32), "ICO"), "give a whole picture as PNG, JPEG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "give a whole picture as PNG, JPEG"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_pictures_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    data, message = BAD[kind]
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for source, name in ((data, "the picture"), (path, str(path))):
        with pytest.raises(ValueError, match=message) as error:
            load_picture(source)
        assert str(error.value).startswith(name)


def test_sizes_are_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(ValueError, match=r"has 30 x 20 pixels, more than the 599 that are read"):
        load_picture(saved(drawing(30, 20)), max_pixels=599)
    with pytest.raises(AssertionError, match="decoded"):
        load_picture(saved(drawing(30, 20)), max_pixels=600)


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    """3.6 billion pixels, which Pillow refuses, and 81 million, of which it would only warn."""
    code = """
import resource
from encore.images import load_picture
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for side in (60_000, 9_000):
    try:
        load_picture(f"{side}.png")
    except ValueError as error:
        print(str(error)[:34])
"""
    for side in (60_000, 9_000):
        (tmp_path / f"{side}.png").write_bytes(png(side, side, 8, 2, bytes(1 << 20)))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    expected = ["60000.png claims too many pixels to", "9000.png has 9000 x 9000 pixels, more"]
    assert done.stdout.splitlines() == [line[:34] for line in expected], done.stderr


def test_images_in_memory_are_checked_too() -> None:
    with pytest.raises(ValueError, match="0 x 5 pixels; a picture needs at least one"):
        load_picture(Image.new("RGB", (0, 5)))
    with pytest.raises(ValueError, match="more than the 10"):
        load_picture(Image.new("RGB", (4, 5)), max_pixels=10)
    with pytest.raises(ValueError, match=r"grey levels -1\.\.0; expected 0\.\.65535"):
        load_picture(Image.fromarray(np.array([[-1, 0]], np.int32)))


def test_missing_files_are_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_picture(tmp_path / "none.png")
    with pytest.raises(OSError):
        load_picture(tmp_path)


@given(st.data())
def test_broken_files_never_raise_anything_else(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([saved(drawing(9, 7), form) for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF")]))
    broken = bytearray(whole[: data.draw(st.integers(1, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        loaded = load_picture(bytes(broken), max_pixels=1 << 16)
    except ValueError:
        return
    assert loaded.mode == "RGB" and 0 < loaded.width * loaded.height <= 1 << 16
