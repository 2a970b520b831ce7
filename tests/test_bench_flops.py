"""Operations and memory against formulas worked out by hand, and the ratios of SD1.5."""

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pipelines import pixart_sigma
from torch import nn

import convfusion
from convfusion import ConvFusionError, DeltaConv, MeanOnly, Removed, mini
from convfusion.bench.counts import (
    SIZES,
    add_totals,
    compare_with_attention,
    denoiser_operations,
    list_contenders,
    operation_table,
    site_cost,
    write_costs,
)
from convfusion.bench.models import bench_model
from convfusion.mixers import (
    MIXERS,
    Circular,
    Depthwise,
    GeneralisedLinear,
    Halo,
    Neighbourhood,
    Pooled,
    Shared,
    ToMe,
)
from convfusion.operations import count, pairs_in_windows, peak_bytes, site_operations

CHANNELS, HEADS, HEAD = 32, 4, 8


def attention():
    with torch.device("meta"):
        return Attention(CHANNELS, heads=HEADS, dim_head=HEAD)


def of_everything(costs):
    """{(width, height): {mixer: (operations, ratio)}} of all sites together."""
    found = {}
    whole = add_totals(costs)
    for cost, ratio in zip(whole, compare_with_attention(whole), strict=True):
        found.setdefault((cost.width, cost.height), {})[cost.mixer] = (cost.operations, ratio)
    return found


@pytest.fixture(scope="module")
def sd15():
    model = bench_model("sd15")
    configs = list_contenders(model, ("delta_conv", "linfusion"), (0.5, 0.25))
    return operation_table(model, SIZES, configs)


@pytest.mark.parametrize(
    ("size", "half", "quarter"),
    [
        ((512, 512), 12.44, 24.84),
        ((1024, 1024), 38.83, 77.62),
        ((2048, 2048), 144.3, 288.6),
        ((4096, 4096), 566.4, 1132.7),
        ((8192, 8192), 2254.5, 4509.0),
        ((4096, 2160), 299.75, 599.5),
        ((15360, 8640), 4454.8, 8909.6),
        ((16384, 16384), 9007.1, 18014.2),
    ],
)
def test_attention_over_blocks_in_sd15(sd15, size, half, quarter):
    found = of_everything(sd15)[size]
    assert found["delta_conv 0.5"][1] == pytest.approx(half, rel=5e-4)
    assert found["delta_conv 0.25"][1] == pytest.approx(quarter, rel=5e-4)


def test_blocks_cost_less_than_linfusion_at_every_size(sd15):
    for found in of_everything(sd15).values():
        ratio = found["linfusion"][0] / found["delta_conv 0.5"][0]
        assert ratio > 5.42
        assert ratio == pytest.approx(7.55, abs=0.05)


def test_attention_of_sd15_at_512_per_site(sd15):
    operations, _ = of_everything(sd15)[512, 512]["attention"]
    assert operations / 16 == pytest.approx(10.85e9, rel=1e-3)


GRIDS = [(6, 8), (5, 7), (4, 9)]


