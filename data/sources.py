"""Where pictures come from: `open_source(url)` picks a `DataSource` by the scheme of the URL.

    folder://PATH               one folder per class (ImageNet layout), sorted; PATH/<split> if there is such a folder;
                                without class folders the pictures in it, which then have no labels
    list://FILE.txt?root=DIR    lines `relative/path.JPEG label`, the label optional; root defaults to the file's folder
    wds://PATTERN.tar           WebDataset shards, with {0000..0012}, {a,b}, *, or a folder of them (see data/shards.py)
    wds://https://HOST/PATTERN.tar?samples=N     streamed, also wds://hf://datasets/ORG/REPO/*.tar
    datasets://NAME             Hugging Face datasets, by name or folder (see data/hf.py)
    embedded://emoji64          1,906 emoji at 64 px in 9 classes (train 1,724, val 182), part of this repository
    embedded://photos256        214 photographs at 256 px in 5 classes (train 169, val 45), part of this repository
    synthetic://?size=64&classes=4&count=256     coloured shapes, for tests
    tokens://DIR                no pictures but what a tokenizer made of them (data/tokens.py)
    PATH                        a folder (of pictures or of .tar shards), a .txt list or a .tar

Every scheme accepts `?split=NAME` (same as the argument) and `?exif=1` (pictures turned as their EXIF orientation
says); folder, list and wds accept `?classes=FILE` with class names, one per line. "{split}" in a URL is replaced by the
split.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from core.errors import UserError, nearest
from core.files import expanded, refuse_text
from core.rng import uniform_scalar
from core.specs import DataSource, Sample
from data.base import MAX_CLASSES, FileSource, LeftOut, read_class_names, whole_number
from data.hf import open_datasets
from data.shards import ShardSource, absent, expand_braces, find_shards, open_remote_shards
from data.tokens import open_tokens

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = ("train", "val", "test")
EVERYWHERE = ("split", "exif")  # options of every scheme
EMBEDDED = Path(__file__).parent / "embedded"


# ---------------------------------------------------------------------------------------------------------------------
# URLs
# ---------------------------------------------------------------------------------------------------------------------
def _parse(url: str) -> tuple[str, str, dict[str, str]]:
    """scheme, path and options of a URL. Nothing is percent-decoded: paths stay as the shell shows them."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    path, mark, query = rest.rpartition("?")
    if not mark or not re.fullmatch(r"\w+=[^&]*(&\w+=[^&]*)*", query):
        path, query = rest, ""
    return scheme, path, dict(pair.split("=", 1) for pair in query.split("&") if pair)


def _guess_scheme(path: str) -> str:
    """The scheme of a plain path."""
    if path.endswith(".txt"):
        return "list"
    folder = expanded(path)
    shards = path.endswith(".tar") or (folder.is_dir() and any(folder.glob("*.tar")) and not has_pictures(folder))
    return "wds" if shards else "folder"


def open_source(url: str, split: str | None = None, upright: bool = False) -> DataSource:
    """Open the pictures that `url` names.

    Args:
        url: see the top of this file.
        split: "train" or "val" where the source has splits; `?split=` in the URL wins.
        upright: turn pictures as their EXIF orientation says; `?exif=` in the URL wins.
    """
    scheme, path, options = _parse(url)
    scheme = scheme or _guess_scheme(path)
    if scheme not in SCHEMES:
        raise UserError(f'{url}: unknown data source "{scheme}://".{nearest(scheme, SCHEMES)}')
    opener, accepted = SCHEMES[scheme]
    for key in options:
        if key not in (*accepted, *EVERYWHERE):
            raise UserError(f'{url}: {scheme}:// has no option "{key}".{nearest(key, (*accepted, *EVERYWHERE))}')
    split = options.pop("split", split)
    exif = options.pop("exif", str(int(upright)))
    if exif not in ("0", "1"):
        raise UserError(f"{url}: exif={exif} must be 0 or 1.")
    if "{split}" in path:
        if split is None:
            raise UserError(f"{url} contains {{split}} but no split is given. Add ?split=train.")
        path = path.replace("{split}", split)
    if path.endswith(".jsonl"):
        raise UserError(
            f"{url}: .jsonl files hold codes, not pictures. Make a store of them: bash run_pretokenize.sh CONFIG --import "
            f"{path} --out DIR; then data.url=tokens://DIR."
        )
    if not path and scheme != "synthetic":
        raise UserError(f"{url}: nothing after {scheme}://. Write for example {scheme}://PATH.")
    source = opener(path, split, options)
    source.upright = exif == "1"
    return source


