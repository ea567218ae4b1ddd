"""Configs: every file we ship is valid, and every mistake is told in words."""

from __future__ import annotations

import copy
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from core.config import check, load, read_overrides, to_plain, to_yaml
from core.errors import UserError
from core.registry import Registry
from core.schema import Duration
from run.check import schedule_notes
from run.load import REGISTRIES, build_teachers, load_config
from run.weights import constructor_arguments
from scripts import sample, train
from tests.conftest import ROOT, TOY_GENERATOR, TOY_TOKENIZER

CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "task:" in p.read_text() or "base:" in p.read_text())
IDS = [str(p.relative_to(ROOT / "configs")) for p in CONFIGS]


def problem(path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(str(path), list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_shipped_configs_are_valid(path):
    config = load_config(str(path), [])
    again = check(yaml.safe_load(to_yaml(config)), REGISTRIES, "dump")
    assert to_plain(again) == to_plain(config)


def test_configs_were_found():
    assert len(CONFIGS) >= 6


@pytest.mark.parametrize(
    "text, images",
    [
        ("2ep", 2000),
        ("0.5ep", 496),
        ("3step", 24),
        ("3steps", 24),
        ("16img", 16),
        ("1.6kimg", 1600),
        ("0.001Mimg", 1000),
        ("never", 0),
        ("0ep", 0),
        ("12img", 16),
        ("11img", 8),
        (" 2 ep ", 2000),
    ],
)
def test_durations(text, images):
    assert Duration.parse(text).images(images_per_epoch=1000, global_batch=8) == images


@pytest.mark.parametrize("text", ["", "5", "ep", "-1ep", "5 epochs", "1e3step", 5, None, True, ["1ep"]])
def test_malformed_durations(text):
    with pytest.raises(ValueError, match="a duration such as"):
        Duration.parse(text)


def test_overrides():
    config = load_config(
        TOY_TOKENIZER,
        [
            "train.global_batch=16",
            "train.ema=[0.5]",
            "tokenizer.encoder.width=48",
            "discriminator=null",
            "train.optimizer.lr=1e-4",
            "name=x",
        ],
    )
    assert (config.train.global_batch, config.train.ema, config.name) == (16, [0.5], "x")
    assert config.tokenizer["encoder"] == {"width": 48, "layers": 1, "heads": 2}
    assert config.discriminator is None and config.train.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.global_batsh=8", 'train.global_batsh: unknown key. Did you mean "global_batch"?'),
        ("trane.seed=1", 'trane: unknown key. Did you mean "train"?'),
        ("train.global_batch=eight", "train.global_batch: expected a whole number, got 'eight'"),
        ("train.global_batch=0", "train.global_batch: must be at least 1, got 0"),
        ("train.global_batch=" + "9" * 400, "train.global_batch: must be a number of less than 20 digits"),
        ("train.optimizer.lr=.nan", "train.optimizer.lr: must be a finite number"),
        ("train.duration=20", "train.duration: expected a duration such as"),
        ("train.precision=fp23", 'train.precision: expected "fp32" or "bf16", got \'fp23\'. Did you mean "fp32"?'),
        ("tokenizer.name=rectokk", 'unknown tokenizer "rectokk". Did you mean "rectok"?'),
        ("tokenizer.patch_sise=8", 'tokenizer "rectok" has no such setting. Did you mean "patch_size"?'),
        ("tokenizer.patch_size=big", "tokenizer.patch_size: expected a whole number"),
        ("train.optimizer.base_lr=1e-3", "give exactly one of lr and base_lr"),
        ("train.micro_batch=-3", "train.micro_batch: must be at least 0, got -3"),
        ("train.ema=[1.0]", "train.ema: decays lie in [0, 1)"),
        ("name=a/b", "becomes a folder name"),
        ("objective=null", "objective: is missing"),
        ("train=fast", "train: expected a table of keys, got 'fast'"),
    ],
)
def test_mistakes_are_named(override, message):
    assert message in problem(TOY_TOKENIZER, override)


