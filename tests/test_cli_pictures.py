"""What the commands that draw take and write: several prompts and seeds, and text in PNGs."""

import pytest
from PIL import Image
from tiny_pipelines import dit_pipeline, stable_diffusion

import convfusion
from convfusion import mini
from convfusion.cli.compare import choose_prompts, name_rows
from convfusion.cli.generate import pair_prompts
from convfusion.evaluate.comparison import TEACHER, compare_blocks
from convfusion.generate import describe_picture, generate, write_picture
from convfusion.mixers import GeneralisedLinear
from convfusion.surgery import mixers_of, uniform
from convfusion.surgery.record import TrainingRecord, set_record


@pytest.fixture(scope="module")
def student():
    return mini.load_student()


def test_one_seed_counts_up_and_several_go_with_every_prompt():
    assert pair_prompts(["a", "b"], None) == (["a", "b"], [0, 1])
    assert pair_prompts(["a", "b"], [7]) == (["a", "b"], [7, 8])
    assert pair_prompts(["a", "b"], [7, 3]) == (["a", "a", "b", "b"], [7, 3, 7, 3])


def test_prompts_of_a_file_with_every_seed(run, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple\n\ngreen apple\n")
    options = ("--prompts", tmp_path / "prompts.txt", "--prompt", "blue", "--steps", 1)
    options += ("--negative-prompt", "größer", "--guidance", 4, "--seed", 5, "--seed", 2)
    code, out, err = run("generate", model, *options, "--out", tmp_path / "drawn")
    assert code == 0, err
    pictures = sorted((tmp_path / "drawn").iterdir())
    texts = [Image.open(path).text for path in pictures]
    assert all(str(path) in out for path in pictures)
    assert [(text["prompt"], text["seed"]) for text in texts] == [
        (prompt, seed) for prompt in ("blue", "red apple", "green apple") for seed in ("5", "2")
    ]
    expected = {"negative_prompt": "größer", "steps": "1", "guidance": "4.0", "model": "model"}
    expected["version"] = f"ConvFusion {convfusion.__version__}"
    assert texts[0].items() >= expected.items()
    first, second, third = texts[0]["parameters"].split("\n")
    assert (first, second) == ("blue", "Negative prompt: größer")
    assert third.startswith("Steps: 1, Sampler: ") and "CFG scale: 4.0, Seed: 5," in third


def test_a_negative_prompt_changes_the_picture(student):
    settings = {"steps": 2, "guidance": 3.0, "seeds": [0]}
    plain = generate(student, ["snail, noto"], **settings)[0]
    other = generate(student, ["snail, noto"], negative_prompt="red apple, noto", **settings)[0]
    assert plain.tobytes() != other.tobytes()


def test_text_in_a_picture_is_kept_by_png_alone(student, tmp_path):
    record = describe_picture(student, "🐌", seed=1, steps=2, guidance=3.0, blocks="mine")
    assert "Blocks: mine" in record["parameters"] and "model" not in record
    image = Image.new("RGB", (4, 4), "red")
    write_picture(tmp_path / "x.png", image, record)
    assert Image.open(tmp_path / "x.png").text == record
    write_picture(tmp_path / "x.jpg", image, record)
    assert Image.open(tmp_path / "x.jpg").format == "JPEG"


MISTAKES = {
    "nothing to draw": (["generate", "MODEL"], "what should be drawn?"),
    "no guidance": (
        ["generate", "MODEL", "--prompt", "x", "--guidance", "1", "--negative-prompt", "y"],
        "needs a guidance scale above 1",
    ),
    "no negative prompts": (
        ["generate", "DIT", "--prompt", "1", "--negative-prompt", "y"],
        "takes no negative_prompt",
    ),
    "no blocks": (["compare", "MODEL", "--prompt", "x"], "no trained blocks to compare"),
    "no such blocks": (
        ["compare", "MODEL", "--prompt", "x", "--blocks", "a/b/c"],
        "a/b/c is no folder here",
    ),
    "twice": (
        ["compare", "mini", "--prompt", "x", "--blocks", "mini-delta", "--blocks", "mini-delta"],
        "given twice",
    ),
    "no PNG": (["compare", "mini", "--out", "grid.jpg"], "must end in .png"),
    "one file": (
        ["generate", "MODEL", "--prompt", "x", "--seed", "1", "--seed", "2", "--out", "x.png"],
        "x.png is one picture",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(run, model, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    words, message = MISTAKES[mistake]
    if "DIT" in words:
        dit_pipeline().save_pretrained(tmp_path / "dit")
    places = {"MODEL": model, "DIT": tmp_path / "dit"}
    before = sorted(path.name for path in tmp_path.iterdir())
    code, _, err = run(*(places.get(word, word) for word in words))
    assert code == 2 and message in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_untrained_blocks_say_so(run, model, tmp_path):
    code, out, _ = run("convert", model, "--out", tmp_path / "new")
    assert code == 0 and "These blocks are untrained" in out
    assert f"Next: convfusion distill {tmp_path / 'new'}" in out
    options = ("--prompt", "x", "--steps", 1, "--out", tmp_path / "drawn")
    code, _, err = run("generate", tmp_path / "new", *options)
    assert code == 0 and "These blocks are untrained" in err
    code, _, err = run("generate", "mini", *options)
    assert code == 0 and "untrained" not in err


def test_untrained_blocks_of_any_kind_say_so_and_trained_ones_do_not(run, model, tmp_path):
    """Told by their record and not by their values: a start is no training, and zeros may be."""
    options = ("--prompt", "x", "--steps", 1, "--out", tmp_path / "drawn")
    pipe = stable_diffusion()
    convfusion.convert(pipe, uniform(GeneralisedLinear()))
    for record, said in (
        (TrainingRecord("converted"), "These blocks are untrained: pictures will be poor"),
        (TrainingRecord("attention"), "These blocks are untrained, started from the attention:"),
        (TrainingRecord("attention", 3), ""),
        (TrainingRecord("released"), ""),
    ):
        for mixer in mixers_of(pipe).values():
            set_record(mixer, record)
        blocks = tmp_path / f"{record.origin}-{record.steps}"
        convfusion.save(pipe, blocks)
        code, _, err = run("generate", model, "--blocks", blocks, *options)
        assert code == 0 and (said in err if said else "blocks are untrained" not in err)
        written = ("--out", tmp_path / f"{blocks.name}-converted")
        code, out, err = run("convert", model, "--blocks", blocks, *written)
        assert code == 0 and (said in out if said else "blocks are untrained" not in out)


def test_compare_draws_teacher_and_every_student(run, student, tmp_path):
    convfusion.save(student, tmp_path / "blocks")
    options = ("--blocks", tmp_path / "blocks", "--prompt", "snail, noto", "--steps", 2)
    grid = tmp_path / "grid.png"
    options += ("--seed", 1, "--seed", 2, "--removed")
    code, out, err = run("compare", "mini", *options, "--out", grid)
    assert code == 0, err
    assert "self-attention removed" in out
    assert "halo blocks (no self-attention)" in out and "blocks" in out and str(grid) in out
    assert "Next: convfusion evaluate mini" in out
    assert Image.open(grid).height > 4 * 128


def test_the_teachers_row_is_drawn_with_attention(student, tmp_path):
    convfusion.save(student, tmp_path / "blocks")
    pipe, prompts, seeds = mini.load_teacher(), ["snail, noto"], [3, 4]
    settings = {"steps": 2, "guidance": 3.0}
    compared = compare_blocks(pipe, {"s": tmp_path / "blocks"}, prompts, seeds, **settings)
    assert list(compared.rows) == [TEACHER, "s"] and list(compared.psnr) == ["s"]
    assert compared.captions == ["snail, noto, seed 3", "snail, noto, seed 4"]
    for name, drawer in ((TEACHER, mini.load_teacher()), ("s", student)):
        drawn = generate(drawer, prompts * 2, seeds=seeds, **settings)
        assert [a.tobytes() for a in drawn] == [b.tobytes() for b in compared.rows[name]]
    assert convfusion.status(pipe).converted == 0


def test_rows_have_names_that_tell_them_apart(tmp_path):
    for name in ("a/blocks", "b/blocks", "c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "convfusion.json").write_text("{}")
    paths = [str(tmp_path / name) for name in ("a/blocks", "b/blocks", "c")]
    assert list(name_rows(paths)) == [*paths[:2], "c"]


def test_bars_of_a_pipeline_that_iterates_count_too(monkeypatch):
    counted = []
    monkeypatch.setattr("convfusion.progress.is_terminal", lambda: True)
    monkeypatch.setattr(
        "convfusion.progress.Bar._draw", lambda bar, bars: counted.append((bar.done, bar.total))
    )
    for pipe, prompts in ((mini.load_student(), ["a", "b", "c"]), (dit_pipeline(), ["1"] * 3)):
        counted.clear()
        generate(pipe, prompts, steps=2, guidance=1.0, batch_size=2)
        assert counted[-1] == (4, 4) and len(counted) == 6
        counted.clear()
        pipe.set_progress_bar_config(disable=True)
        generate(pipe, prompts[:1], steps=1, guidance=1.0)
        assert counted == []


def test_compare_takes_so_many_prompts_at_even_distances(run, tmp_path):
    captions = mini.held_out_data("results").captions
    chosen = choose_prompts("mini", None, None, 5)
    assert [captions.index(text) for text in chosen] == [24, 73, 122, 171, 220]
    assert len(choose_prompts("mini", None, None, None)) == 5
    assert choose_prompts("mini", ["a", "b", "c"], None, 1) == ["b"]
    grids = {}
    for columns in (1, 2):
        grids[columns] = tmp_path / f"{columns}.png"
        options = ("--samples", 2, "--steps", 1, "--columns", columns)
        code, _, err = run("compare", "mini", *options, "--out", grids[columns])
        assert code == 0, err
    tall, wide = (Image.open(path) for path in grids.values())
    assert tall.height > 2 * wide.height - 20 and tall.width <= wide.width  # of a row name
    code, _, err = run("compare", "mini", "--prompt", "x", "--samples", 2)
    assert code == 2 and "--samples asks for 2 of 1 prompts" in err
