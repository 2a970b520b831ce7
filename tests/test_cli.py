"""The command line: what it writes, and how it answers a mistake."""

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image
from tiny_pipelines import dit_pipeline

import convfusion
from convfusion.checkpoint.publish import prepare
from convfusion.cli.distill import distill as distill_command
from convfusion.demo import DEMO_RATE, DEMO_STEPS, configure_distillation, load_near_blocks
from convfusion.distill import DistillConfig, LossWeights
from convfusion.distill.settings import as_toml, read_settings

pytestmark = pytest.mark.libraries

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("red", "green"):
        Image.new("RGB", (20, 16), name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} apple")
    return folder


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(
        command in out
        for command in ("demo", "analyze", "ablate", "convert", "distill", "generate")
    )


def test_convert_distil_generate(run, model, pictures, tmp_path):
    code, out, _ = run("convert", model, "--out", tmp_path / "converted", "--config", "default")
    assert code == 0
    assert "7 of 7 self-attention sites converted" in out

    options = ("--data", pictures, "--batch-size", 1, "--validate-every", 2, "--size", "16x16")
    options += ("--start", "attention", "--imitation-steps", 1, "--held-out", 1, "--ema", 0.5)
    code, _, err = run(
        "distill", tmp_path / "converted", "--out", tmp_path / "blocks", "--steps", 2, *options
    )
    assert code == 0, err
    assert (tmp_path / "blocks" / "validation" / "step-0000002.png").is_file()
    named = {"base_model": "them/base", "license": "mit"}
    card = prepare(tmp_path / "blocks", "me/blocks", **named).card
    assert 'from_pretrained("them/base", use_safetensors=True)' in card and "## Training" in card
    assert str(tmp_path) not in card and 'load(pipe, "me/blocks")' in card
    assert "ε-error" in card and "imitation_steps = 1" in card and "validation/step-0000002" in card
    assert (tmp_path / "blocks" / "losses.png").is_file()

    code, out, err = run(
        "generate", model, "--blocks", tmp_path / "blocks", "--out", tmp_path / "drawn",
        "--prompt", "red apple", "--prompt", "green apple", "--steps", 2, "--size", "24x16",
    )  # fmt: skip
    assert code == 0, err
    drawn = sorted((tmp_path / "drawn").glob("*.png"))
    assert [Image.open(path).size for path in drawn] == [(24, 16)] * 2

    code, _, err = run(
        "convert", model, "--out", tmp_path / "deployed", "--blocks", tmp_path / "blocks",
        "--drop-attention",
    )  # fmt: skip
    assert code == 0, err
    status = convfusion.status(convfusion.load_pipeline(tmp_path / "deployed"))
    assert not any(row.attention_kept for row in status.sites)


def test_a_model_of_few_classes_distils_to_its_card_and_draws(run, pictures, tmp_path):
    """Its pipeline draws without guidance only, and so must the validation pictures."""
    dit_pipeline().save_pretrained(tmp_path / "dit")
    for label, name in enumerate(("red", "green")):
        (pictures / f"{name}.txt").write_text(str(label))
        Image.new("RGB", (40, 32), name).save(pictures / f"{name}.png")
    options = ("--data", pictures, "--batch-size", 1, "--steps", 1)
    code, _, err = run("distill", tmp_path / "dit", "--out", tmp_path / "blocks", *options)
    assert code == 0, err
    assert (tmp_path / "blocks" / "README.md").is_file()
    code, _, err = run(
        "generate", tmp_path / "dit", "--blocks", tmp_path / "blocks", "--prompt", "2",
        "--steps", 2, "--out", tmp_path / "drawn",
    )  # fmt: skip
    assert code == 0, err


def test_a_model_of_few_classes_is_looked_at_without_guidance(run, tmp_path):
    """By default, where others are drawn with some; asked for, it is refused."""
    dit_pipeline().save_pretrained(tmp_path / "dit")
    (tmp_path / "prompts.txt").write_text("1\n2\n")
    model, prompts, steps = tmp_path / "dit", tmp_path / "prompts.txt", ("--steps", 2)
    for command, *options in (
        ("cache", "--data", prompts),
        ("analyze", "--prompts", prompts),
        ("distill", "--data", prompts, "--batch-size", 1),
        ("evaluate", "--prompts", prompts, "--blocks", tmp_path / "distill"),
    ):
        code, _, err = run(command, model, "--out", tmp_path / command, *options, *steps)
        assert code == 0, (command, err)
    code, _, err = run(
        "analyze", model, "--prompts", prompts, "--out", tmp_path / "x", "--guidance", 2, *steps
    )
    assert code == 2 and "with a guidance of 1 only" in err


