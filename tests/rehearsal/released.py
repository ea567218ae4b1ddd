"""The released files, small: the published names, layouts and containers with less width, depth and vocabulary.

What a network cannot tell from its weights (pictures of 256 pixels, patches of 16, 256 tokens, the ten scales, 64 channels
per head) is as published. 32 channels are the fewest that the published group norms divide.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.rehearsal import containers, generator_layouts, layouts
from tests.rehearsal.containers import make

SCALES = [1, 1, 2, 3, 3, 4, 5, 6, 8, 11]
MULT = (1, 1, 1, 1, 2)
DIT = {"width": 64, "layers": 1, "heads": 2, "head_width": 96, "head_layers": 2, "head_heads": 2}
CHANNELS = 16  # of RecTok's latents


def _fqgan(branches: dict, mult: tuple[int, ...], tokens: int) -> layouts.Shapes:
    tiny = {name: (adapter, head, 32) for name, (adapter, head, _) in branches.items()}
    return layouts.fqgan(
        mult, tiny, channels=32, blocks=1, z_channels=32, vocab=64, tokens=tokens, adapter_layers=1, predictor_layers=1
    )


def imagefolder(vocab: int, branches: int = 2, code_dim: int = 8, **facts) -> dict:
    sizes = {"branches": branches, "vocab": vocab, "code_dim": code_dim, "teacher": 64, "teacher_layers": 1}
    return make(layouts.imagefolder(64, 1, **sizes, **facts), vocab)


def dar() -> dict:
    return make(
        layouts.dar(
            64, 1, 64, 1, vocab=64, usage=512, decoder_width=64, decoder_depth=2, teacher=32, feature_hidden=64
        ),
        4,
    )


def rar(alignment: bool = False) -> layouts.Shapes:
    return generator_layouts.rar(64, 2, 2, vocab=64, alignment=(32, 32) if alignment else None)


def _rectok(semantic: bool) -> dict:
    shapes = layouts.rectok(
        192,
        3,
        CHANNELS,  # the published size "tiny": heads follow from no weight
        semantic={"dinov3": 32} if semantic else None,
    )
    return make(shapes, 1)


def _var(path: Path) -> Path:
    weights = make(generator_layouts.var(128, 2, 2, vocab=4096, code_dim=8), 8)
    return containers.var_trainer(weights, path, imagefolder(4096), SCALES)


def _llamagen(weights: Callable[[], dict]) -> Callable[[Path], Path]:
    return lambda path: containers.llamagen_trainer(weights(), path)


def _bare(shapes: Callable[[], layouts.Shapes], seed: int = 0) -> Callable[[Path], Path]:
    return lambda path: containers.bare(make(shapes(), seed), path)


FILES: dict[str, Callable[[Path], Path]] = {
    "RecTok.pth": lambda path: containers.rectok_trainer(_rectok(True), path),
    "RecTok_decft.pth": lambda path: containers.rectok_trainer(_rectok(False), path),
    **{
        name: (
            lambda path, seed=seed: containers.rectok_trainer(
                make(generator_layouts.dit_dh(**DIT, channels=CHANNELS), seed), path
            )
        )
        for seed, name in enumerate(("ditdhxl_epoch_0079.pth", "ditdhxl_epoch_0599.pth", "ditdhs_epoch_0029.pth"))
    },
    "fqgan_dual_ds16.pt": _llamagen(lambda: make(_fqgan(layouts.FQGAN_DUAL, MULT, 256))),
    "fqgan_triple_ds16.pt": _llamagen(lambda: make(_fqgan(layouts.FQGAN_TRIPLE, MULT, 256))),
    "fqgan_dual_ds8.pt": _llamagen(lambda: make(_fqgan(layouts.FQGAN_DUAL, MULT[1:], 1024))),
    "fqgan_triple_ds8.pt": _llamagen(lambda: make(_fqgan(layouts.FQGAN_TRIPLE, MULT[1:], 1024))),
    "maskgit-vqgan-imagenet-f16-256.bin": _bare(lambda: layouts.maskgit(32, MULT, 1, 64, 32), 2),
    "vqgan_plus_12bit.bin": _bare(lambda: layouts.maskgit(32, MULT, 1, 64, 16, plus=True), 3),
    "tokenizer_titok_s128.safetensors": _bare(
        lambda: layouts.titok(64, 1, channels=32, mult=MULT, proxy=64, proxy_dim=32)
    ),
    **{
        f"tokenizer_titok_{name}_vq8k.safetensors": _bare(
            lambda latents=latents: layouts.titok(64, 1, latents, vocab=8192, code_dim=64, decoder_size=(64, 1))
        )
        for name, latents in (("bl64", 64), ("bl128", 128), ("sl256", 256))
    },
    **{
        f"tokenizer_titok_{name}.safetensors": _bare(
            lambda latents=latents: layouts.titok(64, 1, latents, channels=32, mult=MULT, proxy=64, proxy_dim=32)
        )
        for name, latents in (("b64", 64), ("l32", 32))
    },
    **{name: _bare(rar, seed) for seed, name in enumerate(("rar_b.bin", "rar_l.bin", "rar_xl.bin", "rar_xxl.bin"))},
    **{
        name: _bare(lambda: rar(True), seed)
        for seed, name in enumerate(("reAR-S.safetensors", "reAR-B.safetensors", "reAR-L.safetensors"))
    },
    # The released sizes tell 256 queries in 8 groups; smaller ones have the trainer's config do so.
    "D-AR-tokenizer_v1.pt": lambda path: containers.dar_trainer(
        dar(), path, 256, 8, {"diff_decoder": {"data_std": 0.6, "time_shift": 2}}
    ),
    "D-AR-L-360K.pt": lambda path: containers.compiled_generator(make(generator_layouts.gpt(64, 2, 64), 5), path),
    "D-AR-XL-360K.pt": _bare(lambda: generator_layouts.gpt(64, 3, 64), 6),
    **{f"imagenet-{vocab}.pt": _llamagen(lambda vocab=vocab: imagefolder(vocab)) for vocab in (4096, 8192, 16384)},
    "imagenet-var-4096.pt": _var,
    **{
        name: _llamagen(lambda vocab=vocab, branches=branches: imagefolder(vocab, branches, side=16, quantizer="plain"))
        for name, vocab, branches in (
            ("XQGAN-4096.pt", 4096, 1),
            ("XQGAN-8192.pt", 8192, 1),
            ("RobustTok-zero.pt", 4096, 1),
            ("xqgan-VP2-4096.pt", 4096, 2),
            ("xqgan-VP2-16384.pt", 16384, 2),
        )
    },
    **{
        f"xqgan-MSBR10P2-{2**bits}.pt": _llamagen(
            lambda bits=bits: imagefolder(2**bits, code_dim=bits, quantizer="binary")
        )
        for bits in (12, 14)
    },
}


def write_all(folder: Path) -> None:
    for name, write in FILES.items():
        write(folder / name)
