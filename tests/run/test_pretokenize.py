"""Tokens made by the program: on one rank and on two, killed and continued, out to other formats and in again."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.images import to_model_range
from core.rng import hash64
from core.specs import Codes
from core.weights import hub
from core.weights.files import WeightFile, save
from data import tokens
from data.cache import Builder, Pass
from data.sources import open_source
from data.token_files import JsonLines, NumberedFiles, copy_to, export_jsonl, export_numbered, open_import
from data.tokens import TokenStore
from data.transforms import Transform
from run import pretokenize
from run.data import open_pictures
from run.load import read_tokenizer
from run.train import train
from scripts.pretokenize import main
from tests.conftest import ROOT, TOY_GENERATOR, TOY_TOKENIZER
from tests.data.test_tokens import SOURCE, TEN, config, make, toy  # noqa: F401  (fixtures)
from tests.ranks import in_threads
from tests.scripts.shell import run, start
from tests.toy_codes import ToyCodes

SPEC = ToyCodes().spec
LINES = Codes(16, 1, 16, 1)


def call(settings, **changes) -> TokenStore:
    request = pretokenize.Request(**{"classes": 4, "batch": 40, "verify": True, **changes})
    assert pretokenize.pretokenize(settings, request, open_pictures(settings)) == 0
    return TokenStore(request.folder(settings))


def files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".npy", ".json")}


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------
def test_store_and_its_preview(tmp_path, config, capsys):
    store = call(config())
    assert store.path == tmp_path / "tokens" / "run" and store.content == make(tmp_path / "direct").content
    out = capsys.readouterr().out
    assert "24 pictures x 10 views, 3 x 16 codes from 16" in out and "read and found whole" in out
    assert "PSNR" in out and "100.0% of the tokens made again" in out
    with Image.open(store.path / "preview.png") as picture:
        assert picture.size == (8 * 18 + 2, 4 * 18 + 2)  # two rows of crops, two of what was decoded
    call(config())  # used as it is
    with pytest.raises(UserError, match="made by another tokenizer"):
        call(config("tokenizer.salt=1"))
    with pytest.raises(
        UserError, match=r"tokens of other pictures than synthetic://\?size=40&classes=4&count=23\. Choose"
    ):
        call(config("data.url=synthetic://?size=40&classes=4&count=23"))
    with pytest.raises(UserError, match="tokens of other crops .*'ten'.* than these .*'center'.*another --out"):
        call(config("data.crop=center"))


def test_the_store_a_config_trains_from_is_the_one_it_makes(tmp_path, config):
    settings = config(f"data.url=tokens://{tmp_path}/mine", f"data.pictures={config().data.url}")
    assert call(settings).path == tmp_path / "mine"
    assert train(settings) == 0
    with pytest.raises(UserError, match="tokenizer.weights is not set"):
        main([str(tmp_path / "toy.yaml")])


def test_the_config_of_a_tokenizer_stands_for_what_it_trained(tmp_path, tokenizer_run, capsys):
    words = [TOY_TOKENIZER, f"work_dir={tokenizer_run.parent}", "data.crop=center", "train.device=cpu"]
    words += ["data.url=synthetic://?size=32&classes=4&count=8", "--out", str(tmp_path / "store")]
    assert main(words) == 0 and "8 pictures x 2 views" in capsys.readouterr().out
    assert len(TokenStore(tmp_path / "store")) == 8
    with pytest.raises(UserError, match="tokenizer.weights is not set.* which this config trains, is not there"):
        main([*words, f"work_dir={tmp_path}"])


def test_weights_stand_for_a_config(tmp_path, tokenizer_run, generator_run, monkeypatch, capsys):
    """A tokenizer's file brings the pictures of its training, a run its own config; a slip is told in a sentence."""
    monkeypatch.chdir(ROOT)
    few = ["data.url=synthetic://?size=32&classes=4&count=8", "data.crop=center", "train.device=cpu", "data.workers=0"]
    assert main(["tiny/rear", "--check"]) == 0
    assert "taking embedded://emoji64, which tiny/rear was trained on" in capsys.readouterr().out
    place = tmp_path / "store"
    assert main(["tiny/rear", *few, "--out", str(place)]) == 0
    assert (
        TokenStore(place).spec == read_tokenizer({"weights": "tiny/rear"}).module.spec and len(TokenStore(place)) == 8
    )
    config = pretokenize.config_of(str(ROOT / "pretrained_models" / "tiny" / "dar" / "tokenizer.safetensors"), [])
    assert config.name == "dar" and config.data.flip
    for run_dir, weights in ((tokenizer_run, str(tokenizer_run)), (generator_run, None)):
        config = pretokenize.config_of(str(run_dir), few)
        assert config.data.crop == "center" and config.tokenizer["weights"] == (weights or config.tokenizer["weights"])
    for word, message in (
        ("tiny/rea", 'tiny/rea: no such file or folder. Did you mean "rear"'),
        (str(ROOT / "pretrained_models" / "tiny" / "rear" / "generator.safetensors"), "holds a generator"),
        ("configs/toy/far", 'Did you mean "configs/toy/far.yaml"'),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            main([word, "--check"])


@pytest.mark.parametrize("crop", ["random", "resize_random"])
def test_crops_without_views(config, crop):
    with pytest.raises(UserError, match=f'crop "{crop}" has no fixed views'):
        call(config(f"data.crop={crop}"))


@pytest.mark.slow
def test_ranks_and_kills_make_the_same_store(tmp_path, tokenizer_run):
    """One rank; two; and one that is killed without warning, then asked to stop, then finished by two."""
    data = "data.url=synthetic://?size=32&classes=4&count=8000"
    common = [
        TOY_GENERATOR,
        f"tokenizer.weights={tokenizer_run}",
        data,
        "data.flip=true",
        "data.workers=0",
        "train.device=cpu",
        "--batch",
        "64",
    ]
    one = run("run_pretokenize.sh", *common, "--out", tmp_path / "one", NPROC="1")
    assert one.returncode == 0, one.stderr
    assert "8,000 pictures x 2 views, continuous" in one.stdout
    two = run("run_pretokenize.sh", *common, "--out", tmp_path / "two", NPROC="2")
    assert two.returncode == 0, two.stderr
    assert files(tmp_path / "one") == files(tmp_path / "two")

    chunks = tmp_path / ".three.building" / "chunks.npy"

    def done() -> int:
        return int(np.load(chunks).any(axis=1).sum()) if chunks.is_file() and chunks.stat().st_size > 128 else 0

    for kill, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        before = done()
        process = start("run_pretokenize.sh", *common, "--out", tmp_path / "three", NPROC="1")
        assert "tokens of 8,000 pictures" in process.stdout.readline()
        while process.poll() is None and done() == before:  # one more of 32
            time.sleep(0.01)
        process.send_signal(kill)
        out, _ = process.communicate(timeout=600)
        assert process.returncode == code and not (tmp_path / "three").exists()
    assert "run the same command again" in out
    assert 2 <= done() < 32
    three = run("run_pretokenize.sh", *common, "--out", tmp_path / "three", NPROC="2")
    assert three.returncode == 0, three.stderr
    assert files(tmp_path / "one") == files(tmp_path / "three")


# ---------------------------------------------------------------------------------------------------------------------
# Numbered files
# ---------------------------------------------------------------------------------------------------------------------
def test_numbered_files_round_trip(tmp_path, config):
    """The schema of FQGAN: names, shapes and types; and what a sampler appended to fill up a batch is left out."""
    store = make(tmp_path / "s")
    codes, _ = in_threads(2, lambda world: export_numbered(store, tmp_path / "official", world))
    assert codes.name == "imagenet16_codes" and len(list(codes.iterdir())) == 24 * 3
    labels = codes.with_name("imagenet16_labels")
    green, label = np.load(codes / "7_green.npy"), np.load(labels / "7.npy")
    assert green.dtype == label.dtype == np.int64 and green.shape == (1, 10, 16) and label.tolist() == [3]
    assert np.array_equal(green[0], store.rows("codes")[7, :, :, 1])
    for i in range(3):  # padded duplicates
        for suffix in ("_red", "_green", "_blue"):
            os.link(codes / f"{i}{suffix}.npy", codes / f"{24 + i}{suffix}.npy")
        os.link(labels / f"{i}.npy", labels / f"{24 + i}.npy")
    reader = NumberedFiles(tmp_path / "official", SPEC)
    assert (reader.samples, reader.views) == (24, 10)
    again = call(config(), out=str(tmp_path / "again"), foreign=str(tmp_path / "official"))
    assert again.content == store.content and again.fingerprint() == SOURCE.fingerprint()
    with pytest.raises(UserError, match="holds codes of another store"):
        export_numbered(make(tmp_path / "other", transform=Transform(16)), tmp_path / "official")


def test_killed_export_goes_on(tmp_path):
    store = make(tmp_path / "s")

    def die(done):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_numbered(store, tmp_path / "o", progress=die)
    export_numbered(store, tmp_path / "o")
    assert NumberedFiles(tmp_path / "o", SPEC).samples == 24
    (tmp_path / "o" / "tessera_export.json").unlink()
    with pytest.raises(UserError, match="exists and was not written from this store"):
        export_numbered(store, tmp_path / "o")


def test_mistakes_in_numbered_files(tmp_path):
    store = make(tmp_path / "s")
    codes = export_numbered(store, tmp_path / "o")
    labels = codes.with_name("imagenet16_labels")

    def imported(name):
        plan = tokens.plan(24, 10, "x", TEN, SPEC, "f", ["a", "b", "c", "d"])
        copy_to(NumberedFiles(tmp_path / "o", SPEC), Builder(tmp_path / name, plan))

    np.save(codes / "5_red.npy", np.full((1, 10, 16), 16))
    with pytest.raises(UserError, match=r"imagenet16_codes/5\*.npy: code 16 does not exist"):
        imported("a")
    np.save(codes / "5_red.npy", np.zeros((1, 2, 16), dtype=np.int64))
    with pytest.raises(UserError, match=r"5_red.npy has shape \[1, 2, 16\], expected \[1, 10, 16\]"):
        imported("b")
    (codes / "5_red.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match="5_red.npy: not a whole .npy file"):
        imported("c")
    (codes / "5_red.npy").unlink()
    with pytest.raises(UserError, match="5_red.npy: no such file"):
        imported("d")
    (labels / "3.npy").unlink()
    with pytest.raises(UserError, match="1 of 24 labels are missing, the first is 3.npy"):
        imported("e")
    with pytest.raises(UserError, match="picture 0 has 0_blue.npy, 0_green.npy, 0_red.npy, this tokenizer"):
        NumberedFiles(tmp_path / "o", SPEC) if np.save(labels / "3.npy", [3]) else NumberedFiles(
            tmp_path / "o", ToyCodes(branches=2).spec
        )
    with pytest.raises(UserError, match="expected one folder called like imagenet256_codes"):
        NumberedFiles(tmp_path, SPEC)


# ---------------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------------
def write_lines(path, count: int, views: int = 10, nested: bool = False) -> np.ndarray:
    codes = np.array([[[hash64(i, v, t) % 16 for t in range(16)] for v in range(views)] for i in range(count)])
    with open(path, "w") as file:
        for i in range(count):
            for view in codes[i].tolist():
                tokens_ = [view[:8], view[8:]] if nested else view
                file.write(json.dumps({"class_id": i % 4, "tokens": tokens_}) + "\n")
    return codes


def store_of(path, name, spec=LINES, views=10, progress=None) -> TokenStore:
    reader = open_import(path, spec, views)
    transform = TEN if views == 10 else Transform(16)
    plan = tokens.plan(reader.samples, views, "x", transform, spec, "f", list("abcd"), chunk=4)
    copy_to(reader, Builder(path.parent / name, plan), progress=progress)
    return TokenStore(path.parent / name)


@pytest.mark.parametrize("nested", [False, True])
def test_lines_round_trip(tmp_path, nested):
    codes = write_lines(tmp_path / "t.jsonl", 11, nested=nested)
    store = store_of(tmp_path / "t.jsonl", "s")
    assert np.array_equal(store.rows("codes")[..., 0], codes)
    assert store.rows("labels").tolist() == [i % 4 for i in range(11)]
    export_jsonl(store, tmp_path / "out.jsonl")
    plain = tmp_path / "plain.jsonl"
    write_lines(plain, 11)
    assert (tmp_path / "out.jsonl").read_bytes() == plain.read_bytes()
    with pytest.raises(UserError, match="exists"):
        export_jsonl(store, tmp_path / "out.jsonl")


def test_lines_of_several_branches(tmp_path):
    store = make(tmp_path / "s")
    export_jsonl(store, tmp_path / "t.jsonl")
    assert store_of(tmp_path / "t.jsonl", "again", SPEC).rows("codes").tolist() == store.rows("codes").tolist()


def test_blocks_are_found_wherever_the_file_is_cut(tmp_path, monkeypatch):
    """Counting reads pieces of 4 MiB: here of every size, with and without an end of line at the end."""
    write_lines(tmp_path / "t.jsonl", 9, views=1)
    text = (tmp_path / "t.jsonl").read_bytes()
    for data in (text, text[:-1]):
        (tmp_path / "t.jsonl").write_bytes(data)
        expected = np.cumsum([0] + [len(line) for line in data.splitlines(keepends=True)])[::3].tolist()
        for size in (1, 7, len(text) // 2, len(text), 1 << 22):
            monkeypatch.setattr("data.token_files.PIECE", size)
            reader = JsonLines(tmp_path / "t.jsonl", LINES, 3)
            assert reader.samples == 3 and reader.spans[0].tolist() == expected


def test_killed_conversion_goes_on(tmp_path):
    write_lines(tmp_path / "t.jsonl", 11)
    whole = store_of(tmp_path / "t.jsonl", "whole")
    told = []

    def die(done, total):
        told.append((done, total))
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_of(tmp_path / "t.jsonl", "s", progress=die)
    store_of(tmp_path / "t.jsonl", "s", progress=die)
    assert told == [(4, 11), (8, 11), (3, 3)]
    assert files(tmp_path / "s") == files(whole.path)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"class_id": 1, "tokens": [1, 2', "line 23 is not"),
        ('{"class_id": 1}', 'line 23 is not .*"tokens" is missing'),
        ("", "line 23 is not"),
        ('{"class_id": 4, "tokens": %s}' % ([0] * 16), r"lines 21 to 30 should be .* have classes \[2, 4\]"),
        ('{"class_id": -1, "tokens": %s}' % ([0] * 16), "line 23: class_id -1 is not a class from 0 to 999999"),
        ('{"class_id": "a", "tokens": %s}' % ([0] * 16), "line 23: class_id 'a' is not a class"),
        ('{"class_id": 2, "tokens": [0, 1]}', "line 23: 2 tokens of type int64"),
        ('{"class_id": 2, "tokens": %s}' % ([0.5] * 16), "line 23: 16 tokens of type float64"),
        ('{"class_id": 2, "tokens": %s}' % ([0] * 15 + [99]), "line 23: code 99 does not exist"),
        (
            '{"class_id": 3, "tokens": %s}' % ([0] * 16),
            r"lines 21 to 30 should be 10 views of one picture but have classes "
            r"\[2, 3\]",
        ),
    ],
)
def test_bad_lines(tmp_path, line, message):
    write_lines(tmp_path / "t.jsonl", 5)
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    lines[22] = line
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        store_of(tmp_path / "t.jsonl", "s")
    lines[20:30] = ['{"class_id": 4, "tokens": %s}' % ([0] * 16)] * 10
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"t.jsonl lines 21 to 30: class 4 does not exist, there are 4 \(0 to 3\)"):
        store_of(tmp_path / "t.jsonl", "s")
    (tmp_path / "t.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="has 49 lines, which is not a multiple of the 10 views"):
        store_of(tmp_path / "t.jsonl", "s")


def test_imported_tokens_are_compared_with_the_pictures(tmp_path, config, capsys):
    """With the pictures at hand, tokens of another tokenizer are found out before they get its fingerprint."""
    export_jsonl(make(tmp_path / "s"), tmp_path / "t.jsonl")
    store = call(config(), out=str(tmp_path / "good"), foreign=str(tmp_path / "t.jsonl"))
    assert "lists the pictures in the order of the source: the tokenizer makes 100.0%" in capsys.readouterr().out
    assert store.content == TokenStore(tmp_path / "s").content
    backwards = ToyCodes()
    backwards.levels.data = backwards.levels.data.flip(0)
    made = tokens.build(
        tmp_path / "b",
        SOURCE,
        TEN,
        SPEC,
        lambda images: backwards.encode(to_model_range(images)),
        "other",
        Pass(batch=8),
    )
    export_jsonl(made, tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="reproduces only .*% of the codes in the best of"):
        call(config(), out=str(tmp_path / "bad"), foreign=str(tmp_path / "b.jsonl"))
    assert not (tmp_path / "bad").exists()


RANKS = [("strided", r, e) for r, e in ((2, 24), (5, 24), (5, 25), (7, 28), (16, 32), (16, 24))]


@pytest.mark.parametrize(
    "merge, ranks, entries",
    [*RANKS, ("strided, ranks as words", 12, 24), ("alternating", 5, 24), ("shuffled 0", 1, 24), ("shuffled 0", 4, 24)],
)
def test_lines_of_several_ranks_are_given_to_their_pictures(tmp_path, config, capsys, merge, ranks, entries):
    """By a re-statement of the writers: rank r takes its pictures, the ranks' files are put together."""
    whole = make(tmp_path / "s")
    export_jsonl(whole, tmp_path / "t.jsonl")
    lines = (tmp_path / "t.jsonl").read_bytes().splitlines(keepends=True)
    pictures = list(range(24))
    if merge.startswith("shuffled"):
        from torch.utils.data import DistributedSampler

        taken = [list(DistributedSampler(pictures, ranks, r, shuffle=True)) for r in range(ranks)]
    elif merge == "alternating":
        parts = [list(p) for p in np.array_split(pictures, ranks)]
        taken = [[p[step] for p in parts if step < len(p)] for step in range(len(parts[0]))]
    else:
        filled = pictures + pictures[: entries - 24]
        taken = [filled[r::ranks] for r in range(ranks)]
        if "words" in merge:
            taken = [taken[r] for r in sorted(range(ranks), key=str)]
    written = [line for part in taken for i in part for line in lines[i * 10 : i * 10 + 10]]
    assert len(written) == entries * 10 and sorted({*written}) == sorted({*lines})
    (tmp_path / "r.jsonl").write_bytes(b"".join(written))
    store = call(config(), out=str(tmp_path / "found"), foreign=str(tmp_path / "r.jsonl"))
    assert store.content == whole.content and store.fingerprint() == SOURCE.fingerprint()
    said = capsys.readouterr().out
    assert (f"{ranks} ranks" in said) == (ranks > 1) and "makes 100.0% of the codes" in said
    (tmp_path / "parts").mkdir()
    for rank, part in enumerate(np.split(np.array(written), [len(lines) // 2])):  # one file for each half of the lines
        (tmp_path / "parts" / f"rank_{rank + 9}.jsonl").write_bytes(b"".join(part.tolist()))
    assert call(config(), out=str(tmp_path / "joined"), foreign=str(tmp_path / "parts")).content == whole.content


def test_lines_in_no_known_order_or_of_other_pictures_are_refused(tmp_path, config):
    export_jsonl(make(tmp_path / "s"), tmp_path / "t.jsonl")
    lines = (tmp_path / "t.jsonl").read_bytes().splitlines(keepends=True)

    def refused(message, *settings, entries=None):
        written = [line for i in entries for line in lines[i * 10 : i * 10 + 10]] if entries is not None else lines
        (tmp_path / "r.jsonl").write_bytes(b"".join(written))
        with pytest.raises(UserError, match=message):
            call(config(*settings), out=str(tmp_path / "x"), foreign=str(tmp_path / "r.jsonl"))
        assert not (tmp_path / "x").exists()

    refused("reproduces only", entries=np.random.default_rng(5).permutation(24))
    refused("20 entries of 10 views, 24 pictures are given; name its pictures", entries=range(20))
    refused("120 entries of 2 views, 24 pictures are given; with 10 views .* data.crop=ten", "data.crop=center")
    swapped = [*range(24)]
    swapped[0], swapped[1] = 1, 0  # classes 0 and 1: whether or not it is among the pictures that are looked at
    refused("reproduces only|its picture, number 0, has class 0", entries=swapped)


def test_imported_without_pictures(tmp_path, config):
    export_jsonl(make(tmp_path / "s"), tmp_path / "t.jsonl")
    settings = config(f"data.url=tokens://{tmp_path}/mine")
    store = call(settings, foreign=str(tmp_path / "t.jsonl"))
    assert store.num_classes == 4 and store.tokenizer == hub.fingerprint(ToyCodes().state_dict())
    assert train(settings) == 0
    with pytest.raises(UserError, match='no .*t.jsonx. Did you mean "t.jsonl"'):
        call(settings, out=str(tmp_path / "x"), foreign=str(tmp_path / "t.jsonx"))
    again = call(settings, out=str(tmp_path / "mine"), to=("jsonl", str(tmp_path / "again.jsonl")))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "t.jsonl").read_bytes()
    assert torch.equal(again.tokens([3], [2]), store.tokens([3], [2]))
    assert open_source(f"tokens://{store.path}").views == 10


def test_a_recipe_whose_pictures_are_not_on_this_disk(tmp_path, config, capsys):
    """As reAR's users do it: download the lines, import them, train from the store. No folder is asked for."""
    export_jsonl(make(tmp_path / "s"), tmp_path / "t.jsonl")
    path = config().run_dir.parent / "toy.yaml"
    recipe = path.read_text().replace("synthetic://?size=40&classes=4&count=24", "folder:///gone/train")
    recipe = recipe.replace("crop: ten", 'crop: ten, val_url: "folder:///gone/val"')
    weights = tmp_path / "weights.safetensors"
    path.write_text(recipe.replace("name: toy_codes", f"name: toy_codes, weights: {weights}"))
    save(weights, WeightFile("tokenizer", {"name": "toy_codes"}, ToyCodes().state_dict()))
    settings = config(f"data.url=tokens://{tmp_path}/mine")
    settings.tokenizer.pop("weights")  # the stand-in's are made, not read
    assert main([str(path), "--import", str(tmp_path / "t.jsonl"), "--check"]) == 0
    assert "folder:///gone/train is not here: the tokens are taken without" in capsys.readouterr().out
    call(settings, foreign=str(tmp_path / "t.jsonl"))
    assert "24 pictures x 10 views, without a comparison" in capsys.readouterr().out
    assert train(settings) == 0
    with pytest.raises(UserError, match="no such folder"):
        train(config(f"data.url=tokens://{tmp_path}/mine", "train.eval_every=1step"))
    with pytest.raises(UserError, match="no such folder"):
        main(
            [
                str(path),
                "data.pictures=folder:///gone",
                "data.url=tokens://x",
                "--import",
                str(tmp_path / "t.jsonl"),
                "--check",
            ]
        )
