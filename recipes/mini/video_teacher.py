"""Step 10: the fifth teacher, a video model in Wan's layout.

`python video_teacher.py emoji` draws the sheet of emoji in `video/` from the package of step 1.
`python video_teacher.py train` trains the autoencoder of `video_vae.py`, then a
`WanTransformer3DModel` with its text encoder (flow matching, EMA, a tenth of the captions dropped),
with a picture of drawn clips each `--sample-every` steps, and writes `run/video/teacher` in
diffusers' layout; both go on from the state in `run/video`. `python video_teacher.py package` keeps
the result in float16 in `video/` beside this file.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Schedule, ema_step, fit, forget_folder
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from emoji import DESIGNS, fetch, read_package
from families import FAMILIES
from PIL import Image
from torch.optim.swa_utils import AveragedModel
from transformers import UMT5Config, UMT5EncoderModel
from video import (
    EMOJI,
    GROUNDS,
    KEPT,
    SHEET,
    TILE,
    TILES_PER_ROW,
    clip,
    generate,
    latents,
    load_video,
    pairs,
    save_strips,
)
from video_measure import measure
from video_vae import CHANNELS, train_vae

from convfusion.checkpoint.pipelines import in_dtype

TEXT_WIDTH = 96
TEXT_TOKENS = 512  # that `WanPipeline` pads captions to
WORDS = 11  # the longest caption has 8 tokens, its end included
DROP_CAPTION = 0.1
SHIFT = 3.0  # of the timesteps, Wan's for small sizes
DRAWN = range(0, 40, 5)  # clips of the list `choice` whose captions are drawn while training
NOTED = ("vae_steps", "vae_clips", "clips", "picture_steps", "batch", "seed")
JUDGED = 40  # clips of a list that the result is measured on


def make_sheet(run: Path) -> None:
    """Write the sheet: each emoji with its transparency, [160, 256] pixels in all."""
    archive = fetch("google", run / "npm")
    entries, files = read_package(archive, DESIGNS["noto"])
    image = {entry["name"].lower(): entry["image"] for entry in entries}
    sheet = Image.new("RGBA", (TILES_PER_ROW * TILE, len(EMOJI) // TILES_PER_ROW * TILE))
    for i, name in enumerate(EMOJI):
        picture = Image.open(io.BytesIO(files[image[name]])).convert("RGBA")
        row, column = divmod(i, TILES_PER_ROW)
        sheet.paste(picture.resize((TILE, TILE)), (column * TILE, row * TILE))
    KEPT.mkdir(exist_ok=True)
    sheet.save(SHEET, optimize=True)


def make_transformer() -> WanTransformer3DModel:
    """3.3M parameters: six blocks of width 192 with six heads."""
    transformer = WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def make_text_encoder(tokenizer: Any) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=24,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)


def make_tokenizer() -> Any:
    """Every word of the captions is a token."""
    texts = [f"{emoji} {motion} on" for emoji, motion in pairs("train")]
    return FAMILIES["pixart"].make_tokenizer(KEPT, [*texts, *GROUNDS])


class PaddedAttention(WanAttnProcessor):
    """Cross-attention to `TEXT_TOKENS` tokens, of which all but the first `WORDS` are equal.

    `WanPipeline` pads captions with zeros. To attend to n equal tokens is to attend to one whose
    logit is larger by log n: this processor takes `WORDS + 1` tokens and does that, which is exact
    and faster to train.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states, *rest):
        bias = hidden_states.new_zeros(1, 1, 1, WORDS + 1)
        bias[..., -1] = math.log(TEXT_TOKENS - WORDS)
        rotary = rest[-1]
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, rotary)


