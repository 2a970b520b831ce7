"""Model families: what each one's self-attention sites are and how they learn their grid."""

from convfusion.families import dit, unet
from convfusion.families.base import (
    Adapter,
    Denoiser,
    Site,
    adapter_for,
    denoiser_of,
    list_sites,
    register,
    site_grid,
    supported,
)

__all__ = [
    "Adapter",
    "Denoiser",
    "Site",
    "adapter_for",
    "denoiser_of",
    "dit",
    "list_sites",
    "register",
    "site_grid",
    "supported",
    "unet",
]
