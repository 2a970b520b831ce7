"""Pictures that are sound, whatever their metadata says."""

import io
import os
import struct
import zlib

import pytest
from PIL import Image, ImageOps, PngImagePlugin

from convfusion.data.pictures import UnusableError, decode_picture

RED = (200, 0, 0)


def encoded(kind, mode="RGB", colour=RED, **options):
    """A picture of 64×32 pixels."""
    file = io.BytesIO()
    Image.new(mode, (64, 32), colour).save(file, kind, **options)
    return file.getvalue()


def exif(*entries, values=b""):
    """An EXIF with one directory; an entry is (tag, kind, count, four bytes)."""
    packed = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return head + packed + struct.pack("<I", 0) + values


TURN = (0x0112, 3, 1, struct.pack("<HH", 6, 0))  # by a quarter
BEHIND = struct.pack("<I", 8 + 2 + 24 + 4)  # where the values of two entries begin

TURNED = {
    "a plain turn": exif(TURN),
    "a rational of -1/0": exif(TURN, (0x011A, 10, 1, BEHIND), values=struct.pack("<ii", -1, 0)),
    "a signed -5": exif(TURN, (0x0100, 9, 1, struct.pack("<i", -5))),
    "a pointer to nowhere": exif(TURN, (0x8769, 4, 1, struct.pack("<I", 99999))),
    "a value without end": exif(TURN, (0x9286, 7, 2**32 - 1, struct.pack("<I", 8))),
    "text in no encoding": exif(TURN, (0x0131, 2, 4, b"\xff\xfe\xfd\0")),
}


@pytest.mark.parametrize("metadata", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_turned_photograph_is_turned_back(kind, metadata):
    assert decode_picture(encoded(kind, exif=TURNED[metadata])).size == (32, 64)


@pytest.mark.parametrize("number", range(1, 9))
def test_every_turn_is_that_of_pillow(number):
    picture = Image.effect_noise((16, 8), 100).convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif((0x0112, 3, 1, struct.pack("<HH", number, 0))))
    with Image.open(io.BytesIO(file.getvalue())) as again:
        assert decode_picture(file.getvalue()).tobytes() == ImageOps.exif_transpose(again).tobytes()


@pytest.mark.parametrize(
    "metadata", [b"Exif\0\0II*\0\x08", b"Exif\0\0nothing!", exif((274, 3, 1, b"c\0\0\0"))]
)
def test_a_damaged_exif_turns_nothing(metadata):
    assert decode_picture(encoded("JPEG", exif=metadata)).size == (64, 32)


def chunk(kind, data):
    parts = struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))
    return b"".join(parts)


def png(*further, depth=8, colour=2, pixel=bytes(RED)):
    """A PNG of 64×32 equal pixels, with further chunks."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 32, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + pixel * 64) * 32))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(further) + pixels + chunk(b"IEND", b"")


LONG = zlib.compress(bytes(50_000_000))
CHUNKS = {
    "a long text": chunk(b"zTXt", b"k\0\0" + LONG),
    "a long text of any language": chunk(b"iTXt", b"k\0\1\0\0\0" + LONG),
    "a long profile": chunk(b"iCCP", b"k\0\0" + LONG),
    "texts beyond all": chunk(b"tEXt", b"k\0" + b"x" * 2_000_000) * 40,
    "a damaged profile": chunk(b"iCCP", b"k"),
    "a damaged text": chunk(b"zTXt", b"k\0\5x"),
    "a damaged gamma": chunk(b"gAMA", b"\0"),
    "damaged primaries": chunk(b"cHRM", b"\0"),
    "a damaged resolution": chunk(b"pHYs", b"\0"),
    "a damaged EXIF": chunk(b"eXIf", b"MM\0x"),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_what_a_png_tells_beside_its_pixels_spoils_nothing(name):
    assert decode_picture(png(CHUNKS[name])).getpixel((0, 0)) == RED


def test_a_png_with_a_long_text_is_turned_and_transparent_all_the_same(tmp_path):
    (tmp_path / "a.png").write_bytes(
        png(
            CHUNKS["a long text"], chunk(b"eXIf", exif(TURN)[6:]), chunk(b"tRNS", b"\0\xc8\0\0\0\0")
        )
    )
    found = decode_picture(tmp_path / "a.png")
    assert found.size == (32, 64) and found.getpixel((0, 0)) == (255, 255, 255)


def test_pillow_writes_such_texts_and_profiles():
    told = PngImagePlugin.PngInfo()
    told.add_itxt("workflow", "x" * 2_000_000, zip=True)
    for options in ({"pnginfo": told}, {"icc_profile": os.urandom(100) * 20_000}):
        assert decode_picture(encoded("PNG", **options)).getpixel((0, 0)) == RED


def test_several_pictures_in_a_file_are_the_first():
    more = [Image.new("RGB", (64, 32)) for _ in range(2)]
    for kind in ("PNG", "MPO", "WEBP"):
        options = {"save_all": True, "append_images": more}
        found = decode_picture(encoded(kind, **options))
        assert found.size == (64, 32) and found.getpixel((0, 0))[0] > 190


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "BMP"), ("P", "BMP")]
)
def test_kinds_of_colour(mode, kind):
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "white").convert(mode).save(file, kind)
    assert min(decode_picture(file.getvalue()).getpixel((0, 0))) > 250


def test_sixteen_bits_of_colour_are_eight():
    pixel = struct.pack(">HHH", 0xC8FF, 0, 0)
    assert decode_picture(png(depth=16, pixel=pixel)).getpixel((0, 0)) == RED


def test_only_plain_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    for path in (tmp_path / "a.png", tmp_path / "b.png", tmp_path):
        with pytest.raises(UnusableError, match="unreadable picture"):
            decode_picture(path)
