"""A released file named alone: it finds its tokenizer, is sampled as its number was published, and flags still win."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from core.errors import UserError
from core.weights import released
from evaluation import protocols
from evaluation.networks import WEIGHTS_FILE
from run import evaluate
from run.load import TOKENIZERS, load_config, tokenizer_layout
from run.target import read_target
from run.weights import ADAPTERS
from scripts import evaluate_generator, sample
from tests.conftest import ROOT
from tests.rehearsal.released import FILES

MASKGIT, COSINE = "pretrained_models/maskgit-vqgan-imagenet-f16-256.bin", {"schedule": "cosine"}
AUTO = {"scale": 1.29, "steps": 150, "guidance": "auto", "guide": "pretrained_models/ditdhs_epoch_0029.pth"}
# Tables of the systems' READMEs and papers: file -> (tokenizer, protocol, sampling).
PUBLISHED = {
    "reAR-S.safetensors": (MASKGIT, "rear", {**COSINE, "scale": 22.0, "power": 2.75, "temperature": 1.0}),
    "reAR-B.safetensors": (MASKGIT, "rear", {**COSINE, "scale": 15.0, "power": 2.5, "temperature": 1.0}),
    "reAR-L.safetensors": (MASKGIT, "rear", {**COSINE, "scale": 15.0, "power": 2.5, "temperature": 1.0}),
    "rar_b.bin": (MASKGIT, "rear", {**COSINE, "scale": 16.0, "power": 2.75, "temperature": 1.0}),
    "rar_l.bin": (MASKGIT, "rear", {**COSINE, "scale": 15.5, "power": 2.5, "temperature": 1.02}),
    "rar_xl.bin": (MASKGIT, "rear", {**COSINE, "scale": 6.9, "power": 1.5, "temperature": 1.02}),
    "rar_xxl.bin": (MASKGIT, "rear", {**COSINE, "scale": 8.0, "power": 1.2, "temperature": 1.02}),
    "D-AR-L-360K.pt": (
        "pretrained_models/D-AR-tokenizer_v1.pt",
        "dar",
        {"scale": 8.0, "start": 1.2, "schedule": "linear"},
    ),
    "D-AR-XL-360K.pt": (
        "pretrained_models/D-AR-tokenizer_v1.pt",
        "dar",
        {"scale": 8.0, "start": 1.2, "schedule": "linear"},
    ),
    "imagenet-var-4096.pt": (
        "pretrained_models/imagenet-var-4096.pt",
        "imagefolder",  # cfg 3.25 of the original, which counts from 0
        {"scale": 4.25, "start": 1.0, "schedule": "linear", "top_k": 750, "top_p": 0.95},
    ),
    "ditdhxl_epoch_0079.pth": ("pretrained_models/RecTok_decft.pth", "rectok", AUTO),
    "ditdhxl_epoch_0599.pth": ("pretrained_models/RecTok_decft.pth", "rectok", AUTO),
}
PROTOCOLS_OF_TOKENIZERS = {
    "RecTok": "rectok",
    "fqgan": "fqgan",
    "maskgit": "rear",
    "vqgan_plus": "rear",
    "tokenizer_titok": "rear",
    "D-AR": "dar",
    "imagenet": "imagefolder",
    "XQGAN": "imagefolder",
    "RobustTok": "imagefolder",
    "xqgan": "imagefolder",
}


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A working folder whose pretrained_models/ holds a (hollow) file under every released name."""
    for file in released.table():
        if file.to == "pretrained_models":
            (tmp_path / file.place).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file.place).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_download_is_kept_if_its_bytes_are_the_known_ones(tmp_path, monkeypatch):
    def download(reference: str, to: Path) -> Path:
        to.parent.mkdir(exist_ok=True)
        to.write_bytes(b"data")
        return to

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("core.weights.hub.resolve", download)
    digest = hashlib.sha256(b"data").hexdigest()
    file = released.Released("auxiliary", "a.pth", "a file", url="https://host/a.pth", sha256=digest[:8], bytes=4)
    assert file.fetch().read_bytes() == b"data"
    for wrong in ({"sha256": "0" * 64}, {"bytes": 5}, {"at_least": 100, "bytes": None}):
        with pytest.raises(UserError, match="https://host/a.pth has .*: it was cut short .* and was not kept"):
            dataclasses.replace(file, **wrong).fetch()
        assert not file.place.exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sampling(name, site):
    said = []
    target = read_target(name, [], said.append)
    config, weights = target.config, target.weights
    tokenizer, protocol, sampling = PUBLISHED[name]
    assert weights == f"pretrained_models/{name}" and config.tokenizer["weights"] == tokenizer
    assert config.eval.protocol == protocol
    assert {key: getattr(config.sample, key) for key in sampling} == sampling
    assert tokenizer in said[0] and protocol in said[0]
    own = read_target(name, ["sample.scale=1.5", "tokenizer.weights=RecTok.pth", "eval.protocol=adm"]).config
    assert (own.sample.scale, Path(own.tokenizer["weights"]).name, own.eval.protocol) == (1.5, "RecTok.pth", "adm")


