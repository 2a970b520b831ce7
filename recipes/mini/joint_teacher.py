"""Step 11: the sixth teacher, in Stable Diffusion 3's layout.

`python joint_teacher.py train --minutes 100` trains an `SD3Transformer2DModel` and the narrower of
its two text encoders on the latents of the training pictures (flow matching, EMA, a tenth of the
captions dropped) for as many minutes of this process's own CPU time. It writes `run/joint/teacher`
in diffusers' layout, draws a picture each `--sample-every` steps, and resumes from the state beside
them. `python joint_teacher.py package` keeps the result in float16 in `joint/` beside this file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    ema_step,
    forget_folder,
    load_pictures,
    load_state,
    make_optimizer,
    save_state,
    take_step,
)
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.embeddings import PatchEmbed
from diffusers.utils import make_image_grid
from teacher import Batches, encode
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from convfusion import mini
from convfusion.checkpoint.pipelines import in_dtype
from convfusion.demo import spread
from convfusion.generate import generate
from joint import (
    GUIDANCE,
    KEPT,
    NO_T5,
    SIZE,
    STEPS,
    embedded_parts,
    load_joint,
    measure,
    noise_shares,
)

WIDTH, HEADS, BLOCKS = 128, 4, 6
LARGEST = 64  # side of the largest grid of tokens that has positions
NARROW = 32  # width of the second text encoder
T5_TOKENS = 256  # zeros that `StableDiffusion3Pipeline` adds where there is no T5
TEXT_SCALE = 12.0  # about the deviation of the first encoder's hidden states
NOTED = ("minutes", "batch", "lr", "seed")
JUDGED = 64  # pictures of a list that the result is measured on


def make_transformer(text_width: int) -> SD3Transformer2DModel:
    """3.5M parameters. Neighbouring tokens are one radian of the fastest position apart."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=text_width,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=text_width,
        pos_embed_max_size=LARGEST,
        dual_attention_layers=(),
        qk_norm="rms_norm",
    )
    spread = PatchEmbed(LARGEST, LARGEST, 1, 4, WIDTH, pos_embed_max_size=LARGEST)
    transformer.pos_embed.pos_embed.copy_(spread.pos_embed)
    for block in transformer.transformer_blocks:  # each starts as the identity, as DiT's do
        for norm in (block.norm1, block.norm1_context):
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def make_narrow_encoder(first: CLIPTextModelWithProjection) -> CLIPTextModelWithProjection:
    """A second text encoder of 0.2M parameters, for the first one's tokens."""
    sizes = {"hidden_size": NARROW, "intermediate_size": 4 * NARROW, "projection_dim": NARROW}
    config = CLIPTextConfig(**first.config.to_dict() | sizes | {"num_attention_heads": 2})
    model = CLIPTextModelWithProjection(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


class CountedZeros:
    """Joint attention in which the last text token stands for `T5_TOKENS` equal ones.

    Text tokens have no positions, so that the zeros in T5's place stay equal to each other in all
    blocks. To attend to n equal tokens is to attend to one whose logit is larger by log n, which
    is exact and faster to train.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states, **unused):
        """Image rows [B, N, C] and text rows [B, T, C] from tokens of these shapes."""
        image, text = hidden_states, encoder_hidden_states

        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        of_image = (attn.norm_q(split(attn.to_q(image))), attn.norm_k(split(attn.to_k(image))))
        of_text = (
            attn.norm_added_q(split(attn.add_q_proj(text))),
            attn.norm_added_k(split(attn.add_k_proj(text))),
        )
        query, key = (torch.cat(pair, dim=2) for pair in zip(of_image, of_text, strict=True))
        value = torch.cat([split(attn.to_v(image)), split(attn.add_v_proj(text))], dim=2)
        bias = torch.zeros(1, 1, 1, key.shape[2], device=key.device)
        bias[..., -1] = math.log(T5_TOKENS)
        with torch.autocast(key.device.type, enabled=False):  # on CPU float32 is the faster here
            out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), bias)
        out = out.transpose(1, 2).flatten(2)
        image, text = out[:, : image.shape[1]], out[:, image.shape[1] :]
        text = text if attn.context_pre_only else attn.to_add_out(text)
        return attn.to_out[0](image), text


def embed(
    encoders: list[CLIPTextModelWithProjection], tokenizer: Any, texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text tokens [B, 25, 224] of captions, one zero for all of T5's, and pooled ones [B, 224].

    The first encoder's tokens are divided by `TEXT_SCALE`; see `to_pipeline`.
    """
    first, second = encoders
    ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(first.device)
    with torch.no_grad():
        frozen = first(ids, output_hidden_states=True)
    trained = second(ids, output_hidden_states=True)
    tokens = [frozen.hidden_states[-2] / TEXT_SCALE, trained.hidden_states[-2]]
    pooled = [frozen.text_embeds, trained.text_embeds]
    return F.pad(torch.cat(tokens, dim=2), (0, 0, 0, 1)), torch.cat(pooled, dim=1)


def flow_loss(transformer: Any, batch: tuple, text: tuple[torch.Tensor, torch.Tensor]):
    """Mean of ‖v̂ − v‖²/n: v = ε − x at (1 − σ)·x + σ·ε, with σ logit-normal.

    Args:
        transformer: with `CountedZeros` in its blocks.
        batch: of `Batches`, whose timesteps are 0 … 999.
        text: of `embed`.
    """
    clean, noise, t, _ = batch
    share = noise_shares((t + 0.5) / 1000).view(-1, 1, 1, 1)
    noisy = (1 - share) * clean + share * noise
    velocity = transformer(noisy, *text, 1000 * share.flatten(), return_dict=False)[0]
    return (velocity.float() - (noise - clean)).square().mean()


def to_pipeline(parts: Any, embedded: dict[str, Any]) -> StableDiffusion3Pipeline:
    """A diffusers pipeline of what is trained so far; it has copies of the trained parts.

    The hidden states that SD3's pipeline reads are those before CLIP's last norm. Training divides
    them by `TEXT_SCALE`, so that one learning rate fits all weights; here that goes into the
    weights that read them.
    """
    parts = copy.deepcopy(parts).cpu().eval()
    transformer = parts["transformer"]
    transformer.set_attn_processor(JointAttnProcessor2_0())
    with torch.no_grad():
        transformer.context_embedder.weight[:, :-NARROW] /= TEXT_SCALE
    return StableDiffusion3Pipeline(
        transformer=transformer,
        text_encoder_2=parts["text_2"],
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **embedded,
    )


class Budget:
    """CPU time of this process that training has taken, of a budget; kept with the state.

    Args:
        minutes: of the budget.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes, self._before, self._start = minutes, 0.0, time.process_time()

    def seconds(self) -> float:
        return self._before + time.process_time() - self._start

    def share(self) -> float:
        """Spent so far; 1 is all of it."""
        return self.seconds() / (60 * self.minutes)

    def rate(self, step: int, highest: float) -> float:
        """Learning rate: linear up in 200 steps, linear to 0 over the last 35 % of the budget."""
        return highest * min(1, (step + 1) / 200, max(0, 1 - self.share()) / 0.35)

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._before, self._start = state["seconds"], time.process_time()


def training_latents(run: Path, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """Latents [P, 4, 16, 16] of the training pictures, encoded once and kept in the run."""
    path = run / "latents.pt"
    if not path.exists():
        vae = embedded_parts()["vae"].to(device)
        torch.save(encode(vae, pictures, device), path)
    return torch.load(path, weights_only=True, map_location=device)


def train(args: argparse.Namespace) -> None:
    """Spend the budget, and write `run/joint/teacher` and what it took."""
    run = args.run / "joint"
    run.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    embedded = embedded_parts()
    first = copy.deepcopy(embedded["text_encoder"]).to(device).requires_grad_(False)
    parts = make_parts(first).to(device)
    pictures = load_pictures(args.run, "train")
    latents, rows = training_latents(run, pictures.images, device), pictures.rows
    batches = Batches(args, latents[: args.pictures], rows[: args.pictures], device)
    average = AveragedModel(parts, multi_avg_fn=ema_step)

    def loss_of(step: int) -> torch.Tensor:
        batch = batches(step)
        text = embed([first, parts["text_2"]], embedded["tokenizer"], batch[-1])
        return flow_loss(parts["transformer"], batch, text)

    def show(step: int) -> None:
        pipe = to_pipeline(average.module, embedded)
        draw(pipe, run / f"teacher-{step:06d}.png")
        pipe.save_pretrained(run / "teacher")
        made = {name: getattr(args, name) for name in NOTED}
        made |= {"steps": step, "seconds": round(budget.seconds())}
        (run / "teacher.json").write_text(json.dumps(made))

    optimizer, budget = make_optimizer(parts, weight_decay=0.01), Budget(args.minutes)
    state = {"model": parts, "optimizer": optimizer, "average": average, "budget": budget}
    step, losses = load_state(run / "teacher.pt", state), []
    while budget.share() < 1:
        rate = budget.rate(step, args.lr)
        losses.append(take_step(parts, optimizer, loss_of, step, rate, average).item())
        step += 1
        if step % 50 == 0:
            mean = sum(losses) / len(losses)
            print(f"{step} loss {mean:.4f} {budget.seconds():.0f} s", flush=True)
            losses.clear()
        if step % args.sample_every == 0:
            show(step)
        if step % 250 == 0:
            save_state(run / "teacher.pt", state, step)
    save_state(run / "teacher.pt", state, step)
    show(step)


def make_parts(first: CLIPTextModelWithProjection) -> torch.nn.ModuleDict:
    """What is trained beside a frozen first text encoder."""
    transformer = make_transformer(first.config.projection_dim + NARROW)
    transformer.set_attn_processor(CountedZeros())
    return torch.nn.ModuleDict({"transformer": transformer, "text_2": make_narrow_encoder(first)})


def shown_prompts() -> list[str]:
    """Eight captions of training and eight of the list `choice`, evenly spread."""
    sides = (mini.training_data().captions, mini.held_out_data("choice").captions)
    return [side[(2 * i + 1) * len(side) // 16] for side in sides for i in range(8)]


def draw(pipe: StableDiffusion3Pipeline, path: Path) -> None:
    prompts = shown_prompts()
    images = generate(
        pipe, prompts, guidance=GUIDANCE, steps=STEPS, size=(SIZE, SIZE), progress=False
    )
    make_image_grid(images, rows=2, cols=len(images) // 2).save(path)


def package(run: Path) -> None:
    """Keep the trained parts in float16: measured, with a picture."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        run / "joint" / "teacher", **NO_T5, **in_dtype(torch.float16)
    )
    shutil.rmtree(KEPT, ignore_errors=True)
    pipe.save_pretrained(KEPT)
    for name in embedded_parts():
        shutil.rmtree(KEPT / name, ignore_errors=True)  # there is no folder of a missing T5
    forget_folder(KEPT)
    pipe = load_joint(KEPT)  # the kept weights, not the trained ones
    facts = json.loads((run / "joint" / "teacher.json").read_text())
    for part in ("choice", "results"):
        facts[part] = measure(pipe, spread(mini.held_out_data(part), JUDGED))
    (KEPT / "joint.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(pipe, KEPT / "drawn.png")
    size = sum(f.stat().st_size for f in KEPT.rglob("*") if f.is_file())
    print(f"{size / 1e6:.1f} MB", facts)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run"))
    commands = parser.add_subparsers(dest="command", required=True)
    option = commands.add_parser("train").add_argument
    option("--minutes", type=float, default=100, help="of this process's CPU time")
    option("--batch", type=int, default=16)
    option("--lr", type=float, default=1e-3)
    option("--seed", type=int, default=0)
    option("--pictures", type=int, help="the first ones alone, to see that it learns")
    option("--sample-every", type=int, default=2000)
    commands.add_parser("package")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.command == "train":
        train(args)
    else:
        package(args.run)


if __name__ == "__main__":
    main()
