"""Files: written whole or not at all, JSON, and what is wrong with a file in one line."""

import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from fgm import InputError


def open_folder(path):
    """The folder as a Path, made if need be. Raises InputError if it cannot be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to the output folder {path}: {error.strerror}") from error
    return folder


@contextmanager
def atomically(path):
    """A temporary path to write a file to, or a folder that is new; it is renamed to path at the end.

    Nothing is left of it if that fails. Raises InputError, naming path, where it cannot be written."""
    path = Path(path)
    # The process is in the name because others may write the same file of a cache.
    # The extension stays the last part because it tells PIL the format.
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}); what was there before is untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def finite(content):
    """The same JSON content with None for every number that JSON does not know: nan and the infinities."""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


def write_json(path, content):
    """Write JSON in ASCII: other characters, lone surrogates included, as escapes that read_json undoes."""
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=1) + "\n", encoding="ascii")


def read_json(path):
    """The object in a JSON file. Raises InputError if it cannot be read or holds something else."""
    try:
        content = json.loads(Path(path).read_bytes())  # of any encoding that JSON allows
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path} ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it must hold a JSON object")
    return content


def save_tensors(tensors, path, metadata=None):
    """Write {name: tensor} as safetensors. metadata: strings for its header."""
    from safetensors.torch import save

    with atomically(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))  # save_file would let nobody else read the file


def reason(error):
    """The message of a library's error as one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def refusals(path, kind):
    """Turn every error inside into an InputError that names the file: a foreign file can fail in any way.

    kind: what the file should have been."""
    if Path(path).is_dir():
        raise InputError(f"cannot read {path}: it is a folder, and a file is needed")
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        fault = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {reason(error)}"
        fault = "".join(letter if letter.isprintable() else "?" for letter in fault[:300])
        raise InputError(f"{path} is damaged or no {kind}: {fault}") from error
