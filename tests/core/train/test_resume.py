"""A run that is interrupted, in whatever way, ends with the bits of one that was not.

The violent part is tests/tools/torture.py, run here with small counts (in full with the marker slow).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from core.errors import UserError
from core.signals import Stopped
from core.train.checkpoint import CheckpointStore
from core.train.run import differences, read_metrics, shared_settings
from core.train.trainer import Trainer
from run.load import load_config
from tests.conftest import TOY_GENERATOR, TOY_TOKENIZER, toy
from tests.tools import torture

EVERY_STEP = ["train.time_limit_minutes=1e-9"]  # over before the first step ends


@pytest.fixture
def arena(tmp_path) -> torture.Arena:
    return torture.Arena(TOY_TOKENIZER, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Real processes
# ---------------------------------------------------------------------------------------------------------------------
def test_kills(arena):
    score = torture.survive_kills(arena, 4, seed=3)
    assert score.full and score.total == 4, str(score)


def test_damaged_checkpoints(arena):
    score = torture.survive_mutations(arena, limit=3)
    assert score.full and score.total == 4, str(score)


@pytest.mark.slow
def test_every_damage(arena):
    score = torture.survive_mutations(arena)
    assert score.full and score.total > 30, str(score)


def test_layouts(arena):
    score = torture.compare_layouts(arena, [torture.LAYOUTS[2], torture.LAYOUTS[4]])
    assert score.full and score.total == 2, str(score)


@pytest.mark.slow
def test_every_layout(arena):
    score = torture.compare_layouts(arena)
    assert score.full and score.total == len(torture.LAYOUTS), str(score)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_stops_politely(arena, name):
    arena.overrides = [
        "train.device=cpu",
        "train.log_every=1step",
        "train.checkpoint_every=100000step",
        "train.duration=100000step",
    ]
    run = arena.folder / "stopped"
    process = arena.start("stopped")
    while not (run / "metrics.jsonl").is_file() and process.is_alive():
        time.sleep(0.002)
    seen = len(read_metrics(run / "metrics.jsonl"))
    os.kill(process.pid, getattr(signal, name))
    process.join(600)
    assert process.exitcode == 75, arena.tail("stopped")
    log = (run / "log.txt").read_text()
    assert f"received {name}" in log and "run the same command again to continue" in log
    (step,) = CheckpointStore(run / "checkpoints").steps()
    assert seen <= step < 100_000 and f"stopped at step {step} " in log  # far from the end and from a period
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == step


def test_resume_with_other_workers_and_ranks(arena):
    """Stop after some steps; continue with three workers; stop again; continue on two ranks with accumulation."""
    reference, name = "one_piece", "pieces"
    arena.overrides += torture.NO_GAN
    assert arena.run(reference) == 0
    assert arena.run(name, *EVERY_STEP) == 75
    assert arena.run(name, "data.workers=3", *EVERY_STEP) == 75
    assert arena.run(name, "data.workers=1", "train.checkpoint_every=1step") == 0
    found = torture.differences(*(torture.read_result(arena.folder / n) for n in (reference, name)))
    assert not found, found
    shutil.rmtree(arena.folder / name / "checkpoints" / "step_00000020")
    for path in sorted((arena.folder / name / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(path)  # back to an earlier step
    assert arena.run_ranks(name, 2, "train.micro_batch=2") == [0, 0], arena.tail(name)
    records = [torture.read_metrics(arena.folder / n) for n in (reference, name)]
    assert torture.worst_difference(*records) <= 1


# ---------------------------------------------------------------------------------------------------------------------
# In this process
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def run_toy(train_main, tmp_path):
    """run_toy(name, *overrides) -> (exit code, run folder, stderr) of the toy tokenizer with the periods of torture."""

    def call(name: str, *overrides: str) -> tuple[int, Path, str]:
        code, _, err = train_main(TOY_TOKENIZER, *torture.PERIODS, f"work_dir={tmp_path}", f"name={name}", *overrides)
        return code, tmp_path / name, err

    return call


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send ourselves a signal in the middle of the step after `step`."""
    original = Trainer.train_step

    def train_step(self, batch):
        if self.step == step:
            os.kill(os.getpid(), number)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def assert_equal(ours: Path, reference: Path) -> None:
    found = torture.differences(torture.read_result(reference), torture.read_result(ours))
    assert not found, found


def test_stop_and_resume_at_every_step(run_toy):
    code, reference, _ = run_toy("reference")
    assert code == 0
    codes = []
    while not codes or (codes[-1] == 75 and len(codes) < 30):
        code, run, _ = run_toy("stepwise", *EVERY_STEP)
        codes.append(code)
    assert codes == [75] * 19 + [0]
    assert "reached the time limit" in (run / "log.txt").read_text()
    assert_equal(run, reference)


