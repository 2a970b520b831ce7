"""A part of the sites: which ones, what each costs, and the curve over their number."""

import copy
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import randomise
from tiny_pipelines import PIPELINES, pixart_sigma, stable_diffusion

import convfusion
from convfusion import ConvertConfig, ConvFusionError, DeltaConv, MeanOnly, surgery, uniform
from convfusion.cli.curve import print_curve
from convfusion.data import LatentDataset
from convfusion.data.latents import hold_out, prepare_data
from convfusion.distill import DistillConfig, DistillTask
from convfusion.distill.curve import chosen_counts, replacement_curve
from convfusion.distill.partial import imitation_errors, site_costs, spearman, subset_errors
from convfusion.distill.validation import held_out_error, noised
from convfusion.families import denoiser_of, list_sites, shorten_path
from convfusion.mixers import Neighbourhood
from convfusion.surgery import attention_back, install, mixers_of, select_every, select_sites
from convfusion.surgery.config import with_kernel_sizes

both = pytest.mark.parametrize("make", [stable_diffusion, pixart_sigma])
TRAINING = DistillConfig(
    steps=2, start="converted", batch_size=2, warmup=0, learning_rate=1e-2, decay=0.0, seed=3
)


def dataset(pipe, samples=6, seed=5):
    side = denoiser_of(pipe).config.sample_size
    generator = torch.Generator().manual_seed(seed)
    captions = [("red apple", "green apple")[i % 2] for i in range(samples)]
    return LatentDataset(torch.randn(samples, 4, side, side, generator=generator), captions)


def paths_of(pipe):
    return [site.path for site in list_sites(denoiser_of(pipe))]


def converted(make, config=None, spread=0.3):
    """A pipeline whose blocks are far from their attention, and each in its own way."""
    pipe = make()
    convfusion.convert(pipe, config or with_kernel_sizes(3))
    randomise(mixers_of(pipe), spread)
    return pipe


def prediction(model, pipe, data):
    conditioning = prepare_data(pipe, data).take(range(2), [False] * 2)[1]
    from convfusion.families.conditioning import place_conditioning

    told = place_conditioning(conditioning, model)
    with torch.no_grad():
        return model(data.latents[:2], timestep=torch.tensor([40, 700]), return_dict=False, **told)[
            0
        ]


def curve_of(make, training=TRAINING):
    pipe = converted(make, spread=0.1)
    train, apart = hold_out(prepare_data(pipe, dataset(pipe)), 2, seed=0)
    costs = site_costs(pipe, train, apart, training)
    return pipe, apart, costs, replacement_curve(pipe, apart, costs)


class TestSelection:
    config = ConvertConfig({"mid*": MeanOnly(), "up*": DeltaConv(5), "*": DeltaConv(3)}, seed=4)
    paths = ("down.0", "down.1", "mid.0", "up.0", "up.1", "up.2")

    def test_every_takes_every_nth_with_its_own_mixer(self):
        found = select_every(self.config, self.paths, 2)
        assert found.mixers_for(self.paths) == {
            "down.0": DeltaConv(3), "mid.0": MeanOnly(), "up.1": DeltaConv(5)
        }  # fmt: skip
        assert list(select_every(self.config, self.paths, 4, first=1).sites) == ["down.1", "up.2"]
        assert found.seed == 4
        assert select_every(self.config, self.paths, 1).mixers_for(
            self.paths
        ) == self.config.mixers_for(self.paths)

    def test_every_counts_only_sites_that_the_config_converts(self):
        config = ConvertConfig({"up*": DeltaConv(5)})
        assert list(select_every(config, self.paths, 2).sites) == ["up.0", "up.2"]

    def test_only_takes_exactly_these_sites(self):
        found = select_sites(self.config, ["up.1", "mid.0"])
        assert found.mixers_for(self.paths) == {"mid.0": MeanOnly(), "up.1": DeltaConv(5)}

    def test_a_path_is_no_pattern(self):
        config = select_sites(uniform(MeanOnly()), ["a[0]*"])
        assert config.mixers_for(["a0", "a[0]*", "a[0]b"]) == {"a[0]*": MeanOnly()}

    @pytest.mark.parametrize(
        "call",
        [
            lambda c, p: select_every(c, p, 0),
            lambda c, p: select_every(c, p, 2, first=6),
            lambda c, p: select_every(c, p, 2, first=-1),
            lambda c, p: select_sites(c, []),
            lambda c, p: select_sites(ConvertConfig({"up*": MeanOnly()}), ["mid.0"]),
        ],
    )
    def test_what_chooses_nothing_is_an_error(self, call):
        with pytest.raises(ConvFusionError):
            call(self.config, self.paths)


