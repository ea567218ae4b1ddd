"""Official files of every system: what their trainers store is read and asked for, and exports are what the original
programs read. Those readers are stated here again from the specs (section on checkpoints), in a line or two each."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import pytest
import torch

from core.errors import UserError
from core.weights import exports
from core.weights import files as weight_files
from core.weights.names import NEVER_WEIGHTS, matching
from run.convert import unrecorded
from run.load import REGISTRIES
from run.weights import ADAPTERS, read_weights
from scripts import convert
from tests.conftest import ROOT

VIT = {"width": 64, "layers": 1, "heads": 1}
TINY = {"width": 192, "layers": 1, "heads": 4}
RECTOK = {"image_size": 32, "channels": 8, "encoder": TINY, "decoder": TINY}
CONV = {"image_size": 32, "channels": 32, "channel_mult": [1, 1], "res_blocks": 1, "vocab": 20, "code_dim": 8}
SCALES = [1, 2]
DECODER = {"width": 32, "layers": 1, "heads": 2, "hidden": 32}
CODES = {"length": 4, "vocab": 20, "num_classes": 3}
# name -> kind of network, name of its class, settings.
MODELS = {
    "rectok": ("tokenizer", "rectok", {**RECTOK, "semantic": {"teachers": {"dinov3": 12}, "size": TINY}}),
    "rectok mlp": (
        "tokenizer",
        "rectok",
        {**RECTOK, "mask_ratio": 0.0, "semantic": {"teachers": {"dinov3": 12, "siglip": 8}, "decoder": "mlp"}},
    ),
    "dit_dh": (
        "generator",
        "dit_dh",
        {
            "size": {
                "trunk_width": 48,
                "trunk_depth": 1,
                "trunk_heads": 4,
                "head_width": 64,
                "head_depth": 2,
                "head_heads": 2,
            },
            "channels": 8,
            "grid": 2,
            "num_classes": 3,
        },
    ),
    "fqgan": (
        "tokenizer",
        "fqgan",
        {
            "image_size": 32,
            "size": [1, 1],
            "channels": 32,
            "res_blocks": 1,
            "z_channels": 8,
            "vocab": 20,
            "code_dim": 4,
            "adapter_layers": 1,
            "usage_window": 16,
        },
    ),
    "far": ("generator", "far", {"size": {**DECODER, "head_layers": 1}, "branches": 2, "grid": [2, 2], **CODES}),
    "maskgit_vqgan": ("tokenizer", "maskgit_vqgan", CONV),
    "vqgan_plus": ("tokenizer", "vqgan_plus", CONV),
    "titok": (
        "tokenizer",
        "titok",
        {
            "image_size": 32,
            "decoder_patch_size": 8,
            "encoder": VIT,
            "decoder": VIT,
            "latents": 5,
            "vocab": 20,
            "code_dim": 4,
            "normalise": True,
        },
    ),
    "rar": ("generator", "rar", {"size": DECODER, **CODES}),
    "rear": (
        "generator",
        "rar",
        {"size": DECODER, "rear": {"projection": 8, "decode_layer": 0}, "code_dim": 6, **CODES},
    ),
    "dar": (
        "tokenizer",
        "dar",
        {
            "image_size": 32,
            "patch_size": 8,
            "encoder_width": 32,
            "encoder_layers": 1,
            "groups": 4,
            "condition_width": 32,
            "condition_layers": 1,
            "length": 16,
            "steps": 4,
            "vocab": 32,
            "head_dim": 16,
            "usage_window": 64,
            "decoder": {"width": 32, "depth": 1, "patch_size": 4},
        },
    ),
    "gpt": ("generator", "gpt", {"size": DECODER, **CODES}),
    "imagefolder": (
        "tokenizer",
        "imagefolder",
        {
            "image_size": 32,
            "encoder": VIT,
            "decoder": VIT,
            "latent_grid": 2,
            "scales": SCALES,
            "vocab": 20,
            "code_dim": 6,
            "start_drop": 1,
        },
    ),
    "var": (
        "generator",
        "var",
        {"depth": 2, "width": 32, "heads": 2, "scales": SCALES, "vocab": 20, "code_dim": 6, "num_classes": 3},
    ),
}


def first(*keys):
    """The entry of a file under the first of `keys` that is there, else the file itself as a state dict."""
    return lambda file: next((file[key] for key in keys if key in file), file)


def only(*keys):
    return lambda file: next(file[key] for key in keys if key in file)


def entry(*path):
    def read(file):
        for key in path:
            file = file[key]
        return file

    return read


# How the original programs open a file: (what they look for, whether those are averaged weights where there are two sets).
LLAMAGEN = [(only("model", "module", "state_dict"), False)]
READERS = {
    "rectok": [(first("model_ema", "model"), True), (first("model"), False)],
    "fqgan": [(only("ema", "model", "state_dict"), True), (entry("model"), False)],
    "far": [(only("ema", "model"), True), *LLAMAGEN],
    "bare": [(lambda file: file, True)],
    "dar": [(first("ema", "model"), True), (first("model"), True)],
    "gpt": [(first("model", "module", "state_dict"), True)],
    "imagefolder": [(only("ema", "model", "state_dict"), True)],
    "var": [(entry("trainer", "var_wo_ddp"), True)],
}
READS = {
    "rectok mlp": "rectok",
    "dit_dh": "rectok",
    "maskgit_vqgan": "bare",
    "vqgan_plus": "bare",
    "titok": "bare",
    "rar": "bare",
    "rear": "bare",
}


def build(name: str, seed: int):
    kind, cls, settings = MODELS[name]
    torch.manual_seed(seed)
    network = REGISTRIES[kind].build({"name": cls, **settings})
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape))
    return network


def adapter_of(name: str):
    return ADAPTERS[MODELS[name][0]][MODELS[name][1]]


def official(name: str, seed: int = 1) -> dict[str, torch.Tensor]:
    return {
        n: t.detach().clone(memory_format=torch.contiguous_format)
        for n, t in adapter_of(name).restore(build(name, seed)).items()
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("keep", ["both", "ema", "raw"])
@pytest.mark.parametrize("name", MODELS)
def test_exports_are_what_the_original_programs_read(name, keep, tmp_path, capsys):
    kind, cls, settings = MODELS[name]
    states = {averaged: build(name, 2 - averaged).state_dict() for averaged in (True, False)}
    weight_files.save(
        tmp_path / "ours.safetensors",
        weight_files.WeightFile(kind, {"name": cls, **settings}, states[True], raw=states[False]),
    )
    assert (
        convert.main(
            [str(tmp_path / "ours.safetensors"), str(tmp_path / "out.pth"), "--to", "official", "--weights", keep]
        )
        == 0
    )
    said = capsys.readouterr().out
    file = torch.load(tmp_path / "out.pth", weights_only=True)  # as torch's own default reads it
    raw_only = adapter_of(name).container.raw_only
    for read, averaged in READERS[READS.get(name, name)]:
        wanted = official(name, {"both": 1 if averaged else 2, "ema": 1, "raw": 2}[keep])
        found = read(file)
        if found.keys() != wanted.keys():  # EMA dictionaries have no buffers
            wanted = {n: t for n, t in wanted.items() if n not in raw_only}
        assert same(found, wanted), (name, keep)
    assert ("--semantic_guide none" in said) == (name == "imagefolder")
    assert ("--tokenizer FILE" in said) == (name == "var")


def test_an_exported_var_can_hold_its_tokenizer(tmp_path):
    for name in ("imagefolder", "var"):
        kind, cls, settings = MODELS[name]
        weight_files.save(
            tmp_path / f"{name}.safetensors",
            weight_files.WeightFile(kind, {"name": cls, **settings}, build(name, 1).state_dict()),
        )
    out = tmp_path / "out.pth"
    assert (
        convert.main(
            [
                str(tmp_path / "var.safetensors"),
                str(out),
                "--to",
                "official",
                "--tokenizer",
                str(tmp_path / "imagefolder.safetensors"),
            ]
        )
        == 0
    )
    trainer = torch.load(out, weights_only=True)["trainer"]
    assert same(trainer["vae_local"], official("imagefolder")) and same(trainer["var_wo_ddp"], official("var"))
    # And back: the tokenizer in the file tells how many branches there are.
    assert read_weights("generator", str(out)).settings["branches"] == 2
    with pytest.raises(UserError, match="hold no tokenizer"):
        convert.main(
            [
                str(tmp_path / "imagefolder.safetensors"),
                str(tmp_path / "x.pth"),
                "--to",
                "official",
                "--tokenizer",
                str(tmp_path / "imagefolder.safetensors"),
            ]
        )


# What has to be said of a file whose sizes nobody published, and where else it may be said: name -> (settings, stored).
ASKED = {
    "far": ({"size": {"heads": 2}}, {}),
    "gpt": ({"size": {"heads": 2}}, {}),
    "dar": ({"length": 16, "groups": 4}, {"config": {"model": {"num_all_queries": 16, "num_query_groups": 4}}}),
    "titok": ({"normalise": True}, {"config": {"model": {"vq_model": {"use_l2_norm": True}}}}),
    "vqgan_plus": ({"normalise": False}, {"config": {"use_l2_norm": False}}),
    "imagefolder": ({"scales": SCALES}, {"args": argparse.Namespace(v_patch_nums=SCALES)}),
    "var": ({"branches": 2}, {"args": {"product_quant": 2}}),
}


def holds(settings: dict, given: dict) -> bool:
    return all(holds(settings[k], v) if isinstance(v, dict) else settings[k] == v for k, v in given.items())


@pytest.mark.parametrize("name", MODELS)
def test_what_no_tensor_tells_is_asked_for(name, tmp_path, capsys):
    """Wrong facts fit every shape, so they are never guessed: they come from the file, from the user, or not at all."""
    kind, _cls, settings = MODELS[name]
    state, path = official(name), tmp_path / "theirs.pt"
    given, stored = ASKED.get(name, ({}, {}))
    torch.save({"model": state}, path)
    if not given:
        told = read_weights(kind, str(path)).settings
        assert all(told[key] == value for key, value in settings.items() if key in told and not isinstance(value, dict))
        return
    keys = [
        f"{key}.{part}" if isinstance(value, dict) else key
        for key, value in given.items()
        for part in (value if isinstance(value, dict) else [None])
    ]
    with pytest.raises(
        UserError, match="these weights do not tell .*; give " + ".*".join(f"{kind}.{k}=" for k in keys)
    ):
        read_weights(kind, str(path))
    assert convert.main(["--describe", str(path)]) == 0 and "not in the file: " in capsys.readouterr().out
    weights = read_weights(kind, str(path), given)
    assert holds(weights.settings, given)
    weights.load(REGISTRIES[kind].build({**weights.settings, **settings}))
    if stored:
        torch.save({"model": state, **stored}, path)
        assert holds(read_weights(kind, str(path)).settings, given)
    words = [
        f"{k}={next(iter(given.values()))[k.partition('.')[2]] if '.' in k else given[k]}".replace(" ", "")
        for k in keys
    ]
    torch.save({"model": state}, path)
    assert convert.main([str(path), str(tmp_path / "ours.safetensors"), "--set", *words]) == 0
    assert holds(weight_files.read(tmp_path / "ours.safetensors").settings, given)


# Names as wrappers leave them.
WRAPPED = {
    "ddp": lambda n: f"module.{n}",
    "compiled": lambda n: f"_orig_mod.{n}",
    "both": lambda n: f"module._orig_mod.{n}",
    "of a class": lambda n: f"model.{n}",
    "all": lambda n: f"module.model._orig_mod.{n}",
    "fsdp": lambda n: "_fsdp_wrapped_module." + n.replace(".", "._fsdp_wrapped_module.", 1),
}
LEFT_BEHIND = {
    "freqs_cis": torch.zeros(3, 2),
    "causal_mask": torch.full((2, 2), -torch.inf),
    "n_averaged": torch.tensor(3),
    "layers.0.attention.kv_cache.k_cache": torch.full((1, 1, 4, 8), torch.nan),
    "blocks.0.attn.cached_k": torch.zeros(2),
    "sem_foundation_models.dinov3.embeddings.cls_token": torch.zeros(1, 1, 4),
    "semantic_model.cls_token": torch.zeros(2),
    "teacher.weight": torch.zeros(2),
}


@pytest.mark.parametrize("name", MODELS)
def test_wrappers_caches_and_teachers_do_not_matter(name):
    adapter, state, model = adapter_of(name), official(name), build(name, 9)
    wanted = build(name, 1).state_dict()
    for rename in WRAPPED.values():
        for extra in ({}, LEFT_BEHIND):
            adapter.load(model, {"model": {rename(n): t for n, t in {**state, **extra}.items()}})
            counters = {n for n in wanted if n.endswith((".updates", ".scaling", "codebook_used"))}
            assert all(torch.equal(wanted[n], t) for n, t in model.state_dict().items() if n not in counters)
    # A class around the network has other things beside it.
    around = {**{f"model.{n}": t for n, t in state.items()}, "loss.weight": torch.zeros(2)}
    adapter.load(model, around)
    for n in model.state_dict():  # nothing of ours is taken for one of those
        assert matching(n, NEVER_WEIGHTS) is None


@pytest.mark.parametrize("name", MODELS)
def test_tensors_that_are_no_weights_are_named(name, tmp_path):
    adapter, state, model = adapter_of(name), official(name), build(name, 9)
    ignored = adapter.names.ignored_in(state)
    victim = max((n for n in state if n not in ignored and state[n].is_floating_point() and "used" not in n), key=len)
    for change, what in (
        (lambda t: torch.full_like(t, torch.nan), "NaN or infinite"),
        (lambda t: t / 0, "NaN or infinite"),
        (lambda t: t.long(), "int64|floating-point"),
        (lambda t: t.to(torch.complex64), "complex64"),
    ):
        with pytest.raises(UserError, match=what):
            adapter.load(model, {**state, victim: change(state[victim])})


@pytest.mark.parametrize("settings", [[1], "x", {}, {"name": 3}, None])
@pytest.mark.parametrize("whole", [False, True])
def test_headers_of_our_files_that_say_nothing(tmp_path, settings, whole):
    import json

    from safetensors.torch import save_file

    about = settings if whole else {"kind": "tokenizer", "settings": settings, "provenance": {}}
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {weight_files.KEY: json.dumps(about)})
    with pytest.raises(UserError, match='header entry "tessera" is not what Tessera writes') as said:
        weight_files.read(tmp_path / "x.safetensors")
    assert not re.search("object|attribute|Error|NoneType|subscript|indices", str(said.value))


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
@pytest.mark.parametrize("write", ["save_file(tensors, place)", "torch.save(tensors, place)"])
def test_a_disk_that_is_full_is_one_sentence(tmp_path, write):
    """Files of at most 4 KB stand for it: the libraries say it in exceptions of their own."""
    code = f"""if True:
        import resource, signal, sys, torch
        from core import cli
        from core.weights.files import replace_with
        from safetensors.torch import save_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        tensors = {{"w": torch.zeros(9000)}}
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        cli.run(lambda _: replace_with({str(tmp_path / "x")!r}, lambda place: {write}))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "x could not be written" in done.stderr, (
        done.stderr
    )
    assert not list(tmp_path.iterdir())


