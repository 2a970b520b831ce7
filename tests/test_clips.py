"""Clips: folders of frames, GIFs and videos are read alike, damage is told, writing keeps them."""

import os
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from convfusion import ConvFusionError
from convfusion.data import list_clips, read_clip, save_strip, write_clip
from convfusion.data.clips import GAP, draw_strip, spread_frames
from convfusion.data.pictures import UnusableError
from convfusion.imports import is_installed

pytestmark = pytest.mark.libraries

MISSING = not is_installed("av") and os.environ.get("CI") != "true"
needs_av = pytest.mark.skipif(MISSING, reason="needs the extra video")


def make_clip(frames=7, height=32, width=48):
    """A light square that goes to the right over a ground of two colours, [T, H, W, 3]."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[:, : height // 2] = (200, 60, 90)
    clip[:, height // 2 :] = (40, 120, 180)
    for number in range(frames):
        clip[number, 8:20, 4 * number : 4 * number + 12] = 240
    return clip


def write_frames(clip, folder, first=0):
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip, first):
        Image.fromarray(frame).save(folder / f"frame{number}.png")


def write_video(clip, path, codec="libvpx-vp9"):
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def close(read, clip, most):
    return read.shape == clip.shape and np.abs(read.astype(int) - clip).mean() < most


def test_a_folder_of_frames_is_read_to_the_bit_in_the_order_of_its_numbers(tmp_path):
    clip = make_clip()
    write_frames(clip, tmp_path / "clip", first=8)  # frame10 is behind frame9
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    (tmp_path / "clip" / ".hidden.png").write_bytes(b"no frame either")
    assert np.array_equal(read_clip(tmp_path / "clip", 7), clip)
    assert np.array_equal(read_clip(tmp_path / "clip", 3, every=3), clip[[0, 3, 6]])
    assert np.array_equal(read_clip(tmp_path / "clip", 2, (32, 32)), clip[:2, :, 8:40])


@pytest.mark.parametrize("name", ["clip.gif", pytest.param("clip.mp4", marks=needs_av)])
def test_what_is_written_is_read_again(tmp_path, name):
    clip = make_clip()
    write_clip(clip, tmp_path / name, 10, {"parameters": "red apple\nSteps: 2"})
    read = read_clip(tmp_path / name, 7)
    assert close(read, clip, 3)
    assert np.array_equal(read_clip(tmp_path / name, 3, every=3), read[::3])
    written = (tmp_path / name).read_bytes()
    write_clip(clip, tmp_path / name, 10, {"parameters": "red apple\nSteps: 2"})
    assert (tmp_path / name).read_bytes() == written
    assert b"red apple\nSteps: 2" in written


@needs_av
@pytest.mark.parametrize("name", ["clip.webm", "clip.mkv", "clip.mov"])
def test_other_videos_are_read(tmp_path, name):
    codec = "libvpx-vp9" if name == "clip.webm" else "libx264"
    write_video(make_clip(), str(tmp_path / name), codec)
    assert close(read_clip(tmp_path / name, 7), make_clip(), 6)


@needs_av
@pytest.mark.parametrize(
    ("matrix", "quarters"), [((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)]
)
def test_a_video_that_was_turned_is_turned_back(tmp_path, matrix, quarters):
    """The track's matrix (a, b, c, d) takes (x, y) to (ax + cy, bx + dy), where y is downwards."""
    clip = make_clip(3)
    write_clip(clip, tmp_path / "clip.mp4", 10)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    a, b, c, d = (number << 16 for number in matrix)
    place = data.index(b"tkhd") + 44  # behind version, times, number, length and layers
    assert struct.unpack_from(">9i", data, place) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">5i", data, place, a, b, 0, c, d)
    (tmp_path / "turned.mp4").write_bytes(data)
    upright = np.rot90(clip, -quarters, axes=(1, 2))
    assert close(read_clip(tmp_path / "turned.mp4", 3), upright, 3)


@needs_av
def test_an_mp4_has_even_sides_and_its_speed(tmp_path):
    import av

    clip = make_clip(3, 31, 47)
    write_clip(clip, tmp_path / "clip.mp4", 16)
    with av.open(str(tmp_path / "clip.mp4")) as file:
        video = file.streams.video[0]
        assert (video.height, video.width, video.average_rate) == (32, 48, 16)
    assert close(read_clip(tmp_path / "clip.mp4", 3)[:, :31, :47], clip, 5)


