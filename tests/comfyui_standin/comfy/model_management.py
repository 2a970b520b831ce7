"""Stand-in for ComfyUI's memory: what is in use is patched, and nothing else."""

import torch

_loaded = []
interrupted = False


class InterruptProcessingException(Exception):
    pass


def interrupt_current_processing(value=True):
    global interrupted
    interrupted = value


def throw_exception_if_processing_interrupted():
    if interrupted:
        interrupt_current_processing(False)
        raise InterruptProcessingException


def get_torch_device():
    return torch.device("cpu")


unet_offload_device = get_torch_device


def load_models_gpu(models, **options):
    for wanted in models:
        unload(wanted.model)
        wanted.patch_model(wanted.load_device)
        _loaded.append(wanted)


def unload(model):
    for other in [each for each in _loaded if each.model is model]:
        other.unpatch_model(other.offload_device)
        _loaded.remove(other)


def unload_all_models():
    while _loaded:
        unload(_loaded[0].model)
