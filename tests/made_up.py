"""Moments of any model without a measurement: spectra that fall as real ones do."""

from __future__ import annotations

import math

from convfusion.budget import Moments, RatioError, Reach, ReachError, SiteMoments
from convfusion.families import Denoiser, Site, Size, list_sites, site_grid

RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)
REACHES = [Reach(*sides) for sides in ((4, 6, 1), (4, 6, 4), (4, 8, 4), (4, 12, 8), (8, 16, 8))]


def site_moments(model: Denoiser, site: Site, latents: Size, number: int) -> SiteMoments:
    """Those of one site: the larger its number, the faster its spectra fall.

    Nothing is cut where text and image share it.
    """
    fall, far = 2.0 + number % 5, 0.05 + 0.02 * (number % 4)
    spectrum = tuple(
        RatioError(ratio, 0.4 * (1 - ratio) * math.exp(-fall * ratio))
        for ratio in (RATIOS[-1:] if site.joint else RATIOS)
    )
    return SiteMoments(
        path=site.path,
        channels=site.channels,
        heads=site.heads,
        grid=site_grid(model, site, latents),
        scores=spectrum,
        values=spectrum,
        far=tuple(ReachError(r, far * 4 / r.window / math.sqrt(r.cells)) for r in REACHES),
        delta_conv=0.45,
        mean_only=0.7,
        sensitivity=0.002 * (1 + number % 3),
    )


def made_up_moments(model: Denoiser, latents: Size, teacher: str = "made up") -> Moments:
    """Moments of every site of a model, on any device."""
    sites = [site_moments(model, site, latents, i) for i, site in enumerate(list_sites(model))]
    return Moments(teacher, latents, tuple(sites))
