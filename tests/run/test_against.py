"""The original's side of the benchmark, on stand-ins: packages with the modules and classes that the systems' own have."""

from __future__ import annotations

import functools
import itertools
import json
import statistics

import pytest
import torch

from core.errors import UserError
from run import gpu_stages
from run.against import Originals, asked
from run.load import TOKENIZERS
from run.weights import constructor_arguments
from scripts.benchmark import main
from tests.conftest import ROOT, toy

NOTED = """
import json, types
import torch
from torch import nn

def note(name, *given, **named):
    shown = [list(v.shape) if isinstance(v, torch.Tensor) else v for v in given]
    named = {k: list(v.shape) if isinstance(v, torch.Tensor) else v for k, v in named.items()}
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps([name, shown, named], default=str) + "\\n")
    print("a print of theirs")

class Net(nn.Module):
    def __init__(self, *given, **named):
        super().__init__()
        note(type(self).__name__, *given, **named)
        self.w = nn.Parameter(torch.ones(1))

ModelArgs = types.SimpleNamespace
"""
BEGIN = "import torch\nfrom noted import Net, note, ModelArgs\n"
STAND_INS = {
    "rear": {
        "modeling/rar.py": """
class RAR(Net):
    def preprocess_condition(self, y, drop):
        return y
    def forward(self, tokens, condition, return_labels):
        return torch.zeros(*tokens.shape, 1024) * self.w, tokens
    def generate(self, y, **named):
        note("generate", y, **named)
""",
        "modeling/modules/maskgit_vqgan.py": """
class Encoder(Net):
    def forward(self, x):
        note("encode", x)
        return x
class Decoder(Net):
    def forward(self, z):
        note("decode", z)
class VectorQuantizer(Encoder):
    pass
""",
    },
    "fqgan": {
        "tokenizer/vq_model_dual.py": """
class VQModel(Net):
    def encode(self, x):
        note("encode", x)
    def decode_code(self, *given):
        note("decode", *given)
""",
        "autoregressive/models/far_dual.py": """
class Transformer(Net):
    def forward(self, idx_sem, idx_vis, cond_idx, targets_sem=None, targets_vis=None):
        assert idx_sem is targets_sem and idx_vis is targets_vis and idx_sem is not idx_vis
        return None, self.w.sum()
""",
        "autoregressive/models/generate_dual.py": """
def generate_fq(model, *given, **named):
    note("generate", *given, **named)
""",
    },
    "dar": {
        "tokenizer/tokenizer_image/vq_model.py": """
class VQModel(Net):
    def extract_code(self, x):
        note("encode", x)
    def decode_code(self, *given, **named):
        note("decode", *given, **named)
""",
        "autoregressive/models/gpt.py": """
class Transformer(Net):
    def forward(self, idx, cond_idx, targets):
        return torch.zeros(1), self.w.sum()
""",
        "autoregressive/models/generate.py": """
def generate(model, *given, **named):
    note("generate", *given, **named)
""",
    },
    "imagefolder": {
        "tokenizer/tokenizer_image/msvq_model.py": """
class VQModel(Net):
    def encode(self, x):
        note("encode", x)
    def fhat_to_img(self, x):
        note("decode", x)
VQ_models = {"VQ-16": VQModel}
""",
        "models/var.py": """
class VAR(Net):
    def forward(self, y, given):
        return torch.zeros(len(y), given.shape[1] + 1, 2 * 4096) * self.w
    def autoregressive_infer_cfg(self, **named):
        note("generate", **named)
""",
    },
    "rectok": {
        "models/rectok.py": """
class RecTok(Net):
    def tokenize(self, x):
        note("encode", x)
    def detokenize(self, x):
        note("decode", x)
""",
        "models/DDT.py": """
class DiTwDDTHead(Net):
    def forward(self, z, y):
        return {"loss": self.w}
    def net(self, z, t, y):
        note("generate", z, t, y)
        return z
""",
    },
}


@pytest.fixture
def checkout(tmp_path):
    """(folder with the stand-ins of all systems, function that gives what was noted and forgets it)."""
    folder = tmp_path / "their code"
    for name, source in {"noted.py": NOTED, **{k: v for files in STAND_INS.values() for k, v in files.items()}}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source if name == "noted.py" else BEGIN + source)
    notes = folder / "calls.jsonl"

    def noted() -> list:
        found = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        notes.unlink(missing_ok=True)
        return found

    return folder, noted


@functools.lru_cache(None)
def _told(system: str, kind: str) -> dict:
    config, _ = gpu_stages.SYSTEMS[system].config(kind, rehearse=False)
    config.train.precision, config.train.compile = "fp32", False
    settings = {**constructor_arguments(config.tokenizer)}
    with torch.device("meta"):
        if "pretrained" in TOKENIZERS.signature(settings["name"]):
            settings["pretrained"] = False
        spec = TOKENIZERS.build(settings).spec
    return asked(config, spec.sizes(), "", 2, torch.device("cpu"))


