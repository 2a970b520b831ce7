"""Options of a pipeline's call go with their prompts, in whatever batches these are drawn."""

from __future__ import annotations

import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import dit_pipeline, pixart_sigma, stable_diffusion, stable_diffusion_xl

from convfusion import ConvFusionError
from convfusion.families.calls import cut_options
from convfusion.generate import generate
from convfusion.highres import Ladder, highres

PROMPTS = ["red", "green", "apple"]
GREYS = [Image.new("RGB", (16, 16), (90 * i, 90 * i, 40)) for i in range(3)]
ARRAYS = np.stack([np.asarray(grey, "float32") / 255 for grey in GREYS])
TENSORS = torch.from_numpy(ARRAYS).permute(0, 3, 1, 2)


def pipeline(kind: str, **options: Any) -> Any:
    """A pipeline of another class, of the parts of the tiny one."""
    pipe = stable_diffusion()
    return getattr(diffusers, kind)(**{**pipe.components, **options}, requires_safety_checker=False)


def close(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2 for a, b in pairs)


def embeds(pipe: Any, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 5, 16, generator=torch.Generator().manual_seed(1))


SAME = {
    "pictures": ("StableDiffusionImg2ImgPipeline", lambda _: {"image": GREYS, "strength": 0.5}),
    "an array": ("StableDiffusionImg2ImgPipeline", lambda _: {"image": ARRAYS, "strength": 0.5}),
    "a tensor": ("StableDiffusionImg2ImgPipeline", lambda _: {"image": TENSORS, "strength": 0.5}),
    "a batch": ("StableDiffusionImg2ImgPipeline", lambda _: {"image": [TENSORS], "strength": 0.5}),
    "one picture": ("StableDiffusionImg2ImgPipeline", lambda _: {"image": GREYS[1]}),
    "masks": (
        "StableDiffusionInpaintPipeline",
        lambda _: {"image": GREYS, "mask_image": GREYS[::-1]},
    ),
    "latents": (
        "StableDiffusionPipeline",
        lambda _: {"latents": torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))},
    ),
    "negative": ("StableDiffusionPipeline", lambda _: {"negative_prompt": ["", "red", "apple"]}),
    "one negative": ("StableDiffusionPipeline", lambda _: {"negative_prompt": "apple"}),
    "embeddings": (
        "StableDiffusionPipeline",
        lambda pipe: {"prompt_embeds": embeds(pipe), "negative_prompt_embeds": -embeds(pipe)},
    ),
    "for all": (
        "StableDiffusionPipeline",
        lambda _: {"timesteps": None, "cross_attention_kwargs": {"scale": 0.5}},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_pictures_do_not_depend_on_the_batch(case):
    kind, told = SAME[case]
    pipe = pipeline(kind)
    settings = {"steps": 2, "guidance": 3.0, "seeds": [0] * 3, **told(pipe)}
    whole = generate(pipe, PROMPTS, batch_size=3, **settings)
    assert close(generate(pipe, PROMPTS, batch_size=2, **settings), whole)
    assert not close(whole[:1], whole[2:])


def test_other_pipelines_take_one_negative_prompt_for_all():
    for make in (stable_diffusion_xl, pixart_sigma):
        drawn = [
            generate(make(), ["red", "red"], steps=1, negative_prompt=negative)
            for negative in ("apple", ["apple", "apple"])
        ]
        assert close(*drawn)


def test_a_ladder_gives_each_prompt_its_own():
    pipe, ladder = stable_diffusion(), Ladder(strength=0.5)
    settings = {"steps": 2, "guidance": 3.0, "ladder": ladder}
    both = highres(
        pipe, ["red", "red"], (32, 32), seeds=[1, 1], negative_prompt=["", "apple"], **settings
    )
    one = highres(pipe, ["red"], (32, 32), seeds=[1], negative_prompt="apple", **settings)
    assert close(both[1:], one) and not close(both[:1], one)


def test_lists_for_all_prompts_are_handed_on_whole():
    pipe, masks = stable_diffusion(), [torch.ones(1, 1, 8, 8)] * 3
    options = {
        "timesteps": [3, 2, 1],
        "control_guidance_start": [0.0, 0.1, 0.2],
        "ip_adapter_image": GREYS,
        "original_size": (16, 16),
        "cross_attention_kwargs": {"ip_adapter_masks": masks, "boxes": TENSORS},
        "unheard_of": [1, 2, 3],
    }
    found = cut_options(pipe, options, 2, 4, 3)
    assert torch.equal(found["cross_attention_kwargs"].pop("boxes"), TENSORS[2:])
    options["cross_attention_kwargs"].pop("boxes")
    assert found == options


def test_pictures_of_several_control_nets_are_cut_net_by_net():
    pipe = stable_diffusion()
    pipe.controlnet = type("MultiControlNetModel", (), {"nets": [1, 2]})()
    found = cut_options(pipe, {"image": [GREYS, GREYS[::-1]]}, 1, 3, 3)
    assert found == {"image": [GREYS[1:], GREYS[1::-1]]}


REFUSED = {
    "3 prompts, and there are 2": {"negative_prompt": ["a", "b", "c"]},
    "prompt_embeds is for 1": {"prompt_embeds": torch.zeros(1, 5, 16)},
    "latents is for 3": {"latents": torch.zeros(3, 4, 8, 8)},
    "seeds tells the generator": {"generator": [torch.Generator()]},
    "steps tells the num_inference_steps": {"num_inference_steps": 3},
    "size tells the height": {"height": 16},
    "one picture is drawn for each": {"num_images_per_prompt": 2},
    "leave return_dict out": {"return_dict": False},
    "0 IP-Adapters are loaded": {"ip_adapter_image": GREYS},
}


@pytest.mark.parametrize("said", REFUSED)
@pytest.mark.parametrize("draw", [generate, highres])
def test_what_does_not_fit_is_refused_before_anything_is_drawn(said, draw):
    pipe = stable_diffusion()
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("drawn"))
    with pytest.raises(ConvFusionError, match=said):
        draw(pipe, ["red", "green"], size=(16, 16), **REFUSED[said])


def test_pipelines_that_want_more_than_prompts_are_refused():
    cases = {
        "StableDiffusionInpaintPipeline": "image and mask_image must be given",
        "StableDiffusionImg2ImgPipeline": "image must be given",
        "StableDiffusionInstructPix2PixPipeline": "image must be given",
    }
    for kind, said in cases.items():
        with pytest.raises(ConvFusionError, match=said):
            generate(pipeline(kind), ["red"])
    pipe = pipeline("StableDiffusionImg2ImgPipeline")
    with pytest.raises(ConvFusionError, match="pictures: leave the size out"):
        generate(pipe, ["red"], size=(16, 16), image=GREYS[0])
    with pytest.raises(ConvFusionError, match="no ladder"):
        highres(pipe, ["red"], (32, 32), image=GREYS[0])
    with pytest.raises(ConvFusionError, match="image is for 2 prompts"):
        generate(pipe, PROMPTS, image=GREYS[:2])
    for kind in (dit_pipeline, stable_diffusion):
        with pytest.raises(ConvFusionError, match="list of strings"):
            generate(kind(), "red")
    with pytest.raises(ConvFusionError, match=re.escape("takes no negative_prompt")):
        generate(dit_pipeline(), ["red"], negative_prompt="apple")


def test_a_denoiser_of_other_channels_than_its_pipeline_is_refused():
    pipe = stable_diffusion()
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ConvFusionError, match="takes 9 channels"):
        generate(pipe, ["red"])