def test_all_mistakes_at_once():
    text = problem(TOY_TOKENIZER, "seed=-1", "train.duration=x", "data.flip=maybe")
    assert "3 mistakes" in text and all(key in text for key in ("seed:", "train.duration:", "data.flip:"))


@pytest.mark.parametrize("override", ["train.global_batch", "--train.global_batch=8", "-x=1"])
def test_malformed_overrides(override):
    assert "overrides look like train.global_batch=256" in problem(TOY_TOKENIZER, override)


@pytest.mark.parametrize(
    "override",
    [
        "train.ema=[0.5",
        "=3",
        "a.=1",
        "train.ema={x",
        "name=${nothing}",
        "name=${a:b}",
        "train.ema.0.1=3",
        "data.url.x=1",
    ],
)
def test_odd_overrides(override):
    assert problem(TOY_TOKENIZER, override)


def test_overrides_take_back_what_a_config_names():
    """A teacher by false, and the arguments of a class by the name of another one."""
    published = str(ROOT / "configs" / "fqgan" / "dual_ds16.yaml")
    config = load_config(published, ["discriminator.name=stylegan", "teachers.clip=false", "teachers.dinov2={}"])
    assert config.discriminator == {"name": "stylegan"} and list(config.teachers) == ["dinov2"]
    assert load_config(published, []).discriminator == {"name": "patchgan", "init": "normal"}
    with pytest.raises(UserError, match='discriminator "stylegan" has no such setting'):
        load_config(published, ["discriminator.name=stylegan", "discriminator.init=normal"])


