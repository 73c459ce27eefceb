"""Files are written atomically: whole, or not at all; a folder is locked."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from fgm import InputError


def open_folder(path):
    """The folder, made if need be. Raises InputError if it cannot be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / ".writable").touch()
        (Path(path) / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the output folder {path}: {error.strerror}") from error
    return Path(path)


@contextmanager
def atomically(path):
    """A temporary path to write a file or folder to, renamed to path when all is written, removed otherwise.

    Raises InputError, naming path, where it cannot be written."""
    from safetensors import SafetensorError

    path = Path(os.path.realpath(path))
    # The process in the name: others may write the same file of a cache. The extension tells PIL the format.
    temporary, old = path.with_name(f".tmp-{os.getpid()}-{path.name}"), path.with_name(f".old-{path.name}")
    if old.exists() and not path.exists():  # a process was killed between the two
        os.replace(old, path)
    try:
        yield temporary
        if temporary.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.replace(path, old)
        else:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path} ({what}); what was there before is untouched") from error
    finally:
        with suppress(OSError):
            if old.exists() and not path.exists():
                os.replace(old, path)
            for left in (temporary, old):
                shutil.rmtree(left, ignore_errors=True)
            temporary.unlink(missing_ok=True)


def finite(content):
    """The same with None for every number that JSON does not know: nan and the infinities."""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


def write_json(path, content):
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=1) + "\n")


def save_tensors(tensors, path, metadata=None):
    """Write {name: tensor} as safetensors. metadata: strings for its header."""
    from safetensors.torch import save_file

    with atomically(path) as temporary:
        save_file(tensors, temporary, metadata)


def file_digest(path):
    """SHA-256 of a file's content. Raises OSError if it is no regular file: a pipe would be waited for."""
    if not Path(path).is_file():
        raise OSError(f"{path} is no regular file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(file):
    """Whether this process now holds the lock of an open file, which ends with the process.

    Raises OSError or ImportError where files cannot be locked. The one place that knows operating systems."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def reason(error):
    """What a library's error says, as one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
