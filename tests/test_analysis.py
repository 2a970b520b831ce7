"""Watching a pipeline draw, restricting its attention, and what is made of it."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from tiny_models import sd15
from tiny_pipelines import PIPELINES, stable_diffusion

import convfusion
from convfusion import ConvertConfig, ConvFusionError, DeltaConv
from convfusion.analysis import (
    Analysis,
    AnalysisConfig,
    HighPass,
    Measure,
    ablate,
    analyze,
    attention_capture,
    build_untrained,
    list_variants,
    recommend,
)
from convfusion.analysis.capture import sampling_timesteps
from convfusion.analysis.kernel_sizes import kernel_for
from convfusion.analysis.page import write_report
from convfusion.analysis.streaming import measure_attention, summarise
from convfusion.analysis.verdict import check_claims, give_verdict
from convfusion.families import denoiser_of, list_sites, site_grid
from convfusion.generate import generate, swapped_denoiser
from convfusion.mixers import Neighbourhood
from convfusion.surgery import status

pytestmark = pytest.mark.libraries

PROMPTS = ["red", "green"]
QUICK = AnalysisConfig(steps=3, guidance=2.0, filters=(HighPass(0.5, 1),))
every_pipeline = pytest.mark.parametrize("kind", PIPELINES)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyze(stable_diffusion(), ["red apple", "green"], QUICK)


MIXED = {"mixed": ConvertConfig({"mid_block.*": Neighbourhood(7), "*": Neighbourhood(3)})}


def guidance_for(kind: str) -> float:
    """None in DiT: stock pipelines take class 1000 for no class, which the tiny one lacks."""
    return 1.0 if kind == "dit" else 2.0


@every_pipeline
def test_pictures_are_bit_equal_with_and_without_capture(kind):
    pipe = PIPELINES[kind]()
    hooks = sum(len(m._forward_pre_hooks) for m in denoiser_of(pipe).modules())
    before = generate(pipe, PROMPTS, steps=3, guidance=guidance_for(kind))
    found = analyze(pipe, PROMPTS, replace(QUICK, guidance=guidance_for(kind)))
    with attention_capture(pipe, sampling_timesteps(pipe, 3), Measure()) as seen:
        during = generate(pipe, PROMPTS, steps=3, guidance=guidance_for(kind))
    assert all(np.array_equal(a, b) for a, b in zip(before, during, strict=True))
    assert sum(len(m._forward_pre_hooks) for m in denoiser_of(pipe).modules()) == hooks
    sites = list_sites(denoiser_of(pipe))
    assert [site.path for site in found.sites] == [site.path for site in sites]
    assert all(len(site.heads) == s.heads for site, s in zip(found.sites, sites, strict=True))
    each = 3 * 2 * (1 if kind == "dit" else 2)  # timesteps, pictures, halves of guidance
    assert all(captured.maps == each for captured in seen.values())


@every_pipeline
def test_captured_maps_are_the_attention_that_the_model_computes(kind):
    """Against the probabilities that diffusers' own attention computes, in the first block."""
    pipe = PIPELINES[kind]()
    model = denoiser_of(pipe)
    site = list_sites(model)[0]
    attention = model.get_submodule(site.path)
    taken = []

    def keep(module, args, kwargs):
        tokens = args[0] if args else kwargs["hidden_states"]
        query = module.head_to_batch_dim(module.to_q(tokens))
        key = module.head_to_batch_dim(module.to_k(tokens))
        scores = module.get_attention_scores(query, key)
        taken.append(scores.unflatten(0, (-1, module.heads)).mean(dim=(0, 1)))

    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    timesteps = sampling_timesteps(pipe, 3)
    with attention_capture(pipe, timesteps, Measure()) as seen:
        generate(pipe, PROMPTS, steps=3, guidance=guidance_for(kind))
    handle.remove()
    found = seen[site.path]
    assert torch.allclose(found.mean_map / found.maps, torch.stack(taken).mean(0), atol=1e-6)


@pytest.mark.parametrize(("size", "grids"), [((24, 40), 2), ((8, 40), 2), ((8, 8), 2)])
def test_grids_follow_the_size(size, grids, tmp_path):
    """Down to 2×2 tokens; whatever is measured can be written."""
    pipe = stable_diffusion()
    found = analyze(pipe, ["red"], replace(QUICK, size=size))
    for site, told in zip(found.sites, list_sites(pipe.unet), strict=True):
        assert site.grid == site_grid(pipe.unet, told, (size[0] // 2, size[1] // 2))
        assert len(site.shown[0]) == site.grid[0] and len(site.shown[0][0]) == site.grid[1]
    assert len({site.grid for site in found.sites}) == grids
    write_report(found, tmp_path)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 3), (136, 144)])