def test_a_set_that_is_alone_keeps_its_name(tmp_path, capsys):
    """Raw weights are not called averaged on the way through our format, and are not put where averaged ones lie."""
    torch.save({"model": official("fqgan")}, tmp_path / "a.pt")
    assert convert.main([str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors")]) == 0
    assert convert.main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.pt"), "--to", "official"]) == 0
    assert "in the official layout, raw weights" in capsys.readouterr().out
    assert list(torch.load(tmp_path / "c.pt", weights_only=True)) == ["model", exports.KEY]
    with pytest.raises(UserError, match="holds no averaged .EMA. weights"):
        convert.main([str(tmp_path / "b.safetensors"), str(tmp_path / "d.pt"), "--to", "official", "--weights", "ema"])


@pytest.mark.parametrize(
    "name, shown",
    [
        ("far", "heads ?"),
        ("var", "scales [1, 2], mlp_ratio 4.0, num_classes 3, branches ?"),
        ("dar", "length ?, groups ?"),
    ],
)
def test_describe_marks_what_is_open(name, shown, tmp_path, capsys):
    """Not the stand-in with which the shapes are checked; VAR's table of scales is in its file, and read."""
    torch.save(official(name), tmp_path / "a.pt")
    assert convert.main(["--describe", str(tmp_path / "a.pt")]) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, change, lost",
    [
        (
            "rectok",
            {part: {"width": 96, "layers": 1, "heads": 3} for part in ("encoder", "decoder")},
            ["encoder.heads 3", "decoder.heads 3"],
        ),
        ("far", {}, ["size.heads 2", "length 4"]),
        (
            "dar",
            {"decoder": {"width": 32, "depth": 1, "patch_size": 4, "time_shift": 3.0}},
            ["length 16", "groups 4", "image_size 32", "steps 4", "decoder.time_shift 3.0"],
        ),
    ],
)
def test_exports_list_once_what_they_do_not_say(name, change, lost):
    kind, cls, settings = MODELS[name]
    settings, adapter = {**settings, **change}, adapter_of(name)
    official_state = adapter.restore(REGISTRIES[kind].build({"name": cls, **settings}))
    said = unrecorded(adapter, settings, official_state, REGISTRIES[kind].signature(cls))
    assert [text for text in said if not text.startswith("grid")] == lost


def test_var_tells_the_scales_of_the_tokenizer_beside_it():
    loaded = {"trainer": {"config": {"patch_nums": (1, 2)}, "vae_local": official("imagefolder"), "var_wo_ddp": {}}}
    assert adapter_of("imagefolder").describe(loaded)["scales"] == SCALES


def test_programs_take_the_keys_that_they_ask_for(tmp_path, capsys):
    """Everything that opens a tokenizer alone answers an open question with the key to give; it takes that key."""
    from PIL import Image

    from run import evaluate as evaluation
    from scripts import evaluate, reconstruct

    Image.new("RGB", (40, 40), (200, 30, 60)).save(tmp_path / "red.png")
    torch.save(official("dar"), tmp_path / "a.pt")
    words = ["--weights", str(tmp_path / "a.pt"), str(tmp_path / "red.png"), "--out", str(tmp_path / "out")]
    known = ["tokenizer.length=16", "tokenizer.groups=4", "tokenizer.image_size=32"]
    with pytest.raises(UserError, match="give tokenizer.length=... tokenizer.groups=..."):
        reconstruct.main(words)
    assert reconstruct.main(words + known) == 0 and "1 x 16 codes from 32" in capsys.readouterr().out
    options, settings = evaluate.parse([str(tmp_path / "a.pt"), str(tmp_path), "eval.num_images=1", *known])
    assert options.tokenizer == {"length": 16, "groups": 4, "image_size": 32} and settings == ["eval.num_images=1"]
    assert evaluation.with_protocol(options.weights, settings, options.tokenizer)[0] == "eval.protocol=dar"


def test_a_file_of_vars_trainer_samples_with_the_tokenizer_in_it(tmp_path):
    """No other is asked for, and one that is named wins."""
    from run.target import read_target

    loaded = {
        "trainer": {
            "config": {"patch_nums": SCALES},
            "vae_local": official("imagefolder"),
            "var_wo_ddp": official("var"),
        }
    }
    torch.save(loaded, tmp_path / "ar-ckpt-last.pth")
    torch.save(
        {"model": official("imagefolder"), "args": argparse.Namespace(v_patch_nums=SCALES)}, tmp_path / "codes.pt"
    )
    torch.save({"trainer": {"var_wo_ddp": official("var")}}, tmp_path / "alone.pth")
    config = read_target(str(tmp_path / "ar-ckpt-last.pth"), []).config
    assert config.tokenizer == {"weights": str(tmp_path / "ar-ckpt-last.pth")} and config.generator["branches"] == 2
    named = f"tokenizer.weights={tmp_path / 'codes.pt'}"
    assert read_target(str(tmp_path / "ar-ckpt-last.pth"), [named]).config.tokenizer["weights"].endswith("codes.pt")
    with pytest.raises(UserError, match="Say which tokenizer"):
        read_target(str(tmp_path / "alone.pth"), [])


def test_a_gpt_of_several_codebooks_has_no_official_layout():
    """D-AR's program could not read one; our own files hold it."""
    from generator.ar.gpt import GPT

    model = GPT(
        size={"width": 32, "layers": 1, "heads": 2, "head_layers": 1, "hidden": 32},
        length=4,
        branches=2,
        vocab=8,
        num_classes=3,
    )
    with pytest.raises(UserError, match="no official layout of a GPT of 2 codebooks"):
        ADAPTERS["generator"]["gpt"].restore(model)
