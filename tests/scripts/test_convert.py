"""scripts/convert.py: what a file holds, whether our model takes it, and there and back without a changed bit."""

from __future__ import annotations

import json

import pytest
import torch

from core.errors import UserError
from core.weights import exports, hub
from core.weights import files as weight_files
from core.weights.adapter import recognise
from core.weights.layouts import check_layout, compare, read_layout
from core.weights.names import Names
from generator.dit.dit_dh import DiTDH
from run.load import build, read_generator
from run.weights import ADAPTERS, read_weights
from scripts import convert
from tokenizer.continuous.rectok import RecTok

TINY = {"width": 192, "layers": 2, "heads": 4}
GENERATOR = ADAPTERS["generator"]["dit_dh"]
TOKENIZER = ADAPTERS["tokenizer"]["rectok"]


def dit(seed: int = 0) -> DiTDH:
    torch.manual_seed(seed)
    model = DiTDH(
        size={
            "trunk_width": 48,
            "trunk_depth": 2,
            "trunk_heads": 4,
            "head_width": 64,
            "head_depth": 2,
            "head_heads": 2,
        },
        channels=8,
        grid=4,
        num_classes=10,
    )
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    return model


def rectok(seed: int = 0) -> RecTok:
    torch.manual_seed(seed)
    semantic = {"teachers": {"dinov3": 40}, "size": TINY}
    return RecTok(image_size=64, channels=8, encoder=TINY, decoder=TINY, semantic=semantic)


def layout_of(adapter, model) -> dict:
    return {
        "tensors": {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in adapter.restore(model).items()}
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


@pytest.fixture
def released(tmp_path):
    """A file as the official trainer writes it, with raw and averaged weights that differ."""
    raw = GENERATOR.restore(dit(1))
    ema = {n: p.detach() for n, p in dit(2).named_parameters()}
    path = tmp_path / "released.pth"
    torch.save({"model": raw, "model_ema": ema, "optimizer": {"state": {}}, "epoch": 79}, path)
    return path


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[int, str]:
        code = convert.main([str(a) for a in arguments])
        return code, capsys.readouterr().out

    return call


# -- layouts ------------------------------------------------------------------------------------------------------------
MODELS = {"tokenizer": (TOKENIZER, rectok), "generator": (GENERATOR, dit)}
SIZE_GIVING = [
    "encoder.positional_embedding",
    "decoder.positional_embedding",
    "encoder.patch_embed.0.weight",
    "decoder.decoder_embed.weight",
    "sem_decoders.dinov3.out.weight",
    "x_embedder.proj.weight",
    "s_embedder.proj.weight",
    "pos_embed",
    "blocks.0.norm1.weight",
    "enc_feat_rope.freqs_cos",
    "blocks.3.attn.qkv.weight",
    "encoder.latent_head.bias",
    "final_layer.linear.weight",
]


@pytest.mark.parametrize("kind", MODELS)
def test_one_changed_tensor_is_named(kind, tmp_path, run):
    """Renamed, reshaped or missing, also where the model's sizes are read from that very tensor."""
    adapter, make = MODELS[kind]
    whole = layout_of(adapter, make())
    path = tmp_path / "layout.json"

    def verdict(tensors: dict) -> tuple[int, str]:
        path.write_text(json.dumps({"tensors": tensors}))
        return run("--check-layout", path)

    code, out = verdict(whole["tensors"])
    assert code == 0 and out.startswith("PASS") and "parameters" in out
    for name in SIZE_GIVING:
        if name not in whole["tensors"]:
            continue
        shape, dtype = whole["tensors"][name]
        rest = {n: entry for n, entry in whole["tensors"].items() if n != name}
        changes = {"missing": rest, "renamed": {**rest, f"{name}_": [shape, dtype]}}
        for place in range(len(shape)):
            other = [size + (i == place) for i, size in enumerate(shape)]
            changes[f"reshaped {other}"] = {**rest, name: [other, dtype]}
        for what, tensors in changes.items():
            code, out = verdict(tensors)
            assert code == 1 and out.startswith("FAIL") and name in out, (name, what, out)


def test_tensors_that_a_wrong_size_was_read_from_are_named():
    """Everything else has 8 channels: the tensors that differ are named, and those that the sizes were read from."""
    layout = layout_of(GENERATOR, dit())
    layout["tensors"]["x_embedder.proj.weight"][0] = [64, 9, 1, 1]
    (said,) = check_layout(GENERATOR, layout)
    assert said.startswith("other shapes 3: s_embedder.proj.weight is [48, 8, 1, 1], the model has [48, 9, 1, 1], ")
    assert "final_layer.linear.bias is [8], the model has [9]; the sizes were read from " in said
    assert "x_embedder.proj.weight [64, 9, 1, 1]" in said


def test_layout_of_another_kind(tmp_path, run):
    path = tmp_path / "unknown.json"
    path.write_text(json.dumps({"tensors": {"conv1.weight": [[3, 3], "float32"]}}))
    code, out = run("--check-layout", path)
    assert code == 1 and "no adapter knows" in out and "conv1.weight" in out
    path.write_text(json.dumps({"tensors": {"a": [["x"], "float32"]}}))
    code, out = run("--check-layout", path)
    assert code == 1 and "not a recorded layout" in out


def test_containers_inside_a_layout():
    """Names with slashes are nested, and prefixes of wrappers do not matter."""
    tensors = layout_of(GENERATOR, dit())["tensors"]
    loaded = read_layout({"tensors": {f"model/module._orig_mod.{n}": entry for n, entry in tensors.items()}})
    assert recognise(ADAPTERS["generator"], loaded) == "dit_dh"
    assert compare(GENERATOR, loaded, exact=True).differences == []


# -- adapters -----------------------------------------------------------------------------------------------------------
def test_optional_tensors_come_all_or_not_at_all():
    from dataclasses import replace

    adapter = replace(
        TOKENIZER, names=Names(("encoder.*",), optional=("sem_decoders.*",)), fit=lambda state, model: state
    )
    without = {n: t for n, t in rectok(1).state_dict().items() if not n.startswith("sem_decoders.")}
    model = rectok(2)
    kept = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("sem_decoders.")}
    adapter.load(model, without)
    assert same(kept, {n: t for n, t in model.state_dict().items() if n.startswith("sem_decoders.")})
    assert torch.equal(model.encoder.latent_head.weight, without["encoder.latent_head.weight"])
    half = {**without, "sem_decoders.dinov3.out.bias": torch.zeros(40)}
    with pytest.raises(UserError, match="missing 27: sem_decoders"):
        adapter.load(model, half)