def test_every_generator_has_its_number():
    assert {f.name for f in released.table() if f.published.startswith("FID")} <= set(PUBLISHED)


def test_guide_is_asked_for_only_where_it_guides(site):
    (site / "pretrained_models" / "ditdhs_epoch_0029.pth").unlink()
    read_target("ditdhxl_epoch_0599.pth", ["sample.scale=1"])
    with pytest.raises(UserError, match="run_download.sh ditdhs_epoch_0029.pth"):
        read_target("ditdhxl_epoch_0599.pth", [])


def test_neighbours_of_a_file_elsewhere(site, tmp_path):
    """A file in another folder takes the companions that lie beside it."""
    (site / "pretrained_models").rename(site / "other")
    config = read_target("other/imagenet-var-4096.pt", []).config
    assert config.tokenizer["weights"] == "other/imagenet-var-4096.pt"
    assert read_target("other/rar_b.bin", []).config.tokenizer["weights"] == f"other/{Path(MASKGIT).name}"


def test_a_config_without_a_run_takes_what_was_released_for_it(site):
    said = []
    target = read_target(str(ROOT / "configs/rectok/ditdh_xl.yaml"), [], said.append)
    config, weights = target.config, target.weights
    assert weights == "pretrained_models/ditdhxl_epoch_0599.pth" and weights in said[0]
    assert config.sample.steps == 50  # the config that was named says how to sample
    with pytest.raises(UserError, match="no such file or folder|folder without checkpoints"):
        read_target(str(ROOT / "configs/rectok/ditdh_xl.yaml"), ["name=mine"])
    (site / "pretrained_models" / "rar_b.bin").unlink()
    with pytest.raises(UserError, match=r"Train it, fetch released weights \(bash run_download.sh rar_b.bin\)"):
        read_target(str(ROOT / "configs/rear/rar_b.yaml"), [])


def test_weights_on_the_command_line(site):
    (site / "pretrained_models" / WEIGHTS_FILE).unlink()  # numbers are those of the stand-in then
    for name in (Path(MASKGIT).name, "rar_b.bin"):
        with pytest.raises(UserError, match=f"{name}: not a whole PyTorch file"):  # as the run would say
            evaluate_generator.main(["--weights", "rar_b.bin", "--check"])
        FILES[name](site / "pretrained_models" / name)
    for words in (
        ["--weights", "rar_b.bin"],
        ["--weights", "rar_b.bin", "sample.scale=2"],
        ["sample.scale=2", "--weights", "rar_b.bin"],
        [str(ROOT / "configs/rear/rar_b.yaml"), "--weights", "rar_b.bin"],
    ):
        options, settings = evaluate_generator.parse([*words, "--check"])
        assert read_target(options.target, settings).weights.endswith("rar_b.bin")
        assert evaluate_generator.main([*words, "data.url=synthetic://", "--check"]) == 0
        assert sample.main([*words, "--labels", "1", "--out", "o", "--check"]) == 0
    with pytest.raises(UserError, match="name a generator"):
        evaluate_generator.parse(["sample.scale=2"])
    with pytest.raises(UserError, match="run_download.sh rar_l.bin"):
        (site / "pretrained_models" / "rar_l.bin").unlink()
        evaluate_generator.main(["rar_l.bin", "--check"])


