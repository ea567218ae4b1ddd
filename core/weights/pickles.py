"""Reading what torch.save and pickle.dump wrote, without running code from it.

Official weights come as .pt, .pth and .bin files, which are pickles: programs that may call anything. This file reads the
program itself and never calls what it names: tensors and plain containers are built from the bytes of the file, and every
other object (a trainer's Namespace, a config, an optimizer's numbers) becomes an `Inert` record of its name and contents.
Tensors are views into the mapped file, so nothing takes more memory than the file has. Our own files are never pickles.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.files import explain_os_errors, refuse_text
from core.weights import exports

_LEGACY = 0x1950A86A20F9469CFC6C  # the first number in torch.save's files before torch 1.6
_MAX_NESTING = 8  # files of torch.save inside pickles inside files
_DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}


class Name(str):
    """A class or function that a file names, "module.name". It is a word, nothing more."""


class Inert:
    """An object that a file wants made by code: what it is called and what it holds. `plain` reads it.

    Attributes:
        kind: "argparse.Namespace".
        args: what its class or function would have been called with.
        state: what would have been set on it; None where nothing was.
        items, entries: what would have been added to it as a list and as a dictionary.
    """

    def __init__(self, kind: str, args: tuple = ()):
        self.kind, self.args = kind, args
        self.state: Any = None
        self.items: list = []
        self.entries: dict = {}

    def __repr__(self) -> str:
        return f"<{self.kind}, not made>"


class _Storage(NamedTuple):
    content: torch.UntypedStorage | None  # None while a file of the old format is looked at for the first time
    dtype: torch.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Whole files
# ---------------------------------------------------------------------------------------------------------------------
def load_pickle(path: str | Path, kinds: tuple[type, ...] = (dict,)) -> Any:
    """What a file of torch.save (either format) or pickle.dump holds, normally a dictionary: tensors, plain values and
    `Inert` objects.

    UserError for files that are damaged, claim more than they hold, or hold something that is not of `kinds`.
    """
    path = Path(path)
    refuse_text(path)
    try:
        with explain_os_errors(path), open(path, "rb") as file:
            size = os.path.getsize(path)
            whole = torch.UntypedStorage.from_file(os.fspath(path), False, size) if size else torch.UntypedStorage(0)
            content = _load(file, cast(torch.UntypedStorage, whole))  # torch's stub says: any storage
    except UserError as error:
        raise error if str(error).startswith(f"{path}: ") else UserError(f"{path}: {error}") from None
    except Exception as error:  # garbage makes the reader fail in any way; whatever it is, the file is at fault
        raise UserError(
            f"{path}: not a whole PyTorch file ({type(error).__name__}: {str(error)[:80]}). "
            "Delete it and copy or download it again."
        ) from error
    if not isinstance(content, kinds):
        what = content.kind if isinstance(content, Inert) else type(content).__name__
        raise UserError(f"{path}: holds a {what}; a dictionary of tensors was expected.")
    return content


def _load(file: BinaryIO, whole: torch.UntypedStorage, nesting: int = 0) -> Any:
    """The object in a file of any of the three formats. `whole` is the same file as memory."""
    if nesting > _MAX_NESTING:
        raise ValueError("files inside files inside files")
    if file.read(4) == b"PK\x03\x04":
        return _load_archive(file, whole, nesting)
    file.seek(0)
    first = _Machine(file, _no_storage, nesting).run()
    return _load_legacy(file, whole, nesting) if first == _LEGACY and type(first) is int else first


def _no_storage(dtype: torch.dtype, key: Any, count: int, view: Any) -> _Storage:
    raise ValueError("a tensor without data")


def _load_archive(file: BinaryIO, whole: torch.UntypedStorage, nesting: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        # torch.save never compresses: an archive that grows when unpacked is not its work.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()) or sum(
            entry.file_size for entry in archive.infolist()
        ) > len(whole):
            raise UserError("refused, because it is a compressed archive and no file of torch.save.")
        main = next((n for n in entries if n == "data.pkl" or n.endswith("/data.pkl")), None)
        if main is None:
            raise UserError(
                f"an archive, but not of torch.save; it holds {', '.join(list(entries)[:5]) or 'nothing'}. "
                "Name the weight file that is inside."
            )
        root = main.removesuffix("data.pkl")
        if entries.get(f"{root}byteorder") and archive.read(f"{root}byteorder") == b"big":
            raise UserError("written on a big-endian machine, which is not supported.")

        def storage(dtype: torch.dtype, key: Any, count: int, view: Any) -> _Storage:
            entry = entries[f"{root}data/{key}"]
            file.seek(entry.header_offset)
            header = file.read(30)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
            content = _piece(whole, start, min(entry.file_size, count * dtype.itemsize))
            return _Storage(content.clone() if start % dtype.itemsize else content, dtype)

        return _Machine(io.BytesIO(archive.read(main)), functools.cache(storage), nesting).run()


def _load_legacy(file: BinaryIO, whole: torch.UntypedStorage, nesting: int) -> Any:
    """Magic number, version, facts of the system, the object, the keys of its storages, then their bytes."""
    for _ in range(2):
        _Machine(file, _no_storage, nesting).run()
    place, dtypes = file.tell(), {}

    def note(dtype: torch.dtype, key: Any, count: int, view: Any) -> _Storage:
        dtypes[key] = dtype
        return _Storage(None, dtype)

    _Machine(file, note, nesting).run()
    keys, starts, position = _Machine(file, _no_storage, nesting).run(), {}, file.tell()
    for key in keys:
        count = int.from_bytes(bytes(_piece(whole, position, 8).tolist()), "little", signed=True)
        starts[key] = position + 8, count * dtypes[key].itemsize
        position += 8 + count * dtypes[key].itemsize

    def storage(dtype: torch.dtype, key: Any, count: int, view: Any) -> _Storage:
        start, size = starts[key]
        if view is not None:
            _, offset, count = view
            start, size = start + offset * dtype.itemsize, count * dtype.itemsize
        # A copy, for these bytes lie anywhere and arithmetic wants them aligned.
        return _Storage(_piece(whole, start, size).clone(), dtype)

    file.seek(place)
    return _Machine(file, functools.cache(storage), nesting).run()


def _piece(whole: torch.UntypedStorage, start: int, size: int) -> torch.UntypedStorage:
    """`size` bytes of a file without a copy."""
    if start < 0 or size < 0 or start + size > len(whole):
        raise UserError("refused, because its tensors claim more than the file holds.")
    return whole[start : start + size] if size else torch.UntypedStorage(0)


# ---------------------------------------------------------------------------------------------------------------------
# What is built: tensors, arrays, plain containers
# ---------------------------------------------------------------------------------------------------------------------
def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *rest: Any) -> Tensor | None:
    """A view of a storage; `rest` may end in the type (of version 3)."""
    if not isinstance(storage, _Storage) or storage.content is None:
        return None
    dtype = (
        getattr(torch, rest[2].removeprefix("torch.")) if len(rest) > 2 and isinstance(rest[2], Name) else storage.dtype
    )
    if min((offset, *size, *stride)) < 0 or len(size) != len(stride):
        raise UserError("refused, because a tensor has a negative size.")
    held, spanned = len(storage.content) // dtype.itemsize, offset
    if 0 not in size:
        spanned += 1 + sum((n - 1) * step for n, step in zip(size, stride))
    if spanned > held or math.prod(size) > held:
        raise UserError(f"refused, because a tensor of shape {list(size)} claims more than the file holds.")
    # on the CPU where the caller lays a network out elsewhere
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage.content, offset, size, stride)


def _dtype(record: Any) -> np.dtype | None:
    """Of numbers; None for anything else."""
    if not isinstance(record, Inert) or record.kind != "numpy.dtype":
        return None
    if not re.fullmatch(r"[biufc]\d{1,2}", record.args[0]):
        return None
    order = record.state[1] if record.state else "="
    return np.dtype((order if order in "<>" else "=") + record.args[0])


def _array(data: Any, dtype: Any, shape: tuple, order: Literal["C", "F"] = "C") -> np.ndarray | None:
    numbers = _dtype(dtype)
    data = data.encode("latin-1") if isinstance(data, str) else data  # of Python 2
    if numbers is None or not isinstance(data, (bytes, bytearray)) or math.prod(shape) * numbers.itemsize != len(data):
        return None
    return np.frombuffer(bytes(data), numbers).reshape(shape, order=order).astype(numbers.newbyteorder("="))


def _scalar(dtype: Any, data: Any) -> Any:
    return cast(np.ndarray, _array(data, dtype, (1,))).item()  # fails, as garbage may, for what is no number


def _bytes(*args: Any) -> bytes | None:
    if len(args) == 1 and isinstance(args[0], (bytes, bytearray)):
        return bytes(args[0])
    return args[0].encode("latin-1") if len(args) == 2 and args[1] in ("latin1", "latin-1") else None


def _listed(values: Any = ()) -> list | None:
    return list(values) if isinstance(values, (list, tuple)) else None


def _mapped(values: Any = ()) -> dict:
    pairs = values.items() if isinstance(values, dict) else values
    return _set({}, [word for pair in pairs for word in pair])


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.Size": tuple,
    "collections.OrderedDict": _mapped,
    "builtins.dict": _mapped,
    "collections.Counter": _mapped,
    "collections.defaultdict": lambda *_: {},
    "builtins.list": _listed,
    "builtins.tuple": _listed,
    "builtins.set": _listed,
    "builtins.frozenset": _listed,
    "collections.deque": lambda values=(), *_: _listed(values),
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "_codecs.encode": _bytes,
    "builtins.complex": lambda real, imaginary: complex(float(real), float(imaginary)),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0),
    "numpy.core.numeric._frombuffer": _array,
}
_INDIRECT: dict[str, Callable[..., tuple]] = {  # calls of functions that call what they are given
    "copyreg._reconstructor": lambda kind, base, value: (kind, () if value is None else (value,)),
    "copyreg.__newobj__": lambda kind, *args: (kind, args),
    "copyreg.__newobj_ex__": lambda kind, args, keywords: (kind, args),
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, state: (function, args),
}


def _name(text: str) -> Name:
    """What a file names, by today's word for it."""
    for old, new in (("__builtin__.", "builtins."), ("copy_reg.", "copyreg."), ("numpy._core.", "numpy.core.")):
        text = new + text.removeprefix(old) if text.startswith(old) else text
    return Name(text)