def test_missing_keys_are_named(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("name: x\n")
    text = problem(path)
    for key in ("task", "tokenizer", "data.url", "train.duration", "train.global_batch"):
        assert f"{key}: is missing" in text


def test_base_chain(tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "middle.yaml").write_text(f"base: {TOY_TOKENIZER}\nseed: 5\ntrain: {{ema: [0.5]}}\n")
    (tmp_path / "top.yaml").write_text("base: deeper/middle.yaml\nname: top\ntrain: {global_batch: 4}\n")
    config = load_config(str(tmp_path / "top.yaml"), ["seed=6"])
    assert (config.name, config.seed, config.train.ema, config.train.global_batch) == ("top", 6, [0.5], 4)
    assert config.train.duration == "20step"


@pytest.mark.parametrize(
    "text, message",
    [
        ("base: me.yaml\n", "is its own base"),
        ("base: gone.yaml\n", "there is no config"),
        ("base: [a]\n", "base should name another YAML file"),
        ("a: [\n", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("- 1\n", "a table of keys"),
        ("", "mistakes|table of keys"),
        ("1: x\n", "unknown key"),
    ],
)
def test_broken_files(tmp_path, text, message):
    (tmp_path / "me.yaml").write_text(text)
    assert re.search(message, problem(tmp_path / "me.yaml"))


def test_missing_config_names_the_nearest():
    assert 'rectok_tokenizer.yaml"?' in problem(ROOT / "configs" / "toy" / "rectok_tokeniser.yaml")
    assert "there is no config" in problem(ROOT / "configs")


class _Shape:
    def __init__(self, width: int, ratio: float = 4.0, taps: list[int] | None = None, kind: str = "a"):
        pass


def test_components_are_checked_against_signatures(monkeypatch):
    shapes = Registry("shape", {"square": "tests.core.test_config:_Shape", "round": "tests.core.test_config:_Shape"})
    registries = {**REGISTRIES, "tokenizer": shapes}
    path = TOY_TOKENIZER
    base = yaml.safe_load(Path(path).read_text())

    def verdict(**section) -> str:
        try:
            check({**base, "tokenizer": section}, registries, "x")
        except UserError as error:
            return str(error)
        return ""

    assert verdict(name="square", width=3, ratio=2, taps=[1]) == ""
    assert verdict(name="square", width=3, taps=None) == ""
    assert "tokenizer.ratio: expected a number, got 'x'" in verdict(name="square", ratio="x")
    assert "tokenizer.taps: expected a list" in verdict(name="square", taps="x")
    assert "tokenizer.weights: expected a text, got 3" in verdict(name="square", weights=3)
    assert "tokenizer: needs a name" in verdict(width=3)
    assert 'unknown shape "sqare". Did you mean "square"?' in verdict(name="sqare")
    assert "tokenizer: needs a name" in verdict()


# ---------------------------------------------------------------------------------------------------------------------
# Fuzz
# ---------------------------------------------------------------------------------------------------------------------
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
STRANGE = [
    None,
    True,
    -1,
    0,
    -0.5,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1ep",
    "${seed}",
    "${gone}",
    "é",
    [],
    [1, "a"],
    [[]],
    {},
    {"name": "x"},
    {"a": {"b": 1}},
    {1: 2},
    "0" * 400,
]


def places(tree, path=()):
    """Every (parent, key) of nested tables."""
    for key, value in tree.items():
        yield tree, key
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def edit(tree: dict, rng: random.Random) -> str:
    """One random mistake in place; what it was."""
    parent, key = rng.choice(list(places(tree)))
    kind = rng.choice(["typo", "strange", "strange", "remove", "add", "key"])
    if kind == "typo":
        text = str(key)
        at = rng.randrange(len(text))
        parent[text[:at] + rng.choice("xyz_é ") + text[at + 1 :]] = parent.pop(key)
    elif kind == "strange":
        parent[key] = copy.deepcopy(rng.choice(STRANGE))
    elif kind == "remove":
        del parent[key]
    elif kind == "add":
        parent[rng.choice(["extra", "name", "weights", "base", "lr", "kind"])] = copy.deepcopy(rng.choice(STRANGE))
    else:
        parent[rng.choice([3, None, True, 1.5])] = parent.pop(key)
    return f"{kind} {key}"


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_fuzz(path, tmp_path):
    """Any edit of a config is accepted or explained, never a traceback."""
    rng = random.Random(str(path.name))
    original = yaml.safe_load(path.read_text())
    edits, share = 200, 0.5
    if "base" in original:  # short, and its base has its own turn
        original["base"], edits, share = str(path.parent / original["base"]), 40, 0.35
    caught = 0
    for number in range(edits):
        tree = copy.deepcopy(original)
        what = [edit(tree, rng) for _ in range(rng.choice([1, 1, 2]))]
        edited = tmp_path / "edited.yaml"
        edited.write_text(yaml.dump(tree, Dumper=DUMPER, allow_unicode=True), encoding="utf-8")
        try:
            to_plain(load(str(edited), [], REGISTRIES))
        except UserError as error:
            caught += 1
            assert str(error).strip() and "Traceback" not in str(error)
        except Exception as error:
            pytest.fail(f"edit {number} ({what}): {type(error).__name__}: {error}\n{edited.read_text()}")
    assert caught > share * edits


# ---------------------------------------------------------------------------------------------------------------------
# Help
# ---------------------------------------------------------------------------------------------------------------------
def test_help_is_quick_and_complete():
    code = (
        "import sys; from scripts import train; code = train.main(['--help'])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    for word in ("usage:", "train.global_batch", "train.optimizer.lr", "required", "exit codes"):
        assert word.lower() in done.stdout.lower()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_generator_config_needs_no_weights_to_load():
    assert load_config(TOY_GENERATOR, []).generator["name"] == "dit_dh"


@pytest.mark.parametrize("section", [{"weights": "work_dirs/mine"}, {"name": "rectok", "weights": "work_dirs/mine"}])
def test_weights_of_a_tokenizer_that_is_trained(section):
    """They would be left out in silence, or leave nothing to build from."""
    plain = {**yaml.safe_load(Path(TOY_TOKENIZER).read_text()), "tokenizer": section}
    with pytest.raises(UserError, match="train.init_from, not as tokenizer.weights"):
        check(plain, REGISTRIES, "mine.yaml")


@pytest.mark.parametrize(
    "config, lines",
    [
        (
            TOY_TOKENIZER,
            [
                "  tokenizer.encoder.layers           (a whole number between 1 and 256) [required]",
                "  objective.lecam                    weight of LeCAM (Tseng et al. 2021) inside the discriminator's loss: its "
                "logits stay near running means (a number at least 0) [0.0]",
                "  discriminator.",
            ],
        ),
        (TOY_GENERATOR, ["  generator.label_drop", "(a number between 0 and 1) [0.1]", "  tokenizer.weights"]),
        (
            "configs/fqgan/far_b_dual.yaml",
            ["  generator.token_dropout", "at least 0 and less than 1", "generator.size.layers"],
        ),
    ],
)
def test_help_of_a_config_lists_the_settings_of_its_parts(capsys, config, lines):
    assert train.main([config, "--help"]) == 0
    said = capsys.readouterr().out
    for line in ["  train.global_batch", *lines]:
        assert line in said
    with pytest.raises(SystemExit) as stopped:
        sample.main([config, "generator.name=rar", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "--labels" in said and "  generator.attention_dropout" in said


@pytest.mark.parametrize(
    "wrong, advice",
    [
        ("generator.codebook_size=4", "vocab"),
        ("generator.n_layer=4", "generator.size.layers"),
        ("generator.dim=4", "generator.size.width"),
        ("generator.class_dropout_prob=0.1", "label_drop"),
        ("batch_size=4", "train.global_batch"),
        ("train.learning_rate=4", "train.optimizer.lr"),
        ("train.epochs=4", "duration"),
        ("data.num_workers=4", "workers"),
        ("sample.cfg_scale=4", "scale"),
        ("train.globl_batch=4", "global_batch"),
    ],
)
def test_words_of_other_codebases_are_understood(wrong, advice):
    with pytest.raises(UserError, match=f'Did you mean "{re.escape(advice)}"'):
        load_config(str(ROOT / "configs" / "toy" / "far.yaml"), [wrong])


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ("generator.label_drop=2.0", "generator.label_drop: must be between 0 and 1, got 2.0"),
        ("generator.token_dropout=-1", "generator.token_dropout: must be at least 0 and less than 1, got -1.0"),
        ("generator.size={width: 32, layers: 0, heads: 2}", "layers: must be between 1 and 256, got 0"),
        ("generator.size={width: 32, layers: -1, heads: 2}", "layers: must be between 1 and 256, got -1"),
        ("generator.size={width: 32, layers: 1000000000, heads: 2}", "layers: must be between 1 and 256"),
        ("generator.rear={weight: -1}", "weight: must be at least 0, got -1.0"),
        ("tokenizer.use_ema=maybe", "tokenizer.use_ema: expected true or false, got 'maybe'"),
    ],
)
def test_values_that_nothing_can_use_are_refused(wrong, sentence):
    """At loading, or where the table is read."""
    config = str(ROOT / "configs" / "toy" / "far.yaml")
    with pytest.raises(UserError, match=re.escape(sentence)):
        REGISTRIES["generator"].build(constructor_arguments(load_config(config, [wrong]).generator))


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ("seed=010", "seed: YAML reads 010 as an octal number; write 10 for the number, '010' in quotes for a text"),
        ("name=001", "name: YAML reads 001 as an octal number"),
        ("train.micro_batch=1:30", "train.micro_batch: YAML reads 1:30 as a number to the base 60"),
        ("data.scale=[00.5,0_1]", "data.scale: YAML reads 0_1 as an octal number"),
        ("name=a #b", "takes what follows the # in 'a #b' for a comment"),
        ("data.url=folder://a\t#b", "for a comment; write it in quotes"),
        ("name=1e3", "expected a text, got 1000.0. Quotes make a text of it"),
        ("data.scale=[1.0,0.8]", "data.scale: expected [low, high], got [1.0, 0.8]"),
        ("data.scale=[-1,0.8]", "data.scale: must be between 0.001 and 1"),
        ("sample.interval=[0.8,0.2]", "sample.interval: expected [low, high]"),
        ("sample.interval=[0.2,2]", "sample.interval: must be between 0 and 1"),
    ],
)
def test_what_yaml_would_read_as_something_else(wrong, sentence):
    assert sentence in problem(ROOT / "configs" / "toy" / "far.yaml", wrong)


@pytest.mark.parametrize(
    "right", ["seed=10", "name='001'", "seed=0", "seed=0x10", "name=\"'a #b'\"", "train.optimizer.lr=0.1", "name=a#b"]
)
def test_what_yaml_reads_as_it_stands(right):
    load_config(str(ROOT / "configs" / "toy" / "far.yaml"), [right])


def test_octal_numbers_in_a_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(f"base: {ROOT}/configs/toy/far.yaml\nseed: 010\n")
    assert "x.yaml: seed: YAML reads 010 as an octal number" in problem(path)


def test_a_warm_up_longer_than_a_trial_is_told(tmp_path):
    """The recipe's own warm-up, of 5 steps, in a run that the command line makes short."""
    (note,) = schedule_notes(load_config(TOY_TOKENIZER, ["train.duration=4step"]), 48)
    assert note == (
        "train.schedule.warmup=5step ends after the run of 4step: the learning rate comes to 80 % of its peak"
    )
    for duration in ("5step", "2ep"):
        assert not schedule_notes(load_config(TOY_TOKENIZER, [f"train.duration={duration}"]), 48)


@pytest.mark.parametrize(
    "schedule, said",
    [
        ({"warmup": "9step"}, "warmup: the warm-up of 9step ends after the run, .* is 8step"),
        ({"warmup": "2step", "warmup_from": "7step"}, "the warm-up of 2step from 7step on ends after the run"),
        ({"warmup": "0ep", "warmup_from": "8step"}, "warmup_from: 8step is not before the end of the run"),
        ({"kind": "cosine", "warmup": "4step", "decay_end": "4step"}, "end at 4step, before the warm-up of 4step does"),
        (
            {"kind": "cosine", "decay_start": "6step", "decay_end": "5step"},
            "end at 5step and start at decay_start=6step",
        ),
    ],
)
@pytest.mark.parametrize("where", ["train", "train.discriminator"])
def test_schedules_that_do_not_go_together(tmp_path, schedule, said, where):
    toy, path = str(ROOT / "configs" / "toy" / "imagefolder_tokenizer.yaml"), tmp_path / "x.yaml"
    section = {"schedule": {"warmup": "0ep", "warmup_from": "0ep", **schedule}}
    train = section if where == "train" else {"discriminator": section}
    path.write_text(yaml.safe_dump({"base": toy, "train": {"duration": "8step", **train}}))
    assert re.search(f"{where}.schedule.*{said}", problem(path))
    words = [f"{where}.schedule.{key}={value}" for key, value in section["schedule"].items()]
    assert re.search(said, problem(toy, "train.duration=8step", *words))
    if " run" in said:  # in epochs it depends on the data
        load_config(toy, ["train.duration=1ep", *words])


def test_schedules_of_a_trial_stay(tmp_path):
    """Every recipe can be tried for two steps."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if path.name != "quickstart.yaml":
            load_config(str(path), ["train.duration=2step"])


def test_overrides_that_are_no_text():
    with pytest.raises(UserError, match="no YAML after the equals sign: it holds bytes that are not UTF-8"):
        read_overrides(["train.seed=\udcff"])


def test_a_yaml_that_names_another_class_leaves_the_arguments_of_its_bases(tmp_path):
    """As an override does; what both classes have is kept, and a teacher that nothing listens to is told."""
    swapped = tmp_path / "swapped.yaml"
    base = ROOT / "configs" / "quickstart" / "rectok" / "tokenizer.yaml"
    swapped.write_text(f"base: {base}\nname: swapped\ntokenizer: {{name: fsq}}\n")
    config = load_config(str(swapped), [])
    assert config.tokenizer["name"] == "fsq" and config.tokenizer["image_size"] == 64
    assert "gamma" not in config.tokenizer and config.objective["weights"]["reconstruction"] == 10
    with pytest.raises(UserError, match='the tokenizer "fsq" predicts no features of a teacher'):
        build_teachers(config, dict(config.tokenizer))
