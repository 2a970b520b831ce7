"""The hooks of mkdocs: what the pages link to outside of docs/ comes along into the site.

A page in docs/ says `../results/latency.csv`, as it must where the repository itself is read. In
the site that file lies at `results/latency.csv` beside the page, and the link loses its `../`. A
folder becomes a page that shows its files. Links to what is not there stay broken, for `--strict`
to find.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
# Scripts, styles, pictures and connections of another host; plain links are no matter.
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\ssrc=\"?(?:https?:)?//|<link\b[^>]*//[^>]*>"
)
SMALL = re.compile(r"(?<=[\s>(])\d\.\d+e-\d+")  # 2.16e-02, which browsers break after the hyphen


def on_files(files: Files, *, config: Any) -> Files:
    """Add every file and folder of the repository that a page links to."""
    root = Path(config.config_file_path).parent
    pages = [page.content_string for page in files.documentation_pages()]
    for target in sorted({found for text in pages for found in OUTSIDE.findall(text)}):
        place = root / target
        if place.is_dir():
            files.append(File.generated(config, in_site(target, root), content=shown(place)))
        elif place.is_file():
            files.append(File.generated(config, target, abs_src_path=str(place)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn links out of docs/ into links within the site."""
    root = Path(config.config_file_path).parent
    return OUTSIDE.sub(lambda found: f"]({in_site(found[1], root)}", markdown)


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
    """Keep small numbers in one line."""
    return SMALL.sub(r'<span class="number">\g<0></span>', html)


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Refuse a page that would load something from another host.

    Raises:
        PluginError: it would.
    """
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output


def in_site(target: str, root: Path) -> str:
    """Where a file or folder of the repository lies in the site."""
    return f"{target.rstrip('/')}/index.md" if (root / target).is_dir() else target


def shown(folder: Path) -> str:
    """A page with the files of a folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    parts = [f"## {path.name}\n\n{show_file(path)}" for path in files]
    return "\n\n".join([f"# {folder.name}", *parts]) + "\n"


def show_file(path: Path) -> str:
    """A file as Markdown: its lines, or the cells of a notebook one after the other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return f"```{path.suffix[1:]}\n{text}```"
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
        else:  # headings below that of the file, and links from a folder of the site
            parts.append(
                re.sub(r"^#", "###", source, flags=re.MULTILINE).replace("](../docs/", "](../")
            )
    return "\n\n".join(parts)
