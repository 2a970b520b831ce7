"""Tables as they are elsewhere: other kinds of columns, empty ones, and rows that are damaged."""

import struct

import pytest
from test_sources import everything, png

from convfusion import ConvFusionError
from convfusion.data import open_source
from convfusion.evaluate import open_real

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

PICTURE = png()
COLUMNS = {
    "large": (pa.array([PICTURE], pa.large_binary()), pa.array(["red"], pa.large_string())),
    "of one length": (pa.array([PICTURE], pa.binary(len(PICTURE))), pa.array(["red"])),
    "dictionaries": (
        pa.array([{"bytes": PICTURE, "path": None}]),
        pa.array(["red"]).dictionary_encode(),
    ),
    "lists": (
        pa.array([[{"bytes": PICTURE, "path": "a.png"}]]),
        pa.array([["", "red"]], pa.large_list(pa.string())),
    ),
    "captions as bytes": (pa.array([PICTURE]), pa.array([b"red"])),
    "captions as objects": (pa.array([PICTURE]), pa.array([[{"raw": "red"}]])),
}


def write(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".parquet":
        parquet.write_table(table, path)
        return path
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path


def told(path, **options):
    return [s.caption or s.problem for s in everything(open_source(str(path), **options))]


@pytest.fixture(autouse=True)
def cache(hub):
    return hub


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_kinds_of_columns(kind, suffix, tmp_path):
    image, text = COLUMNS[kind]
    path = write(tmp_path / f"x{suffix}", pa.table({"image": image, "text": text}))
    found = everything(open_source(str(path)))
    assert [(s.caption, s.picture) for s in found] == [("red", PICTURE)]


REFUSED = {
    "base64": ({"image": ["aGVsbG8="], "text": ["red"]}, "'image' that holds string, not pictures"),
    "numbers": ({"image": [[1, 2]], "text": ["red"]}, "'image' that holds list, not pictures"),
    "no words": ({"image": [PICTURE], "text": [0.5]}, "'text' that holds float64, not captions"),
    "no pictures": ({"label": [1], "text": ["red"]}, "known to hold pictures: name one of label"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_column_of_something_else_is_refused_by_name(kind, tmp_path):
    columns, message = REFUSED[kind]
    path = write(tmp_path / "x.parquet", pa.table(columns))
    with pytest.raises(ConvFusionError, match=message):
        open_source(str(path))
    with pytest.raises(ConvFusionError, match="'text' that holds"):
        open_source(str(path), image="text")


def test_an_empty_column_hides_no_other(tmp_path):
    columns = {
        "image": pa.array([None, b"", PICTURE], pa.binary()),
        "jpg": pa.array([PICTURE, PICTURE, None], pa.binary()),
        "text": ["", None, "green"],
        "caption": ["red", "tan", None],
    }
    found = everything(open_source(str(write(tmp_path / "x.parquet", pa.table(columns)))))
    assert [(s.caption, s.picture) for s in found] == [
        ("red", PICTURE),
        ("tan", PICTURE),
        ("green", PICTURE),
    ]


def test_a_row_that_is_no_utf_8_is_told(tmp_path):
    ends = pa.py_buffer(struct.pack("<iii", 0, 1, 4))
    text = pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"\xffred")])
    path = write(tmp_path / "x.parquet", pa.table({"image": [PICTURE] * 2, "text": text}))
    assert told(path) == ["damaged row", "red"]


def test_a_picture_that_a_table_only_names_is_a_plain_file(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    paths = [str(tmp_path / "a.png"), "/dev/zero", str(tmp_path / "gone.png")]
    image = pa.array([{"bytes": None, "path": path} for path in paths])
    path = write(tmp_path / "x.parquet", pa.table({"image": image}))
    real = open_real(str(path), (8, 8))
    assert len(list(real)) == 1 and real.skipped == {"unreadable picture": 2}


def test_names_of_tables_mean_nothing(tmp_path):
    table = pa.table({"image": [PICTURE], "text": ["red"]})
    path = write(tmp_path / ".mine" / "x[1]*.parquet", table)
    assert told(path) == told(path.parent) == ["red"]
    write(tmp_path / "more" / "X.PARQUET", table)
    (tmp_path / "more" / "linked").symlink_to(path.parent)
    write(tmp_path / "more" / ".hidden" / "y.parquet", table)
    assert told(tmp_path / "more") == ["red", "red"]
    (tmp_path / "more" / "gone.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConvFusionError, match=r"gone\.parquet cannot be read: broken link"):
        open_source(str(tmp_path / "more"))
    write(tmp_path / "both" / "x.arrow", table)
    write(tmp_path / "both" / "x.parquet", table)
    with pytest.raises(ConvFusionError, match=r"tables in \.arrow and \.parquet"):
        open_source(str(tmp_path / "both"))
