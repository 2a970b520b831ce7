"""What the page draws, looks at and opens, without a browser."""

import json
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from evaluations import write_evaluation
from PIL import Image
from tiny_pipelines import PIPELINES, stable_diffusion

import convfusion
from convfusion.app import show
from convfusion.app.evaluations import PAGE, describe_sample, open_gallery
from convfusion.app.look import attend, look_from, measure_dependence, watch_call
from convfusion.app.serve import check_port
from convfusion.app.studio import (
    REMOVED,
    STUDENT,
    TEACHER,
    Drawn,
    Job,
    Stopped,
    Studio,
    Wish,
    label_sites,
    measure_psnr,
    parse_wish,
)
from convfusion.app.style import explain, say, show_progress
from convfusion.app.visit import Visit
from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.evaluate.results import SCHEMA
from convfusion.families import denoiser_of, list_sites
from convfusion.generate import generate
from convfusion.mixers import DeltaConv, Depthwise, Halo, MeanOnly, Removed
from convfusion.mixers.tokens import Heads, JointTokens, TokenSample
from convfusion.surgery import attention_teacher, drop_attention, uniform

STEPS = 3
PROMPTS = {"sd": "red apple", "sdxl": "red apple", "pixart": "red apple", "dit": "apple"}


def guidance_for(kind):
    return 1.0 if kind == "dit" else 2.0  # the tiny one has too few classes


def make_studio(kind="sd", mixer=None):
    """A studio whose blocks do something else than its attention."""
    pipe = PIPELINES[kind]()
    convfusion.convert(pipe, uniform(mixer or DeltaConv(kernel_size=3)))
    return Studio(pipe, kind, 2.0)


def wish_for(studio, **changes):
    values = {"prompt": PROMPTS[studio.name], "seed": 5, "steps": STEPS, "size": studio.size}
    return Wish(**{**values, "guidance": guidance_for(studio.name), **changes})


def pixels(drawn):
    return np.asarray(drawn.image if isinstance(drawn, Drawn) else drawn).tolist()


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_three_sides_are_what_they_are_called(kind):
    studio = make_studio(kind)
    wish, job = wish_for(studio), Job()
    drawn = {side: studio.draw(side, wish, job) for side in studio.sides}
    settings = {"seeds": [5], "steps": STEPS, "guidance": guidance_for(kind)}
    stock = PIPELINES[kind]()
    assert pixels(drawn[TEACHER]) == pixels(generate(stock, [wish.prompt], **settings)[0])
    convfusion.convert(stock, uniform(DeltaConv(kernel_size=3)))
    assert pixels(drawn[STUDENT]) == pixels(generate(stock, [wish.prompt], **settings)[0])
    convfusion.revert(stock)
    convfusion.convert(stock, uniform(Removed()))
    assert pixels(drawn[REMOVED]) == pixels(generate(stock, [wish.prompt], **settings)[0])
    assert len({str(pixels(each)) for each in drawn.values()}) == 3
    assert all(each.seconds > 0 for each in drawn.values())
    assert len(drawn[TEACHER].calls) == STEPS and not drawn[STUDENT].calls


def test_attention_that_is_given_back_stands_for_one_picture():
    studio = make_studio()
    wish, job, every = wish_for(studio), Job(), list(studio.converted)
    before = studio.draw(STUDENT, wish, job)
    one = studio.draw(STUDENT, wish, job, given_back=every[:1])
    teacher = studio.draw(TEACHER, wish, job)
    assert pixels(studio.draw(STUDENT, wish, job, given_back=every)) == pixels(teacher)
    assert pixels(one) not in (pixels(before), pixels(teacher))
    assert pixels(studio.draw(STUDENT, wish, job)) == pixels(before)
    assert measure_psnr(teacher, teacher) == float("inf")
    with pytest.raises(ConvFusionError, match="no converted site"):
        studio.draw(STUDENT, wish, job, given_back=["mid_block"])
    assert pixels(studio.draw(STUDENT, wish, job)) == pixels(before)


