"""Deletes: the one place that does. No symbolic link is followed, neither on the way to a path nor below it."""

import errno
import os
import shutil
import stat
from pathlib import Path


def delete(path: Path, *, inside: Path) -> bool:
    """Delete the file, link or whole directory at `path`; of a link, the target stays.

    Args:
        inside: a directory above `path`, itself a link or not; below it, all directories on the way must be real ones.

    Returns:
        Whether anything was there.

    Raises:
        OSError: it can't be deleted, or a directory on the way is a link (`ELOOP`).
        ValueError: `path` is not below `inside`.
    """
    *way, name = path.relative_to(inside).parts or ("",)
    if not name or ".." in (*way, name):
        raise ValueError(f"{path} is not below {inside}")
    directory = -1
    try:
        directory = os.open(inside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in way:
            above, directory = directory, _open(part, directory)
            os.close(above)
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            shutil.rmtree(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return False
    except OSError as error:
        error.filename = str(path.parent / os.fsdecode(error.filename or name))
        raise
    finally:
        if directory != -1:
            os.close(directory)
    return True


def _open(name: str, above: int) -> int:
    """Open a directory that is no link."""
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except NotADirectoryError:  # which is what Linux says of a link, too
        link = stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode)
        number = errno.ELOOP if link else errno.ENOTDIR
        why = "is a symbolic link, and none is followed to delete" if link else os.strerror(number)
        raise OSError(number, why, name) from None
