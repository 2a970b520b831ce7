"""What decides the numbers is part of what caches, evaluations and runs are known by."""

import io
import os
import shutil
import tarfile

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from PIL import Image
from tiny_pipelines import PIPELINES, dit_pipeline, stable_diffusion, stable_diffusion_xl

from convfusion import convert
from convfusion.data import Drawing, LatentDataset, build_cache, contents, open_cache, open_source
from convfusion.distill import DistillConfig, distill
from convfusion.errors import CheckpointError, ConvFusionError
from convfusion.evaluate.pair import check_twins
from convfusion.fingerprint import differences, identity, module_settings, scheduler_identity


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, colour="red", caption="red apple"):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.png", png(colour)), ("a.txt", caption.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    os.utime(path, (0, 0))  # as `rsync --times` and `tar -x` leave equal times
    return path


def write_folder(path, colour="red", caption="red apple"):
    path.mkdir(exist_ok=True)
    (path / "a.png").write_bytes(png(colour))
    (path / "a.txt").write_text(caption)
    for file in path.iterdir():
        os.utime(file, (0, 0))
    return path


def write_table(path, colour="red", caption="red apple"):
    """A table that names its pictures by their files."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    picture = path.with_suffix(".png")
    picture.write_bytes(png(colour))
    os.utime(picture, (0, 0))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": str(picture)}], kind)
    parquet.write_table(pa.table({"image": images, "text": [caption]}), path)
    return path


SOURCES = {"0.tar": write_shard, "folder": write_folder, "t.parquet": write_table}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_known_by_its_contents(tmp_path, monkeypatch, name, whole):
    if not whole:
        monkeypatch.setattr(contents, "WHOLE", 0)
    path, write = tmp_path / "a" / name, SOURCES[name]
    path.parent.mkdir()
    first = open_source(str(write(path))).describe()
    assert open_source(str(write(path))).describe() == first
    assert open_source(str(write(path, "blue"))).describe() != first
    changed = write(tmp_path / "b" / name if name == "t.parquet" else path, "red", "red grape")
    assert open_source(str(changed)).describe() != first


def test_a_copy_of_a_source_is_the_same_source(tmp_path):
    for name in ("0.tar", "folder"):
        path = tmp_path / "a" / name
        path.parent.mkdir(exist_ok=True)
        SOURCES[name](path)
        first = open_source(str(path)).describe()
        moved = tmp_path / "b" / name
        moved.parent.mkdir(exist_ok=True)
        shutil.move(path, moved)
        for each in (moved, *moved.rglob("*")):
            os.utime(each)
        assert open_source(str(moved)).describe() == first


def scaled(pipe):
    pipe.vae.register_to_config(scaling_factor=0.5)


def shifted(pipe):
    pipe.vae.register_to_config(shift_factor=0.5)


def shortened(pipe):
    pipe.tokenizer.model_max_length = 8


def other_word(pipe):
    pipe.tokenizer.add_tokens(["<style>"])


def other_activation(pipe):
    pipe.text_encoder.config.hidden_act = "gelu"


def other_class_names(pipe):
    pipe.labels["pear"] = pipe.labels.pop("red")


def other_empty_prompt(pipe):
    pipe.register_to_config(force_zeros_for_empty_prompt=False)


CHANGES = {
    scaled: ("sd", r"vae \(scaling_factor 0.18215 then, 0.5 now\)"),
    shifted: ("pixart", r"vae \(shift_factor none then, 0.5 now\)"),
    shortened: ("sdxl", r"tokenizer \(model_max_length 24 then, 8 now\)"),
    other_word: ("sd", r"tokenizer \(words"),
    other_activation: ("sd", r"text encoder \(hidden_act quick_gelu then, gelu now\)"),
    other_class_names: ("dit", r"class names \(digest"),
    other_empty_prompt: ("sdxl", r"empty prompt \(force_zeros true then, false now\)"),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_cache_rests_on_all_that_decides_its_numbers(tmp_path, change):
    family, message = CHANGES[change]
    pipe = PIPELINES[family]()
    side = 2 * pipe.components.get("unet", pipe.components.get("transformer")).config.sample_size
    for i in range(2):
        Image.effect_noise((side, side), 60 + i).convert("RGB").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("2" if family == "dit" else "red apple")
    source = open_source(str(tmp_path))
    build_cache(pipe, source, tmp_path / "cache")
    build_cache(pipe, source, tmp_path / "cache")  # the same again is no change
    open_cache(pipe, tmp_path / "cache")
    change(pipe)
    with pytest.raises(ConvFusionError, match=f"begun with another {message}"):
        build_cache(pipe, source, tmp_path / "cache")
    with pytest.raises(ConvFusionError, match=f"built with another {message}"):
        open_cache(pipe, tmp_path / "cache")


def test_drawn_latents_rest_on_scheduler_teacher_and_drawing(tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple\n")

    def build(pipe, **options):
        drawing = Drawing(**{"steps": 1, "guidance": 1.0, **options})
        source = open_source(str(tmp_path / "prompts.txt"), drawing=drawing)
        return build_cache(pipe, source, tmp_path / "cache")

    pipe = stable_diffusion()
    build(pipe)
    for options, name in (({"steps": 2}, "steps 1 then, 2 now"), ({"seed": 3}, "seed 0 then, 3")):
        with pytest.raises(ConvFusionError, match=rf"another source \({name}"):
            build(pipe, **options)
    pipe.scheduler = DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ConvFusionError, match=r"another scheduler \(beta_schedule linear then"):
        build(pipe)
    pipe = stable_diffusion()
    pipe.unet.conv_in.weight.data += 1
    with pytest.raises(ConvFusionError, match=r"another teacher \(weights"):
        build(pipe)


def test_numbers_that_cannot_be_drawn_with_leave_nothing(tmp_path):
    (tmp_path / "prompts.txt").write_text("red apple\n")
    pipe, out = stable_diffusion(), tmp_path / "cache"
    source = open_source(str(tmp_path / "prompts.txt"), drawing=Drawing(steps=5000))
    with pytest.raises(ConvFusionError, match="5000 steps cannot be drawn"):
        build_cache(pipe, source, out)
    assert not out.exists()
    for bad in ({"seed": -1}, {"guidance": -1.0}, {"steps": 0}, {"seed": 2**64}):
        with pytest.raises(ConvFusionError, match="must be"):
            Drawing(**bad)
    drawing = Drawing(seed=2**64 - 1, per_prompt=2)
    with pytest.raises(ConvFusionError, match="below 2⁶⁴"):
        open_source(str(tmp_path / "prompts.txt"), drawing=drawing)


def test_a_cache_with_nothing_in_it_may_be_begun_otherwise(tmp_path):
    data = write_folder(tmp_path / "data")
    pipe, out = stable_diffusion(), tmp_path / "cache"

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(pipe, open_source(str(data)), out, on_progress=stop)
    assert (out / "cache.json").exists() and not list((out / "chunks").iterdir())
    assert len(build_cache(pipe, open_source(str(data)), out, half=True)) == 1


def test_adapters_and_their_strength_count():
    pipe = stable_diffusion()
    plain = module_settings(pipe.unet)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="one")
    full = module_settings(pipe.unet)
    pipe.unet.set_adapters(["one"], weights=[0.5])
    half = module_settings(pipe.unet)
    assert len({each.get("adapters") for each in (plain, full, half)}) == 3
    pipe.unet.disable_adapters()
    assert module_settings(pipe.unet) == plain


def test_what_changes_no_number_does_not_count():
    pipe = stable_diffusion_xl()
    first = identity(pipe)
    pipe.tokenizer(["red"], padding="max_length", truncation=True, max_length=5)
    pipe.vae.register_to_config(sample_size=99)
    pipe.text_encoder.config.attention_dropout = 0.1
    pipe.scheduler.set_timesteps(3)
    assert differences(first, identity(pipe)) == []
    pipe.text_encoder_2 = None
    assert differences(first, identity(pipe)) == []
    assert scheduler_identity(pipe.scheduler) == scheduler_identity(
        DDIMScheduler(clip_sample=False)
    )


@pytest.mark.parametrize("change", [scaled, shortened, other_activation])
def test_twins_have_equal_settings_too(change):
    pipe, teacher = stable_diffusion(), stable_diffusion()
    check_twins(pipe, teacher)
    change(teacher)
    with pytest.raises(ConvFusionError, match=r"twin: another .* in the teacher, .* here"):
        check_twins(pipe, teacher)


def test_twins_have_equal_class_names():
    pipe, teacher = dit_pipeline(), dit_pipeline()
    other_class_names(teacher)
    with pytest.raises(ConvFusionError, match="twin: another class names"):
        check_twins(pipe, teacher)


def test_a_run_is_resumed_with_what_it_rests_on(tmp_path):
    def run(steps, pipe, latents=torch.zeros(2, 4, 8, 8), captions=("red", "green")):
        data = LatentDataset(latents, list(captions))
        config = DistillConfig(steps=steps, batch_size=1, tracker="none")
        return distill(pipe, data, config, tmp_path, resume=True)

    def converted():
        pipe = stable_diffusion()
        convert(pipe)
        return pipe

    run(1, converted())
    pipe = converted()
    pipe.scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    with pytest.raises(CheckpointError, match=r"another scheduler \(prediction_type epsilon then"):
        run(2, pipe)
    with pytest.raises(CheckpointError, match=r"another data \(latents"):
        run(2, converted(), latents=torch.ones(2, 4, 8, 8))
    with pytest.raises(CheckpointError, match=r"another data \(captions"):
        run(2, converted(), captions=("red", "blue"))
    pipe = converted()
    shortened(pipe)
    with pytest.raises(CheckpointError, match=r"another tokenizer \(model_max_length"):
        run(2, pipe)
    assert run(2, converted()).steps == 2