def test_visitors_at_once_do_not_mix():
    studio = make_studio()
    every = list(studio.converted)
    asked = [
        (side, wish_for(studio, seed=seed), given)
        for seed, (side, given) in enumerate(
            [(STUDENT, []), (TEACHER, []), (STUDENT, every[:1]), (REMOVED, []), (STUDENT, every)]
        )
    ]
    alone = [pixels(studio.draw(side, wish, Job(), given_back=g)) for side, wish, g in asked]
    together = {}

    def draw(number):
        side, wish, given = asked[number]
        together[number] = pixels(studio.draw(side, wish, Job(), given_back=given))

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[number] for number in range(len(asked))] == alone


def test_a_drawing_stops_at_its_next_step_and_the_next_one_is_whole():
    studio, told = make_studio(), []
    wish, job = wish_for(studio, steps=9), Job()

    def stop(step, steps):
        told.append((step, steps))
        job.stopped = step == 2

    with pytest.raises(Stopped):
        studio.draw(TEACHER, wish, job, on_step=stop)
    assert told == [(1, 9), (2, 9)]
    with pytest.raises(Stopped):  # before it has begun
        studio.draw(TEACHER, wish, job)
    whole = studio.draw(TEACHER, wish, Job())
    assert len(whole.calls) == 9


def test_what_is_followed_tells_its_steps_and_ends_with_nobody_there():
    studio = make_studio()
    wish = wish_for(studio)
    *steps, drawn = studio.follow(STUDENT, wish, Job())
    assert steps == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert pixels(drawn) == pixels(studio.draw(STUDENT, wish, Job()))
    with pytest.raises(ConvFusionError, match="too large"):
        list(studio.follow(STUDENT, wish_for(studio, size=(1024, 16)), Job()))
    job = Job()
    followed = studio.follow(STUDENT, wish_for(studio, steps=200), job)
    next(followed)
    followed.close()
    assert job.stopped


def test_somebody_who_waits_for_a_turn_can_stop():
    studio, job = make_studio(), Job()
    with studio._lock:
        threading.Timer(0.2, lambda: setattr(job, "stopped", True)).start()
        with pytest.raises(Stopped):
            studio.draw(STUDENT, wish_for(studio), job)


def test_a_gpu_is_warmed_up_once_for_a_side_and_size():
    studio = make_studio()
    drawn = []
    studio._generate = lambda wish, steps: drawn.append(steps) or Image.new("RGB", (8, 8))
    studio.warms_up = True
    for side in (TEACHER, TEACHER, STUDENT):
        studio.draw(side, wish_for(studio), Job())
    assert drawn == [2, STEPS, STEPS, 2, STEPS]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "  "}, "there is no prompt"),
        ({"seed": None}, "the seed is missing"),
        ({"seed": -1}, "seeds must be 0 or more"),
        ({"steps": 0}, "steps and batch_size must be at least 1"),
        ({"steps": 2.5}, "the number of steps must be a whole number"),
        ({"steps": 251}, "at most 250 steps"),
        ({"guidance": None}, "the guidance is missing"),
        ({"guidance": -1}, "guidance must be from 0"),
        ({"size": (None, 16)}, "the height is missing"),
        ({"size": (16, 17)}, "both sides must be multiples"),
        ({"size": (16, 4096)}, "too large for this page, which draws up to 64×64"),
    ],
)
def test_bad_input_is_a_message(fields, words):
    studio = make_studio()
    good = {"prompt": "red", "seed": 0, "steps": 2, "guidance": 2.0, "size": (16, 16)}
    studio.check(parse_wish(**good))
    with pytest.raises(ConvFusionError, match=words):
        studio.check(parse_wish(**{**good, **fields}))


def test_a_model_without_blocks_is_compared_without_its_attention():
    studio = Studio(stable_diffusion(), "sd", 2.0)
    assert studio.sides == (TEACHER, STUDENT) and not studio.has_blocks
    wish, job = wish_for(studio), Job()
    assert pixels(studio.draw(STUDENT, wish, job)) == pixels(studio.draw(REMOVED, wish, job))
    given = studio.draw(STUDENT, wish, job, given_back=studio.converted)
    assert pixels(given) == pixels(studio.draw(TEACHER, wish, job))


