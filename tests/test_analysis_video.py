"""What attention does in videos: frames beside rows and columns, and a tiny Wan from end to end."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from tiny_pipelines import ltx_video_8x, stable_diffusion, wan
from typer.testing import CliRunner

import convfusion
from convfusion import ConvertConfig, ConvFusionError
from convfusion.analysis import AnalysisConfig, HighPass, Measure, analyze, recommend
from convfusion.analysis.capture import call_timestep
from convfusion.analysis.page import write_report
from convfusion.analysis.places import corner_tokens
from convfusion.analysis.statistics import frame_distances, high_pass
from convfusion.analysis.streaming import measure_attention, measure_map, summarise
from convfusion.analysis.verdict import give_verdict
from convfusion.cli import app
from convfusion.cli.analyze import count_all_steps, counted_steps
from convfusion.surgery import status

pytestmark = pytest.mark.libraries

GRID = (3, 4, 5)
EVERY = Measure(queries=64)
CLIP = AnalysisConfig(steps=2, guidance=2.0, size=(32, 48), frames=9, filters=(HighPass(0.5, 1),))


@pytest.fixture(scope="module")
def analysis():
    return analyze(wan(), ["red", "green"], CLIP)


def places(grid):
    return list(itertools.product(*map(range, grid)))


def said(maps, grid=GRID):
    return summarise(measure_map(maps.float(), grid, EVERY))[0]


def test_sums_are_those_of_loops():
    maps = torch.rand(60, 60, dtype=torch.float64)
    maps /= maps.sum(1, keepdim=True)
    sums = measure_map(maps.float(), GRID, EVERY)
    expected, counts = torch.zeros(3, 5), torch.zeros(3, 5)
    for (i, a), (j, b) in itertools.product(enumerate(places(GRID)), repeat=2):
        frame, space = abs(a[0] - b[0]), max(abs(a[1] - b[1]), abs(a[2] - b[2]))
        expected[frame, space] += maps[i, j]
        counts[frame, space] += 1
    torch.testing.assert_close(sums.rings[0].float(), expected)
    assert torch.equal(sums.counts.float(), counts)
    found = summarise(sums)[0]
    assert found.frames.score_mass == pytest.approx((expected.sum(1).cumsum(0) / 60).tolist())
    assert found.score_mass == pytest.approx((expected.sum(0).cumsum(0) / 60).tolist())


def test_a_picture_is_a_video_of_one_frame():
    query, key = torch.randn(2, 2, 48, 4)
    flat = summarise(measure_attention(query, key, 1.0, (6, 8), EVERY))
    video = summarise(measure_attention(query, key, 1.0, (1, 6, 8), EVERY))
    for one, other in zip(flat, video, strict=True):
        assert other.frames.score_mass == [1.0] and other.frames.receptive_field == 1
        assert one.score_mass == pytest.approx(other.score_mass)
        assert one.high_share == pytest.approx(other.high_share)
        assert one.gathering == other.gathering and one.gathering.first_frame is None


def test_the_filter_takes_away_what_is_the_same_in_all_frames_and_places():
    waves = torch.cos(2 * torch.pi * torch.arange(8) / 8)  # one cycle
    response = HighPass(cutoff=1.0, order=2).response((8, 4, 4))
    over_time = waves[:, None, None].expand(8, 4, 4).flatten()[None]
    halved = high_pass(over_time + 3, (8, 4, 4), response)
    torch.testing.assert_close(halved, over_time / 2, rtol=1e-4, atol=1e-5)


def test_attention_in_the_own_frame_is_local_in_time_and_not_in_space():
    frame = frame_distances(torch.arange(60), GRID) == 0
    found = said(frame / frame.sum(1, keepdim=True))
    assert found.frames.score_mass == pytest.approx([1, 1, 1])
    assert found.frames.receptive_field == 1
    assert found.score_mass[0] == pytest.approx(1 / 20)
    assert found.gathering.first_frame == 0


def test_what_gathers_in_the_first_frame_in_corners_and_at_a_token_is_told():
    first = torch.zeros(60, 60)
    first[:, :20] = 1 / 20
    found = said(first).gathering
    assert found.first_frame == pytest.approx(3) and found.strongest == pytest.approx(3)
    corners = torch.zeros(60, 60)
    corners[:, corner_tokens(GRID)] = 1 / 12
    assert said(corners).gathering.corners == pytest.approx(60 / 12)
    assert corner_tokens(GRID).tolist()[:5] == [0, 4, 15, 19, 20]
    one = torch.full((60, 60), 0.4 / 59)
    one[:, 33] = 0.6
    sums = measure_map(one, GRID, EVERY)
    assert said(one).gathering.strongest == pytest.approx(0.6 * 60)
    assert sums.sinks[0].nonzero().flatten().tolist() == [33]


def test_an_analysis_of_a_wan_pipeline(analysis):
    assert [site.grid for site in analysis.sites] == [(3, 4, 6)] * 2
    for site in analysis.sites:
        assert len(site.heads) == 2
        assert len(site.shown[0]) == 3 and site.shown_at == [(1, 2, 3)]
        assert site.frames.within[-1][-1] == pytest.approx(1)
        assert [row[-1] for row in site.frames.within] == pytest.approx(site.mean.frames.score_mass)
        assert len(site.frames.profile) == len(site.frames.uniform_score_mass) == 3
        assert site.mean.gathering.first_frame == pytest.approx(1, abs=0.3)  # of random weights
    assert give_verdict(analysis)


def test_an_analysis_of_a_pipeline_whose_latents_come_packed():
    found = analyze(ltx_video_8x(), ["red"], replace(CLIP, size=(32, 64), frames=5))
    assert [site.grid for site in found.sites] == [(3, 4, 8)] * 2
    assert all(len(site.heads) == 2 and len(site.frames.profile) == 3 for site in found.sites)
    assert give_verdict(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timesteps_are_known_in_the_dtype_of_the_denoiser(dtype):
    """Cosmos and Kandinsky 5 are told 1.0955 as 1.09375 in bfloat16."""
    model, visited = wan().transformer, [1.0955, -1.5537, 997]
    for timestep in visited:
        told = {"timestep": torch.tensor([timestep], dtype=torch.float32).to(dtype)}
        assert call_timestep(model, (), told, visited) == timestep
        assert call_timestep(model, (), told, [0.5]) is None


def test_videos_are_the_same_with_and_without_being_watched():
    pipe = wan()

    def draw():
        made = pipe(
            ["red"],
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=2,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        return made.frames

    before = draw()
    analyze(pipe, ["red"], CLIP)
    assert torch.equal(draw(), before)
    assert not any(m._forward_pre_hooks for m in pipe.transformer.modules())


def test_the_report_shows_frames(analysis, tmp_path):
    write_report(analysis, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"strips.png", "frame_mass.png", "report.html", "kernels.json"}
    page = (tmp_path / "report.html").read_text()
    assert "In space and in time" in page and "Where attention gathers" in page
    site = json.loads((tmp_path / "analysis.json").read_text())["sites"][0]
    assert len(site["frames"]["within"]) == 3 and len(site["mean"]["frames"]["score_mass"]) == 3


def test_recommended_blocks_convert_the_model(analysis, tmp_path):
    first = analysis.sites[0]
    seen = replace(first.mean.gathering, first_frame=2.0)
    near = replace(first.mean.frames, receptive_field=1)
    sites = [
        replace(first, mean=replace(first.mean, gathering=seen)),
        replace(analysis.sites[1], mean=replace(first.mean, frames=near)),
    ]
    recommend(replace(analysis, sites=sites)).save(tmp_path / "kernels.json")
    pipe = wan()
    convfusion.convert(pipe, ConvertConfig.load(tmp_path / "kernels.json"))
    gathering, own = (row.mixer for row in status(pipe).sites)
    assert gathering.first_frame_branch and gathering.frame_kernel_size in (1, 3, 5)
    assert own.frame_kernel_size == 0 and not own.first_frame_branch


def test_pictures_have_no_frames():
    with pytest.raises(ConvFusionError, match="draws pictures, which have no frames"):
        analyze(stable_diffusion(), ["red"], replace(CLIP, size=None))


def test_progress_counts_steps_and_not_calls():
    """Wan calls its denoiser twice in a step, for guidance."""
    pipe, steps = wan(), []
    with counted_steps(pipe, lambda: steps.append(1)):
        analyze(pipe, ["red"], replace(CLIP, steps=2, size=(32, 48), frames=9))
    assert len(steps) == count_all_steps(pipe, 1, 2, 1) == 2


def test_commands_analyse_and_measure_a_video_model(tmp_path):
    """Analyse it, and start its blocks from clips that it draws."""
    model, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    wan().save_pretrained(model)
    prompts.write_text("red apple\n")
    drawn = ("--size", "48x32", "--frames", "9")
    report = tmp_path / "report"

    def run(*words):
        found = CliRunner().invoke(app, [str(word) for word in words])
        assert found.exit_code == 0, (found.output, found.exception)
        return found.output

    words = ("--prompts", prompts, "--steps", 2, "--out", report)
    said = run("analyze", model, *words, *drawn)
    assert "In time" in said
    assert (report / "strips.png").is_file()
    out = tmp_path / "converted"
    said = run("convert", model, "--mixer", "halo", "--measure", prompts, *drawn, "--out", out)
    assert "2 of 2 self-attention sites converted" in said and "window=(4, 8, 8)" in said
    assert "--frames 9 --size 48x32" in said.replace("\n", " ")  # of the command to type next
    wrong = CliRunner().invoke(
        app, ["convert", str(model), "--frames", "9", "--out", str(tmp_path / "x")]
    )
    assert "--frames goes with --measure, or with --budget and --size" in str(wrong.exception)
