"""Patches of objects that are not ours come off as if they had never been there, in any order."""

from __future__ import annotations

import copy
import inspect
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import autoencoder, stable_diffusion
from torch import nn

from convfusion.distill.environment import decoded_as_it_is
from convfusion.evaluate.drawing import recorded_latents
from convfusion.families.patches import copied_without_patches, replaced_attributes, wrapped_method
from convfusion.highres import Ladder, highres
from convfusion.highres.savings import chunk_feed_forward, run_one_at_a_time
from convfusion.highres.vae_tiles import VaeTiles, decode_in_tiles, tile_vae


class Thing:
    kind = "a thing"

    def __init__(self) -> None:
        self.count = 0

    def add(self, amount: int) -> int:
        self.count += amount
        return self.count


def twice(found: Any, amount: int) -> int:
    return found(2 * amount)


@pytest.mark.parametrize("own", [False, True])
def test_what_was_there_is_put_back(own):
    thing = Thing()
    if own:
        thing.add = lambda amount: 100 + amount  # as accelerate, DeepCache and compilers do
    before = dict(vars(thing))
    with replaced_attributes(thing, kind="another", count=7):
        assert (thing.kind, thing.count) == ("another", 7)
    with wrapped_method(thing, "add", twice):
        assert thing.add(1) == (102 if own else 2), "a wrapper calls what it found"
        assert list(inspect.signature(thing.add).parameters) == ["amount"]
    assert vars(thing).get("add") is before.get("add")
    assert vars(thing).keys() == before.keys()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_puts_it_back_too(stop):
    thing = Thing()
    with suppress(stop), wrapped_method(thing, "add", twice), replaced_attributes(thing, kind="b"):
        raise stop
    assert vars(thing) == {"count": 0}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
def test_patches_come_off_in_any_order(order):
    thing = Thing()
    stacks = [ExitStack() for _ in order]
    for factor, stack in zip((2, 3, 5), stacks, strict=True):
        stack.enter_context(
            wrapped_method(
                thing, "add", lambda found, amount, factor=factor: found(amount * factor)
            )
        )
        stack.enter_context(replaced_attributes(thing, kind=factor))
    left = 30
    for index in order:
        thing.count = 0
        assert thing.add(1) == left
        stacks[index].close()
        left //= (2, 3, 5)[index]
    assert vars(thing) == {"count": 1 * thing.count}
    assert thing.kind == "a thing"


def test_what_others_put_over_it_stays():
    thing = Thing()
    with wrapped_method(thing, "add", twice), replaced_attributes(thing, kind="b"):
        under = thing.add
        thing.add = theirs = lambda amount: under(amount) + 100
        thing.kind = "theirs"
        assert thing.add(1) == 102
    assert thing.add is theirs and thing.kind == "theirs"
    assert thing.add(1) == 103, "what it wrapped does nothing any more"


def test_a_compiled_module_is_patched_where_it_keeps_its_attributes():
    class Coder(nn.Linear):
        def decode(self) -> str:
            return "picture"

    coder = Coder(2, 2)
    compiled, whole = torch.compile(coder, backend="eager"), set(vars(coder))
    with wrapped_method(compiled, "decode", lambda found: f"{found()}!"):
        assert compiled.decode() == coder.decode() == "picture!"
    assert set(vars(coder)) == whole
    assert "decode" not in vars(compiled)


def test_a_copy_does_not_drive_the_original():
    thing = Thing()
    with wrapped_method(thing, "add", twice):
        assert copy.copy(thing).add(1) == 2 and thing.count == 2, "which a plain copy does"
        made = copied_without_patches(thing)
        assert made.add(1) == 3 and thing.count == 2

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    forward = model[1].forward
    model[1].forward = lambda tokens: forward(tokens)
    model[0]._hf_hook = object()
    shared = {id(p): p for p in model.parameters()}
    made = copied_without_patches(model, shared)
    assert "forward" not in vars(made[1]) and not hasattr(made[0], "_hf_hook")
    assert made[1].weight is model[1].weight and "forward" in vars(model[1])


