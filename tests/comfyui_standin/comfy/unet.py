"""Stand-in for ComfyUI's UNet: the layers of the original checkpoints, under their names.

Written for the tests from what the checkpoints contain and what diffusers computes with it; only
what ConvFusion's nodes touch behaves as in ComfyUI: the self-attention's call, the options that
travel with it, and the names of everything.
"""

import torch
import torch.nn.functional as F
from torch import nn


class CrossAttention(nn.Module):
    def __init__(self, channels, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def forward(self, x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006
        context = x if context is None else context
        value = context if value is None else value
        layers = zip((self.to_q, self.to_k, self.to_v), (x, context, value), strict=True)
        q, k, v = (layer(t).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, t in layers)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Linear(channels, channels * 8)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(Gate(channels), nn.Dropout(0.0), nn.Linear(channels * 4, channels))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    disable_self_attn = False

    def __init__(self, channels, context, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = CrossAttention(channels, channels, heads)
        self.attn2 = CrossAttention(channels, context, heads)
        self.ff = FeedForward(channels)

    def forward(self, x, context, transformer_options):
        n, other, value = self.norm1(x), None, None
        for patch in transformer_options.get("patches", {}).get("attn1_patch", []):
            n, other, value = patch(n, n if other is None else other, value, {})
        x = x + self.attn1(n, context=other, value=value, transformer_options=transformer_options)
        x = x + self.attn2(self.norm2(x), context=context, transformer_options=transformer_options)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels, context, heads, depth, linear):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        project = (
            (lambda: nn.Linear(channels, channels))
            if linear
            else (lambda: nn.Conv2d(channels, channels, 1))
        )
        self.proj_in = project()
        blocks = [TransformerBlock(channels, context, heads) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = project()

    def forward(self, x, context, transformer_options):
        transformer_options["activations_shape"] = list(x.shape)
        _, _, height, width = x.shape
        tokens = self.norm(x)
        tokens = tokens if self.linear else self.proj_in(tokens)
        tokens = tokens.flatten(2).transpose(1, 2)
        tokens = self.proj_in(tokens) if self.linear else tokens
        for block in self.transformer_blocks:
            tokens = block(tokens, context, transformer_options)
        tokens = self.proj_out(tokens) if self.linear else tokens
        out = tokens.transpose(1, 2).unflatten(2, (height, width))
        return x + (out if self.linear else self.proj_out(out))


class ResBlock(nn.Module):
    def __init__(self, channels, out, time):
        super().__init__()
        norm, conv = nn.GroupNorm(32, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.in_layers = nn.Sequential(norm, nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, out))
        norm, conv = nn.GroupNorm(32, out), nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), nn.Dropout(0.0), conv)
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x, time):
        h = self.in_layers(x) + self.emb_layers(time)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class UNetModel(nn.Module):
    dtype = torch.float32

    def __init__(self, config):
        super().__init__()
        base, mults = config["model_channels"], config["channel_mult"]
        layers, context = config["num_res_blocks"], config["context_dim"]
        down, up = list(config["transformer_depth"]), list(config["transformer_depth_output"])
        self.base, time = base, base * 4

        def transformer(channels, depth):
            heads = config["num_heads"]
            heads = channels // config["num_head_channels"] if heads == -1 else heads
            linear = config["use_linear_in_transformer"]
            return [SpatialTransformer(channels, context, heads, depth, linear)] if depth else []

        self.time_embed = nn.Sequential(nn.Linear(base, time), nn.SiLU(), nn.Linear(time, time))
        channels, widths = base, [base]
        first = nn.Conv2d(config["in_channels"], base, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([first])])
        for level, mult in enumerate(mults):
            for _ in range(layers[level]):
                block = [ResBlock(channels, base * mult, time)]
                channels = base * mult
                block += transformer(channels, down.pop(0))
                self.input_blocks.append(nn.ModuleList(block))
                widths.append(channels)
            if level < len(mults) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                widths.append(channels)
        middle = transformer(channels, config["transformer_depth_middle"])
        ends = [ResBlock(channels, channels, time) for _ in range(2)]
        self.middle_block = nn.ModuleList([ends[0], *middle, ends[1]])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for number in range(layers[level] + 1):
                block = [ResBlock(channels + widths.pop(), base * mult, time)]
                channels = base * mult
                block += transformer(channels, up.pop())
                if level and number == layers[level]:
                    block.append(Upsample(channels))
                self.output_blocks.append(nn.ModuleList(block))
        last = nn.Conv2d(channels, config["out_channels"], 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), last)

    def forward(self, x, timesteps, context, transformer_options):
        rates = torch.exp(-torch.arange(self.base // 2) / (self.base // 2) * 9.210340371976184)
        angles = timesteps[:, None].float() * rates
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))

        def run(block, x, size=None):
            for layer in block:
                if isinstance(layer, ResBlock):
                    x = layer(x, time)
                elif isinstance(layer, SpatialTransformer):
                    x = layer(x, context, transformer_options)
                else:
                    x = layer(x, size) if isinstance(layer, Upsample) else layer(x)
            return x

        skips = []
        for block in self.input_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = run(block, x, skips[-1].shape[-2:] if skips else None)
        return self.out(x)
