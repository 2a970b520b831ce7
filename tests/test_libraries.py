"""What the package takes from other libraries: their versions, and what is not promised by them."""

import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from tiny_models import CASES, run
from tiny_pipelines import stable_diffusion
from torch.utils._pytree import tree_map

import convfusion
from convfusion import Removed, files, mini, uniform
from convfusion.families import list_sites
from convfusion.generate import generate

pytestmark = pytest.mark.libraries

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PINNED = {"torch", "tomli"}  # torch has one version in both; tomli is for Python 3.10 alone
# With nothing between the input of a block and its site, unlike a skip connection or an attention,
# and with nothing left of an attention that is removed, unlike one of text and image.
DIRECT = [case for case in CASES if case.name not in ("hunyuan", "vace", "ddpm") and not case.joint]


def floors(lines):
    """The oldest version of each package that requirements allow."""
    return {
        requirement.name: Version(bound.version)
        for requirement in map(Requirement, lines)
        for bound in requirement.specifier
        if bound.operator == ">="
    }


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {each.name: Version(str(each.specifier).removeprefix("==")) for each in found}


def test_the_oldest_versions_that_are_declared_are_those_that_are_tested():
    """All that the package needs, and of the extras those that the older libraries hold back."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = floors(project["dependencies"])
    extras = floors(chain.from_iterable(project["optional-dependencies"].values()))
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    assert all((newest | oldest)[name] == needed[name] for name in needed.keys() - PINNED)
    held = extras.keys() & oldest.keys()
    assert held >= {"peft"} and all(oldest[name] == extras[name] for name in held)
    assert all(newest.get(name) != version for name, version in oldest.items())  # only what differs


def give_nothing(module, args, output):
    """Forward hook of an attention: zeros in place of what it gives."""
    return tree_map(torch.zeros_like, output)


@pytest.mark.parametrize("case", DIRECT, ids=lambda case: case.name)
@torch.no_grad()
def test_the_tap_shows_the_hidden_state_right_after_its_site(case):
    """With nothing in place of the attention it is what came in; with the attention it is not."""
    seen = {}

    def keep(name):
        def hook(module, args, kwargs):
            seen[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    def watched(model):
        for site in list_sites(model):
            for path in (site.block, site.tap):
                place = model.get_submodule(path)
                place.register_forward_pre_hook(keep(path), with_kwargs=True)
        run(model, case, *case.sizes[0])
        return [torch.equal(seen[site.block], seen[site.tap]) for site in list_sites(model)]

    removed = case.model()
    convfusion.convert(removed, uniform(Removed()))
    for site in list_sites(removed):
        if site.joint is not None:  # which still attends to the text
            removed.get_submodule(site.path).register_forward_hook(give_nothing)
    assert all(watched(removed)) and not any(watched(case.model()))


def test_the_progress_bar_is_as_it_was_after_drawing(capsys):
    pipe = stable_diffusion()
    pipe.set_progress_bar_config(desc="mine")
    generate(pipe, ["red"], steps=1)
    assert "mine" not in capsys.readouterr().err
    pipe(["red"], num_inference_steps=1)
    assert "mine" in capsys.readouterr().err


def test_every_weight_of_the_embedded_teacher_is_loaded():
    """transformers before 5.6 know those of a text encoder by other names."""

    def values(tensors):
        return {(tuple(each.shape), each.float().numpy().tobytes()) for each in tensors}

    pipe = mini.load_teacher()
    for part in ("text_encoder", "unet", "vae"):
        [file] = (mini.TEACHER / part).glob("*.safetensors")
        kept = files.read_tensors(file)
        assert values(kept.values()) <= values(getattr(pipe, part).state_dict().values()), part
