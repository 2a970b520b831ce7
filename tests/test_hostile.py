"""Files made to do harm: refused in one clear line, with no more memory than they have bytes."""

import json
import resource
import struct

import pytest
import torch
from released_files import release
from safetensors.torch import save_file
from tiny_models import sd15
from tiny_pipelines import stable_diffusion

import convfusion
from convfusion import CheckpointError, ConvFusionError, DeltaConv, uniform
from convfusion.checkpoint import BLOCKS, MANIFEST
from convfusion.files import JSON_BYTES, read_header

SITE = "mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(autouse=True)
def _bounded():
    """No test here may make the process grow by 100 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.fixture
def folder(tmp_path):
    model = sd15()
    convfusion.convert(model, uniform(DeltaConv(kernel_size=3)))
    convfusion.save(model, tmp_path / "blocks")
    return tmp_path / "blocks"


def refused(source, message):
    model = sd15()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConvFusionError, match=message) as raised:
        convfusion.load(model, source)
    assert len(str(raised.value)) < 2100
    assert [type(module) for module in model.modules()] == kinds


def parted(path):
    """The header and the data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def change(**values):
    """A change of the header's first tensor."""

    def inflict(header, data):
        name = next(name for name in header if name != "__metadata__")
        header[name].update(values)
        return header, data

    return inflict


def overlapping(header, data):
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    return header, data


def twice(header, data):
    """One name for two tensors: the JSON says it twice."""
    first, second = [name for name in header if name != "__metadata__"][:2]
    return json.dumps(header).replace(f'"{second}"', f'"{first}"').encode(), data


HEADERS = {
    "offsets out of range": change(data_offsets=[0, 2**60]),
    "offsets the wrong way round": change(data_offsets=[64, 0]),
    "negative offsets": change(data_offsets=[-64, 0]),
    "overlapping tensors": overlapping,
    "a name twice": twice,
    "an absurd shape": change(shape=[2**40, 2**40]),
    "a shape that overflows to nothing": change(shape=[2**32, 2**32]),
    "an absurd shape of no elements": change(shape=[2**60, 0], data_offsets=[0, 0]),
    "a negative side": change(shape=[-8]),
    "a thousand axes": change(shape=[1] * 1000),
    "a dtype of objects": change(dtype="O"),
    "no JSON": lambda header, data: (b"{" * 100, data),
    "deeply nested JSON": lambda header, data: (b'{"a":' * 100_000, data),
    "no UTF-8": lambda header, data: (b"\xff" * 100, data),
    "data that no tensor owns": lambda header, data: (header, data + b"\0" * 4096),
    "no data": lambda header, data: (header, b""),
}


@pytest.mark.parametrize("harm", HEADERS)
@pytest.mark.parametrize("kind", ["ours", "released"])
def test_a_hostile_header_is_refused(kind, harm, folder, tmp_path):
    source, file = folder, folder / BLOCKS
    if kind == "released":
        source = file = tmp_path / "file.safetensors"
        save_file(release(sd15()), file)
    put(file, *HEADERS[harm](*parted(file)))
    refused(source, "cannot be read|lacks|shape|tensors of no site")


