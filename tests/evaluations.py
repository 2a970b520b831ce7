"""What the tests of evaluations share: tiny students, foreseeable features, a plan."""

import json

import torch
from PIL import Image
from tiny_pipelines import PIPELINES

import convfusion
from convfusion.evaluate import plan_evaluation
from convfusion.evaluate.extractors import Extractor, Preprocessing
from convfusion.evaluate.measure import Likeness, SampleResult
from convfusion.evaluate.results import SCHEMA
from convfusion.fingerprint import fingerprint
from convfusion.surgery import mixers_of

PROMPTS = ["red apple", "green", "apple"]


class Thumbnails(torch.nn.Module):
    """Features that a test can foresee: the pixels of a 4 × 4 picture. And five classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(48, 5)

    @torch.no_grad()
    def forward(self, pixels):
        return pixels.flatten(1), self.head(pixels.flatten(1))


def thumbnails():
    network = Thumbnails()
    told = Preprocessing(4, (0.5,) * 3, (0.5,) * 3)
    return Extractor("thumbnails", network, told, fingerprint(network))


def student(kind="sd"):
    """A converted pipeline whose blocks do something else than its attention."""
    pipe = PIPELINES[kind]()
    convfusion.convert(pipe, convfusion.uniform(convfusion.DeltaConv(kernel_size=3)))
    with torch.no_grad():
        for mixer in mixers_of(pipe).values():
            mixer.proj_out.bias.add_(0.3)
    return pipe


def make_settings(**options):
    chosen = {"steps": 2, "guidance": 2.0, "batch_size": 3, "timesteps": (50, 950)} | options
    return plan_evaluation(chosen.pop("prompts", PROMPTS), chosen.pop("samples", 6), 5, **chosen)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_evaluation(folder, closeness):
    """A made-up evaluation of 8×8 pictures, whose student has these PSNRs."""
    samples = []
    for index, psnr in enumerate(closeness):
        student, other = Likeness(psnr, 0.9, 0.9), Likeness(9.0, 0.5, 0.5)
        sample = SampleResult(index, f"prompt {index} " + "x" * 80, 7, student, other, 0.01, 0.02)
        samples.append({**vars(sample), "student": vars(student), "other_seed": vars(other)})
        for side, colour in (("teacher", 10), ("student", 20), ("teacher-other-seed", 30)):
            (folder / side).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (colour, index, 0)).save(folder / side / f"{index:05d}.png")
    content = {"schema": SCHEMA, "student": "mine", "samples": samples}
    (folder / "evaluation.json").write_text(json.dumps(content))
