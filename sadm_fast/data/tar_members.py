"""The plain files inside a tar shard: where the bytes of each one lie, links followed, joined archives read to the end.

A shard may be several archives one behind the other (`cat a.tar b.tar`), each with an end mark of zeros; tar itself and
tarfile stop at the first. A link is a second name for bytes that another member holds.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from functools import cached_property
from io import BufferedReader
from typing import NamedTuple

from sadm_fast.data.source import printable
from sadm_fast.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20  # bytes of zeros that are skipped at a time
_MAX_LINKS = 40  # that lead to a file, one to the next; as many as Linux follows


class Member(NamedTuple):
    """A file's name and place in a shard."""

    archive: int  # 0, or which one of joined archives
    name: str
    offset: int  # of its first byte in the shard
    size: int  # bytes
    problem: str | None  # why its bytes cannot be read there, as the end of a message


def read_members(path: str, file: BufferedReader) -> Iterator[Member]:
    """The files of the shard `path`, which is open as `file`, in their order.

    Raises tarfile.TarError for what is no archive or cut off, UserError if something else follows an archive.
    """
    archive, start = 0, 0
    while start >= 0:
        links, end = _Links(file, start), start
        for header in _headers(file, start):
            member, end = header
            if member.issparse():
                problem = "is a sparse file; write the shard again without tar --sparse"
                yield Member(archive, member.name, 0, 0, f"{printable(member.name)} {problem}")
            elif member.isreg():
                yield Member(archive, member.name, member.offset_data, member.size, None)
            elif _is_link(member):
                target = links.follow(member)
                if target is not None:
                    yield Member(archive, member.name, target.offset_data, target.size, None)
                    continue
                problem = f"is a link to {printable(member.linkname)}, which is not a file in the shard"
                remedy = "write it again with tar --dereference --hard-dereference"
                yield Member(archive, member.name, 0, 0, f"{printable(member.name)} {problem}; {remedy}")
        start = _next_archive(path, file, end)
        archive += 1


def _headers(file: BufferedReader, start: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The headers of the archive that begins at byte `start`, each with the end of its data; ReadError unless whole."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps them all, a kilobyte each
            yield member, archive.offset
        # tarfile takes a header that is cut off or damaged for the end of the archive.
        file.seek(archive.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError(f"no end mark at byte {archive.offset}")


def _next_archive(path: str, file: BufferedReader, end: int) -> int:
    """Where behind the end mark at byte `end` another archive begins; -1 if there are only zeros."""
    file.seek(end)
    position = end
    while chunk := file.read(_CHUNK):
        rest = chunk.lstrip(b"\0")
        position += len(chunk) - len(rest)
        if rest:
            break
    else:
        return -1
    file.seek(position)
    try:
        tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
    except tarfile.TarError:
        raise UserError(
            f"{printable(path)}: what follows its end mark, from byte {position} on, is no tar archive; "
            f"write it again, or cut that off with truncate --size={position}"
        ) from None
    return position


class _Links:
    """The links of the archive that begins at byte `start`. Its headers are read again when one is followed."""

    def __init__(self, file: BufferedReader, start: int) -> None:
        self._file, self._start = file, start

    def follow(self, link: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """The plain file that a link leads to, perhaps by way of others; None if there is none in the archive."""
        member = link
        for _ in range(_MAX_LINKS):
            if member.isreg():
                return None if member.issparse() else member
            found = self._targets.get(_target(member), [])
            if not found:
                return None
            before = [target for target in found if target.offset < link.offset]  # the one that tar -x would link to
            member = (before or found)[-1]
        return None

    @cached_property
    def _targets(self) -> dict[str, list[tarfile.TarInfo]]:
        """Members that links lead to, under their names; a name may come several times."""
        wanted = {_target(member) for member, _ in _headers(self._file, self._start) if _is_link(member)}
        targets: dict[str, list[tarfile.TarInfo]] = {}
        for member, _ in _headers(self._file, self._start):
            if (member.isreg() or _is_link(member)) and (name := posixpath.normpath(member.name)) in wanted:
                targets.setdefault(name, []).append(member)
        return targets


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.islnk() or member.issym()


def _target(link: tarfile.TarInfo) -> str:
    """What a link leads to: a hard link to a name in the archive, a symbolic one starts at its own folder."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))
