"""What teachers and perceptual nets have in common: they are never trained and have their own idea of a pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.nn.linear import adopt

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in [0, 1], RGB
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Frozen(nn.Module):
    """A module whose weights are never trained and which stays in eval mode whatever its parents are told.

    Args:
        mean, std: of the pixels that the network was trained on, per channel.

    Subclasses call `freeze` at the end of their constructor.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):  # real also under torch.device("meta"): they are in no file
            self.register_buffer(name, torch.tensor(values, device="cpu").view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def freeze(self) -> None:
        adopt(self)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Frozen:
        """Ignores `mode`: `parent.train()` must not wake dropout, BatchNorm or position jitter in here."""
        return super().train(False)