def exists(url: str) -> bool:
    """Whether the folder, list or shards that a URL names are on this disk; True where that is not for a disk to say."""
    scheme, path, _ = _parse(url)
    scheme = scheme or _guess_scheme(path)
    if scheme == "wds" and "://" not in path:
        first = expand_braces(os.path.expanduser(path))[0]
        return bool(glob.glob(first))
    return scheme not in ("folder", "list") or expanded(path).exists()


def _class_names(options: dict[str, str]) -> list[str] | None:
    return read_class_names(options["classes"]) if "classes" in options else None


# ---------------------------------------------------------------------------------------------------------------------
# Folders and lists
# ---------------------------------------------------------------------------------------------------------------------
def is_picture(name: str) -> bool:
    """Whether a file is taken for a picture: by its extension, and not hidden."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def has_pictures(folder: str | Path) -> bool:
    """Whether there is a picture anywhere in a folder."""
    return any(is_picture(file.name) for file in Path(folder).rglob("*"))


def _refuse_unlisted(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}. Check its permissions.") from error


def _subfolders(folder: Path) -> list[str]:
    try:
        folders = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError as error:
        _refuse_unlisted(error)
    return sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")  # of zip archives


def _pictures_below(root: Path, name: str, left_out: LeftOut) -> list[str]:
    """Paths, relative to `root`, of the pictures in its folder `name` and in the folders inside it."""
    paths = []
    for folder, inside, files in sorted(os.walk(root / name, onerror=_refuse_unlisted)):
        below = os.path.relpath(folder, root)
        for file in sorted(files):
            path = os.path.join(below, file)
            if is_picture(file):
                paths.append(path)
            else:
                left_out.add_file(path)
        for link in filter(os.path.islink, (os.path.join(folder, inner) for inner in inside)):
            left_out.add("linked folder(s) inside a class", os.path.relpath(link, root))
    return paths


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts 2.png before 10.png, and the same whether or not numbers are filled up with zeros."""
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in re.split(r"([0-9]+)", name)]


def loose_pictures(folder: str | Path, left_out: LeftOut | None = None) -> FileSource | None:
    """The pictures that lie directly in a folder, without labels, by name with numbers as numbers; None without any.

    Sizes are part of the fingerprint: other samples often get the same names as those before. Of a folder that
    run_sample.sh wrote (it has sample.json) only the samples count, not the sheets and films of them.

    Args:
        left_out: told of the other files.
    """
    folder = Path(folder)
    with os.scandir(folder) as entries:  # which knows what are files at no cost
        inside = sorted((entry for entry in entries if entry.is_file()), key=lambda entry: entry.name)
    files = [file for file in inside if is_picture(file.name)]
    if (folder / "sample.json").is_file():
        files = [file for file in files if re.fullmatch(r"[0-9]+_[0-9]+\.png", file.name)]
    elif left_out is not None:
        for file in inside:
            if not is_picture(file.name):
                left_out.add_file(file.name)
    if not files:
        return None
    files.sort(key=lambda file: (natural(file.name), file.name))
    return FileSource(
        folder, [file.name for file in files], None, sizes=np.array([file.stat().st_size for file in files])
    )


PACKED = ((".parquet", "datasets"), (".arrow", "datasets"), (".tar", "wds"))  # read by other schemes