def by_hand(mixer, height, width):
    """Operations of a mixer for C channels in h heads, from its equations."""
    n, c = height * width, CHANNELS
    halves = math.ceil(height / 2) * math.ceil(width / 2)
    match mixer:
        case None:
            return 4 * 2 * n * c * c + 2 * 2 * n * n * c
        case Removed():
            return 0
        case MeanOnly():
            return 2 * c * c
        case Depthwise(k):
            return 2 * 2 * n * c * c + 2 * k * k * c * n
        case DeltaConv(k, stages, ratio, mean_branch=mean):
            inner = int(c * ratio)
            at = n + halves if stages == 2 else n
            convolutions = 2 * k * k * inner * at
            projections = 2 * n * c * inner + 2 * n * (inner // 2 * stages) * c
            return projections + convolutions + 2 * c * c * mean
        case Halo(block, window, cells, key_ratio, value_ratio):
            ranks = HEADS * (round(key_ratio * HEAD) + round(value_ratio * HEAD))
            queries = math.ceil(height / block) * math.ceil(width / block) * block**2
            beyond = max(height, width) > window  # else there are no cells
            pooled = min(cells, height) * min(cells, width) * beyond
            keys = min(window, height) * min(window, width) + pooled
            return 2 * (2 * n + pooled) * c * ranks + 2 * queries * keys * ranks
        case GeneralisedLinear():
            return 8 * 2 * n * c * c + 2 * 2 * n * c * HEAD + 2 * n * c
        case Pooled(2):
            return 2 * 2 * (n + halves) * c * c + 2 * 2 * n * halves * c
        case ToMe(ratio, 2):
            ends = (height // 2) * (width // 2)
            left = n - int(n * ratio)
            matching = 2 * (n - ends) * ends * c
            return matching + 4 * 2 * left * c * c + 2 * 2 * left * left * c
        case Shared(alone):
            return by_hand(alone, height, width)
    raise AssertionError(mixer)


COUNTED = [
    None,
    Removed(),
    MeanOnly(),
    Depthwise(3),
    DeltaConv(5),
    DeltaConv(3, stages=1, ratio=0.25),
    DeltaConv(3, mean_branch=False),
    Halo(),
    Halo(2, 4, 2, key_ratio=0.5, value_ratio=0.75),
    GeneralisedLinear(),
    Pooled(2),
    ToMe(0.5),
    Shared(DeltaConv(5)),
]


@pytest.mark.parametrize("mixer", COUNTED, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_operations_equal_formulas_worked_out_by_hand(mixer, grid):
    assert site_cost(attention(), mixer, grid)[0] == by_hand(mixer, *grid)


def test_every_mixer_has_a_formula():
    kinds = {type(mixer) for mixer in COUNTED} | {Neighbourhood, Circular}
    ours = {kind for kind in MIXERS.values() if kind.__module__.startswith("convfusion.")}
    assert kinds - {type(None)} == ours  # recipes register more


class OneByOne(nn.Module):
    """Windowed attention that works out no pair but those within the windows."""

    def __init__(self, visible):
        super().__init__()
        self.visible = visible  # [N, N], which keys each query sees

    def forward(self, query, key, value):
        for i, seen in enumerate(self.visible):
            some = seen.nonzero()[:, 0].to("meta")
            F.scaled_dot_product_attention(
                query[:, :, i : i + 1], key[:, :, some], value[:, :, some]
            )


def visible_keys(mixer, grid):
    """Which keys each query sees: [N, N], and the mean token beside them where there is one."""
    height, width = grid
    rows, columns = torch.arange(height), torch.arange(width)
    if isinstance(mixer, Neighbourhood):

        def sees(side):
            window, every = min(mixer.window, len(side)), side[:, None]
            start = (every - window // 2).clamp(0, len(side) - window)
            return (side >= start) & (side < start + window)

        both = sees(rows)[:, None, :, None] & sees(columns)[None, :, None, :]
        return both.flatten(0, 1).flatten(1)
    dy, dx = (rows[:, None] - rows) ** 2, (columns[:, None] - columns) ** 2
    near = dy[:, None, :, None] + dx[None, :, None, :] < mixer.radius**2
    return F.pad(near.flatten(0, 1).flatten(1), (0, int(mixer.mean_token)), value=True)


@settings(deadline=None, max_examples=20)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    mixer=st.one_of(
        st.integers(0, 4).map(lambda half: Neighbourhood(2 * half + 1)),
        st.builds(Circular, st.integers(1, 6), st.booleans()),
    ),
)
def test_windowed_attention_costs_what_its_windows_hold(grid, mixer):
    seen = visible_keys(mixer, grid)
    n = len(seen)
    with torch.device("meta"):
        query = torch.empty(1, HEADS, n, HEAD)
        key = value = torch.empty(1, HEADS, seen.shape[1], HEAD)
    found = count(OneByOne(seen), query, key, value)
    assert found == 4 * CHANNELS * pairs_in_windows(mixer, grid)
    assert site_cost(attention(), mixer, grid)[0] == found + 8 * n * CHANNELS**2


def test_tiles_work_out_more_than_the_windows_hold():
    mixer = Neighbourhood(5)
    with torch.device("meta"):
        module, tokens = mixer.build(CHANNELS, HEADS), torch.empty(1, 24 * 24, CHANNELS)
    tiles = 24 * 24 * (8 + 5 - 1) ** 2
    projections = 8 * 24 * 24 * CHANNELS**2
    assert count(module, tokens, (24, 24)) == projections + 4 * CHANNELS * tiles
    assert tiles > pairs_in_windows(mixer, (24, 24))
    pipe = pixart_sigma()
    convfusion.convert(pipe, convfusion.uniform(mixer))
    (block,) = {own for _, own in site_operations(pipe, (48, 48)).values()}
    tokens, width = 24 * 24, pipe.transformer.inner_dim
    assert block == 8 * tokens * width**2 + 4 * width * pairs_in_windows(mixer, (24, 24))


def flash(query):
    torch.ops.aten._scaled_dot_product_flash_attention(query, query, query)


def efficient(query):
    torch.ops.aten._scaled_dot_product_efficient_attention(query, query, query, None, False)


def chosen_by_pytorch(query):
    F.scaled_dot_product_attention(query, query, query)


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, query):
        self.function(query)


@pytest.mark.parametrize(
    ("kernel", "device"),
    [
        (flash, "meta"),
        (efficient, "meta"),
        (chosen_by_pytorch, "meta"),
        (chosen_by_pytorch, "cpu"),  # which PyTorch's own counter passes over
    ],
)
def test_every_attention_kernel_counts_the_same(kernel, device):
    query = torch.zeros(2, 4, 60, 16, device=device)
    assert count(Calls(kernel), query) == 2 * 2 * (2 * 4) * 60 * 60 * 16


def memory(mixer, grid):
    """Peak in units of the tokens' own size."""
    n = grid[0] * grid[1]
    return site_cost(attention(), mixer, grid)[2] / (2 * n * CHANNELS)


def test_memory_of_a_chain_is_its_input_and_the_two_ends_of_a_layer():
    with torch.device("meta"):
        chain = nn.Sequential(*(nn.Linear(CHANNELS, CHANNELS) for _ in range(4)))
        tokens = torch.empty(1, 100, CHANNELS)
    assert peak_bytes(chain, tokens) == 3 * 4 * tokens.numel()
    assert peak_bytes(nn.Flatten(1), tokens) == 4 * tokens.numel()  # a view


def test_memory_worked_out_by_hand():
    n, grid = 48, (6, 8)
    assert memory(Removed(), grid) == 2  # input, output
    assert memory(MeanOnly(), grid) == 1 + 2 / n  # input, its mean, the mean's projection
    # input, query, key, value, what is mixed, what is projected
    assert memory(None, grid) == 6
    # input, y, the stages side by side, their product with the weight, and that with the bias
    assert memory(DeltaConv(5), grid) == 1 + 0.5 + 0.5 + 1 + 1
    assert memory(DeltaConv(5, ratio=0.25), grid) == 1 + 0.25 + 0.25 + 1 + 1


def test_memory_grows_with_the_tokens_or_with_their_square():
    for kind, make in MIXERS.items():
        mixer = make()
        growth = memory(mixer, (64, 64)) / memory(mixer, (32, 32))
        assert growth > 2 if kind == "tome" else growth < 1.1, kind


def test_parameters_and_places_of_the_mini_model():
    model = bench_model("mini")
    costs = operation_table(model, [(64, 64)], list_contenders(model))
    assert model.latents((64, 96)) == (16, 24)
    unet = mini.load_teacher().unet
    own = sum(p.numel() for name, p in unet.named_parameters() if ".attn1." in name)
    (whole,) = (cost for cost in add_totals(costs) if cost.mixer == "attention")
    assert (whole.sites, whole.parameters) == (7, own)
    parts = [cost for cost in costs if cost.mixer == "attention"]
    assert whole.operations == sum(cost.sites * cost.operations for cost in parts)
    assert whole.activation_bytes == max(cost.activation_bytes for cost in parts)
    for cost in parts:
        n, c = cost.tokens, cost.channels
        assert cost.operations == 8 * n * c * c + 4 * n * n * c


def test_a_folder_is_read_by_its_configuration_alone(tmp_path):
    pixart_sigma().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    model = bench_model(str(tmp_path))
    assert model.pixels_per_latent == 2
    assert model.latents((32, 48)) == (16, 24)
    (cost, *_) = operation_table(model, [(32, 48)], {"attention": None})
    assert (cost.place, cost.sites, cost.tokens) == ("transformer_blocks", 3, 8 * 12)
    with pytest.raises(ConvFusionError, match="multiples of 4 pixels along a side, not 48×34"):
        model.latents((34, 48))
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "Flux"}))
    with pytest.raises(ConvFusionError, match="Flux is not supported"):
        bench_model(str(tmp_path))
    config.write_text(json.dumps({"_class_name": "PixArtTransformer2DModel", "num_layers": "x"}))
    with pytest.raises(ConvFusionError, match="holds no usable configuration"):
        bench_model(str(tmp_path))
    config.write_text("{")
    with pytest.raises(ConvFusionError, match=r"config\.json cannot be read"):
        bench_model(str(tmp_path))