def embed(text_encoder: UMT5EncoderModel, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """What `PaddedAttention` takes of captions, [B, 12, 96]: hidden states, then zeros."""
    tokens = tokenizer(texts, padding="max_length", max_length=WORDS, return_tensors="pt")
    tokens = tokens.to(text_encoder.device)
    hidden = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    return F.pad(hidden * tokens.attention_mask[..., None], (0, 0, 0, 1))


def make_scheduler() -> UniPCMultistepScheduler:
    """Wan's own: UniPC on the straight path between noise and clip."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )


class Batches:
    """The batch of each step: a function of the seed and the step alone.

    Args:
        args: with `batch`, the clips of a step, `seed`, and `picture_steps`.
        latents: of training clips, [P, 8, 5, 16, 16].
        captions: of each.
    """

    def __init__(self, args: argparse.Namespace, latents: torch.Tensor, captions: list[str]):
        self.args, self.latents, self.captions = args, latents, captions

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Clean latents, noise, its share σ [B, 1, 1, 1, 1] and the captions of a step.

        The first `picture_steps` have first frames alone, as many more of them as a clip has
        frames: what emoji look like is cheaper to learn from pictures. σ = 3u/(1 + 2u) for an even
        u in [0, 1], which are the σ that the scheduler draws with.
        """
        only_first = step < self.args.picture_steps
        size = self.args.batch * (self.latents.shape[2] if only_first else 1)
        device, seed = self.latents.device, self.args.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(self.latents), (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < DROP_CAPTION
        clean = self.latents[picks.to(device)].float()
        clean = clean[:, :, :1] if only_first else clean
        generator = torch.Generator(device).manual_seed(seed)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        u = torch.rand(size, 1, 1, 1, 1, generator=generator, device=device)
        texts = [
            "" if drop else self.captions[pick]
            for pick, drop in zip(picks.tolist(), dropped.tolist(), strict=True)
        ]
        return clean, noise, SHIFT * u / (1 + (SHIFT - 1) * u), texts


def flow_loss(parts: Any, tokenizer: Any, batch: tuple) -> torch.Tensor:
    """Mean of ‖v̂ - v‖²/n: v = ε - x at (1 - σ)·x + σ·ε."""
    clean, noise, share, texts = batch
    noisy = (1 - share) * clean + share * noise
    text = embed(parts["text"], tokenizer, texts)
    velocity = parts["transformer"](noisy, 1000 * share.flatten(), text, return_dict=False)[0]
    return (velocity.float() - (noise - clean)).square().mean()


def training_latents(run: Path, count: int, device: str) -> tuple[torch.Tensor, list[str]]:
    """Latents of the first training clips, encoded once and kept in the run, and their captions."""
    path = run / "latents.pt"
    if not path.exists():
        vae = AutoencoderKLWan.from_pretrained(run / "vae").to(device)
        torch.save(latents(vae, "train", count)[0].half(), path)
    kept = torch.load(path, weights_only=True, map_location=device)
    return kept, [clip("train", number).caption for number in range(len(kept))]


def make_pipeline(run: Path, tokenizer: Any, parts: Any) -> WanPipeline:
    """A diffusers pipeline of what is trained so far."""
    for block in parts["transformer"].blocks:
        block.attn2.set_processor(WanAttnProcessor())
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=parts["text"],
        vae=AutoencoderKLWan.from_pretrained(run / "vae").to(parts["text"].device),
        scheduler=make_scheduler(),
        transformer=parts["transformer"],
    )


def train_teacher(run: Path, args: argparse.Namespace, device: str) -> None:
    """Train the transformer with its text encoder and write `run/teacher`."""
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    parts = {"transformer": make_transformer(), "text": make_text_encoder(tokenizer)}
    if args.start:
        pipe = load_video(args.start)
        parts = {"transformer": pipe.transformer.train(), "text": pipe.text_encoder.train()}
    parts = torch.nn.ModuleDict(parts).to(device)
    for block in parts["transformer"].blocks:
        block.attn2.set_processor(PaddedAttention())
    batches = Batches(args, *training_latents(run, args.clips, device))
    ema = AveragedModel(parts, multi_avg_fn=ema_step)

    def loss(step: int) -> torch.Tensor:
        return flow_loss(parts, tokenizer, batches(step))

    def show(step: int) -> None:
        if step % args.sample_every == 0 or step == args.steps:
            pipe = make_pipeline(run, tokenizer, copy.deepcopy(ema.module).eval())
            captions = [clip("choice", number).caption for number in DRAWN]
            save_strips(generate(pipe, captions), run / f"teacher-{step:06d}.png")
            pipe.save_pretrained(run / "teacher")
            (run / "teacher.json").write_text(json.dumps(describe_training(args, step)))

    schedule = Schedule(args.steps, args.decay_steps, args.lr, warmup=200, weight_decay=0.01)
    fit(parts, loss, schedule, run / "teacher.pt", average=ema, on_step=show)


def describe_training(args: argparse.Namespace, step: int) -> dict[str, Any]:
    """What was trained for how long; of a training that another went before, both."""
    made: dict[str, Any] = {name: getattr(args, name) for name in NOTED} | {"steps": step}
    if args.start:
        before = json.loads((args.start.parent / "teacher.json").read_text())
        made = {**made, **{name: before[name] for name in NOTED if name.startswith("vae")}}
        made["before"] = before
    return made


def package(run: Path) -> None:
    """Keep the trained pipeline in float16 beside the sheet of emoji: measured, with a picture."""
    pipe = WanPipeline.from_pretrained(run / "teacher", **in_dtype(torch.float16))
    pipe.save_pretrained(KEPT)
    forget_folder(KEPT)
    pipe = load_video(KEPT)  # the kept weights, not the trained ones
    facts = json.loads((run / "teacher.json").read_text()) | measure(pipe, JUDGED)
    (KEPT / "video.json").write_text(json.dumps(facts, indent=1) + "\n")
    captions = [clip("results", number).caption for number in DRAWN]
    save_strips(generate(pipe, captions), KEPT / "drawn.png")
    size = sum(f.stat().st_size for f in KEPT.rglob("*") if f.is_file())
    print(f"{size / 1e6:.1f} MB", facts)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run"))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("emoji")
    option = commands.add_parser("train").add_argument
    option("--vae-steps", type=int, default=1800)
    option("--vae-decay-steps", type=int, default=900, help="linear to 0 at the end")
    option("--vae-clips", type=int, default=0, help="whole clips a step, for a GPU; 0: pieces")
    option("--clips", type=int, default=1440, help="that the transformer is trained on")
    option("--steps", type=int, default=3600)
    option("--picture-steps", type=int, default=900, help="of them on first frames alone")
    option("--decay-steps", type=int, default=1200, help="linear to 0 at the end")
    option("--batch", type=int, default=8)
    option("--lr", type=float, default=1e-3)
    option("--seed", type=int, default=0)
    option(
        "--start",
        type=Path,
        help="folder of a pipeline: its autoencoder is kept, and the rest trained on",
    )
    option("--sample-every", type=int, default=500)
    commands.add_parser("package")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    run: Path = args.run / "video"
    run.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.command == "emoji":
        make_sheet(args.run)
    elif args.command == "train":
        if args.start:
            shutil.copytree(args.start / "vae", run / "vae", dirs_exist_ok=True)
        else:
            train_vae(run, args.vae_steps, args.vae_decay_steps, args.vae_clips, device)
        train_teacher(run, args, device)
    else:
        package(run)


if __name__ == "__main__":
    main()
