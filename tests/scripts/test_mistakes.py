"""What a user gets wrong: exit code 2, one clear sentence, nothing damaged and nothing left lying about."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.files import read_json
from core.weights.pickles import load_pickle
from run.load import load_config
from run.reconstruct import read_files
from run.weights import Source
from tests.conftest import ROOT, TOY_GENERATOR, TOY_TOKENIZER


def contents(folder) -> dict[str, str]:
    """Every file below `folder` and its checksum."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def mistake(train_main, tmp_path):
    """mistake(config, *overrides) -> the message, after checking that nothing was made or changed in `tmp_path`."""

    def call(config, *overrides: object) -> str:
        common = [] if any(str(o).startswith("work_dir=") for o in overrides) else [f"work_dir={tmp_path / 'runs'}"]
        before = contents(tmp_path)
        code, _, err = train_main(
            config, "train.device=cpu", f"data.cache_dir={tmp_path / 'cache'}", *common, *overrides
        )
        assert code == 2, err
        assert err.startswith("error: ") and "Traceback" not in err
        assert len(err.splitlines()) == 1 or "mistake" in err or "another configuration" in err, err
        left = {k: v for k, v in contents(tmp_path).items() if not k.startswith("cache/latent_stats")}
        assert left == before
        return err

    return call


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.url=folder:///no/such/folder"], "/no/such/folder"),
        (["data.url=foldr:///tmp"], 'Did you mean "folder"?'),
        (["data.url=synthetic://?sise=3"], "sise"),
        (["data.val_url=folder:///no/such/folder", "train.eval_every=5step"], "/no/such/folder"),
        (["tokenizer.name=rectik"], 'unknown tokenizer "rectik". Did you mean "rectok"?'),
        (["discriminator.name=patch"], 'unknown discriminator "patch". Did you mean "patchgan"?'),
        (["train.global_batch"], "overrides look like train.global_batch=256"),
        (["train.duration=0step"], "is less than one step"),
        (["data.val_url=null", "train.eval_every=5step"], "give data.val_url"),
        (["train.init_from=/no/such/weights"], "/no/such/weights"),
        (["train.init_from=ftp://x/y"], 'unknown kind of address "ftp://"'),
        (["objective.weights.reconstructoin=1"], 'Did you mean "reconstruction"?'),
        (["discriminator=null"], "there is no discriminator"),
        (["tokenizer.patch_size=7"], "7"),
        (["tokenizer.encoder.heads=5"], "heads"),
    ],
)
def test_told_in_one_sentence(mistake, overrides, message):
    assert message in mistake(TOY_TOKENIZER, *overrides)


