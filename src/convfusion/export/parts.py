"""What a pipeline has beside its denoiser, as files: tokenizers, text encoders, VAE decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.export.tracing import compare_outputs, measure_difference, save, trace
from convfusion.families import TextReader, denoiser_of, encode_conditioning, native_size
from convfusion.families.patches import replaced_attributes

MAPS = {0: "batch", 2: "height", 3: "width"}
# What text encoders are compared on: short, with signs and accents, and longer than any reads.
PROMPTS = ("Red apple, noto", "crème brûlée: 3 × (a+b) “quoted”", "a very long prompt " * 100)


class _TextStates(nn.Module):
    """A text encoder that gives what the denoiser is told: hidden states, and a pooled output."""

    def __init__(self, encoder: nn.Module, reader: TextReader) -> None:
        super().__init__()
        self.encoder, self.reader = encoder, reader

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        mask = tensors[1] if self.reader.masked else None
        layer = self.reader.layer
        read = self.encoder(tensors[0], attention_mask=mask, output_hidden_states=layer is not None)
        states = read.last_hidden_state if layer is None else read.hidden_states[layer]
        return (states, read.text_embeds) if self.reader.pooled else (states,)


class _Decoder(nn.Module):
    """The decoder of an autoencoder by itself."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.vae.decode(tensors[0], return_dict=False)[0]


def write_tokenizer(pipe: Any, reader: TextReader, path: Path) -> None:
    """Write a tokenizer as the library `tokenizers` reads it, which then pads and cuts as well.

    Raises:
        ConvFusionError: the tokenizer is of a kind that this library has no file for.
    """
    from tokenizers import Tokenizer

    slow = getattr(pipe, reader.tokenizer)
    fast = getattr(slow, "backend_tokenizer", None)
    if fast is None:
        raise ConvFusionError(
            f"the {reader.tokenizer} is a {type(slow).__name__}, which the library tokenizers "
            "cannot read"
        )
    alone = Tokenizer.from_str(fast.to_str())  # a copy: the pipeline's own stays as it is
    alone.enable_truncation(reader.words)
    alone.enable_padding(
        length=reader.words, pad_id=slow.pad_token_id, pad_token=str(slow.pad_token)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    alone.save(str(path))


@torch.no_grad()
def write_text_encoder(pipe: Any, reader: TextReader, path: Path) -> None:
    """Write a text encoder: token numbers in, hidden states and perhaps a pooled output out."""
    encoder = _TextStates(getattr(pipe, reader.encoder), reader).eval()
    ids = torch.arange(2 * reader.words).reshape(2, -1) % 3
    tensors = {"input_ids": ids}
    if reader.masked:
        tensors["attention_mask"] = torch.ones_like(ids)
    outputs = ["hidden_states", *(["pooled"] if reader.pooled else [])]
    axes = {name: {0: "batch"} for name in tensors}
    program = trace(encoder, tensors, axes, outputs, f"the {reader.encoder}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(program, encoder, path)


@torch.no_grad()
def write_decoder(pipe: Any, path: Path) -> float:
    """Write the decoder of the VAE, and return how far it is from PyTorch at worst."""
    channels = pipe.vae.config.latent_channels
    generator = torch.Generator().manual_seed(0)
    with replaced_attributes(pipe.vae, use_tiling=False, use_slicing=False):
        decoder = _Decoder(pipe.vae).eval()
        example = {"latents": torch.randn(2, channels, 12, 20, generator=generator)}
        program = trace(decoder, example, {"latents": MAPS}, ["picture"], "the VAE")
        path.parent.mkdir(parents=True, exist_ok=True)
        save(program, decoder, path)
        errors = []
        for size in ((1, 16, 16), (3, 8, 14)):
            batch, height, width = size
            latents = torch.randn(batch, channels, height, width, generator=generator)
            errors.append(measure_difference([decoder(latents)], path, {"latents": latents}))
    return max(errors)


def measure_texts(pipe: Any, readers: Sequence[TextReader], folder: Path) -> float:
    """How far tokenizers and text encoders in a folder are from what the pipeline itself reads.

    Returns:
        The largest difference over the largest value, at worst of the prompts that are compared.
    """
    with _quiet():
        told = encode_conditioning(pipe, list(PROMPTS), native_size(pipe))
    found = read_prompts(readers, folder, PROMPTS)
    width = told["encoder_hidden_states"].shape[-1]
    pooled = told.get("added_cond_kwargs", {}).get("text_embeds")
    expected = [told["encoder_hidden_states"], *([] if pooled is None else [pooled])]
    if found[0].shape[-1] != width or len(found) != len(expected):
        raise ConvFusionError(
            f"the text encoders of this {type(pipe).__name__} give other states than its "
            f"{type(denoiser_of(pipe)).__name__} is told"
        )
    return max(map(compare_outputs, map(torch.from_numpy, found), expected))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from telling that one of our prompts is cut: it is meant to be."""
    told = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(told)


def read_prompts(
    readers: Sequence[TextReader], folder: Path, prompts: Sequence[str]
) -> list[np.ndarray]:
    """Hidden states [B, words, C] of prompts, and pooled outputs if there are any, by the files."""
    import onnxruntime
    from tokenizers import Tokenizer

    states, pooled = [], []
    for reader in readers:
        tokenizer = Tokenizer.from_file(str(folder / reader.tokenizer / "tokenizer.json"))
        texts = [p.lower().strip() if reader.lowered else p for p in prompts]
        read = tokenizer.encode_batch(texts)
        feed = {"input_ids": np.array([each.ids for each in read])}
        if reader.masked:
            feed["attention_mask"] = np.array([each.attention_mask for each in read])
        session = onnxruntime.InferenceSession(
            folder / reader.encoder / "model.onnx", providers=["CPUExecutionProvider"]
        )
        outputs = session.run(None, feed)
        states.append(outputs[0])
        pooled += outputs[1:]
    return [np.concatenate(states, axis=-1), *pooled]
