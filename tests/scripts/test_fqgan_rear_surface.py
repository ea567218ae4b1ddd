"""What the original READMEs of FQGAN and reAR promise: their commands, flags and settings, on toy runs."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from core.errors import UserError
from scripts import convert, reconstruct
from tests.conftest import ROOT, finished_run

TOY = {
    name: str(ROOT / "configs" / "toy" / f"{name}.yaml")
    for name in ("fqgan_tokenizer", "far", "vqgan_plus_tokenizer", "rear")
}
PAIRS = {"fqgan": ("fqgan_tokenizer", "far"), "rear": ("vqgan_plus_tokenizer", "rear")}


# -- flags and settings -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, answer",
    [
        (["configs/fqgan/dual_ds16.yaml", "--vq-model", "VQ-8"], "--vq-model VQ-8 is written tokenizer.size=vq8."),
        (
            ["configs/fqgan/dual_ds16.yaml", "--disc-weight", "0.5"],
            "objective.weights.gan=0.5 objective.weights.discriminator=0.5",
        ),
        (
            ["configs/fqgan/dual_ds16.yaml", "--data-path", "DATA", "--with_clip_supervision"],
            "data.url=folder://DATA; --with_clip",
        ),
        (["configs/fqgan/far_b_dual.yaml", "--gpt-model", "FAR-L"], "generator.size=l"),
        (["configs/fqgan/far_b_dual.yaml", "--temperature", "0.9"], "sample.temperature=0.9"),
        (["configs/rear/rear_b.yaml", "--cached_path", "x.jsonl"], "--out x.jsonl"),
        (
            ["config=configs/rear_l.yaml", "experiment.output_dir=temp/rear_l"],
            "experiment.output_dir is written work_dir=temp name=rear_l",
        ),
        (
            ["configs/rear/rear_l.yaml", "training.max_train_steps=5"],
            "training.max_train_steps is written train.duration=5step.",
        ),
        (["configs/rear/rear_l.yaml", "model.generator.fnord=5"], "has no counterpart here."),
    ],
)
def test_old_words_are_translated(train_main, words, answer):
    code, _, err = train_main(*words)
    assert code == 2 and answer in err and len(err.splitlines()) == 1, err


def test_an_unknown_flag_is_answered_briefly(train_main):
    code, _, err = train_main(TOY["far"], "--zzzzz")
    assert code == 2 and err == "error: there is no option --zzzzz; settings are key=value.\n"


# -- the whole path ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=list(PAIRS))
def runs(request, tmp_path_factory):
    """(system, run of its toy tokenizer, configuration of its generator); do not change the run."""
    tokenizer, generator = PAIRS[request.param]
    return request.param, finished_run(tmp_path_factory, TOY[tokenizer]), TOY[generator]


@pytest.mark.slow
def test_tokenizer_tokens_generator_samples_metrics(runs, tmp_path, monkeypatch):
    from tests.scripts.test_dar_surface import program

    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    system, tokenizer, config = runs
    toy = [config, f"tokenizer.weights={tokenizer}"]
    common = [f"work_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache", "train.device=cpu"]
    foreign = ("official", tmp_path / "npy") if system == "fqgan" else ("jsonl", tmp_path / "tokens.jsonl")
    commands = [
        ("run_pretokenize.sh", *toy, "data.crop=ten", "--out", tmp_path / "codes", *common),
        ("run_pretokenize.sh", *toy, "--out", tmp_path / "codes", "--to", *foreign, *common),
        ("run_pretokenize.sh", *toy, "data.crop=ten", "--import", foreign[1], "--out", tmp_path / "again", *common),
        ("run_train_ar.sh", *toy, "name=run", "train.duration=2step", f"data.url=tokens://{tmp_path}/again", *common),
        ("run_sample.sh", tmp_path / "run", "--labels", "0,2", "--num", 2, "--out", tmp_path / "samples"),
        (
            "run_eval_generator.sh",
            tmp_path / "run",
            "data.pictures=synthetic://?size=32&classes=4&count=48",
            "--num",
            8,
            "--out",
            tmp_path / "scores",
            "train.device=cpu",
        ),
        ("run_eval_tokenizer.sh", tokenizer, "embedded://emoji64", "--num", 8, "--out", tmp_path / "reconstructions"),
    ]
    for command in commands:
        assert program(*command) == 0, command
    assert np.array_equal(np.load(tmp_path / "codes" / "codes.npy"), np.load(tmp_path / "again" / "codes.npy"))
    for folder in ("scores", "reconstructions"):
        assert json.loads((tmp_path / folder / "metrics.json").read_text())["metrics"]
    with pytest.raises(UserError, match="trained on stored tokens .*data.pictures=folder"):
        importlib.import_module("scripts.evaluate_generator").main(
            [str(tmp_path / "run"), "--num", "8", "--out", str(tmp_path / "none")]
        )
    assert (
        reconstruct.main(
            [
                "--weights",
                str(tokenizer),
                "--url",
                "embedded://emoji64",
                "--num",
                "2",
                "--out",
                str(tmp_path / "panels"),
            ]
        )
        == 0
    )


# -- files ------------------------------------------------------------------------------------------------------------
def test_export_says_what_its_layout_does_not(runs, tmp_path, capsys):
    system, tokenizer, _ = runs
    assert convert.main([str(tokenizer), str(tmp_path / "out.bin"), "--to", "official"]) == 0
    said = capsys.readouterr().out
    assert "What such a file does not say: " in said and "groups 4" in said
    if system == "rear":  # a bare file has room for one set
        assert ", averaged weights." in said and "lecam_means" in said
    assert convert.main(["--describe", str(tmp_path / "out.bin")]) == 0
    assert "not in the file: " in (said := capsys.readouterr().out) and "tokenizer.groups=..." in said