def _memory(data: bytes) -> torch.UntypedStorage:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)


def _extend(target: Any, values: list) -> None:
    (target.items if isinstance(target, Inert) else target).extend(values)


def _set(target: Any, values: list) -> Any:
    """Put keys and values, which come in turn, into `target`. A key that is no plain one is kept as an object, for hashing
    may run code or never end."""
    entries = target.entries if isinstance(target, Inert) else target
    for key, value in zip(values[::2], values[1::2], strict=True):
        parts = key if isinstance(key, tuple) else (key,)
        simple = all(isinstance(part, (str, bytes, int, float, type(None), Inert)) for part in parts)
        entries[key if simple else Inert("a key", (key,))] = value
    return target


def _give_state(target: Any, state: Any) -> None:
    """What an object's __setstate__ would be given; an array takes its contents."""
    if isinstance(target, Inert):
        target.state = state
    elif isinstance(target, dict):  # a state dict, whose attribute may hold what we wrote
        about = state.get("_metadata") if isinstance(state, dict) else None
        if isinstance(about, dict) and exports.KEY in about:
            target[exports.KEY] = about[exports.KEY]
    elif isinstance(target, np.ndarray):
        _, shape, dtype, fortran, data = state
        array = _array(data, dtype, shape, "F" if fortran else "C")
        if array is not None:  # one of objects stays empty
            cast(Any, target).__setstate__((1, array.shape, array.dtype, False, array.tobytes()))  # a pickle's words


