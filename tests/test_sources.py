"""Where samples come from, and what is wrong with some of them."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from convfusion import ConvFusionError
from convfusion.data.pictures import UnusableError, crop_to_cover, decode_picture
from convfusion.data.samples import CHUNK
from convfusion.data.sources import Drawing, Shards, expand_braces, open_source

pytestmark = pytest.mark.libraries


def png(size=(8, 8), colour="red", kind="PNG", **options):
    """An encoded picture; the size is (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **options)
    return file.getvalue()


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def everything(source):
    return [sample for unit in range(source.units) for sample in source.read(unit)]


def test_folder(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.jpg", "a.PNG", "more/c.webp", "d.jpeg", "e.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "a.txt").write_text("\ufeff red \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "more/c.txt").write_text("Äpfel", encoding="utf-8")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    source = open_source(str(tmp_path))
    found = [(s.name, s.caption, s.problem) for s in everything(source)]
    assert found == [
        ("a.PNG", "red", ""),
        ("b.jpg", "", "no caption"),
        ("d.jpeg", "", "damaged caption"),
        ("e.png", "", "no caption"),
        ("more/c.webp", "Äpfel", ""),
    ]
    assert source.total == 5 and source.units == 1
    named = source.describe()
    (tmp_path / "f.png").write_bytes(png())
    assert open_source(str(tmp_path)).describe() != named


def test_units_of_a_folder_are_chunks(tmp_path):
    for i in range(CHUNK + 1):
        (tmp_path / f"{i:03d}.png").write_bytes(b"")
        (tmp_path / f"{i:03d}.txt").write_text(str(i))
    source = open_source(str(tmp_path))
    assert source.units == 2
    assert [sample.caption for sample in source.read(1)] == [str(CHUNK)]


def test_shards_as_webdataset_writes_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"x-{number}.tar")) as writer:
            for i in range(2):
                writer.write({"__key__": f"s{i}", "png": png(), "txt": f"red {number} {i}"})
    for spec in (str(tmp_path), str(tmp_path / "x-{0..1}.tar")):
        source = open_source(spec)
        assert [s.caption for s in everything(source)] == [
            "red 0 0",
            "red 0 1",
            "red 1 0",
            "red 1 1",
        ]
        assert source.total is None and source.units == 2
    one = open_source(str(tmp_path / "x-1.tar"))
    assert [s.name for s in everything(one)] == ["x-1.tar/s0", "x-1.tar/s1"]


def test_fields_of_shards(tmp_path):
    members = {
        "a.jpg": png(kind="JPEG"),
        "a.json": json.dumps({"caption": "by json", "alt": "other"}).encode(),
        "b.json": b"{",
        "b.jpg": png(),
        "c.txt": b"red",
        "dir.x/d.JPG": png(),
        "dir.x/d.txt": b"red",
        "e.pickle": b"cos\nsystem\n(S'false'\ntR.",
        "e.jpg": png(),
        "f.jpg": png(),
        "f.json": b'["no", "object"]',
    }
    path = shard(tmp_path / "x.tar", members)
    found = {s.name[6:]: s.caption or s.problem for s in everything(open_source(str(path)))}
    assert found == {
        "a": "by json",
        "b": "damaged caption",
        "c": "no picture",
        "dir.x/d": "red",
        "e": "no caption",
        "f": "no caption",
    }
    chosen = everything(open_source(str(path), image="jpg", caption="alt"))
    assert chosen[0].caption == "other"


def cut_in_data(data):
    return data[:700]


def cut_in_header(data):
    return data[: 2 * 1024 + 100]


def cut_between_files(data):
    return data[: 2 * 1024]


def damaged_header(data):
    return data[: 2 * 1024] + b"x" * 512 + data[2 * 1024 + 512 :]


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (cut_in_data, 0),
        (cut_in_header, 1),
        (cut_between_files, 1),
        (damaged_header, 1),
        (lambda data: b"", 0),
        (lambda data: b"no tar" * 200, 0),
    ],
)
def test_a_damaged_shard_is_told(tmp_path, damage, left):
    files = ("a.png", png()), ("a.txt", b"red"), ("b.png", png()), ("b.txt", b"red")
    path = shard(tmp_path / "x.tar", dict(files))
    path.write_bytes(damage(path.read_bytes()))
    found = everything(Shards(str(path), (path,)))
    assert [s.caption or s.problem for s in found] == ["red"] * left + ["damaged shard"]
    assert found[-1].name == "x.tar"


def test_braces():
    assert expand_braces("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain") == ["plain"]


def rows(hub, **columns):
    columns.setdefault("text", ["red", "", None, "green"])
    pictures = [png(), png(), png(), b"no picture"]
    data = hub.Dataset.from_dict(
        {"image": [{"bytes": p, "path": None} for p in pictures], **columns}
    )
    return data.cast_column("image", hub.Image())


EXPECTED = ["red", "no caption", "no caption", "green"]


def test_saved_data_set(hub, tmp_path):
    data = rows(hub)
    data.save_to_disk(tmp_path / "one")
    hub.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    found = everything(open_source(str(tmp_path / "one")))
    assert [s.caption or s.problem for s in found] == EXPECTED
    assert found[3].picture == b"no picture"  # found out by who decodes it
    assert open_source(str(tmp_path / "two")).total == 4
    assert open_source(str(tmp_path / "two"), split="test").total == 1
    with pytest.raises(ConvFusionError, match="no split 'dev': it has train, test"):
        open_source(str(tmp_path / "two"), split="dev")
    same = open_source(str(tmp_path / "one")).describe()
    assert same == open_source(str(tmp_path / "one")).describe()


