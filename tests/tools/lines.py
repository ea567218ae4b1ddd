"""Random command lines of every program: python -m tests.tools.fuzz --lines 1000 [--seed 0] [--first 0] [--out FOLDER]

A line that works is changed one to three times: words left out, doubled or swapped, options of no program or nearly of this
one, values of another kind, keys of the config or nearly so, odd paths and odd words. It may end in two ways: with code 0, or
with code 2 and one sentence. A traceback, another code, a sentence that says nothing and a program that does not end are
findings. Most lines ask for --check or --dry-run where the program has it; the others work on toys.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from tests.tools import fuzz
from tests.tools.forked import start, warm_up

CONFIGS = fuzz.ROOT / "configs" / "toy"
SECONDS = {True: 10, False: 60}  # of processor time, by whether it was only asked; as in forked.start
LONGEST = 3000  # characters of a sentence; one mistake after the other may need many lines


@dataclass(frozen=True)
class Program:
    """A program with lines that work in the folder of `furnish`.

    Attributes:
        asks: words with which it answers without working.
        config: toy config whose keys it takes; "" for none.
        ends: its exit codes.
    """

    name: str
    lines: tuple[str, ...]
    asks: tuple[str, ...] = ()
    config: str = "far"
    ends: tuple[int, ...] = (0, 2)


TRAIN = ("--check", "--dry-run", "--check", "--help")
PROGRAMS = (
    Program(
        "scripts.train",
        ("CONFIGS/rectok_tokenizer.yaml", "CONFIGS/fqgan_tokenizer.yaml train.micro_batch=4 name=mine --gpus 2"),
        TRAIN,
        "fqgan_tokenizer",
    ),
    Program("scripts.train", ("CONFIGS/far.yaml", "CONFIGS/rear.yaml sample.scale=2.0 --gpu-gb 80"), TRAIN),
    Program("scripts.train", ("--stage=tokenizer CONFIGS/rectok_tokenizer.yaml seed=3",), TRAIN, "rectok_tokenizer"),
    Program(
        "scripts.train",
        ("--stage=decoder toy_rectok_tokenizer CONFIGS/rectok_tokenizer.yaml train.duration=1ep",),
        TRAIN,
        "rectok_tokenizer",
    ),
    Program(
        "scripts.train",
        (
            "--stage=diffusion toy_rectok_tokenizer CONFIGS/rectok_generator.yaml data.url=folder://pictures",
            "--stage=var toy_imagefolder_tokenizer CONFIGS/imagefolder_var.yaml --tflops 100",
        ),
        TRAIN,
        "rectok_generator",
    ),
    Program(
        "scripts.sample",
        (
            "work_dirs/toy_far --labels 0-2,3 --out samples --num 4 --batch 2 --scale 1.5",
            "CONFIGS/far.yaml --labels 1 --out samples/more --seed 3 sample.top_k=5 --npz samples.npz",
            "--weights work_dirs/toy_far --tokenizer work_dirs/toy_fqgan_tokenizer --labels 2 --out samples",
        ),
        ("--check", "--check", "--check", ""),
    ),
    Program(
        "scripts.evaluate",
        (
            "work_dirs/toy_fqgan_tokenizer pictures --num 4 --batch 2 eval.network=lite0",
            "--original pictures.npz --reconstructed pictures --workers 0 --size 32 eval.network=lite0",
            "work_dirs/toy_rectok_tokenizer folder://pictures --precision bf16 --write npz --out out eval.network=lite0",
        ),
        ("--check", "--check", ""),
        "fqgan_tokenizer",
    ),
    Program(
        "scripts.evaluate_generator",
        (
            "work_dirs/toy_far --num 4 eval.network=lite0 --out out eval.reference=reference.npz",
            "pictures.npz eval.network=lite0 eval.reference=reference.npz --bootstrap 2",
            "CONFIGS/far.yaml --weights work_dirs/toy_far eval.network=lite0 eval.labels=balanced",
        ),
        ("--check", "--check", ""),
    ),
    Program(
        "scripts.linear_probe",
        ("work_dirs/toy_fqgan_tokenizer embedded://emoji64 --epochs 1 --batch 8 --num 8 --lr 0.1 --schedule cosine",),
        ("--check", "--check", "--check"),
        "fqgan_tokenizer",
    ),
    Program(
        "scripts.make_reference",
        (
            "pictures made.npz --network lite0 --batch 2 --workers 0 --size 32 --for generation",
            "pictures.npz made.safetensors --network lite0 --num 4 --protocol adm --dtype float32",
        ),
        ("--check", "--check", ""),
        "",
    ),
    Program(
        "scripts.pretokenize",
        (
            "CONFIGS/far.yaml --out tokens data.url=folder://pictures --batch 2",
            "CONFIGS/rear.yaml data.url=pictures --to jsonl codes.jsonl --precision fp32 --verify",
        ),
        ("--check", "--check", ""),
    ),
    Program(
        "scripts.latent_stats",
        ("work_dirs/toy_rectok_tokenizer folder://pictures --num 4 --out made.safetensors",),
        config="rectok_tokenizer",
    ),
    Program(
        "scripts.reconstruct",
        (
            "--weights work_dirs/toy_fqgan_tokenizer pictures/a/0.png --out panels --gain 2.0",
            "--weights work_dirs/toy_dar_tokenizer --url folder://pictures --num 2 --stages",
        ),
        config="fqgan_tokenizer",
    ),
    Program(
        "scripts.convert",
        (
            "--describe work_dirs/toy_far far.safetensors",
            "work_dirs/toy_fqgan_tokenizer made.safetensors --weights ema",
            "far.safetensors made.pt --to official --force --set size.heads=2",
        ),
        config="",
        ends=(0, 1, 2),
    ),
    Program(
        "scripts.compare",
        (
            "work_dirs/toy_fqgan_tokenizer work_dirs/toy_rectok_tokenizer --data pictures --num 4 --seconds 0 "
            "--bootstrap 2 --workers 0 eval.network=lite0 --out out",
            "work_dirs/toy_far far.safetensors --num 4 --bootstrap 0 eval.network=lite0 eval.reference=reference.npz",
        ),
        ("--check", "--check", "--check", ""),
    ),
    Program(
        "scripts.sweep",
        (
            "work_dirs/toy_far --scale 1,2 --num 8 --first 4 --bootstrap 0 eval.network=lite0 --out out",
            "work_dirs/toy_far --top-k 1:3 --schedule constant,linear --by is --num 8 eval.network=lite0",
        ),
        ("--check", "--check", "--check", ""),
    ),
    Program(
        "scripts.edit",
        (
            "work_dirs/toy_far pictures/a/0.png --mask mask.png --label 1 --out edited.png",
            "work_dirs/toy_far pictures/b/1.png --outpaint 0.25 --labels 0,2 --num 2 --out edited.png --full",
        ),
    ),
    Program(
        "scripts.reproduce",
        ("rear --num 8 --out out", "evaluation dar --gpus 2"),
        ("--dry-run", "--list"),
        "",
        ends=(0, 1, 2),  # 1: rows that were not measured
    ),
    Program(
        "scripts.report",
        ("work_dirs/toy_far work_dirs/toy_fqgan_tokenizer --out page.html", "work_dirs/toy_far"),
        config="",
    ),
    Program(
        "scripts.publish",
        ("work_dirs/toy_far me/mine --licence mit --out published", "work_dirs/toy_dar_tokenizer me/mine --private"),
        ("--dry-run",),
        "",
    ),
    Program("scripts.download", ("rectok --all", "--list", "reAR-L.safetensors evaluation"), ("--dry-run",), ""),
    Program("scripts.quickstart", ("rectok far", "fqgan --quick"), config=""),
    Program(
        "scripts.benchmark",
        (
            "CONFIGS/far.yaml --what encode --batch 1,2 --repeats 1 --warmup 0 --device cpu",
            "CONFIGS/rectok_tokenizer.yaml --what decode --batch 1 --repeats 1 --warmup 0 --precision fp32",
        ),
    ),
)

# One word a line; \ stands for what Python makes of it.
ODD_VALUES = """
|0|-1|00|010|0x10|1e3|1e400|1_000|0.5|-0.0|nan|inf|1:30|yes|true|null|~|x|é|\t|a b|1,2|[1,2]|[|{|}|*a|&a b|!x|%|@|#|1 #2| #|'|"|-x|--
1step|3ep|99999999999999999999|a\\nb|\udcff|\u0663|${seed}|${x}|${oc.env:HOME}|!!python/object/apply:os.system [ls]
"""
ODD_PATHS = """
| |.|..|absent|absent/x.yaml|/dev/null|/dev/zero|/proc/self/mem|pipe|empty.yaml|empty.pt|folder.yaml|circle|dangling.npz|binary.yaml
list.yaml|binary.npz|binary.safetensors|pictures/a/0.png|pictures|empty|work_dirs|~|a\\nb.yaml|é.npz|\udcff.pt|name with blanks
pictures.npz/x|table.npz|far.safetensors|reference.npz
"""
ODD_WORDS = """
| |-|--|---|=|a=|=b|a==b|.=1|a.=1|.a=1|train.=1|train=1|train=|tokenizer=x|name=001|name=a #b|name=|name=..|name=a/b|name=é|name=1e3
seed=010|seed=1_0|data.url= #x|data=[]|generator.name=x|generator=|tokenizer.weights=|tokenizer.weights=absent|tokenizer.name=far|+a=1
++a=1|~a|--help=1|-h1|--check=1|--no-check|-c|-1|--1|-=|--=x|@file|@empty.yaml|\x7f
"""
SCHEMES = ("folder", "list", "wds", "tokens", "datasets", "embedded", "synthetic", "hf", "http", "x")
RESTS = ("", "absent", "pictures", "?size=-1", "a{0..3}.tar", "binary.npz")


def words_of(table: str) -> list[str]:
    """The words of one of the tables above."""
    return [word.replace("\\n", "\n") for line in table.strip("\n").splitlines() for word in line.split("|")]


VALUES = [*words_of(ODD_VALUES), "x" * 5000]
PATHS = [*words_of(ODD_PATHS), "x" * 300, *(f"{scheme}://{rest}" for scheme in SCHEMES for rest in RESTS)]
WORDS = [*words_of(ODD_WORDS), "a" * 100_000]


def furnish(folder: Path) -> None:
    """Toy runs, a few pictures and odd files."""
    from PIL import Image

    fuzz.make_tokenizers(folder)
    if not (folder / "work_dirs" / "toy_far").exists():
        toy = [f"{CONFIGS}/far.yaml", "train.duration=1step", "train.preview_every=never"]
        code, said = start("scripts.train", toy, folder, 60)
        assert code == 0, said
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for number, picture in enumerate(pictures):
        place = folder / "pictures" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place)
    Image.fromarray(np.uint8(255 * np.eye(32))).save(folder / "mask.png")
    np.savez(folder / "pictures.npz", arr_0=pictures)
    np.savez(folder / "table.npz", x=np.zeros((3, 3)))
    np.savez(folder / "reference.npz", mu=np.zeros(1280), sigma=np.eye(1280))
    for name, content in {
        "empty.yaml": b"",
        "empty.pt": b"",
        "list.yaml": b"- 1\n- 2\n",
        **{f"binary.{suffix}": bytes(range(256)) for suffix in ("yaml", "npz", "safetensors")},
    }.items():
        (folder / name).write_bytes(content)
    for name in ("empty", "folder.yaml", "name with blanks"):
        (folder / name).mkdir(exist_ok=True)
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    for name, target in (("circle", "circle"), ("dangling.npz", "nowhere")):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    code, said = start("scripts.convert", ["work_dirs/toy_far", "far.safetensors", "--force"], folder, 60)
    assert code == 0, said


class Lines:
    """Makes command line number N of a seed.

    Args:
        options: by the name of a program, the words that begin with -- in its help.
    """

    def __init__(self, options: dict[str, list[str]]):
        self.options = options
        self.keys = {
            program.config: fuzz.known_keys(yaml.safe_load((CONFIGS / f"{program.config}.yaml").read_text()))
            for program in PROGRAMS
            if program.config
        }
        changes: list[Callable] = [self.drop, self.double, self.swap, self.odd_path, self.odd_value, self.add_option]
        self.changes = [*changes, self.near_option, self.setting, self.setting, self.odd_word]

    def make(self, seed: int, number: int) -> tuple[Program, list[str]]:
        chance = random.Random(f"line {seed} {number}")
        program = chance.choice(PROGRAMS)
        words = shlex.split(chance.choice(program.lines).replace("CONFIGS", str(CONFIGS)))
        if program.asks and (word := chance.choice(program.asks)):
            words.insert(chance.randrange(len(words) + 1) if chance.random() < 0.2 else len(words), word)
        for _ in range(chance.choice((1, 1, 2, 3))):
            words = chance.choice(self.changes)(list(words), chance, program)
        if program.name == "scripts.quickstart":  # minutes, were it content
            words.append("--never")
        return program, words

    def drop(self, words: list[str], chance: random.Random, program: Program) -> list[str]:
        if words:
            del words[chance.randrange(len(words))]
        return words

    def double(self, words: list[str], chance: random.Random, program: Program) -> list[str]:
        return [*words, chance.choice(words)] if words else words

    def swap(self, words: list[str], chance: random.Random, program: Program) -> list[str]:
        chance.shuffle(words)
        return words

    def odd_path(self, words: list[str], chance: random.Random, program: Program) -> list[str]:
        """In place of a word or of what follows its equals sign."""
        if not words:
            return [chance.choice(PATHS)]
        at = chance.randrange(len(words))
        key, equals, _ = words[at].partition("=")
        words[at] = (key + equals if equals else "") + chance.choice(PATHS)
        return words

    def odd_value(self, words: list[str], chance: random.Random, program: Program) -> list[str]:
        """Of an option or a setting that is there."""
        places = [i for i, word in enumerate(words) if "=" in word or (i and words[i - 1].startswith("--"))]
        if places:
            at = chance.choice(places)
            key, equals, _ = words[at].partition("=")
            words[at] = (key + equals if equals else "") + chance.choice(VALUES)
        return words

    def add_option(self, words: list[str], chance: random.Random, program: Program) -> list[str]:
        return self._put(words, chance, program, chance.choice(self.options[program.name] or ["--x"]))

    def near_option(self, words: list[str], chance: random.Random, program: Program) -> list[str]:
        """Misspelt, or of another program."""
        if chance.random() < 0.4:
            others = sorted({option for options in self.options.values() for option in options})
            return self._put(words, chance, program, chance.choice(others))
        option = chance.choice(self.options[program.name] or ["--check"])
        at = chance.randrange(2, len(option))
        return self._put(words, chance, program, option[:at] + chance.choice(("", "-", "x", "_")) + option[at + 1 :])

    def _put(self, words: list[str], chance: random.Random, program: Program, option: str) -> list[str]:
        value = chance.choice((None, chance.choice(VALUES), chance.choice(VALUES), chance.choice(PATHS), "2"))
        added = [option] if value is None else [f"{option}={value}"] if chance.random() < 0.4 else [option, value]
        at = chance.randrange(len(words) + 1)
        return [*words[:at], *added, *words[at:]]

    def setting(self, words: list[str], chance: random.Random, program: Program) -> list[str]:
        key = chance.choice(self.keys[program.config]) if program.config else "train.duration"
        if chance.random() < 0.2:
            at = chance.randrange(len(key))
            key = key[:at] + chance.choice(("", ".", "x", key[at].upper())) + key[at + 1 :]
        return [*words, f"{key}={chance.choice(VALUES)}"]

    def odd_word(self, words: list[str], chance: random.Random, program: Program) -> list[str]:
        words.insert(chance.randrange(len(words) + 1), chance.choice(WORDS))
        return words


def verdict(program: Program, words: list[str], folder: Path) -> tuple[str, str]:
    """("refused" | "answered" | "ran" | a finding, what was printed)."""
    asked = any(word in ("--check", "--dry-run", "--help", "-h", "--list", "--describe") for word in words)
    code, said = start(program.name, words, folder, SECONDS[asked])
    if "Traceback (most recent call last)" in said:
        return "traceback", said
    if code == "hangs" and not asked and re.search(r"img/s  ETA [\d:]+\s*$", said):
        return "ran", said  # a word less may ask for 50,000 pictures, and it is on its way
    if code not in program.ends:
        return f"ended with {code}", said
    if code == 2:
        sentence = said.rpartition("error: ")[2].strip() if "error: " in said else ""
        if not re.search(r"\w{3}", sentence) and not said.startswith("usage: python -m scripts.train"):
            return "refused without a sentence", said
        quoted = max(map(len, words), default=0)
        return (
            ("refused at length", said) if len(sentence) > LONGEST + 4 * quoted else fuzz.refusal(f"error: {sentence}")
        )
    return ("answered" if asked else "ran"), said


def run(trials: fuzz.Trials, out: Path) -> None:
    """Try the lines; findings are printed as they come."""
    warm_up()
    folder = out / "here"
    folder.mkdir(exist_ok=True)
    os.environ["HOME"] = str(folder)
    os.environ["COLUMNS"] = "200"
    furnish(folder)
    helps = {program.name: start(program.name, ["--help"], folder, 10)[1] for program in PROGRAMS}
    lines = Lines({name: sorted(set(re.findall(r"--[a-z][\w-]*", said))) for name, said in helps.items()})
    kept = {path.name for path in folder.iterdir()}
    for number in trials.numbers():
        program, words = lines.make(trials.seed, number)
        words = [word for word in words if "\0" not in word]
        result, said = verdict(program, words, folder)
        line = " ".join(shlex.quote(word[:200]) for word in [program.name, *words])
        trials.note(number, ascii(line), result, ascii(said[-1500:]))
        for path in folder.iterdir():  # what a program made
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
