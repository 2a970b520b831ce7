"""A converted denoiser refuses what would write it without its blocks."""

from __future__ import annotations

from typing import Any, NoReturn

from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser

_GUARDED = ("save_pretrained", "push_to_hub")


def refuse_saving(*args: Any, **options: Any) -> NoReturn:
    """Stands in place of `save_pretrained` and `push_to_hub` of a converted denoiser.

    Raises:
        ConvFusionError: always. What they write has the blocks among the stock weights, draws with
            the attention and not with the blocks, and can be loaded by nothing.
    """
    raise ConvFusionError(
        "a converted model cannot be saved with save_pretrained or push_to_hub, which know nothing "
        "of its blocks: convfusion.save_pipeline(pipe, folder) writes the whole pipeline, "
        "convfusion.save(pipe, folder) the blocks alone, and convfusion.checkpoint.push puts "
        "blocks on the Hub; or revert it first"
    )


def guard(model: Denoiser) -> None:
    """Let a converted denoiser refuse what would write it without its blocks."""
    before = {name: model.__dict__[name] for name in _GUARDED if name in model.__dict__}
    model._convfusion_saving = before
    for name in _GUARDED:
        setattr(model, name, refuse_saving)


def unguard(model: Denoiser) -> None:
    """Undo `guard`: what others had put in these places is there again."""
    for name in _GUARDED:
        if model.__dict__.get(name) is refuse_saving:
            delattr(model, name)
            if name in model._convfusion_saving:
                setattr(model, name, model._convfusion_saving[name])
    del model._convfusion_saving
