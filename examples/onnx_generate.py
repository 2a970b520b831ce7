"""Draw with a pipeline that was exported as ONNX, without PyTorch, diffusers or transformers.

convfusion export mini --pipeline --out mini-onnx        # once, where ConvFusion is installed
pip install onnxruntime numpy tokenizers pillow          # where pictures are drawn
python onnx_generate.py mini-onnx --prompt "red apple, noto" --out apple.png

Several --prompt are one batch. The noise of --seed is numpy's, so other pictures come of it than
of PyTorch's seeds; --latents takes the noise from a file, [pictures, channels, height, width] of
normal numbers, and from equal noise comes the picture that the pipeline itself draws.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

# Settings of schedulers that change what is drawn and are not followed here, with the values that
# are: of the noise schedule, and of the way through it, which --sampler replaces.
SCHEDULE = {"rescale_betas_zero_snr": False, "trained_betas": None, "thresholding": False}
SOLVER = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "lower_order_final": True,
    "euler_at_final": False,
    "sigma_min": None,
    "sigma_max": None,
}


class Sampler:
    """From noise to latents in steps, as diffusers' schedulers go with the same settings.

    Noisy latents are √ᾱ·clean + √(1−ᾱ)·noise, where every timestep has its ᾱ.

    Args:
        settings: those of the scheduler, as diffusers writes them.
        steps: how many.
        own: whether the scheduler is the one that this sampler follows, setting by setting; else
            its noise schedule alone is taken.

    Attributes:
        timesteps: where the denoiser is asked, int64, from noisy to clean.
        start: what normal noise is multiplied by.
    """

    start = 1.0
    spacing = "leading"  # of the timesteps, where the settings do not say it

    def __init__(self, settings: dict, steps: int, own: bool = True) -> None:
        for name, value in ({**SCHEDULE, **SOLVER} if own else SCHEDULE).items():
            if settings.get(name, value) not in (value, None):
                advice = f": choose --sampler {'|'.join(SAMPLERS)}" if name in SOLVER else ""
                fail(f"{name} {settings[name]!r} of the scheduler is not followed here{advice}")
        self.settings, self.steps = settings, steps
        self.total = settings.get("num_train_timesteps", 1000)
        if not 1 <= steps < self.total:
            fail(f"--steps must be from 1 to {self.total - 1}, not {steps}")
        self.prediction = settings.get("prediction_type", "epsilon")
        if self.prediction not in ("epsilon", "v_prediction", "sample"):
            fail(f"a denoiser that predicts {self.prediction!r} is not followed here")
        self.alphas = cumulate_alphas(settings, self.total)
        self.timesteps = self.space_timesteps(settings.get("timestep_spacing", self.spacing))

    def space_timesteps(self, spacing: str) -> np.ndarray:
        """The timesteps: evenly from the first (`leading`), from the last (`trailing`), or both."""
        if spacing == "leading":
            times = np.arange(self.steps)[::-1] * (self.total // self.steps)
            times = times + self.settings.get("steps_offset", 0)
        elif spacing == "trailing":
            times = np.round(np.arange(self.total, 0, -self.total / self.steps)) - 1
        elif spacing == "linspace":
            times = np.linspace(0, self.total - 1, self.steps)[::-1]
        else:
            fail(f"the scheduler spaces its timesteps {spacing!r}, which is not followed here")
        if times.max() >= self.total:
            fail(f"{self.steps} steps begin beyond the {self.total} timesteps: take fewer")
        return times

    def scale(self, latents: np.ndarray, index: int) -> np.ndarray:
        """Latents as the denoiser takes them at a step."""
        return latents

    def split(self, output: np.ndarray, noisy: np.ndarray, alpha: float) -> tuple:
        """The clean latents and the noise that the denoiser sees in noisy ones."""
        a, b = np.sqrt(alpha), np.sqrt(1 - alpha)
        if self.prediction == "epsilon":
            return (noisy - b * output) / a, output
        if self.prediction == "sample":
            return output, (noisy - a * output) / b
        return a * noisy - b * output, a * output + b * noisy

    def step(self, output: np.ndarray, latents: np.ndarray, index: int) -> np.ndarray:
        """Less noisy latents, from what the denoiser predicts at a step."""
        raise NotImplementedError


class DDIM(Sampler):
    """Denoising diffusion implicit models, without added noise (arXiv 2010.02502, equation 12)."""

    def space_timesteps(self, spacing: str) -> np.ndarray:
        return super().space_timesteps(spacing).round().astype(np.int64)

    def step(self, output: np.ndarray, latents: np.ndarray, index: int) -> np.ndarray:
        time = self.timesteps[index]
        before = time - self.total // self.steps
        last = 1.0 if self.settings.get("set_alpha_to_one", True) else self.alphas[0]
        alpha = self.alphas[before] if before >= 0 else last
        clean, noise = self.split(output, latents, self.alphas[time])
        if self.settings.get("clip_sample", self.settings["_class_name"] == "DDIMScheduler"):
            most = self.settings.get("clip_sample_range", 1.0)
            clean = clean.clip(-most, most)
        return np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * noise


class Euler(Sampler):
    """Euler's method on noise levels σ = √((1−ᾱ)/ᾱ) (arXiv 2206.00364, algorithm 2, no churn)."""

    spacing = "linspace"

    def space_timesteps(self, spacing: str) -> np.ndarray:
        times = super().space_timesteps(spacing)
        if (times != times.round()).any():
            fail(
                f"the scheduler's {spacing!r} spacing of {self.steps} steps has timesteps between "
                "two numbers, which the denoiser does not take: choose --sampler ddim"
            )
        times = times.astype(np.int64)
        levels = np.sqrt((1 - self.alphas) / self.alphas)
        final = levels[0] if self.settings.get("final_sigmas_type", "zero") == "sigma_min" else 0.0
        self.levels = np.append(levels[times], final)
        most = self.levels.max()
        self.start = np.sqrt(most**2 + 1) if spacing == "leading" else most
        return times

    def scale(self, latents: np.ndarray, index: int) -> np.ndarray:
        return latents / np.sqrt(self.levels[index] ** 2 + 1)

    def step(self, output: np.ndarray, latents: np.ndarray, index: int) -> np.ndarray:
        level, following = self.levels[index : index + 2]
        _, noise = self.split(output, self.scale(latents, index), 1 / (level**2 + 1))
        return latents + (following - level) * noise


