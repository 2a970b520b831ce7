"""What an analysis says, in plain words and in counts."""

from __future__ import annotations

from collections.abc import Sequence

from convfusion.analysis.kernel_sizes import recommend
from convfusion.analysis.study import Analysis, SiteAnalysis
from convfusion.families import shorten_path
from convfusion.mixers.delta_conv import DeltaConv

NAMED = 8  # layers that the verdict names
GATHERS = 1.5  # times the uniform share, from which a first frame is worth a word
SMALL = 16  # side in tokens of a grid that a block's kernels span anyway


def is_local(site: SiteAnalysis) -> bool:
    """Whether the effective receptive field is at most half of that of uniform attention.

    False of a layer whose attention goes to sink tokens: its field says nothing.
    """
    field = site.mean.receptive_field
    return not site.artefact and field is not None and field <= site.uniform_receptive_field / 2


def is_local_in_time(site: SiteAnalysis) -> bool:
    """Whether the effective receptive field in frames is at most half of uniform attention's."""
    if site.artefact or site.frames is None or site.mean.frames is None:
        return False
    field = site.mean.frames.receptive_field
    return field is not None and field <= site.frames.uniform_receptive_field / 2


def is_uniform(site: SiteAnalysis) -> bool:
    """Whether all queries of a layer attend alike, so that no field is left above the mean."""
    return not site.artefact and site.mean.receptive_field is None


def give_verdict(analysis: Analysis, control: Analysis | None = None) -> str:
    """What the numbers say to someone who wants to convert the model: some plain sentences.

    Args:
        analysis: of the model.
        control: of an untrained model of the same shape.
    """
    sites = analysis.sites
    local = [site for site in sites if is_local(site)]
    uniform = [site for site in sites if is_uniform(site)]
    sinks = [site for site in sites if site.artefact]
    wide = [site for site in sites if not (is_local(site) or is_uniform(site) or site.artefact)]
    sentences = [
        f"{len(local)} of {len(sites)} self-attention layers {_agree(local, 'is', 'are')} local: "
        "what a query attends to beyond the average lies in a window at most half as wide as that "
        "of attention spread evenly."
    ]
    if any(site.frames is not None for site in sites):
        sentences += _judge_frames(sites)
    if control is not None:
        count = sum(map(is_local, control.sites))
        sentences.append(f"Of the untrained model of the same shape {count} are.")
    if local:
        sentences.append(
            f"We would convert {_name(local)} first, with {_kernels(analysis, local)} "
            "(kernels.json has them all)."
        )
    if uniform:
        them, attend = _agree(uniform, "it", "them"), _agree(uniform, "attends", "attend")
        sentences.append(
            f"{_begin(_name(uniform))} {attend} evenly, which the mean branch of a block does by "
            f"itself: we would convert {them}, too."
        )
    if wide:
        sentences.append(_advise_on_wide(wide, bool(local or uniform)))
    if sinks:
        sentences.append(
            f"Of {_name(sinks)} this says nothing, since a few tokens take most of the attention."
        )
    sentences.append(
        "This rests on attention maps alone; `convfusion curve` measures what each layer costs."
    )
    return " ".join(sentences)


def _judge_frames(sites: Sequence[SiteAnalysis]) -> list[str]:
    """What the layers of a video model do over time."""
    near = sum(map(is_local_in_time, sites))
    own = [site.mean.frames.score_mass[0] for site in sites if site.mean.frames is not None]
    even = [site.frames.uniform_score_mass[0] for site in sites if site.frames is not None]
    first = [site for site in sites if (site.single.gathering.first_frame or 0) >= GATHERS]
    share = f"{min(own):.0%}" if min(own) == max(own) else f"{min(own):.0%} to {max(own):.0%}"
    said = [
        f"In time {near} of {len(sites)} {'is' if near == 1 else 'are'} local.",
        f"Of the attention {share} stays in the query's own frame; spread evenly, "
        f"{max(even):.0%} would.",
    ]
    if first:
        said.append(
            f"{_begin(_name(first))} {_agree(first, 'gives', 'give')} the first frame at least "
            f"{GATHERS:g} times its even share: a branch for it helps."
        )
    return said


def _advise_on_wide(wide: Sequence[SiteAnalysis], others: bool) -> str:
    """What to do with layers that look far: `others` could be converted before them."""
    looks = _agree(wide, "looks", "look")
    if others:
        return (
            f"We would convert {_name(wide)} last, or keep {_agree(wide, 'its', 'their')} "
            f"attention: {_agree(wide, 'it', 'they')} {looks} further than that."
        )
    advice = (
        f"{_begin(_name(wide))} {looks} further than that, so the maps alone recommend no layer."
    )
    if max(max(site.grid[-2:]) for site in wide) <= SMALL:
        advice += (
            f" On grids of at most {SMALL}×{SMALL} tokens that is no verdict against blocks, "
            "whose kernels span most of the grid anyway: try them."
        )
    return advice


def _name(sites: Sequence[SiteAnalysis]) -> str:
    """`layers a, b and c`; of many the first ones, and how many there are besides."""
    names = [f"“{shorten_path(site.path)}”" for site in sites[:NAMED]]
    if more := len(sites) - len(names):
        names.append(f"{more} more")
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"{_agree(sites, 'layer', 'layers')} {listed}"


def _begin(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _agree(sites: Sequence[SiteAnalysis], singular: str, plural: str) -> str:
    return singular if len(sites) == 1 else plural


def _kernels(analysis: Analysis, sites: Sequence[SiteAnalysis]) -> str:
    """`kernels of 5×5 to 13×13`, as `recommend` chooses them."""
    blocks = recommend(analysis).sites
    sides = sorted(
        block.kernel_size for site in sites if isinstance(block := blocks[site.path], DeltaConv)
    )
    low, high = (f"{side}×{side}" for side in (sides[0], sides[-1]))
    return f"kernels of {low}" if low == high else f"kernels of {low} to {high}"


def check_claims(analysis: Analysis) -> list[tuple[str, str]]:
    """The paper's claims, and for how many layers of this model each one holds."""
    sites = [site for site in analysis.sites if not site.artefact]
    flagged = len(analysis.sites) - len(sites)

    def count(holds: list[bool]) -> str:
        return f"{sum(holds)} of {len(sites)}"

    fits = [s.mean.decay for s in sites if s.mean.decay]
    laws = [fit.best if fit.r2[fit.best] >= 0.9 else "" for fit in fits]
    falls = [law in ("power", "quadratic") for law in laws]
    square = [
        law == "quadratic" or (law == "power" and 1.5 <= fit.exponent <= 2.5)
        for law, fit in zip(laws, fits, strict=True)
    ]
    bias = [s.mean.bias_share_low >= 0.9 for s in sites]
    return [
        (
            "Local: the effective receptive field (ERF) is at most half of that of uniform "
            "attention",
            count([is_local(site) for site in sites]),
        ),
        (
            "Above a constant, a power of the distance fits the fall best, and well (R² ≥ 0.9); "
            "of layers with five distances or more",
            f"{sum(falls)} of {len(fits)}",
        ),
        ("… a power near 2: of 1.5 to 2.5, or the quadratic law", f"{sum(square)} of {len(fits)}"),
        ("The low-frequency part is one bias: queries share at least 90 % of it", count(bias)),
        ("Layers set apart because sink tokens take their attention", str(flagged)),
    ]
