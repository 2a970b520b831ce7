"""The mean token alone, started from the attention that it replaces."""

import torch
from diffusers.models.attention_processor import Attention

from convfusion.mixers import MeanOnly
from convfusion.mixers.sampling import attend_at
from convfusion.mixers.tokens import TokenSample
from convfusion.surgery.start import measure_imitation


@torch.no_grad()
def make_attention():
    """An attention that is far from uniform, and tokens that it sees."""
    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8, bias=True).eval()
    attention.to_q.weight *= 6
    made = [torch.randn(3, 24, 16) + torch.randn(3, 1, 16) for _ in range(4)]
    return attention, [TokenSample(tokens, (4, 6)) for tokens in made]


@torch.no_grad()
def test_its_mean_output_is_the_attentions():
    attention, sample = make_attention()
    mixer = MeanOnly().build(16, 2)
    mixer.init_from(attention)
    before = measure_imitation(mixer, attention, sample)
    mixer.start_from(attention, sample)
    given = torch.cat([attention(each.tokens) for each in sample])
    found = torch.cat([mixer(each.tokens, each.grid) for each in sample])
    assert torch.allclose(found.mean((0, 1)), given.mean((0, 1)), atol=1e-5)
    assert measure_imitation(mixer, attention, sample) < before


@torch.no_grad()
def test_some_queries_of_an_attention_are_those_of_all():
    attention, sample = make_attention()
    given, chosen = sample[0], torch.tensor([0, 5, 23])
    expected = attention(given.tokens)[:, chosen]
    assert torch.allclose(attend_at(attention, given, chosen), expected, atol=1e-5)
