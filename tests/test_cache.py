"""Latents and conditioning that are computed once: what is kept, and what a kill leaves."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from test_sources import shard
from tiny_pipelines import PIPELINES, stable_diffusion

from convfusion import CheckpointError, ConvFusionError
from convfusion.data import TrainingData, cache, chunks
from convfusion.data.cache import build_cache, open_cache
from convfusion.data.pictures import crop_to_cover, encode_pictures, upcast_vae
from convfusion.data.samples import CHUNK
from convfusion.data.sources import open_source
from convfusion.data.store import LatentCache
from convfusion.families import encode_conditioning
from convfusion.families.conditioning import flatten_conditioning
from convfusion.files import write_tensors
from convfusion.folders import unfinished_name

pytestmark = pytest.mark.libraries

COUNT = 2 * CHUNK + 10
SIZES = [(32, 32), (24, 40), (40, 24)]  # (height, width), beside each other in the buckets


def picture(index, size=(16, 16)):
    """Noise; the size is (height, width)."""
    values = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def caption(index):
    return ("red", "green apple", "7")[index % 3]


def encoded(index, size=(16, 16), kind="PNG"):
    file = io.BytesIO()
    picture(index, size).save(file, kind)
    return file.getvalue()


def write_pictures(folder, count, sizes=((16, 16),)):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        picture(i, sizes[i % len(sizes)]).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(caption(i))
    return folder


@pytest.fixture(scope="module")
def pipe():
    return stable_diffusion()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("many"), COUNT)


@pytest.fixture(scope="module")
def whole(pipe, many, tmp_path_factory):
    """The cache of `many`, built without a break."""
    return build_cache(pipe, open_source(str(many)), tmp_path_factory.mktemp("cache")).folder


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_samples_are_what_encoding_on_the_fly_gives(pipe, whole):
    found: TrainingData = open_cache(pipe, whole, size=(16, 16))
    assert list(found.captions) == [caption(i) for i in range(COUNT)]
    assert [list(group) for group in found.groups] == [[*range(COUNT)]]
    indices = [0, CHUNK, COUNT - 1, 5]
    latents, told = found.take(indices, [False, False, True, False])
    pixels = np.stack([crop_to_cover(picture(i), (16, 16)) for i in indices])
    torch.testing.assert_close(latents, encode_pictures(pipe.vae, pixels), rtol=1e-4, atol=1e-5)
    captions = [caption(0), caption(CHUNK), "", caption(5)]
    expected = flatten_conditioning(encode_conditioning(pipe, captions, (16, 16)))
    assert told.keys() == expected.keys()
    torch.testing.assert_close(
        told["encoder_hidden_states"], expected["encoder_hidden_states"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", list(PIPELINES))
def test_every_family(family, tmp_path):
    pipe = PIPELINES[family]()
    side = 2 * (getattr(pipe, "unet", None) or pipe.transformer).config.sample_size
    for i, text in enumerate(["red", "green", "apple", "red"]):
        picture(i, (side, side)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text)
    source = open_source(str(tmp_path))
    built = build_cache(pipe, source, tmp_path / "cache", batch_size=3)
    assert len(built) == 4 and not built.skipped and built.sizes == [(side, side)]
    latents, told = open_cache(pipe, tmp_path / "cache").take([1, 3], [False, True])
    assert latents.shape == (2, 4, side // 2, side // 2) and latents.dtype == torch.float32
    expected = flatten_conditioning(encode_conditioning(pipe, ["green", ""], (side, side)))
    assert told.keys() == expected.keys()
    for key, tensor in expected.items():
        if tensor is None:
            assert told[key] is None
        else:
            assert told[key].dtype == tensor.dtype
            torch.testing.assert_close(told[key], tensor, rtol=1e-4, atol=1e-5)


def test_buckets_and_what_sdxl_is_told_of_them(tmp_path):
    pipe = PIPELINES["sdxl"]()
    data = write_pictures(tmp_path / "data", 9, SIZES)
    source = open_source(str(data))
    built = build_cache(pipe, source, tmp_path / "cache", size=(32, 32), buckets=True)
    assert sorted(built.sizes) == sorted(SIZES) and not built.skipped
    assert sorted(i for group in built.groups for i in group) == [*range(9)]
    for size, group in zip(built.sizes, built.groups, strict=True):
        latents, told = built.take(group, [False, True, False])
        assert latents.shape == (3, 4, size[0] // 2, size[1] // 2)
        ids = torch.tensor([[*size, 0, 0, *size]] * 3, dtype=torch.float32)
        assert torch.equal(told["added_cond_kwargs.time_ids"], ids)
        texts = [built.captions[group[0]], "", built.captions[group[2]]]
        expected = flatten_conditioning(encode_conditioning(pipe, texts, size))
        for key, tensor in expected.items():
            torch.testing.assert_close(told[key], tensor, rtol=1e-4, atol=1e-5)


def test_workers_change_nothing(pipe, many, whole, tmp_path):
    before = torch.random.get_rng_state()
    build_cache(pipe, open_source(str(many)), tmp_path / "cache", num_workers=2)
    assert contents(tmp_path / "cache") == contents(whole)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_workers_change_nothing_for_shards(pipe, tmp_path):
    for number, count in enumerate((CHUNK + 3, CHUNK, 0, 2)):
        members = {}
        for i in range(count):
            members |= {f"{i}.png": encoded(i), f"{i}.txt": caption(i).encode()}
        shard(tmp_path / f"{number}.tar", members)
    source = open_source(str(tmp_path / "{0..3}.tar"))
    one = build_cache(pipe, source, tmp_path / "one")
    build_cache(pipe, source, tmp_path / "two", num_workers=2)
    assert len(one) == 2 * CHUNK + 5 and one.manifest["chunks"] == 5
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("at", ["picture", "tensors", "record"])
def test_a_build_that_failed_goes_on(monkeypatch, pipe, many, whole, tmp_path, at):
    source = open_source(str(many))
    batches = []

    def counted(vae, pixels):
        batches.append(len(pixels))
        if at == "picture" and broken and len(batches) == 12:
            raise RuntimeError("out of memory")
        return encode_pictures(vae, pixels)

    def failing(path, what):
        if path.name.startswith("0000001"):
            raise RuntimeError("disk full")
        return original(path, what)

    broken = True
    monkeypatch.setattr(chunks, "encode_pictures", counted)
    name = {"tensors": "write_tensors", "record": "write_text"}.get(at)
    original = getattr(cache, name) if name else None
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        if name:
            patch.setattr(cache, name, failing)
        build_cache(pipe, source, tmp_path)
    with pytest.raises(ConvFusionError, match=r"is not complete: .* goes on where it stopped"):
        open_cache(pipe, tmp_path)
    broken = False
    batches.clear()
    done = []
    build_cache(pipe, source, tmp_path, on_progress=done.append)
    assert contents(tmp_path) == contents(whole)
    assert sum(batches) == COUNT - CHUNK and done == [CHUNK, 2 * CHUNK, COUNT]
    batches.clear()
    build_cache(pipe, source, tmp_path)  # complete: nothing is left to do
    assert not batches


KILLED = """
import os, signal, sys
from tiny_pipelines import stable_diffusion
from convfusion.data.cache import build_cache
from convfusion.data.sources import open_source

