"""Files are written atomically: whole, or not at all."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
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

    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")  # keeps the extension, which tells PIL the format
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        yield temporary
        if temporary.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        what = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path} ({what}); what was there before is untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error):
    """What a library's error says, as one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
