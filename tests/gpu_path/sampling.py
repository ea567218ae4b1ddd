"""Published generators of codes, sampled on a fake GPU: what a call asks of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from core.nn.kvcache import KVCache
from core.rng import Draws
from core.specs import Continuous, Guidance
from generator.ar.far import FAR
from generator.ar.gpt import GPT
from generator.ar.rar import RAR
from generator.dit.dit_dh import DiTDH
from generator.var.var import VAR
from run import load
from run.load import load_config
from tests.gpu_path.fake import Count, build, gpu
from tokenizer.multiscale.imagefolder import ImageFolder

SCALES = [1, 1, 2, 3, 3, 4, 5, 6, 8, 11]


def _var() -> VAR:
    """Narrow: it looks at numbers when it is made, and no count depends on the width."""
    trunk = {"width": 64, "layers": 1, "heads": 1}
    with unset_fake_temporarily(), torch.device("cpu"):
        tokenizer = ImageFolder(
            image_size=256,
            patch_size=16,
            encoder=trunk,
            decoder=trunk,
            latent_grid=11,
            scales=SCALES,
            branches=2,
            vocab=4096,
            code_dim=32,
            pretrained=False,
        )
        model = VAR(depth=17, width=128, heads=2, scales=SCALES, vocab=4096)
    model.to("cuda").bind(tokenizer.to("cuda").eval().requires_grad_(False))
    return model


@dataclass(frozen=True)
class System:
    """A generator with its published way of sampling.

    Attributes:
        step: ceiling of kernels in one decode step; of VAR, in one call.
        recordings: ceiling in the first call.
    """

    make: Callable[[], nn.Module]
    guidance: Guidance
    options: dict
    step: int
    recordings: int = 4


SYSTEMS = {
    "RAR-B": System(lambda: RAR(size="b", vocab=1024), Guidance(15.0, schedule="cosine", power=2.5), {}, 220),
    "FAR-B": System(lambda: FAR(size="b", grid=[16, 16], branches=2), Guidance(2.0), {}, 320),
    "D-AR-L": System(lambda: GPT(size="l"), Guidance(8.0, schedule="linear", start=1.2), {}, 245),
    "VAR-d17": System(_var, Guidance(4.25, schedule="linear", start=1.0), {"top_k": 750, "top_p": 0.95}, 2280, 11),
}


@dataclass
class Report:
    """What two equal calls of `sample` ask of a GPU.

    Attributes:
        kernels: of one recorded step, the dearest; of VAR, of a whole call.
        recordings: in the first and the second call.
        casts: of weights, in all recordings.
        waits: of the host, in the second call.
        launched: kernels that the second call starts one by one, beside its replays.
        bytes, ideal: moved by all steps of a call; and if every matrix and every filled place of the cache were read once.
    """

    kernels: int
    recordings: tuple[int, int]
    casts: int
    waits: dict
    launched: int
    bytes: int
    ideal: int


def _ideal(model: nn.Module, cache: KVCache, steps: int, head_caches: int = 0) -> int:
    """Matrices of blocks and heads once per step, and what the cache holds by then."""
    used = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "adaLN_modulation" not in name]
    matrices = sum(p.numel() for m in used for p in m.parameters())
    repeated = sum(p.numel() for p in getattr(model, "ar_head", nn.Module()).parameters()) * head_caches
    place = cache.memory.numel() // cache.length
    return (steps * (matrices + repeated) + place * steps * (steps + 1) // 2) * cache.memory.element_size()


@functools.lru_cache(None)
def measure(name: str, batch: int = 64, precision: str = "bf16") -> Report:
    """See Report."""
    system, model = SYSTEMS[name], None
    with gpu(lambda: list(model.parameters())) as graphs:
        model = build(system.make)
        labels = torch.zeros(batch, dtype=torch.int64, device="cuda")

        def call() -> Count:
            autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")
            with torch.no_grad(), autocast, Count(list(model.parameters())) as count:
                model.sample(labels, Draws(0, labels), system.guidance, **system.options)
            return count

        call()
        first = len(graphs)
        before = [graph.replays for graph in graphs]
        second = call()
        recordings = first, len(graphs) - first
        casts = sum(graph.count.casts for graph in graphs)
        if isinstance(model, VAR):
            kernels = second.total + sum(graph.count.total for graph in graphs)
            return Report(kernels, recordings, casts, dict(second.waits), second.total, 0, 0)
        steps = [graph.replays - done for graph, done in zip(graphs, before)]
        state = model._state.value
        moved = sum(graph.count.bytes * times for graph, times in zip(graphs, steps))
        done = 0
        for graph, times in zip(graphs, steps):  # in the order of their places
            moved += graph.count.filled * sum(range(done, done + times))
            done += times
        ideal = _ideal(model, state.cache, sum(steps), getattr(state, "branches", 1) - 1)
        return Report(
            max(graph.count.total for graph in graphs),
            recordings,
            casts,
            dict(second.waits),
            second.total,
            moved,
            ideal,
        )


GUIDED = {
    "cfg": lambda guide: Guidance(1.5),
    "interval": lambda guide: Guidance(1.5, "cfg", (0.3, 0.9)),
    "autoguidance": lambda guide: Guidance(1.3, "auto", guide=guide),
}


@functools.lru_cache(None)
def measure_flow(kind: str, batch: int = 4, size: str = "xl") -> Report:
    """DiT^DH guided in one of the ways of GUIDED, by the smallest one; `waits` are those of both calls."""
    networks: list[nn.Module] = []

    def weights() -> list[torch.Tensor]:
        return [p for network in networks for p in network.parameters()]

    with gpu(weights) as graphs:
        networks = [build(lambda size=size: DiTDH(size=size)) for size in (size, "s")]
        labels, calls = torch.zeros(batch, dtype=torch.int64, device="cuda"), []
        for _ in range(2):
            begun = len(graphs)
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), Count(weights()) as count:
                networks[0].sample(labels, Draws(0, labels), GUIDED[kind](networks[1]), steps=4)
            calls.append((len(graphs) - begun, count))
        recordings, counts = zip(*calls)
        casts = counts[1].casts + sum(graph.count.casts for graph in graphs)
        kernels = max(graph.count.total for graph in graphs)
        return Report(kernels, recordings, casts, dict(counts[0].waits + counts[1].waits), counts[1].total, 0, 0)


def decoding_waits(name: str) -> dict:
    """Of the toy tokenizer `name` while it decodes; it looks at numbers when it is made."""
    with gpu():
        with unset_fake_temporarily():
            section = load_config(f"configs/toy/{name}_tokenizer.yaml", []).tokenizer
            tokenizer = load.build("tokenizer", section).eval().requires_grad_(False)
        tokenizer.to("cuda")
        samples, spec = torch.zeros(2, dtype=torch.int64, device="cuda"), tokenizer.spec
        if isinstance(spec, Continuous):
            latents = torch.zeros(2, spec.channels, *spec.grid, device="cuda")
        else:
            latents = torch.zeros(2, spec.length, spec.branches, dtype=torch.int64, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16), Count() as count:
            images = tokenizer.decode(latents, Draws(0, samples))
        assert images.device.type == "cuda" and count.total
        return dict(count.waits)


def table() -> str:
    """Every system, one line each."""
    lines = [
        "| system | kernels per step | recordings, first and second call | casts of weights | host waits | launched singly "
        "in the second call | bytes, of ideal |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SYSTEMS:
        r = measure(name)
        share = f"{r.bytes / r.ideal:.2f}" if r.ideal else ""
        lines.append(
            f"| {name} | {r.kernels} | {r.recordings[0]}, {r.recordings[1]} | {r.casts} | {sum(r.waits.values())} | "
            f"{r.launched} | {share} |"
        )
    for kind in GUIDED:
        r = measure_flow(kind)
        lines.append(
            f"| DiT^DH-XL, {kind}, batch 4 | {r.kernels} | {r.recordings[0]}, {r.recordings[1]} | {r.casts} | "
            f"{sum(r.waits.values())} | {r.launched} | |"
        )
    return "\n".join(lines)