class DPMSolver(Sampler):
    """DPM-Solver++ of second order, multistep, midpoint (arXiv 2211.01095, algorithm 2)."""

    spacing = "linspace"

    def space_timesteps(self, spacing: str) -> np.ndarray:
        if spacing == "linspace":
            times = np.linspace(0, self.total - 1, self.steps + 1)[:0:-1].round()
        elif spacing == "leading":
            times = np.arange(1, self.steps + 1)[::-1] * (self.total // (self.steps + 1))
            times = times + self.settings.get("steps_offset", 0)
        else:
            times = super().space_timesteps(spacing)
        times = times.astype(np.int64)
        last = self.alphas[0] if self.settings.get("final_sigmas_type") == "sigma_min" else 1.0
        self.path = np.append(self.alphas[times], last)
        return times

    def step(self, output: np.ndarray, latents: np.ndarray, index: int) -> np.ndarray:
        alpha, following = self.path[index : index + 2]
        clean, _ = self.split(output, latents, alpha)
        ends = index == self.steps - 1 and (self.steps < 15 or following == 1)
        if index == 0 or ends:
            leap = clean
        else:
            half, last = log_ratio(following) - log_ratio(alpha), log_ratio(self.path[index - 1])
            leap = clean + 0.5 * half / (log_ratio(alpha) - last) * (clean - self.before)
        self.before = clean  # for the next step
        # eq. 17: σ'/σ·x − a'(e^−h − 1)·leap, where e^−h = σ'·a / (a'·σ)
        shrink = np.sqrt((1 - following) / (1 - alpha))
        return shrink * latents + (np.sqrt(following) - shrink * np.sqrt(alpha)) * leap


SAMPLERS = {"ddim": DDIM, "euler": Euler, "dpm": DPMSolver}
SCHEDULERS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm",
}


def log_ratio(alpha: float) -> float:
    """λ: half the logarithm of picture to noise."""
    return 0.5 * np.log(alpha / (1 - alpha))


