"""Stand-in for ComfyUI's sampler: Euler's method with classifier-free guidance."""

import torch

import comfy.model_management


def prepare_noise(latent, seed, noise_inds=None):
    return torch.randn(latent.shape, generator=torch.manual_seed(seed))


def fix_empty_latent_channels(model, latent):
    return latent


def sample(model, noise, steps, cfg, sampler_name, scheduler, positive, negative, latent, **more):
    comfy.model_management.load_models_gpu([model, *model.get_nested_additional_models()])
    wrapper = model.model_options.get("model_function_wrapper")
    sigmas = model.model.model_sampling.sigmas(steps)
    x = latent + noise * sigmas[0]
    context = torch.cat([negative[0][0], positive[0][0]]).repeat_interleave(len(x), 0)
    for number in range(steps):
        comfy.model_management.throw_exception_if_processing_interrupted()
        timestep = sigmas[number].repeat(len(x) * 2)
        options = {**model.model_options["transformer_options"], "sigmas": timestep[: len(x)]}
        c = {"c_crossattn": context, "transformer_options": options}
        call = {"input": torch.cat([x, x]), "timestep": timestep, "c": c, "cond_or_uncond": [1, 0]}
        apply_model = model.model.apply_model
        if wrapper is None:
            denoised = apply_model(call["input"], timestep, **c)
        else:
            denoised = wrapper(apply_model, call)
        without, prompted = denoised.chunk(2)
        guided = without + cfg * (prompted - without)
        if more.get("callback"):
            more["callback"](number, guided, x, steps)
        x = guided + (x - guided) * sigmas[number + 1] / sigmas[number]
    return x
