"""The commands of README.md and docs/*.md, and how each is run with tiny files.

Commands are run as they are written, in a house that has what they name (`FURNITURE`), with an option that stops before
the hours begin: RULES says which, and a command that no rule knows fails the test.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tests.rehearsal.frozen import INCEPTION

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
INDEX = "docs/index.md"
PLACEHOLDERS = {  # words in capitals stand for something of the reader's
    "FILE": "reAR-L.safetensors",  # of the one command that says so
    "CONFIG": "configs/fqgan/far_b_dual.yaml",
    "folder://...": "folder://data/imagenet/train",
    "MY_TOKENIZER_RUN": "imagenet-4096.pt",
    "TOKENIZER": "pretrained_models/RecTok_decft.pth",
    "GENERATOR": "pretrained_models/ditdhxl_epoch_0599.pth",
    "AUTOGUIDANCE": "pretrained_models/ditdhs_epoch_0029.pth",
    "CODE_PATH": "codes",
    "FOLDER": "data/tokens/imagenet",
    "DIR": "data/tokens/imagenet",
    "layouts/*.json": "layouts/vqgan.json",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """One logical line of a bash block."""

    document: str
    text: str


@dataclasses.dataclass(frozen=True)
class Rule:
    """How commands that match `pattern` (from their start) are run; `reason` where they are only asked for help.

    Attributes:
        refused: part of the sentence in which they end, where the house lacks what they need.
    """

    pattern: str
    append: str
    reason: str = ""
    slow: bool = False
    refused: str = ""


EXTENDING = "tests/run/test_extending.py registers and trains them"  # what only that page has
RULES = [
    Rule(r"bash run_reproduce\.sh .*--(dry-run|rehearse)", "--list", "minutes; tests/rehearsal/test_reproduce.py"),
    Rule(r"bash \S+ configs/my_", "--help", EXTENDING, refused="there is no config configs/my_"),
    Rule(r"bash \S+ .*my_(vae|maskgit)", "--help", EXTENDING),
    Rule(r".*--dry-run|.*--list", ""),
    Rule(r"bash run_train_\w+\.sh configs/toy/", "train.duration=2step", "toys run for real"),
    Rule(r"(TESSERA_DRIVER=\d+ )?bash run_(train_\w+|decoder_finetune_tokenizer|finetune_decoder)\.sh", "--check"),
    Rule(r"bash run_make_reference\.sh", f"--network pretrained_models/{INCEPTION} --check"),
    Rule(
        r"bash run_eval_generator\.sh .*eval\.reference=", "--check", refused="bash run_download.sh weights-inception"
    ),
    # no tiny file of this generator tells its heads
    Rule(r"bash run_(sample|eval_generator)\.sh configs/dar/", "--check generator.size.heads=1"),
    Rule(r"bash run_(sample|sweep|compare|pretokenize|eval_\w+|linear_probe)\.sh", "--check"),
    Rule(r"bash run_download\.sh", "--dry-run"),
    Rule(r"bash run_playground\.sh", "--help", "serves until it is stopped; tests/run/test_playground.py asks it"),
    Rule(r"bash run_(report|edit)\.sh", ""),
    Rule(r"bash run_reproduce\.sh", "--list", "hours; tests/rehearsal/test_reproduce.py runs it small"),
    Rule(r"bash run_publish\.sh", "--dry-run"),
    Rule(r"bash run_quickstart\.sh", "--help", "ten minutes; tests/run/test_quickstart.py runs the five with --smoke"),
    Rule(r"bash run_tests\.sh", "--help", "these are the tests"),
    Rule(r"bash run_gpu_check\.sh", "--help", "minutes on a GPU; tests/run/test_gpu_check.py rehearses it"),
    Rule(r"python -m scripts\.(convert|reconstruct|latent_stats)", ""),
    Rule(
        r"python -m scripts\.benchmark .*--against",
        "--help",
        "needs a checkout; tests/run/test_against.py has stand-ins",
    ),
    Rule(r"(OMP_NUM_THREADS=1 )?python -m scripts\.benchmark", "tiny", slow=True),
    Rule(r"python -m tests\.tools\.benchmark_loop", "--help", "tests/tools/test_benchmark_loop.py runs it small"),
    Rule(
        r"python -m tests\.tools\.known_answer",
        "--help",
        "needs OpenAI's own 2 GB of samples, statistics and FID's own network",
    ),
    Rule(
        r"python -m tests\.tools\.benchmark_evaluation",
        "--help",
        "compares speeds; tests/tools/test_benchmark_evaluation.py runs it small",
    ),
    Rule(r"python -m tests\.tools\.(edit_scores|adapt_emoji)", "--help", "minutes on the tiny models"),
    Rule(
        r"python -m tests\.tools\.torture", "--help", "kills for minutes; tests/core/train/test_resume.py runs it small"
    ),
    Rule(r"python -m tests\.(parity|rehearsal)", "--help", "tests themselves"),
    Rule(r"python -m pytest", "--version", "tests/run/test_extending.py adds what it names"),
    Rule(r"accelerate launch", "", "tests/scripts/test_launched_ranks.py"),
]


def rule(command: Command) -> Rule | None:
    return next((r for r in RULES if re.match(r.pattern, command.text)), None)


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def commands() -> list[Command]:
    """Logical lines of all bash blocks, of indented commands and of the table of docs/index.md, each text once."""
    found: dict[str, Command] = {}
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        indented = "\n".join(re.findall(r"^    ((?:bash|python|accelerate) .*)$", text, flags=re.M))
        cells = "\n".join(re.findall(r"\| `((?:bash|python) [^`|]*)` \|", text)) if document == INDEX else ""
        for block in [*blocks(document, "bash"), indented, cells]:
            names: dict[str, str] = {}
            for line in re.sub(r" *\\\n\s*", " ", block).splitlines():
                line = re.sub(r"(^|\s+)#.*", "", line).strip()
                if given := re.fullmatch(r"(\w+)=(\".*\"|\S+)", line):
                    names[given[1]] = given[2].strip('"')
                    continue
                for name, value in names.items():
                    line = line.replace(f"${name}", value)
                line = re.sub(r" +", " ", line)
                if line:
                    found.setdefault(line, Command(document, line))
    return list(found.values())


def placed(text: str) -> str:
    """A command with the reader's own words filled in."""
    for word, stands_for in PLACEHOLDERS.items():
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", stands_for, text)
    return text
