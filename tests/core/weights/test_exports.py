"""Networks of any settings, exported to the layout of the original code and read back by what the file says alone: the same
settings, weights and outputs. Most settings are drawn; TESSERA_FUZZ=100 draws more often."""

from __future__ import annotations

import inspect
import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file

from core.errors import UserError
from core.rng import Draws
from core.weights import exports, hub
from core.weights import files as weight_files
from run.load import REGISTRIES, build, read_tokenizer
from run.weights import ADAPTERS, read_weights
from scripts import convert

TRIES = int(os.environ.get("TESSERA_FUZZ", 2))


def vit(r: random.Random) -> dict:
    heads = r.choice([1, 2, 3])
    return {"width": heads * r.choice([8, 16]), "layers": r.choice([1, 2]), "heads": heads}


def convolutions(r: random.Random) -> dict:
    return {
        "image_size": 32,
        "channels": r.choice([32, 24, 64]),
        "channel_mult": r.choice([[1, 1], [1, 2, 3], [2, 1], [1]]),
        "res_blocks": r.choice([1, 2]),
        "groups": r.choice([4, 8, 2]),
        "vocab": r.choice([8, 13]),
        "code_dim": r.choice([4, 5]),
    }


def rectok(r: random.Random) -> dict:
    teachers = {name: r.choice([3, 12]) for name in r.sample(["dinov3", "dinov2", "siglip"], r.choice([1, 2, 3]))}
    semantic = {"teachers": teachers, "input": r.choice(["noisy", "clean"])}
    mlp = r.random() < 0.5
    return {
        "image_size": r.choice([32, 48]),
        "patch_size": r.choice([8, 16]),
        "channels": r.choice([3, 16]),
        "encoder": vit(r),
        "decoder": vit(r),
        "gamma": 0.3,
        "qk_norm": r.random() < 0.5,
        "mask_ratio": 0.0 if mlp else 0.2,
        "semantic": r.choice([None, {**semantic, **({"decoder": "mlp"} if mlp else {"size": vit(r)})}]),
    }


def dit_dh(r: random.Random) -> dict:
    trunk, head = vit(r), vit(r)
    if r.random() < 0.3:  # widths that do not tell trunk from head
        head["width"] = trunk["width"]
        head["heads"] = trunk["heads"]
    size = {
        **{f"trunk_{key}": trunk[part] for key, part in (("width", "width"), ("depth", "layers"), ("heads", "heads"))},
        **{f"head_{key}": head[part] for key, part in (("width", "width"), ("depth", "layers"), ("heads", "heads"))},
    }
    return {
        "size": {**size, "trunk_width": 4 * size["trunk_width"], "head_width": 4 * size["head_width"]},
        "channels": r.choice([3, 8]),
        "grid": r.choice([2, 3, (2, 3)]),
        "num_classes": r.choice([1, 5]),
        "label_drop": 0.2,
        "qk_norm": r.random() < 0.5,
    }


def fqgan(r: random.Random) -> dict:
    branches, heads = r.choice([2, 3]), r.choice([1, 2, 4])
    teachers = {2: {"clip": "sem"}, 3: {"dinov2_class": "sem_mid", "clip": "sem_high"}}[branches]
    size = r.choice([[1, 1], [1, 2, 2], [1, 1, 2, 2]])
    semantic = {"teachers": dict.fromkeys(teachers, 8 * heads), "branches": teachers, "layers": 2, "heads": heads}
    return {
        "image_size": r.choice([16, 24]),
        "branches": branches,
        "size": size,
        "decoder_mult": r.choice([None, size[::-1]]),
        "channels": r.choice([32, 64]),
        "groups": r.choice([8, 32]),
        "res_blocks": 1,
        "z_channels": r.choice([8, 12]),
        "vocab": r.choice([8, 20]),
        "code_dim": r.choice([2, 8]),
        "normalise": r.random() < 0.5,
        "adapter_layers": r.choice([1, 2]),
        "adapter_heads": r.choice([1, 2, 4, 8]),
        "usage_window": r.choice([0, 16]),
        "semantic": r.choice([None, semantic]),
    }


def decoder(r: random.Random) -> dict:
    heads, shared = r.choice([(1, 1), (2, 1), (2, 2), (4, 2)])
    hidden, layers = r.choice([24, 32]), r.choice([1, 3])
    return {"width": 8 * heads, "layers": layers, "heads": heads, "hidden": hidden, "kv_heads": shared}


def codes(r: random.Random) -> dict:
    return {"length": 6, "vocab": r.choice([5, 20]), "num_classes": r.choice([1, 4]), "label_drop": 0.2}


