"""What goes into a distillation: losses, latents, captions and batches."""

import pytest
import torch
from PIL import Image
from tiny_pipelines import PIPELINES, block_weights, stable_diffusion

import convfusion
from convfusion import ConvFusionError
from convfusion.data import LatentDataset, build_cache, hold_out, prepare_data
from convfusion.distill import DistillConfig, distill
from convfusion.distill.batches import BatchIndices
from convfusion.distill.losses import feature_losses, min_snr_weight, weighted_mse
from convfusion.families import encode_conditioning
from convfusion.families.dit import DIT
from convfusion.surgery import presets

pytestmark = pytest.mark.libraries


def test_losses_equal_their_formulas():
    schedule = torch.linspace(0.999, 0.01, 1000)
    steps = torch.tensor([0, 500, 999])
    snr = schedule[steps] / (1 - schedule[steps])
    expected = torch.minimum(snr, torch.tensor(5.0)) / snr
    torch.testing.assert_close(min_snr_weight(schedule, steps, 5.0), expected)
    one, other = torch.randn(2, 3, 4, 5, 5).unbind()
    by_hand = sum(w * (a - b).pow(2).mean() for w, a, b in zip(expected, one, other, strict=True))
    torch.testing.assert_close(weighted_mse(one, other, expected), by_hand / 3)
    features = feature_losses({"a": one, "b": other}, {"a": other, "b": other + 1})
    torch.testing.assert_close(features["a"], (one - other).pow(2).mean())
    torch.testing.assert_close(features["b"], torch.tensor(1.0))


def test_batches_depend_on_seed_and_step_alone():
    batches = BatchIndices([range(10)], 5, seed=0)
    straight = [batches[step] for step in range(8)]
    assert [BatchIndices([range(10)], 5, seed=0)[step] for step in (7, 0, 3)] == [
        straight[step] for step in (7, 0, 3)
    ]
    for epoch in range(4):
        drawn = straight[2 * epoch] + straight[2 * epoch + 1]
        assert sorted(drawn) == [*range(10)]
    other = BatchIndices([range(10)], 5, seed=1)
    assert [other[step] for step in range(8)] != straight


def test_a_batch_comes_from_one_group():
    groups = [[0, 2, 4, 6, 8], [1, 3], []]
    batches = BatchIndices(groups, 4, seed=0)
    assert batches.per_epoch == 3
    epoch = [batches[step] for step in range(3)]
    assert {i for batch in epoch for i in batch} == {0, 1, 2, 3, 4, 6, 8}
    for batch in epoch:
        assert len(batch) == 4 and len({i % 2 for i in batch}) == 1


def test_a_dropped_caption_is_what_sdxl_sees_without_a_negative_prompt():
    pipe = PIPELINES["sdxl"]()
    found = encode_conditioning(pipe, ["red", ""], (32, 32))
    embeds, negative, pooled, negative_pooled = pipe.encode_prompt("red", device="cpu")
    torch.testing.assert_close(
        found["encoder_hidden_states"], torch.cat([embeds, negative]), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        found["added_cond_kwargs"]["text_embeds"],
        torch.cat([pooled, negative_pooled]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_class_labels_are_checked():
    pipe = PIPELINES["dit"]()
    assert DIT.call_prompts(pipe, ["green", "7", ""]) == [1, 7, 10]
    for wrong in ("blue", "11", "²"):
        with pytest.raises(ConvFusionError, match="no class of this model"):
            DIT.call_prompts(pipe, [wrong])


def test_equal_pictures_are_not_on_both_sides_of_a_split():
    pictures = torch.randn(6, 4, 8, 8)
    latents = torch.cat([pictures, pictures[:4] * (1 + 1e-5)])  # as another batch rounds them
    data = prepare_data(PIPELINES["sd"](), LatentDataset(latents, list("abcdefghij")))
    for seed in range(5):
        train, apart = hold_out(data, 3, seed)
        assert len(apart.captions) == 3
        sides = [{"abcdefabcd"["abcdefghij".index(c)] for c in p.captions} for p in (train, apart)]
        assert not sides[0] & sides[1]
        assert sides[0] | sides[1] == set("abcdef")  # nothing else is lost
    same = prepare_data(
        PIPELINES["sd"](), LatentDataset(pictures[:1].repeat(3, 1, 1, 1), ["a"] * 3)
    )
    with pytest.raises(ConvFusionError, match="all others have the same pictures"):
        hold_out(same, 1, seed=0)


STEP = DistillConfig(steps=1, batch_size=2, tracker="none")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("red", "green"):
        Image.new("RGB", (20, 16), name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} apple")
    return folder


def test_a_folder_of_pictures_is_all_that_a_pipeline_needs(pictures, tmp_path, capsys):
    """It is encoded and the pipeline converted, as the command does; then the cache will do."""
    pipe = stable_diffusion()
    preset = presets.choose_preset(pipe.unet)
    distill(pipe, str(pictures), STEP, tmp_path / "out")
    assert f"it is now, by the preset '{preset}'" in capsys.readouterr().err
    assert convfusion.status(pipe).record.steps == 1
    learnt = block_weights(pipe)
    twin = stable_diffusion()
    distill(twin, tmp_path / "out" / "cache", STEP, progress=False)
    assert capsys.readouterr().err == ""
    assert all(torch.equal(learnt[name], now) for name, now in block_weights(twin).items())
    again = stable_diffusion()  # resumed, it is converted as its checkpoint
    data = tmp_path / "out" / "cache"
    assert distill(again, data, STEP, tmp_path / "out", resume=True, progress=False).steps == 1
    assert all(torch.equal(learnt[name], now) for name, now in block_weights(again).items())


def test_a_source_needs_a_folder_to_be_encoded_into(pictures):
    pipe = stable_diffusion()
    with pytest.raises(ConvFusionError, match="needs a folder: pass `out`, or a cache"):
        distill(pipe, pictures, STEP)
    with pytest.raises(ConvFusionError, match="missing does not exist"):
        distill(pipe, pictures / "missing", STEP)
    assert convfusion.status(pipe).converted == 0


def test_several_processes_want_a_cache(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConvFusionError, match="build a cache first"):
        distill(stable_diffusion(), pictures, STEP, tmp_path / "out")


def test_a_cache_is_built_from_a_path(pictures, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\n")
    pipe = stable_diffusion()
    assert len(build_cache(pipe, pictures, tmp_path / "a")) == 2
    assert build_cache(pipe, str(prompts), tmp_path / "b").captions == ["red apple"]
