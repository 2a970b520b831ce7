"""DiTTransformer2DModel: class-conditional transformers of one square size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from convfusion.errors import ConvFusionError
from convfusion.families.base import Denoiser, Family, Size, list_plain_sites
from convfusion.families.carrier import KeywordCarrier
from convfusion.families.sites import Site
from convfusion.families.values import Values

NO_CLASS = 1000  # under guidance, in diffusers' DiT pipeline

_CLASS = "DiTTransformer2DModel"


class DiT(Family):
    """Transformers that are told of a class; prompts are names or numbers of classes."""

    name = "dit"
    classes = (_CLASS,)
    component = "transformer"
    latents = "hidden_states"
    presets = {"dit": {"*": 13}}  # as PixArt, whose blocks it shares (the paper has no DiT)
    full_size = {"dit": (_CLASS, {"out_channels": 8})}
    fixed_size = True
    gives_latents = False
    prompt_argument = "class_labels"
    prompted = 0

    def list_sites(self, model: Denoiser) -> list[Site]:
        return list_plain_sites(model)

    def carrier(self, model: Denoiser) -> KeywordCarrier:
        return KeywordCarrier.of(DiTTransformer2DModel, model.config.patch_size)

    def patch_size(self, model: Denoiser) -> int:
        return model.config.patch_size

    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        labels = self.call_prompts(pipe, prompts)
        return {"class_labels": torch.tensor(labels, device=pipe.device)}

    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        return {"class_labels": values.zeros(batch)}

    def check_prompts(self, pipe: Any, prompts: Sequence[str]) -> None:
        self.call_prompts(pipe, prompts)

    def call_prompts(self, pipe: Any, prompts: Sequence[str]) -> list[int]:
        """Labels of classes, from their names or numbers; '' is the label of no class.

        Raises:
            ConvFusionError: the model has no such class.
        """
        none = pipe.transformer.config.num_embeds_ada_norm
        known = getattr(pipe, "labels", {})
        for prompt in prompts:
            digits = prompt.isascii() and prompt.isdigit() and len(prompt) < 10
            number = digits and int(prompt) <= none
            if prompt and prompt not in known and not number:
                raise ConvFusionError(
                    f"{prompt!r} is no class of this model: give a name or a number up to "
                    f"{none - 1}"
                )
        return [known[p] if p in known else int(p) if p else none for p in prompts]

    def check_guidance(self, model: Denoiser, guidance: float) -> None:
        """Raise a ConvFusionError if the pipeline would take one of the classes for none."""
        if guidance > 1 and model.config.num_embeds_ada_norm != NO_CLASS:
            raise ConvFusionError(
                f"this model has {model.config.num_embeds_ada_norm} classes, and diffusers' DiT "
                f"pipeline takes class {NO_CLASS} for none: it draws with a guidance of 1 only"
            )


DIT = DiT()
