"""The contract between a model family and everything else.

A `Family` says all that is particular to one kind of denoiser, in one file of this package. Nothing
outside of it branches on a family's name or on a class of diffusers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from convfusion.errors import ConvFusionError, UnsupportedModelError
from convfusion.families.carrier import Carrier
from convfusion.families.sites import Site
from convfusion.families.values import Values
from convfusion.mixers import Gate, Halo, Mixer
from convfusion.mixers.tokens import Grid, Turn

Denoiser: TypeAlias = Any  # a diffusers ModelMixin and ConfigMixin; no type can say both
Size: TypeAlias = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class TextReader:
    """How a pipeline reads prompts with one of its text encoders.

    Attributes:
        tokenizer: the pipeline's component that makes tokens of a prompt.
        encoder: the component that reads them.
        words: tokens that a prompt is padded to or cut to.
        layer: whose hidden states are taken, as the encoder counts them from the end; None takes
            its output, which is normed.
        pooled: whether its pooled output goes to the denoiser too.
        masked: whether the encoder is told which tokens are padding.
        lowered: whether prompts are stripped of blanks round them and put in lower case first.
    """

    tokenizer: str
    encoder: str
    words: int
    layer: int | None = None
    pooled: bool = False
    masked: bool = False
    lowered: bool = False


TIMESTEP_DOCS = "timestep of every sample, as the scheduler counts them"
TEXT_DOCS = "hidden states of the text encoder, padded as its pipeline pads them"


class Family(ABC):
    """What the library knows about one family of denoisers; see docs/extend.md.

    Attributes:
        name: short, stored in checkpoints and caches.
        classes: names of the diffusers classes of its denoisers; subclasses count too.
        component: the attribute of a pipeline that holds the denoiser.
        further_components: attributes that may hold further denoisers of the same family, which
            take their turns with the first; they are converted together.
        latents: the argument of the denoiser's forward that the noisy latents go to.
        times: the one that timesteps go to.
        negated: whether it predicts the opposite of what its scheduler takes.
        presets: by name of the preset and pattern over site paths, the kernel size of a ΔConvBlock,
            or settings of any mixer.
        halo: settings of halo blocks for grids of its rank.
        full_size: class and configuration of published denoisers by name, where they differ from
            the defaults of diffusers; `bench` and `plan` count and time them.
        fixed_size: whether its pipelines draw at the denoiser's own size only.
        gives_latents: whether its pipelines know `output_type="latent"`.
        prompt_argument: the argument of its pipelines' call that prompts go to.
        call_options: what its pipelines are called with unless the caller says otherwise.
        released_gate: the gate of the blocks that the paper's authors released for it; None if
            there are none.
        input_docs: what arguments of the denoiser are, in words, by dotted name; an exported file
            says so.
        attention_classes: what its self-attentions are; a subclass of these is refused.
        prompted: which sample of the batch that its pipelines guide one picture with is the one
            that sees the prompt.
        frames: of the latents of its videos, as they are trained; 0 where it draws pictures. Where
            the grids of its sites have two sides, each frame is mixed by itself.
        frame_rate: frames a second that its videos are shown at.
        pixels_per_latent: along a side, in the autoencoder that `full_size` was published with.
        captioned: whether it draws what a text or the name of a class says.
        mixes_maps: whether its self-attentions take maps [B, C, H, W], norm them first, and add
            them to what they give.
        rotary: whether its self-attentions turn queries and keys by where they lie. Such a family
            has a `find_turn` of its own where analysis and measured starts know it.
        shares_blocks_with: the family whose blocks fit this one and the other way round, since its
            sites have the same paths; by default there is none.
        without_sites: what is said of a model that has none.
    """

    name: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    component: ClassVar[str]
    further_components: ClassVar[tuple[str, ...]] = ()
    latents: ClassVar[str]
    times: ClassVar[str] = "timestep"
    negated: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, int | Mixer]]]
    halo: ClassVar[Halo] = Halo()
    full_size: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {}
    fixed_size: ClassVar[bool] = False
    gives_latents: ClassVar[bool] = True
    prompt_argument: ClassVar[str] = "prompt"
    call_options: ClassVar[Mapping[str, Any]] = {}
    released_gate: ClassVar[Gate | None] = None
    input_docs: ClassVar[Mapping[str, str]] = {}
    attention_classes: ClassVar[tuple[type[nn.Module], ...]] = (Attention,)
    prompted: ClassVar[int] = -1
    frames: ClassVar[int] = 0
    frame_rate: ClassVar[int] = 16
    pixels_per_latent: ClassVar[int] = 8
    captioned: ClassVar[bool] = True
    mixes_maps: ClassVar[bool] = False
    rotary: ClassVar[bool] = False
    shares_blocks_with: ClassVar[str] = ""
    without_sites: ClassVar[str] = "has no self-attention in transformer blocks to replace"

    @abstractmethod
    def list_sites(self, model: Denoiser) -> list[Site]:
        """The self-attentions of a model, in the order of its modules."""

    @abstractmethod
    def carrier(self, model: Denoiser) -> Carrier:
        """How the grid of the tokens reaches the sites of a model."""

    @abstractmethod
    def encode_prompts(self, pipe: Any, prompts: Sequence[str], size: Size) -> dict[str, Any]:
        """What a pipeline tells its denoiser of a batch of prompts, without guidance.

        Args:
            pipe: a pipeline of this family.
            prompts: one per sample.
            size: (height, width) of the pictures in pixels.

        Returns:
            Keyword arguments of the denoiser; each tensor is [B, …].
        """

    def find_padding(self, pipe: Any, prompts: Sequence[str]) -> Tensor | None:
        """Which tokens of the text are padding, where all of them are attended to: [B, T].

        Args:
            pipe: a pipeline of this family.
            prompts: one per sample.

        Returns:
            True where a token is padding; None, the default, where that is not known.
        """
        return None

    def text_readers(self, pipe: Any) -> tuple[TextReader, ...]:
        """How a pipeline turns prompts into `encoder_hidden_states`, for an export of all of it.

        The states of several readers are put side by side along the channels.

        Raises:
            ConvFusionError: it is of a kind whose parts are not known; by default, every one.
        """
        raise ConvFusionError(
            f"a {type(pipe).__name__} is not exported as a whole, since how it reads prompts is "
            "not known; its denoiser alone can be"
        )

    @abstractmethod
    def example_conditioning(
        self, model: Denoiser, batch: int, words: int | None, values: Values
    ) -> dict[str, Any]:
        """Made-up keyword arguments beside latents and timestep, in a pipeline's shapes.

        Args:
            model: a denoiser of this family.
            batch: samples.
            words: tokens of the text; None for as many as its text encoder gives.
            values: makes a tensor of random values of a shape, in the model's dtype.
        """

    def find_turn(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Turn | None:
        """The rotary embedding that a self-attention of this family is called with.

        Args:
            args, kwargs: of the call of the attention.

        Returns:
            What queries and keys [B, h, N, d] are given to, such as a `rotary.PairTurn`; None in a
            family without.
        """
        return None

    def preset_for(self, model: Denoiser) -> str:
        """The name of the preset that fits a model; by default, the first."""
        return next(iter(self.presets))

    def patch_size(self, model: Denoiser) -> int:
        """Latents along the side of a patch, which pictures must be multiples of."""
        return 1

    def largest_side(self, model: Denoiser) -> int | None:
        """The longest side of latents that a model knows places for; None where any will do."""
        return None

    def latent_unit(self, model: Denoiser) -> int:
        """What the sides of latents are multiples of where every layer divides them evenly."""
        return self.patch_size(model)

    def latent_channels(self, model: Denoiser) -> int | None:
        """Channels of the latents that a model is given, by its config; None if it does not say."""
        return model.config.get("in_channels")

    def latent_shape(self, model: Denoiser, batch: int, sides: Grid) -> tuple[int, ...]:
        """The shape in which a model takes latents; by default [B, C, H, W] or [B, C, T, H, W].

        Args:
            model: a denoiser of this family.
            batch: samples.
            sides: (height, width) of the latents, of a video behind its frames.
        """
        return (batch, model.config.in_channels, *sides)

    def arrange_inputs(
        self, model: Denoiser, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Keyword arguments of one call of a model; by default what is given, as it is.

        A family whose latents are packed, or that is told their sides, says so here.

        Args:
            model: a denoiser of this family.
            latents: noisy, [B, C, H, W] or [B, C, T, H, W].
            timesteps: [B].
            conditioning: all else, as `encode_prompts` or `example_conditioning` gives it.
        """
        return {self.latents: latents, self.times: self.tell(timesteps), **conditioning}

    def tell(self, timesteps: Tensor) -> Tensor:
        """Timesteps [B] of the scheduler as the denoiser is told them; by default as they are."""
        return timesteps

    def unpack_latents(self, model: Denoiser, packed: Any, sides: Grid) -> Tensor:
        """Latents in a model's own layout, or what it gives for them, as [B, C, *sides].

        Args:
            model: a denoiser of this family.
            packed: latents of `latent_shape`, with any number of channels.
            sides: (height, width) of the latents, of a video behind its frames.
        """
        return packed

    def pack_drawn(self, model: Denoiser, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] as a pipeline has them while it draws; by default as they are."""
        return latents

    def latent_pixels(self, model: Denoiser) -> int:
        """Pixels per latent along a side, in the autoencoder that a model was published with."""
        return self.pixels_per_latent

    def native_latents(self, model: Denoiser) -> Size:
        """(height, width) of the latents that a model was trained on, by its config."""
        sides = model.config.sample_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        return height, width

    def check_prompts(self, pipe: Any, prompts: Sequence[str]) -> None:
        """Raise a ConvFusionError for a prompt that a pipeline cannot draw; by default, never."""

    def call_prompts(self, pipe: Any, prompts: Sequence[str]) -> list[Any]:
        """Prompts as the call of a pipeline takes them."""
        return list(prompts)

    def guide(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a call of its pipelines, where these take `guidance_scale` in another way."""
        return dict(options)

    def describe_further_needs(self, model: Denoiser) -> str:
        """What a model takes beside latents, timestep and captions, in words; '' for nothing."""
        return ""

    def idle_components(self, pipe: Any) -> tuple[str, ...]:
        """Components that pipelines of this class have, and that this one does without."""
        return ()

    def check_guidance(self, model: Denoiser, guidance: float) -> None:
        """Raise a ConvFusionError for a guidance scale that a model cannot draw with."""

    def check_frames(self, model: Denoiser, frames: int) -> None:
        """Raise a ConvFusionError for a number of frames that a model cannot draw."""

    def check_convert(self, model: Denoiser) -> None:
        """Raise an UnsupportedModelError for attention that no mixer replaces, such as a causal
        one; by default, never."""

    def check_distill(self, model: Denoiser) -> None:
        """Raise a ConvFusionError for a model that predicts nothing that is distilled; by default,
        never."""

    def check_export(self, model: Denoiser) -> None:
        """Raise a ConvFusionError for a model that is not exported; by default, for one of whose
        attentions text and image share some."""
        if any(site.joint is not None for site in self.list_sites(model)):
            raise ConvFusionError(
                f"a {type(model).__name__} is not exported: to do so with attention that text "
                "and image share was not tried"
            )