def test_analyze_then_convert_with_its_kernels(run, model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\n\ngreen\n")
    report = tmp_path / "report"
    options = ("--prompts", prompts, "--steps", 2, "--queries", 20, "--control")
    code, out, err = run("analyze", model, "--out", report, *options)
    assert code == 0, err
    assert "this model" in out and "untrained" in out
    assert len(json.loads((report / "analysis.json").read_text())["prompts"]) == 2
    code, out, err = run(
        "convert", model, "--config", report / "kernels.json", "--out", tmp_path / "converted"
    )
    assert code == 0, err
    assert "7 of 7 self-attention sites converted" in out


def test_ablate(run, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple")
    code, out, err = run(
        "ablate", model, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out",
        "--window", 3, "--site", "up_blocks.*", "--steps", 2,
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert list(rows) == ["self-attention", "window 3", "mean token only", "removed"]
    assert rows["removed"]["epsilon_error"] > 0 and "window 3" in out
    assert (tmp_path / "out" / "ablation.png").is_file()


def test_a_run_is_a_file_and_the_command_line_goes_first(run, model, pictures, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f"""
model = "{model}"
data = "{pictures}"
size = "16x16"

[distill]
steps = 3
batch_size = 2
betas = [0.8, 0.9]

[distill.losses]
noise = 0.0
"""
    )
    out = tmp_path / "out"
    options = ("--steps", 1, "--losses.feature", 0.5, "--no-checkpointing")
    code, said, err = run("distill", "--settings", file, "--out", out, *options)
    assert code == 0, err
    config = json.loads((out / "checkpoints" / "step-0000001" / "trainer.json").read_text())
    assert config["config"]["losses"]["noise"] == 0.0
    assert config["config"]["losses"]["feature"] == 0.5
    assert config["config"]["betas"] == [0.8, 0.9]
    assert "steps = 1" in said and "[distill.losses]" in said
    again = tmp_path / "printed.toml"
    again.write_text(said[: said.index("snr_gamma")] + "snr_gamma = 5.0")
    assert read_settings(again, {}).distill.steps == 1


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(run, model, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(
        "distill", model, "--dry-run", "--batch-size", 2, "--steps", 10, "--every", 2
    )
    assert code == 0, err
    assert "sites that would train" in out and "4 of 7" in out and "all 10 steps" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_every_field_is_an_option():
    options = {p.name for p in inspect.signature(distill_command).parameters.values()}
    for each in fields(DistillConfig):
        if each.name != "losses":
            assert each.name in options
    assert {f"losses__{each.name}" for each in fields(LossWeights)} <= options


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_settings_are_whole(path, tmp_path):
    settings = read_settings(path, {})
    assert settings.model
    printed = tmp_path / "printed.toml"
    printed.write_text(as_toml(settings), encoding="utf-8")
    assert read_settings(printed, {}) == settings


def test_the_demo_is_a_shipped_run():
    shipped = read_settings(CONFIGS / "mini.toml", {"distill": {"validate_every": 0}})
    assert shipped.distill == configure_distillation(DEMO_STEPS, learning_rate=DEMO_RATE)
    assert convfusion.ConvertConfig.load(CONFIGS.parent / shipped.config) == load_near_blocks()


MISTAKES = {
    "unknown model": (["generate", "no/such", "--prompt", "x"], "no/such"),
    "unknown preset": (
        ["convert", "MODEL", "--out", "OUT", "--config", "sd4"],
        "no preset 'sd4'; there are default, sd15, sd21, sdxl, pixart, dit",
    ),
    "no config": (["convert", "MODEL", "--out", "OUT", "--config", "x.json"], "x.json"),
    "bad size": (["generate", "MODEL", "--prompt", "x", "--size", "12"], "512x768"),
    "odd size": (["generate", "MODEL", "--prompt", "x", "--size", "17x16"], "multiples of 8"),
    "no data": (["distill", "MODEL", "--out", "OUT"], "--data is needed"),
    "size without data": (
        ["distill", "mini", "--out", "OUT", "--size", "128x128"],
        "--size, --frames and --buckets are for data of your own",
    ),
    "no folder": (["distill", "MODEL", "--out", "OUT", "--data", "nowhere"], "does not exist"),
    "no data to plan for": (["distill", "MODEL", "--dry-run", "--data", "x"], "does not exist"),
    "what a CPU cannot do": (
        ["distill", "MODEL", "--out", "OUT", "--data", "PROMPTS", "--autocast", "fp16"],
        "fp16 trains on a GPU only",
    ),
    "huge seed": (["distill", "mini", "--out", "OUT", "--seed", str(2**63)], "2^63"),
    "imitation for longer": (
        ["distill", "--settings", "MINI", "--out", "OUT", "--steps", "4", "--warmup", "2"],
        "convfusion: imitation_steps must lie between 0 and steps: it is 12",
    ),
    "bad batch": (
        ["distill", "MODEL", "--out", "OUT", "--batch-size", "3", "--accumulation", "2"],
        "multiple of accumulation",
    ),
    "bad precision": (["generate", "MODEL", "--prompt", "x", "--precision", "int4"], "float32"),
    "full folder": (["convert", "MODEL", "--out", "MODEL"], "not empty"),
    "no blocks": (["generate", "MODEL", "--prompt", "x", "--blocks", "OUT"], "is no folder here"),
    "no such option": (["generate", "MODEL", "--prompt", "x", "--speed", "9"], "No such option"),
    "no out": (["distill", "mini"], "--out is needed"),
    "no model": (["distill", "--out", "OUT"], "which model?"),
    "no settings": (["distill", "--settings", "x.toml", "--out", "OUT"], "x.toml cannot be read"),
    "bad settings": (["distill", "--settings", "BAD", "--out", "OUT"], "no setting 'step'"),
    "negative rate": (["distill", "mini", "--out", "OUT", "--learning-rate", "-1"], "positive"),
    "no prompts": (["analyze", "MODEL", "--out", "OUT"], "--prompts is needed"),
    "empty prompts": (
        ["analyze", "MODEL", "--out", "OUT", "--prompts", "EMPTY"],
        "should hold one per line",
    ),
    "no such timestep": (
        ["analyze", "mini", "--out", "OUT", "--timesteps", "5"],
        "convfusion: 5 is not among the timesteps of 25 sampling steps: 961",
    ),
    "bad timesteps": (["analyze", "mini", "--out", "OUT", "--timesteps", "x"], "881,481,81"),
    "bad cut-off": (["analyze", "mini", "--out", "OUT", "--cutoff", "0"], "cut-off above 0"),
    "large window": (
        ["ablate", "mini", "--out", "OUT", "--window", "17"],
        "larger than every grid of tokens it is for: the largest side is 16",
    ),
    "even window": (["ablate", "mini", "--out", "OUT", "--window", "4"], "must be odd"),
    "a file for a folder": (
        ["generate", "MODEL", "--prompt", "x", "--out", "EMPTY"],
        "empty.txt is a file",
    ),
    **{
        f"a file above a folder: {command[0]}": (
            [*command, "--out", "UNDER"],
            "empty.txt is a file",
        )
        for command in (
            ["demo"],
            ["convert", "MODEL"],
            ["cache", "MODEL", "--data", "PROMPTS"],
            ["distill", "mini", "--resume"],
            ["evaluate", "mini"],
        )
    },
    "one file for two pictures": (
        ["generate", "MODEL", "--prompt", "x", "--prompt", "y", "--out", "x.png"],
        "x.png is one picture, and there are 2 prompts",
    ),
    "nowhere for a file": (
        ["generate", "MODEL", "--prompt", "x", "--out", "no/such/x.png"],
        "name one in a folder that exists",
    ),
    "no such device": (["generate", "MODEL", "--prompt", "x", "--device", "abacus"], "abacus"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(run, model, tmp_path, mistake):
    arguments, message = MISTAKES[mistake]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "prompts.txt").write_text("red\n")
    places = {"MODEL": model, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty.txt"}
    places |= {"PROMPTS": tmp_path / "prompts.txt", "MINI": CONFIGS / "mini.toml"}
    places |= {"BAD": tmp_path / "bad.toml", "UNDER": tmp_path / "empty.txt" / "under"}
    places["BAD"].write_text("model = 'mini'\n[distill]\nstep = 3\n")
    code, _, err = run(*[places.get(argument, argument) for argument in arguments])
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert err.startswith("convfusion: ") and err.count("\n") == 1


def test_pictures_never_take_the_place_of_others(run, model, tmp_path):
    command = ("generate", model, "--prompt", "red", "--steps", 1, "--out")
    for _ in range(3):
        assert run(*command, tmp_path)[0] == 0
    (tmp_path / "00000-seed0.png").unlink()
    assert run(*command, tmp_path)[0] == 0
    assert sorted(path.name[:5] for path in tmp_path.glob("*.png")) == ["00001", "00002", "00003"]
    code, told, _ = run(*command, tmp_path / "red.jpg")
    assert code == 0 and str(tmp_path / "red.jpg") in told
    assert Image.open(tmp_path / "red.jpg").format == "JPEG"
    code, _, err = run(*command, tmp_path / "red.jpg")
    assert code == 2 and "exists already" in err


def test_a_run_says_where_it_begins_and_what_it_sets_aside(run, model, pictures, tmp_path):
    out = tmp_path / "blocks"
    command = ("distill", model, "--out", out, "--data", pictures, "--batch-size", 1)
    code, said, err = run(*command, "--steps", 1, "--resume", "--size", "16x16")
    assert code == 0 and f"{out} has no checkpoint: starting anew." in said, err
    code, _, err = run(*command, "--steps", 2)
    assert code == 2 and "continue with --resume, or choose another folder" in err
    code, _, err = run(*command, "--steps", 2, "--resume", "--learning-rate", 1)
    assert code == 2 and "written with another learning_rate" in err
    code, said, err = run(*command, "--steps", 2, "--resume", "--size", "16x16")
    assert code == 0 and "Continuing after step 1." in said, err
    code, said, err = run("distill", "mini", "--every", 2, "--dry-run")
    assert code == 0 and "4 of 7" in said and "the blocks that it has are set aside" in said, err


def test_bench_latency_times_graphs_on_cuda_alone(run):
    options = ("mini", "--size", "64x64", "--whole", "--recorded", "--device", "cpu")
    code, _, err = run("bench", "latency", *options)
    assert code == 2
    assert "CUDA graphs, which cpu does not have" in err


def test_bench_flops_shows_and_writes_what_things_cost(run, tmp_path):
    out = tmp_path / "flops.csv"
    options = ("--size", "64x64", "--size", "64x96", "--mixers", "delta_conv,mean_only")
    code, shown, _ = run("bench", "flops", "mini", *options, "--ratio", 0.25, "--out", out)
    assert code == 0
    assert "all 7 self-attention sites" in shown
    assert "64×96" in shown and "two operations per multiply-add" in shown
    assert max(map(len, shown.split("Counted")[0].splitlines())) <= 100
    header, *rows = out.read_text().splitlines()
    assert header.startswith("model,width,height,mixer,place,sites")
    assert {row.split(",")[3] for row in rows} == {"attention", "delta_conv 0.25", "mean_only"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("sd3",), "'sd3' is neither a model"),
        (("mini", "--size", "30x64"), "multiples of 4 pixels along a side, not 30×64"),
        (("mini", "--mixers", "mamba"), "no mixer 'mamba'; there are delta_conv"),
        (("mini", "--ratio", "9"), "ratio must lie between 0 and 4"),
        (("mini", "--out", "nowhere/flops.csv"), "nowhere/flops.csv cannot be a file"),
    ],
)
def test_bench_flops_names_mistakes_before_it_counts(run, options, message):
    code, shown, err = run("bench", "flops", *options)
    assert (code, shown) == (2, "")
    assert message in err and len(err.splitlines()) == 1


def test_a_large_size_is_climbed_up_to(run, model, tmp_path):
    options = ("--prompt", "red apple", "--steps", 4, "--out", tmp_path / "drawn")
    code, out, err = run("generate", model, "--size", "40x32", *options)
    assert code == 0, err
    assert "→ 40×32" in out
    [drawn] = (tmp_path / "drawn").glob("*.png")
    assert Image.open(drawn).size == (40, 32)
    code, _, err = run(
        "generate", model, "--size", "400x320", "--memory", 0.001, "--prompt", "red",
        "--out", tmp_path / "none",
    )  # fmt: skip
    assert code == 2 and "GiB" in err and err.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_an_unconverted_model_is_not_exported(run, model, tmp_path):
    code, _, err = run("export", model, "--out", tmp_path / "model.onnx")
    assert code == 2 and err.count("\n") == 1
    assert not (tmp_path / "model.onnx").exists()


def test_cache_says_what_it_skipped(run, model, pictures, tmp_path):
    (pictures / "spoilt.png").write_bytes(b"nothing")
    (pictures / "spoilt.txt").write_text("blue apple")
    command = ("cache", model, "--out", tmp_path / "cache", "--workers", 2)
    for _ in range(2):  # the second finds it done
        code, out, err = run(*command, "--data", pictures)
        assert code == 0, err
        assert "2 samples" in out and "unreadable picture" in out and "spoilt.png" in out
    code, _, err = run(*command, "--data", tmp_path / "nowhere")
    assert code == 2 and "does not exist" in err