def open_folder(path: str, split: str | None, options: dict[str, str]) -> DataSource:
    """One folder per class, class numbers following the sorted folder names or the order of the `classes` file; or a
    folder of pictures, which have no labels."""
    root = expanded(path)
    if not root.is_dir():
        problem = "this is a file" if root.is_file() else "there is no such folder"
        raise UserError(
            f"folder://{path}: {problem}. Give the folder that holds one folder per class, or the pictures; "
            "lists are list://FILE with lines `relative/path.JPEG label`."
        )
    folders = _subfolders(root)
    if split is not None and split in folders:
        root, folders = root / split, _subfolders(root / split)
    elif split is not None and folders and set(folders) <= set(SPLITS):
        raise UserError(f'folder://{path} has no split "{split}".{nearest(split, folders)}')
    names = _class_names(options) or folders
    numbers = {name: i for i, name in enumerate(names)}
    if unknown := [name for name in folders if name not in numbers]:
        raise UserError(f'{root}: folder "{unknown[0]}" is not in {options["classes"]}.{nearest(unknown[0], names)}')
    paths, labels, left_out = [], [], LeftOut()
    for name in folders:
        pictures = _pictures_below(root, name, left_out)
        paths += pictures
        labels += [numbers[name]] * len(pictures)
        if not pictures:
            left_out.add("folder(s) without pictures", name)
    if (root / "__MACOSX").is_dir():
        left_out.add("folder(s) of a zip archive", "__MACOSX")
    beside = loose_pictures(root, left_out)
    if not paths and beside is None:
        raise UserError(
            f"{root} holds no pictures. Expected {', '.join(EXTENSIONS)} files in it, or in one folder per class."
            + next(
                (f" {kind} files are read by {scheme}://{root}" for kind, scheme in PACKED if kind in left_out.kinds),
                "",
            )
        )
    if paths and beside is not None:
        left_out.add("picture(s) beside the class folders", beside.key(0), len(beside))
    source = FileSource(root, paths, np.array(labels), names) if paths else beside
    source.left_out = left_out.describe()
    return source


def _parse_line(line: bytes, where: str) -> tuple[bytes, int | None]:
    """(path, label or None) of one line. A last word that is a number is the label; paths may contain spaces."""
    path, label = line, None
    words = line.rsplit(None, 1)
    if len(words) == 2 and re.fullmatch(rb"[+-]?[0-9]+", words[1]):
        path, text = words[0].rstrip(), words[1]
        if len(text) > 9 or not 0 <= (label := int(text)) < MAX_CLASSES:
            raise UserError(f"{where}: label {text[:20].decode()} is not between 0 and {MAX_CLASSES - 1}.")
    parts = path.split(b"/")
    if path.startswith(b"/") or b".." in parts or b"\0" in path:
        raise UserError(f"{where}: {os.fsdecode(path[:80])} must be a path relative to the root folder, without '..'.")
    return path, label


def open_list(path: str, split: str | None, options: dict[str, str]) -> DataSource:
    """Pictures named by the lines of a text file."""
    file = expanded(path)
    if not file.is_file():
        raise UserError(f"list://{path}: there is no such file. Expected lines `relative/path.JPEG label`.")
    refuse_text(file)
    root = expanded(options.get("root", file.parent))
    if not root.is_dir():
        raise UserError(f"list://{path}: the root folder {root} does not exist. Set ?root=DIR.")
    paths, labels, unlabelled = [], [], 0
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not (line := line.strip()):
            continue
        picture, label = _parse_line(line, f"{file} line {number}")
        paths.append(picture)
        labels.append(label)
        if label is None:
            unlabelled = unlabelled or number
    if not paths:
        raise UserError(f"{file} lists no pictures. Expected lines `relative/path.JPEG label`.")
    if unlabelled and any(label is not None for label in labels):
        raise UserError(f"{file} line {unlabelled} has no label but other lines have one. Label all lines or none.")
    # One missing file is for the loader to replace; many from the start mean another root.
    if not any(os.path.exists(root / os.fsdecode(picture)) for picture in paths[:100]):
        first = str(root / os.fsdecode(paths[0]))[:200]
        raise UserError(
            f"{file}: {first} does not exist, nor do the pictures after it. "
            + (
                "Labels follow a space, not a comma."
                if re.search(rb",\s*[0-9]+$", paths[-1])
                else "Set ?root=DIR to the folder that the paths start from."
            )
        )
    return FileSource(root, paths, None if unlabelled else np.array(labels), _class_names(options))


# ---------------------------------------------------------------------------------------------------------------------
# Shards, embedded sets, synthetic shapes
# ---------------------------------------------------------------------------------------------------------------------
def open_shards(path: str, split: str | None, options: dict[str, str]) -> DataSource:
    """Shards on a disk, or streamed from elsewhere."""
    if "://" in path:
        return open_remote_shards(path, options)
    for key in ("samples", "num_classes"):
        if key in options:
            raise UserError(f"wds://{path}: {key} is for streams; shards on a disk are counted. Leave it out.")
    shards = find_shards(path)
    source = ShardSource(shards, _class_names(options))
    if "{" not in path and (lost := absent(shards)):  # braces name every shard, and find_shards misses none of them
        source.left_out += (f"{len(lost)} shard(s) that the numbering lacks ({lost[0]}{', ...' if lost[1:] else ''})",)
    if (folder := expanded(path)).is_dir():
        left_out = LeftOut()
        for file in sorted(folder.iterdir()):
            if file.is_dir():
                left_out.add_folder(file.name)
            elif not file.name.endswith((".tar", ".tar.index.npz")):
                left_out.add_file(file.name)
        source.left_out += left_out.describe()
    return source


