"""What `convert` is asked: its form, its JSON, its mistakes."""

import json

import pytest

from convfusion import ConvertConfig, ConvFusionError, DeltaConv, Removed


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
