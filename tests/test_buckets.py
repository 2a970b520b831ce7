"""Sizes of about the same area."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_pipelines import PIPELINES

from convfusion import ConvFusionError, mini
from convfusion.data.buckets import choose_nearest, choose_step, list_buckets
from convfusion.generate import check_size

steps = st.integers(1, 64)
sides = st.integers(1, 32)
ratios = st.floats(1, 4)


@given(steps, sides, sides, ratios)
def test_buckets_keep_area_step_and_ratio(step, height, width, max_ratio):
    size = (height * step, width * step)
    found = list_buckets(size, step, max_ratio)
    assert len(set(found)) == len(found) and size in found
    for h, w in found:
        assert h % step == w % step == 0
        assert h * w <= size[0] * size[1]
        if (h, w) != size:
            assert max(h, w) <= max_ratio * min(h, w)
            assert h * w > size[0] * size[1] - max(h, w) * step  # nothing larger would fit
    for one in found:
        assert not any(one != o and one[0] <= o[0] and one[1] <= o[1] for o in found)
    if height == width:
        assert {(w, h) for h, w in found} == set(found)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_nearest_bucket_is_the_nearest(height, width):
    found = list_buckets((512, 512), 64)
    chosen = choose_nearest(found, (height, width))

    def far(size):
        return abs(math.log(size[1] / size[0]) - math.log(width / height))

    assert far(chosen) <= min(map(far, found)) + 1e-8
    assert choose_nearest(found, chosen) == chosen


def test_known_buckets():
    found = list_buckets((1024, 1024), 64)
    assert {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1152, 896)} <= set(found)
    assert found == sorted(found, key=lambda size: size[1] / size[0])
    assert list_buckets((16, 16), 8) == [(16, 16)]
    assert choose_nearest([(512, 512), (256, 256)], (90, 90)) == (512, 512)
    for wrong in (((0, 8), 8, 2.0), ((8, 8), 0, 2.0), ((8, 8), 8, 0.5)):
        with pytest.raises(ConvFusionError, match="must be at least 1"):
            list_buckets(*wrong)


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart"])
def test_every_bucket_can_be_drawn(family):
    pipe = PIPELINES[family]()
    for size in ((16, 16), (64, 48), (512, 512), (1024, 1024), (520, 512)):
        for each in list_buckets(size, choose_step(pipe, size)):
            check_size(pipe, each)
    assert choose_step(pipe, (1024, 1024)) == 64
    assert choose_step(pipe, (520, 512)) == 64


def test_steps_of_the_embedded_model():
    pipe = mini.load_teacher()
    assert choose_step(pipe, (64, 64)) == 8