def cumulate_alphas(settings: dict, total: int) -> np.ndarray:
    """ᾱ of every timestep, [total], from the settings of a scheduler."""
    first, last = settings.get("beta_start", 0.0001), settings.get("beta_end", 0.02)
    schedule = settings.get("beta_schedule", "linear")
    if schedule == "linear":
        betas = np.linspace(first, last, total)
    elif schedule == "scaled_linear":
        betas = np.linspace(first**0.5, last**0.5, total) ** 2
    elif schedule == "squaredcos_cap_v2":
        bars = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bars[1:] / bars[:-1], 0.999)
    else:
        fail(f"the noise schedule {schedule!r} is not followed here")
    return np.cumprod(1 - betas)


def fail(message: str) -> None:
    """Say what is wrong in one line, and leave."""
    sys.exit(f"onnx_generate: {message}")


class Pipeline:
    """The folder that `convfusion export --pipeline` wrote."""

    def __init__(self, folder: Path, provider: str = "CPUExecutionProvider") -> None:
        self.folder = folder
        self.providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
        try:
            self.index = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
        except OSError:
            fail(f"{folder} has no pipeline.json: convfusion export MODEL --pipeline --out FOLDER")
        if (self.index.get("format"), self.index.get("version")) != ("convfusion-onnx", 1):
            fail(f"{folder / 'pipeline.json'} is of a version that is not known here")
        self.texts = [
            (Tokenizer.from_file(str(folder / each["tokenizer"])), self.open(each["encoder"]), each)
            for each in self.index["text"]
        ]
        self.denoiser = self.open(self.index["denoiser"]["file"])
        self.decoder = self.open(self.index["decoder"]["file"])
        scheduler = (folder / self.index["scheduler"]).read_text(encoding="utf-8")
        self.scheduler = json.loads(scheduler)

    def open(self, name: str) -> onnxruntime.InferenceSession:
        if not (self.folder / name).is_file():
            fail(f"{self.folder} lacks {name}")
        return onnxruntime.InferenceSession(self.folder / name, providers=self.providers)

    def sampler(self, steps: int, name: str | None = None) -> Sampler:
        """The pipeline's own sampler, or another one with its noise schedule."""
        kind = self.scheduler["_class_name"]
        if name is None and kind not in SCHEDULERS:
            fail(f"the pipeline's {kind} is not known here: choose --sampler {'|'.join(SAMPLERS)}")
        return SAMPLERS[name or SCHEDULERS[kind]](self.scheduler, steps, own=name is None)

    def encode(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """What the denoiser is told of prompts, by the name of its input; [B, …] each."""
        states, told = [], {}
        for tokenizer, encoder, settings in self.texts:
            texts = [p.lower().strip() for p in prompts] if settings["lower_case"] else prompts
            read = tokenizer.encode_batch(texts)
            ids = np.array([each.ids for each in read], dtype=np.int64)
            mask = np.array([each.attention_mask for each in read], dtype=np.int64)
            feed = {"input_ids": ids, "attention_mask": mask}
            hidden, *pooled = encoder.run(None, only_known(encoder, feed))
            states.append(hidden)
            told["encoder_attention_mask"] = mask.astype(np.float32)
            if pooled:
                told["text_embeds"] = pooled[0]
        told["encoder_hidden_states"] = np.concatenate(states, axis=-1)
        return told

    def tell(self, prompts: list[str], negative: str | None, guided: bool) -> dict:
        """The same of prompts after as many negative ones; under no guidance of prompts alone."""
        told = self.encode(prompts)
        if not guided:
            return told
        without = self.encode([negative or ""] * len(prompts))
        if negative is None and self.index["zero_negative"]:
            without = {name: np.zeros_like(value) for name, value in without.items()}
        return {name: np.concatenate([without[name], told[name]]) for name in told}

    def draw(
        self,
        prompts: list[str],
        noise: np.ndarray,
        sampler: Sampler,
        guidance: float,
        negative: str | None = None,
    ) -> list[Image.Image]:
        """A picture for each prompt, from noise [B, channels, height, width]."""
        guided = guidance > 1
        told = self.tell(prompts, negative, guided)
        count, channels, *sides = noise.shape
        rows = count * (2 if guided else 1)
        height, width = (side * self.index["pixels_per_latent"] for side in sides)
        told["time_ids"] = np.tile(np.float32([[height, width, 0, 0, height, width]]), (rows, 1))
        latents = noise * sampler.start
        for index, time in enumerate(sampler.timesteps):
            noisy = sampler.scale(latents, index).astype(np.float32)
            feed = {
                **told,
                self.index["denoiser"]["latents"]: np.concatenate([noisy] * (rows // count)),
                "timestep": np.full(rows, time, dtype=np.int64),
            }
            output = self.denoiser.run(None, only_known(self.denoiser, feed))[0][:, :channels]
            if guided:
                without, prompted = output[:count], output[count:]
                output = without + guidance * (prompted - without)
            latents = sampler.step(output, latents, index)
        return self.decode(latents)

    def decode(self, latents: np.ndarray) -> list[Image.Image]:
        """The pictures of clean latents."""
        scale, shift = (self.index["decoder"][name] for name in ("scale", "shift"))
        scaled = latents * np.reshape(scale, (-1, 1, 1)) + np.reshape(shift, (-1, 1, 1))
        drawn = self.decoder.run(None, {"latents": scaled.astype(np.float32)})[0]
        pixels = ((drawn / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8)
        return [Image.fromarray(picture) for picture in pixels.transpose(0, 2, 3, 1)]


def only_known(session: onnxruntime.InferenceSession, feed: dict) -> dict:
    """Those inputs that a file has."""
    return {each.name: feed[each.name] for each in session.get_inputs()}


def make_noise(pipe: Pipeline, args: argparse.Namespace) -> np.ndarray:
    """Normal noise [pictures, channels, height, width] from a file or a seed."""
    index, count = pipe.index, len(args.prompt)
    scale, unit = index["pixels_per_latent"], index["size_unit"]
    channels = index["denoiser"]["channels"]
    if args.latents is not None:
        if args.size is not None:
            fail("--latents have a size of their own: leave --size out")
        try:
            noise = np.load(args.latents, allow_pickle=False).astype(np.float64)
        except (OSError, ValueError) as error:
            fail(f"{args.latents} cannot be read: {error}")
        if noise.ndim != 4 or noise.shape[:2] != (count, channels):
            fail(f"--latents must be [{count}, {channels}, height, width], not {noise.shape}")
        width, height = noise.shape[3] * scale, noise.shape[2] * scale
    else:
        width, height = args.size or (index["width"], index["height"])
        shape = (count, channels, height // scale, width // scale)
        noise = np.random.default_rng(args.seed).standard_normal(shape)
    if width < unit or height < unit or width % unit or height % unit:
        fail(f"{width}x{height} cannot be drawn: both sides must be multiples of {unit}")
    return noise


def parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"a size looks like 512x768 (width x height), not {text}")
    return int(width), int(height)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw with an exported pipeline.")
    parser.add_argument("folder", type=Path, help="that `convfusion export --pipeline` wrote")
    parser.add_argument("--prompt", action="append", required=True, help="what to draw")
    parser.add_argument("--negative-prompt", help="what the picture should not show")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (numpy's)")
    parser.add_argument("--steps", type=int, help="default: as the folder says")
    parser.add_argument("--guidance", type=float, help="default: as the folder says; 1 is none")
    parser.add_argument("--size", type=parse_size, help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--latents", type=Path, help="noise from a .npy file")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: that of the pipeline")
    parser.add_argument(
        "--provider",
        choices=onnxruntime.get_available_providers(),
        default="CPUExecutionProvider",
        help="what onnxruntime computes with",
    )
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    args = parser.parse_args()
    if args.out.suffix.lower() not in Image.registered_extensions():
        fail(f"{args.out} must end as a picture does, such as .png")
    if args.seed < 0:
        fail(f"--seed must be 0 or more, not {args.seed}")
    pipe = Pipeline(args.folder, args.provider)
    steps = pipe.index["steps"] if args.steps is None else args.steps
    sampler = pipe.sampler(steps, args.sampler)
    guidance = pipe.index["guidance"] if args.guidance is None else args.guidance
    if not 0 <= guidance < 1000:
        fail(f"--guidance must be from 0 to 1000, not {guidance}")
    noise = make_noise(pipe, args)
    pictures = pipe.draw(args.prompt, noise, sampler, guidance, args.negative_prompt)
    for number, picture in enumerate(pictures):
        name = args.out.name if len(pictures) == 1 else f"{args.out.stem}-{number}{args.out.suffix}"
        picture.save(args.out.with_name(name))
        print(f"Written: {args.out.with_name(name)}")


if __name__ == "__main__":
    main()
