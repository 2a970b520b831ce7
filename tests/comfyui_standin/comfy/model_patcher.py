"""Stand-in for ComfyUI's ModelPatcher: patches that are put in while a clone is in use."""

import copy

import torch


def _set(model, name, value):
    owner, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner)
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    return before


class ModelPatcher:
    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.object_patches, self.object_patches_backup = {}, {}
        self.patches, self.backup = {}, {}
        self.model_options = {"transformer_options": {}}
        self.additional_models = {}

    def clone(self):
        other = ModelPatcher(self.model, self.load_device, self.offload_device)
        other.object_patches = dict(self.object_patches)
        other.object_patches_backup, other.backup = self.object_patches_backup, self.backup
        other.patches = {key: list(each) for key, each in self.patches.items()}
        other.model_options = copy.deepcopy(self.model_options)
        for key, models in self.additional_models.items():
            other.additional_models[key] = [each.clone() for each in models]
        return other

    def add_object_patch(self, name, value):
        self.object_patches[name] = value

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        for key, (difference,) in patches.items():
            self.patches.setdefault(key, []).append(strength_patch * difference)
        return list(patches)

    def get_model_object(self, name):
        for patches in (self.object_patches, self.object_patches_backup):
            if name in patches:
                return patches[name]
        owner, _, attribute = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), attribute)

    def set_model_unet_function_wrapper(self, wrapper):
        self.model_options["model_function_wrapper"] = wrapper

    def set_model_attn1_patch(self, patch):
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches.setdefault("attn1_patch", []).append(patch)

    def set_additional_models(self, key, models):
        self.additional_models[key] = models

    def get_additional_models_with_key(self, key):
        return self.additional_models.get(key, [])

    def get_nested_additional_models(self):
        return [each for models in self.additional_models.values() for each in models]

    def model_dtype(self):
        return self.model.get_dtype()

    @torch.no_grad()
    def patch_model(self, device_to=None):
        for name, value in self.object_patches.items():
            before = _set(self.model, name, value)
            self.object_patches_backup.setdefault(name, before)
        weights = dict(self.model.named_parameters())
        for key, differences in self.patches.items():
            self.backup[key] = weights[key].clone()
            weights[key].add_(sum(differences))
        return self.model

    @torch.no_grad()
    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            weights = dict(self.model.named_parameters())
            for key, weight in self.backup.items():
                weights[key].copy_(weight)
            self.backup.clear()
        for name, before in self.object_patches_backup.items():
            _set(self.model, name, before)
        self.object_patches_backup.clear()