def open_embedded(path: str, split: str | None, options: dict[str, str]) -> DataSource:
    """One of the small sets that come with the repository; split "train" unless told."""
    sets = sorted(p.name.removesuffix(".classes.txt") for p in EMBEDDED.glob("*.classes.txt"))
    if path not in sets:
        raise UserError(f'embedded://{path}: there is no embedded set "{path}".{nearest(path, sets)}')
    split = split or "train"
    shard = EMBEDDED / f"{path}-{split}.tar"
    if not shard.is_file():
        splits = [p.stem.removeprefix(f"{path}-") for p in EMBEDDED.glob(f"{path}-*.tar")]
        raise UserError(f'embedded://{path} has no split "{split}".{nearest(split, splits)}')
    return ShardSource([shard], read_class_names(EMBEDDED / f"{path}.classes.txt"), keep_index=False)


class SyntheticSource(DataSource):
    """Coloured shapes on a plain background, drawn from (seed, index): class c is a shape and a hue of its own.

    Args:
        size: width and height.
        classes: number of classes.
        count: number of pictures.
        seed: another seed gives other pictures of the same classes.
    """

    SHAPES = ("disc", "square", "triangle", "ring")

    def __init__(self, size: int = 64, classes: int = 4, count: int = 256, seed: str = "0"):
        self.size, self.count, self.num_classes, self.seed = size, count, classes, seed
        self.class_names = [f"{self.SHAPES[c % 4]} {c}" for c in range(classes)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)

        def draw(name: str, low: float, high: float) -> float:
            return low + (high - low) * uniform_scalar("synthetic", self.seed, name, int(index))

        label = index % self.num_classes
        hue = label / self.num_classes + draw("hue", -0.1, 0.1) / self.num_classes
        colour = tuple(int(127.5 + 127.5 * math.cos(2 * math.pi * (hue + third / 3))) for third in range(3))
        image = Image.new("RGB", (self.size, self.size), (int(draw("background", 200, 255)),) * 3)
        radius = self.size * draw("radius", 0.2, 0.35)
        x, y = (self.size * draw(axis, 0.38, 0.62) for axis in "xy")
        box = (x - radius, y - radius, x + radius, y + radius)
        pen = ImageDraw.Draw(image)
        shape = self.SHAPES[label % 4]
        if shape == "disc":
            pen.ellipse(box, fill=colour)
        elif shape == "square":
            pen.rectangle(box, fill=colour)
        elif shape == "triangle":
            pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
        else:
            pen.ellipse(box, outline=colour, width=max(1, int(radius / 3)))
        return Sample(image, label, f"synthetic-{self.seed}-{index}")

    def fingerprint(self) -> str:
        description = f"synthetic 1 {self.size} {self.num_classes} {self.count} {self.seed}"
        return hashlib.blake2b(description.encode(), digest_size=16).hexdigest()


def open_synthetic(path: str, split: str | None, options: dict[str, str]) -> DataSource:
    """Splits hold different pictures of the same classes."""
    if path:
        raise UserError(f"synthetic://{path}: write synthetic://?size=64&classes=4&count=256.")
    limits = {"size": 4096, "classes": 10_000, "count": 10**8}
    numbers = {
        name: whole_number(options[name], name, limit, "synthetic://")
        for name, limit in limits.items()
        if name in options
    }
    suffix = "" if split in (None, "train") else f"-{split}"
    return SyntheticSource(**numbers, seed=options.get("seed", "0") + suffix)


SCHEMES = {
    "folder": (open_folder, ("classes",)),
    "list": (open_list, ("root", "classes")),
    "wds": (open_shards, ("classes", "samples", "num_classes")),
    "datasets": (
        open_datasets,
        ("name", "revision", "column", "label", "classes", "streaming", "samples", "num_classes"),
    ),
    "embedded": (open_embedded, ()),
    "synthetic": (open_synthetic, ("size", "classes", "count", "seed")),
    "tokens": (open_tokens, ()),
}
