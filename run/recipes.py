"""Which published recipe makes a run, by the name of the run: for what is asked before that run is there.

A recipe names its run (`name:`), and its first comment is the command that trains it. A run that continues another one,
EXP, is called EXP_RECIPE; the comments of the recipes say with which words.
"""

from __future__ import annotations

import re
from pathlib import Path

from core.files import ROOT

# What the scripts that are given EXP run without a CONFIG.
CONTINUING = {
    "run_decoder_finetune_tokenizer.sh": "configs/rectok/decoder_finetune.yaml",
    "run_train_diffusion.sh": "configs/rectok/ditdh_xl.yaml",
    "run_train_var.sh": "configs/imagefolder/var_d17.yaml",
}
COMMAND = re.compile(r"^# +bash (run_\w+\.sh)((?: +[^\s(]+)*)", re.MULTILINE)


def recipe_of(run: str | Path) -> tuple[str, str] | None:
    """(recipe, command) that makes a run of this name in the usual place, work_dirs; None where no recipe says so.

    Args:
        run: its folder, as work_dirs/rectok_stage1_decoder_finetune.
    """
    if (run := Path(run)).parent.name != "work_dirs":
        return None
    continued = None
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        recipe, text = path.relative_to(ROOT).as_posix(), path.read_text()
        commands = [(script, words.split()) for script, words in COMMAND.findall(text)]
        named = re.search(r"^name: *(\S+)", text, re.MULTILINE)
        if named and named[1] == run.name:
            script, words = commands[0] if commands else (_program(text), [])
            continues = script in CONTINUING and words[:1] != [recipe]  # with EXP the run is called otherwise
            return recipe, _written(script, words if words and not continues else [recipe])
        for script, words in commands:
            if script in CONTINUING and words and not words[0].endswith(".yaml"):
                configs = [word for word in words if word.endswith(".yaml")]
                config = configs[0] if configs else CONTINUING[script]
                if f"{words[0]}_{Path(config).stem}" == run.name:
                    continued = config, _written(script, words)
    return continued


def _program(text: str) -> str:
    """Of a recipe without a command: of the toys."""
    return "run_train_tokenizer.sh" if re.search("^task: *tokenizer", text, re.MULTILINE) else "run_train_ar.sh"


def _written(script: str, words: list[str]) -> str:
    return " ".join(["bash", script, *words])