@pytest.mark.parametrize("step", [0, 6, 7, 18])
def test_stop_within_one_step(monkeypatch, run_toy, step):
    _, reference, _ = run_toy("reference")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        code, run, _ = run_toy("stopped")
    assert code == 75 and CheckpointStore(run / "checkpoints").steps()[-1] == step + 1
    if (run / "metrics.jsonl").is_file():
        assert read_metrics(run / "metrics.jsonl")[-1]["step"] <= step + 1
    assert run_toy("stopped")[0] == 0
    assert_equal(run, reference)


def test_stop_in_the_last_step_is_no_stop(monkeypatch, run_toy):
    stop_at(monkeypatch, 19)
    assert run_toy("late")[0] == 0


def test_a_resumed_run_begins_with_the_evaluation_that_a_signal_stopped(build_trainer, tmp_path):
    """Of the step it belongs to, once, before anything is trained; also where that is stopped again, and after the last step."""
    begun: list[int] = []

    def start(stopped: int) -> tuple[int, Trainer]:
        """A run of four steps that is evaluated after each other one; a signal stops its evaluation number `stopped`."""
        trainer = build_trainer(
            TOY_TOKENIZER, "train.duration=4step", "train.eval_every=2step", "name=one", "train.checkpoint_every=never"
        )
        ended: list[int] = []

        def evaluate(task, network) -> dict[str, float]:
            begun.append(trainer.step)
            if len(ended) == stopped:
                os.kill(os.getpid(), signal.SIGTERM)
                raise Stopped("received SIGTERM")
            ended.append(trainer.step)
            return {"rfid": float(trainer.step)}

        trainer.evaluate = evaluate
        return trainer.fit(), trainer

    def evaluated() -> list[tuple[int, float]]:
        records = read_metrics(tmp_path / "one" / "metrics.jsonl")
        return [(record["step"], record["eval/rfid"]) for record in records if "eval/rfid" in record]

    for stopped, step, done, all_begun in (
        (0, 2, [], [2]),
        (0, 2, [], [2, 2]),  # again, as soon as the run has begun
        (1, 4, [(2, 2.0)], [2, 2, 2, 4]),
    ):
        code, trainer = start(stopped)
        assert (code, trainer.step, trainer.evaluation_due) == (75, step, True)
        assert begun == all_begun and evaluated() == done
    code, trainer = start(9)
    assert (code, trainer.step, trainer.evaluation_due) == (0, 4, False)
    assert begun == [2, 2, 2, 4, 4] and evaluated() == [(2, 2.0), (4, 4.0)]
    assert start(9)[0] == 0 and begun == [2, 2, 2, 4, 4]  # not owed a second time


def test_finished_run_does_nothing(run_toy):
    _, run, _ = run_toy("done")
    before = torture.read_result(run)
    code, _, _ = run_toy("done")
    assert code == 0 and torture.read_result(run) == before


def test_a_renamed_run_and_a_copy_go_on(run_toy, tmp_path):
    """The name says where a run lies and not what it computes."""
    _, reference, _ = run_toy("reference")
    assert run_toy("first", *EVERY_STEP)[0] == 75
    shutil.copytree(tmp_path / "first", tmp_path / "fork", symlinks=True)
    (tmp_path / "first").rename(tmp_path / "renamed")
    for name in ("renamed", "fork"):
        code, run, err = run_toy(name)
        assert code == 0 and "continuing from" in (run / "log.txt").read_text(), err
        assert_equal(run, reference)
        assert yaml.safe_load((run / "config.yaml").read_text())["name"] == name


@pytest.mark.parametrize("what", ["checkpoint", "preview"])
def test_a_folder_that_is_moved_under_its_run(monkeypatch, run_toy, tmp_path, what):
    """Ends it, whatever is written next, and the run goes on where it lies now."""
    original = Trainer.train_step

    def train_step(self, batch):
        if self.step == 4:
            self.store.wait()
            self.run.path.rename(tmp_path / "moved")
        return original(self, batch)

    periods = {"checkpoint": ["train.checkpoint_every=1step"], "preview": ["train.preview_every=1step"]}
    words = ["train.log_every=100step", *periods[what]]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        code, run, err = run_toy("here", *words)
    assert code == 2 and "here was moved or deleted while this run was at work in it. Put it back" in err
    assert not (run / "checkpoints").exists() and not (run / "log.txt").exists()
    assert run_toy("moved", *words)[0] == 0
    _, reference, _ = run_toy("reference", *words)
    assert_equal(tmp_path / "moved", reference)


