"""Step 2: the tokenizer, a byte-level BPE that knows every training word whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import caption, load_pictures
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import CLIPTokenizer

MAX_TOKENS = 24  # the longest training caption has 19, start and end included
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as CLIP splits


def learn(captions: list[str]) -> CLIPTokenizer:
    """Learn merges until every word of the captions is one token."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    model = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=end))
    model.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        min_frequency=1,
        special_tokens=[start, end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model.train_from_iterator(captions, trainer)
    learned = json.loads(model.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run"))
    run = parser.parse_args().run
    captions = sorted({caption(row) for row in load_pictures(run, "train").rows})
    tokenizer = learn(captions)
    tokenizer.save_pretrained(run / "tokenizer")
    longest = max(len(ids) for ids in tokenizer(captions)["input_ids"])
    print(f"{len(tokenizer)} tokens, longest caption {longest}")


if __name__ == "__main__":
    main()