@pytest.mark.parametrize("length", [0, 2**20, 99_000_000, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", ["ours", "released"])
def test_a_header_length_beyond_the_file_is_refused(kind, length, folder, tmp_path):
    source, file = folder, folder / BLOCKS
    if kind == "released":
        source = file = tmp_path / "file.safetensors"
    put(file, {}, b"", length)
    refused(source, "cannot be read")


def test_an_empty_file_is_refused(folder, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    (folder / BLOCKS).write_bytes(b"")
    refused(tmp_path / "a.safetensors", "cannot be read")
    refused(folder, "cannot be read")


def mixer(**values):
    return lambda manifest: manifest["sites"][SITE]["mixer"].update(values)


ENDLESS = "[" * 100_000
MANIFESTS = {
    "a kernel of 10^9": (mixer(kernel_size=10**9 + 1), "kernel_size must be odd and from 1 to 255"),
    "a kernel of 10^4000": (mixer(kernel_size=10**4000 + 1), "cannot be read|kernel_size must be"),
    "a billion stages": (mixer(stages=10**9), "stages must be from 1 to 10"),
    "the largest block that settings allow": (
        mixer(kernel_size=255, stages=10, ratio=4.0),
        "lacks|shape",
    ),
    "a ratio that overflows": (mixer(ratio=10**400), "ratio must be a finite number"),
    "no number": (mixer(ratio=float("nan")), "ratio must be a finite number"),
    "channels of 10^12": (
        lambda m: m["sites"][SITE].update(channels=10**12),
        "16 channels here and 1000000000000",
    ),
    "channels that are no number": (
        lambda m: m["sites"][SITE].update(channels=[16]),
        "16 channels here",
    ),
    "a path that climbs": (
        lambda m: m["sites"].update({"../../../etc/passwd": m["sites"][SITE]}),
        "a site that this model lacks",
    ),
    "fifty thousand sites": (
        lambda m: m["sites"].update({f"x{i}": m["sites"][SITE] for i in range(50_000)}),
        "a site that this model lacks",
    ),
    "sites as a list": (lambda m: m.update(sites=[1]), "`sites` must map"),
    "a site of nothing": (lambda m: m["sites"].update({SITE: None}), "`sites` must map"),
    "no sites": (lambda m: m.update(sites={}), "at least one pattern|no site"),
    "a mixer of code": (mixer(kind="__import__"), "needs a kind"),
    "a mixer that is a list": (
        lambda m: m["sites"][SITE].update(mixer=["delta_conv"]),
        "needs a kind",
    ),
    "an unknown setting": (mixer(__class__="os"), "has no setting '__class__'"),
}


@pytest.mark.parametrize("harm", MANIFESTS)
def test_a_hostile_manifest_is_refused(harm, folder):
    inflict, message = MANIFESTS[harm]
    manifest = json.loads((folder / MANIFEST).read_text())
    inflict(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    refused(folder, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENDLESS, "cannot be read"),
        ('{"format": ' + "9" * 5000 + "}", "cannot be read|not a manifest"),
        (" " * (JSON_BYTES + 1), "larger than 16 MB"),
        ('{"format": 1, "family": "' + "x" * 10**6 + '", "sites": {}}', "for a x"),
    ],
)
def test_a_hostile_text_is_refused(text, message, folder):
    (folder / MANIFEST).write_text(text)
    refused(folder, message)


def test_integers_in_place_of_weights_are_refused(folder):
    header = read_header(folder / BLOCKS)
    tensors = {name: torch.zeros(info.shape, dtype=torch.int8) for name, info in header.items()}
    save_file(tensors, folder / BLOCKS)
    refused(folder, "is I8, expected one of")


@pytest.fixture
def pipeline(tmp_path):
    pipe = stable_diffusion()
    convfusion.convert(pipe)
    convfusion.save_pipeline(pipe, tmp_path / "pipe")
    return tmp_path / "pipe"


CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"
INDEX = {
    "a component outside": ({"../outside": ["diffusers", "UNet2DConditionModel"]}, "outside"),
    "a component from a module": ({"unet": ["evil", "Evil"]}, "'unet' from 'evil' is no component"),
    "a pipeline from a file": ({"_class_name": ["evil", "Evil"]}, "names no diffusers pipeline"),
    "a component named by a number": ({"unet": [7, "Evil"]}, "'unet' from '7'"),
}


@pytest.mark.parametrize("harm", INDEX)
def test_a_pipeline_brings_no_code_and_names_nothing_outside(harm, pipeline):
    values, message = INDEX[harm]
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, **values}))
    (pipeline / "evil.py").write_text(CODE)
    with pytest.raises(CheckpointError, match=message):
        convfusion.load_pipeline(pipeline)
    assert not (pipeline / "ran").exists()


def test_code_beside_a_component_is_refused(pipeline):
    (pipeline / "unet" / "diffusers.py").write_text(CODE)
    with pytest.raises(CheckpointError, match=r"diffusers\.py is code"):
        convfusion.load_pipeline(pipeline)


def test_shards_lie_in_their_own_folder(pipeline):
    index = pipeline / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../../other.safetensors"}}))
    with pytest.raises(CheckpointError, match="must name files of its own folder"):
        convfusion.load_pipeline(pipeline)


SIZES = {
    "a table for a huge picture": ("unet", {"sample_size": 10**9}, "'sample_size' is beyond 1024"),
    "layers without end": ("unet", {"layers_per_block": 10**9}, "'layers_per_block' is beyond"),
    "a list of such": ("vae", {"block_out_channels": [32, 10**9]}, "'block_out_channels' is"),
    "a huge vocabulary": ("text_encoder", {"vocab_size": 10**12}, "'vocab_size' is beyond"),
}


@pytest.mark.parametrize("harm", SIZES)
def test_a_config_asks_for_no_more_than_models_have(harm, pipeline):
    part, values, message = SIZES[harm]
    config = json.loads((pipeline / part / "config.json").read_text())
    (pipeline / part / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(CheckpointError, match=message):
        convfusion.load_pipeline(pipeline)


def test_without_attention_nothing_is_built_that_its_weights_do_not_fill(tmp_path):
    pipe = stable_diffusion()
    convfusion.convert(pipe)
    convfusion.drop_attention(pipe)
    convfusion.save_pipeline(pipe, tmp_path / "bare")
    file = tmp_path / "bare" / "unet" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "block_out_channels": [32768, 65536]}))
    with pytest.raises(CheckpointError, match="does not fit its config"):
        convfusion.load_pipeline(tmp_path / "bare")