class TestSwapping:
    @pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
    def test_switching_off_equals_converting_the_others_alone(self, make):
        pipe = converted(make)
        data, model = replace(dataset(pipe), captions=["red"] * 6), denoiser_of(pipe)
        chosen = paths_of(pipe)[::2]
        blocks = {path: copy.deepcopy(mixers_of(pipe)[path]) for path in chosen}
        whole = prediction(model, pipe, data)
        with attention_back(pipe, set(paths_of(pipe)) - set(chosen)):
            assert list(mixers_of(pipe)) == chosen
            found = prediction(model, pipe, data)
        assert torch.equal(prediction(model, pipe, data), whole)
        assert not any(module._forward_pre_hooks for module in map(model.get_submodule, chosen))

        other = make()
        install(denoiser_of(other), blocks, keep_attention=True)
        assert torch.equal(found, prediction(denoiser_of(other), other, data))
        assert not torch.equal(found, whole)

    @both
    def test_all_off_is_the_teacher(self, make):
        pipe, stock = converted(make), make()
        data = dataset(pipe)
        with attention_back(pipe, paths_of(pipe)):
            found = prediction(denoiser_of(pipe), pipe, data)
        assert torch.equal(found, prediction(denoiser_of(stock), stock, data))

    def test_it_is_put_back_after_an_error(self):
        pipe = converted(stable_diffusion)
        with pytest.raises(ZeroDivisionError), attention_back(pipe, paths_of(pipe)):
            raise ZeroDivisionError
        assert list(mixers_of(pipe)) == paths_of(pipe)

    def test_mistakes(self):
        pipe = converted(stable_diffusion)
        with pytest.raises(ConvFusionError, match="nowhere"), attention_back(pipe, ["nowhere"]):
            pass
        surgery.drop_attention(pipe)
        with pytest.raises(ConvFusionError, match="dropped"), attention_back(pipe, paths_of(pipe)):
            pass


