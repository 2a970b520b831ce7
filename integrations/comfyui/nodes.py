"""The nodes that ComfyUI shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

FOLDER = "model_patches"  # of ComfyUI's `models`, where blocks are put
CATEGORY = "ConvFusion"
START = (
    "Part of the sampling, from 0 to 1, after which blocks stand in. Before it, the attention does."
)
END = "Part of the sampling after which the attention takes over again."


class LoadBlocks:
    """Choose a file of blocks, ours or one that the paper's authors released."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("CONVFUSION_BLOCKS",), ("blocks",)
    DESCRIPTION = "Loads blocks that replace self-attention, from ComfyUI/models/model_patches."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import folder_paths

        names = [n for n in folder_paths.get_filename_list(FOLDER) if n.endswith(".safetensors")]
        return {
            "required": {
                "name": (names, {"tooltip": "A .safetensors file in models/model_patches."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, name: str) -> int:
        return find_blocks(name).stat().st_mtime_ns

    def load(self, name: str) -> tuple[Path]:
        from convfusion.files import read_header

        path = find_blocks(name)
        read_header(path)  # what is damaged is named here, and not where it is applied
        return (path,)


class ApplyBlocks:
    """Let blocks stand in for the self-attention of a model."""

    CATEGORY, FUNCTION = CATEGORY, "apply"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        "Replaces the self-attention of SD1.x, SD2.x and SDXL by blocks whose cost grows with the "
        "pixels, and not with their square."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        percent = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "SD1.x, SD2.x or SDXL."}),
                "blocks": ("CONVFUSION_BLOCKS", {"tooltip": "Of a model of the same layout."}),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **percent, "tooltip": START},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, **percent, "tooltip": END},
                ),
                "min_tokens": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 2**24,
                        "tooltip": "An attention over fewer tokens stays. At 512×512, SD1.5 has "
                        "4096, 1024, 256 and 64 of them.",
                    },
                ),
                "keep_attention": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Layers whose attention stays, with commas between, by the "
                        "names in the report of Convert without Training; * stands for anything: "
                        "mid, up 1 *",
                    },
                ),
            }
        }

    def apply(
        self,
        model: Any,
        blocks: Path,
        start_percent: float,
        end_percent: float,
        min_tokens: int,
        keep_attention: str,
    ) -> tuple[Any]:
        from .patching import apply_blocks

        patched = apply_blocks(
            model,
            blocks,
            start_percent=start_percent,
            end_percent=end_percent,
            min_tokens=min_tokens,
            keep=keep_attention,
        )
        return (patched,)


class ConvertWithoutTraining:
    """Make blocks for a model from what its own self-attention does."""

    CATEGORY, FUNCTION = CATEGORY, "convert"
    RETURN_TYPES = ("MODEL", "CONVFUSION_BLOCKS", "STRING")
    RETURN_NAMES = ("model", "blocks", "report")
    OUTPUT_TOOLTIPS = (
        "The model with its blocks.",
        "The file of blocks, for Apply ConvFusion.",
        "What stands at each site, and how far it is from the attention.",
    )
    DESCRIPTION = (
        "Draws a few pictures, sets a block for each self-attention from what was seen, writes the "
        "blocks to ComfyUI/models/model_patches, and measures how far they are from the attention."
    )
    MIXERS: ClassVar[tuple[str, ...]] = ("halo (nearer)", "delta_conv (cheaper)")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"min": 0.05, "max": 1.0, "step": 0.005}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "SD1.x, SD2.x or SDXL; behind its LoRAs."}),
                "positive": ("CONDITIONING", {"tooltip": "A prompt that is typical of yours."}),
                "negative": ("CONDITIONING", {"tooltip": "The negative prompt that you use."}),
                "latent": ("LATENT", {"tooltip": "An empty latent of the size you draw at."}),
                "mixer": (
                    cls.MIXERS,
                    {
                        "tooltip": "halo is near the attention at once. delta_conv is cheaper, but "
                        "its pictures are poor until it is trained, outside of ComfyUI."
                    },
                ),
                "key_share": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        **share,
                        "tooltip": "halo: how finely tokens are compared. Larger is nearer to the "
                        "attention, and slower.",
                    },
                ),
                "value_share": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        **share,
                        "tooltip": "halo: how much of each token is passed on. Larger is nearer "
                        "to the attention, and slower.",
                    },
                ),
                "budget": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Such as 4x: choose a block for each layer so that all together "
                        "need 4 times fewer operations. Takes minutes; mixer and shares are then "
                        "ignored. Empty: the same block everywhere.",
                    },
                ),
                "pictures": (
                    "INT",
                    {
                        "default": 4,
                        "min": 1,
                        "max": 256,
                        "tooltip": "That are drawn to measure with. More of them measure better.",
                    },
                ),
                "steps": (
                    "INT",
                    {"default": 12, "min": 1, "max": 1000, "tooltip": "Of each of them."},
                ),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 7.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.1,
                        "tooltip": "Guidance of these pictures: the one that you draw with.",
                    },
                ),
                "seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": 2**64 - 1, "tooltip": "Of the first of them."},
                ),
                "name": (
                    "STRING",
                    {"default": "blocks", "tooltip": "Of the file; a number is put behind it."},
                ),
            }
        }

    def convert(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        latent: Any,
        mixer: str,
        key_share: float,
        value_share: float,
        budget: str,
        pictures: int,
        steps: int,
        cfg: float,
        seed: int,
        name: str,
    ) -> tuple[Any, Path, str]:
        import comfy.utils

        from convfusion.budget import Budget, parse_budget
        from convfusion.mixers import DeltaConv, Halo, Mixer

        from .measuring import Drawing, convert_untrained
        from .patching import apply_blocks

        target = name_blocks(name)
        wanted: Mixer | Budget = Halo(key_ratio=key_share, value_ratio=value_share)
        if budget.strip():
            wanted = parse_budget(budget)
        elif mixer == self.MIXERS[1]:
            wanted = DeltaConv()
        drawing = Drawing(
            positive, negative, latent["samples"], pictures, steps, guidance=cfg, seed=seed
        )
        bar = comfy.utils.ProgressBar(1)
        report = convert_untrained(
            model,
            drawing,
            wanted,
            target,
            lambda done, total: bar.update_absolute(done, total),
        )
        return apply_blocks(model, target), target, report


def find_blocks(name: str) -> Path:
    """The path of a file that ComfyUI lists."""
    import folder_paths

    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def name_blocks(name: str) -> Path:
    """A new path for a file of blocks, such as `blocks_00001.safetensors`.

    Raises:
        ConvFusionError: the name is no plain one.
    """
    import folder_paths

    from convfusion.errors import ConvFusionError

    name = name.strip().removesuffix(".safetensors")
    if not name or Path(name).name != name or name.startswith("."):
        raise ConvFusionError(f"{name!r} is no name for a file: give a plain one, such as blocks")
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := folder / f"{name}_{number:05}.safetensors").exists():
        number += 1
    return path


NODE_CLASS_MAPPINGS = {
    "ConvFusionLoadBlocks": LoadBlocks,
    "ConvFusionApply": ApplyBlocks,
    "ConvFusionConvert": ConvertWithoutTraining,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ConvFusionLoadBlocks": "Load ConvFusion Blocks",
    "ConvFusionApply": "Apply ConvFusion",
    "ConvFusionConvert": "Convert without Training (ConvFusion)",
}
