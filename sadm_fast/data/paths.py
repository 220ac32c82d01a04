"""What lies at a path when it is not what was hoped for: a pipe, a link that leads nowhere, a path that is too long."""

import errno
import os
import stat

from sadm_fast.data.source import printable

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFREG: "file",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def kind(entry: os.DirEntry[str]) -> str | None:
    """What an entry of a folder is, as a message says it: "folder", "file", "named pipe", ...; None if it is gone.

    Links are followed; one that leads nowhere is "link to TARGET, ...".
    """
    try:
        if entry.is_dir():  # mostly known from the listing; `stat` would be a system call for each file
            return "folder"
        if entry.is_file():
            return "file"
        return _KINDS.get(stat.S_IFMT(entry.stat().st_mode), "special file")
    except OSError as error:
        if link := broken_link(entry.path, error):
            return link
        return None if isinstance(error, FileNotFoundError) else f"file that cannot be looked at ({error.strerror})"


def broken_link(path: str, error: OSError) -> str | None:
    """The link at `path` that `error` comes from following, as a message says it; None if it is something else."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return None
    try:
        target = printable(os.readlink(path))
    except (OSError, ValueError):
        return None
    return f"link to {target}, {'in a circle' if error.errno == errno.ELOOP else 'where nothing is'}"


def folder_problem(path: str) -> str | None:
    """Why `path` is no folder that can be looked into, as the end of a message; None if it is one."""
    try:
        return None if stat.S_ISDIR(os.stat(path).st_mode) else "is a file, not a folder"
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        if isinstance(error, OSError) and (link := broken_link(path, error)):
            return f"is a {link}"
        if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
            return "no such folder"
        return f"cannot be read ({error.strerror})"  # too long, a folder above without permission


def open_plain_file(path: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a plain file (an `opener` for open). Raises OSError for a pipe, which would be waited for."""
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise OSError(f"it is a {_KINDS.get(stat.S_IFMT(mode), 'special file')}, not a plain file")