def test_a_model_whose_attention_was_dropped_is_refused():
    pipe = stable_diffusion()
    convfusion.convert(pipe)
    drop_attention(pipe)
    with pytest.raises(ConvFusionError, match="dropped"):
        Studio(pipe, "sd")


def test_short_names_of_sites_tell_them_apart():
    for kind in PIPELINES:
        paths = [site.path for site in list_sites(denoiser_of(PIPELINES[kind]()))]
        names = label_sites(paths)
        assert list(names) == paths and len(set(names.values())) == len(paths)
        assert all(len(names[path]) < len(path) for path in paths)
    same = ["a.attn1", "a.blocks.attn1"]
    assert label_sites(same) == dict(zip(same, same, strict=True))


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_attention_from_a_point_is_that_of_the_sample_with_the_prompt(kind):
    """Against the probabilities of diffusers' own attention without guidance."""
    studio = make_studio(kind)
    drawn = studio.draw(TEACHER, wish_for(studio, steps=1), Job())
    views = look_from(studio, watch_call(studio, drawn.calls[0]), (0.99, 0.0))
    taken = {}

    def keep(path):
        def see(module, args, kwargs):
            tokens = args[0] if args else kwargs["hidden_states"]
            query, key = (module.head_to_batch_dim(f(tokens)) for f in (module.to_q, module.to_k))
            taken[path] = module.get_attention_scores(query, key).mean(0)

        return see

    stock = PIPELINES[kind]()
    sites = list_sites(denoiser_of(stock))
    for site in sites:
        module = denoiser_of(stock).get_submodule(site.path)
        module.register_forward_pre_hook(keep(site.path), with_kwargs=True)
    generate(stock, [PROMPTS[kind]], seeds=[5], steps=1, guidance=1.0)
    assert {view.path for view in views} == {site.path for site in sites}
    for view in views:
        height, width = view.grid
        assert view.query == (height - 1, 0)
        wanted = taken[view.path][(height - 1) * width].view(height, width)
        assert torch.allclose(view.attention.weights, wanted, atol=1e-5)
        for reach in (view.attention, view.block):
            assert reach.weights.sum().item() == pytest.approx(1, abs=1e-5)
            assert reach.score_mass == sorted(reach.score_mass)
            assert reach.score_mass[-1] == pytest.approx(1) and reach.within % 2 == 1
        assert len(view.uniform) == len(view.attention.score_mass) == max(view.grid)
        assert view.mixer.startswith("DeltaConv")


def test_a_look_at_an_earlier_step_sees_what_was_given_then():
    studio = make_studio()
    calls = studio.draw(TEACHER, wish_for(studio), Job()).calls
    first, last, again = (watch_call(studio, calls[i]) for i in (0, -1, 0))
    assert all(
        torch.equal(a.given.tokens, b.given.tokens) for a, b in zip(first, again, strict=True)
    )
    assert not torch.equal(first[0].given.tokens, last[0].given.tokens)
    with pytest.raises(ConvFusionError, match="outside"):
        look_from(studio, first, (0.5, 1.5))


def test_a_block_depends_on_what_it_computes_with():
    torch.manual_seed(0)
    given, token = TokenSample(torch.randn(1, 35, 8), (5, 7)), 16  # row 2, column 2 of 5×7
    window = measure_dependence(Depthwise(3).build(8, 2), given, token).view(5, 7)
    inside = torch.zeros(5, 7, dtype=torch.bool)
    inside[1:4, 1:4] = True
    assert bool((window[inside] > 0).all()) and float(window[~inside].abs().max()) == 0
    mean = measure_dependence(MeanOnly().build(8, 2), given, token)
    assert torch.allclose(mean, torch.full((35,), 1 / 35))
    assert measure_dependence(Removed().build(8, 2), given, token) is None
    assert given.tokens.requires_grad is False


