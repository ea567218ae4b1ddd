"""Linear probing: how much of the class can be read off a tokenizer's frozen features by one linear layer.

Features are averaged over tokens and kept, so the tokenizer sees each picture once; training on them takes seconds. The
classifier is core.nn.probe.LinearProbe. ImageFolder's published script intends milestones but runs a constant rate
after a warm-up epoch; ours follows a cosine, says so, and reports the last epoch beside the best one (which is what was
published).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from core.dist import World
from core.errors import UserError
from core.images import to_model_range
from core.nn.probe import LinearProbe
from core.rng import hash64, permutation
from core.specs import Tokenizer
from core.train.optim import Schedule
from core.weights.encoding import fingerprint_of
from evaluation.chunks import Work
from evaluation.images import Codebooks
from evaluation.pictures import SourcePictures, pieces

# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


def probe_features(tokenizer: Tokenizer, images: Tensor) -> dict[str, Tensor]:
    """name -> (B, N, D) features of pictures in [-1, 1]: those the tokenizer names, else latents or embedded codes."""
    if features := tokenizer.probe_features(images):
        return features
    latents = tokenizer.encode(images)
    if (codebooks := Codebooks.of(tokenizer.spec)) is None:
        return {"latents": latents.flatten(2).transpose(1, 2)}
    vectors = tokenizer.embed(latents)  # (B, L, K, D)
    branches = {name or "codes": vectors[:, :, k] for k, name in enumerate(codebooks.labels)}
    return branches | ({"all": vectors.flatten(2)} if len(branches) > 1 else {})


def features_fingerprint(tokenizer: Tokenizer) -> str:
    """Of the weights that `probe_features` reads: the same where only the decoder was trained on."""
    return fingerprint_of(tokenizer, lambda image: probe_features(tokenizer, image))


@torch.no_grad()
def pooled_features(
    tokenizer: Tokenizer,
    pictures: SourcePictures,
    world: World,
    batch: int,
    encoding: str,
    before: str = "",
    progress: Callable[[int], None] | None = None,
    cache: str = "work_dirs/cache",
) -> tuple[dict[str, Tensor], Tensor] | None:
    """(name -> (N, D) features averaged over tokens, labels (N,)), on the main rank and in the cache. Collective.

    Args:
        encoding: `features_fingerprint` of the tokenizer; decides, with the pictures, which folder of the cache it is.
        before: fingerprint of all weights, which decided in earlier versions: a folder of theirs is used where it is there.
    """
    sizes = world.on_main(pictures.source.file_sizes)
    shared, earlier = (
        Path(cache) / f"probe_{hash64(pictures.fingerprint(), maker, *([sizes] if sizes else [])):016x}"
        for maker in (f"encoding {encoding}", before)
    )
    folder, maker = (earlier, before) if before and world.on_main(earlier.exists) else (shared, f"encoding {encoding}")
    work = Work(
        len(pictures),
        world,
        folder,
        {"weights": maker, "pictures": pictures.fingerprint()},
        min(4096, max(64, len(pictures) // 64)),
    )
    pictures.expect([piece for c in work.mine() for piece in pieces(work.indices(c))])

    def compute(indices: range) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for piece in pieces(indices):
            images, labels = pictures.labelled(piece.start, piece.stop)
            parts.setdefault("labels", []).append(labels)
            for start in range(0, len(images), batch):
                part = to_model_range(images[start : start + batch].to(world.device, non_blocking=True))
                for name, values in probe_features(tokenizer, part).items():
                    parts.setdefault(f"features/{name}", []).append(values.float().mean(1).cpu())
        return {name: torch.cat(values) for name, values in parts.items()}

    with work:
        work.compute(compute, progress)
        gathered = work.gather()
    work.leave()
    if gathered is None:
        return None
    features = {k.removeprefix("features/"): v for k, v in gathered.items() if k.startswith("features/")}
    return features, gathered["labels"]


# ---------------------------------------------------------------------------------------------------------------------
# Classifier
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeSettings:
    """How the classifier is trained. ImageFolder's script: batch 32, lr 1e-4, constant after the first epoch."""

    epochs: int = 10
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    schedule: str = "cosine"  # or "constant"
    warmup_epochs: int = 1
    seed: int = 0


@dataclass
class ProbeResult:
    """Top-1 accuracies on held-out pictures, shares in [0, 1]."""

    curve: list[float] = field(default_factory=list)  # after each epoch
    train_accuracy: float = 0.0  # of the last epoch, while it ran

    @property
    def last(self) -> float:
        return self.curve[-1]

    @property
    def best(self) -> float:
        return max(self.curve)

    @property
    def best_epoch(self) -> int:
        """Counted from 1."""
        return 1 + self.curve.index(self.best)


def train_probe(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    settings: ProbeSettings = ProbeSettings(),
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """Train on (N, D) features averaged over tokens, test on (M, D)."""
    count, width = features.shape
    if count < 2 or len(val_features) < 1:
        raise UserError(
            f"A probe needs pictures to learn from and to be tested on, got {count} and {len(val_features)}."
        )
    for name, values in (("training", labels), ("validation", val_labels)):
        if int(values.min()) < 0 or int(values.max()) >= num_classes:
            raise UserError(
                f"{name} labels run from {int(values.min())} to {int(values.max())} for {num_classes} classes. "
                "Give a source with one folder per class, or a list with labels."
            )
    features, labels, val_features, val_labels = (t.to(device) for t in (features, labels, val_features, val_labels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        probe = LinearProbe(width, num_classes).to(device)
    batch = min(settings.batch, count)
    steps = max(1, count // batch)  # a last part too small for batch statistics is left for another epoch's order
    schedule = Schedule(
        settings.schedule,
        settings.lr,
        0.0,
        settings.warmup_epochs * count,
        settings.warmup_epochs * count,
        settings.epochs * count,
    )
    optimizer = torch.optim.AdamW(probe.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    result = ProbeResult()
    for epoch in range(settings.epochs):
        order = torch.from_numpy(permutation(count, settings.seed, "probe", epoch)).to(device)
        hits = torch.zeros((), device=device)
        probe.train()
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            optimizer.param_groups[0]["lr"] = schedule(epoch * count + step * batch)
            logits = probe(features[chosen][:, None])
            loss = F.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            hits += (logits.argmax(1) == labels[chosen]).sum()
        probe.eval()
        with torch.no_grad():
            right = sum(
                (probe(x[:, None]).argmax(1) == y).sum()
                for x, y in zip(val_features.split(4096), val_labels.split(4096))
            )
        result.curve.append(int(right) / len(val_features))
        result.train_accuracy = float(hits) / (steps * batch)
    return result