def told(system: str, what: str) -> dict:
    """Of the published recipes, on the CPU."""
    return {**_told(system, "tokenizer" if what in ("encode", "decode") else "generator"), "what": what}


# What each stand-in must have been given at the published sizes, beside its batch of 2: part of its arguments.
MADE = {
    "rear": (
        "RAR",
        "'hidden_size': 768, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'intermediate_size': 3072",
    ),
    "fqgan": ("Transformer", "dim=1024, n_layer=24, n_head=16, vocab_size=16384, num_classes=1000, block_size=256"),
    "dar": ("Transformer", "dim=1024, n_layer=24, n_head=16, vocab_size=16384, num_classes=1000, block_size=256"),
    "imagefolder": ("VAR", "'depth': 17, 'embed_dim': 1088, 'num_heads': 17, 'attn_l2_norm': True"),
    "rectok": (
        "DiTwDDTHead",
        "'hidden_size': [1152, 2048], 'depth': [28, 2], 'num_heads': [16, 16], 'num_classes': 1000",
    ),
}
GENERATED = {
    "rear": [
        [[2]],
        {"guidance_scale": 16.0, "randomize_temperature": 1.0, "guidance_scale_pow": 2.75, "kv_cache": True},
    ],
    "fqgan": [[[2], 256], {"cfg_scale": [2.0] * 2, "temperature": [1.0] * 2, "top_k": [0] * 2, "top_p": [1.0] * 2}],
    "dar": [[[2], 256], {"cfg_scale": "1.2,8.0", "temperature": 1.0, "top_k": 0, "top_p": 1.0}],
    "imagefolder": [[], {"B": 2, "label_B": [2], "cfg": 3.25, "top_k": 750, "top_p": 0.95}],
    "rectok": [[[4, 128, 16, 16], [4], [4]], {}],
}


def test_what_the_originals_are_asked_for(checkout, tmp_path, monkeypatch):
    """Also where Python knows a second checkout of ours, whose packages have the same names."""
    (tmp_path / "second").symlink_to(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "second"))
    folder, noted = checkout
    theirs = Originals(folder)
    for system, what in itertools.product(STAND_INS, ("generate", "train", "encode", "decode")):
        call = theirs.open(told(system, what))
        assert call is not None and 0 < call() < 5 and call() > 0
        calls = noted()
        if what == "generate":
            name, part = MADE[system]
            ((_, given, named),) = [call for call in calls if call[0] == name]
            assert part in f"{given} {named}".replace('"', "")
            assert calls[-1] == ["generate", *GENERATED[system]]
        elif what != "train":
            assert sum(call[0] == what for call in calls) >= 3  # the first, and two that were timed
            if what == "encode":
                assert calls[-1][1][0] == [2, 3, 256, 256]
    tokenizers = told("rear", "decode")
    assert "generator" not in tokenizers and theirs.open({**tokenizers, "what": "train"}) is None
    theirs.close()


def test_both_sides_in_one_run(checkout, tmp_path, capsys, monkeypatch):
    folder, noted = checkout
    record = tmp_path / "rows.json"
    words = [toy("rear"), "--tokenizer-config", toy("vqgan_plus_tokenizer"), "--what", "generate", "--batch", "2"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # as the shell programs set it: their packages have names of ours
    words += ["--device", "cpu", "--repeats", "2", "--warmup", "1", "--json", str(record), "--against", str(folder)]
    (folder / "modeling" / "rear.py").write_text((folder / "modeling" / "rar.py").read_text().replace("RAR", "reAR"))
    assert main(words) == 0
    (row,) = json.loads(record.read_text())
    assert row["times_original"] == statistics.median(row["ratios"]) and len(row["ratios"]) == 2
    assert "generate, batch 2, eager:" in (out := capsys.readouterr().out) and "times as fast as the original" in out
    # one to see that it runs, one for ours' first, then warm-up and repeats; reAR's own cache does not run
    assert [call[0] for call in noted()] == ["reAR"] + ["generate"] * 5


def test_a_checkout_that_is_another(checkout, tmp_path):
    folder, _ = checkout
    (folder / "modeling" / "rar.py").unlink()
    with pytest.raises(UserError, match=r"rar's generate does not run there \(ImportError: none of .*modeling.rar:RAR"):
        Originals(folder).open(told("rear", "generate"))
    with pytest.raises(UserError, match="no such folder"):
        Originals(tmp_path / "nothing")
    (folder / "autoregressive" / "models" / "gpt.py").write_text("import os; os._exit(3)")
    with pytest.raises(UserError, match="ended with code 3"):
        Originals(folder).open(told("dar", "generate"))