def test_a_dependence_is_the_norm_of_the_jacobian():
    torch.manual_seed(0)
    mixer, tokens = DeltaConv(kernel_size=3).build(64, 2), torch.randn(1, 16, 64)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    whole = torch.autograd.functional.jacobian(lambda x: mixer(x, (4, 4))[0, 5], tokens)
    exact = whole[:, 0].square().sum((0, 2)).sqrt()
    assert torch.allclose(
        measure_dependence(mixer, TokenSample(tokens, (4, 4)), 5), exact / exact.sum(), atol=0.03
    )


def test_beside_a_text_a_dependence_is_that_on_the_values_of_the_image():
    torch.manual_seed(0)
    image, text = (Heads(*torch.randn(3, 1, 2, n, 4)) for n in (12, 5))
    values = image.value.transpose(1, 2).flatten(2)
    given = TokenSample(values, (3, 4), None, JointTokens(image, text))
    mixer = Halo(2, 4, 0, 1.0, 1.0).build_joint(8, 2)  # all of the attention
    found = measure_dependence(mixer, given, 5)
    keys = torch.cat([image.key, text.key], 2)
    maps = (image.query[:, :, 5:6] @ keys.transpose(2, 3) / 2).softmax(-1)[0, :, 0, :12]
    exact = maps.square().sum(0).sqrt()
    assert torch.allclose(found, exact / exact.sum(), atol=0.02)


def test_what_is_not_finite_is_refused():
    studio = make_studio()
    attention = studio.teacher.get_submodule(next(iter(studio.labels)))
    tokens = torch.full((1, 16, attention.query_dim), torch.nan)
    with pytest.raises(ConvFusionError, match="not finite"):
        attend(attention, TokenSample(tokens, (4, 4)), 3)


def test_cards_show_every_site_and_no_text_as_markup():
    studio = make_studio(mixer=DeltaConv(kernel_size=3))
    drawn = studio.draw(TEACHER, wish_for(studio), Job())
    views = look_from(studio, watch_call(studio, drawn.calls[1]), (0.5, 0.5))
    labels = {path: f"<b>{label}" for path, label in studio.labels.items()}
    page = show.show_views(drawn.image, views, labels)
    assert page.count("<section") == len(views) and page.count("<img") == 2 * len(views)
    assert "<b>" not in page and "&lt;b&gt;" in page and "http" not in page
    assert "80% within" in page and "ERF" in page
    seen = watch_call(studio, drawn.calls[0])
    none = make_studio(mixer=Removed())
    page = show.show_views(drawn.image, look_from(none, seen, (0, 0)), labels)
    assert page.count("looks at no token") == len(views)
    bare = Studio(stable_diffusion(), "sd")
    page = show.show_views(drawn.image, look_from(bare, seen, (0, 0)), labels)
    assert page.count("<img") == len(views) and "Block:" not in page


def test_small_pictures_are_enlarged_and_a_point_is_marked_where_it_is():
    small = Image.new("RGB", (64, 32), "white")
    assert show.enlarge(small).size == (512, 256)
    large = Image.new("RGB", (600, 700))
    assert show.enlarge(large).size == large.size
    marked = np.asarray(show.mark_point(small, (0.25, 0.5)))
    rows, columns = np.nonzero((marked != 255).any(-1))
    assert abs(rows.mean() - 64) < 1.5 and abs(columns.mean() - 256) < 1.5


def test_a_line_tells_seconds_and_closeness():
    assert show.describe_drawn("teacher", 1.23, None) == "**teacher** · 1.2 s"
    assert show.describe_drawn("student", 1.2, 20.06).endswith("PSNR 20.1 dB")
    assert "equal" in show.describe_drawn("student", 1.2, float("inf"))


def test_messages_are_text():
    assert say("<i> `a<b`", wrong=True).count("&lt;") == 2 and 'role="alert"' in say(
        "x", wrong=True
    )
    assert "<code>a b</code>" in say("type `a b`")
    assert "step 3 of 4" in show_progress("Drawing: x", 3, 4) and "75%" in show_progress("x", 3, 4)
    assert explain(ConvFusionError("so")) == "so"
    assert "smaller size" in explain(RuntimeError("CUDA out of memory. Tried …"))
    assert explain(RuntimeError("odd")) == "this failed: odd"


