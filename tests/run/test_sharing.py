"""run/sharing.py and run/publish.py: files that need nothing else, names of classes, a repository of the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import run
from core.errors import UserError
from core.weights import files as weight_files
from core.weights import hub, released
from run.convert import Conversion, describe
from run.publish import Publication
from run.sample import parse_labels
from run.sharing import imagenet_names, readable, without_places
from scripts import publish, sample
from tests.conftest import TOY_GENERATOR
from tests.fake_hub import serving


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """Another machine: no runs, no data, nothing downloaded."""
    monkeypatch.chdir(tmp_path)
    for variable in ("TESSERA_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(released, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def fake(monkeypatch, bare):
    with serving() as hub_here:
        monkeypatch.setenv("HF_ENDPOINT", hub_here.address)
        yield hub_here


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(f)) for f in sorted(folder.glob("[0-9]*.png"))]


def test_a_file_needs_its_tokenizers_file_alone(generator_run, tokenizer_run, bare, capsys):
    """Names of classes, guidance and steps are in it; the tokenizer beside it is known by its fingerprint."""
    assert sample.main([str(generator_run), "--labels", "ring 3,0", "--num", "3", "--out", "a"]) == 0
    Conversion(str(generator_run), bare / "files" / "mine.safetensors").run()
    content = weight_files.read_header(bare / "files" / "mine.safetensors")
    assert content.about["class_names"][3] == "ring 3" and content.about["config"]["sample"]["scale"] == 1.5
    moved = dict(content.about["tokenizer"], weights="work_dirs/gone")
    whole = weight_files.read(bare / "files" / "mine.safetensors")
    whole.about["tokenizer"] = moved
    weight_files.save(bare / "files" / "mine.safetensors", whole, overwrite=True)
    command = ["files/mine.safetensors", "--labels", "ring 3,0", "--num", "3", "--out", "b"]
    with pytest.raises(UserError, match=r"weights [0-9a-f]{16}, and they are not here \(work_dirs/gone neither\)"):
        sample.main(command)
    Conversion(str(tokenizer_run), bare / "files" / "whatever.safetensors").run()
    assert sample.main(command) == 0
    assert all(np.array_equal(a, b) for a, b in zip(pictures(bare / "a"), pictures(bare / "b"), strict=True))
    capsys.readouterr()
    assert sample.main(["files/mine.safetensors", "--list-labels"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["3", "ring", "3"]
    tokenizer = weight_files.read_header(bare / "files" / "whatever.safetensors")
    assert (
        tokenizer.about["preprocessing"]["image_size"] == 32 and tokenizer.about["fingerprint"] == moved["fingerprint"]
    )
    with pytest.raises(
        UserError, match="^--labels missing: bash run_sample.sh files/mine.safetensors --labels 0-3 --out c"
    ):
        sample.main(["files/mine.safetensors", "--out", "c"])


def test_results_travel_with_the_weights_that_they_are_of(tokenizer_run, bare):
    fingerprint = run.load_tokenizer(tokenizer_run, device="cpu")
    fingerprint = hub.fingerprint(fingerprint.module.state_dict())
    score = {"psnr": {"value": 21.5, "protocol": "adm", "count": 182}}
    for name, of in (("mine", fingerprint), ("other", "0" * 16)):
        (bare / "work_dirs" / "eval" / name).mkdir(parents=True)
        context = {"weights_fingerprint": of, "scores": score if name == "mine" else {"psnr": {"value": 1.0}}}
        (bare / "work_dirs" / "eval" / name / "metrics.json").write_text(json.dumps({"context": context}))
    Conversion(str(tokenizer_run), bare / "t.safetensors").run()
    (bare / "work_dirs" / "eval" / "mine" / "metrics.json").unlink()
    Conversion("t.safetensors", bare / "again.safetensors").run()  # they are not lost on the way
    for name in ("t", "again"):
        about = weight_files.read_header(bare / f"{name}.safetensors").about
        assert about["results"] == [{"metric": "psnr", "value": 21.5, "protocol": "adm", "count": 182}]


def test_published_and_taken_again(generator_run, fake, bare, capsys):
    reference = run.load_generator(generator_run, device="cpu").sample("ring 3", seed=3, output="numpy")
    assert publish.main([str(generator_run), "me/toy", "--licence", "cc0-1.0", "--out", "ready"]) == 0
    assert "sent to me/toy as commit " + "d" * 40 in capsys.readouterr().out
    assert set(fake.tokens) == {"Bearer hf_secret"}
    sent = {name.removeprefix("me/toy/") for name in fake.files}
    assert sent == {"generator.safetensors", "tokenizer.safetensors", "README.md", "config.yaml", "samples.png"}
    card = fake.files["me/toy/README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc0-1.0" and 'run.load_generator("hf://me/toy")' in card and "disc 0, square 1" in card
    shutil.rmtree(bare / "ready")

    generator = run.load_generator("hf://me/toy", device="cpu")  # its tokenizer comes along
    assert np.array_equal(generator.sample("ring 3", seed=3, output="numpy"), reference)
    assert generator.sampler.facts["commits"] == {"generator.weights": "c" * 40, "tokenizer.weights": "c" * 40}
    assert run.load_tokenizer("hf://me/toy", device="cpu").image_size == 32
    with pytest.raises(UserError, match=r"holds 2 files of weights; name one:\n  hf://me/toy/generator.safetensors\n"):
        hub.resolve("hf://me/toy")


@pytest.mark.parametrize(
    "here, there",
    [
        ("folder:///srv/ada/my pictures", "folder://my pictures"),
        ("folder://~/sets/imagenet/train", "folder://imagenet/train"),
        ("folder://data/imagenet/train", "folder://data/imagenet/train"),
        ("list:///srv/ada/a.txt?root=/mnt/x/birds&classes=names.txt", "list://a.txt?root=birds&classes=names.txt"),
        ("wds:///mnt/shards/{0000..0127}.tar", "wds://{0000..0127}.tar"),
        ("wds://https://site.org/a.tar", "wds://https://site.org/a.tar"),
        ("datasets://owner/name", "datasets://owner/name"),
        (str(released.ROOT / "pretrained_models" / "a.pt"), "pretrained_models/a.pt"),
        ("/srv/ada/runs", "runs"),
        ("/", "/"),
        (["~/a/b", {"x": "../../ada/b", "n": 3}], ["b", {"x": "b", "n": 3}]),
    ],
)
def test_places_that_are_nobody_elses(here, there):
    assert without_places(here) == there


def test_nothing_published_tells_where_it_was_made(tokenizer_run, bare, train_main):
    """Neither the card nor the config nor the headers of weights: paths name their owner."""
    for path in (f"train/{label}/{i}.png" for label in "abcd" for i in range(2)):
        (bare / "set of ada" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(bare / "set of ada" / path)
    config = shutil.copy(TOY_GENERATOR, bare / "recipe.yaml")
    words = [f"data.url=folder://{bare}/set of ada/train", "train.duration=1step", "train.device=cpu"]
    words += [
        f"work_dir={bare}/runs",
        "name=mine",
        f"data.cache_dir={bare}/cache",
        f"tokenizer.weights={tokenizer_run}",
    ]
    code, _, said = train_main(config, *words)
    assert code == 0, said
    assert publish.main([f"{bare}/runs/mine", "me/toy", "--dry-run", "--out", "ready"]) == 0
    told = {path.name: path.read_bytes() for path in (bare / "ready").iterdir()}
    assert "| data | folder://set of ada/train |" in told["README.md"].decode()
    for place in (bare, tokenizer_run.parent):
        assert not [name for name, content in told.items() if str(place).encode() in content]
    assert yaml.safe_load(told["config.yaml"])["tokenizer"]["weights"] == "hf://me/toy/tokenizer.safetensors"


def test_a_folder_that_holds_a_tokenizer_and_its_generator(generator_run, tokenizer_run, bare, capsys):
    """As tiny/NAME: a run on its tokenizer is published with it, and scripts.convert knows both files."""
    Conversion(str(tokenizer_run), bare / "pair" / "tokenizer.safetensors").run()
    Conversion(str(generator_run), bare / "pair" / "generator.safetensors").run()
    assert describe("pair")
    out = capsys.readouterr().out
    assert "pair/tokenizer.safetensors: the tokenizer" in out and "pair/generator.safetensors: the generator" in out
    with pytest.raises(UserError, match="pair holds a tokenizer and a generator: say which one with --kind"):
        Conversion("pair", bare / "one.safetensors").run()
    (bare / "ready").mkdir()
    shutil.copy(bare / "pair" / "generator.safetensors", bare / "ready")
    Publication(str(generator_run), "me/toy")._add_tokenizer({"weights": "pair"}, bare / "ready")
    content = weight_files.read_header(bare / "ready" / "generator.safetensors")
    assert content.about["tokenizer"]["weights"] == "hf://me/toy/tokenizer.safetensors"
    assert weight_files.read_header(bare / "ready" / "tokenizer.safetensors").kind == "tokenizer"


def test_a_folder_with_other_things_is_not_replaced(tokenizer_run, bare):
    """--out . would delete all that is here; a folder made so before is replaced."""
    (bare / "precious").mkdir()
    (bare / "precious" / "thesis.tex").write_text("x")
    for out in ("precious", ".", "precious/thesis.tex"):
        with pytest.raises(UserError, match=r"holds other things, which would be deleted\. Name a folder that is new"):
            publish.main([str(tokenizer_run), "me/toy", "--dry-run", "--out", out])
    assert (bare / "precious" / "thesis.tex").read_text() == "x"
    for _ in range(2):
        assert publish.main([str(tokenizer_run), "me/toy", "--dry-run", "--out", "ready"]) == 0


def test_without_a_network_what_is_here_is_taken(generator_run, fake, bare, monkeypatch):
    publish.main([str(generator_run), "me/toy", "--out", "ready"])
    run.load_generator("hf://me/toy", device="cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fake.asked.clear()
    assert run.load_generator("hf://me/toy", device="cpu").class_names[3] == "ring 3" and not fake.asked
    with pytest.raises(UserError, match="there is no file of weights on this machine"):
        hub.resolve("hf://me/other")
    with pytest.raises(UserError, match="is ready, but the network is switched off .* hf upload me/toy ready"):
        publish.main([str(generator_run), "me/toy", "--out", "ready"])
    assert publish.main([str(generator_run), "me/toy", "--out", "ready", "--dry-run"]) == 0


def test_a_hub_out_of_reach_is_no_matter_of_logins(generator_run, fake, bare, monkeypatch):
    class ConnectError(Exception):
        """As httpx, and so huggingface_hub, says it."""

    def refuse(*arguments, **options):
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(
        UserError, match=r"the hub cannot be reached from here \(ConnectError: .*hf upload me/toy ready$"
    ):
        publish.main([str(generator_run), "me/toy", "--out", "ready"])


def test_what_the_hub_refuses_is_a_sentence(generator_run, fake, bare):
    fake.refuses = 403
    with pytest.raises(UserError, match=r"me/toy does not take it .*HF_TOKEN to a token that may write"):
        publish.main([str(generator_run), "me/toy", "--out", "ready"])
    with pytest.raises(UserError, match="should read owner/name"):
        publish.main([str(generator_run), "toy"])
    fake.files |= {"one/file/x/m.pt": b"1", "one/file/README.md": b"2", "no/weights/a.txt": b"3"}
    assert hub.resolve("hf://one/file").read_bytes() == b"1"
    assert hub.commit_of(hub.resolve("hf://one/file")) == "c" * 40 and hub.commit_of(bare / "x.pt") is None
    with pytest.raises(UserError, match="there is no file of weights in it"):
        hub.resolve("hf://no/weights")


def test_imagenet_is_known_without_its_pictures():
    names = imagenet_names()
    assert len(names) == 1000 and names[207] == "golden retriever" and names[0] == "tench, Tinca tinca"
    assert readable(["n01440764", "n02099601"]) == ["tench, Tinca tinca", "golden retriever"]
    assert readable(["n00000001", "n01440764"]) == ["n00000001", "n01440764"] and readable(["cat"]) == ["cat"]
    assert parse_labels("tench, golden retriever, Tench, Tinca tinca, n01443537, 5", 1000, names) == [0, 207, 0, 1, 5]
    with pytest.raises(UserError, match='"crane" is the name of classes 134 and 517'):
        parse_labels("crane", 1000, names)
