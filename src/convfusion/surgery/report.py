"""What stands at the self-attention sites of a denoiser, and what it weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from convfusion.families import Site
from convfusion.mixers import Mixer
from convfusion.surgery.record import TrainingRecord, least_trained

LOST_WITHOUT_ATTENTION = (
    "revert",
    "distillation (the attention is the teacher)",
    "processors that read to_q, to_k or to_v of a self-attention",
    "LoRA weights for a self-attention",
    "fuse_qkv_projections",
    "ControlNetModel.from_unet",
)


@dataclass(frozen=True)
class SiteStatus:
    """What stands at a site, and what it weighs.

    Attributes:
        site: the self-attention.
        mixer: settings of what stands in its place; None where the attention does.
        attention_kept: whether the attention's weights are still there.
        attention_parameters: of the attention; 0 if it was dropped, or where text and image share
            it, since all of them stay in use.
        mixer_parameters: of the mixer.
        record: whether the mixer is trained, and for how many steps; None without a mixer.
    """

    site: Site
    mixer: Mixer | None
    attention_kept: bool
    attention_parameters: int
    mixer_parameters: int
    record: TrainingRecord | None = None


@dataclass(frozen=True)
class Status:
    """The sites of a denoiser; `str(status)` is a table.

    Attributes:
        model: name of its class.
        family: of the adapter.
        sites: in the order of the modules.
        further: of the pipeline's other denoisers, by component; most pipelines have one alone.
    """

    model: str
    family: str
    sites: tuple[SiteStatus, ...]
    further: Mapping[str, Status] = field(default_factory=dict)

    @property
    def converted(self) -> int:
        """How many sites have a mixer."""
        return sum(site.mixer is not None for site in self.sites)

    @property
    def record(self) -> TrainingRecord | None:
        """What the least trained of the mixers has been through; None where nothing can train."""
        records = [site.record for site in self.sites if site.record and site.mixer_parameters]
        return least_trained(records) if records else None

    def __str__(self) -> str:
        dropped = sum(not site.attention_kept for site in self.sites)
        lines = [
            f"{self.model}: {self.converted} of {len(self.sites)} self-attention sites converted"
            + (f", {dropped} without their attention" if dropped else "")
            + (f"; blocks {self.record}" if self.record else "")
        ]
        for row in self.sites:
            mixer = "attention" if row.mixer is None else str(row.mixer)
            shared = " shared with a text" if row.site.joint else ""
            lines.append(f"  {row.site.path}  {row.site.channels} channels{shared}  {mixer}")
        if dropped:
            lines.append("Not available any more: " + "; ".join(LOST_WITHOUT_ATTENTION) + ".")
        lines += [f"{name}: {status}" for name, status in self.further.items()]
        return "\n".join(lines)