# ---------------------------------------------------------------------------------------------------------------------
# What such files say beside their tensors
# ---------------------------------------------------------------------------------------------------------------------
def plain(value: Any) -> Any:
    """The same as dictionaries, lists, numbers and words: a Namespace by its attributes, a number with a format by its
    value, a config object by what it wraps, anything else by its name. Tensors and arrays stay."""
    return _plain(value, {}, 40)


def _plain(value: Any, done: dict[int, Any], depth: int) -> Any:
    held = _held(value) if isinstance(value, Inert) else value
    if not isinstance(held, (dict, list, tuple, Inert)):
        return held
    if depth == 0 or id(value) in done:  # hostile files nest deeply, share heavily and hold themselves
        return done.get(id(value))
    done[id(value)] = None
    if isinstance(held, dict):
        done[id(value)] = {key: _plain(item, done, depth - 1) for key, item in held.items()}
    elif isinstance(held, Inert):
        done[id(value)] = _plain(held, done, depth - 1)
    else:
        done[id(value)] = [_plain(item, done, depth - 1) for item in held]
    return done[id(value)]


def _held(thing: Inert) -> Any:
    state = thing.state
    if isinstance(state, tuple) and len(state) == 2:  # attributes and slots
        state = {name: value for part in state if isinstance(part, dict) for name, value in part.items()}
    if thing.entries or thing.items:
        return thing.entries or thing.items
    if isinstance(state, dict):
        for wrapped in ("_content", "_data", "_val"):  # of OmegaConf, D-AR's Config and OmegaConf's values
            if wrapped in state:
                return state[wrapped]
    if thing.kind.endswith("Path"):
        return "/".join(map(str, thing.args)).replace("//", "/")
    if len(thing.args) == 1 and isinstance(thing.args[0], (bool, int, float, str)):
        return thing.args[0]
    return state if isinstance(state, dict) else thing.kind