def far(r: random.Random) -> dict:
    return {
        "size": {**decoder(r), "head_layers": r.choice([1, 2])},
        "branches": r.choice([2, 3, 4]),
        "grid": r.choice([None, [2, 3], [6, 1]]),
        "rope_theta": r.choice([100.0, 10000.0]),
        "norm_eps": r.choice([1e-5, 1e-2]),
        "rotary": r.choice(["auto", "line"]),
        **codes(r),
    }


def gpt(r: random.Random) -> dict:
    return {"size": decoder(r), "grid": r.choice([None, [2, 3]]), "rotary": r.choice(["auto", "line"]), **codes(r)}


def rar(r: random.Random) -> dict:
    size = {key: value for key, value in decoder(r).items() if key != "kv_heads"}
    rear = {"projection": 8, r.choice(["encode_layer", "decode_layer"]): r.choice([0, None]), "noise": "mask"}
    return {"size": size, "rear": r.choice([None, rear, {"projection": 4}]), "code_dim": 6, **codes(r)}


def maskgit_vqgan(r: random.Random) -> dict:
    return convolutions(r)


def vqgan_plus(r: random.Random) -> dict:
    lookup_free = r.random() < 0.4
    settings = convolutions(r)
    if lookup_free:
        settings["vocab"] = 2 ** settings["code_dim"]
    return {
        **settings,
        "decoder_res_blocks": r.choice([None, 2]),
        "halving": r.choice(["pool", "conv"]),
        "quantizer": "lookup_free" if lookup_free else "lookup",
        "normalise": not lookup_free and r.random() < 0.5,
    }


