"""Token stores: the same batches as from pictures, refused for another tokenizer, opened at once whatever their size."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from core.errors import UserError
from core.images import to_model_range
from core.specs import Codes, Continuous, MultiScale
from core.weights import hub
from data import tokens
from data.cache import FORMAT, Pass
from data.loader import Loader
from data.sources import open_source
from data.tokens import TokenStore
from data.transforms import Transform
from generator import GENERATORS
from run.check import check_inputs
from run.load import load_config
from run.train import train
from tests.conftest import ROOT
from tests.counting import calls
from tests.toy_codes import ToyCodes
from tokenizer import TOKENIZERS

SOURCE = open_source("synthetic://?size=40&classes=4&count=24")
TEN = Transform(16, crop="ten")


def fingerprint(tokenizer) -> str:
    return hub.fingerprint(tokenizer.state_dict())


def make(path, tokenizer=None, **options) -> TokenStore:
    tokenizer = tokenizer or ToyCodes()
    return tokens.build(
        path,
        SOURCE,
        options.pop("transform", TEN),
        tokenizer.spec,
        lambda images: tokenizer.precompute(to_model_range(images)),
        fingerprint(tokenizer),
        Pass(batch=8),
        **options,
    )


@pytest.fixture
def toy(monkeypatch):
    """The stand-ins by name, as a config sees them."""
    monkeypatch.setitem(TOKENIZERS.entries, "toy_codes", "tests.toy_codes:ToyCodes")
    monkeypatch.setitem(GENERATORS.entries, "toy_counts", "tests.toy_codes:ToyCounts")


CONFIG = """
name: run
task: generator
tokenizer: {name: toy_codes}
generator: {name: toy_counts}
data: {url: "synthetic://?size=40&classes=4&count=24", crop: ten, workers: 0}
train:
  {duration: 8step, global_batch: 8, optimizer: {lr: 0.1}, precision: fp32, device: cpu, log_every: 1step,
   checkpoint_every: 4step}
"""


@pytest.fixture
def config(tmp_path, toy):
    (tmp_path / "toy.yaml").write_text(CONFIG + f"work_dir: {tmp_path}\n")
    return lambda *overrides: load_config(str(tmp_path / "toy.yaml"), list(overrides))


# ---------------------------------------------------------------------------------------------------------------------
# Exactness
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("transform", [TEN, Transform(16, flip=True), Transform(16)], ids=["ten", "flip", "plain"])
def test_batches_equal_those_from_pictures(tmp_path, transform):
    """Order, labels and view of every position, at any place of the run and on any rank, with workers and without."""
    tokenizer = ToyCodes()
    store = make(tmp_path / "s", transform=transform)
    assert np.load(tmp_path / "s" / "codes.npy").dtype == np.uint16
    for seen, rank, world, workers in ((0, 0, 1, 0), (8, 1, 2, 0), (40, 0, 2, 1)):
        pictures = Loader(SOURCE, transform, 3, 8, rank, world)
        stored = Loader(None, store.transform, 3, 8, rank, world, stored=store, workers=workers)
        for a, b in itertools.islice(zip(pictures.batches(seen), stored.batches(seen)), 6):
            assert torch.equal(a.labels, b.labels) and torch.equal(a.positions, b.positions)
            assert torch.equal(tokenizer.encode(to_model_range(a.images)), tokenizer.from_stored(b.stored))
    assert store.fingerprint() == SOURCE.fingerprint()


def trained(config) -> dict[str, torch.Tensor]:
    assert train(config) == 0
    (weights,) = config.run_dir.glob("checkpoints/*8/generator.safetensors")
    return load_file(weights)


def test_training_from_tokens_equals_training_from_pictures(tmp_path, config):
    store = make(tmp_path / "s")
    plain = trained(config("name=a"))
    kept = trained(config("name=b", "data.cache_latents=true", f"data.cache_dir={tmp_path / 'cache'}"))
    stored = trained(config("name=c", f"data.url=tokens://{store.path}"))
    assert all(torch.equal(plain[name], other[name]) for other in (kept, stored) for name in plain)
    half = config("name=d", f"data.url=tokens://{store.path}", "train.duration=4step")
    assert train(half) == 0
    rest = trained(config("name=d", f"data.url=tokens://{store.path}"))  # goes on at step 4
    assert all(torch.equal(plain[name], rest[name]) for name in plain)


# ---------------------------------------------------------------------------------------------------------------------
# Other kinds of latents
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "spec",
    [
        Codes(16, 2, 1 << 16, 8, (4, 4), ("vis", "sem")),
        Codes(5, 1, 70_000, 4),
        MultiScale((1, 2, 3), 2, 4096, 32),
        Continuous((4, 4), 6),
    ],
    ids=str,
)
def test_every_kind_of_latents(tmp_path, spec):
    """Two codebooks, a codebook beyond 16 bits, codes at several scales, real vectors."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(240, 16, 12, generator=generator)
    if not isinstance(spec, Continuous):
        rows = torch.randint(spec.vocab, (240, *tokens.shape_of(spec)), generator=generator)
        rows[0, 0, 0] = spec.vocab - 1
    rest = iter(rows.split(40))
    store = tokens.build(tmp_path / "s", SOURCE, TEN, spec, lambda images: next(rest), "f", Pass(batch=4))
    assert store.spec == spec and tokens.spec_from_json(json.loads(json.dumps(tokens.spec_to_json(spec)))) == spec
    got = store.tokens(list(range(24)) * 10, [v for v in range(10) for _ in range(24)])
    assert torch.equal(got.reshape(10, 24, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape), rows)
    assert store.rows(tokens.array_of(spec)).dtype == (
        "float32" if isinstance(spec, Continuous) else "uint32" if spec.vocab > 1 << 16 else "uint16"
    )
    store.check_tokenizer(spec, "f", 16)
    store.verify()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------
