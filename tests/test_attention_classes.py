"""Sites of other attention classes than diffusers' own, and grids of three sides."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from convfusion import ConvFusionError
from convfusion.families import Site
from convfusion.mixers.base import TokenMixer
from convfusion.surgery.layers import projections
from convfusion.surgery.mixed import (
    DroppedAttention,
    MixedAttention,
    is_foreign,
    mixed_class,
    resting_mixer,
)
from convfusion.surgery.surgery import check_rank


class RotaryProcessor:
    """Computes the attention of `RotaryAttention`."""

    def __call__(self, attention, tokens, rotary=None):
        query, key, value, out = projections(attention)
        query, key = attention.norm_q(query(tokens)), attention.norm_k(key(tokens))
        query, key = (part * rotary for part in (query, key))
        weights = (query @ key.transpose(1, 2)).softmax(-1)
        return out(weights @ value(tokens))


class RotaryAttention(nn.Module):
    """As in a video model: norms and a rotary embedding, and the names of Wan or Kandinsky."""

    _default_processor_cls = RotaryProcessor

    def __init__(self, names=("to_query", "to_key", "to_value", "out_layer")):
        super().__init__()
        for name in names:
            layer = nn.Linear(8, 8)
            setattr(self, name, nn.ModuleList([layer]) if name == "to_out" else layer)
        self.norm_q, self.norm_k = nn.RMSNorm(8), nn.RMSNorm(8)
        self.processor = RotaryProcessor()

    def forward(self, tokens, others=None, mask=None, rotary=None):
        return self.processor(self, tokens, rotary)


class MeanOfFrames(TokenMixer):
    """Gives every token the mean over the frames."""

    ranks = (3,)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens, grid):
        maps = tokens.unflatten(1, grid)
        return (self.scale * maps.mean(1, keepdim=True)).expand_as(maps).flatten(1, 3)


NAMES = [("to_query", "to_key", "to_value", "out_layer"), ("to_q", "to_k", "to_v", "to_out")]


def mix(attention: nn.Module) -> None:
    attention.__class__ = mixed_class(type(attention))
    attention.mixer, attention.site = MeanOfFrames(), "blocks.0.attn1"


@pytest.mark.parametrize("names", NAMES)
def test_an_attention_of_any_class_takes_a_mixer_and_comes_back(names):
    attention = RotaryAttention(names)
    tokens, rotary = torch.randn(2, 12, 8), torch.rand(12, 1)
    before = attention(tokens, None, None, rotary)
    assert [type(layer) for layer in projections(attention)] == [nn.Linear] * 4
    mix(attention)
    grid = tokens.new_empty(3, 2, 2, 0)
    expected = tokens.unflatten(1, (3, 4)).mean(1).repeat(1, 3, 1)
    twin = copy.deepcopy(attention)
    for mixed in (attention, twin):
        assert isinstance(mixed, MixedAttention) and isinstance(mixed, RotaryAttention)
        assert isinstance(resting_mixer(mixed), MeanOfFrames)
        torch.testing.assert_close(mixed(tokens, None, None, rotary, grid=grid), expected)
    with pytest.raises(ConvFusionError, match="12 tokens, but the grid 3×2×3 has 18"):
        attention(tokens, None, None, rotary, grid=tokens.new_empty(3, 2, 3, 0))
    del attention.mixer, attention.site
    attention.__class__ = attention.stock
    assert type(attention) is RotaryAttention and resting_mixer(attention) is None
    assert torch.equal(attention(tokens, None, None, rotary), before)


def test_there_is_one_class_for_each_class_of_attention():
    mixed, dropped = mixed_class(RotaryAttention), mixed_class(RotaryAttention, dropped=True)
    assert mixed is mixed_class(RotaryAttention) is not mixed_class(Attention)
    assert issubclass(dropped, DroppedAttention) and dropped.stock is mixed.stock is RotaryAttention
    assert (mixed.__name__, dropped.__name__) == ("MixedRotaryAttention", "DroppedRotaryAttention")


def test_weights_that_were_dropped_are_named():
    attention = RotaryAttention()
    mix(attention)
    attention.__class__ = mixed_class(attention.stock, dropped=True)
    del attention.to_query
    with pytest.raises(AttributeError, match=r"to_query: the self-attention weights .* dropped"):
        attention.to_query  # noqa: B018


def test_the_processor_of_its_own_class_is_plain():
    attention = RotaryAttention()
    assert not is_foreign(attention, attention.processor)
    assert not is_foreign(attention, None)
    assert is_foreign(attention, SimpleNamespace())


@dataclass(frozen=True)
class Frames:
    """Settings of `MeanOfFrames`."""


def test_a_mixer_says_which_grids_it_works_on():
    flat = Site("attn1", 8, 1, 0, "", "norm2")
    video = Site("attn1", 8, 1, 0, "", "norm2", rank=3)
    frames, plain = MeanOfFrames(), TokenMixer()
    frames.config, plain.config = Frames(), SimpleNamespace()
    check_rank(flat, plain)
    check_rank(video, frames)
    with pytest.raises(ConvFusionError, match=r"\(height, width\), and Frames mixes on \(frames,"):
        check_rank(flat, frames)
    with pytest.raises(ConvFusionError, match=r"Namespace mixes on \(height, width\): choose"):
        check_rank(video, plain)