@pytest.mark.parametrize("file", [f for f in released.table() if f.network or f.recipe], ids=lambda f: f.name)
def test_what_the_table_says_is_true(file):
    """Recipes load; sizes, where the recorded layout of the file is at hand, are those of the file."""
    if file.recipe:
        config = load_config(str(ROOT / file.recipe), list(file.settings))
        if config.task == "generator":
            return
    known, _ = tokenizer_layout({"weights": file.name})
    assert protocols.of_tokenizer(known["name"]) == next(
        p for name, p in PROTOCOLS_OF_TOKENIZERS.items() if file.name.startswith(name)
    )
    recorded = ROOT.parent / "shared" / "checkpoints" / f"{Path(file.name).stem}.json"
    if not recorded.is_file():
        pytest.skip(f"{recorded.name} is not at hand")
    from core.weights.layouts import build_on_meta, read_layout

    described = ADAPTERS["tokenizer"][known["name"]].describe(read_layout(json.loads(recorded.read_text())))
    build = TOKENIZERS.get(known["name"])
    untrained = {"pretrained": False} if known["name"] == "imagefolder" else {}
    here, there = (
        build_on_meta(
            build,
            {k: v for k, v in s.items() if k not in ("name", "semantic", "pretrained", "usage_window")} | untrained,
        )
        for s in (known, described)
    )
    assert here.spec == there.spec and here.image_size == there.image_size
    assert {n: p.shape for n, p in here.state_dict().items()} == {n: p.shape for n, p in there.state_dict().items()}


def test_a_bare_file_draws(tmp_path, monkeypatch):
    """The files as they are released, at toy size: a command with nothing but their names."""
    from safetensors.torch import save_file

    from generator import GENERATORS
    from generator.adapters import ADAPTERS as GENERATOR_ADAPTERS
    from tokenizer import TOKENIZERS as BUILD
    from tokenizer.adapters import ADAPTERS

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained_models").mkdir()
    torch.manual_seed(0)
    tokenizer = BUILD.build(
        {"name": "maskgit_vqgan", "channels": 32, "channel_mult": [1] * 5, "res_blocks": 1, "vocab": 64, "code_dim": 8}
    )
    torch.save(ADAPTERS["maskgit_vqgan"].restore(tokenizer), MASKGIT)
    generator = GENERATORS.build(
        {
            "name": "rar",
            "size": {"width": 16, "layers": 1, "heads": 2, "hidden": 16},
            "num_classes": 1000,
            "rear": {"projection": 8},
        },
        **tokenizer.spec.sizes(),
    )
    save_file(
        {k: v.contiguous() for k, v in GENERATOR_ADAPTERS["rar"].restore(generator).items()},
        "pretrained_models/reAR-L.safetensors",
    )
    assert sample.main(["reAR-L.safetensors", "--labels", "207", "--num", "1", "--out", "s"]) == 0
    facts = json.loads((tmp_path / "s" / "sample.json").read_text())
    assert facts["sample.scale"] == 15.0 and facts["tokenizer"] == MASKGIT and facts["precision"] == "fp32"
    assert evaluate.with_protocol(MASKGIT, []) == ["eval.protocol=rear"]
    assert evaluate.with_protocol(MASKGIT, ["eval.protocol=adm"]) == ["eval.protocol=adm"]
