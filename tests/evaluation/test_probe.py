"""The linear probe: it finds what is linear, says what it used, and computes features once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.rng import hash64
from core.specs import Codes, Continuous, Recon, Tokenizer
from core.weights import files as weight_files
from evaluation import probe
from evaluation.probe import ProbeSettings, train_probe
from run.linear_probe import settings_of
from scripts import linear_probe
from tests.conftest import ROOT
from tests.tools import known_answer


def features(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes, each a direction in eight dimensions, in noise."""
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return noise + 3 * torch.eye(8)[labels] + 50, labels  # a mean far from zero, as BatchNorm is there for


def test_finds_classes_and_nothing_in_noise():
    settings = ProbeSettings(epochs=8, batch=32, lr=1e-2)
    found = train_probe(*features(300, 0), *features(150, 1), 3, settings)
    assert found.last > 0.9 and found.best >= found.last and len(found.curve) == 8
    again = train_probe(*features(300, 0), *features(150, 1), 3, settings)
    assert again.curve == found.curve
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    assert train_probe(noise, torch.arange(300) % 3, noise[:90].flip(1), torch.arange(90) % 3, 3, settings).last < 0.6
    with pytest.raises(UserError, match="0 to 2 for 2 classes"):
        train_probe(*features(30, 0), *features(30, 1), 2)


def test_features_of_any_tokenizer():
    class Grid(Tokenizer):
        spec = Continuous((2, 2), 3)

        def encode(self, images, draws=None):
            return torch.nn.functional.adaptive_avg_pool2d(images, 2)

        def decode(self, latents, draws=None):
            return torch.nn.functional.interpolate(latents, scale_factor=2)

        def precompute(self, images):
            return self.encode(images)

        def from_stored(self, stored, draws=None):
            return stored

        def forward(self, images, draws):
            return Recon(self.decode(self.encode(images)))

    class Coded(Grid):
        spec = Codes(4, 2, 5, 6, (2, 2), ("form", "hue"))

        def encode(self, images, draws=None):
            return torch.zeros(len(images), 4, 2, dtype=torch.int64)

        def embed(self, codes):
            return torch.arange(6.0).expand(*codes.shape, 6)

    images = torch.randn(2, 3, 4, 4)
    assert {k: tuple(v.shape) for k, v in probe.probe_features(Grid(), images).items()} == {"latents": (2, 4, 3)}
    shapes = {k: tuple(v.shape) for k, v in probe.probe_features(Coded(), images).items()}
    assert shapes == {"form": (2, 4, 6), "hue": (2, 4, 6), "all": (2, 4, 12)}


def asked_pictures(patch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of pictures of each batch that a tokenizer is asked the features of."""
    asked, features = [], probe.probe_features

    def counted(tokenizer, images):
        asked.append(len(images))
        return features(tokenizer, images)

    patch.setattr(probe, "probe_features", counted)
    return asked


def test_features_belong_to_what_encodes(tmp_path, monkeypatch, capsys):
    """They are kept for every tokenizer that encodes alike, and those of an earlier version for the tokenizer they are of."""
    monkeypatch.chdir(tmp_path)
    content = weight_files.read(ROOT / "pretrained_models" / "tiny" / "fqgan" / "tokenizer.safetensors")
    for name, changed in (("first", ()), ("decoder", ("decoder.",)), ("other", ("encoder.",))):
        weights = {key: t + 0.01 if key.startswith(changed or "-") else t for key, t in content.weights.items()}
        weight_files.save(tmp_path / f"{name}.safetensors", replace(content, weights=weights))
    asked, data = asked_pictures(monkeypatch), "synthetic://?size=32&classes=2&count=8&seed={split}"

    def probed(name: str) -> int:
        """How many pictures were encoded."""
        asked.clear()
        assert linear_probe.main([f"{name}.safetensors", data, "--epochs", "1", "--workers", "0", "--again"]) == 0
        return sum(asked) - 1

    assert probed("first") == 16 and probed("decoder") == 0 and probed("other") == 16
    records = [
        json.loads(path.read_text())["context"] for path in sorted(tmp_path.glob("work_dirs/eval/*/metrics.json"))
    ]
    assert len({record["weights_fingerprint"] for record in records}) == 3  # which model cards go by
    assert len({record["job"]["encoding_fingerprint"] for record in records}) == 2
    encoding, whole = records[1]["job"]["encoding_fingerprint"], records[1]["weights_fingerprint"]
    for job in (tmp_path / "work_dirs" / "cache").glob("probe_*/job.json"):  # as an earlier version kept them
        facts = json.loads(job.read_text())
        if facts["weights"] == f"encoding {encoding}":
            job.write_text(json.dumps({**facts, "weights": whole}))
            job.parent.rename(job.parent.with_name(f"probe_{hash64(facts['pictures'], whole):016x}"))
    assert probed("first") == 0 and probed("decoder") == 16


@pytest.mark.parametrize(("count", "epochs"), [(1_281_167, 10), (1724, 167), (48, 1000)])
def test_few_pictures_are_gone_through_more_often(count, epochs):
    """Ten epochs of few pictures are too few steps to learn anything."""
    options = linear_probe.parse(["w", "synthetic://"])
    assert settings_of(options, count).epochs == epochs
    assert settings_of(linear_probe.parse(["w", "--epochs", "3"]), count).epochs == 3


def test_command(tokenizer_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        str(tokenizer_run),
        "synthetic://?size=32&classes=4&count=60",
        "--workers",
        "0",
        "--out",
        "out",
        "--epochs",
        "3",
    ]
    assert linear_probe.main([*command, "--batch", "16"]) == 0
    out = capsys.readouterr().out
    assert "probe_top1_latents" in out and "linear probe" in out
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (
        0
        <= record["metrics"]["probe_top1_latents"]["value"]
        <= record["metrics"]["probe_top1_latents_best_epoch"]["value"]
        <= 1
    )
    assert record["context"]["settings"]["batch"] == 16 and record["context"]["views"].startswith("centre crop")
    with monkeypatch.context() as patch:
        asked = asked_pictures(patch)
        assert linear_probe.main([*command, "--batch", "16"]) == 0
        assert "measured before, in out" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"another evaluation \(different: settings\)"):
            linear_probe.main(command)
        assert linear_probe.main([*command, "--again"]) == 0
        assert {*asked} == {1}  # kept: of the pictures the tokenizer is not asked again
    for words, message in ((["--features", "x"], "offers no features x"),):
        with pytest.raises(UserError, match=message):
            linear_probe.main([*command, *words, "--again"])
    with pytest.raises(UserError, match="at least 2 classes"):
        linear_probe.main([str(tokenizer_run), "synthetic://?size=32&classes=1&count=9", "--check"])
    for name in ("train/a", "train/b", "val/a", "val/c"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name / "x.png")
    with pytest.raises(UserError, match="class 1 is b in train and c in val"):
        linear_probe.main([str(tokenizer_run), f"folder://{tmp_path}", "--check"])


def test_known_answers_are_compared_within_their_limits():
    good = {name: value + 0.9 * limit for name, (value, limit) in known_answer.PUBLISHED.items()}
    assert all(row[4] for row in known_answer.compare(good))
    assert [row[0] for row in known_answer.compare({**good, "fid_50k": 3.95}) if not row[4]] == ["fid_50k"]
    assert not any(row[4] for row in known_answer.compare({}))