def test_buffers_that_an_ema_lacks_come_from_the_raw_weights():
    from dataclasses import replace

    class Counting(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("seen", torch.zeros(3))

    adapter = replace(GENERATOR, build=Counting, inspect=lambda state: {}, restore=torch.nn.Module.state_dict)
    raw = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "seen": torch.arange(3.0)}
    model = Counting()
    adapter.load(model, {"model": raw, "ema": {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}})
    assert model.weight.sum() == 0 and model.seen.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="missing 1: bias"):  # a parameter is not taken from there
        adapter.load(model, {"model": raw, "ema": {"weight": torch.zeros(2, 2)}})


def test_every_adapter_can_be_recognised():
    for adapters in ADAPTERS.values():
        assert recognise(adapters, {"something": torch.zeros(1)}) is None


def test_the_other_kind_is_refused_in_one_sentence(released, tmp_path):
    with pytest.raises(UserError, match=r"released.pth holds the DiT\^DH generator, a tokenizer was asked for\.$"):
        read_weights("tokenizer", str(released))
    torch.save({"a": torch.zeros(2)}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="not the weights of any generator that is known.*DiT"):
        read_weights("generator", str(tmp_path / "odd.pt"))


def test_a_setting_that_contradicts_the_weights_is_named(released):
    with pytest.raises(UserError, match="generator.num_classes is 7, the weights were made with 10"):
        build("generator", {"num_classes": 7}, read_weights("generator", str(released)))