def test_statistics_exist_on_any_grid(grid):
    tokens = grid[0] * grid[1]
    query, key = torch.randn(2, 2, tokens, 4)
    for found in summarise(measure_attention(query, key, 1.0, grid, Measure(queries=16))):
        numbers = [found.entropy, found.bias_share, found.bias_share_low, found.high_share]
        assert np.isfinite([*numbers, *found.score_mass, found.sink_mass]).all()


def test_autocast_around_an_analysis_changes_nothing():
    query, key = torch.randn(2, 2, 64, 4)
    plain = summarise(measure_attention(query, key, 1.0, (8, 8), Measure()))
    with torch.autocast("cpu", torch.bfloat16):
        assert summarise(measure_attention(query, key, 1.0, (8, 8), Measure())) == plain


@pytest.mark.parametrize(
    "scheduler", [PNDMScheduler, HeunDiscreteScheduler, EulerDiscreteScheduler]
)
def test_schedulers_that_repeat_or_split_timesteps(scheduler):
    pipe = stable_diffusion()
    options = {
        PNDMScheduler: {"skip_prk_steps": True},  # as Stable Diffusion has it
        EulerDiscreteScheduler: {"timestep_type": "continuous"},
    }.get(scheduler, {})
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    calls = []
    found = analyze(pipe, ["red"], QUICK, on_call=lambda: calls.append(1) or True)
    visited = sampling_timesteps(pipe, 3)
    assert len(calls) == len(visited)
    assert set(found.timesteps) <= set(visited)
    assert [*found.sites[0].timesteps] == found.timesteps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    pipe = stable_diffusion().to(dtype)
    found = analyze(pipe, ["red"], QUICK)
    assert all(np.isfinite(site.mean.score_mass).all() for site in found.sites)
    assert ablate(pipe, ["red"], list_variants([3]), steps=2)["removed"].epsilon_error > 0


def test_what_an_analysis_says(analysis):
    for site in analysis.sites:
        sides = len(site.uniform_score_mass)
        assert site.uniform_score_mass[-1] == pytest.approx(1)
        for found in (site.mean, site.single, *site.heads, *site.timesteps.values()):
            assert len(found.score_mass) == sides == max(site.grid)
            assert found.score_mass == sorted(found.score_mass)
            assert 0 <= found.entropy <= 1
        assert site.uniform_receptive_field <= 2 * sides - 1
        assert list(site.timesteps) == analysis.timesteps
        assert [f["cutoff"] for f in site.filters] == [0.5]
    assert len(check_claims(analysis)) == 5


def test_queries_are_sampled_by_seed_and_hold_the_shown_ones():
    config = Measure(queries=20)
    chosen = config.chosen_queries((40, 30))
    assert len(chosen) == 20 and torch.equal(chosen, config.chosen_queries((40, 30)))
    assert not torch.equal(chosen, replace(config, seed=1).chosen_queries((40, 30)))
    assert {20 * 30 + 15, 39 * 30 + 29} <= set(chosen.tolist())
    assert Measure(queries=20).chosen_queries((4, 5)).tolist() == list(range(20))


def test_sampled_queries_estimate_what_all_of_them_say():
    """Within the scatter that 64 of 1024 queries have."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 1024, 4, generator=generator) for _ in range(2))
    few, every = (
        summarise(measure_attention(query, key, 1.0, (32, 32), Measure(queries=n)))[-1]
        for n in (64, 1024)
    )
    assert few.entropy == pytest.approx(every.entropy, abs=0.02)
    assert few.score_mass == pytest.approx(every.score_mass, abs=0.03)
    assert few.bias_share == pytest.approx(every.bias_share, abs=0.05)


def test_memory_stays_within_its_bound_at_16384_tokens():
    """In a fresh process: the high-water mark of resident memory, above what was there before."""
    code = """
import os, resource, torch
from convfusion.analysis.streaming import Measure, measure_attention
torch.set_num_threads(1)
def peak():  # MiB, of this process alone
    if os.path.exists("/proc/self/status"):  # on Linux ru_maxrss starts at the parent's peak
        lines = open("/proc/self/status").read().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
query, key = (torch.randn(2, 16384, 8) for _ in range(2))
measure_attention(query[:, :64], key[:, :64], 1.0, (8, 8), Measure())  # loads what loads late
before = peak()
measure_attention(query, key, 1.0, (128, 128), Measure(queries=64, memory=48))
print(peak() - before)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown = float(ran.stdout)
    one_map = 16384**2 * 4 / 2**20  # MiB of a whole N×N map of one head
    assert grown < 48 + 12 < one_map  # 12: the keys in float32, column sums, fragments


