"""Files read with distrust: whatever is in them, the outcome is a value or a `MiniloraError`.

No reader here runs code, follows more nesting than the parser can, or takes more memory than a
small multiple of the file's size. Each `parse_...` takes bytes that were read (and hashed) already;
`path` is named in errors. What a value means, once `check_like` it is, is for the caller to check.
"""

import contextlib
import inspect
import io
import json
import stat
import types
import zipfile
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from minilora.errors import MiniloraError, first_line
from minilora.options import has_type, unique_keys

# JSON takes some thirty times its size once parsed.
MAX_JSON_BYTES = 4_000_000
HINT = type | types.UnionType | types.GenericAlias


@contextlib.contextmanager
def opened(path: Path, limit: int | None = None) -> Iterator[BufferedReader]:
    """A file of at most `limit` bytes to read from, and no pipe, which may never end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise MiniloraError(f"{path} is not a file")
        if limit is not None and status.st_size > limit:
            size = f"{status.st_size:,} bytes; at most {limit:,} are expected"
            raise MiniloraError(f"{path} is {size}")
        with path.open("rb") as file:
            yield file
    except MiniloraError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that the system cannot have
        reason = error.strerror if isinstance(error, OSError) else error
        raise MiniloraError(f"{path} cannot be read: {reason}") from None


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """Its contents."""
    with opened(path, limit) as file:
        return file.read()


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes."""
    return parse_json(read_bytes(path, limit), path, limit)


def parse_json(data: bytes, path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `data`, which are at most `limit` bytes."""
    if len(data) > limit:
        raise MiniloraError(f"{path} is {len(data):,} bytes; at most {limit:,} are expected")
    try:
        values = json.loads(data, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise MiniloraError(f"{path} is damaged: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise MiniloraError(f"{path} is damaged: it holds no JSON object but {_described(values)}")
    return values


def parse_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file, on the CPU."""
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # a lying header fails in many ways, none of them ours
        raise MiniloraError(f"{path} is damaged: {first_line(error)}") from None


def parse_torch(data: bytes, path: Path, allowed: Iterable[Any] = ()) -> Any:
    """What `torch.save` wrote, on the CPU, by torch's loader that runs nothing.

    torch checks no checksum: a flipped bit would be read as another number, so the archive's own
    are checked first. It never compresses: an archive that does could unpack to any size.
    `allowed`: functions and classes, beside torch's own, that the file may name.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its parts are compressed, which torch.save never does")
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} differs")
        with torch.serialization.safe_globals(list(allowed)):
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        _check_tensors(value)
        return value
    except Exception as error:  # damaged bytes fail in many ways, none of them ours
        raise MiniloraError(f"{path} cannot be read safely: {first_line(error)}") from None


def _check_tensors(value: Any) -> None:
    # A few bytes can be stretched into a tensor of any size, and a value lie within itself.
    left, seen = [value], set()
    while left:
        inner = left.pop()
        if isinstance(inner, Tensor) and not _is_plain(inner):
            raise ValueError("one of its tensors is sparse, stretched or no data")
        if isinstance(inner, dict | list | tuple) and id(inner) not in seen:
            seen.add(id(inner))
            left += inner.values() if isinstance(inner, dict) else inner


def _is_plain(tensor: Tensor) -> bool:
    has_data = tensor.layout is torch.strided and not tensor.is_meta
    return has_data and tensor.nbytes <= tensor.untyped_storage().nbytes()


def check_like(expected: Any, found: Any, place: Any, name: str = "") -> None:
    """Refuse `found`, which was read, unless it has the structure of `expected`, which is live.

    A dict must have its keys at least, a list or tuple its type and length, a tensor its shape, and
    floating point if it has; a number may be any number. A type or hint (`int`, `float | None`)
    stands for a value that `has_type` it, None for anything. So do the values inside.
    """
    if expected is not None and not _is_like(expected, found):
        wrong = f"{name or 'it'} is {_described(found)} instead of {_described(expected)}"
        raise MiniloraError(f"{place}: {wrong}")
    items = enumerate(expected) if isinstance(expected, list | tuple) else ()
    for key, value in expected.items() if isinstance(expected, dict) else items:
        inner_name = f"{name}.{key}" if name else str(key)
        if isinstance(found, dict) and key not in found:
            raise MiniloraError(f"{place}: {inner_name} is missing")
        check_like(value, found[key], place, inner_name)


def _is_like(expected: Any, found: Any) -> bool:
    if isinstance(expected, Tensor):
        is_plain = isinstance(found, Tensor) and _is_plain(found)
        same_kind = is_plain and found.is_floating_point() == expected.is_floating_point()
        return same_kind and found.shape == expected.shape
    if isinstance(expected, dict):
        return isinstance(found, dict)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and len(found) == len(expected)
    if isinstance(expected, HINT):
        return has_type(found, expected)
    return has_type(found, float if type(expected) is int else type(expected))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, HINT):
        return inspect.formatannotation(value)
    return f"{type(value).__name__} {value!r}"[:100]