def progress(done):
    if done >= 64:
        os.kill(os.getpid(), signal.SIGKILL)

build_cache(stable_diffusion(), open_source(sys.argv[1]), sys.argv[2], on_progress=progress)
"""


def test_a_killed_build_goes_on_to_the_same_bits(pipe, many, whole, tmp_path):
    command = [sys.executable, "-c", KILLED, str(many), str(tmp_path)]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ran = subprocess.run(command, env=environment, capture_output=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    assert len(list((tmp_path / "chunks").glob("*.json"))) == 1
    build_cache(pipe, open_source(str(many)), tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_a_shard_goes_on_in_its_middle(monkeypatch, pipe, tmp_path):
    members = {}
    for i in range(CHUNK + 6):
        members |= {f"{i}.png": encoded(i), f"{i}.txt": caption(i).encode()}
    source = open_source(str(shard(tmp_path / "x.tar", members)))
    expected = build_cache(pipe, source, tmp_path / "one")
    build_cache(pipe, source, tmp_path / "two")
    manifest = tmp_path / "two/cache.json"
    begun = {**json.loads(manifest.read_text()), "complete": False}
    for key in ("samples", "chunks", "sizes", "skipped"):
        del begun[key]
    manifest.write_text(json.dumps(begun))
    (tmp_path / "two/chunks/0000000-0000001.json").unlink()
    batches = []
    monkeypatch.setattr(
        chunks, "encode_pictures", lambda v, p: batches.append(len(p)) or encode_pictures(v, p)
    )
    build_cache(pipe, source, tmp_path / "two")
    assert batches == [6] and contents(tmp_path / "two") == contents(expected.folder)


def other_weights(pipe, name):
    getattr(pipe, name).requires_grad_(False)
    next(getattr(pipe, name).parameters()).add_(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vae", "another vae"),
        ("text_encoder", "another text encoder"),
        ("text_encoder_2", "another text encoder"),
    ],
)
def test_a_cache_of_another_model_is_refused(tmp_path, name, message):
    pipe = PIPELINES["sdxl"]()
    source = open_source(str(write_pictures(tmp_path / "data", 2)))
    build_cache(pipe, source, tmp_path / "cache", size=(16, 16))
    other_weights(pipe, name)
    with pytest.raises(ConvFusionError, match=message):
        open_cache(pipe, tmp_path / "cache")
    with pytest.raises(ConvFusionError, match="was begun with another"):
        build_cache(pipe, source, tmp_path / "cache", size=(16, 16))
    setattr(pipe, name, None)  # as it is loaded without it
    assert len(open_cache(pipe, tmp_path / "cache")) == 2


def test_a_cache_of_pictures_that_have_changed_is_refused(pipe, tmp_path):
    folder = write_pictures(tmp_path / "data", 2)
    build_cache(pipe, open_source(str(folder)), tmp_path / "cache")
    twin = write_pictures(tmp_path / "twin", 2)
    (twin / "0000.txt").write_text("another caption")
    for source in (open_source(str(folder)), open_source(str(twin))):
        if source.spec == str(folder):
            (folder / "0001.txt").write_text("edited in place")
        with pytest.raises(ConvFusionError, match="begun with another source"):
            build_cache(pipe, source, tmp_path / "cache")


def test_a_cache_of_another_size_or_family_is_refused(pipe, whole):
    with pytest.raises(ConvFusionError, match="was built for 16x16, not for 32x16"):
        open_cache(pipe, whole, size=(16, 32))
    with pytest.raises(ConvFusionError, match="cache of a unet model, and this is a pixart"):
        open_cache(PIPELINES["pixart"](), whole)
    with pytest.raises(ConvFusionError, match=r"is no cache: it has no cache\.json"):
        open_cache(pipe, whole / "chunks")


def test_settings_are_checked_before_any_work(pipe, many, whole, tmp_path):
    source = open_source(str(many))
    with pytest.raises(ConvFusionError, match="cannot be drawn"):
        build_cache(pipe, source, tmp_path / "x", size=(17, 16))
    with pytest.raises(ConvFusionError, match="batch_size at least 1"):
        build_cache(pipe, source, tmp_path / "x", batch_size=0)
    with pytest.raises(ConvFusionError, match="exists and is no cache"):
        build_cache(pipe, source, many)
    with pytest.raises(ConvFusionError, match="begun with another half"):
        build_cache(pipe, source, whole, half=True)
    fewer = open_source(str(write_pictures(tmp_path / "fewer", 2)))
    with pytest.raises(ConvFusionError, match="begun with another source"):
        build_cache(pipe, fewer, whole)
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").mkdir()  # as a run killed at its very start leaves it
    (tmp_path / "x" / unfinished_name()).write_text("{")
    assert len(build_cache(pipe, fewer, tmp_path / "x")) == 2


def test_what_somebody_put_beside_a_useless_cache_stays(pipe, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    (tmp_path / "in" / "a.txt").write_text("a")
    source, out = open_source(str(tmp_path / "in")), tmp_path / "out"
    with pytest.raises(ConvFusionError, match="can be used"):
        build_cache(pipe, source, out)
    assert not out.exists()
    out.mkdir()
    remains = out / unfinished_name()
    remains.write_text("{")

    def note(done):
        (out / "notes.txt").write_text("mine")

    with pytest.raises(ConvFusionError, match="can be used"):
        build_cache(pipe, source, out, on_progress=note)
    assert {path.name for path in out.iterdir()} <= {"notes.txt", remains.name}
    assert (out / "notes.txt").read_text() == "mine"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def lose_row(path):
    tensors = load_file(path)
    tensors["16x16/latents"] = tensors["16x16/latents"][1:].contiguous()
    write_tensors(path, tensors)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("chunks/0000000-0000000.safetensors", cut),
        ("chunks/0000000-0000000.safetensors", lose_row),
        ("chunks/0000000-0000000.safetensors", Path.unlink),
        ("chunks/0000000-0000000.json", Path.unlink),
        ("chunks/0000000-0000000.json", lambda path: path.write_text("{")),
        ("chunks/0000000-0000000.json", lambda path: path.write_text("[]")),
        ("chunks/0000000-0000000.json", lambda path: path.write_text('{"sizes": {"16x16": 3}}')),
        ("empty.safetensors", Path.unlink),
        ("empty.safetensors", cut),
        ("cache.json", lambda path: path.write_bytes(b"\xff")),
        ("cache.json", lambda path: path.write_text('{"format": 1}')),
        ("cache.json", lambda path: path.write_text('{"format": 2, "complete": true}')),
    ],
)
def test_a_damaged_cache_is_refused(pipe, tmp_path, name, damage):
    data = write_pictures(tmp_path / "data", 3)
    build_cache(pipe, open_source(str(data)), tmp_path / "cache")
    damage(tmp_path / "cache" / name)
    with pytest.raises(CheckpointError):
        LatentCache(tmp_path / "cache")


def test_half_takes_half_the_space(pipe, many, whole, tmp_path):
    built = build_cache(pipe, open_source(str(many)), tmp_path, half=True)
    exact, told = LatentCache(whole).take([3], [False])
    near, also = built.take([3], [False])
    with torch.autocast("cpu", torch.bfloat16):  # as in a validation; it joins no float16
        again, _ = built.take([3, 3], [False, True])
    assert torch.equal(again[:1], near)
    assert near.dtype == torch.float32 and also["encoder_hidden_states"].dtype == torch.float32
    torch.testing.assert_close(near, exact, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(also, told, rtol=1e-3, atol=1e-4)
    size = sum(path.stat().st_size for path in (tmp_path / "chunks").glob("*.safetensors"))
    full = sum(path.stat().st_size for path in (whole / "chunks").glob("*.safetensors"))
    assert size < 0.6 * full


def test_reading_opens_few_files_and_survives_pickling(monkeypatch, whole):
    monkeypatch.setattr("convfusion.data.store.HANDLES", 1)
    found = LatentCache(whole)
    again = pickle.loads(pickle.dumps(found))
    for index in (0, CHUNK, 2 * CHUNK, 1):
        assert torch.equal(found.take([index], [False])[0], again.take([index], [False])[0])
    assert found._open.cache_info().currsize == 1


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_a_source_and_what_a_kill_left_goes(kind, pipe, tmp_path):
    pictures, out = write_pictures(tmp_path / "pictures", 2), tmp_path / "cache"
    build_cache(pipe, kind(pictures), out, size=(16, 16))
    manifest = json.loads((out / "cache.json").read_text())
    (out / "cache.json").write_text(json.dumps(manifest | {"complete": False}))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    remains = out / "chunks" / unfinished_name().replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    remains.write_text("half a chunk")
    assert len(build_cache(pipe, kind(pictures), out, size=(16, 16))) == 2
    assert not remains.exists()


def test_a_tiny_autoencoder_encodes_too():
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    pixels = np.array(picture(0))[None]
    with upcast_vae(vae):
        latents = encode_pictures(vae, pixels)
    maps = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.equal(latents, vae.encode(maps).latents.detach())