def test_tokens_of_another_tokenizer(tmp_path, config):
    store = make(tmp_path / "s")
    url = f"data.url=tokens://{store.path}"
    for overrides, message in (
        ([url, "tokenizer.salt=1"], "made by another tokenizer"),
        ([url, "tokenizer.vocab=8"], r"holds 3 x 16 codes from 16; the tokenizer makes .* \(vocab 16, not 8\)"),
        ([url, "tokenizer.branches=2"], "branches 3, not 2"),
        ([url, "tokenizer.image_size=32", "tokenizer.patch_size=8"], "of 16 pixels, the tokenizer works on 32"),
        (["data.url=tokens:///nowhere"], "no token store /nowhere"),
        ([url + "?x=1"], 'tokens:// has no option "x"'),
    ):
        with pytest.raises(UserError, match=message):
            train(config(*overrides))
    with pytest.raises(UserError, match="a tokenizer trains on pictures"):
        check_inputs(config(url, "task=tokenizer", "objective={name: image}"))


def test_codes_out_of_range(tmp_path):
    for shape, value, message in (
        ((16, 3), 99, r"code 99 does not exist, the codebook has 16 entries \(0 to 15\)"),
        ((4, 3), 0, r"codes have shape \[4, 3\], the tokenizer makes 3 x 16 codes"),
    ):
        with pytest.raises(UserError, match=message):
            tokens.build(
                tmp_path / "s",
                SOURCE,
                TEN,
                ToyCodes().spec,
                lambda images: torch.full((len(images), *shape), value),
                "f",
            )
    store = make(tmp_path / "s")
    with open(store.path / "codes.npy", "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x10\x00")
    damaged = TokenStore(store.path)
    with pytest.raises(UserError, match="code 16 does not exist"):
        damaged.check_tokenizer(store.spec, store.tokenizer, 16)
    with pytest.raises(UserError, match="samples 0 to 23 are not what was written"):
        damaged.verify()


def test_a_cache_of_features_is_not_a_token_store(tmp_path):
    from data.cache import build

    build(tmp_path / "c", SOURCE, TEN, lambda images: {"x": images[:, :, 0, 0].float()}, "f")
    with pytest.raises(UserError, match="holds x, not tokens"):
        TokenStore(tmp_path / "c")
    with pytest.raises(UserError, match="holds tokens, not pictures"):
        make(tmp_path / "s")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Size and speed
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """12.8 million rows of 256 tokens, 6.6 GB, as sparse files."""
    folder = tmp_path_factory.mktemp("store") / "imagenet"
    folder.mkdir()
    samples, spec = 1_281_168, Codes(256, 1, 1024, 256, (16, 16))
    for name, shape, dtype in (("codes", (samples, 10, 256, 1), "uint16"), ("labels", (samples,), "int32")):
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
    (folder / "description.json").write_text(
        json.dumps(
            {
                "format": FORMAT,
                "samples": samples,
                "views": 10,
                "chunk": 256,
                "source": "s",
                "producer": "f",
                "content": "c",
                "transform": Transform(256, crop="ten").describe(),
                "arrays": {"codes": {"shape": [256, 1], "dtype": "uint16"}},
                "facts": tokens.facts(spec, [str(i) for i in range(1000)]),
            }
        )
    )
    return folder


def test_opening_millions_of_rows_takes_no_time_and_no_memory(imagenet):
    """Two processes, as two ranks: their private memory does not grow by the 6.6 GB that both can read."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from data.tokens import TokenStore
def kilobytes(kind):  # of this process
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith(kind))
def private():
    return kilobytes("Anonymous:")
def read():  # from files, by reading them and by looking at what is mapped
    return int(open("/proc/self/io").readline().split()[1]) // 1000 + kilobytes("Rss:") - private()
before, start = private(), read()
store = TokenStore({str(imagenet)!r})
store.check_range()
opened = read() - start
for i in range(0, len(store) - 1000, len(store) // 100):
    store.tokens(range(i, i + 1000), [i % 10] * 1000)
print(opened, private() - before)
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        opened, grown = map(float, run.communicate(timeout=600)[0].split())
        assert opened < 100_000, f"{opened / 1000:.0f} MB of 6,600 read to open it"
        assert grown < 30_000, f"{grown / 1000:.0f} MB of private memory"


def test_loader_is_quicker_than_any_training(tmp_path):
    """Order, views and gathering from the map take a few calls for a sample: the network is what takes time."""
    spec = Codes(256, 1, 1024, 256, (16, 16))
    store = tokens.build(tmp_path / "s", SOURCE, TEN, spec, lambda images: torch.zeros(len(images), 256, 1).long(), "f")
    batches = Loader(None, store.transform, 0, 1024, stored=store).batches()
    next(batches)
    with calls() as made:
        for _ in range(10):
            batch = next(batches)
    assert batch.stored.shape == (1024, 256, 1)
    assert made.count < 30 * 10 * 1024  # 16 for a sample; one picture alone takes hundreds