def test_the_report(analysis, tmp_path):
    pipe = stable_diffusion()
    with swapped_denoiser(pipe, build_untrained(pipe)):
        control = analyze(pipe, ["red apple"], QUICK)
    write_report(analysis, tmp_path / "report", control)
    names = {path.name for path in (tmp_path / "report").iterdir()}
    figures = ("receptive_fields", "score_mass", "slopes", "decay", "timesteps", "mean_maps")
    assert names >= {"analysis.json", "control.json", "kernels.json", "report.html"}
    assert names >= {f"{figure}.png" for figure in figures}
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(figures)
    assert "http://" not in page and "https://" not in page and "untrained" in page
    values = json.loads((tmp_path / "report" / "analysis.json").read_text())
    assert values["schema"] == "convfusion-analysis-1"
    assert [s["path"] for s in values["sites"]] == [s.path for s in analysis.sites]


def test_recommended_kernels_convert_the_model(analysis, tmp_path):
    recommend(analysis).save(tmp_path / "kernels.json")
    pipe = stable_diffusion()
    convfusion.convert(pipe, ConvertConfig.load(tmp_path / "kernels.json"))
    chosen = {row.site.path: row.mixer for row in status(pipe).sites}
    for site in analysis.sites:
        expected = kernel_for(site.mean.receptive_field or 1, site.grid)
        assert (chosen[site.path].kernel_size, chosen[site.path].stages) == expected
    generate(pipe, ["red"], steps=1)


@pytest.mark.parametrize(
    ("field", "grid", "expected"),
    [
        (1, (64, 64), (3, 1)),  # nothing to reach for
        (5, (64, 64), (3, 2)),
        (15, (64, 64), (9, 2)),  # the paper's proportion: 60 %, and twice that at half scale
        (21, (64, 64), (13, 2)),
        (61, (64, 64), (13, 4)),  # another stage rather than a larger kernel
        (7, (4, 4), (5, 2)),
        (3, (2, 2), (3, 1)),
        (1, (1, 1), (1, 1)),
    ],
)
def test_the_rule_of_kernels(field, grid, expected):
    assert kernel_for(field, grid) == expected


def test_artefacts_take_the_median_field_of_their_grid(analysis):
    same = [site for site in analysis.sites if site.grid == (8, 8)]
    fields = (99, 3, 7)
    chosen = [
        replace(site, artefact=field == 99, mean=replace(site.mean, receptive_field=field))
        for site, field in zip(same, fields, strict=True)
    ]
    other = replace(analysis.sites[-1], grid=(4, 4), mean=replace(same[0].mean, receptive_field=7))
    config = recommend(replace(analysis, sites=[*chosen, other]))
    kernel, stages = kernel_for(5, (8, 8))
    assert config.sites[chosen[0].path] == DeltaConv(kernel_size=kernel, stages=stages)


def test_claims_leave_out_what_contradicts_them(analysis):
    first = analysis.sites[0]
    uniform = replace(first, mean=replace(first.mean, receptive_field=None, decay=None))
    found = dict(check_claims(replace(analysis, sites=[uniform])))
    assert [*found.values()][:3] == ["0 of 1", "0 of 0", "0 of 0"]
    flagged = replace(first, artefact=True)
    assert [*dict(check_claims(replace(analysis, sites=[flagged]))).values()][-1] == "1"


def test_the_verdict_names_what_to_convert_and_what_to_keep(analysis):
    first, second, third, *_ = (analysis.sites * 3)[:3]
    local, wide, sunk = (
        replace(
            site,
            path=path,
            grid=(32, 32),
            uniform_receptive_field=29,
            mean=replace(site.mean, receptive_field=field),
            artefact=artefact,
        )
        for site, path, field, artefact in (
            (first, "near", 5, False),
            (second, "far", 27, False),
            (third, "sunk", 5, True),
        )
    )
    verdict = give_verdict(replace(analysis, sites=[local, wide, sunk]))
    assert verdict.startswith("1 of 3 self-attention layers is local")
    assert "convert layer “near” first, with kernels of 3×3 " in verdict
    assert "convert layer “far” last, or keep its attention" in verdict
    assert "Of layer “sunk” this says nothing" in verdict
    assert "recommend no layer" in give_verdict(replace(analysis, sites=[wide]))
    everywhere = replace(wide, path="even", mean=replace(wide.mean, receptive_field=None))
    assert "Layer “even” attends evenly" in give_verdict(replace(analysis, sites=[everywhere]))
    control = replace(analysis, sites=[wide])
    beside = give_verdict(replace(analysis, sites=[local]), control)
    assert "Of the untrained model of the same shape 0 are." in beside
    assert "keep" not in beside


