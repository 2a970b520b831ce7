"""Pictures compared pixel by pixel."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from convfusion.errors import ConvFusionError

SSIM_SIDE = 11  # of its window: smaller pictures have none


def psnr(image: Image.Image | np.ndarray, reference: Image.Image | np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit pictures of one size; infinite if equal."""
    error = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    mean = np.square(error).mean()
    return float("inf") if mean == 0 else float(10 * np.log10(255**2 / mean))


def mean_psnr(images: list[Image.Image], references: list[Image.Image]) -> float:
    """Mean over pairs of pictures of their PSNR in dB."""
    pairs = zip(images, references, strict=True)
    return float(np.mean([psnr(image, reference) for image, reference in pairs]))


def ssim(image: Image.Image | np.ndarray, reference: Image.Image | np.ndarray) -> float:
    """Structural similarity of two 8-bit pictures of one size, over Gaussian windows of σ = 1.5.

    Wang et al. 2004, mean over RGB and all pixels; windows at the border see the picture mirrored.
    1 for equal pictures. Needs the extra `eval`.

    Raises:
        ConvFusionError: the pictures are smaller than a window, 11 × 11.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    pair = [torch.from_numpy(np.array(each, np.float64)) for each in (image, reference)]
    if min(pair[0].shape[:2]) < SSIM_SIDE:
        raise ConvFusionError(f"SSIM needs pictures of {SSIM_SIDE}×{SSIM_SIDE} or more")
    one, other = (each.permute(2, 0, 1)[None] for each in pair)
    found = structural_similarity_index_measure(one, other, data_range=255.0)
    assert isinstance(found, torch.Tensor)
    return found.item()
