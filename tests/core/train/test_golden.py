"""Golden traces: the losses of a few steps of every system's tokenizer and generator, as they were when written down."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from core.train.run import read_metrics
from tests.conftest import ROOT, finished_run

GOLDEN = Path(__file__).with_name("golden")
PAIRS = {
    "rectok_tokenizer": "rectok_generator",
    "fqgan_tokenizer": "far",
    "vqgan_plus_tokenizer": "rear",
    "dar_tokenizer": "dar_generator",
    "imagefolder_tokenizer": "imagefolder_var",
}  # in configs/toy
STEPS = 12
FIRST_WEIGHT = -0.0225168  # of trunc_normal_, in the torch that wrote the traces
CLOCKS = ("images_per_second", "peak_memory_gib", "mfu", "seconds")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name of a toy config -> the folder of its run, made once."""
    made = {}

    def run(name: str, *overrides: str):
        if name not in made:
            made[name] = finished_run(
                tmp_path_factory,
                str(ROOT / "configs" / "toy" / f"{name}.yaml"),
                f"train.duration={STEPS}step",
                *overrides,
            )
        return made[name]

    return run


def other_start_weights() -> bool:
    """torch.nn.init.trunc_normal_ drew other numbers in versions before the one that wrote the traces (2.8 did)."""
    weights = torch.nn.init.trunc_normal_(torch.empty(64), std=0.02, generator=torch.Generator().manual_seed(0))
    return float(weights[0]) != pytest.approx(FIRST_WEIGHT, abs=1e-6)


@pytest.mark.skipif(
    other_start_weights(), reason=f"torch {torch.__version__} starts networks from other random weights"
)
@pytest.mark.parametrize("name", [name for pair in PAIRS.items() for name in pair])
def test_golden_trace(runs, name):
    """fp32, one thread. Not bit for bit: matrix kernels are chosen by the kind of CPU, and differ in the order of their
    sums; and a code on the edge between two may then fall to the other side. A change beyond the tolerance is a change of
    the recipe. To accept it:

    TESSERA_WRITE_GOLDEN=1 python -m pytest tests/core/train/test_golden.py

    NAME.txt.2 is what another kind of processor gets where that happens; TESSERA_WRITE_GOLDEN=2 writes it.
    """
    tokenizer = {generator: tokenizer for tokenizer, generator in PAIRS.items()}.get(name)
    folder = runs(name) if tokenizer is None else runs(name, f"tokenizer.weights={runs(tokenizer)}")
    records = [{k: v for k, v in r.items() if k not in CLOCKS} for r in read_metrics(folder / "metrics.jsonl")]
    names = list(dict.fromkeys(key for r in records for key in r))
    paths = {"1": GOLDEN / f"{name}.txt", "2": GOLDEN / f"{name}.txt.2"}
    if written := os.environ.get("TESSERA_WRITE_GOLDEN"):
        lines = [" ".join(names)] + [" ".join(f"{r[n]:.7g}" if n in r else "-" for n in names) for r in records]
        paths[written].write_text("\n".join(lines) + "\n")
    differ = [difference(path.read_text(), names, records) for path in paths.values() if path.is_file()]
    assert "" in differ, differ


def difference(recorded: str, names: list[str], records: list[dict]) -> str:
    """Of a run to what was recorded; "" for none."""
    header, *lines = recorded.splitlines()
    if header.split() != names or not len(lines) == len(records) == STEPS:
        return f"{header.split()} in {len(lines)} steps, not {names} in {len(records)}"
    for line, record in zip(lines, records):
        for key, value in zip(names, line.split()):
            if (value == "-") != (key not in record):
                return f"{key} of step {record['step']} is there or not"
            if value != "-" and record[key] != pytest.approx(float(value), rel=1e-3, abs=1e-5):
                return f"{key} of step {record['step']} is {record[key]}, not {value}"
    return ""
