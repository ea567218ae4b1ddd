"""What a tokenizer makes of pictures, averaged over tokens: the inputs of a linear probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from core.dist import World
from core.images import to_model_range
from core.rng import hash64
from evaluation import measure
from evaluation.picture_sets import SourcePictures
from evaluation.work import Work


def probe_features(tokenizer: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """name -> (B, N, D) features of pictures in [-1, 1]: those the tokenizer names, else latents or embedded codes."""
    if hasattr(tokenizer, "probe_features"):
        return tokenizer.probe_features(images)
    latents = tokenizer.encode(images)
    if (usage := measure.code_usage(tokenizer)) is None:
        return {"latents": latents.flatten(2).transpose(1, 2)}
    vectors = tokenizer.embed(latents)  # (B, L, K, D)
    branches = {name or "codes": vectors[:, :, k] for k, name in enumerate(usage.names)}
    return branches | ({"all": vectors.flatten(2)} if len(branches) > 1 else {})


@torch.no_grad()
def pooled_features(
    tokenizer: nn.Module,
    pictures: SourcePictures,
    world: World,
    batch: int,
    fingerprint: str,
    progress: Callable[[int], None] | None = None,
    cache: str = "work_dirs/cache",
) -> tuple[dict[str, Tensor], Tensor] | None:
    """(name -> (N, D) features averaged over tokens, labels (N,)), on the main rank and in the cache. Collective."""
    key = f"{hash64(pictures.fingerprint(), fingerprint):016x}"
    work = Work(
        len(pictures),
        world,
        Path(cache) / f"probe_{key}",
        {"weights": fingerprint, "pictures": pictures.fingerprint()},
        min(4096, max(64, len(pictures) // 64)),
    )
    pictures.expect([piece for c in work.mine() for piece in measure.pieces(work.indices(c))])

    def compute(indices: range) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for piece in measure.pieces(indices):
            images, labels = pictures.labelled(piece.start, piece.stop)
            parts.setdefault("labels", []).append(labels)
            for start in range(0, len(images), batch):
                part = to_model_range(images[start : start + batch].to(world.device, non_blocking=True))
                for name, values in probe_features(tokenizer, part).items():
                    parts.setdefault(f"features/{name}", []).append(values.float().mean(1).cpu())
        return {name: torch.cat(values) for name, values in parts.items()}

    with work:
        work.run(compute, progress)
        found = work.gather()
    if found is None:
        return None
    return {k.removeprefix("features/"): v for k, v in found.items() if k.startswith("features/")}, found["labels"]