def test_a_frame_of_a_gif_lasts_as_long_as_it_is_shown(tmp_path):
    clip = make_clip(4)[[0, 1, 1, 1, 2, 3]]  # equal frames are kept as one that is shown longer
    write_clip(clip, tmp_path / "clip.gif", 10)
    with Image.open(tmp_path / "clip.gif") as file:
        assert file.n_frames == 4
    assert close(read_clip(tmp_path / "clip.gif", 6), clip, 3)


def test_folders_are_searched_for_clips(tmp_path):
    write_frames(make_clip(2), tmp_path / "b" / "frames")
    (tmp_path / "a").mkdir()
    write_clip(make_clip(2), tmp_path / "a" / "one.gif", 10)
    save_strip(make_clip(2), tmp_path / "a" / "one.png")  # strips beside clips are no frames
    save_strip(make_clip(2), tmp_path / "a" / "two.png")
    write_frames(make_clip(1), tmp_path / "single")
    write_frames(make_clip(2), tmp_path / ".hidden")
    assert list_clips(tmp_path) == [tmp_path / "a" / "one.gif", tmp_path / "b" / "frames"]
    assert list_clips(tmp_path / "b" / "frames") == [tmp_path / "b" / "frames"]
    with pytest.raises(ConvFusionError, match="single has no clips: they are folders of frames"):
        list_clips(tmp_path / "single")


def test_what_cannot_be_used_says_why(tmp_path):
    write_frames(make_clip(), tmp_path / "clip")
    for name in ("clip.gif", "text.txt"):
        (tmp_path / name).write_bytes(b"GIF89a no clip")
    Image.new("RGB", (9, 9)).save(tmp_path / "clip" / "frame7.png")
    for path, frames, size, why in (
        ("clip", 9, None, "fewer frames than asked for"),
        ("clip", 8, None, "frames of several sizes"),
        ("clip", 2, (64, 64), "picture smaller than the size asked for"),
        ("clip.gif", 2, None, "unreadable clip"),
        ("text.txt", 2, None, "no clip"),
        ("nothing.gif", 2, None, "unreadable clip"),
    ):
        with pytest.raises(UnusableError, match=f"^{why}$"):
            read_clip(tmp_path / path, frames, size)
    with pytest.raises(ConvFusionError, match="must be at least 1"):
        read_clip(tmp_path / "clip", 0)
    with pytest.raises(ConvFusionError, match=r"should end in \.mp4 or \.gif"):
        write_clip(make_clip(), tmp_path / "clip.avi", 10)
    with pytest.raises(ConvFusionError, match="not 0"):
        write_clip(make_clip(), tmp_path / "new.gif", 0)
    assert not (tmp_path / "new.gif").exists()


@needs_av
def test_a_damaged_video_is_told_and_a_list_of_files_is_not_followed(tmp_path):
    write_clip(make_clip(), tmp_path / "whole.mp4", 10)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path}/whole.mp4'\n")
    (tmp_path / "list.mkv").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/whole.mp4\n")
    for name in ("cut.mp4", "list.mp4", "list.mkv"):
        with pytest.raises(UnusableError, match=r"^unreadable clip$"):
            read_clip(tmp_path / name, 2)


def test_without_its_library_a_video_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    for call in (
        lambda: list_clips(tmp_path),
        lambda: read_clip(tmp_path / "clip.mp4", 1),
        lambda: write_clip(make_clip(), tmp_path / "new.mp4", 10),
    ):
        with pytest.raises(ConvFusionError, match=r"needs av: pip install 'convfusion\[video\]'"):
            call()
    write_clip(make_clip(), tmp_path / "new.gif", 10)
    assert len(read_clip(tmp_path / "new.gif", 7)) == 7


def test_a_strip_shows_the_first_frame_the_last_and_some_between(tmp_path):
    clip = make_clip(17, 8, 8)
    assert spread_frames(17, 5) == [0, 4, 8, 12, 16]
    assert spread_frames(3, 5) == [0, 1, 2]
    assert spread_frames(9, 1) == [0]
    strip = np.array(draw_strip(clip, 5))
    assert strip.shape == (8, 5 * 8 + 4 * GAP, 3)
    for place, number in enumerate((0, 4, 8, 12, 16)):
        left = place * (8 + GAP)
        assert np.array_equal(strip[:, left : left + 8], clip[number])
    large = np.zeros((2, 400, 800, 3), np.uint8)
    assert draw_strip(large).size == (2 * 320 + GAP, 160)
    save_strip(clip, tmp_path / "strip.png", 5)
    with Image.open(tmp_path / "strip.png") as file:
        assert np.array_equal(np.array(file), strip)
