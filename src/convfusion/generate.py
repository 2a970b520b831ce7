"""Draw pictures with a pipeline, each from a seed of its own."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from convfusion import files
from convfusion.errors import ConvFusionError
from convfusion.families import (
    Denoiser,
    denoiser_of,
    family_of,
    frame_scale,
    native_size,
    pixel_unit,
)
from convfusion.families.calls import check_call, cut_options
from convfusion.families.patches import copied_without_patches, replaced_attributes, wrapped_method
from convfusion.progress import Bar, Progress
from convfusion.schedule import is_flow
from convfusion.text import check_prompts, one_line

SEEDS = 2**64  # of torch's generators
GUIDANCES = 1e3  # far above any that a model is used with


def generate(
    pipe: Any,
    prompts: list[str],
    *,
    seeds: list[int] | None = None,
    steps: int = 25,
    guidance: float = 5.0,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
    **options: Any,
) -> list[Image.Image]:
    """One picture per prompt; a picture depends on its prompt and seed, not on its batch.

    Args:
        pipe: a text-to-image or DiT pipeline, converted or not.
        prompts: what to draw; for DiT class names or numbers.
        seeds: one per prompt, each in [0, 2⁶⁴); by default 0, 1, 2, …
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 or less is none.
        size: (height, width) in pixels, by default the pipeline's own.
        batch_size: prompts drawn at once.
        progress: show the steps of all batches and the time left on standard error; None shows
            them on a terminal only, and not for a pipeline whose own bar was switched off.
        options: further arguments of the pipeline's call. Lists and tensors with one for each
            prompt, such as pictures, negative prompts, latents or embeddings, are cut with the
            batches. `prompt_embeds` take the place of the prompts, which are then only counted.

    Raises:
        ConvFusionError: there are not as many seeds or other options as prompts, a prompt is no
            text, a number is out of range, or the pipeline draws from more than it is given.
            Nothing is drawn.
    """
    seeds = list(range(len(prompts))) if seeds is None else seeds
    check_drawing(pipe, prompts, seeds, steps, guidance, size, batch_size, options)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, **options}
    images: list[Image.Image] = []
    for drawn in draw_batches(pipe, prompts, seeds, size, batch_size, progress, settings):
        images.extend(drawn.images)  # `+=` would add an array of numpy, which old diffusers give
    return images


def draw_batches(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    size: tuple[int, int] | None,
    batch_size: int,
    progress: bool | None,
    options: Mapping[str, Any],
) -> Iterator[Any]:
    """Call a pipeline for one batch of prompts after the other, as `check_drawing` allows.

    Args:
        pipe, prompts, seeds, size, batch_size, progress: as for `generate`.
        options: further arguments of the pipeline's call.

    Yields:
        What the call returned.
    """
    family = family_of(denoiser_of(pipe))
    sides = {}
    if size is not None and not family.fixed_size:
        sides = {"height": size[0], "width": size[1]}
    options = family.guide({**family.call_options, **options})
    batches = math.ceil(len(prompts) / batch_size)
    with shown_steps(pipe, batches, progress), silent(pipe):
        for start in range(0, len(prompts), batch_size):
            stop = start + batch_size
            embedded = options.get("prompt_embeds") is not None
            part = None if embedded else family.call_prompts(pipe, prompts[start:stop])
            yield pipe(
                **{family.prompt_argument: part},
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[start:stop]],
                **sides,
                **cut_options(pipe, options, start, stop, len(prompts)),
            )


def check_drawing(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    guidance: float,
    size: tuple[int, int] | None,
    batch_size: int,
    options: Mapping[str, Any],
    *,
    clips: bool = False,
) -> None:
    """Raise a ConvFusionError unless a pipeline can draw this; see `generate`."""
    check_call(pipe, prompts, size, options, clips=clips)
    if len(seeds) != len(prompts):
        raise ConvFusionError(f"there are {len(prompts)} prompts and {len(seeds)} seeds")
    check_prompts(prompts)
    check_numbers(seeds, steps, guidance, batch_size)
    check_steps(pipe, steps)
    if size is not None:
        check_size(pipe, size)
    check_guidance(pipe, guidance)


def check_numbers(seeds: Iterable[int], steps: int, guidance: float, batch_size: int) -> None:
    """Raise a ConvFusionError for numbers that no pipeline can draw with."""
    if steps < 1 or batch_size < 1:
        raise ConvFusionError("steps and batch_size must be at least 1")
    if not 0 <= guidance < GUIDANCES:
        raise ConvFusionError(
            f"guidance must be from 0 to {GUIDANCES:g}, not {guidance:g} (1 or less is none)"
        )
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise ConvFusionError(f"seeds must be 0 or more and below 2⁶⁴, not {seed}")


def check_steps(pipe: Any, steps: int) -> None:
    """Raise a ConvFusionError if there are more steps than timesteps to take."""
    if is_flow(pipe.scheduler):
        return  # its times are real numbers, of which there are as many as one likes
    timesteps = getattr(pipe.scheduler.config, "num_train_timesteps", math.inf)
    scheduler = copied_without_patches(pipe.scheduler)
    if steps <= timesteps:
        scheduler.set_timesteps(steps)
    # Some spacings begin at the end of the schedule plus an offset, which may lie beyond it.
    if steps > timesteps or max(scheduler.timesteps) >= timesteps:
        raise ConvFusionError(
            f"{steps} steps cannot be drawn: the noise schedule has {timesteps} timesteps, and "
            "fewer steps than those are needed"
        )


def check_size(pipe: Any, size: tuple[int, int]) -> None:
    """Raise a ConvFusionError unless the denoiser can work on pictures of (height, width)."""
    denoiser, own = denoiser_of(pipe), native_size(pipe)
    if family_of(denoiser).fixed_size and size != own:
        raise ConvFusionError(
            f"a {type(denoiser).__name__} draws at its own size only, {own[1]}×{own[0]}: leave "
            "the size out"
        )
    unit = pixel_unit(pipe)
    if any(side < unit or side % unit for side in size):
        near = [max(unit, round(side / unit) * unit) for side in size]
        raise ConvFusionError(
            f"{size[1]}×{size[0]} cannot be drawn: both sides must be multiples of {unit}; "
            f"the nearest size is {near[1]}×{near[0]}"
        )


def check_frames(pipe: Any, frames: int) -> None:
    """Raise a ConvFusionError unless a video pipeline can draw clips of so many frames."""
    if frames < 1:
        raise ConvFusionError(f"a clip has at least 1 frame, not {frames}")
    scale = frame_scale(pipe)
    if (frames - 1) % scale:
        near = max(0, round((frames - 1) / scale)) * scale + 1
        raise ConvFusionError(
            f"{frames} frames cannot be drawn: their number must be 1 more than a multiple of "
            f"{scale}; the nearest is {near}"
        )
    denoiser = denoiser_of(pipe)
    family_of(denoiser).check_frames(denoiser, frames)


def check_guidance(pipe: Any, guidance: float) -> None:
    """Raise a ConvFusionError for a guidance scale that the denoiser cannot draw with."""
    denoiser = denoiser_of(pipe)
    family_of(denoiser).check_guidance(denoiser, guidance)


def can_guide(pipe: Any) -> bool:
    """Whether a pipeline can draw with a guidance scale above 1."""
    try:
        check_guidance(pipe, GUIDANCES)
    except ConvFusionError:
        return False
    return True


@contextmanager
def swapped_denoiser(pipe: Any, denoiser: Denoiser) -> Iterator[Any]:
    """Let a pipeline draw with another denoiser of the same family for a while."""
    own = denoiser_of(pipe)
    with replaced_attributes(pipe, **{family_of(own).component: denoiser}):
        yield pipe


@contextmanager
def silent(pipe: Any) -> Iterator[None]:
    """Draw without the pipeline's own progress bar."""
    config = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
    with replaced_attributes(pipe, _progress_bar_config=config):
        yield


