"""What `convert` is asked: its form, its JSON, its mistakes."""

import json
from pathlib import Path

import pytest
from tiny_models import sd15

import convfusion
from convfusion import (
    ConvertConfig,
    ConvFusionError,
    DeltaConv,
    Removed,
    uniform,
    with_kernel_sizes,
)


def test_config_round_trips_through_json(tmp_path):
    config = ConvertConfig(
        sites={"up*": DeltaConv(kernel_size=5, gate="sigmoid"), "*": Removed()}, seed=3
    )
    config.save(tmp_path / "config.json")
    assert ConvertConfig.load(tmp_path / "config.json") == config
    assert list(ConvertConfig.load(tmp_path / "config.json").sites) == ["up*", "*"]


@pytest.mark.parametrize(
    "values", [None, [], {"sites": []}, {"sites": {}}, {"seed": "x"}, {"keep_attention": "no"}]
)
def test_a_config_of_the_wrong_form_is_refused(values):
    with pytest.raises(ConvFusionError):
        ConvertConfig.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 4}, "odd"),
        ({"kernel_size": "5"}, "must be int"),
        ({"kernel_size": True}, "must be int"),
        ({"gate": "tanh"}, "one of scaled, reference, sigmoid"),
        ({"stages": 0}, "from 1 to 10"),
        ({"ratio": float("nan")}, "finite number"),
        ({"kind": []}, "needs a kind"),
        ({"colour": 1}, "no setting 'colour'"),
        ({"kind": "attention"}, "one of delta_conv"),
    ],
)
def test_bad_settings_are_named(change, message):
    mixer = {"kind": "delta_conv", "kernel_size": 5, **change}
    with pytest.raises(ConvFusionError, match=message):
        ConvertConfig.from_dict(json.loads(json.dumps({"sites": {"*": mixer}})))


NEAREST = {
    "a mixer": (lambda: convert(DeltaConv(kernel_size=9)), r"give uniform\(mixer\)"),
    "a class": (lambda: convert(DeltaConv), r"the class DeltaConv is no .*uniform\(mixer\)"),
    "sites": (lambda: convert({"*": Removed()}), r"give ConvertConfig\(sites=…\)"),
    "to_dict": (lambda: convert(ConvertConfig().to_dict()), r"give ConvertConfig\.from_dict"),
    "a path": (lambda: convert(Path("config.json")), r"ConvertConfig\.load\('config\.json'\)"),
    "its name": (lambda: convert("config.json"), r"ConvertConfig\.load\('config\.json'\)"),
    "a number": (lambda: convert(7), r"give with_kernel_sizes\(7\)"),
    "a list": (lambda: convert([DeltaConv()]), "list is no ConvertConfig: give one, the name"),
    "class of a site": (lambda: uniform(DeltaConv), r"give its settings, DeltaConv\(\)"),
    "number of a site": (lambda: uniform(7), r"with_kernel_sizes\(…\) or DeltaConv\(kernel_size=7"),
    "kind of a site": (lambda: uniform({"kind": "removed"}), "is no mixer, such as DeltaConv"),
    "one mixer": (lambda: ConvertConfig(sites=DeltaConv()), r"is uniform\(mixer\)"),
    "no sites": (lambda: ConvertConfig(sites=None), "at least one pattern"),
    "a pattern": (lambda: ConvertConfig(sites={7: DeltaConv()}), "must be a string, not 7"),
    "sizes": (lambda: with_kernel_sizes("7"), "integers by site pattern, not '7'"),
    "a size": (lambda: with_kernel_sizes({"*": "7"}), "kernel_size must be int, not '7'"),
    "base": (lambda: with_kernel_sizes(7, base=DeltaConv), r"must be settings, DeltaConv\(…\)"),
    "no file": (lambda: ConvertConfig.load("missing.json"), r"missing\.json cannot be read: No"),
    "a folder": (lambda: ConvertConfig.load("."), "cannot be read: it is no plain file"),
}


@pytest.mark.parametrize("mistake", NEAREST)
def test_the_mistakes_nearest_at_hand_are_told_what_would_work(mistake):
    attempt, message = NEAREST[mistake]
    with pytest.raises(ConvFusionError, match=message):
        attempt()


def convert(config):
    return convfusion.convert(sd15(), config)
