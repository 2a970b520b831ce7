"""Folders of pictures: links, hidden files, other names, metadata files."""

import json
import os

import pytest
from PIL import Image
from test_sources import everything, png

from convfusion import ConvFusionError
from convfusion.data import open_source
from convfusion.evaluate import open_real

SIZE = (8, 8)


def told(folder, **options):
    """What is said of each sample of a source: its caption, or why it cannot be used."""
    source = open_source(str(folder), **options)
    found = [(s.name, s.caption or s.problem) for s in everything(source)]
    assert source.total == len(found) and source.describe()
    return dict(found)


def put(folder, *names, caption="red"):
    """Pictures, with a caption beside each unless it is None."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)


def real(spec):
    """How many real pictures there are, and what was skipped."""
    found = open_real(str(spec), SIZE)
    return len(list(found)), found.skipped


def test_links_are_followed_or_told(tmp_path):
    folder = tmp_path / "pictures"
    put(folder, "a.png", "sub/b.png")
    put(tmp_path / "elsewhere", "c.png", "deep/d.png")
    links = {
        "more": tmp_path / "elsewhere",
        "up": folder,
        "sub/twice": tmp_path / "elsewhere",
        "linked.png": folder / "a.png",
        "gone.png": tmp_path / "nowhere.png",
        "gone": tmp_path / "nowhere",
        "self.png": folder / "self.png",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    assert told(folder) == {
        "a.png": "red",
        "linked.png": "no caption",
        "more/c.png": "red",
        "more/deep/d.png": "red",
        "sub/b.png": "red",
        "gone": "broken link",
        "gone.png": "broken link",
        "self.png": "broken link",
        "sub/twice": "folder that is read already",
        "up": "folder that is read already",
    }
    assert real(folder) == (5, {"broken link": 3, "folder that is read already": 2})


def test_folders_that_link_to_each_other_end(tmp_path):
    names = [f"{i:02d}" for i in range(20)]
    for name in names:
        put(tmp_path / name, "a.png")
        for other in names:
            (tmp_path / name / f"to{other}").symlink_to(tmp_path / other)
    found = list(told(tmp_path).values())
    assert found.count("red") == 20 and found.count("folder that is read already") == 400


def test_what_is_hidden_is_left_out(tmp_path):
    hidden = (".ipynb_checkpoints/a-checkpoint.png", "sub/.cache/b.png", "._a.png", ".c.png")
    put(tmp_path, *hidden, caption="before it was corrected")
    put(tmp_path, "a.png")
    assert told(tmp_path) == {"a.png": "red"}
    assert real(tmp_path) == (1, {})
    (tmp_path / ".x.tar").write_bytes(b"")
    (tmp_path / ".x.parquet").write_bytes(b"")
    (tmp_path / "x.tar").mkdir()  # a name, and no shard
    assert told(tmp_path) == {"a.png": "red"}
    put(tmp_path / ".mine", "a.png")
    assert told(tmp_path / ".mine") == {"a.png": "red"}  # asked for by name


def test_pipes_and_devices_are_told_and_never_read(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png", "d.png")
    for name in ("a.png", "b.txt"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    (tmp_path / "c.txt").unlink()
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    with open(tmp_path / "d.txt", "wb") as file:
        file.truncate(1 << 40)
    assert told(tmp_path) == {
        "a.png": "no plain file",
        "b.png": "damaged caption",
        "c.png": "damaged caption",
        "d.png": "damaged caption",
    }


def test_pictures_of_other_endings_count(tmp_path):
    for name, kind in (("a.bmp", "BMP"), ("b.JFIF", "JPEG"), ("c.gif", "GIF"), ("d.tif", "TIFF")):
        Image.new("RGB", SIZE).save(tmp_path / name, kind)
    put(tmp_path, "e.jpe")
    assert real(tmp_path) == (3, {"unreadable picture": 2})
    assert list(told(tmp_path)) == ["a.bmp", "b.JFIF", "c.gif", "d.tif", "e.jpe"]


def test_captions_in_utf_16_and_those_in_no_encoding(tmp_path):
    texts = {"a": "röd".encode("utf-16"), "b": "röd".encode("latin-1"), "c": b"r\0d"}
    put(tmp_path, *(f"{name}.png" for name in texts))
    for name, data in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(data)
    damaged = "damaged caption"
    assert told(tmp_path) == {"a.png": "röd", "b.png": damaged, "c.png": damaged}


NAMES = (
    "photo of a train.png",
    "test-tube.png",
    "val/3.png",
    "dev 4.png",
    "train/x.png",
    "ö[1].png",
)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_pictures_mean_nothing(name, tmp_path):
    names = ["cat.png", "dog.png", name]
    put(tmp_path, *names, caption=None)
    lines = [json.dumps({"file_name": each, "text": each}) for each in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert told(tmp_path) == {each: each for each in names}


def test_a_line_of_metadata_that_cannot_be_used_is_told(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png", "d.png", caption=None)
    (tmp_path / "c.txt").write_text("beside")
    lines = (
        '{"file_name": "a.png", "text": "rött\u2028äpple"}',
        '{"file_name": "./b.png", "text": "", "caption": [null, "green"]}',
        '{"file_name": "c.png", "text": null}',
        "{",
        '{"text": "red"}',
        '{"file_name": "gone.png", "text": "red"}',
        '{"file_name": "../x.png", "text": "red"}',
        '{"file_name": "/dev/zero", "text": "red"}',
    )
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert told(tmp_path) == {
        "a.png": "rött\u2028äpple",
        "b.png": "green",
        "c.png": "beside",
        "metadata.jsonl, line 4": "damaged caption",
        "metadata.jsonl, line 5": "no picture",
        "gone.png": "no picture",
        "../x.png": "no picture",
        "/dev/zero": "no picture",
        "d.png": "not in the metadata file",
    }
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "\\ud83d"}')
    assert told(tmp_path)["a.png"] == "damaged caption"


def test_metadata_in_other_formats_and_subfolders(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "sub/b.png", "sub/c.png", caption=None)
    table = 'file_name,text\r\nb.png,"rött\r\näpple"\r\n'
    (tmp_path / "sub/metadata.csv").write_bytes(table.encode("utf-16"))
    expected = {
        "a.png": "red",
        "sub/b.png": "rött\r\näpple",
        "sub/c.png": "not in the metadata file",
    }
    assert told(tmp_path) == expected
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "sub/metadata.csv").unlink()
    content = {"file_name": ["b.png"], "text": ["green"]}
    parquet.write_table(pyarrow.table(content), tmp_path / "sub/metadata.parquet")
    assert told(tmp_path)["sub/b.png"] == "green"


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"metadata.csv": b"file_name;text\n"}, {}, "hold the file of the picture"),
        ({"metadata.csv": b"file_name,text\na.png,r\xf6d\n"}, {}, r"metadata\.csv.*: line 2"),
        ({"metadata.jsonl": b"{}", "metadata.csv": b""}, {}, "keep the one that is meant"),
        ({"metadata.jsonl": b'{"file_name": "a.png"}'}, {}, "no column that is known to hold cap"),
        ({"metadata.jsonl": b'{"file_name": "a.png"}'}, {"caption": "alt"}, "no column 'alt'"),
        ({"metadata.parquet": b"nothing"}, {}, r"metadata\.parquet cannot be read"),
        ({"a.txt": b"red"}, {"caption": "alt"}, "it has no column 'alt'"),
        ({"a.txt": b"red"}, {"split": "test"}, "has no split 'test'"),
    ],
)
def test_what_cannot_be_told_of_a_folder_is_one_clear_line(files, options, message, tmp_path):
    put(tmp_path, "a.png", caption=None)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConvFusionError, match=message) as error:
        open_source(str(tmp_path), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("beside", ["metadata.json", "metadata.jsonl", "metadata.csv"])
def test_real_pictures_need_no_captions(beside, tmp_path):
    put(tmp_path, "a.png", "b.png", caption=None)
    (tmp_path / beside).write_text('{"file_name": "a.png", "taken": "2020"}')
    assert real(tmp_path) == (2, {})