def test_a_disk_of_checkpoints_that_is_not_mounted(run_toy, tmp_path):
    """The run does not begin anew."""
    assert run_toy("linked", *EVERY_STEP)[0] == 75
    checkpoints, disk = tmp_path / "linked" / "checkpoints", tmp_path / "disk"
    checkpoints.rename(disk)
    checkpoints.symlink_to(disk)
    assert run_toy("linked", *EVERY_STEP)[0] == 75 and len(CheckpointStore(disk).steps()) == 2
    disk.rename(tmp_path / "unmounted")
    before = (tmp_path / "linked" / "config.yaml").stat().st_mtime_ns
    code, run, err = run_toy("linked")
    assert code == 2 and f"checkpoints: a link to {disk}, which is not there. Mount the disk" in err
    assert (run / "config.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("config", "overrides", "told"),
    [
        (TOY_TOKENIZER, ["train.micro_batch=4"], "warning: 4 pictures are seen at once from here on, 8 were before"),
        (TOY_TOKENIZER, ["train.micro_batch=8"], ""),
        (TOY_TOKENIZER, ["train.micro_batch=4", *torture.NO_GAN], ""),
        (toy("fqgan_tokenizer"), ["train.micro_batch=4", *torture.NO_GAN], "warning: 4 pictures"),
    ],
)
def test_another_micro_batch_is_told_where_it_counts(build_trainer, config, overrides, told):
    words = [
        "name=same",
        "train.duration=1step",
        "train.preview_every=never",
        *(o for o in overrides if o in torture.NO_GAN),
    ]
    build_trainer(config, *words).fit()
    trainer = build_trainer(config, *words, *overrides)
    assert trainer.restore()
    said = (trainer.run.path / "log.txt").read_text()
    assert told in said if told else "seen at once" not in said


def test_longer_duration_continues(run_toy):
    assert run_toy("longer", "train.schedule.kind=constant", "train.duration=7step")[0] == 0
    code, run, _ = run_toy("longer", "train.schedule.kind=constant")
    assert code == 0 and "continuing from" in (run / "log.txt").read_text()
    _, reference, _ = run_toy("reference", "train.schedule.kind=constant")
    assert torture.read_result(run)["state step"] == 20
    unequal = [
        d for d in torture.differences(torture.read_result(reference), torture.read_result(run)) if "metrics" not in d
    ]
    assert not unequal, unequal  # the last log line of the short run is one more


def test_metrics_are_rewound(monkeypatch, run_toy):
    """Lines after the checkpoint, as a kill leaves them, and a line cut in the middle."""
    _, reference, _ = run_toy("reference")
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        _, run, _ = run_toy("stopped")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "total": 99.0}) + "\n" + '{"step": 15, "tot')
    assert run_toy("stopped")[0] == 0
    assert_equal(run, reference)


def test_damaged_metrics_do_not_stop_a_run(monkeypatch, run_toy):
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        _, run, _ = run_toy("stopped")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00\x00\xff\xfe\n[1]\n{}\n")
    assert run_toy("stopped")[0] == 0
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl")] == [3, 6, 9, 12, 15, 18, 20]


def test_other_data_is_refused(run_toy, tmp_path):
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    for number in range(10):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / f"{number}.png")
    arguments = ["data.url=folder://" + str(folder.parent), "data.val_url=null"]
    assert run_toy("shown", *arguments, "train.duration=4step")[0] == 0
    Image.new("RGB", (32, 32)).save(folder / "more.png")
    code, run, err = run_toy("shown", *arguments)
    assert code == 2 and "was trained on other data" in err
    (folder / "more.png").unlink()
    code, run, err = run_toy("shown", *arguments)
    assert code == 0 and CheckpointStore(run / "checkpoints").steps()[-1] == 20, err


def test_a_picture_that_was_replaced_is_noticed(build_trainer, tmp_path):
    """Names are the same and sizes are not; a checkpoint that does not tell sizes goes on."""
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    for number in range(100):  # more than those whose bytes are compared
        Image.new("RGB", (32, 32), (2 * number, 0, 0)).save(folder / f"{number:03}.png")
    url = f"data.url=folder://{folder.parent}"
    words = ["name=same", url, "data.val_url=null", "train.duration=1step", "train.preview_every=never"]
    build_trainer(TOY_TOKENIZER, *words).fit()
    assert build_trainer(TOY_TOKENIZER, *words).restore()
    Image.new("RGB", (40, 40)).save(folder / "001.png")
    trainer = build_trainer(TOY_TOKENIZER, *words)
    with pytest.raises(UserError, match="with the same names but other sizes"):
        trainer.restore()
    del trainer.provenance["data_sizes"]
    assert trainer.restore()


