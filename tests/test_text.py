"""Text that others wrote: encodings, line ends, and files that are no plain files."""

import codecs
import os

import pytest
from tiny_pipelines import stable_diffusion
from typer.testing import CliRunner

from convfusion import CheckpointError, ConvFusionError, text
from convfusion.cli import app
from convfusion.cli.analyze import read_prompts
from convfusion.data import open_source
from convfusion.distill.settings import read_settings
from convfusion.families import encode_conditioning
from convfusion.files import read_json
from convfusion.generate import generate
from convfusion.surgery.config import ConvertConfig

HALF = "a cat \ud83d"  # of an emoji

ENCODINGS = {
    "UTF-8": lambda words: words.encode(),
    "UTF-8 with a mark": lambda words: words.encode("utf-8-sig"),
    "UTF-16 LE": lambda words: codecs.BOM_UTF16_LE + words.encode("utf-16-le"),
    "UTF-16 BE": lambda words: codecs.BOM_UTF16_BE + words.encode("utf-16-be"),
    "UTF-32": lambda words: words.encode("utf-32"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_reader_takes_the_usual_encodings(encoding, tmp_path):
    encode = ENCODINGS[encoding]
    (tmp_path / "p.txt").write_bytes(encode("röd\r\n\r\n äpple \r\n"))
    assert read_prompts("x", tmp_path / "p.txt") == ["röd", "äpple"]
    assert open_source(str(tmp_path / "p.txt")).prompts == ("röd", "äpple")
    (tmp_path / "run.toml").write_bytes(encode('model = "röd"\r\n'))
    assert read_settings(tmp_path / "run.toml", {}).model == "röd"
    (tmp_path / "config.json").write_bytes(encode('{"sites": {"ö": {"kind": "mean_only"}}}'))
    assert list(ConvertConfig.load(tmp_path / "config.json").sites) == ["ö"]


@pytest.mark.parametrize("mark", list("\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"))
def test_lines_end_where_editors_end_them(mark, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(f"a{mark}b\r\nc\rd\n".encode())
    assert open_source(str(file)).prompts == (f"a{mark}b", "c", "d")
    assert read_prompts("x", file) == [f"a{mark}b", "c", "d"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("ok\r\nrött".encode("latin-1"), "line 2 holds the byte 0xf6"),
        ("ok\rrött".encode("cp1252"), "line 2 holds the byte 0xf6"),
        (b"ok\n\n\xed\xa0\xbd", "line 3 holds the byte 0xed"),
        ("red".encode("utf-16-le"), "line 1 holds a NUL"),
        (b"ok\nr\0d", "line 2 holds a NUL"),
        (codecs.BOM_UTF16_LE + "ok\n".encode("utf-16-le") + b"\x3d\xd8", "line 2 holds no UTF-16"),
    ],
)
def test_what_is_no_text_is_refused_with_its_line(data, message, tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(data)
    for read in (lambda: open_source(str(file)), lambda: read_settings(file, {})):
        with pytest.raises(
            ConvFusionError, match=rf"p\.txt is not a text file in UTF-8: {message}"
        ):
            read()


def test_marks_within_joined_files_are_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfred\n\xef\xbb\xbfgreen\n\xef\xbb\xbf\n")
    assert text.read_prompts(tmp_path / "p.txt") == ["red", "green"]


def test_only_plain_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "zero.txt"):
        with pytest.raises(ConvFusionError, match=rf"{name} cannot be read: it is no plain file"):
            read_prompts("x", tmp_path / name)
        with pytest.raises(ConvFusionError, match=rf"{name} is no plain file"):
            open_source(str(tmp_path / name))
    with open(tmp_path / "large.toml", "wb") as file:
        file.truncate(1 << 40)  # of which the disk holds nothing
    with pytest.raises(ConvFusionError, match=r"large\.toml cannot be read: it is larger than 16"):
        read_settings(tmp_path / "large.toml", {})


def test_half_an_emoji_is_no_prompt(tmp_path):
    pipe = stable_diffusion()
    with pytest.raises(ConvFusionError, match=r"'a cat \\ud83d' is not valid Unicode"):
        generate(pipe, [HALF])
    with pytest.raises(ConvFusionError, match="is not valid Unicode"):
        encode_conditioning(pipe, [HALF], (16, 16))
    command = ["generate", "nowhere", "--prompt", HALF, "--out", str(tmp_path)]
    told = CliRunner().invoke(app, command)
    assert "is not valid Unicode" in str(told.exception)  # before a model is looked for


def test_json_is_decoded_as_all_text_is(tmp_path):
    path = tmp_path / "a.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text('{"ä": 1}', encoding=encoding)
        assert read_json(path) == {"ä": 1}
    path.write_bytes(b'{"a\xe4": 1}')
    with pytest.raises(CheckpointError, match="line 1 holds the byte 0xe4; save it as UTF-8"):
        read_json(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"a\.json cannot be read: No such file"):
        read_json(path)