def test_what_cannot_be_counted_is_named():
    with pytest.raises(
        ConvFusionError, match=r"'sd3' is neither a model, one of .*\bsd15, .*, mini, nor"
    ):
        bench_model("sd3")
    model = bench_model("mini")
    with pytest.raises(ConvFusionError, match="no mixer 'lstm'; there are delta_conv"):
        list_contenders(model, ["lstm"])
    with pytest.raises(ConvFusionError, match="even integer"):
        operation_table(model, [(64, 64)], list_contenders(model, ["delta_conv"], [0.3]))
    with pytest.raises(ConvFusionError, match="ratio must lie between"):
        list_contenders(model, ["delta_conv"], [-1])


def test_the_file_holds_every_place_and_the_totals(tmp_path):
    model = bench_model("mini")
    costs = operation_table(model, [(64, 64)], list_contenders(model, ["removed", "mean_only"]))
    write_costs(costs, tmp_path / "flops.csv")
    with open(tmp_path / "flops.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(costs) + 3
    last = rows[-1]
    assert (last["place"], last["mixer"], last["sites"]) == ("all", "mean_only", "7")
    attention = next(r for r in rows if (r["place"], r["mixer"]) == ("all", "attention"))
    expected = int(attention["operations"]) / int(last["operations"])
    assert float(last["attention_over"]) == pytest.approx(expected, rel=1e-5)
    assert {r["attention_over"] for r in rows if r["mixer"] == "removed"} == {""}


@pytest.mark.parametrize(("side", "bound"), [(1024, 1.82), (2048, 4.12)])
def test_what_the_operations_of_sd15_allow_at_most(side, bound):
    model = bench_model("sd15")
    costs = add_totals(
        operation_table(model, [(side, side)], list_contenders(model, ["delta_conv"]))
    )
    attention, blocks = (cost.operations for cost in costs)
    total = denoiser_operations(model, (side, side))
    assert total / (total - attention + blocks) == pytest.approx(bound, abs=0.006)
