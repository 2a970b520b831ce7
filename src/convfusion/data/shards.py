"""Tar shards of pictures with captions, read as bytes."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convfusion.data.contents import digest_files
from convfusion.data.pictures import OTHER_PICTURES, PICTURE_BYTES, PICTURES
from convfusion.data.samples import CAPTION_NAMES, Sample, make_sample
from convfusion.errors import ConvFusionError
from convfusion.text import CAPTION_BYTES, decode_text, open_plain

NAME_BYTES = 1 << 14  # of a header that holds a long name; old `tarfile` takes their square
NAMES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# Which ends the files as a damaged header does. Its type is not in the stubs.
InvalidHeader: type[tarfile.HeaderError] = vars(tarfile)["InvalidHeaderError"]


class Header(tarfile.TarInfo):
    """The header of a file in a shard, refused where reading on would never end.

    Python reads sizes below zero before 3.13.6, and headers as long as they say.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in NAMES and header.size > NAME_BYTES):
            raise InvalidHeader("a size that cannot be")
        return header

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Header:
        start = tarfile_.offset
        header = super().fromtarfile(tarfile_)
        if header.size < 0 or tarfile_.offset <= start:  # extended headers have sizes, too
            tarfile_.offset = start
            raise InvalidHeader("a size that cannot be")
        return header


@dataclass(frozen=True)
class Shards:
    """Tar shards as `webdataset` writes them: files of one sample follow each other.

    The standard library reads them: unlike `webdataset` it can tell where a damaged one ends.

    Attributes:
        spec: as the user gave it.
        paths: of the shards; each is one unit.
        image: extension of the pictures, or None to find it.
        caption: extension or JSON field of the captions, or None to find it.
        captioned: whether captions are needed.
    """

    spec: str
    paths: tuple[Path, ...]
    image: str | None = None
    caption: str | None = None
    captioned: bool = True
    total: int | None = field(default=None, init=False)

    @property
    def units(self) -> int:
        return len(self.paths)

    def describe(self) -> dict[str, Any]:
        shards = {f"{number} {path.name}": path for number, path in enumerate(self.paths)}
        asked = {"image": self.image, "caption": self.caption}
        contents = digest_files(shards)
        return {"kind": "shards", "shards": self.units, "contents": contents, **asked}

    def read(self, unit: int) -> Iterator[Sample]:
        path = self.paths[unit]
        try:
            with (
                open_plain(path) as file,
                tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as tar,
            ):
                members = (
                    each for each in iter(tar.next, None) if not (each.isdir() or _is_hidden(each))
                )
                for key, group in itertools.groupby(
                    members, lambda each: _split_name(each.name)[0]
                ):
                    if key:
                        files = {_split_name(member.name)[1]: member for member in group}
                        yield self._sample(f"{path.name}/{key}", tar, files)
                # A damaged header ends the list of files as the zeros at the true end do.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    yield Sample(path.name, problem="damaged shard")
        except Exception:  # `tarfile` raises nearly anything on damaged headers
            yield Sample(path.name, problem="damaged shard")

    def _sample(
        self, name: str, tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]
    ) -> Sample:
        endings = [self.image] if self.image else [*PICTURES, *OTHER_PICTURES]
        pictures = [
            members[ending] for each in endings if (ending := each.lower().lstrip(".")) in members
        ]
        picture = None
        for member in pictures:
            content = _read_content(tar, member, PICTURE_BYTES)
            picture = content if isinstance(content, bytes) else picture
            if picture:
                break
        if not self.captioned:
            return make_sample(name, picture, None, captioned=False)
        wanted = [self.caption] if self.caption else CAPTION_NAMES
        captions: list[Any] = [
            _read_content(tar, members[each.lower()], CAPTION_BYTES)
            for each in wanted
            if each.lower() in members
        ]
        if "json" in members:
            captions += _read_fields(_read_content(tar, members["json"], CAPTION_BYTES), wanted)
        return make_sample(name, picture, captions)


def _read_content(
    tar: tarfile.TarFile, member: tarfile.TarInfo, most: int
) -> bytes | ConvFusionError | None:
    """What a file holds, the error of reading it, or None for a link, a device and the like."""
    if not member.isreg() or member.issparse():  # a sparse file may claim any size
        return None
    if member.size > most:
        return ConvFusionError(f"{member.name} is larger than {most >> 20} MB")
    file = tar.extractfile(member)
    return None if file is None else file.read()


def _read_fields(content: bytes | ConvFusionError | None, wanted: Iterable[str]) -> list[Any]:
    """What a JSON object holds under some names."""
    if not isinstance(content, bytes):
        return [content]
    try:
        fields = json.loads(decode_text(content, "the JSON"))
    except (ValueError, RecursionError) as error:
        return [ConvFusionError(str(error))]
    return [fields.get(name) for name in wanted] if isinstance(fields, dict) else []


def _split_name(path: str) -> tuple[str, str]:
    """The key of a shard's sample and the extension, split at the first dot of the file's name."""
    folder, slash, name = path.rpartition("/")
    key, _, extension = name.partition(".")
    return (folder + slash + key if key and extension else ""), extension.lower()


def _is_hidden(member: tarfile.TarInfo) -> bool:
    return any(part[:1] == "." and part.strip(".") for part in member.name.split("/"))
