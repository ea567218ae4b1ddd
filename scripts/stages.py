"""What users of the original RecTok scripts type -> our arguments.

    run_train_tokenizer.sh [CONFIG]                       no argument: the published recipe
    run_decoder_finetune_tokenizer.sh EXP [CONFIG]        EXP: the tokenizer run to start from
    run_train_diffusion.sh EXP [CONFIG]                   EXP: the tokenizer run whose latents are modelled
    run_train_var.sh EXP [CONFIG]                         the same for VAR

EXP is the name of a run in work_dirs/ (ours, or work_dirs/tokenizer_training/EXP/checkpoints/*.pth of the original), the
name of a released file in pretrained_models/, a path or hf://owner/repo/file. A CONFIG is told by its suffix .yaml and
may stand first. Settings follow as key=value; a flag of the original programs is answered by run/translate.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError, nearest
from run.recipes import recipe_of


@dataclass(frozen=True)
class Stage:
    """One training script: the recipe it runs by default and the key that EXP sets."""

    config: str
    weights_key: str | None = None


STAGES = {
    "tokenizer": Stage("configs/rectok/tokenizer.yaml"),
    "decoder": Stage("configs/rectok/decoder_finetune.yaml", "train.init_from"),
    "diffusion": Stage("configs/rectok/ditdh_xl.yaml", "tokenizer.weights"),
    "var": Stage("configs/imagefolder/var_d17.yaml", "tokenizer.weights"),
}


def resolve(stage: str, words: list[str]) -> tuple[str, list[str]]:
    """(config, overrides) from what was typed behind a training script; the user's own settings come last and win."""
    settings = STAGES[stage]
    positional = [w for w in words if "=" not in w]
    configs = [w for w in positional if w.endswith((".yaml", ".yml"))]
    experiments = [w for w in positional if w not in configs]
    if len(configs) > 1 or len(experiments) > (settings.weights_key is not None):
        extra = (configs[1:] or experiments)[-1]
        wanted = "[CONFIG]" if settings.weights_key is None else "EXP [CONFIG]"
        raise UserError(f'"{extra}" is one word too many: give {wanted} and then key=value settings.')
    config = configs[0] if configs else settings.config
    overrides = [w for w in words if "=" in w]
    if not experiments:
        return config, overrides
    work_dir = next(
        (o.removeprefix("work_dir=") for o in reversed(overrides) if o.startswith("work_dir=")), "work_dirs"
    )
    name = Path(experiments[0].rstrip("/")).stem
    # Named after what it continues: two tokenizers give two runs, and neither resumes the other's.
    derived = [f"{settings.weights_key}={find_run(experiments[0], work_dir)}", f"name={name}_{Path(config).stem}"]
    return config, derived + overrides


def find_run(name: str, work_dir: str = "work_dirs") -> str:
    """What `core.weights.hub.resolve` understands, for the name of an experiment."""
    if "://" in name:
        return name
    theirs = Path(work_dir) / "tokenizer_training"  # the original's layout, and its README's place for released files
    for folder in (Path(work_dir) / name, theirs / name, Path(name)):
        if not folder.is_dir():
            continue
        files = sorted((folder / "checkpoints").glob("epoch_*.pth"))
        latest = folder / "checkpoints" / "latest.pth"
        if latest.is_file() or files:
            return str(latest if latest.is_file() else files[-1])
        return str(folder)
    if Path(name).exists() or (Path("pretrained_models") / name).exists():
        return name
    if recipe_of(Path("work_dirs") / name):  # --dry-run needs no run, and --check tells how to make it
        return str(Path(work_dir) / name)
    known = [
        p.name
        for place in (Path(work_dir), theirs, Path("pretrained_models"))
        if place.is_dir()
        for p in place.iterdir()
        if p.suffix != ".md"
    ]
    raise UserError(
        f'there is no run "{name}" in {work_dir}/ or {theirs}/ and no such file in pretrained_models/.'
        + nearest(name, known)
    )
