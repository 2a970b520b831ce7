"""The ΔConvBlock: pyramid depthwise convolutions, a gate and a mean, in place of self-attention.

Source: Dong et al., "Can We Achieve Efficient Diffusion without Self-Attention? Distilling
Self-Attention into Convolutions", ICCV 2025. For tokens x of a grid H×W:

    y   = proj_in(x)                                        C → C' = C·ratio
    z_i = upsample(gate(depthwise_K(pool_i(y))))            C' → C'/2, at scale 1/2^i, i < stages
    out = proj_out(concat_i z_i) + mean_proj(mean over tokens of x)

For tokens of a video, on a grid T×H×W, the pyramid is that of each frame, of a y that is convolved
along the frames before: y = depthwise_K_t(proj_in(x)), which is the same as to convolve each stage
by K_t×1×1 and 1×K×K with one K_t for all of them. Video models attend to their first frame from
everywhere, so that its mean may have a branch too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convfusion.errors import ConvFusionError
from convfusion.mixers import delta_conv_start
from convfusion.mixers.base import TokenMixer, check_grid, projections
from convfusion.mixers.joint import JointMixer, SharedMixer
from convfusion.mixers.tokens import Grid, TokenSample
from convfusion.ops import library, reference
from convfusion.settings import check_fields

Gate = Literal["scaled", "reference", "sigmoid"]
Pooling = Literal["ceil", "adaptive"]
Init = Literal["mean", "mean_zero", "random"]

MAX_KERNEL = 255  # spans a grid of 128×128 from any of its tokens
MAX_STAGES = 10  # the last at 1/512
SMALL = 0.1  # of `proj_out` under the `mean` initialisation, relative to PyTorch's default


@dataclass(frozen=True)
class DeltaConv:
    """Settings of a ΔConvBlock.

    Attributes:
        kernel_size: odd side K of every depthwise kernel, in tokens of its own stage; at most 255.
        stages: number n of pyramid stages, at scales 1, 1/2, …, 1/2^(n-1); at most 10.
        ratio: C'/C, the channels that the stages work on; C·ratio must be an even integer.
        gate: how the two halves f1, f2 of the C' channels meet. `scaled`: f1·f2/√C' (the paper);
            `reference`: f1·f2·√(C'/2) (the authors' SD1.5 and SDXL weights); `sigmoid`:
            f1·σ(f2) (their PixArt weights).
        pooling: `ceil` halves by 2×2 means (ceil mode: border windows average what they hold),
            stage by stage; `adaptive` pools to ⌊H/2^i⌋×⌊W/2^i⌋ at once (the authors' weights).
            Both agree on grids that 2^(n-1) divides.
        mean_branch: add a projection of the mean over all tokens at every token.
        init: `mean` sets the mean branch to what the replaced attention does when it is uniform,
            W_o·W_v and W_o·b_v + b_o, and starts `proj_out` small; `mean_zero` starts it at
            zero; `random` is PyTorch's default for every tensor.
        conv_bias: give the depthwise kernels a bias, as some of the authors' weights have; such a
            block does not take the fused operation on CUDA.
        frame_kernel_size: odd side K_t of the kernel along the frames of a video; 0 for none, as
            for pictures.
        first_frame_branch: add a projection of the mean over the first frame's tokens at every
            token of a video.
    """

    kernel_size: int = 7
    stages: int = 2
    ratio: float = 0.5
    gate: Gate = "scaled"
    pooling: Pooling = "ceil"
    mean_branch: bool = True
    init: Init = "mean"
    conv_bias: bool = False
    frame_kernel_size: int = 0
    first_frame_branch: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not 1 <= self.kernel_size <= MAX_KERNEL or self.kernel_size % 2 == 0:
            raise ConvFusionError(
                f"kernel_size must be odd and from 1 to {MAX_KERNEL}, not {self.kernel_size}"
            )
        frames = self.frame_kernel_size
        if frames and (not 1 <= frames <= MAX_KERNEL or frames % 2 == 0):
            raise ConvFusionError(
                f"frame_kernel_size must be odd and from 1 to {MAX_KERNEL}, or 0, not {frames}"
            )
        if not 0 < self.ratio <= 4:
            raise ConvFusionError(f"ratio must lie between 0 and 4, not {self.ratio}")
        if not 1 <= self.stages <= MAX_STAGES:
            raise ConvFusionError(f"stages must be from 1 to {MAX_STAGES}, not {self.stages}")

    def build(self, channels: int, heads: int = 1) -> DeltaConvBlock:
        """A block for tokens of `channels` channels; heads mean nothing to it."""
        return DeltaConvBlock(channels, self)

    def build_joint(self, channels: int, heads: int) -> JointMixer:
        """For the values of an image that shares an attention with a text: see `joint.Shared`."""
        return SharedMixer(channels, heads, self, "predicted", self)


class DeltaConvBlock(TokenMixer):
    """A token mixer made of convolutions; see the module's equations.

    Raises:
        ConvFusionError: C·ratio is not an even integer.
    """

    has_measured_start = True

    def __init__(self, channels: int, config: DeltaConv = DeltaConv()) -> None:
        super().__init__()
        inner = round(channels * config.ratio)
        if inner < 2 or inner % 2 or inner != channels * config.ratio:
            raise ConvFusionError(
                f"channels·ratio must be an even integer, not {channels}·{config.ratio}"
            )
        self.config = config
        self.ranks = (3,) if config.frame_kernel_size or config.first_frame_branch else (2, 3)
        self.proj_in = nn.Linear(channels, inner)
        self.convs = nn.ModuleList(
            nn.Conv2d(
                inner,
                inner,
                config.kernel_size,
                padding=config.kernel_size // 2,
                groups=inner,
                bias=config.conv_bias,
            )
            for _ in range(config.stages)
        )
        self.proj_out = nn.Linear(inner // 2 * config.stages, channels)
        self.mean_proj = nn.Linear(channels, channels) if config.mean_branch else None
        if side := config.frame_kernel_size:
            padding = (side // 2, 0)
            self.frame_conv = nn.Conv2d(
                inner, inner, (side, 1), padding=padding, groups=inner, bias=False
            )
        if config.first_frame_branch:
            self.first_frame_proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Mix tokens [B, N, C] that lie row by row on a grid; same shape and dtype out.

        Args:
            tokens: of a picture, or of a video frame by frame.
            grid: (H, W), or (T, H, W).

        Raises:
            ConvFusionError: N is not the product of the grid's sides.
        """
        *frames, height, width = check_grid(tokens, grid)
        inner = self.proj_in(tokens)
        if self.config.frame_kernel_size:
            lines = inner.transpose(1, 2).unflatten(2, (frames[0], -1))  # [B, C', T, H·W]
            inner = self.frame_conv(lines).flatten(2).transpose(1, 2)
        if frames:  # from here on each is a picture of its own
            inner = inner.flatten(0, 1).unflatten(0, (-1, height * width))
        mixed = self._mix_pictures(inner, (height, width))
        mixed = self.proj_out(mixed.reshape(*tokens.shape[:2], -1))
        if self.mean_proj is not None:
            mixed += self.mean_proj(tokens.mean(dim=1, keepdim=True))  # in place: one map less
        if self.config.first_frame_branch:
            first = tokens[:, : height * width].mean(dim=1, keepdim=True)
            mixed += self.first_frame_proj(first)
        return mixed

    def _mix_pictures(self, inner: Tensor, grid: tuple[int, int]) -> Tensor:
        """The pyramid of pictures of tokens [B, HW, C']: [B, HW, n·C'/2]."""
        weights = self.list_stage_weights()
        if weights and library.can_fuse(inner, weights, self.config.pooling):
            return library.pyramid(inner, weights, grid, self.config.gate)
        maps = inner.transpose(1, 2).unflatten(2, grid)
        return self.apply_pyramid(maps).flatten(2).transpose(1, 2)

    def list_stage_weights(self) -> list[Tensor]:
        """The kernels of all stages; none where they are not all, as with a LoRA or a bias."""
        convs = [conv for conv in self.convs if type(conv) is nn.Conv2d and conv.bias is None]
        return [conv.weight for conv in convs] if len(convs) == len(self.convs) else []

    def apply_pyramid(self, maps: Tensor) -> Tensor:
        """All stages of maps [B, C', H, W], concatenated: [B, stages·C'/2, H, W]."""
        return reference.pyramid(maps, self.convs, self.apply_gate, self.config.pooling)

    def apply_gate(self, maps: Tensor) -> Tensor:
        """The gate of a stage: maps [B, C', h, w] to [B, C'/2, h, w]."""
        return reference.apply_gate(maps, self.config.gate)

    @torch.no_grad()
    def init_from(self, attention: Any) -> None:
        """Start from the attention being replaced, as `config.init` says."""
        if self.config.init == "random":
            return
        if self.mean_proj is not None:
            set_to_uniform_attention(self.mean_proj, attention)
        if self.config.frame_kernel_size:
            nn.init.dirac_(self.frame_conv.weight, groups=self.proj_in.out_features)
        if self.config.first_frame_branch:
            self.first_frame_proj.weight.zero_()
            self.first_frame_proj.bias.zero_()
        scale = 0.0 if self.config.init == "mean_zero" else SMALL
        self.proj_out.weight.mul_(scale)
        self.proj_out.bias.zero_()

    def start_from(self, attention: Any, sample: Sequence[TokenSample]) -> None:
        """Start from the mean of the attention over a sample; see `delta_conv_start`."""
        delta_conv_start.set_from_sample(self, attention, sample)

    def extra_repr(self) -> str:
        return f"kernel_size={self.config.kernel_size}, gate={self.config.gate}"


@torch.no_grad()
def set_to_uniform_attention(linear: nn.Linear, attention: Any) -> None:
    """Set a layer C → C to what uniform attention does to the mean token.

    softmax → 1/N makes W_o·(mean_k W_v·x_k + b_v) + b_o = (W_o·W_v)·mean(x) + W_o·b_v + b_o.

    Args:
        linear: the layer to set, with a bias.
        attention: a diffusers attention.
    """
    _, _, value, out = projections(attention)
    weight = out.weight.float()
    linear.weight.copy_(weight @ value.weight.float())
    linear.bias.zero_()
    if value.bias is not None:
        linear.bias.add_(weight @ value.bias.float())
    if out.bias is not None:
        linear.bias.add_(out.bias.float())