def layers(pipe: Any) -> dict[str, Any]:
    """What lies on the parts of a pipeline that are patched while it draws."""
    laid = {"bar": dict(getattr(pipe, "_progress_bar_config", {})), "scheduler": pipe.scheduler}
    for part in ("unet", "vae", "scheduler"):
        for name in ("forward", "decode", "encode", "step", "set_timesteps"):
            laid[f"{part}.{name}"] = vars(getattr(pipe, part)).get(name)
    return laid


def offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def compile_decode(pipe: Any) -> None:
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")


def wrap_forward(pipe: Any) -> None:  # as DeepCache does
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def wrap_step(pipe: Any) -> None:
    step = pipe.scheduler.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        pipe.scheduler.counted += 1
        return step(*args, **kwargs)

    pipe.scheduler.step, pipe.scheduler.counted = counted, 0


@pytest.mark.parametrize("lay", [offload, compile_decode, wrap_forward, wrap_step])
def test_a_ladder_leaves_what_others_have_put_there(lay):
    pipe = stable_diffusion()
    pipe.set_progress_bar_config(disable=True, desc="mine")
    expected = climb(pipe)
    lay(pipe)
    before = layers(pipe)
    assert np.array_equal(climb(pipe), expected)
    if lay is offload:  # diffusers itself puts new hooks there after every call
        assert vars(pipe.unet)["forward"] and pipe.unet._hf_hook
        before = layers(pipe)
    assert layers(pipe) == before
    with run_one_at_a_time(pipe.unet), chunk_feed_forward(pipe.unet, (8, 8)):
        pass
    assert layers(pipe) == before
    pipe.scheduler.set_timesteps(4)
    assert len(pipe.scheduler.timesteps) == 4


def climb(pipe: Any, **options: Any) -> np.ndarray:
    ladder = Ladder(strength=0.5)
    drawn = highres(pipe, ["red"], (32, 32), steps=2, guidance=2.0, ladder=ladder, **options)
    return np.array(drawn[0])


def test_a_ladder_climbs_while_a_run_or_an_evaluation_has_its_own_patches():
    pipe = stable_diffusion()
    expected, before = climb(pipe), layers(pipe)
    with decoded_as_it_is(pipe.vae), recorded_latents(pipe, 1) as path:
        assert np.array_equal(climb(pipe), expected)
    assert len(path) == 3, "two steps of the first rung, one of the second"
    assert layers(pipe) == before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_a_ladder_that_is_stopped_leaves_the_pipeline_as_it_was(stop):
    pipe = stable_diffusion().to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    before, held = layers(pipe), dict(vars(pipe.scheduler))

    def halt(rung: int, rungs: int, step: int, steps: int) -> None:
        if rung == 2:
            raise stop

    with pytest.raises(stop):
        climb(pipe, on_step=halt)
    assert layers(pipe) == before and vars(pipe.scheduler).keys() == held.keys()
    assert pipe.vae.dtype == torch.float16


def test_chunks_that_were_asked_for_stay():
    pipe = stable_diffusion()
    blocks = [module for module in pipe.unet.modules() if hasattr(module, "_chunk_size")]
    for block in blocks:
        block.set_chunk_feed_forward(2, dim=1)
    with chunk_feed_forward(pipe.unet, (200, 200)):
        assert {block._chunk_size for block in blocks} != {2}
    assert blocks and {(block._chunk_size, block._chunk_dim) for block in blocks} == {(2, 1)}


@torch.no_grad()
def test_tiles_are_made_of_what_was_found_even_if_it_is_compiled():
    vae = autoencoder()
    tiles, latents = VaeTiles(side=6, margin=4, fade=1), torch.randn(1, 4, 12, 12)
    expected = decode_in_tiles(vae, latents, tiles)
    decode = vae.decode
    vae.decode = torch.compile(lambda *args, **kwargs: decode(*args, **kwargs), backend="eager")
    vae.decode(torch.randn(1, 4, 10, 10))  # compiled without the hooks that share statistics
    with tile_vae(vae, tiles):
        assert torch.equal(vae.decode(latents).sample, expected)
