"""Replace self-attention in place, and put it back: what goes where, and who does it."""

from convfusion.surgery.config import (
    ConvertConfig,
    select_every,
    select_sites,
    uniform,
    with_kernel_sizes,
)
from convfusion.surgery.report import LOST_WITHOUT_ATTENTION, SiteStatus, Status
from convfusion.surgery.start import start_from_attention
from convfusion.surgery.surgery import (
    DroppedAttention,
    MixedAttention,
    attention_back,
    attention_teacher,
    build_mixers,
    check_teachable,
    convert,
    drop_attention,
    install,
    mixers_of,
    revert,
    status,
)

__all__ = [
    "LOST_WITHOUT_ATTENTION",
    "ConvertConfig",
    "DroppedAttention",
    "MixedAttention",
    "SiteStatus",
    "Status",
    "attention_back",
    "attention_teacher",
    "build_mixers",
    "check_teachable",
    "convert",
    "drop_attention",
    "install",
    "mixers_of",
    "revert",
    "select_every",
    "select_sites",
    "start_from_attention",
    "status",
    "uniform",
    "with_kernel_sizes",
]