class TestCosts:
    @both
    def test_they_are_of_the_samples_held_out(self, make):
        pipe = converted(make)
        task = DistillTask(denoiser_of(pipe), pipe.scheduler)
        first, second = (prepare_data(pipe, dataset(pipe, seed=seed)) for seed in (5, 6))
        errors = imitation_errors(task, first, batch_size=4)
        assert errors == imitation_errors(task, first, batch_size=4)
        assert errors != imitation_errors(task, first, batch_size=4, seed=1)
        assert errors != imitation_errors(task, second, batch_size=4)
        assert errors == pytest.approx(imitation_errors(task, first, batch_size=1), rel=1e-4)

        taken = []
        kept, apart = hold_out(prepare_data(pipe, dataset(pipe)), 2, seed=0)
        take = kept.whole.take
        kept.whole.take = lambda rows, dropped: taken.append(set(rows)) or take(rows, dropped)
        site_costs(pipe, kept, apart, replace(TRAINING, start="attention"))
        judged, trained = set(apart.groups[0]), set(kept.groups[0])
        assert len(judged) == 2 and judged | trained == set(range(6)) and not judged & trained
        assert all(rows <= judged or rows <= trained for rows in taken)
        assert set().union(*taken) == set(range(6))

    def test_every_sample_and_timestep_has_noise_of_its_own(self):
        pipe = stable_diffusion()
        data = prepare_data(pipe, dataset(pipe))

        def rows(seed, batch_size):
            batches = noised(data, batch_size, seed)
            return [row for batch in batches for noise in batch.noises.values() for row in noise]

        every_row = [tuple(row.flatten().tolist()) for seed in (0, 1) for row in rows(seed, 6)]
        assert len(set(every_row)) == len(every_row) == 2 * 6 * 10
        assert set(every_row[:60]) == {tuple(row.flatten().tolist()) for row in rows(0, 4)}

    def test_they_repeat_by_seed(self):
        found = [curve_of(pixart_sigma)[2] for _ in range(2)]
        assert found[0] == found[1]
        assert found[0] != curve_of(pixart_sigma, replace(TRAINING, seed=4))[2]

    @both
    def test_the_imitation_error_is_what_it_says(self, make):
        pipe = converted(make)
        task = DistillTask(denoiser_of(pipe), pipe.scheduler)
        seen = []
        task.alone, alone = lambda *given: seen.append(alone(*given)) or seen[-1], task.alone
        errors = imitation_errors(task, prepare_data(pipe, dataset(pipe)), batch_size=4)
        for path, error in errors.items():
            learned, taught = (torch.cat([each[path][i] for each in seen]) for i in (0, 1))
            wanted = (learned - taught).square().mean() / taught.var(correction=0)
            assert error == pytest.approx(wanted.item(), rel=1e-4)

    @both
    def test_a_perfect_block_costs_nothing(self, make):
        paths = paths_of(make())
        perfect = paths[1]
        config = ConvertConfig({perfect: Neighbourhood(99), "*": DeltaConv(kernel_size=3)})
        pipe = make()
        convfusion.convert(pipe, config)
        task = DistillTask(denoiser_of(pipe), pipe.scheduler)
        data = prepare_data(pipe, dataset(pipe))
        errors = imitation_errors(task, data, batch_size=4)
        alone = subset_errors(task, data, [frozenset([path]) for path in paths], batch_size=4)
        assert errors.pop(perfect) < 1e-9 < 1e-6 < min(errors.values())
        alone = dict(zip(paths, alone, strict=True))
        assert alone.pop(perfect) < 1e-9 < min(alone.values())

    def test_training_is_of_stage_one_alone(self):
        pipe = converted(stable_diffusion)
        train, apart = hold_out(prepare_data(pipe, dataset(pipe)), 2, seed=0)
        terms = []
        site_costs(pipe, train, apart, TRAINING, on_step=lambda step, found: terms.append(found))
        assert [list(each) for each in terms] == [["imitation"]] * 2

    def test_ranks(self):
        assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
        assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
        assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(
            np.corrcoef([0, 1.5, 1.5, 3], [0, 2, 1, 3])[0, 1]
        )
        assert spearman([1, 1], [1, 2]) is None and spearman([1], [1]) is None