def test_tables(hub, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    rows(hub).to_parquet(folder / "x.parquet")
    for spec in (folder, folder / "x.parquet"):
        found = everything(open_source(str(spec)))
        assert [s.caption or s.problem for s in found] == EXPECTED


def test_pictures_with_metadata(hub, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "b.png").write_bytes(b"no picture")
    lines = [{"file_name": "a.png", "text": "red"}, {"file_name": "b.png", "text": "green"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = everything(open_source(str(folder)))
    assert [s.caption for s in found] == ["red", "green"]
    assert decode_picture(found[0].picture).size == (8, 8)


def test_columns(hub, tmp_path):
    kinds = hub.ClassLabel(names=["cat", "dog"])
    data = rows(hub, captions=[["a", "b"], [], ["", "c"], None], label=[0, 1, 1, 0])
    data.cast_column("label", kinds).remove_columns("text").save_to_disk(tmp_path / "x")
    found = [s.caption for s in everything(open_source(str(tmp_path / "x")))]
    assert found == ["a", "", "c", ""]
    by_class = everything(open_source(str(tmp_path / "x"), caption="label"))
    assert [s.caption for s in by_class] == ["0", "1", "1", "0"]
    with pytest.raises(ConvFusionError, match="no column 'alt' of captions: name one of image"):
        open_source(str(tmp_path / "x"), caption="alt")
    data.select_columns(["label"]).save_to_disk(tmp_path / "y")
    with pytest.raises(ConvFusionError, match="known to hold pictures: name one of label"):
        open_source(str(tmp_path / "y"))


def test_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("red apple\n\n  green apple \n")
    source = open_source(str(tmp_path / "p.txt"), drawing=Drawing(per_prompt=2, seed=5))
    found = [(s.caption, s.seed) for s in everything(source)]
    assert found == [("red apple", 5), ("red apple", 6), ("green apple", 7), ("green apple", 8)]
    with pytest.raises(ConvFusionError, match="at least 1"):
        Drawing(per_prompt=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "does not exist; a data set of the Hub is called hf:"),
        ("x-{0..2}.tar", r"x-0.tar does not exist \(3 of"),
        ("empty", "has no pictures"),
        ("cached", "is a cache already"),
        ("bare", "pictures without captions: a.txt should lie beside a.png"),
        ("blank.txt", "has no prompts"),
        ("binary.txt", "not a text file in UTF-8"),
        ("data.bin", "is no data: it should be"),
        ("broken.parquet", "cannot be read as a data set"),
    ],
)
def test_a_source_that_cannot_be_opened_is_one_clear_line(hub, tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "cached").mkdir()
    (tmp_path / "cached/cache.json").write_text("{}")
    (tmp_path / "bare/a.png").write_bytes(png())
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "data.bin").write_bytes(b"")
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    with pytest.raises(ConvFusionError, match=message) as error:
        open_source(str(tmp_path / spec))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["pipe:cat x.tar", "https://a.example/x.tar", "s3://x/y.tar"])
def test_nothing_is_fetched_or_run(spec):
    with pytest.raises(ConvFusionError, match="is not on this machine"):
        open_source(spec)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConvFusionError, match=r"pip install 'convfusion\[data\]'"):
        open_source("hf:some/name")


def test_a_hub_data_set_that_cannot_be_had(hub):
    with pytest.raises(ConvFusionError, match="hf:some/name cannot be read as a data set"):
        open_source("hf:some/name")


def test_the_hub_is_read_with_builders_that_only_read(hub, monkeypatch):
    class Builder:
        name = "parquet"

        def download_and_prepare(self):
            pass

        def as_dataset(self):
            return hub.DatasetDict({"train": rows(hub)})

    asked = []
    monkeypatch.setattr(hub, "load_dataset_builder", lambda name: asked.append(name) or Builder())
    found = everything(open_source("hf:some/name"))
    assert [s.caption or s.problem for s in found] == EXPECTED and asked == ["some/name"]
    Builder.name = "pandas"  # which has read pickles
    with pytest.raises(ConvFusionError, match="of the kind pandas"):
        open_source("hf:some/name")


def test_pictures_are_upright_and_on_white(tmp_path):
    turned = Image.new("RGBA", (8, 16), (255, 0, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "a.png", exif=exif)
    found = decode_picture(tmp_path / "a.png")
    assert found.size == (16, 8)
    assert (np.array(found) == 255).all()
    for mode in ("L", "P", "CMYK"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / "b", kind)
        assert np.array(decode_picture(tmp_path / "b")).min() >= 254


def test_pictures_are_covered_and_cropped_in_the_middle():
    picture = Image.new("RGB", (40, 16), "red")
    picture.paste("green", (12, 0, 28, 16))
    found = crop_to_cover(picture, (16, 16))
    assert found.shape == (16, 16, 3) and (found == found[0, 0]).all()
    assert crop_to_cover(picture, (8, 20)).shape == (8, 20, 3)
    with pytest.raises(UnusableError, match="smaller"):
        crop_to_cover(picture, (17, 16))


def test_what_is_no_picture(monkeypatch, tmp_path):
    deep, gif = io.BytesIO(), io.BytesIO()
    Image.new("I;16", (8, 8), 40000).save(deep, "PNG")
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noisy.save(tmp_path / "a.jpg")
    cut = (tmp_path / "a.jpg").read_bytes()[:1000]
    for data in (b"", b"nothing", cut, deep.getvalue(), gif.getvalue(), tmp_path / "nowhere.png"):
        with pytest.raises(UnusableError, match="unreadable picture"):
            decode_picture(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # exceeded by less than twice: a warning
    with pytest.raises(UnusableError, match="unreadable picture"):
        decode_picture(png())
