"""What the tests of evaluations share: tiny students, foreseeable features, a plan."""

import torch
from tiny_pipelines import PIPELINES

import convfusion
from convfusion.evaluate import plan_evaluation
from convfusion.evaluate.extractors import Extractor, Preprocessing
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
