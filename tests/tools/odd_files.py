"""Odd pictures and hostile weight files: each is taken or refused in a sentence, quickly, in little memory, and runs nothing.

    python -m tests.tools.odd_files [--only WORD] [--every 1] [--seconds 2] [--show]

Pictures go through data.decode, as they are and turned upright, and through a crop; weight files through everything that
loading a tokenizer does. Each is tried in a process of its own. A traceback, code that ran, another ending than the case
expects, more memory than twice the file (and 24 bytes a pixel that it decodes to, and SLACK) and more time than --seconds
are findings: they are printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from core.errors import UserError
from core.weights.pickles import plain, tensors_in
from data.decode import UnreadablePicture, decode_rgb
from data.transforms import Transform
from run.load import read_tokenizer
from tests.core.weights import test_hub
from tests.core.weights.test_containers import MODELS, official

SLACK = 48 << 20  # bytes that a process may grow by for whatever it reads: libraries, caches
PIXEL = 24  # bytes: the picture in its own mode, as RGBA, as RGB and turned
TAKEN, REFUSED = "taken", "refused"


@dataclass
class Case:
    """`name` is the file's too; `expected` is TAKEN, REFUSED or "" for either."""

    name: str
    data: bytes
    expected: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpeg": ("L", "RGB", "CMYK", "YCbCr"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"),
    "gif": ("1", "L", "P", "RGB", "RGBA"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "webp": ("RGB", "RGBA"),
    "ppm": ("1", "L", "RGB", "I;16", "F"),
}
DARK = ("F", "I")  # modes whose values have no range that is known: refused


