"""ComfyUI for the tests: a stand-in, or the checkout that COMFYUI_PATH names, with tiny models.

With a checkout the same tests run on ComfyUI's own classes, on a CPU. It needs what ComfyUI imports
(einops, torchsde, scipy, psutil, aiohttp, yarl, pyyaml, av) beside what the tests need; torchvision
and torchaudio, which are not used, are left out.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

ROOT = Path(__file__).parent.parent
NODES = ROOT / "integrations" / "comfyui"
CHECKOUT = os.environ.get("COMFYUI_PATH", "")

# SD1.5's, SD2.1's and SDXL's layout with few channels: what differs is where transformers stand,
# how many in a row, how heads are counted, and whether tokens are projected by convolutions.
_TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "image_size": 32,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "context_dim": 16,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "dtype": torch.float32,
}
CONFIGS = {
    "sd15": {
        "channel_mult": [1, 2, 2],
        "transformer_depth": [1, 1, 0],
        "transformer_depth_output": [1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "num_heads": 8,
        "num_head_channels": -1,
    },
    "sd21": {
        "channel_mult": [1, 2, 2],
        "transformer_depth": [1, 1, 0],
        "transformer_depth_output": [1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": True,
        "num_heads": -1,
        "num_head_channels": 16,
    },
    "sdxl": {
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 2, 3],
        "transformer_depth_output": [0, 0, 2, 2, 3, 3],
        "transformer_depth_middle": 3,
        "use_linear_in_transformer": True,
        "num_heads": -1,
        "num_head_channels": 16,
    },
}


class _Nothing(types.ModuleType):
    """A module that has everything, and does nothing."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name)

    def __call__(self, *args, **kwargs):
        return self


class _LeftOut(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torchvision", "torchaudio"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Nothing(spec.name)

    def exec_module(self, module):
        pass


def _find_comfyui():
    if CHECKOUT:
        sys.path.append(CHECKOUT)
        sys.meta_path.insert(0, _LeftOut())
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
    else:
        sys.path.append(str(Path(__file__).parent / "comfyui_standin"))


_find_comfyui()

import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402


def load_nodes():
    """The folder of nodes as ComfyUI loads it: a package of any name."""
    name = "custom_nodes_convfusion"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def set_folder(folder):
    """Let `models/model_patches` be a folder."""
    if CHECKOUT:
        extensions = folder_paths.supported_pt_extensions
        folder_paths.folder_names_and_paths["model_patches"] = ([str(folder)], extensions)
        folder_paths.filename_list_cache.pop("model_patches", None)
    else:
        folder_paths.folders["model_patches"] = [str(folder)]


def make_model(name, seed=0):
    """A tiny model as a MODEL socket carries it, with random weights."""
    config = {**_TINY, **CONFIGS[name]}
    if CHECKOUT:
        kind = importlib.import_module("comfy.supported_models").SD15(config)
        kind.unet_config.update(CONFIGS[name])
        model = comfy.model_base.BaseModel(kind)
    else:
        model = comfy.model_base.BaseModel(config)
    randomise_all(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


@torch.no_grad()
def randomise_all(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            tensor.copy_(values * tensor[0].numel() ** -0.5)
        else:  # a bias, or the gain of a norm
            tensor.copy_(0.1 * values + name.endswith("weight"))


@torch.no_grad()
def make_twin(model, config):
    """The diffusers UNet of a configuration with the weights of a ComfyUI model."""
    twin = UNet2DConditionModel.from_config(config)
    ours = model.model.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    state = {theirs: ours[mine] for theirs, mine in names.items() if mine in ours}
    assert len({names[theirs] for theirs in state}) == len(ours)
    twin.load_state_dict({key: state[key] for key in twin.state_dict()})
    return twin.eval()


def make_inputs(height, width, batch=2, seed=0):
    """Latents, timesteps and text as both UNets take them."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    text = torch.randn(batch, 7, 16, generator=generator)
    return latents, torch.full((batch,), 400.0), text


@torch.no_grad()
def call(model, inputs, sigma=1.0):
    """What the UNet of a ComfyUI model predicts, with the patches of this clone."""
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    latents, timesteps, text = inputs
    options = {**model.model_options["transformer_options"], "sigmas": torch.full((1,), sigma)}
    return model.model.diffusion_model(
        latents, timesteps, context=text, transformer_options=options
    ).clone()


@torch.no_grad()
def call_twin(twin, inputs):
    latents, timesteps, text = inputs
    return twin(latents, timesteps, encoder_hidden_states=text)[0]
