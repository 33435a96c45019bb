"""Files that are there whole or not at all, small text files of the user, and the errors of a full disk."""

import codecs
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ecavg.common.errors import UsageError

# A disk without room, and a user whose quota is used up: deleting files cures both.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# FAT and some network disks have no links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# Libraries written in Rust, such as safetensors, give the error number in the text of their own errors.
_IN_WORDS = re.compile(r"\(os error (\d+)\)")


# A file with a token or a name. A larger one is another file than the user meant.
MAX_TEXT_BYTES = 64 * 1024


def is_full(error: BaseException) -> bool:
    """Return True if the error says that the disk, or the quota on it, has no room left."""
    return error_number(error) in _FULL


def error_number(error: BaseException) -> int | None:
    """Return the number (see `errno`) of the system's error that `error` is or names; None: it names none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _IN_WORDS.search(str(error))
    return int(found[1]) if found else None


def read_text(path: Path, what: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a small file that a person or another program has written.

    The text is UTF-8, or UTF-16 if it begins with the byte order mark: PowerShell's `>` writes that. A byte
    order mark is not part of the text. The file may be a pipe, as in `--join-token-file <(command)`.

    Args:
        path: the path of the file.
        what: the name of the file's purpose in messages, for example "join token file".
        max_bytes: the largest size of the file.

    Raises:
        UsageError: the file cannot be read, has more bytes or another encoding.
    """
    try:
        content = _first_bytes(path, max_bytes + 1)
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror}") from error
    if len(content) > max_bytes:
        raise UsageError(f"{what} {path} has more than {max_bytes // 1024} KiB: name the right file")
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is not UTF-8 text: save it as UTF-8") from error


def _first_bytes(path: Path, num_bytes: int) -> bytes:
    """Return so many bytes from the beginning of the file, or all of them if it has fewer."""
    # A named pipe that nobody writes to is empty. Without this flag, opening it would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(num_bytes)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Hand out a temporary path in the same folder, whose file becomes `path`, durably, at the end.

    When the body raises, `path` is as it was. A crash leaves a `.<name>.partial` at most, which the
    next attempt overwrites.

    Args:
        mode: of the file, less the umask.

    Raises:
        OSError: the folder or the disk does not let it.
    """
    partial = path.with_name(f".{path.name}.partial")
    # A disk that refuses raises OSError here, where no library turns it into another error.
    partial.touch(mode)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def link(source: Path, target: Path) -> None:
    """Make `target`, durably, a second name of the file `source`; a copy of it where the disk has no links.

    From then on neither may be written to, only replaced.

    Raises:
        OSError: the folder or the disk does not let it; `target` is then as it was.
    """
    if target.exists() and target.samefile(source):
        sync(target.parent)
        return
    with replacing(target) as partial:
        partial.unlink()
        try:
            os.link(source, partial)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copyfile(source, partial)


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
