"""What the latency benchmark times is what it says; no test here depends on a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny_models import CASES, first_output, run

from convfusion.bench import latency
from convfusion.bench.latency import Variant, replaced_sites, site_kinds, time_denoiser, time_site
from convfusion.bench.timing import measure_peak, time_interleaved
from convfusion.families import example_inputs, list_sites
from convfusion.mixers import MIXERS
from convfusion.shapes import shape_of_site
from convfusion.surgery import build_mixers, mixers_of, presets
from convfusion.surgery.config import uniform


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def test_inputs_suit_every_family(case):
    model = case.model()
    with torch.no_grad():
        output = first_output(model(**example_inputs(model, (16, 16), batch=2)))
    assert output.shape[0] == 2 and output.isfinite().all()


def test_kinds_hold_every_site_once(case):
    with torch.device("meta"):
        model = case.make()
    kinds = site_kinds(model, presets.get_preset(case.preset))
    paths = [path for kind in kinds for path in kind.paths]
    assert sorted(paths) == sorted(site.path for site in list_sites(model))
    costs = {(*shape_of_site(model, k.site), k.kernel_size) for k in kinds}
    assert len(costs) == len(kinds)


def test_mixers_stand_for_a_while(case):
    model = case.model()
    before = run(model, case, 16, 16)
    mixers = build_mixers(model, list_sites(model), presets.get_preset(case.preset))
    with replaced_sites(model, mixers):
        assert mixers_of(model).keys() == mixers.keys()
        assert not torch.equal(run(model, case, 16, 16), before)
    assert not mixers_of(model)
    assert torch.equal(run(model, case, 16, 16), before)


@pytest.mark.parametrize("backward", [False, True])
def test_a_denoiser_comes_back_as_it_was(case, backward):
    model = case.model()
    before = run(model, case, 16, 16)
    variants = {"attention": Variant(), "blocks": Variant(presets.get_preset(case.preset))}
    found = time_denoiser(model, variants, (8, 8), batch=1, rounds=1, backward=backward)
    assert [len(found[name].timing.seconds) for name in variants] == [1, 1]
    assert torch.equal(run(model, case, 16, 16), before)


def test_a_site_is_timed_only_with_parity(monkeypatch):
    case = CASES[0]
    with torch.device("meta"):
        model = case.make()
    config = presets.get_preset(case.preset)
    site = site_kinds(model, config)[0].site
    variants = {"attention": Variant(), "block": Variant(config)}
    found = time_site(model, site, variants, (6, 5), rounds=3)
    assert all(len(each.timing.seconds) == 3 and each.parity < 1e-4 for each in found.values())
    built = latency.site_module

    def broken(model, site, config, seed):
        module = built(model, site, config, seed)
        if config is not None:
            module.register_forward_hook(lambda own, args, out: out + (out.dtype == torch.float32))
        return module

    monkeypatch.setattr(latency, "site_module", broken)
    found = time_site(model, site, variants, (6, 5), rounds=3)
    assert found["attention"].timing and not found["block"].timing
    assert "off by" in found["block"].note


def test_every_mixer_can_be_timed_with_its_gradients():
    with torch.device("meta"):
        model = CASES[0].make()
    site = list_sites(model)[0]
    variants = {
        name: Variant(uniform(kind())) for name, kind in MIXERS.items() if name != "removed"
    }
    found = time_site(model, site, variants, (8, 6), rounds=1, backward=True)
    assert all(each.timing is not None for each in found.values()), found


def test_a_compiled_block_is_timed(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiled(f, backend="eager", **kw))
    with torch.device("meta"):
        model = CASES[0].make()
    config = presets.get_preset("sd15")
    variants = {"compiled": Variant(config, compiled=True)}
    found = time_site(model, list_sites(model)[0], variants, (5, 6), rounds=1)
    assert found["compiled"].timing is not None and found["compiled"].parity < 1e-4


def test_a_site_of_a_video_is_timed_on_its_three_axes():
    """Also where norms of queries and keys come without weights from the meta device."""
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, num_layers=1)
    config, site = presets.get_preset("wan", model), list_sites(model)[0]
    grid = (3, 20, 30)  # more than parity is tried on
    found = time_site(model, site, {"attention": Variant(), "block": Variant(config)}, grid)
    assert all(each.timing is not None and each.parity < 1e-4 for each in found.values()), found


def test_calls_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = time_interleaved(calls, torch.device("cpu"), rounds=3)
    assert order == list("ab" + "ab" * 3)
    order.clear()
    cold = time_interleaved(calls, torch.device("cpu"), rounds=2, warm_up=False)
    assert order == list("abab")
    assert all(len(each.seconds) == 2 for each in cold.values())
    assert all(len(each.seconds) == 3 for each in found.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_peak_memory_is_that_of_the_call():
    def call():
        torch.ones(64, 2**18).add(1)  # 64 MiB and as much again

    peak = measure_peak(call, torch.device("cpu"))
    assert 120 * 2**20 < peak < 160 * 2**20
    assert measure_peak(lambda: None, torch.device("cpu")) < 8 * 2**20
