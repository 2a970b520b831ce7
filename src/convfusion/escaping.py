"""Text of others inside TOML, Python, Markdown and addresses: it stays text there.

Names of files, models and columns, and all that a manifest says, may hold quotes, line breaks,
markup, control characters, and the lone surrogates that stand for bytes of a file name that are no
UTF-8. HTML is escaped by the standard library's `html.escape`.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote

_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Directions of writing and invisible characters, which can make a line look like another one.
_HIDDEN = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_UNSEEN = re.compile(f"<|{_SURROGATES.pattern}|{_CONTROLS.pattern[:-1]}|{_HIDDEN.pattern}")
_MARKUP = re.compile(
    r"[\\`*\[\]!|~$^@]"  # anywhere
    r"|(?<!\w)_|_(?!\w)"  # not within a word
    r"|(?<!\S)[#+=-]|(?<=\])\(|:(?=//)|(?<=www)\."
)
_LISTED = re.compile(r"^(\d+)([.)])(?!\S)")  # which begins a list with numbers


def one_line(text: Any) -> str:
    """Text in one line without what cannot be printed, as pictures and lists show it."""
    return _CONTROLS.sub(" ", _SURROGATES.sub("\ufffd", str(text)))


def toml_string(text: str) -> str:
    """Text as a basic string of TOML, which has no lone surrogates."""
    return _quoted(_SURROGATES.sub("\ufffd", text))


def python_string(text: str) -> str:
    """Text as a literal of Python, in double quotes; it reads back as it was."""
    return _quoted(text)


def markdown_text(text: Any) -> str:
    """Text for a line or a table of Markdown, where no part of it is markup, HTML or a link."""
    plain = _HIDDEN.sub("", one_line(text)).strip()
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _LISTED.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", plain))


def markdown_code(text: Any) -> str:
    """Text as code within a line of Markdown."""
    plain = one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    gap = " " if plain.startswith("`") or plain.endswith("`") or not plain.strip() else ""
    return f"{fence}{gap}{plain}{gap}{fence}"


def markdown_block(language: str, text: str) -> str:
    """Lines of text as a block of code that none of them ends."""
    runs = re.findall("`{3,}", text)
    fence = "`" * max(3, *(1 + len(run) for run in runs)) if runs else "```"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def address(path: str) -> str:
    """A relative path as the address of a link or picture in Markdown or HTML."""
    return quote(path.encode("utf-8", "surrogateescape"), safe="/")


def _quoted(text: str) -> str:
    """What TOML and Python read alike: quotes, and codes for all that might be seen otherwise."""
    quoted = json.dumps(text, ensure_ascii=False)
    return _UNSEEN.sub(lambda found: f"\\u{ord(found.group()):04x}", quoted)