def test_the_untrained_control_is_reproducible_and_another_model():
    pipe = stable_diffusion()
    state = torch.random.get_rng_state()
    one, other = build_untrained(pipe), build_untrained(pipe)
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [m.state_dict()["conv_in.weight"] for m in (one, other, pipe.unet)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@every_pipeline
def test_ablation_leaves_the_pipeline_as_it_was(kind):
    pipe = PIPELINES[kind]()
    before = generate(pipe, ["red"], steps=2, guidance=guidance_for(kind))
    tried = {name: replace(c, keep_attention=False) for name, c in list_variants([3]).items()}
    found = ablate(pipe, ["red"], tried, steps=2, guidance=guidance_for(kind))
    assert list(found) == ["self-attention", "window 3", "mean token only", "removed"]
    stock = found["self-attention"].images
    assert np.array_equal(before[0], stock[0])
    assert found["self-attention"].epsilon_error == 0
    assert all(found[name].epsilon_error > 0 for name in tried)
    assert all(list(found[name].by_timestep) == [*found["removed"].by_timestep] for name in tried)
    assert found["self-attention"].psnr is None and np.isfinite(found["removed"].psnr)
    assert status(pipe).converted == 0
    after = generate(pipe, ["red"], steps=2, guidance=guidance_for(kind))
    assert np.array_equal(before[0], after[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: analyze(pipe, []), "no prompts"),
        (lambda pipe: analyze(pipe, ["red"], replace(QUICK, timesteps=(5,))), "5 is not among"),
        (lambda pipe: analyze(pipe, ["red"], replace(QUICK, timesteps=())), "no timestep"),
        (lambda pipe: analyze(pipe.vae, ["red"], QUICK), "AutoencoderKL is not supported"),
        (lambda pipe: ablate(pipe, [], list_variants([3])), "no prompts"),
        (lambda pipe: ablate(pipe, ["red"], list_variants([9])), "larger than every grid"),
        (lambda pipe: ablate(pipe, ["red"], list_variants([4])), "window must be odd"),
        (lambda pipe: analyze(pipe, "red"), "must be a list of strings"),
        (lambda pipe: analyze(pipe, [207]), "must be a list of strings"),
        (lambda pipe: analyze(pipe, ["red"], replace(QUICK, steps=0)), "0 sampling steps"),
        (lambda pipe: ablate(pipe, ["red"], MIXED), "window of 7 is larger"),
        (
            lambda pipe: ablate(pipe, ["red"], list_variants([3], sites=["x"])),
            "matches no self-att",
        ),
        (lambda pipe: Measure(queries=1), "at least 8 queries"),
        (lambda pipe: AnalysisConfig(share=0), "share must lie"),
    ],
)
def test_mistakes(call, message):
    pipe = stable_diffusion()
    with pytest.raises(ConvFusionError, match=message):
        call(pipe)
    assert status(pipe).converted == 0


def test_a_converted_model_is_not_analysed():
    pipe = stable_diffusion()
    convfusion.convert(pipe, convfusion.uniform(DeltaConv(3)))
    for call in (lambda: analyze(pipe, ["red"], QUICK), lambda: ablate(pipe, ["red"], {})):
        with pytest.raises(ConvFusionError, match="is converted: revert it"):
            call()


def test_a_map_with_nan_is_named_and_the_hooks_are_gone():
    pipe = stable_diffusion()
    site = list_sites(pipe.unet)[1]
    with torch.no_grad():
        pipe.unet.get_submodule(site.path).to_q.weight[0, 0] = float("nan")
    with pytest.raises(ConvFusionError, match=rf"{site.path}, timestep \d+: .* not finite"):
        analyze(pipe, ["red"], QUICK)
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


def test_a_model_without_self_attention_is_an_error():
    from diffusers import UNet2DConditionModel

    plain = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = stable_diffusion()
    pipe.unet = plain
    with pytest.raises(ConvFusionError, match="no self-attention"):
        analyze(pipe, ["red"], QUICK)


def test_site_grids_of_a_large_layout():
    sites = {site.level: site_grid(sd15(), site, (64, 48)) for site in list_sites(sd15())}
    assert sites == {0: (64, 48), 1: (32, 24), 2: (16, 12), 3: (8, 6)}


def test_ablation_stops_before_drawing_where_it_cannot_measure():
    pipe = stable_diffusion()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ConvFusionError, match="EDMEulerScheduler with prediction type"):
        ablate(pipe, ["red"], list_variants([3]), on_call=lambda: pytest.fail("it drew"))


def test_an_error_inside_a_variant_leaves_the_pipeline_as_it_was():
    pipe = stable_diffusion()
    calls = []

    def stop():
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(pipe, ["red"], list_variants([3]), steps=2, on_call=stop)
    assert status(pipe).converted == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())