# -- conversion ---------------------------------------------------------------------------------------------------------
def test_released_to_ours_and_back_bit_for_bit(released, tmp_path, run):
    ours, again = tmp_path / "ours.safetensors", tmp_path / "again.pth"
    assert run(released, ours)[0] == 0
    for averaged, seed in ((True, 2), (False, 1)):
        network = dit(9)
        read_weights("generator", str(ours)).load(network, averaged)
        assert same(network.state_dict(), dit(seed).state_dict())
    assert run(ours, again, "--to", "official")[0] == 0
    before, after = hub.load_tensors(released), hub.load_tensors(again)
    assert same(before["model"], after["model"]) and same(before["model_ema"], after["model_ema"])
    assert {"model", "model_ema", exports.KEY} == after.keys()


@pytest.mark.parametrize("keep, seed", [("ema", 2), ("raw", 1)])
def test_one_set_of_weights(released, tmp_path, run, keep, seed):
    ours, bare = tmp_path / "ours.safetensors", tmp_path / "bare.safetensors"
    run(released, ours, "--weights", keep)
    assert same(weight_files.read(ours).weights, dict(dit(seed).state_dict())) and not weight_files.read(ours).raw
    run(released, bare, "--weights", keep, "--to", "official")
    for path in (ours, bare):
        generator = read_generator(str(path)).module
        assert same(generator.state_dict(), dict(dit(seed).state_dict()))


def test_runs_convert(generator_run, tokenizer_run, tmp_path, run):
    ours, official, again = (tmp_path / name for name in ("run.safetensors", "run.pth", "again.safetensors"))
    assert "averaged and raw" in run(generator_run, ours)[1]
    straight = read_generator(str(generator_run)).module
    converted = read_generator(str(ours))
    assert same(straight.state_dict(), converted.module.state_dict())
    assert {"mean", "std"} <= converted.weights.constants.keys() and converted.weights.provenance[
        "tokenizer_fingerprint"
    ]
    assert "no place" in run(generator_run, official, "--to", "official")[1]
    run(official, again)
    for path in (official, again):
        assert same(read_generator(str(path)).module.state_dict(), straight.state_dict())
    assert run(tokenizer_run, tmp_path / "tokenizer.pth", "--to", "official")[0] == 0


def test_nothing_is_overwritten_or_half_written(released, tmp_path, run, monkeypatch):
    ours = tmp_path / "ours.safetensors"
    ours.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists already.*--force"):
        run(released, ours)
    assert ours.read_bytes() == b"precious"
    with pytest.raises(UserError, match="end in .safetensors"):
        run(released, tmp_path / "ours.pth")
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="disk is full"):
        run(released, ours, "--force")
    assert ours.read_bytes() == b"precious" and sorted(p.name for p in tmp_path.iterdir()) == [
        "ours.safetensors",
        "released.pth",
    ]
    monkeypatch.undo()
    assert run(released, ours, "--force")[0] == 0 and weight_files.read(ours).kind == "generator"


# -- description --------------------------------------------------------------------------------------------------------
def test_describe(released, tokenizer_run, tmp_path, run):
    code, out = run("--describe", released)
    assert code == 0 and 'the DiT^DH generator (generator "dit_dh")' in out and "channels 8" in out
    assert "raw weights and averaged (EMA) weights" in out and "a rotary table" in out and "optimizer, epoch" in out
    assert f"{sum(p.numel() for p in dit().parameters()):,} parameters" in out

    code, out = run("--describe", tokenizer_run)
    assert code == 0 and 'the tokenizer "rectok"' in out and "step 20" in out
    run(released, tmp_path / "ours.safetensors")
    code, out = run("--describe", tmp_path / "ours.safetensors")
    assert code == 0 and "averaged (EMA) and raw weights" in out

    broken = GENERATOR.restore(dit())
    del broken["blocks.1.mlp.w3.bias"]
    torch.save(broken, tmp_path / "broken.pt")
    code, out = run("--describe", tmp_path / "broken.pt")
    assert code == 1 and "does not fit: missing 1: blocks.1.mlp.w3.bias" in out