FAMILIES: dict[str, Family] = {}  # by name


def register(family: Family) -> Family:
    """Make a family known to every part of the library.

    Raises:
        ValueError: it lacks something, or its name, class or preset is taken already.
    """
    kind = type(family).__name__
    wanted = ("name", "classes", "component", "latents", "presets")
    if missing := [each for each in wanted if not getattr(family, each, None)]:
        raise ValueError(f"{kind} must say its {' and its '.join(missing)}")
    for other in FAMILIES.values():
        for what in ("classes", "presets", "full_size"):
            if both := set(getattr(other, what)) & set(getattr(family, what)):
                raise ValueError(f"{', '.join(sorted(both))}: taken by the family {other.name}")
    if family.name in FAMILIES:
        raise ValueError(f"a family with the name {family.name} is registered already")
    FAMILIES[family.name] = family
    return family


def supported_classes() -> list[str]:
    """The names of the denoiser classes that a family knows."""
    return sorted(name for family in FAMILIES.values() for name in family.classes)


def family_of(model: Denoiser) -> Family:
    """The family of a denoiser, found by the name of its class or of one it derives from.

    Raises:
        UnsupportedModelError: there is none.
    """
    for parent in type(model).__mro__:
        for family in FAMILIES.values():
            if parent.__name__ in family.classes:
                return family
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported; supported are {', '.join(supported_classes())}"
    )


def transformer_blocks(model: Denoiser) -> list[tuple[str, BasicTransformerBlock]]:
    """All transformer blocks with their paths, in module order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, BasicTransformerBlock)]


def is_self_attention(block: BasicTransformerBlock) -> bool:
    """Whether `attn1` of a block attends to its own tokens."""
    return isinstance(block.attn1, Attention) and not block.attn1.is_cross_attention


def list_plain_sites(model: Denoiser) -> list[Site]:
    """The self-attentions of a transformer all of whose blocks have the same tokens."""
    return [
        Site(
            path=f"{path}.attn1",
            channels=block.attn1.query_dim,
            heads=block.attn1.heads,
            level=0,
            owner="",
            # The hidden state goes straight to attn2 if there is one; else norm3 comes next.
            tap=f"{path}.attn2" if block.attn2 is not None else f"{path}.norm3",
        )
        for path, block in transformer_blocks(model)
        if is_self_attention(block)
    ]