class TestCurve:
    @both
    def test_its_points(self, make):
        pipe, apart, costs, curve = curve_of(make)
        model, paths = denoiser_of(pipe), paths_of(pipe)
        task = DistillTask(model, pipe.scheduler)
        size, seed = costs.training.batch_size, costs.training.seed
        whole = held_out_error(task, apart, batch_size=size, seed=seed)
        flops = convfusion.operations.site_operations(model, curve.latents)
        total = sum(attention for attention, _ in flops.values())
        for points in curve.orders.values():
            assert points[-1].epsilon_error == whole
            assert sorted(point.site for point in points) == sorted(paths)
            saved = [flops[point.site][0] - flops[point.site][1] for point in points]
            assert [p.flops_gone for p in points] == pytest.approx(np.cumsum(saved) / total)
        by_path = {site.path: site for site in costs.sites}
        for name, key in (("by_imitation", "imitation_error"), ("by_epsilon", "epsilon_error")):
            points = getattr(curve, name)
            values = [getattr(by_path[point.site], key) for point in points]
            assert values == sorted(values)
            assert points[0].epsilon_error == by_path[points[0].site].epsilon_error
        assert [p.site for p in curve.dearest] == [p.site for p in curve.by_imitation][::-1]

    def test_a_point_is_a_model_with_these_sites_alone(self):
        pipe, apart, costs, curve = curve_of(pixart_sigma)
        first_two = costs.cheapest("imitation")[:2]
        blocks = {path: copy.deepcopy(mixers_of(pipe)[path]) for path in first_two}
        other = pixart_sigma()
        install(denoiser_of(other), blocks, keep_attention=True)
        task = DistillTask(denoiser_of(other), other.scheduler)
        training = costs.training
        found = held_out_error(task, apart, batch_size=training.batch_size, seed=training.seed)
        assert curve.by_imitation[1].epsilon_error == found

    @both
    def test_files(self, make, tmp_path):
        _, _, costs, curve = curve_of(make)
        files = curve.save(tmp_path, [1, 3])
        assert [file.name for file in files] == ["cheapest-01.json", "cheapest-03.json"]
        for file, k in zip(files, (1, 3), strict=True):
            status = convfusion.convert(make(), ConvertConfig.load(file))
            chosen = {row.site.path for row in status.sites if row.mixer is not None}
            assert chosen == set(costs.cheapest()[:k])
        assert json.loads((tmp_path / "curve.json").read_text()) == curve.to_dict()
        with open(tmp_path / "curve.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 3 * len(costs.sites)
        assert {row["order"] for row in rows} == set(curve.orders)
        assert (tmp_path / "curve.png").stat().st_size < 60_000
        (by_imitation,) = curve.save(tmp_path / "other", [1], by="imitation")
        assert list(ConvertConfig.load(by_imitation).sites) == costs.cheapest("imitation")[:1]

    @pytest.mark.parametrize("by", ["epsilon", "imitation"])
    def test_the_table_is_in_the_chosen_order(self, by, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "160")
        curve = curve_of(pixart_sigma)[3]
        print_curve(curve, by)
        lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("│")]
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
        own = curve.orders[f"by_{by}"]
        other = curve.orders["by_imitation" if by == "epsilon" else "by_epsilon"]
        assert [row[1] for row in cells] == [shorten_path(point.site) for point in own]
        for column, points in ((5, own), (6, other), (7, curve.dearest)):
            assert [row[column] for row in cells] == [f"{p.epsilon_error:.2e}" for p in points]
        alone = {site.path: f"{site.epsilon_error:.2e}" for site in curve.costs.sites}
        assert [row[3] for row in cells] == [alone[point.site] for point in own]

    def test_numbers_of_sites(self):
        assert chosen_counts(16, None) == [4, 8, 12]
        assert chosen_counts(1, None) == [1]
        assert chosen_counts(7, [5, 2, 2]) == [2, 5]
        with pytest.raises(ConvFusionError, match="8 sites"):
            chosen_counts(7, [3, 8])

    def test_mistakes(self):
        pipe = stable_diffusion()
        data = dataset(pipe)
        with pytest.raises(ConvFusionError, match="not converted"):
            site_costs(pipe, data, data, TRAINING)
        with pytest.raises(ConvFusionError, match="6 samples cannot be held out"):
            hold_out(prepare_data(pipe, data), 6, seed=0)
        _, apart, costs, _ = curve_of(pixart_sigma)
        convfusion.convert(pipe, with_kernel_sizes(3))
        with pytest.raises(ConvFusionError, match="not those of this model"):
            replacement_curve(pipe, apart, costs)
        with pytest.raises(ConvFusionError, match="imitation or epsilon"):
            costs.cheapest("size")
        surgery.drop_attention(pipe)
        with pytest.raises(ConvFusionError, match="dropped"):
            site_costs(pipe, data, data, TRAINING)