def picture(mode: str, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A gradient in any mode."""
    width, height = size
    ramp = np.linspace(0, 255, width * height).reshape(height, width)
    grey = Image.fromarray(ramp.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((ramp * 1e6).astype(np.int32))
    if mode == "F":
        return Image.fromarray((ramp / 255).astype(np.float32))
    colour = Image.merge("RGB", [grey, grey.rotate(180), Image.new("L", size, 90)])
    if mode == "LAB":
        return Image.merge("LAB", [grey, grey, grey])
    if mode in ("LA", "RGBA"):
        colour.putalpha(grey.rotate(180))
    return colour.convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int = 8, colour: int = 0, rows: bytes | None = None, extra: bytes = b""
) -> bytes:
    """A PNG by hand; `rows` are the filtered scan lines, None for zeros of which a bomb is made."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    line = 1 + (width * depth * samples + 7) // 8
    if rows is None:
        packer = zlib.compressobj(9)
        data = b"".join(packer.compress(bytes(line)) for _ in range(min(height, 1 << 20))) + packer.flush()
    else:
        data = zlib.compress(rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def of_every_mode() -> Iterator[Case]:
    """Whole, cut, of one pixel, and with the ending of another kind."""
    for kind, modes in MODES.items():
        for mode in modes:
            name = f"{mode.replace(';', '')}.{kind}"
            dark = mode in DARK
            whole = encoded(picture(mode), kind)
            yield Case(f"whole_{name}", whole, REFUSED if dark else TAKEN)
            yield Case(
                f"cut_{name}", whole[: len(whole) * 2 // 3], REFUSED if kind not in ("gif", "bmp", "tiff") else ""
            )
            yield Case(f"pixel_{name}", encoded(picture(mode, (1, 1)), kind), "" if dark or "I" in mode else TAKEN)
            yield Case(f"wrong_ending_{name}.jpg", whole, REFUSED if dark else TAKEN)


def of_every_orientation() -> Iterator[Case]:
    for kind, turn in itertools.product(("png", "jpeg", "webp", "tiff"), (0, 3, 6, 8, 9)):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield Case(f"exif_{turn}.{kind}", encoded(picture("RGB"), kind, exif=exif), TAKEN)
    broken = encoded(picture("RGB"), "jpeg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    yield Case("exif_nowhere.jpeg", broken, TAKEN)
    endless = b"Exif\0\0II*\0\x08\0\0\0" + b"\x01\0" + b"\x69\x87\x04\0\x01\0\0\0\x08\0\0\0" + b"\x08\0\0\0"
    yield Case("exif_circle.jpeg", encoded(picture("RGB"), "jpeg", exif=endless), TAKEN)


def of_odd_depths() -> Iterator[Case]:
    for depth in (1, 2, 4, 8, 16):
        rows = (b"\0" + bytes(range(1, 1 + 8 * depth // 8))) * 8
        yield Case(f"grey_{depth}_bits.png", png(8, 8, depth, rows=rows), "" if depth == 16 else TAKEN)
    for colour in (2, 4, 6):
        samples = {2: 3, 4: 2, 6: 4}[colour]
        yield Case(
            f"colour_{colour}_16_bits.png", png(8, 8, 16, colour, (b"\0" + b"\x80\x01" * 8 * samples) * 8), TAKEN
        )
    for depth, entries in ((1, 2), (2, 4), (4, 16), (8, 256), (8, 3)):
        palette = chunk(b"PLTE", bytes(range(256)) * 3)[: 8 + 3 * entries]
        palette = chunk(b"PLTE", palette[8:])
        rows = (b"\0" + bytes(depth)) * 8
        yield Case(f"palette_{depth}_bits_{entries}.png", png(8, 8, depth, 3, rows, palette), TAKEN)
    yield Case("palette_missing.png", png(8, 8, 8, 3, (b"\0" + bytes(8)) * 8))
    for high in (255, 4095, 65535):
        values = np.linspace(0, high, 384).reshape(16, 24).astype(np.uint16)
        for kind in ("png", "tiff"):
            yield Case(
                f"sixteen_{high}.{kind}", encoded(Image.fromarray(values), kind), TAKEN if high == 65535 else REFUSED
            )


def with_transparency() -> Iterator[Case]:
    paletted = picture("P")
    yield Case("palette_one_clear.png", encoded(paletted, "png", transparency=3), TAKEN)
    yield Case("palette_alpha.png", encoded(paletted, "png", transparency=bytes(range(256))), TAKEN)
    yield Case("palette_one_clear.gif", encoded(paletted, "gif", transparency=3), TAKEN)
    yield Case("colour_clear.png", encoded(picture("RGB"), "png", transparency=(0, 255, 90)), TAKEN)
    yield Case("grey_clear.png", encoded(picture("L"), "png", transparency=17), TAKEN)
    yield Case("invisible.png", encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "png"), TAKEN)
    yield Case("invisible.webp", encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "webp"), TAKEN)


def moving() -> Iterator[Case]:
    frames = [picture("RGB").rotate(20 * i) for i in range(5)]
    for kind in ("gif", "png", "webp", "tiff"):
        whole = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        yield Case(f"five_frames.{kind}", whole, TAKEN)
        yield Case(f"five_frames_cut.{kind}", whole[:-40])
    small = bytearray(encoded(picture("P"), "gif"))
    small[6:10] = struct.pack("<HH", 65535, 65535)
    yield Case("canvas_of_4_gigapixels.gif", bytes(small), REFUSED)


def jpegs() -> Iterator[Case]:
    for quality, subsampling, progressive in itertools.product((1, 95), (0, 2), (False, True)):
        options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        name = f"quality_{quality}_{subsampling}_{'progressive' if progressive else 'plain'}.jpeg"
        yield Case(name, encoded(picture("RGB", (64, 48)), "jpeg", **options), TAKEN)
    whole = encoded(picture("RGB"), "jpeg")
    yield Case("adobe_cmyk.jpg", encoded(picture("CMYK"), "jpeg", quality=80), TAKEN)
    yield Case("rubbish_behind.jpg", whole + os.urandom(5000), TAKEN)
    yield Case("rubbish_before.jpg", b"\0\0\0\0" + whole, REFUSED)
    yield Case("no_end.jpg", whole[:-2])
    yield Case("profile_rubbish.jpg", encoded(picture("RGB"), "jpeg", icc_profile=os.urandom(3000)), TAKEN)
    frame = whole.index(b"\xff\xc0")
    for height, width in ((65500, 65500), (0, 24), (16, 0), (13000, 13000)):
        claims = bytearray(whole)
        claims[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
        yield Case(f"claims_{width}x{height}.jpg", bytes(claims), REFUSED)


def tiffs() -> Iterator[Case]:
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield Case(f"{compression}.tiff", encoded(picture("RGB"), "tiff", compression=compression), TAKEN)
    yield Case("group4.tiff", encoded(picture("1"), "tiff", compression="group4"), TAKEN)
    whole = encoded(picture("RGB"), "tiff")
    for number, change in enumerate((b"\xff\xff\xff\x7f", b"\0\0\0\0", struct.pack("<I", len(whole)))):
        yield Case(f"directory_{number}.tiff", whole[:4] + change + whole[8:], REFUSED)


def bombs() -> Iterator[Case]:
    yield Case("30000x30000.png", png(30000, 30000, 1), REFUSED)
    yield Case("claims_2_billion.png", png(2**31 - 1, 2**31 - 1, 1, rows=b"\0"), REFUSED)
    yield Case("claims_100000x1000.png", png(100000, 1000, 8, 2, rows=b"\0"), REFUSED)
    text = b"Comment\0\0" + zlib.compress(bytes(100 << 20), 9)
    yield Case("text_of_100_mb.png", png(8, 8, 8, 0, (b"\0" + bytes(8)) * 8, chunk(b"zTXt", text)))
    profile = b"icc\0\0" + zlib.compress(bytes(100 << 20), 9)
    yield Case("profile_of_100_mb.png", png(8, 8, 8, 0, (b"\0" + bytes(8)) * 8, chunk(b"iCCP", profile)))
    yield Case("rows_of_100_mb.png", png(8, 8, rows=bytes(100 << 20)))
    yield Case("header_only.ppm", b"P6 13000 13000 255\n", REFUSED)
    yield Case("header_of_digits.ppm", b"P6 " + b"9" * 100000, REFUSED)
    yield Case("header_huge.ppm", b"P6 999999 999999 255\n", REFUSED)
    bmp = bytearray(encoded(picture("RGB"), "bmp"))
    for width, height in ((13000, 13000), (2**31 - 1, 2**31 - 1), (24, -(2**31)), (0, 0)):
        bmp[18:26] = struct.pack("<ii", width, height)
        yield Case(f"claims_{width}x{height}.bmp", bytes(bmp), REFUSED)
    yield Case("20000x1.png", encoded(Image.new("RGB", (20000, 1)), "png"), REFUSED)
    yield Case("1x20000.jpg", encoded(Image.new("RGB", (1, 20000)), "jpeg"), REFUSED)
    yield Case("100x1.png", encoded(Image.new("RGB", (100, 1)), "png"), TAKEN)


def no_pictures() -> Iterator[Case]:
    others = {
        "empty": b"",
        "zeros": bytes(1000),
        "page": b"<!DOCTYPE html><p>404",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "json": b'{"error": "rate limit"}',
        "text": "é".encode() * 500,
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print\n",
        "pdf": b"%PDF-1.7\n1 0 obj\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "mp4": b"\0\0\0\x18ftypmp42" + bytes(200),
        "avif": b"\0\0\0\x1cftypavif" + bytes(200),
        "heic": b"\0\0\0\x18ftypheic" + bytes(200),
        "jxl": b"\xff\x0a" + bytes(200),
        "jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200),
        "psd": b"8BPS\0\x01" + bytes(200),
        "ico": b"\0\0\x01\0\x01\0\x10\x10" + bytes(200),
        "zip": b"PK\x03\x04" + bytes(200),
        "gzip": b"\x1f\x8b\x08\0" + bytes(200),
        "npy": b"\x93NUMPY\x01\0v\0{'descr'",
        "pickle": pickle.dumps({"a": 1}),
        "signature.png": b"\x89PNG\r\n\x1a\n",
        "signature.jpg": b"\xff\xd8\xff",
        "signature.gif": b"GIF89a",
        "signature.webp": b"RIFF\0\0\0\0WEBP",
    }
    for name, data in others.items():
        yield Case(f"is_{name}" if "." in name else f"is_{name}.jpg", data, REFUSED)


def flipped() -> Iterator[Case]:
    """With bytes changed at random: whatever the decoder says of them."""
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm"):
        whole = encoded(picture("RGB"), kind)
        for seed in range(4):
            drawn, data = random.Random(f"{kind} {seed}"), bytearray(whole)
            for _ in range(1 + 3 * seed):
                data[drawn.randrange(len(data))] = drawn.randrange(256)
            yield Case(f"flipped_{seed}.{kind}", bytes(data))


def pictures() -> Iterator[Case]:
    makers = (of_every_mode, of_every_orientation, of_odd_depths, with_transparency, moving, jpegs, tiffs, bombs)
    for maker in (*makers, no_pictures, flipped):
        yield from maker()


def look_at_picture(path: Path) -> int:
    """Decode it in every way; returns how many pixels it has. UserError where it is refused."""
    data, pixels = path.read_bytes(), 0
    try:
        for upright in (False, True):
            image = decode_rgb(data, path.name, upright)
            assert image.mode == "RGB", image.mode
            assert Transform(16)(image, (0, 0)).shape == (3, 16, 16)
            pixels = image.width * image.height
    except UnreadablePicture as error:
        sentence = str(error)
        assert sentence.startswith(path.name) and "\n" not in sentence, sentence
        raise UserError(sentence) from None
    return pixels


# ---------------------------------------------------------------------------------------------------------------------
# Weight files
# ---------------------------------------------------------------------------------------------------------------------
MODEL = "maskgit_vqgan"


def saved(content: object, form: str) -> bytes:
    """As torch.save writes it now ("pt") and wrote it once ("old"), or as a bare pickle ("pkl")."""
    if form == "pkl":
        return pickle.dumps(content, protocol=4)
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=form == "pt")
    return buffer.getvalue()


def hostile_pickles(marker: str) -> Iterator[Case]:
    for name, evil in test_hub.hostile_objects(marker).items():
        name = name.replace(" ", "_")
        for form in ("pt", "old", "pkl"):
            yield Case(f"{name}_{form}.pt", saved({"args": evil, "model": {}}, form), REFUSED)
        yield Case(f"{name}_with_weights.pt", saved({"args": evil, "model": official(MODEL)}, "pt"))
    for name, data in test_hub.raw_pickles(marker).items():
        name = name.replace(" ", "_")
        yield Case(f"raw_{name}.pt", data, REFUSED)
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("evil/data.pkl", data)
            file.writestr("evil/version", "3")
        yield Case(f"archived_{name}.pt", archive.getvalue(), REFUSED)


def crafted(header: object, body: bytes = bytes(16), length: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def hostile_headers() -> Iterator[Case]:
    def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
        return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}

    headers: dict[str, bytes] = {
        "overlapping": crafted(entry() | {"v": entry()["w"]}),
        "behind_the_end": crafted(entry(offsets=(8, 24))),
        "backwards": crafted(entry(offsets=(16, 0))),
        "far_away": crafted(entry(offsets=(0, 2**50))),
        "gap": crafted(entry(offsets=(0, 16)), body=bytes(64)),
        "no_body": crafted(entry(), body=b""),
        "shape_huge": crafted(entry(shape=(2**62,))),
        "shape_overflows": crafted(entry(shape=(2**40, 2**40))),
        "shape_negative": crafted(entry(shape=(-4,))),
        "shape_words": crafted(entry(shape=("4",))),
        "dtype_unknown": crafted(entry(dtype="F99")),
        "dtype_wrong_size": crafted(entry(dtype="BF16")),
        "dtype_number": crafted(entry(dtype=3)),
        "name_long": crafted({"w" * 1_000_000: entry()["w"]}),
        "no_offsets": crafted({"w": {"dtype": "F32"}}),
        "null": crafted(b"null"),
        "list": crafted(b"[]"),
        "deep_lists": crafted(b"[" * 100_000),
        "deep_tables": crafted(b'{"a":' * 50_000),
        "no_text": crafted(b"\xff\xfe{}"),
        "empty_table": crafted({}),
        "metadata_numbers": crafted({"__metadata__": {"a": 1}} | entry()),
        "ours_rubbish": crafted({"__metadata__": {"tessera": "x"}} | entry()),
        "ours_deep": crafted({"__metadata__": {"tessera": "[" * 50_000}} | entry()),
        "ours_list": crafted({"__metadata__": {"tessera": "[]"}} | entry()),
        "ours_other": crafted(
            {"__metadata__": {"tessera": '{"kind": "x", "settings": {}, "provenance": {}}'}} | entry()
        ),
    }
    for power in (27, 40, 63):
        headers[f"length_2_{power}"] = crafted(entry(), length=2**power)
    for name, data in headers.items():
        yield Case(f"{name}.safetensors", data, REFUSED)


def broken_weights() -> Iterator[Case]:
    """A whole file of a tokenizer, and what may be wrong with its tensors."""
    weights = official(MODEL)
    name = next(n for n, t in weights.items() if t.ndim == 4)
    changes: dict[str, dict[str, torch.Tensor]] = {
        "whole": {},
        "nan": {name: weights[name].clone().index_fill_(0, torch.tensor([0]), float("nan"))},
        "infinite": {name: torch.full_like(weights[name], float("inf"))},
        "int64": {name: weights[name].long()},
        "bool": {name: weights[name] > 0},
        "complex": {name: weights[name].to(torch.complex64)},
        "shape": {name: weights[name][:1]},
        "flat": {name: weights[name].flatten()},
        "empty": {name: weights[name][:0]},
        "scalar": {name: torch.tensor(1.0)},
        "surplus": {"zzz.weight": torch.ones(3)},
        "half": {n: t.half() for n, t in weights.items()},
        "bfloat16": {n: t.bfloat16() for n, t in weights.items()},
        "double": {n: t.double() for n, t in weights.items()},
        "transposed": {name: weights[name].transpose(2, 3)},
    }
    taken = ("whole", "half", "bfloat16", "double", "transposed")
    for change, tensors in changes.items():
        expected = TAKEN if change in taken else "" if change == "surplus" else REFUSED
        changed = {n: t.contiguous() for n, t in {**weights, **tensors}.items()}
        yield Case(f"weights_{change}.safetensors", safetensors_bytes(changed), expected)
        yield Case(f"weights_{change}.pt", saved({**weights, **tensors}, "pt"), expected)
    lacking = {n: t for n, t in weights.items() if n != name}
    yield Case("weights_lacking.safetensors", safetensors_bytes(lacking), REFUSED)
    yield Case("weights_text.pt", saved({**weights, name: "no tensor"}, "pt"), REFUSED)
    yield Case("weights_list.pt", saved(list(weights.values()), "pt"), REFUSED)
    yield Case("weights_expanded.pt", saved({**weights, name: torch.zeros(1).expand(10**12)}, "pt"), REFUSED)
    yield Case("weights_sparse.pt", saved({**weights, name: weights[name].flatten(1).to_sparse()}, "pt"), REFUSED)


def cut_and_foreign() -> Iterator[Case]:
    weights = official(MODEL)
    for form, whole in (
        ("safetensors", safetensors_bytes(weights)),
        ("pt", saved(weights, "pt")),
        ("pth", saved(weights, "old")),
    ):
        for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
            yield Case(f"first_{length}.{form}", whole[:length], REFUSED)
        for name, data in (
            ("page", b"\n<!DOCTYPE html><p>Sign in"),
            ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
            ("rubbish", random.Random(form).randbytes(5000)),
            ("denied", b'{"error": "Access to model is restricted"}'),
            ("picture", encoded(picture("RGB"), "png")),
        ):
            yield Case(f"is_{name}.{form}", data, REFUSED)
    bomb = io.BytesIO()
    small = zipfile.ZipFile(io.BytesIO(saved({"w": torch.zeros(9)}, "pt")))
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        for entry in small.infolist():
            file.writestr(entry.filename, small.read(entry))
        file.writestr("archive/data/9", bytes(200 << 20))
    yield Case("inflates.pt", bomb.getvalue(), REFUSED)


def weight_files(marker: str) -> Iterator[Case]:
    yield from hostile_pickles(marker)
    yield from hostile_headers()
    yield from broken_weights()
    yield from cut_and_foreign()


def look_at_weights(path: Path) -> int:
    """All that loading a tokenizer from it does, and all that is shown of what lies beside the tensors."""
    try:
        content = test_hub.hub.load_tensors(path)
        plain(content)
        list(tensors_in(content))
        _, name, settings = MODELS[MODEL]
        read_tokenizer({"name": name, **settings, "weights": str(path)})
    except UserError as error:
        sentence = str(error)
        assert path.name in sentence, sentence
        raise
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Trials
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Ending:
    """How a case ended: TAKEN, REFUSED or what went wrong; a finding where that is not what it should be."""

    case: Case
    how: str
    detail: str
    seconds: float
    grown: int  # bytes of memory
    allowed: int

    def findings(self, limit: float) -> list[str]:
        found = []
        if self.how not in (TAKEN, REFUSED) or (self.case.expected and self.how != self.case.expected):
            found.append(f"{self.how}, expected {self.case.expected or 'a sentence'}: {self.detail}")
        if self.grown > self.allowed:
            found.append(f"{self.grown >> 20} MB of memory, {self.allowed >> 20} allowed")
        if self.seconds > limit:
            found.append(f"{self.seconds:.1f} s")
        return found


def trial(case: Case, look: Callable[[Path], int], folder: Path, marker: Path) -> Ending:
    """Write the file and look at it, in a process of its own."""
    path = folder / case.name
    path.write_bytes(case.data)
    out, into = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            how, detail, pixels = TAKEN, "", 0
            try:
                pixels = look(path)
            except UserError as error:
                how, detail = REFUSED, str(error)
            except BaseException as error:
                how, detail = "traceback", f"{type(error).__name__}: {error}"[:300]
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            os.write(into, json.dumps([how, detail[:2000], pixels, grown]).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - began
    how, detail, pixels, grown = json.loads(said) if said else [f"ended with status {status}", "", 0, 0]
    if marker.exists():
        how, detail = "ran code", str(marker)
        marker.unlink() if marker.is_file() else marker.rmdir()
    path.unlink()
    return Ending(case, how, detail, seconds, grown, 2 * len(case.data) + PIXEL * pixels + SLACK)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files with this in their name")
    parser.add_argument("--every", type=int, default=1, help="every n-th case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="longer is a finding")
    parser.add_argument("--show", action="store_true", help="each ending")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not survive a fork
    Image.init()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder, marker = Path(name), Path(name, "marker")
        looks = (
            ("pictures", pictures(), look_at_picture),
            ("weight files", weight_files(str(marker)), look_at_weights),
        )
        for kind, cases, look in looks:
            chosen = [case for case in cases if options.only in case.name][:: options.every]
            if not chosen:
                continue
            endings = [trial(case, look, folder, marker) for case in chosen]
            for ending in endings:
                findings = ending.findings(options.seconds)
                bad += bool(findings)
                if findings or options.show:
                    print(f"{ending.case.name}: {'; '.join(findings) or ending.how + ' ' + ending.detail[:150]}")
            slowest = max(endings, key=lambda ending: ending.seconds)
            print(
                f"{len(endings)} {kind}: {dict(Counter(ending.how for ending in endings))}, slowest {slowest.case.name} "
                f"{slowest.seconds:.2f} s, most memory {max(ending.grown for ending in endings) >> 20} MB"
            )
    print(f"{bad} findings")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
