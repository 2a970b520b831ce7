"""Step 1: pictures and captions, two emoji designs from npm, and the held-out names.

`python emoji.py` fetches both packages with `npm pack`, composes the
64×64 pictures on white and writes `emoji.npz` (images uint8 [P, 64, 64, 3], and per picture the
index of its name, its tone and its design) and `names.json` (names, split). Pictures: Noto Emoji
(Apache-2.0) and Twemoji (CC-BY 4.0, © Twitter and contributors).
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = "16.0.0"
DESIGNS = {"noto": "google", "twemoji": "twitter"}  # design name -> image set of the npm package
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium light",
    "1F3FD": "medium",
    "1F3FE": "medium dark",
    "1F3FF": "dark",
}


def fetch(image_set: str, folder: Path) -> Path:
    """Download `emoji-datasource-<image_set>` into `folder`, unless it is there."""
    archive = folder / f"emoji-datasource-{image_set}-{VERSION}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        package = f"emoji-datasource-{image_set}@{VERSION}"
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True)
    return archive


def read_package(archive: Path, image_set: str) -> tuple[list[dict], dict[str, bytes]]:
    """The entries of `emoji.json` and the 64-pixel PNG files by name."""
    files: dict[str, bytes] = {}
    entries: list[dict] = []
    prefix = f"package/img/{image_set}/64/"
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name == "package/emoji.json":
                entries = json.load(tar.extractfile(member))
            elif member.name.startswith(prefix):
                files[member.name[len(prefix) :]] = tar.extractfile(member).read()
    return entries, files


def on_white(png: bytes) -> np.ndarray:
    """A PNG with transparency as uint8 [64, 64, 3] on a white ground."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA").resize((64, 64))
    ground = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(ground, picture).convert("RGB"))


def tone_words(code: str) -> str:
    """`1F3FB` → `light skin tone`; two people: `light and dark skin tones`."""
    words = [TONES[part] for part in code.split("-")]
    if len(set(words)) == 1:
        return f"{words[0]} skin tone"
    return f"{' and '.join(words)} skin tones"


def words_of(name: str) -> set[str]:
    """The words of a name as the tokenizer splits them (letters and digits, lower case)."""
    return set("".join(c if c.isalnum() else " " for c in name.lower()).split())


def split_names(names: list[str], share: float = 0.1, seed: int = 0) -> list[str]:
    """Hold out about `share` of the names, so that every word of each stays in training."""
    counts: dict[str, int] = {}
    for name in names:
        for word in words_of(name):
            counts[word] = counts.get(word, 0) + 1
    order = sorted(names)
    random.Random(seed).shuffle(order)
    held: list[str] = []
    for name in order:
        words = words_of(name)
        if len(held) < round(share * len(names)) and all(counts[w] > 1 for w in words):
            held.append(name)
            for word in words:
                counts[word] -= 1
    return sorted(held)


def collect(archives: dict[str, Path]) -> tuple[np.ndarray, list[dict]]:
    """All pictures with their name, tone and design."""
    images, rows = [], []
    for design, archive in archives.items():
        entries, files = read_package(archive, DESIGNS[design])
        for entry in sorted(entries, key=lambda e: e["sort_order"]):
            name = entry["name"].lower()
            variants = {"": entry["image"]}
            for code, variant in entry.get("skin_variations", {}).items():
                variants[tone_words(code)] = variant["image"]
            for tone, file in variants.items():
                if file in files:
                    images.append(on_white(files[file]))
                    rows.append({"name": name, "tone": tone, "design": design})
    return np.stack(images), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("run"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    archives = {design: fetch(image_set, out / "npm") for design, image_set in DESIGNS.items()}
    images, rows = collect(archives)
    held = split_names(sorted({row["name"] for row in rows}))
    with tempfile.NamedTemporaryFile(dir=out, delete=False) as file:
        np.savez_compressed(file, images=images)
    Path(file.name).replace(out / "emoji.npz")
    (out / "names.json").write_text(json.dumps({"held_out": held, "pictures": rows}, indent=0))
    names = len({row["name"] for row in rows})
    print(f"{len(rows)} pictures of {names} names, {len(held)} names held out")


if __name__ == "__main__":
    main()