def test_a_visit_keeps_its_pictures_whole_and_leaves_nothing_behind():
    visit = Visit()
    one, two = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    paths = [visit.keep(image) for image in (one, two, one)]
    assert paths[0] == paths[2] != paths[1]
    assert Image.open(paths[0]).getpixel((0, 0)) == (255, 0, 0)
    visit.leave()
    with pytest.raises(FileNotFoundError):
        Image.open(paths[0])
    assert visit.job.stopped and not visit.drawn


def test_an_evaluation_begins_with_its_worst_pictures(tmp_path):
    write_evaluation(tmp_path, [20.0, None, 12.5, 30.0] + [40.0] * PAGE)
    gallery = open_gallery(f" {tmp_path} ")
    assert [s.index for s in gallery.samples[:3]] == [2, 0, 3] and gallery.samples[-1].index == 1
    assert gallery.student == "mine" and gallery.pages == 2
    assert len(gallery.on_page(1)) == PAGE and len(gallery.on_page(2)) == 4
    worst = gallery.samples[0]
    pair, words = gallery.show_pair(worst)
    assert words.startswith("12.5 dB · prompt 2") and words.endswith("…")
    assert pair.getpixel((0, 0)) == (10, 2, 0) and pair.getpixel((pair.width - 1, 0)) == (20, 2, 0)
    sides = gallery.read_sides(worst)
    assert [image.getpixel((0, 0))[0] for image in sides.values()] == [10, 20, 30]
    assert "seed 7" in describe_sample(worst) and "PSNR 9.0 dB" in describe_sample(worst)
    assert gallery.show_pair(gallery.samples[-1])[1].startswith("equal")
    (tmp_path / "student" / "00002.png").write_bytes(b"no picture")
    with pytest.raises(ConvFusionError, match="missing or damaged"):
        gallery.show_pair(worst)


def test_a_folder_that_is_no_evaluation_is_a_message(tmp_path):
    for folder, words in (
        (" ", "name the folder"),
        (str(tmp_path / "none"), "there is no folder"),
        (str(tmp_path), "no finished evaluation"),
    ):
        with pytest.raises(ConvFusionError, match=words):
            open_gallery(folder)
    for content, words in (
        ("{", "evaluation.json"),
        ("[]", "no evaluation of this version"),
        (json.dumps({"schema": SCHEMA, "samples": [{"index": 0}]}), "damaged"),
        (json.dumps({"schema": SCHEMA, "samples": 3}), "damaged"),
    ):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(ConvFusionError, match=words):
            open_gallery(str(tmp_path))
    write_evaluation(tmp_path, ["near"])
    with pytest.raises(CheckpointError, match="damaged"):
        open_gallery(str(tmp_path))


def test_a_port_that_is_taken_is_one_line(run):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("app", "--port", port)
        assert code == 2 and err.count("\n") == 1
        assert f"port {port} of 127.0.0.1 cannot be used" in err and "--port" in err
    check_port(port)
    for wrong in (0, 70000):
        with pytest.raises(ConvFusionError, match="lies between"):
            check_port(wrong)


def test_without_gradio_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = run("app")
    assert code == 2 and "pip install 'convfusion[app]'" in err and err.count("\n") == 1


def test_libraries_are_told_to_keep_quiet_before_they_are_imported():
    script = """
import os, sys
import convfusion.cli
from convfusion.quiet import SWITCHES, keep_quiet
keep_quiet()
assert SWITCHES.items() <= os.environ.items()
print([name for name in ("gradio", "huggingface_hub", "onnxruntime") if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout == "[]\n", ran.stdout + ran.stderr


def test_teacher_and_student_share_their_weights():
    studio = make_studio()
    student = {id(tensor) for tensor in denoiser_of(studio.pipe).parameters()}
    for model in (studio.teacher, studio.removed, attention_teacher(denoiser_of(studio.pipe))):
        assert {id(tensor) for tensor in model.parameters()} <= student
