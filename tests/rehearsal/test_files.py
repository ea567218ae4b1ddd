"""The writers' own rules, and that every container they write is read: weights found, objects beside them harmless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.rehearsal import containers, frozen, generator_layouts, layouts, released
from tests.rehearsal.containers import make

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"
FAR_L, DS8 = {"width": 1280, "layers": 36, "head_layers": 4}, {"mult": (1, 2, 2, 4), "tokens": 1024}
PUBLISHED = {
    "RecTok": lambda: layouts.rectok(semantic={"dinov3": 1024}),
    "RecTok_decft": layouts.rectok,
    "ditdhxl_epoch_0079": generator_layouts.dit_dh,
    "ditdhxl_epoch_0599": generator_layouts.dit_dh,
    "ditdhs_epoch_0029": lambda: generator_layouts.dit_dh(384, 12, 6),
    "fqgan_dual_ds16": layouts.fqgan,
    "fqgan_triple_ds16": lambda: layouts.fqgan(branches=layouts.FQGAN_TRIPLE),
    "fqgan_dual_ds8": lambda: layouts.fqgan(**DS8),
    "fqgan_triple_ds8": lambda: layouts.fqgan(**DS8, branches=layouts.FQGAN_TRIPLE),
    "far_b_dual": generator_layouts.far,
    "far_b_triple": lambda: generator_layouts.far(branches=3),
    "far_l_dual": lambda: generator_layouts.far(**FAR_L),
    "far_l_triple": lambda: generator_layouts.far(**FAR_L, branches=3),
    "D-AR-L-360K": generator_layouts.gpt,
    "D-AR-XL-360K": lambda: generator_layouts.gpt(1280, 36),
    "D-AR-tokenizer_v1": layouts.dar,
    "maskgit-vqgan-imagenet-f16-256": layouts.maskgit,
    "vqgan_plus_12bit": lambda: layouts.maskgit(vocab=4096, code_dim=64, plus=True),
    "tokenizer_titok_s128": layouts.titok,
    "tokenizer_titok_b64": lambda: layouts.titok(768, 12, 64),
    "tokenizer_titok_l32": lambda: layouts.titok(1024, 24, 32),
    **{
        f"tokenizer_titok_{name}_vq8k": (
            lambda width=width, layers=layers, latents=latents: layouts.titok(
                width, layers, latents, vocab=8192, code_dim=64, decoder_size=(1024, 24)
            )
        )
        for name, width, layers, latents in (("bl64", 768, 12, 64), ("bl128", 768, 12, 128), ("sl256", 512, 8, 256))
    },
    "rar_b": generator_layouts.rar,
    "rar_l": lambda: generator_layouts.rar(1024),
    "rar_xl": lambda: generator_layouts.rar(1280, 32),
    "rar_xxl": lambda: generator_layouts.rar(1408, 40, hidden=6144),
    "reAR-S": lambda: generator_layouts.rar(768, 20, alignment=(2048, 256)),
    "reAR-B": lambda: generator_layouts.rar(alignment=(2048, 256)),
    "reAR-L": lambda: generator_layouts.rar(1024, alignment=(2048, 256)),
    **{f"imagenet-{v}": (lambda v=v: layouts.imagefolder(vocab=v)) for v in (4096, 8192, 16384)},
    "imagenet-var-4096": generator_layouts.var,
    **{
        name: (lambda facts=facts: layouts.imagefolder(side=16, quantizer="plain", **facts))
        for name, facts in {
            "XQGAN-4096": {"branches": 1, "code_dim": 64},
            "XQGAN-8192": {"branches": 1, "vocab": 8192},
            "RobustTok-zero": {"branches": 1, "code_dim": 64},
            "xqgan-VP2-4096": {},
            "xqgan-VP2-16384": {"vocab": 16384},
        }.items()
    },
    **{
        f"xqgan-MSBR10P2-{2**bits}": (
            lambda bits=bits: layouts.imagefolder(vocab=2**bits, code_dim=bits, quantizer="binary")
        )
        for bits in (12, 14)
    },
    "inception-v3-compat": frozen.inception,
}


@pytest.mark.skipif(not RECORDED.is_dir(), reason="no ../shared/checkpoints here")
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_recorded_ones(name):
    prefix = "trainer/var_wo_ddp/" if "var" in name else ""
    recorded = json.loads((RECORDED / f"{name}.json").read_text())["tensors"]
    wanted = {key.removeprefix(prefix): tuple(shape) for key, (shape, _) in recorded.items() if key.startswith(prefix)}
    assert PUBLISHED[name]() == wanted


def test_objects_beside_the_tensors_need_their_own_packages(tmp_path):
    """Else a reader might take them for plain data by chance, and the files would prove nothing."""
    path = containers.llamagen_trainer({"a.weight": torch.ones(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, weights_only=True)
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        torch.load(path, weights_only=False)


def gpt():
    return make(generator_layouts.gpt(64, 2, 64), 5)


def far(branches: int):
    return make(generator_layouts.far(64, 1, 1, branches, 64), 6)


def prefixed(prefix: str, weights):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def cached(weights):
    """A LlamaGen model that has sampled saves its caches."""
    return {
        **weights,
        "freqs_cis": torch.zeros(4, 2),
        "causal_mask": torch.ones(4, 4, dtype=torch.bool),
        "layers.0.attention.kv_cache.k_cache": torch.zeros(1, 1, 4, 64),
        "layers.0.attention.kv_cache.v_cache": torch.zeros(1, 1, 4, 64),
    }


# name of the file -> (writer, what the description must say)
EXTRA = {
    "far_dual.pt": (lambda p: containers.compiled_generator(far(2), p), "FAR"),
    "far_triple_ema.pt": (lambda p: containers.llamagen_trainer(cached(far(3)), p), "FAR"),
    "far_ddp.pt": (lambda p: containers.bare(prefixed("module.", far(2)), p), "FAR"),
    "gpt_deepspeed.pt": (lambda p: containers._save({"module": gpt()}, p), "LlamaGen"),
    "gpt_state_dict.pt": (lambda p: containers._save({"state_dict": prefixed("model.", gpt())}, p), "LlamaGen"),
    "consolidated.pth": (lambda p: containers.fsdp_consolidated(gpt(), p), "LlamaGen"),
    "gpt_caches.pt": (lambda p: containers.bare(cached(gpt()), p), "LlamaGen"),
    "dar_with_config.pt": (lambda p: containers.dar_trainer(released.dar(), p, 32, 8, {"vq_dim": 8}), "length 32"),
    "rectok_old_names.pth": (
        lambda p: containers.rectok_trainer(
            {
                k.replace("sem_", "aux_"): v
                for k, v in make(layouts.rectok(192, 3, 16, semantic={"dinov3": 32})).items()
            },
            p,
        ),
        "RecTok",
    ),
    "rectok_with_teacher.pth": (
        lambda p: containers.rectok_trainer(
            {
                **make(layouts.rectok(192, 3, 16)),
                **prefixed("sem_foundation_models.dinov3.", make(frozen.dinov3(32, 1))),
            },
            p,
        ),
        "RecTok",
    ),
    "rectok_bare.bin": (lambda p: containers.bare(make(layouts.rectok(192, 3, 16)), p), "RecTok"),
    "rectok_bare.safetensors": (lambda p: containers.bare(make(layouts.rectok(192, 3, 16)), p), "RecTok"),
    "checkpoint-250000": (lambda p: containers.accelerate_folder(make(released.rar(True)), p), "RAR"),
    "checkpoint-250000/unwrapped_model": (None, "RAR"),
    "checkpoint-250000/ema_model": (None, "RAR"),
    "rear_ddp.bin": (lambda p: containers.bare(prefixed("module.", make(released.rar(True))), p), "RAR"),
    "rear_compiled.bin": (lambda p: containers.bare(prefixed("_orig_mod.", make(released.rar())), p), "RAR"),
    "imagefolder_compiled.pt": (
        lambda p: containers.llamagen_trainer(prefixed("_orig_mod.", released.imagefolder(4096)), p),
        "ImageFolder",
    ),
    "fqgan_ddp.pt": (
        lambda p: containers.bare(
            prefixed("module.", make(released._fqgan(layouts.FQGAN_DUAL, released.MULT, 256))), p
        ),
        "FQGAN",
    ),
    "maskgit_model.bin": (
        lambda p: containers.bare(prefixed("model.", make(layouts.maskgit(32, released.MULT, 1, 64, 32))), p),
        "MaskGIT",
    ),
}
RED: dict[str, str] = {}  # file -> why it is not read today


@pytest.fixture(scope="session")
def extra(rehearsal) -> Path:
    folder = rehearsal.house.folder / "extra"
    for name, (write, _) in EXTRA.items():
        if write is not None:
            write(folder / name)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.xfail(strict=True, reason=RED[n])] if n in RED else []) for n in EXTRA]
)
def test_containers_of_the_trainers_are_read(rehearsal, extra, name):
    done = rehearsal.house.run(f"python -m scripts.convert --describe extra/{name}").expect()
    assert EXTRA[name][1] in done.output, done.output


@pytest.mark.parametrize("name", released.FILES)
def test_released_files_are_read(rehearsal, name):
    rehearsal.house.run(f"python -m scripts.convert --describe {name}").expect()