def test_wrong_key_in_yaml(mistake, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {TOY_TOKENIZER}\ntrain: {{globl_batch: 4}}\n")
    text = mistake(path)
    assert str(path) in text and 'train.globl_batch: unknown key. Did you mean "global_batch"?' in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(mistake):
    text = mistake(TOY_TOKENIZER, "train.device=cuda")
    assert "torch sees no CUDA device" in text and "train.device=cpu" in text


def test_latents_that_do_not_fit(mistake, tokenizer_run):
    text = mistake(TOY_GENERATOR, f"tokenizer.weights={tokenizer_run}", "generator.channels=16")
    assert "does not fit the latents" in text and "8 channels" in text and "16" in text


def test_weights_of_a_generator_as_tokenizer(mistake, generator_run):
    assert "holds a generator, a tokenizer was asked for" in mistake(
        TOY_GENERATOR, f"tokenizer.weights={generator_run}"
    )


def test_missing_weights(mistake):
    assert "no_such_run" in mistake(TOY_GENERATOR, "tokenizer.weights=no_such_run")


def test_half_a_weight_file(mistake, tokenizer_run, tmp_path):
    (whole,) = tokenizer_run.glob("checkpoints/step_00000020/tokenizer.safetensors")
    half = tmp_path / "half.safetensors"
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text = mistake(TOY_GENERATOR, f"tokenizer.weights={half}")
    assert str(half) in text


def test_run_folder_with_another_configuration(mistake, tokenizer_copy):
    text = mistake(TOY_TOKENIZER, f"work_dir={tokenizer_copy.parent}", "train.optimizer.lr=5e-4")
    assert "train.optimizer.lr: was 0.001, now 0.0005" in text and "name=..." in text


def test_a_run_that_failed_at_once_can_be_corrected(train_main, tmp_path):
    """The name of this loss is found wrong at the first step, when the run folder exists already."""
    arguments = [TOY_TOKENIZER, "train.device=cpu", f"work_dir={tmp_path}", "train.duration=2step"]
    code, _, err = train_main(*arguments, "objective.weights.reconstrution=1")
    assert code == 2 and 'Did you mean "reconstruction"?' in err
    assert train_main(*arguments)[0] == 0
    assert train_main(*arguments, "objective.weights.kl=1")[0] == 2  # now there is something to lose


def test_damaged_config_of_a_run(mistake, tokenizer_copy):
    (tokenizer_copy / "config.yaml").write_text("a: [")
    assert "config.yaml is damaged" in mistake(TOY_TOKENIZER, f"work_dir={tokenizer_copy.parent}")


def test_other_data_under_the_same_name(mistake, tokenizer_copy):
    text = mistake(
        TOY_TOKENIZER, f"work_dir={tokenizer_copy.parent}", "data.url=synthetic://?size=32&classes=4&count=40"
    )
    assert "data.url" in text


def test_work_dir_is_a_file(mistake, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in mistake(TOY_TOKENIZER, f"work_dir={tmp_path / 'file'}")


def test_check_flag_only_looks(train_main, tmp_path):
    assert train_main(TOY_TOKENIZER, f"work_dir={tmp_path}", "--check")[0] == 0
    assert train_main(TOY_TOKENIZER, f"work_dir={tmp_path}", "--check", "data.url=folder:///none")[0] == 2
    assert contents(tmp_path) == {}


def test_no_arguments_prints_usage(train_main):
    code, out, _ = train_main()
    assert code == 2 and out.startswith("usage:")


@pytest.mark.parametrize("name", ["0.png", "3.png"])
def test_a_broken_picture_is_replaced_and_named(train_main, tmp_path, name):
    """The first picture is also one that previews show."""
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / name).write_bytes(b"not a picture")
    arguments = [
        TOY_TOKENIZER,
        "train.device=cpu",
        f"work_dir={tmp_path}",
        f"data.url=folder://{folder.parent}",
        "data.val_url=null",
        "train.duration=2ep",
    ]
    code, out, err = train_main(*arguments, "data.max_corrupt=0.2")
    assert code == 0, err
    assert "unreadable pictures, for which the next one was taken: 1 (" in out and f"class/{name}: " in out
    code, _, err = train_main(*arguments, "name=careful")
    assert code == 2 and "cannot be read, more than data.max_corrupt=0.05 of them (class/" in err
    code, _, err = train_main(*arguments, "name=strict", "data.on_corrupt=raise")
    assert code == 2 and f"class/{name}" in err
    measured = [
        f"data.val_url=folder://{folder.parent}",
        "train.eval_every=1ep",
        "eval.network=lite0",
        "eval.num_images=8",
    ]
    code, out, err = train_main(*arguments, *measured, "name=measured", "eval.batch=4", "data.max_corrupt=0.2")
    assert code == 0 and out.count(f"warning: class/{name} of the pictures cannot be read and is replaced") == 2, (
        out + err
    )


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from scripts import train
from core import cli
cli.run(train.main)
"""


def limited(limit: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LIMITED, str(limit), TOY_TOKENIZER, "train.device=cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_no_space_for_checkpoints(tmp_path):
    """Files may not grow beyond 100 kB: logs fit, weights do not. Training goes on and the last save says why."""
    done = limited(100_000, f"work_dir={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert "was not saved" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    run = tmp_path / "toy_rectok_tokenizer"
    assert not list(run.glob("checkpoints/step_*")) and not list(run.glob("checkpoints/.tmp*"))
    assert "was not saved" in (run / "log.txt").read_text()


def test_no_space_at_all(tmp_path):
    """Not even the run folder's own files fit."""
    done = limited(10, f"work_dir={tmp_path}")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error: ")


def test_check_finds_networks_that_do_not_fit(train_main, tokenizer_run, generator_run):
    """What `scripts/launch.sh` asks before it starts ranks: weights of another network, sizes that differ."""
    common = [TOY_GENERATOR, "--check", "train.device=cpu"]
    assert train_main(*common, f"tokenizer.weights={tokenizer_run}")[0] == 0
    code, _, err = train_main(*common, f"tokenizer.weights={generator_run}")
    assert code == 2 and "holds a generator, a tokenizer was asked for" in err
    code, _, err = train_main(*common, f"tokenizer.weights={tokenizer_run}", "generator.channels=4")
    assert code == 2 and "generator.channels is 4, the tokenizer has 8" in err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--check"], "say which CONFIG"),
        (["--stage=pixels", TOY_TOKENIZER], '--stage "pixels" is not known'),
        (
            ["--stage=tokenizer", "--stage=var", TOY_TOKENIZER],
            "--stage=var: this program has --stage=tokenizer already",
        ),
    ],
)
def test_lines_without_a_config_or_with_two_stages(mistake, words, sentence):
    assert sentence in mistake(*words)


def test_latent_statistics_are_opened_by_the_check(mistake, tokenizer_run):
    absent = ("tokenizer.latent_stats=absent.safetensors", "--check")
    assert "absent.safetensors: no such file" in mistake(TOY_GENERATOR, f"tokenizer.weights={tokenizer_run}", *absent)


def test_a_pipe_is_not_waited_for(tmp_path):
    """Nobody writes into it, so a program that opened it would never end."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (
        lambda: next(read_files([str(pipe)])),
        lambda: read_json(pipe),
        lambda: load_pickle(pipe),
        lambda: Source(str(pipe)),
    ):
        with pytest.raises(UserError, match="neither a file nor a folder"):
            read()
    with pytest.raises(UserError, match="there is no config"):
        load_config(str(pipe), [])
