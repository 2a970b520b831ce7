"""How much of what an image attends to is text, by hand and in a tiny Stable Diffusion 3.5."""

import json

import pytest
import torch
from test_joint import make_tokens
from tiny_pipelines import stable_diffusion_3

from convfusion.analysis import AnalysisConfig, HighPass, analyze
from convfusion.analysis.page import write_report
from convfusion.analysis.study import find_padding
from convfusion.analysis.text_share import measure_text_share, summarise_text
from convfusion.mixers.tokens import Heads, JointTokens

SETTINGS = AnalysisConfig(steps=2, guidance=2.0, size=(16, 16), filters=(HighPass(0.5, 1),))


@pytest.fixture(scope="module")
def analysis():
    return analyze(stable_diffusion_3(), ["red", "red green apple"], SETTINGS)


def test_shares_are_those_of_the_whole_softmax():
    seen = torch.tensor([[True, True, True, False, True], [True] * 5])
    padding = torch.tensor([[False, True, False, True, True], [False, False, False, False, True]])
    tokens, queries = make_tokens((3, 4), seen=seen), torch.tensor([0, 5, 11])
    keys = torch.cat([tokens.image.key, tokens.text.key], 2)
    scores = tokens.image.query[:, :, queries] @ keys.transpose(2, 3) / 2
    scores[..., 12:] += tokens.bias
    of_text = scores.softmax(-1)[..., 12:]
    for chunk in (1, 2, 100):
        sums = measure_text_share(tokens, queries, chunk, padding)
        found = summarise_text({999: sums}, 12)
        assert found.share == pytest.approx(of_text.sum(-1).mean().item(), rel=1e-5)
        own = (of_text * padding[:, None, None]).sum(-1).mean().item()
        assert found.padding == pytest.approx(own, rel=1e-5)
        assert found.heads == pytest.approx(of_text.sum(-1).mean((0, 2)).tolist(), rel=1e-5)
        assert found.timesteps == {999: pytest.approx(found.share)}
        assert found.words == 4.5
        assert found.uniform_share == pytest.approx(4.5 / 16.5)
    assert summarise_text({1: measure_text_share(tokens, queries, 9)}, 12).padding is None


def test_a_text_that_nothing_tells_from_the_image_gets_its_share():
    same = Heads(*torch.zeros(3, 1, 2, 8, 4))
    tokens = JointTokens(same, Heads(*torch.zeros(3, 1, 2, 2, 4)))
    found = summarise_text({1: measure_text_share(tokens, torch.arange(8), 4)}, 8)
    assert found.share == pytest.approx(found.uniform_share) == pytest.approx(0.2)


def test_every_shared_site_has_its_shares(analysis):
    by_path = {site.path: site for site in analysis.sites}
    assert by_path["transformer_blocks.0.attn2"].text is None
    words = find_padding(stable_diffusion_3(), ["red"])[0].shape[1]
    for name in ("transformer_blocks.0.attn", "transformer_blocks.1.attn"):
        text = by_path[name].text
        assert text.words == words
        assert 0 < text.padding < text.share < 1
        assert set(text.timesteps) == set(analysis.timesteps)


def test_padding_is_what_no_word_of_a_prompt_is():
    told, empty = find_padding(stable_diffusion_3(), ["red green apple"])
    assert told.shape == empty.shape
    assert (~told).sum() == (~empty).sum() + 3  # both have a beginning and an end
    assert told[:, -256:].all()  # there is no T5


def test_the_report_tells_them(analysis, tmp_path):
    write_report(analysis, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Image and text" in page
    said = json.loads((tmp_path / "analysis.json").read_text())
    assert said["sites"][0]["text"]["share"] > 0
