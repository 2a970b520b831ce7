"""Tar shards that are hostile, and captions that hide in them."""

import tarfile
import time

import pytest
from test_sources import everything, png, shard

from convfusion.data import open_source
from convfusion.evaluate import open_real


def told(path):
    return [(s.name, s.caption or s.problem) for s in everything(open_source(str(path)))]


def padded(data):
    return data + bytes(-len(data) % 512)


def header(name, size, kind=b"0"):
    """A header that claims a size of any number, in the format of GNU tar."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (size % 2**96 if size < 0 else size | 1 << 95).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name, data):
    return header(name, len(data)) + padded(data)


def extended(record):
    """A header of POSIX with one record, which is given without its length."""
    length = next(n for n in range(len(record), len(record) + 9) if n == len(str(n)) + len(record))
    body = str(length).encode() + record
    return header("x", len(body), b"x") + padded(body)


SOUND = member("a.png", png()) + member("a.txt", b"red")
END = bytes(1024)
HOSTILE = {
    "a size below zero": header("b.png", -512),
    "a size far below zero": header("b.png", -(10**9)),
    "a size beyond the file": header("b.png", 2**62),
    "a size beyond all numbers": header("b.png", 2**80),
    "an extended size below zero": extended(b" size=-2560\n") + member("b.png", b"hello"),
    "a long name without end": header("b", 2**40, b"L"),
    "a long name below zero": header("b", -512, b"L"),
    "an extended header without end": header("b", 2**40, b"x"),
    "digits that old Python takes the square of": header("x", 10**6, b"x") + padded(b"1" * 10**6),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_ends_a_shard_in_no_time(name, tmp_path):
    (tmp_path / "x.tar").write_bytes(SOUND + HOSTILE[name] + END)
    began = time.monotonic()
    assert told(tmp_path / "x.tar") == [("x.tar/a", "red"), ("x.tar", "damaged shard")]
    assert time.monotonic() - began < 5


def test_names_within_names_without_end_are_a_damaged_shard(tmp_path):
    names = b"".join(header("b", 10, b"L") + padded(b"x" * 10) for _ in range(3000))
    (tmp_path / "x.tar").write_bytes(SOUND + names + END)
    assert told(tmp_path / "x.tar") == [("x.tar", "damaged shard")]


def test_what_is_no_plain_file_is_no_picture(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("b.png", b"1"), ("c.png", b"2"), ("d.png", b"3"), ("e.png", b"6")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, name
            tar.addfile(info)
    names = [f"x.tar/{key}" for key in "bcde"]
    assert told(tmp_path / "x.tar") == [(name, "no picture") for name in names]


def test_long_names_and_outer_paths_are_names_only(tmp_path):
    deep = "deep/" * 60 + "a"
    members = {f"{deep}.png": png(), f"{deep}.txt": b"red", "/etc/b.png": png(), "../c.png": png()}
    shard(tmp_path / "x.tar", members)
    assert [name for name, _ in told(tmp_path / "x.tar")] == [
        f"x.tar/{key}" for key in (deep, "/etc/b", "../c")
    ]


def test_what_is_hidden_in_a_shard_is_left_out(tmp_path):
    hidden = {"._a.png": b"x", ".ipynb_checkpoints/a.png": png(), "b/.c/d.png": png()}
    shard(tmp_path / "x.tar", {**hidden, "./e.png": png(), "./e.txt": b"red"})
    assert told(tmp_path / "x.tar") == [("x.tar/./e", "red")]


CAPTIONS = {
    "an empty field": ({"json": b'{"text": "", "caption": "red"}'}, "red"),
    "a null": ({"json": b'{"caption": null, "prompt": "red"}'}, "red"),
    "an empty file": ({"txt": b"", "json": b'{"caption": "red"}'}, "red"),
    "white space": ({"txt": b" \n", "caption": b"red"}, "red"),
    "a damaged file": ({"txt": b"\xff", "json": b'{"caption": "red"}'}, "red"),
    "a damaged JSON": ({"txt": b"", "json": b"{"}, "damaged caption"),
    "half an emoji": ({"json": b'{"caption": "cute \\ud83d"}'}, "damaged caption"),
    "half an emoji beside a caption": ({"json": b'{"text": "\\ud83d", "caption": "red"}'}, "red"),
    "a list": ({"json": b'{"text": ["", "red"]}'}, "red"),
    "a list of objects": ({"json": b'{"captions": [{"raw": ""}, {"raw": "red"}]}'}, "red"),
    "lists without end": (
        {"json": b'{"text":' + b"[" * 90_000 + b"]" * 90_000 + b"}"},
        "damaged caption",
    ),
    "JSON in UTF-16": ({"json": '{"text": "röd"}'.encode("utf-16")}, "röd"),
    "JSON with a mark": ({"json": b'\xef\xbb\xbf{"text": "red"}'}, "red"),
    "nothing": ({"txt": b"", "json": b'{"text": null, "caption": " "}'}, "no caption"),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_the_first_caption_with_text_in_it_is_taken(name, tmp_path):
    fields, expected = CAPTIONS[name]
    members = {"a.png": png(), **{f"a.{ending}": data for ending, data in fields.items()}}
    shard(tmp_path / "x.tar", members)
    assert told(tmp_path / "x.tar") == [("x.tar/a", expected)]


def test_an_empty_picture_hides_no_other(tmp_path):
    shard(tmp_path / "x.tar", {"a.png": b"", "a.jpg": png(), "b.gif": png(), "b.txt": b"red"})
    found = open_real(str(tmp_path / "x.tar"), (8, 8))
    assert len(list(found)) == 2


@pytest.mark.parametrize("captioned", [0, 2])
def test_real_pictures_of_shards_need_no_captions(captioned, tmp_path):
    members = {f"{i}.png": png() for i in range(3)} | {f"{i}.txt": b"x" for i in range(captioned)}
    shard(tmp_path / "x.tar", dict(sorted(members.items())))
    found = open_real(str(tmp_path / "x.tar"), (8, 8))
    assert len(list(found)) == 3 and not found.skipped


def test_a_shard_that_is_no_plain_file_is_told(tmp_path):
    (tmp_path / "x.tar").symlink_to("/dev/zero")
    (tmp_path / "y.tar").symlink_to(tmp_path / "nowhere")
    source = open_source(str(tmp_path))
    assert [s.problem for s in everything(source)] == ["damaged shard"] * 2
    assert source.describe()["shards"] == 2


def test_a_changed_shard_is_another_source(tmp_path):
    path = shard(tmp_path / "x.tar", {"a.png": png(), "a.txt": b"red"})
    before = open_source(str(path)).describe()
    path.write_bytes(path.read_bytes().replace(b"red", b"tan"))
    assert open_source(str(path)).describe() != before
