"""Features of a set of pictures, and their cache: real pictures go through the network once, ever."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.errors import UserError
from core.files import replacing
from evaluation.networks import FeatureNet

Batches = Iterable[tuple[Tensor, Tensor]]  # (images (B, 3, H, W) uint8, labels (B,) int64)


@dataclass
class Features:
    """Features of N pictures in the order they came, on the CPU."""

    taps: dict[str, Tensor]  # tap name -> (N, D) fp32
    labels: Tensor  # (N,) int64
    net: str  # name of the network they are from

    def __len__(self) -> int:
        return self.labels.shape[0]


def extract(net: FeatureNet, batches: Batches) -> Features:
    """Run all pictures through `net`, on its device."""
    device = next(net.parameters()).device
    taps: dict[str, list[Tensor]] = {name: [] for name in net.dims}
    labels: list[Tensor] = []
    for images, batch_labels in batches:
        for name, values in net(images.to(device, non_blocking=True)).items():
            taps[name].append(values.float().cpu())
        labels.append(batch_labels.cpu())
    if not labels:
        raise UserError("There are no pictures to take features of: the list of batches is empty.")
    return Features({name: torch.cat(values) for name, values in taps.items()}, torch.cat(labels), net.name)


@dataclass
class Reference(Features):
    """Features of real pictures. `fingerprint` names the pictures: whoever lists them says when the list changes."""

    fingerprint: str

    def save(self, path: str | Path) -> None:
        """Write atomically."""
        tensors = {f"taps/{name}": values.contiguous() for name, values in self.taps.items()} | {"labels": self.labels}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"net": self.net, "fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | Path) -> Reference:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            if not {"net", "fingerprint"} <= meta.keys():
                raise UserError(f"{path} holds no reference features. Delete it and they are computed anew.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        labels = tensors.pop("labels")
        taps = {name.removeprefix("taps/"): values for name, values in tensors.items()}
        return cls(taps, labels, meta["net"], meta["fingerprint"])

    @classmethod
    def cached(cls, path: str | Path, net: FeatureNet, batches: Callable[[], Batches], fingerprint: str) -> Reference:
        """The file's features when they are of these pictures and this network, else computed and written there.

        Args:
            batches: called only when there is something to compute.
            fingerprint: of the list of pictures (DataSource.fingerprint(), with the transform's name if it has one).
        """
        if Path(path).exists():
            stored = cls.load(path)
            if (stored.net, stored.fingerprint) == (net.name, fingerprint):
                return stored
        features = extract(net, batches())
        reference = cls(features.taps, features.labels, features.net, fingerprint)
        reference.save(path)
        return reference
