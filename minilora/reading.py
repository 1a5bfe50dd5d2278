"""Files read with distrust: whatever is in them, the outcome is a value or a `MiniloraError`.

No reader here runs code, follows more nesting than the parser can, or takes more memory than a
small multiple of the file's size. What a value means, and whether its structure is the expected one,
is for the caller to check.
"""

import io
import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from minilora.errors import MiniloraError

# JSON takes some thirty times its size once parsed.
MAX_JSON_BYTES = 4_000_000


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises:
        MiniloraError: missing, unreadable (a bad sector included), too large, or something that is
            no file: a pipe would make the reader wait for ever.
    """
    try:
        found = path.stat()
        is_file = stat.S_ISREG(found.st_mode)
        fits = limit is None or found.st_size <= limit
        data = path.read_bytes() if is_file and fits else b""
    except (OSError, ValueError) as error:  # ValueError: a name that the system cannot have
        reason = error.strerror if isinstance(error, OSError) else error
        raise MiniloraError(f"{path} cannot be read: {reason}") from None
    if not is_file:
        raise MiniloraError(f"{path} is not a file")
    if not fits:
        raise MiniloraError(f"{path} is {found.st_size:,} bytes; at most {limit:,} are expected")
    return data


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        MiniloraError: unreadable, too large, nested too deeply, not JSON, or not an object.
    """
    data = read_bytes(path, limit)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MiniloraError(f"{path} is damaged: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise MiniloraError(
            f"{path} is damaged: it holds a JSON {type(values).__name__}, not an object"
        )
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        MiniloraError: unreadable, or its header does not fit the file.
    """
    data = read_bytes(path)
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # a lying header fails in many ways, none of them ours
        raise MiniloraError(f"{path} is damaged: {first_line(error)}") from None


def read_torch(path: Path, allowed: list[Any]) -> Any:
    """What `torch.save` wrote, on the CPU, by torch's loader that runs nothing.

    torch checks no checksum, so that a flipped bit would be read as another number; the archive's
    own are checked first. `torch.save` never compresses: an archive that does could unpack to any
    size.

    Args:
        allowed: the functions and classes, beside torch's own, that the file may name.

    Raises:
        MiniloraError: unreadable, damaged, or it names something that would have to run.
    """
    data = read_bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its parts are compressed, which torch.save never does")
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} differs")
        with torch.serialization.safe_globals(allowed):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes fail in many ways, none of them ours
        raise MiniloraError(f"{path} cannot be read safely: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