@contextmanager
def shown_steps(pipe: Any, batches: int, progress: bool | None) -> Iterator[None]:
    """Show one bar for the steps of all batches in place of the pipeline's bar for each of them."""
    if progress is None and getattr(pipe, "_progress_bar_config", {}).get("disable"):
        progress = False
    with Progress(progress) as bars:
        bar = bars.add("drawing")

        def count_steps(own_bar: Any, iterable: Any = None, total: int | None = None) -> Any:
            steps = len(iterable) if total is None else total
            bar.update(total=steps * batches)
            shown = own_bar(iterable=iterable, total=total)
            return _advancing(bar, iterable) if iterable is not None else _Counted(shown, bar)

        if not bars.shown or not hasattr(pipe, "progress_bar"):
            yield
            return
        with wrapped_method(pipe, "progress_bar", count_steps):
            yield


def _advancing(bar: Bar, steps: Iterable[Any]) -> Iterator[Any]:
    for step in steps:
        yield step
        bar.advance()


class _Counted:
    """A pipeline's own bar, of which our bar counts the updates."""

    def __init__(self, own: Any, bar: Bar) -> None:
        self._own, self._bar = own, bar

    def __enter__(self) -> _Counted:
        self._own.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._own.__exit__(*error)

    def update(self, steps: int = 1) -> None:
        self._own.update(steps)
        self._bar.advance(steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def describe_picture(
    pipe: Any,
    prompt: str,
    *,
    seed: int,
    steps: int,
    guidance: float,
    negative_prompt: str = "",
    model: str = "",
    blocks: str = "",
    frames: int | None = None,
) -> dict[str, str]:
    """How a picture or clip was drawn, as the text chunks of its PNG; see `write_picture`.

    Beside a key for each value there is `parameters`, all of them in the form that other
    programs read.

    Args:
        pipe: that drew it.
        prompt, seed, steps, guidance, negative_prompt: as for `generate`.
        model: what the pipeline is called.
        blocks: what its trained blocks are called.
        frames: of a clip.
    """
    from convfusion import __version__

    version = f"ConvFusion {__version__}"
    sampler = type(pipe.scheduler).__name__
    settings = {"Steps": steps, "Sampler": sampler, "CFG scale": guidance, "Seed": seed}
    settings |= {"Frames": frames} if frames is not None else {}
    settings |= {"Model": model, "Blocks": blocks, "Version": version}
    lines = [one_line(prompt)]
    lines += [f"Negative prompt: {one_line(negative_prompt)}"] if negative_prompt else []
    lines.append(", ".join(f"{k}: {one_line(v)}" for k, v in settings.items() if v != ""))
    record = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed, "steps": steps}
    record |= {"frames": frames} if frames is not None else {}
    record |= {"guidance": guidance, "model": model, "blocks": blocks, "version": version}
    chunks = {name: str(value) for name, value in record.items() if value != ""}
    return {"parameters": "\n".join(lines), **chunks}


def write_picture(path: str | Path, image: Image.Image, record: Mapping[str, str]) -> None:
    """Write a picture, whole or not at all, in the format that its name ends in.

    Args:
        path: of the file.
        image: the picture.
        record: text by key, such as `describe_picture` gives. A PNG keeps it, in chunks that
            Pillow shows as `Image.open(path).text`; other formats have no room for it.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path, buffer = Path(path), io.BytesIO()
    kind = Image.registered_extensions()[path.suffix.lower()]
    chunks = PngImagePlugin.PngInfo()
    for name, text in record.items():
        chunks.add_text(name, text)
    options = {"pnginfo": chunks} if kind == "PNG" else {}
    image.save(buffer, kind, **options)
    files.write_bytes(path, buffer.getvalue())
