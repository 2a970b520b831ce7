"""The same emoji at 128 pixels, drawn from vector graphics of the two designs.

`python emoji_large.py --run run` installs both designs as SVG and a renderer from npm, draws what
`emoji.py` has at 64 pixels, and writes `emoji-128.npz`: images uint8 [P, 128, 128, 3] on white,
and the number of each in the rows of `names.json`. What has no vector graphic, as Noto's flags,
is left out. Pictures: Noto Emoji (Apache-2.0) and Twemoji (CC-BY 4.0, © Twitter and contributors).
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from emoji import DESIGNS, fetch, read_package, tone_words

SIZE = 128  # pixels
PACKAGES = ("@iconify-json/noto@1.2.9", "@iconify-json/twemoji@1.2.5", "@resvg/resvg-js@2.6.2")
DRAWN_AT_ONCE = 500
FAILING = {"1f4e6", "1f3f3-200d-1f308"}  # of Noto: a shape outside of the picture ends the renderer
RENDER = """
const { Resvg } = require("@resvg/resvg-js");
for (const svg of JSON.parse(require("fs").readFileSync(0)))
  require("fs").writeSync(1, new Resvg(svg, { background: "white" }).render().pixels);
"""


def install(folder: Path) -> Path:
    """Install the packages below `folder`; returns where they lie."""
    if not (folder / "node_modules" / "@resvg").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", "."]
        subprocess.run([*command, *PACKAGES], cwd=folder, check=True)
    return folder / "node_modules"


def read_codes(archive: Path, image_set: str) -> dict[tuple[str, str], str]:
    """Code points such as `1f44b-1f3fb` by name and skin tone, as `emoji.collect` names them."""
    codes = {}
    for entry in read_package(archive, image_set)[0]:
        name = entry["name"].lower()
        codes[name, ""] = entry["image"]
        for code, variant in entry.get("skin_variations", {}).items():
            codes[name, tone_words(code)] = variant["image"]
    return {key: simplify(Path(image).stem) for key, image in codes.items()}


def simplify(code: str) -> str:
    """Code points without the variation selector, which some leave out."""
    return "-".join(part for part in code.split("-") if part != "fe0f")


def read_graphics(package: Path) -> dict[str, str]:
    """SVG by code points."""
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    chars = json.loads((package / "chars.json").read_text(encoding="utf-8"))
    found = {}
    for code, name in chars.items():
        alias: dict[str, Any] = icons.get("aliases", {}).get(name, {"parent": name})
        icon = icons["icons"].get(alias["parent"])
        if icon is not None and set(alias) == {"parent"}:  # neither turned nor mirrored
            found[simplify(code)] = to_svg(icon, icons["width"], icons["height"])
    return found


def to_svg(icon: dict[str, Any], width: int, height: int) -> str:
    """An icon of the set, whose sides are the given ones where it has none of its own."""
    box = f'viewBox="0 0 {icon.get("width", width)} {icon.get("height", height)}"'
    sides = f'width="{SIZE}" height="{SIZE}"'  # an icon that is not square is put in the middle
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<svg {spaces} {sides} {box}>{icon['body']}</svg>"


def draw(svgs: list[str], modules: Path) -> np.ndarray:
    """SVGs on white, uint8 [P, 128, 128, 3]."""
    ran = subprocess.run(
        ["node", "-e", RENDER],
        cwd=modules.parent,
        input=json.dumps(svgs).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    return np.frombuffer(ran.stdout, np.uint8).reshape(-1, SIZE, SIZE, 4)[..., :3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("run"))
    run = parser.parse_args().run
    modules = install(run / "vectors")
    graphics, codes = {}, {}
    for design, image_set in DESIGNS.items():
        graphics[design] = read_graphics(modules / "@iconify-json" / design)
        codes[design] = read_codes(fetch(image_set, run / "npm"), image_set)
    rows, svgs = [], []
    pictures = json.loads((run / "names.json").read_text())["pictures"]
    for number, row in enumerate(pictures):
        code = codes[row["design"]][row["name"], row["tone"]]
        if code in graphics[row["design"]] and code not in FAILING:
            rows.append(number)
            svgs.append(graphics[row["design"]][code])
    parts = [svgs[i : i + DRAWN_AT_ONCE] for i in range(0, len(svgs), DRAWN_AT_ONCE)]
    images = np.concatenate([draw(part, modules) for part in parts])
    np.savez_compressed(run / "emoji-128.npz", images=images, rows=np.array(rows))
    print(f"{len(rows)} of {len(pictures)} pictures at {SIZE} pixels")


if __name__ == "__main__":
    main()