def titok(r: random.Random) -> dict:
    proxy = {"vocab": 7, "code_dim": 4, "channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "groups": 8}
    return {
        "image_size": 32,
        "patch_size": r.choice([8, 16]),
        "decoder_patch_size": r.choice([None, 8, 16]),
        "encoder": vit(r),
        "decoder": vit(r),
        "latents": r.choice([1, 5]),
        "vocab": 20,
        "code_dim": 3,
        "normalise": r.random() < 0.5,
        **r.choice(
            [{}, {"legacy": True, "decoder_patch_size": 16, "proxy": {**proxy, "channel_mult": (1, 1, 1, 1, 1)}}]
        ),
    }


def dar(r: random.Random) -> dict:
    groups = r.choice([1, 2, 4])
    image = r.choice([32, 48])
    shared = r.random() < 0.3
    decoder = {
        "width": r.choice([16, 32]),
        "depth": r.choice([1, 2]),
        "patch_size": r.choice([4, 8]),
        "data_std": 0.5,
        "time_shift": 1.5,
        "own_time": not shared,
        "modulated_output": shared,
        "feature_layer": 1,
        "feature_hidden": 12,
        "rope_theta": 500.0,
    }
    return {
        "image_size": image,
        "patch_size": r.choice([8, 16]),
        "encoder_width": r.choice([16, 32]),
        "encoder_layers": r.choice([0, 1]),
        "condition_width": r.choice([16, 32]),
        "condition_layers": r.choice([1, 2]),
        "length": 8 * groups,
        "groups": groups,
        "window": r.choice([None, 8 * groups]),
        "steps": r.choice([4, 5]),
        "vocab": 12,
        "code_dim": r.choice([4, 6]),
        "low_rank_queries": r.random() < 0.7,
        "solver": r.choice(["adams2", "euler"]),
        "output_size": r.choice([0, 24]),
        "head_dim": r.choice([8, 16]),
        "rope_theta": r.choice([100.0, 10000.0]),
        "usage_window": r.choice([0, 16]),
        "semantic": r.choice([None, {"teachers": {"dinov2": 5}}]),
        "decoder": decoder,
    }


def imagefolder(r: random.Random) -> dict:
    scales = r.choice([[1, 2], [1, 1, 2, 3], [2], [1, 2, 3, 3, 4], [3]])
    quantizer = r.choice(["auto", "binary", "residual"])
    width = r.choice([3, 4])
    method = r.choice(["full", "lora", "frozen"])
    return {
        "image_size": 32,
        "patch_size": r.choice([8, 16]),
        "encoder": vit(r),
        "decoder": vit(r),
        "latent_grid": scales[-1],
        "scales": scales,
        "branches": r.choice([1, 2, 3]),
        "vocab": 2**width if quantizer == "binary" else r.choice([6, 9]),
        "code_dim": width,
        "quantizer": quantizer,
        "cosine": r.random() < 0.7 or quantizer != "residual",
        "shared_phi": r.choice([0, 1, 2, 4]),
        "start_drop": 1,
        "enc_tuning": method,
        "dec_tuning": r.choice(["full", method]),
        "lora_rank": 2,
        "lora_alpha": r.choice([2.0, 8.0]),
    }


def var(r: random.Random) -> dict:
    scales = r.choice([[1, 2], [1, 1, 2, 3], [1], [2, 2, 4]])
    depth = r.choice([1, 3])
    return {
        "depth": depth,
        "width": r.choice([32, 48]),
        "heads": r.choice([2, 4]),
        "mlp_ratio": r.choice([2.0, 4.0, 2.5]),
        "scales": scales,
        "branches": r.choice([1, 2, 3]),
        "vocab": r.choice([6, 20]),
        "code_dim": r.choice([4, 6]),
        "num_classes": 3,
        "l2_norm": r.random() < 0.5,
        "shared_adaln": r.random() < 0.5,
    }


TOKENIZERS = (rectok, fqgan, maskgit_vqgan, vqgan_plus, titok, dar, imagefolder)
GENERATORS = (dit_dh, far, rar, gpt, var)
SYSTEMS = {settings.__name__: settings for settings in (*TOKENIZERS, *GENERATORS)}


def network(kind: str, settings: dict, seed: int) -> torch.nn.Module:
    """In evaluation mode, all its weights random."""
    torch.manual_seed(seed)
    made = REGISTRIES[kind].build(settings)
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point() and not name.endswith(".scaling"):  # which follows from lora_alpha
            tensor.copy_(0.3 * torch.randn(tensor.shape))
    return made.eval()


@torch.no_grad()
def outputs(kind: str, model) -> list[torch.Tensor]:
    """What encoding, decoding and sampling give."""
    draws = Draws(3, torch.arange(2))
    if kind == "tokenizer":
        images = torch.linspace(-1, 1, 2 * 3 * model.image_size**2).sin().view(2, 3, model.image_size, -1)
        latents = model.encode(images, draws)
        return [latents, model.decode(latents, draws)]
    if isinstance(model, REGISTRIES["generator"].get("var")):
        inputs = torch.linspace(-1, 1, model.branches * model.code_dim * (model.ends[-1] - model.ends[0]))
        return [model.logits(inputs.view(1, -1, model.branches * model.code_dim), torch.zeros(1, dtype=torch.int64))]
    steps = {"steps": 2} if "steps" in inspect.signature(model.sample).parameters else {}
    return [model.sample(torch.tensor([0, 0]), draws, **steps)]


def holds(settings: dict, given: dict) -> bool:
    return all(holds(settings[k], v) if isinstance(v, dict) else settings[k] == v for k, v in given.items())


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def exported(name: str, settings: dict, model, tmp_path, suffix: str) -> str:
    kind = "tokenizer" if SYSTEMS[name] in TOKENIZERS else "generator"
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / f"theirs{suffix}"
    weight_files.save(ours, weight_files.WeightFile(kind, {"name": name, **settings}, model.state_dict()), True)
    assert convert.main([str(ours), str(theirs), "--to", "official", "--force"]) == 0
    return str(theirs)


@pytest.mark.parametrize("seed", range(TRIES))
@pytest.mark.parametrize("name", SYSTEMS)
def test_an_exported_network_is_read_back_as_it_was(name, seed, tmp_path, capsys):
    kind = "tokenizer" if SYSTEMS[name] in TOKENIZERS else "generator"
    settings = SYSTEMS[name](random.Random(f"{name} {seed}"))
    model = network(kind, {"name": name, **settings}, seed)
    for suffix in (".pth", ".safetensors"):
        path = exported(name, settings, model, tmp_path, suffix)
        weights = read_weights(kind, path)
        assert holds(weights.settings, json.loads(json.dumps(settings))), (weights.settings, settings)
        read = build(kind, {}, weights).eval()
        official = ADAPTERS[kind][name].restore(model)
        assert ADAPTERS[kind][name].restore(read).keys() == official.keys(), settings
        assert same(outputs(kind, read), outputs(kind, model)), settings
        assert convert.main(["--describe", path]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("shared_phi", [0, 1, 2, 3, 4])
def test_names_tell_how_scales_share_convolutions(shared_phi):
    """As many convolutions as scales may be one each or shared by the rule of ticks; official names differ."""
    trunk = {"width": 64, "layers": 1, "heads": 1}
    settings = {"image_size": 32, "encoder": trunk, "decoder": trunk, "vocab": 6}
    settings |= {"latent_grid": 4, "scales": [1, 2, 3, 4], "code_dim": 3, "shared_phi": shared_phi}
    adapter = ADAPTERS["tokenizer"]["imagefolder"]
    state = adapter.restore(REGISTRIES["tokenizer"].build({"name": "imagefolder", **settings}))
    told = adapter.describe(state, {"scales": settings["scales"]})
    assert told.get("shared_phi", 4) == shared_phi
    again = adapter.build(**told)
    adapter.load(again, state)
    assert (
        same(list(adapter.restore(again).values()), list(state.values()))
        and adapter.restore(again).keys() == state.keys()
    )


def test_what_an_export_says_is_checked(tmp_path):
    """Text that we did not write is refused in a sentence; settings of another network are not taken."""
    settings = maskgit_vqgan(random.Random(1))
    model = network("tokenizer", {"name": "maskgit_vqgan", **settings}, 1)
    path = exported("maskgit_vqgan", settings, model, tmp_path, ".bin")
    loaded = hub.load_tensors(path)
    assert type(loaded[exports.KEY]) is str
    assert exports.settings_in(loaded, "generator", "rar") == {} == exports.settings_in(loaded, "tokenizer", "titok")
    for number, text in enumerate(("[1]", "{", '{"tokenizer": 3}')):
        state = exports.with_text({n: t for n, t in loaded.items() if n != exports.KEY}, text, bare=True)
        torch.save(state, tmp_path / f"{number}.bin")
        with pytest.raises(UserError, match=f"{exports.KEY} is not what Tessera writes"):
            read_weights("tokenizer", str(tmp_path / f"{number}.bin"))


def test_official_programs_see_nothing_more_in_a_bare_file(tmp_path):
    """A state dict that they load strictly, with the tensors alone."""
    settings = rar(random.Random(2)) | {"rear": None}
    model = network("generator", {"name": "rar", **settings}, 2)
    official = ADAPTERS["generator"]["rar"].restore(model)
    theirs = network("generator", {"name": "rar", **settings}, 3)
    theirs.load_state_dict(torch.load(exported("rar", settings, model, tmp_path, ".bin"), weights_only=True))
    assert same(list(theirs.state_dict().values()), list(official.values()))
    assert load_file(exported("rar", settings, model, tmp_path, ".safetensors")).keys() == official.keys()


def test_a_var_tells_of_the_tokenizer_in_its_file(tmp_path):
    r = random.Random(3)
    tokens = imagefolder(r) | {"scales": [1, 2], "latent_grid": 2, "branches": 3}
    model = network("tokenizer", {"name": "imagefolder", **tokens}, 1)
    weight_files.save(
        tmp_path / "t.safetensors",
        weight_files.WeightFile("tokenizer", {"name": "imagefolder", **tokens}, model.state_dict()),
    )
    sizes = {"scales": [1, 2], "branches": 3, "vocab": tokens["vocab"], "code_dim": tokens["code_dim"]}
    settings = var(r) | sizes
    path = exported("var", settings, network("generator", {"name": "var", **settings}, 1), tmp_path, ".pth")
    words = [
        str(tmp_path / "ours.safetensors"),
        path,
        "--to",
        "official",
        "--tokenizer",
        str(tmp_path / "t.safetensors"),
    ]
    assert convert.main([*words, "--force"]) == 0
    assert holds(read_weights("generator", path).settings, settings)
    assert same(outputs("tokenizer", read_tokenizer({"weights": path}).module), outputs("tokenizer", model))


def test_the_strength_of_adapters_is_asked_for_and_merged(tmp_path):
    """Official adapters have rank 8 and alpha 8, which no tensor tells of others."""
    settings = imagefolder(random.Random(5)) | {"enc_tuning": "lora", "dec_tuning": "full", "lora_alpha": 6.0}
    model = network("tokenizer", {"name": "imagefolder", **settings}, 1)
    official = ADAPTERS["tokenizer"]["imagefolder"].restore(model)
    torch.save({"model": official}, tmp_path / "theirs.pt")
    known = {key: settings[key] for key in ("encoder", "decoder", "scales", "cosine")}
    with pytest.raises(UserError, match="the alpha of the adapters; give tokenizer.lora_alpha="):
        read_weights("tokenizer", str(tmp_path / "theirs.pt"), known)
    with torch.no_grad():
        wanted = model.features(torch.ones(1, 3, 32, 32))
        for change in ({}, {"enc_tuning": "full"}):
            section = {"weights": str(tmp_path / "theirs.pt"), **known, "lora_alpha": 6.0, **change}
            read = read_tokenizer(section).module
            torch.testing.assert_close(read.features(torch.ones(1, 3, 32, 32)), wanted, rtol=1e-4, atol=1e-4)


def test_an_export_needs_no_network_to_start_from(tmp_path, monkeypatch):
    """A run that began with DINOv2 is converted where DINOv2 is not at hand."""
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    settings = imagefolder(random.Random(4)) | {"encoder": "small", "decoder": "small"}
    model = REGISTRIES["tokenizer"].build({"name": "imagefolder", **settings})
    path = exported("imagefolder", settings | {"pretrained": True}, model, tmp_path, ".pth")
    assert same(*(list(m.state_dict().values()) for m in (read_tokenizer({"weights": path}).module, model)))
