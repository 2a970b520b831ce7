"""Start the mixers of a converted model from the attention that they replace, without training."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from convfusion.errors import ConvFusionError
from convfusion.families import check_alone, denoiser_of, list_sites
from convfusion.families.watch import attention_at, sample_attention
from convfusion.mixers.base import TokenMixer, as_plain, fold_gates
from convfusion.mixers.offsets import QUERIES, choose_queries
from convfusion.mixers.sampling import attend_at
from convfusion.mixers.tokens import TokenSample
from convfusion.surgery.record import TrainingRecord, set_record
from convfusion.surgery.surgery import attention_teacher, mixers_of

MEMORY = 1.0  # GiB of tokens that are kept, over all sites


@torch.no_grad()
def start_from_attention(
    pipe_or_model: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    only: Collection[str] | None = None,
    memory: float = MEMORY,
) -> dict[str, float]:
    """Set the mixers of a converted model by what their attention does, in place.

    The attention runs, as `model(**call)` for each of the calls. A part of the tokens that each
    site is given is kept, and its mixer set from them: a halo block by two singular value
    decompositions, a ΔConvBlock by the mean of its attention, the mean token alone by the mean
    output. Mixers of another kind are left alone.

    Args:
        pipe_or_model: a converted pipeline or denoiser with its attention kept.
        calls: keyword arguments of the denoiser, such as `recording.record_calls` gives; some dozen
            pictures over all timesteps are enough.
        only: paths of the sites whose mixers are set; None sets all that can be.
        memory: GiB on the CPU for tokens, over all sites.

    Returns:
        The expected error of each mixer that was set, by the path of its site: see
        `measure_imitation`.

    Raises:
        ConvFusionError: the model is not converted, its attention was dropped, there are no calls,
            or a mixer cannot start from its attention. Mixers set before it stay set.
    """
    check_alone(pipe_or_model, "measured starts")
    model = denoiser_of(pipe_or_model)
    mixers = {p: m for p, m in mixers_of(model).items() if m.has_measured_start}
    if only is not None:
        mixers = {path: mixer for path, mixer in mixers.items() if path in only}
    teacher = attention_teacher(model)
    if not mixers:
        return {}
    with sample_attention(teacher, mixers, memory) as samples:
        for call in calls:
            teacher(**call)
    return {
        site.path: start_mixer(
            site.path, mixers[site.path], attention_at(teacher, site), samples[site.path]
        )
        for site in list_sites(teacher)
        if site.path in mixers
    }


def start_mixer(
    path: str, mixer: TokenMixer, attention: Any, sample: Sequence[TokenSample]
) -> float:
    """Set one mixer from a sample of the tokens of its site; returns its expected error.

    Raises:
        ConvFusionError: nothing was sampled, or the mixer cannot start from this attention.
    """
    if not sample:
        raise ConvFusionError("no call of the model was given to start from")
    try:
        mixer.start_from(fold_gates(as_plain(attention), sample), sample)
        error = measure_imitation(mixer, attention, sample)
    except torch.linalg.LinAlgError:  # what is not finite has no decomposition
        error = math.nan
    except ConvFusionError as wrong:
        raise ConvFusionError(f"{path}: {wrong}") from None
    if not math.isfinite(error):
        raise ConvFusionError(
            f"what the attention of {path} computes is not finite: look at the data, or the frozen "
            "model"
        )
    set_record(mixer, TrainingRecord("attention"))
    return error


@torch.no_grad()
def measure_imitation(mixer: Any, attention: Any, sample: Sequence[TokenSample]) -> float:
    """E‖b(x) − a(x)‖²/Var a(x) of a mixer b against its attention a, over a sample of tokens x.

    Both are compared at 256 queries of each picture at most; means are over queries and channels.

    Args:
        mixer: on the attention's device.
        attention: a diffusers attention.
        sample: what it was seen with.
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    own = next(iter(mixer.parameters()), None)
    for each in sample:
        chosen = choose_queries(each.tokens.shape[1], QUERIES)
        target = attend_at(attention, each, chosen)
        dtype = torch.float32 if own is None else own.dtype
        placed = each.map(partial(torch.Tensor.to, device=target.device, dtype=dtype))
        mixed = mixer(placed.inputs, each.grid)[:, chosen.to(target.device)].float()
        error = (mixed - target).double().square().sum()
        moments = [error, target.double().sum(), target.double().square().sum()]
        sums += torch.stack(moments).cpu()
        count += target.numel()
    error_mean, mean, square = (sums / count).tolist()
    return error_mean / max(square - mean**2, 1e-12)