@pytest.mark.parametrize(
    ("key", "before", "now", "same"),
    [
        ("data.url", "folder://a", "folder://a/", True),
        ("data.url", "folder://a", "folder:///b/c", True),
        ("data.url", "a/b", "/c", True),
        ("data.url", "folder://a?exif=1", "folder://b?exif=1", True),
        ("data.url", "folder://a?exif=1", "folder://b", False),
        ("data.url", "folder://a", "list://a", False),
        ("data.url", "tokens://a", "tokens://a/", True),
        ("data.url", "tokens://a", "tokens://b", False),  # other codes of the same pictures
        ("data.url", "synthetic://?size=8", "synthetic://?size=9", False),
        ("data.pictures", None, "folder://a", False),
        ("tokenizer.weights", "hf://a/b/c.pt", "/d/c.pt", True),
        ("train.schedule.shape", "a", "a/", False),
    ],
)
def test_what_may_only_have_moved(key, before, now, same):
    section, name = key.split(".", 1)
    assert (not differences({section: {name: before}}, {section: {name: now}})) == same


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("data.cache_dir=/disk/of/this/node", True),
        ("data.workers=7", True),
        ("data.url=folder:///data/here", True),
        ("log.wandb=true", True),
        ("train.micro_batch=4", False),
        ("train.duration=3step", False),
        ("data.flip=false", False),
    ],
)
def test_what_ranks_have_to_agree_in(override, same):
    plain, other = (shared_settings(load_config(TOY_TOKENIZER, words)) for words in ([], [override]))
    assert (plain == other) == same


def test_data_that_moved_goes_on(run_toy, tmp_path):
    """What is the same by its fingerprint is the same, wherever it lies; what is not is refused by then."""
    for place in "ab":
        folder = tmp_path / place / "class"
        folder.mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / f"{number}.png")
    words = ["data.val_url=null"]
    assert run_toy("moved", *words, f"data.url=folder://{tmp_path}/a", "train.duration=4step")[0] == 0
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    Image.new("RGB", (40, 40)).save(tmp_path / "c" / "class" / "3.png")
    code, _, err = run_toy("moved", *words, f"data.url=folder://{tmp_path}/c", "train.duration=6step")
    assert code == 2 and "have the same names but are others" in err
    code, run, err = run_toy("moved", *words, f"data.url=folder://{tmp_path}/b/", "train.duration=6step")
    assert code == 0 and CheckpointStore(run / "checkpoints").steps()[-1] == 6, err


def test_the_latents_of_another_tokenizer_are_refused(build_trainer, tokenizer_run, tokenizer_copy):
    words = ["name=same", "train.duration=1step", "train.preview_every=never"]
    build_trainer(TOY_GENERATOR, f"tokenizer.weights={tokenizer_run}", *words).fit()
    trainer = build_trainer(TOY_GENERATOR, f"tokenizer.weights={tokenizer_copy}", *words)  # the same at another place
    assert trainer.restore()
    trainer.provenance |= {"tokenizer_fingerprint": "0" * 16, "tokenizer_encoding": "0" * 16}
    with pytest.raises(UserError, match="latents of another tokenizer .weights .*, now 0000"):
        trainer.restore()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "train.global_batch=4",
        "train.optimizer.lr=2e-3",
        "train.ema=[0.9]",
        "tokenizer.channels=4",
        "train.precision=bf16",
        "data.flip=false",
    ],
)
def test_another_recipe_is_refused(run_toy, override):
    assert run_toy("recipe", "train.duration=4step")[0] == 0
    code, _, err = run_toy("recipe", override)
    assert code == 2 and override.split("=")[0] in err and "holds a run with another configuration" in err


@pytest.mark.parametrize(
    "override",
    [
        "data.workers=0",
        "train.micro_batch=8",
        "train.log_every=2step",
        "train.keep_checkpoints=9",
        "sample.steps=7",
        "train.activation_checkpointing=true",
    ],
)
def test_how_and_where_may_change(run_toy, override):
    assert run_toy("recipe", "train.duration=4step")[0] == 0
    assert run_toy("recipe", "train.duration=5step", override)[0] == 0


def test_a_run_of_before_a_setting_existed_goes_on(run_toy):
    """What its configuration does not say is the default; another value is another recipe."""
    _, run, _ = run_toy("older", "train.duration=4step")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    del saved["train"]["trunk_lr"], saved["data"]["flip"]
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    code, _, err = run_toy("older", "train.duration=5step", "data.flip=false")
    assert code == 2 and "data.flip: was True, now False" in err
    assert run_toy("older", "train.duration=5step")[0] == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["trunk_lr"] == 1.0


def test_keep_and_milestones(run_toy):
    _, run, _ = run_toy(
        "kept", "train.keep_checkpoints=2", "train.checkpoint_every=2step", "train.milestone_every=8step"
    )
    store = CheckpointStore(run / "checkpoints")
    assert store.steps() == [8, 16, 18, 20]
    assert os.readlink(run / "checkpoints" / "latest") == "step_00000020"
