"""Pictures compared pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from convfusion.errors import ConvFusionError
from convfusion.evaluate.scores import Mean, mean_of

SSIM_SIDE = 11  # of its window: smaller pictures have none


def psnr(image: Image.Image | np.ndarray, reference: Image.Image | np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit pictures of one size; infinite if equal."""
    error = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    mean = np.square(error).mean()
    return float("inf") if mean == 0 else float(10 * np.log10(255**2 / mean))


def mean_psnr(
    images: Sequence[Image.Image | np.ndarray],
    references: Sequence[Image.Image | np.ndarray],
    prompts: Sequence[str] | None = None,
) -> Mean:
    """Mean over pairs of pictures of each one's PSNR in dB, with its standard error over prompts.

    Equal pictures have no PSNR and are left out; the mean is None where all are equal.

    Args:
        images: what is judged.
        references: one for each.
        prompts: of each pair; by default each has a prompt of its own.
    """
    pairs = zip(images, references, strict=True)
    values = [psnr(image, reference) for image, reference in pairs]
    return mean_of_psnr([value if np.isfinite(value) else None for value in values], prompts)


def frame_psnrs(clip: np.ndarray, reference: np.ndarray) -> list[float | None]:
    """PSNR in dB of each frame of two clips [T, H, W, 3]; None of equal frames."""
    values = [psnr(frame, other) for frame, other in zip(clip, reference, strict=True)]
    return [value if np.isfinite(value) else None for value in values]


def mean_clip_psnr(
    clips: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    prompts: Sequence[str] | None = None,
) -> Mean:
    """As `mean_psnr`, of clips [T, H, W, 3], each of which has the mean PSNR of its frames."""
    pairs = zip(clips, references, strict=True)
    return mean_of_psnr([mean_of_psnr(frame_psnrs(*pair)).value for pair in pairs], prompts)


def mean_of_psnr(values: Sequence[float | None], prompts: Sequence[str] | None = None) -> Mean:
    """As `mean_psnr`, from the PSNR of each pair, which is None for equal pictures."""
    kept = [i for i, value in enumerate(values) if value is not None]
    chosen = None if prompts is None else [prompts[i] for i in kept]
    return mean_of([value for value in values if value is not None], chosen)


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
    similarity = structural_similarity_index_measure(one, other, data_range=255.0)
    assert isinstance(similarity, torch.Tensor)
    return similarity.item()
