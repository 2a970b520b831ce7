"""What a run needs around it: processes, precision, switches and signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor

from convfusion.distill.config import DistillConfig
from convfusion.distill.logs import tracker_name
from convfusion.distill.optimizers import check_optimizer
from convfusion.errors import ConvFusionError
from convfusion.families import Denoiser
from convfusion.families.patches import wrapped_method
from convfusion.surgery import check_teachable, mixers_of


def check_autocast(model: Denoiser, autocast: str) -> None:
    """Raise a ConvFusionError unless blocks in float32 can train inside this model."""
    kinds = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
    if model.dtype not in kinds:
        raise ConvFusionError(f"a model in {model.dtype} cannot be distilled: load it in float32")
    fitting = kinds[model.dtype]
    if fitting not in ("no", autocast):
        raise ConvFusionError(
            f"the model is in {str(model.dtype).removeprefix('torch.')}: distil it with "
            f"autocast {fitting!r}, or load it in float32"
        )
    if autocast == "fp16" and model.device.type == "cpu":
        raise ConvFusionError("fp16 trains on a GPU only: on a CPU take autocast bf16 or no")


def check_possible(model: Denoiser, config: DistillConfig) -> None:
    """Raise a ConvFusionError for what cannot be trained here, before any work is done for it."""
    if mixers_of(model):  # or it is converted first
        check_teachable(model)
    check_autocast(model, config.autocast)
    check_libraries(config)


def check_libraries(config: DistillConfig) -> None:
    """Raise a ConvFusionError for an optimiser or a tracker that is not installed."""
    check_optimizer(config.optimizer)
    tracker_name(config.tracker)


def make_accelerator(config: DistillConfig, out: Path | None, *, cpu: bool) -> Accelerator:
    """The accelerator of a run, which leaves the model where it is.

    Raises:
        ConvFusionError: the tracker is not there, another precision ran in this process, or the
            launcher asks for a way of sharding that one copy of the weights cannot have.
    """
    logged = tracker_name(config.tracker) if out is not None else None
    try:
        accelerator = Accelerator(
            mixed_precision=config.autocast,
            gradient_accumulation_steps=config.accumulation,
            log_with=logged,
            project_dir=str(out) if out is not None else None,
            cpu=cpu,
            device_placement=False,
        )
    except ValueError as error:  # its settings are fixed for the life of a process
        raise ConvFusionError(
            f"a distillation with another autocast or device ran in this process before: {error}"
        ) from None
    accelerator.gradient_accumulation_steps = config.accumulation  # a launcher may say otherwise
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConvFusionError(
            "teacher and student are one copy of the frozen weights, which cannot be sharded: "
            "launch with data parallelism alone"
        )
    return accelerator


@contextmanager
def ready_to_train(model: Denoiser, config: DistillConfig) -> Iterator[None]:
    """Let gradients reach the blocks alone, in float32, and put every switch back afterwards."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    dtype, checkpointed = model.dtype, model.is_gradient_checkpointing
    model.requires_grad_(False)
    model.eval()  # a DiT in training mode drops labels, and the teacher would drop others
    for mixer in mixers_of(model).values():
        mixer.float().requires_grad_(True)
    if config.checkpointing:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if config.checkpointing and not checkpointed:
            model.disable_gradient_checkpointing()
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode
        for mixer in mixers_of(model).values():
            mixer.to(dtype)


@contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """Turn the first Ctrl-C into a wish to stop after the step; a second one interrupts."""
    wish: list[bool] = []

    def ask(previous: Any, number: int, frame: Any) -> None:
        wish.append(True)
        signal.signal(number, previous)

    try:
        previous = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, partial(ask, previous))
    except ValueError:  # only the main thread may listen for signals
        yield wish
        return
    try:
        yield wish
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def decoded_as_it_is(vae: Any) -> Iterator[None]:
    """Let a VAE decode in its own dtype, whatever the autocast: some overflow in float16."""

    def decode(found: Any, latents: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return found(latents.to(vae.dtype), *args, **options)

    with wrapped_method(vae, "decode", decode):
        yield
