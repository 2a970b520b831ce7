"""The model card that goes to the Hub with blocks: what they are, how to use them, how good.

A card is Markdown with a head that the Hub reads. Between two marks it has the measured figures,
which are filled in once there is an evaluation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from convfusion.checkpoint.hub import NAME
from convfusion.checkpoint.named import BLOCKS
from convfusion.errors import CheckpointError, first_line
from convfusion.families import FAMILIES
from convfusion.surgery.record import TrainingRecord
from convfusion.text import markdown_code, markdown_text, python_string

LIBRARY, RELATION = "convfusion", "adapter"  # as the Hub calls a part that its base model needs
HERE = "this-folder"  # how a card calls the blocks that it lies beside
WORDS = {"delta_conv": "ΔConvBlocks", "halo": "halo blocks", "mean_only": "mean tokens"}
WORD = re.compile(r"\w[\w./-]*", re.ASCII)  # that a shell takes as it is
BEGIN, END = "<!--figures-->", "<!--/figures-->"
UNMEASURED = f"{BEGIN}\nNot measured.\n{END}"

CONTENT = """# {base}: {kinds} in place of self-attention

{what}

## Use

{use}

## Blocks

{blocks}

## Measured

{measured}

## Limits

{limits}
"""

LIMITS = """- The pictures are nearly those of the base model, not the same, and never better.
- The blocks belong to this base model. With a fine-tune of it they have not been compared.
- A LoRA has no effect on a self-attention that was replaced, unless it was merged into the base
  model before the blocks were made."""

FROM_DIFFUSERS = """import convfusion
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({base}, use_safetensors=True)"""

USE = """In Python:

```python
{loading}
convfusion.load(pipe, "{here}")
```

On the command line:

```sh
convfusion generate {model} --blocks {here} --prompt "a lighthouse in a storm"
```

In ComfyUI, with the nodes of ConvFusion: put `{file}` into `ComfyUI/models/model_patches`."""


def describe_head(base: str, family: str, *tags: str, license: str | None = None) -> str:
    """The head of a card, which the Hub reads.

    Args:
        base: the base model, named in the head where it is a name on the Hub.
        family: of the base model, as a manifest has it.
        tags: further ones.
        license: short name of the licence, as the Hub has it.
    """
    known = FAMILIES.get(family)
    data = ModelCardData(
        library_name=LIBRARY,  # diffusers alone cannot load the blocks, and the Hub would say so
        base_model=base if NAME.fullmatch(base) else None,
        base_model_relation=RELATION if NAME.fullmatch(base) else None,
        license=license,
        pipeline_tag="text-to-image" if known and known.prompt_argument == "prompt" else None,
        tags=["convfusion", "attention-free", *tags],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def describe_kinds(manifest: Mapping[str, Any]) -> str:
    """What stands at the sites, in a few words: `halo blocks and mean tokens`."""
    return name_kinds(site["mixer"].get("kind") for site in manifest["sites"].values())


def name_kinds(kinds: Iterable[Any]) -> str:
    """Kinds of mixers in words, each once."""
    return " and ".join(WORDS.get(kind, markdown_text(kind)) for kind in dict.fromkeys(kinds))


def describe_use(base: str, loading: str | None = None) -> str:
    """How blocks are used: in Python, on the command line and in ComfyUI.

    Args:
        base: the base model, as `from_pretrained` and the command line take it.
        loading: lines of Python that make its pipeline, by default with diffusers.
    """
    python = loading or FROM_DIFFUSERS.format(base=python_string(base))
    model = base if WORD.fullmatch(base) else "MODEL"
    return USE.format(loading=python, here=HERE, model=model, file=BLOCKS)


def describe_blocks(manifest: Mapping[str, Any]) -> str:
    """A list of the mixers with their settings and counts, and what they have been through."""
    kinds: Counter[str] = Counter()
    for site in manifest["sites"].values():
        mixer = dict(site["mixer"])
        kind = mixer.pop("kind")
        told = [f"{markdown_text(name)} {markdown_text(value)}" for name, value in mixer.items()]
        name = markdown_code(kind) if str(kind).isidentifier() else markdown_text(kind)
        kinds[f"{name}: {', '.join(told)}" if told else name] += 1
    listed = "\n".join(f"- {count} × {words}" for words, count in kinds.items())
    return f"{listed}\n\nThese blocks are {TrainingRecord.from_dict(manifest)}."


def plain_card(manifest: Mapping[str, Any], base: str = "", license: str | None = None) -> str:
    """A card for blocks of which only the manifest is known.

    Args:
        manifest: of the blocks.
        base: the base model, by default as the manifest names it.
        license: short name of the licence.
    """
    base = base or str(manifest.get("base_model") or "the base model")
    kinds, version = describe_kinds(manifest), markdown_text(manifest.get("version"))
    what = (
        f"These {kinds} take the place of {len(manifest['sites'])} self-attention layers of "
        f"{markdown_text(base)}. They were made with ConvFusion {version}. Everything else is the "
        "base model, which is not part of this repository and keeps its own licence."
    )
    return describe_head(base, str(manifest.get("family")), license=license) + CONTENT.format(
        base=markdown_text(base),
        kinds=kinds,
        what=what,
        use=describe_use(base),
        blocks=describe_blocks(manifest),
        measured=UNMEASURED,
        limits=LIMITS,
    )


def read_card(card: str) -> ModelCard:
    """A card that may lack a head, which the Hub's library would warn of."""
    whole = card if card.lstrip().startswith("---") else f"---\n{{}}\n---\n{card}"
    return ModelCard(whole, ignore_metadata_errors=False)


def read_head(card: str, name: str) -> dict[str, Any]:
    """The head of a card.

    Args:
        card: its text.
        name: what an error calls it.

    Raises:
        CheckpointError: the head is no YAML, or says what no card can say.
    """
    try:
        return read_card(card).data.to_dict()
    except Exception as error:  # of YAML, and of the checks of the Hub's library
        raise CheckpointError(f"{name} has a damaged head: {first_line(error)}") from None


def complete_card(
    card: str, manifest: Mapping[str, Any], base: str, license: str, figures: str | None
) -> str:
    """A card with what is known when it is published.

    Args:
        card: its text, of a run or written by hand; what it says in its own words stays.
        manifest: of the blocks.
        base: name of the base model on the Hub.
        license: short name of the licence of the blocks.
        figures: Markdown that goes between the marks; None leaves what is there.
    """
    whole = set_head(card, base, license)
    before = str(manifest.get("base_model") or "the base model")
    whole = whole.replace(describe_use(before), describe_use(base))
    if figures is not None:
        marked = f"{BEGIN}\n{figures}\n{END}"
        pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
        whole = pattern.sub(lambda _: marked, whole)
    return whole


def set_head(card: str, base: str, license: str) -> str:
    """A card whose head names base model, licence and library; the rest of it stays."""
    text = read_card(card)
    head: Any = text.data
    head.base_model, head.license = base, license
    head.library_name = head.get("library_name") or LIBRARY
    head.base_model_relation = head.get("base_model_relation") or RELATION
    return str(text)


def name_repository(card: str, repo_id: str) -> str:
    """A card that calls the blocks by their name on the Hub instead of as its own folder."""
    quoted = card.replace(f'"{HERE}"', f'"{repo_id}"')
    return quoted.replace(f"--blocks {HERE} ", f"--blocks {repo_id} ")
