"""What tests/tools/torture.py interrupts: trainings of the five systems, and every other program, at toy size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.tools.arena import PERIODS, ROOT, Arena, Program, Runs

SYNTHETIC = "synthetic://?size=32&classes=4&count="
LITE = ["eval.network=lite0", "eval.batch=4"]
SHOWN = ["train.duration=12step", "train.preview_every=5step", "train.eval_every=7step", "eval.num_images=4", *LITE]
SYSTEMS: dict[str, tuple[str, list[str], str]] = {  # toy tokenizer, what differs from it, toy generator
    "rectok": ("rectok_tokenizer", [], "rectok_generator"),
    "fqgan": ("fqgan_tokenizer", [], "far"),
    "rear": ("vqgan_plus_tokenizer", ["tokenizer.name=maskgit_vqgan"], "rear"),
    "dar": ("dar_tokenizer", [], "dar_generator"),
    "imagefolder": ("imagefolder_tokenizer", ["objective.gan_start=3step"], "imagefolder_var"),
}


class Workshop:
    """Makes the jobs, in `folder`, and the runs that they need, once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._made: dict[str, Path] = {}

    def jobs(self, name: str) -> list[Runs]:
        """Of a system: training its tokenizer and its generator, with previews and evaluations. Of a program: itself."""
        if name in SYSTEMS:
            return [self._arena(name, "tokenizer", SHOWN), self._arena(name, "generator", SHOWN)]
        module, command = PROGRAMS[name]
        return [Program(self.folder / name, lambda out: command(self, out), module, name, name not in ALONE)]

    def _arena(self, system: str, kind: str, more: list[str]) -> Arena:
        tokenizer, changed, generator = SYSTEMS[system]
        if kind == "generator":
            tokenizer, changed = generator, [f"tokenizer.weights={self.made(system, 'tokenizer')}"]
        folder = self.folder / f"{system}_{kind}"
        return Arena(f"configs/toy/{tokenizer}.yaml", folder, [*PERIODS, *changed, *more], f"{system} {kind}")

    def made(self, system: str, kind: str) -> Path:
        """The folder of a finished training."""
        key = f"made_{system}_{kind}"
        if key not in self._made:
            arena = self._arena(system, kind, [])
            arena.folder = self.folder
            if arena.run(key):
                raise RuntimeError(f"{key} failed:\n{arena.tail(key)}")
            self._made[key] = self.folder / key
        return self._made[key]


def _sample(made: Workshop, out: Path) -> list[object]:
    generator = made.made("rectok", "generator")
    return [generator, "--labels", "0-3", "--num", 48, "--batch", 4, "--out", out / "samples", "--npz", out / "all.npz"]


def _reconstruct(made: Workshop, out: Path) -> list[object]:
    weights = made.made("imagefolder", "tokenizer")
    return ["--weights", weights, "--url", f"{SYNTHETIC}64", "--num", 64, "--stages", "--out", out / "panels"]


def _evaluate(made: Workshop, out: Path) -> list[object]:
    pictures = [made.made("fqgan", "tokenizer"), f"{SYNTHETIC}40&seed=val"]
    return [*pictures, *LITE, "--workers", 0, "--write", "png", "--out", out / "eval"]


def _evaluate_generator(made: Workshop, out: Path) -> list[object]:
    return [made.made("fqgan", "generator"), *LITE, "--num", 40, "--write", "npz", "--out", out / "eval"]


def _pretokenize(made: Workshop, out: Path) -> list[object]:
    config = ROOT / "configs" / "toy" / "far.yaml"
    weights = f"tokenizer.weights={made.made('fqgan', 'tokenizer')}"
    views = [f"data.url={SYNTHETIC}96", "data.crop=ten", "data.flip=false"]
    return [config, weights, *views, "train.device=cpu", "--batch", 8, "--out", out / "codes"]


def _make_reference(made: Workshop, out: Path) -> list[object]:
    how = ["--network", "lite0", "--batch", 8, "--workers", 0, "--keep-pictures", 8]
    return [f"{SYNTHETIC}96", out / "reference.npz", *how]


def _latents(made: Workshop, out: Path) -> list[object]:
    """Latents, and their statistics, which are made before the first step."""
    config = ROOT / "configs" / "toy" / "rectok_generator.yaml"
    weights = f"tokenizer.weights={made.made('rectok', 'tokenizer')}"
    data = [f"data.url={SYNTHETIC}192", "data.cache_latents=true", "data.crop=ten", f"data.cache_dir={out / 'cache'}"]
    train = ["train.duration=2step", "train.keep_checkpoints=1", "train.device=cpu", "train.preview_every=never"]
    return [config, weights, *data, *train, "name=run", f"work_dir={out}"]


def _latent_stats(made: Workshop, out: Path) -> list[object]:
    return [made.made("rectok", "tokenizer"), f"{SYNTHETIC}1024", "--num", 0, "--out", out / "stats.safetensors"]


def _linear_probe(made: Workshop, out: Path) -> list[object]:
    weights = made.made("fqgan", "tokenizer")
    return [weights, "embedded://emoji64", "--epochs", 3, "--num", 256, "--workers", 0, "--out", out / "probe"]


def _compare(made: Workshop, out: Path) -> list[object]:
    tokenizers = [made.made(system, "tokenizer") for system in ("fqgan", "rectok")]
    how = ["--data", f"{SYNTHETIC}40", "--workers", 0, "--seconds", 0, "--bootstrap", 2]
    return [*tokenizers, *how, *LITE, "--out", out / "compared"]


def _sweep(made: Workshop, out: Path) -> list[object]:
    grid = ["--scale", "1,2", "--num", 32, "--first", 16, "--bootstrap", 2]
    return [made.made("fqgan", "generator"), *grid, *LITE, "--out", out / "swept"]


def _edit(made: Workshop, out: Path) -> list[object]:
    from PIL import Image

    photo = made.folder / "photo.png"
    if not photo.exists():
        Image.linear_gradient("L").convert("RGB").save(photo)
    how = ["--outpaint", 0.25, "--labels", "0,1,2,3", "--num", 8, "--out", out / "edited.png"]
    return [made.made("fqgan", "generator"), photo, *how]


PROGRAMS: dict[str, tuple[str, Callable[[Workshop, Path], list[object]]]] = {
    "sample": ("sample", _sample),
    "reconstruct": ("reconstruct", _reconstruct),
    "evaluate": ("evaluate", _evaluate),
    "evaluate_generator": ("evaluate_generator", _evaluate_generator),
    "pretokenize": ("pretokenize", _pretokenize),
    "make_reference": ("make_reference", _make_reference),
    "latents": ("train", _latents),
    "latent_stats": ("latent_stats", _latent_stats),
    "linear_probe": ("linear_probe", _linear_probe),
    "convert": ("convert", lambda made, out: [made.made("dar", "tokenizer"), out / "file.safetensors"]),
    "compare": ("compare", _compare),
    "sweep": ("sweep", _sweep),
    "edit": ("edit", _edit),
    "quickstart": ("quickstart", lambda made, out: ["--from-scratch", "--smoke"]),
}
ALONE = ("reconstruct", "latent_stats", "convert", "edit", "quickstart")  # run on one rank
