"""Reading what torch.save wrote, without running code from it and without unpacking more than the file holds.

Official weights come as .pt, .pth and .bin files, which are pickles: programs that may call anything. torch's
restricted reader accepts tensors and plain containers only. Our own files are never pickles.
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor

from core.errors import UserError
from core.files import explain_os_errors

# Released checkpoints carry their command line in one of these. It only holds attributes.
_HARMLESS = [argparse.Namespace]


def load_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a file of torch.save, tensors mapped from disk where the format allows it."""
    damaged = f"{path}: not a whole PyTorch file%s. Delete it and copy or download it again."
    with explain_os_errors(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        inflates = any(b"bytearray" in p for p in (_stored_pickles(path, damaged) if is_zip else [path.read_bytes()]))
    if inflates:
        # The one call torch's reader allows that fills memory at will; torch.save has no use for it.
        raise UserError(f"{path}: refused, because loading it would allocate memory beyond its size.")
    try:
        with torch.serialization.safe_globals(_HARMLESS), explain_os_errors(path):
            # Files from before torch 1.6 are not zip archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|[Cc]lass|[Ff]unction) ([\w.]+\.[\w.]+)", str(error))
        if refused is None and "nsupported" not in str(error):
            raise UserError(damaged % "") from error
        what = refused[1] if refused else "it is not made of tensors"
        raise UserError(
            f"{path}: refused, because loading it would run code ({what}). "
            "If you trust its source, load it once in a separate script and save its tensors as .safetensors."
        ) from error
    # Garbage makes the reader fail in any way; whatever it is, the file is at fault.
    except Exception as error:
        raise UserError(damaged % f" ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; a dictionary of tensors was expected.")
    storages = {}
    for tensor in _tensors(content):
        if tensor.layout != torch.strided:
            raise UserError(f"{path}: holds a sparse tensor; plain ones were expected.")
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        if tensor.nbytes > storage.nbytes():
            shape = list(tensor.shape)
            raise UserError(f"{path}: refused, because a tensor of shape {shape} claims more than the file holds.")
    if sum(storages.values()) > size:
        raise UserError(f"{path}: refused, because its tensors claim more than the file holds.")
    return content


class _TensorsOnly(pickle.Unpickler):
    """Rebuilds containers, numbers and tensors of a file that pickle.dump wrote; every other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            # The bytes are a file of torch.save themselves; torch's own loader would unpickle them freely.
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise UserError(f"refused, because loading it would run code ({module}.{name})")


def load_plain_pickle(path: str | Path) -> dict[str, Any]:
    """The dictionary of tensors and numbers in a file of pickle.dump, whatever device they were on when written."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        with explain_os_errors(path), open(path, "rb") as file:
            content = _TensorsOnly(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error}.") from None
    except Exception as error:  # garbage makes the reader fail in any way
        raise UserError(f"{path}: not a whole pickle file ({type(error).__name__}). Copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; a dictionary of tensors was expected.")
    return content


def _stored_pickles(path: Path, damaged: str) -> list[bytes]:
    """The pickles of an archive. torch.save never compresses: one that grows when unpacked is not its work."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            grows = sum(entry.file_size for entry in entries) > os.path.getsize(path)
            if grows or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{path}: refused, because it is a compressed archive and no file of torch.save.")
            return [archive.read(entry) for entry in entries if entry.filename.endswith(".pkl")]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise UserError(damaged % f" ({error})") from error


def _tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, each object once; hostile files nest deeply and share heavily."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting.extend(item)
        elif isinstance(item, argparse.Namespace):
            waiting.extend(vars(item).values())
