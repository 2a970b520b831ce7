"""Text of others: read from plain files of bounded size, and written so that it stays text.

Every prompt, caption and settings file is decoded here, so that all of them are read alike. Names
of files, models and columns, and all that a manifest says, may hold quotes, line breaks, markup,
control characters, and the lone surrogates that stand for bytes of a file name that are no UTF-8:
here they are made ready for TOML, Python, Markdown and addresses. HTML is escaped by the standard
library's `html.escape`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from convfusion.errors import ConvFusionError

LIST_BYTES = 1 << 30  # of a file with many entries
CAPTION_BYTES = 1 << 24  # of a file about one sample, or with settings

# The mark of UTF-32 begins as that of UTF-16 does.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LINE_END = re.compile(r"\r\n|\n|\r")  # `str.splitlines` knows eight more, inside of sentences
_EDGES = re.compile(r"\A[\s\ufeff]+|[\s\ufeff]+\Z")  # files that were joined have marks within
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # half of an emoji, or of a file in UTF-16


def open_plain(path: Path) -> BinaryIO:
    """Open a file to read its bytes, unless it is a pipe, a device or a socket, which never end.

    Raises:
        OSError: it is missing, unreadable or no plain file.
    """
    if path.exists() and not path.is_file():
        raise OSError(None, "it is no plain file")
    return open(path, "rb")


def read_plain(path: Path, most: int) -> bytes:
    """The bytes of a plain file of at most so many.

    Raises:
        OSError: it is missing, unreadable, no plain file, or larger.
    """
    with open_plain(path) as file:
        data = b"" if path.stat().st_size > most else file.read(most + 1)
        if len(data) > most or path.stat().st_size > most:
            raise OSError(None, f"it is larger than {most >> 20} MB")
        return data


def decode_text(data: bytes, name: str) -> str:
    """Text from bytes in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; marks are dropped.

    Args:
        data: the whole of the text.
        name: what an error calls it.

    Raises:
        ConvFusionError: it is in another encoding, or has a NUL character; the line is named.
    """
    marked = (kind for mark, kind in _MARKS.items() if data.startswith(mark) and data != mark)
    codec = next(marked, "utf-8")
    try:
        text = data.decode(codec)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(codec, "ignore")
        what = f"the byte 0x{data[error.start]:02x}" if codec == "utf-8" else f"no {codec.upper()}"
        raise _not_text(name, before, what) from None
    if (place := text.find("\0")) >= 0:
        raise _not_text(name, text[:place], "a NUL character")
    return text.removeprefix("\ufeff")


def read_text(path: Path, most: int = CAPTION_BYTES) -> str:
    """The text of a plain file.

    Raises:
        ConvFusionError: it cannot be read, or is no text; the file and the line are named.
    """
    try:
        data = read_plain(path, most)
    except OSError as error:
        raise ConvFusionError(f"{path} cannot be read: {error.strerror}") from None
    return decode_text(data, str(path))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line; blank lines do not count.

    Raises:
        ConvFusionError: it cannot be read, is no text, or has none.
    """
    lines = (strip_text(line) for line in split_lines(read_text(path, LIST_BYTES)))
    if prompts := [line for line in lines if line]:
        return prompts
    raise ConvFusionError(f"{path} has no prompts: it should hold one per line")


def split_lines(text: str) -> list[str]:
    r"""Lines without their ends, which are \n, \r\n and \r only."""
    return _LINE_END.split(text)


def strip_text(text: str) -> str:
    """Text without the white space and byte order marks around it."""
    return _EDGES.sub("", text)


def is_text(text: str) -> bool:
    """Whether a string is text that can be written and tokenized.

    JSON, file names and the command line may bring lone surrogates, which no encoding has.
    """
    return _NO_TEXT.search(text) is None


def check_prompts(prompts: Iterable[str]) -> None:
    """Raise a ConvFusionError for a prompt that is no text, which no tokenizer takes."""
    for prompt in prompts:
        if not is_text(prompt):
            raise ConvFusionError(f"the prompt {prompt!a} is not valid Unicode: give it in UTF-8")


def _not_text(name: str, before: str, what: str) -> ConvFusionError:
    line = len(split_lines(before))
    return ConvFusionError(
        f"{name} is not a text file in UTF-8: line {line} holds {what}; save it as UTF-8"
    )


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
    return _UNSEEN.sub(lambda match: f"\\u{ord(match.group()):04x}", quoted)