def tensors_in(content: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, each container once."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ())


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------
_MARK = object()
_VALUES = {  # opcodes whose argument is the value: numbers, words, bytes
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg and not opcode.stack_before and opcode.stack_after and opcode.stack_after != [pickletools.anyobject]
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}


class _Machine:
    """Runs one pickle to its end and leaves the file behind it.

    Args:
        storage: (dtype, key, number of elements, view) -> the bytes of a tensor.
        nesting: how many files this one is in.
    """

    def __init__(self, file: BinaryIO, storage: Callable[..., _Storage], nesting: int):
        self.file, self.storage, self.nesting = file, storage, nesting
        self.stack: list = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.file):
            if opcode.name in _VALUES:
                self.stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            else:
                self._step(opcode.name, argument)
        return self.stack.pop()

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MEMOIZE" | "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[len(self.memo) if argument is None else argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "POP":
                del stack[-1]
            case "POP_MARK":
                self._take_to_mark()
            # containers
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._take(int(opcode[-1]))))
            case "TUPLE":
                stack.append(tuple(self._take_to_mark()))
            case "LIST" | "FROZENSET":
                stack.append(self._take_to_mark())
            case "DICT":
                stack.append(_set({}, self._take_to_mark()))
            case "APPEND":
                values = self._take(1)
                _extend(stack[-1], values)
            case "APPENDS" | "ADDITEMS":
                values = self._take_to_mark()
                _extend(stack[-1], values)
            case "SETITEM":
                values = self._take(2)
                _set(stack[-1], values)
            case "SETITEMS":
                values = self._take_to_mark()
                _set(stack[-1], values)
            # what would be code
            case "GLOBAL":
                stack.append(_name(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(".".join(self._take(2))))
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                kind, args, *_ = self._take(3 if opcode == "NEWOBJ_EX" else 2)
                stack.append(self._made(kind, args if isinstance(args, tuple) else (args,)))
            case "BUILD":
                (state,) = self._take(1)
                _give_state(stack[-1], state)
            case "BINPERSID":
                stack.append(self._stored(*self._take(1)))
            case _:  # of Python 2's old classes, of registered extensions: in no file of weights
                raise ValueError(f"{opcode} is not read here")

    def _take(self, count: int) -> list:
        """The last `count` values of the stack, which must be there."""
        values = self.stack[-count:]
        if len(values) < count or any(value is _MARK for value in values):
            raise ValueError("stack underflow")
        del self.stack[-count:]
        return values

    def _take_to_mark(self) -> list:
        place = next(i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _MARK)
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def _made(self, kind: Any, args: tuple) -> Any:
        """What a call of `kind` stands for: an object of _BUILDERS, else a record of the call."""
        kind = kind if isinstance(kind, Name) else Name(getattr(kind, "kind", type(kind).__name__))
        if kind in _INDIRECT:
            return self._made(*_INDIRECT[kind](*args))
        if kind == "torch.storage._load_from_bytes":
            return _load(io.BytesIO(args[0]), _memory(args[0]), self.nesting + 1)
        try:
            thing = _BUILDERS[kind](*args) if kind in _BUILDERS else None
        except UserError:
            raise
        except Exception:  # not what such a call looks like
            thing = None
        return Inert(kind, args) if thing is None else thing

    def _stored(self, identity: Any) -> _Storage | Inert:
        """The storage behind torch.save's ("storage", class, key, device, number of elements, view)."""
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            return Inert("persistent object", (identity,))
        kind, key, _, count = identity[1:5]
        dtype = _DTYPES[str(kind).rpartition(".")[2].removesuffix("Storage")]
        return self.storage(dtype, key, int(count), identity[5] if len(identity) > 5 else None)
