"""What is done with a recipe, step by step, and the table of how each step ended."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import numpy
from PIL import Image

from tests.rehearsal.frozen import INCEPTION
from tests.rehearsal.house import Done, House
from tests.rehearsal.recipes import RUNS, Recipe

NETWORK = f"eval.network=pretrained_models/{INCEPTION}"
SHORT = ["train.duration=2step", "train.eval_every=never"]


@dataclasses.dataclass
class Row:
    recipe: str
    step: str
    command: str
    result: str
    seconds: float


class Rehearsal:
    """Runs steps in one house and remembers their results."""

    def __init__(self, house: House):
        self.house = house
        self.rows: list[Row] = []
        self._printed = 0
        self._made: dict[str, bool] = {}

    def run(self, recipe: str, step: str, command: str, *codes: int, direct: bool = False) -> Done:
        """One command as a row of the table; AssertionError unless it ends with one of `codes` (0)."""
        done = self.house.run(command, direct)
        good = done.code in (codes or (0,)) and "Traceback" not in done.output
        lines = [line for line in done.output.strip().splitlines() if line.strip()]
        result = "ok" if good else f"exit {done.code}: {lines[-1] if lines else ''}"
        self.rows.append(Row(recipe, step, command, result, done.seconds))
        return done.expect(*codes)

    def table(self) -> str:
        """Of everything that was run."""
        self._printed = 0
        return "\n".join([f"{'recipe':30} {'step':12} {'s':>5}  result", *self.lines()])

    def lines(self) -> list[str]:
        """The rows since the last call."""
        new, self._printed = self.rows[self._printed :], len(self.rows)
        return [
            f"{row.recipe:30} {row.step:12} {row.seconds:5.1f}  {row.result[:300]}   {_short(row.command)}"
            for row in new
        ]

    # -----------------------------------------------------------------------------------------------------------------
    # Steps
    # -----------------------------------------------------------------------------------------------------------------
    def need(self, run: str) -> None:
        """Make the run of ours that a recipe continues."""
        if run in self._made:
            assert self._made[run], f"the run {run}, which this recipe continues, could not be made"
            return
        self._made[run] = False
        name, command = RUNS[run]
        recipe = Recipe(name)
        for other in recipe.needs if command is None else [shlex.split(command)[2]]:
            self.need(other)
        self.run(recipe.name, "start", recipe.training(*SHORT, command=command))
        self._made[run] = True

    def start(self, recipe: Recipe) -> None:
        """Two steps by the documented command."""
        if any(name == recipe.name and command is None for name, command in RUNS.values()):
            self.need(recipe.run)
            return
        for run in recipe.needs:
            self.need(run)
        self.run(recipe.name, "start", recipe.training(*SHORT))
        assert [line["step"] for line in self.metrics(recipe.run)] == [1, 2]

    def chain(self, recipe: Recipe, direct: bool = False) -> None:
        """Train, stop, resume, then sample or reconstruct, evaluate, export and reload."""
        for run in recipe.needs:
            self.need(run)
        name = "chain_" + recipe.name.replace("/", "_")
        more = [f"name={name}", "train.duration=4step", "train.preview_every=4step", *self._few_steps(recipe)]
        if recipe.config["train"].get("eval_every"):
            more += ["train.eval_every=4step", "eval.num_images=4", "eval.batch=4", NETWORK]
        command = recipe.training(*more)
        self.run(recipe.name, "train, stop", f"{command} train.time_limit_minutes=0.0001", 75, direct=direct)
        before = [line["step"] for line in self.metrics(name)]
        assert before and before[-1] < 4, before
        self.run(recipe.name, "resume", command, direct=direct)
        assert [line["step"] for line in self.metrics(name) if "loss" in line or "ce" in line or len(line) > 2][-1] == 4
        assert list((self.house.folder / "work_dirs" / name / "samples").iterdir()), "no preview was written"
        show = self._sample if recipe.is_generator else self._reconstruct
        first = show(
            recipe, "sample" if recipe.is_generator else "reconstruct", f"work_dirs/{name}", f"out/{name}", direct
        )
        self._evaluate(recipe, name, direct)
        official = recipe.has_official_layout
        file, to = (f"out/{name}.pth", "--to official") if official else (f"out/{name}.safetensors", "")
        self.run(recipe.name, "export", f"python -m scripts.convert work_dirs/{name} {file} {to}", direct=direct)
        if official and recipe.untold:
            told, file = file, f"out/{name}.safetensors"
            self.run(
                recipe.name, "explain", f"python -m scripts.convert {told} {file} --set {recipe.untold}", direct=direct
            )
        again = show(recipe, "reload", file, f"out/{name}_again", direct)
        assert first.keys() == again.keys() and first
        for key in first:
            assert numpy.abs(first[key].astype(int) - again[key].astype(int)).max() <= 1, (
                f"{key} changed by export and reload"
            )
        assert len({picture.tobytes() for picture in first.values()}) > 1, "all pictures are the same"

    @staticmethod
    def _few_steps(recipe: Recipe) -> list[str]:
        """Of a diffusion sampler."""
        return ["sample.steps=4"] if "steps" in (recipe.config.get("sample") or {}) else []

    def _tokenizer(self, recipe: Recipe) -> str:
        """The weights of its tokenizer, as an option of sample.py would name them."""
        if recipe.words:
            return f"work_dirs/{recipe.words[0]}" if recipe.words[0] in RUNS else recipe.words[0]
        return str(recipe.config["tokenizer"]["weights"])

    def _sample(self, recipe: Recipe, step: str, weights: str, out: str, direct: bool) -> dict[str, numpy.ndarray]:
        words = f"--tokenizer {self._tokenizer(recipe)}" if weights.endswith((".pth", ".safetensors")) else ""
        sample = (
            [
                f"sample.{k}={json.dumps(v) if not isinstance(v, str) else v}"
                for k, v in (recipe.config.get("sample") or {}).items()
            ]
            if words
            else []
        )
        tokenizer = (
            [
                f"tokenizer.{k}={json.dumps(v) if not isinstance(v, str) else v}"
                for k, v in recipe.config["tokenizer"].items()
                if k != "weights"
            ]
            if words
            else []
        )
        settings = shlex.join([*tokenizer, *sample, *self._few_steps(recipe)])
        # seed and precision are in no official file
        self.run(
            recipe.name,
            step,
            f"bash run_sample.sh {weights} {words} --labels 0-3 --num 4 --seed 3 --out {out} "
            f"train.precision=fp32 {settings}",
            direct=direct,
        )
        return self._pictures(out)

    def _reconstruct(self, recipe: Recipe, step: str, weights: str, out: str, direct: bool) -> dict[str, numpy.ndarray]:
        size = [
            s.replace("tokenizer.image_size=", "--size ") for s in recipe.sizes if s.startswith("tokenizer.image_size")
        ]
        self.run(
            recipe.name,
            step,
            f"python -m scripts.reconstruct --weights {weights} --url folder://data/imagenet/val --num 4 "
            f"--out {out} {' '.join(size)}",
            direct=direct,
        )
        return self._pictures(out)

    def _evaluate(self, recipe: Recipe, name: str, direct: bool) -> None:
        program = "run_eval_generator.sh" if recipe.is_generator else "run_eval_tokenizer.sh"
        steps = " ".join(self._few_steps(recipe))
        self.run(
            recipe.name,
            "evaluate",
            f"bash {program} work_dirs/{name} --num 8 --out out/eval_{name} {NETWORK} {steps}",
            direct=direct,
        )
        text = (self.house.folder / "out" / f"eval_{name}" / "metrics.json").read_text()
        assert json.loads(text)["metrics"], text
        wanted = (recipe.config.get("eval") or {}).get("protocol")
        assert not wanted or f'"protocol": "{wanted}"' in text, text

    def measure_bare(self, file: str, words: str) -> None:
        """run_eval_generator.sh of a released file: it finds its tokenizer, guidance and protocol itself."""
        command = f"bash run_eval_generator.sh {file} --num 8 --out out/bare_{file} {NETWORK} eval.batch=4 {words}"
        done = self.house.run(command).expect()
        self.rows.append(Row(file, "evaluate", command, "ok", done.seconds))
        assert f"{file} as configs/" in done.output and "Published: FID-50K" in done.output, done.output
        assert json.loads((self.house.folder / "out" / f"bare_{file}" / "metrics.json").read_text())["metrics"]

    def metrics(self, run: str) -> list[dict]:
        path = self.house.folder / "work_dirs" / run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def _pictures(self, out: str) -> dict[str, numpy.ndarray]:
        files = sorted(p for p in (self.house.folder / out).glob("*.png") if p.stem != "grid")
        return {_numberless(p): numpy.asarray(Image.open(p)) for p in files}


def _numberless(path: Path) -> str:
    """Reconstructions have their PSNR in the name, which may round otherwise."""
    return path.stem.split("_psnr")[0]


def _short(command: str) -> str:
    """Without what makes it small."""
    return " ".join(word for word in shlex.split(command) if "=" not in word)
