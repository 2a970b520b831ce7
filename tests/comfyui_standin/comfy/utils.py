"""Stand-in for ComfyUI's helpers: the map of names, and the progress bar."""

from itertools import count

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
BLOCK = [f"{a}.{b}" for a in ("attn1", "attn2") for b in ("to_q", "to_k", "to_v", "to_out.0")]
BLOCK += ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"]
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_to_diffusers(config):
    """Names of tensors in ComfyUI by their names in diffusers; some of them are in neither."""
    if "num_res_blocks" not in config:
        return {}
    names = {}
    for theirs, ours in _layers(config):
        names[f"{theirs}.weight"], names[f"{theirs}.bias"] = f"{ours}.weight", f"{ours}.bias"
    return names


def _layers(config):
    yield from ENDS.items()
    layers, down = config["num_res_blocks"], list(config["transformer_depth"])
    up, last = list(config["transformer_depth_output"]), len(config["channel_mult"]) - 1
    numbers = count(1)
    for level, blocks in enumerate(layers):
        for i in range(blocks):
            n = next(numbers)
            yield from _resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{n}.0")
            place = f"down_blocks.{level}.attentions.{i}"
            yield from _transformer(place, f"input_blocks.{n}.1", down.pop(0))
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{next(numbers)}.0.op"
    for i, n in ((0, 0), (1, 2)):
        yield from _resnet(f"mid_block.resnets.{i}", f"middle_block.{n}")
    middle = config["transformer_depth_middle"]
    yield from _transformer("mid_block.attentions.0", "middle_block.1", middle)
    numbers = count()
    for block, blocks in enumerate(reversed(layers)):
        for i in range(blocks + 1):
            n, depth = next(numbers), up.pop()
            yield from _resnet(f"up_blocks.{block}.resnets.{i}", f"output_blocks.{n}.0")
            place = f"up_blocks.{block}.attentions.{i}"
            yield from _transformer(place, f"output_blocks.{n}.1", depth)
        if block < last:
            place = f"output_blocks.{n}.{2 if depth else 1}.conv"
            yield f"up_blocks.{block}.upsamplers.0.conv", place


def _resnet(theirs, ours):
    for own, other in RESNET.items():
        yield f"{theirs}.{other}", f"{ours}.{own}"


def _transformer(theirs, ours, depth):
    if depth:
        for layer in ("norm", "proj_in", "proj_out"):
            yield f"{theirs}.{layer}", f"{ours}.{layer}"
        for i in range(depth):
            for layer in BLOCK:
                path = f"transformer_blocks.{i}.{layer}"
                yield f"{theirs}.{path}", f"{ours}.{path}"


class ProgressBar:
    def __init__(self, total):
        self.total, self.current = total, 0

    def update_absolute(self, value, total=None, preview=None):
        self.current, self.total = value, self.total if total is None else total
