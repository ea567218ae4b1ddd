"""The smallest tokenizer of codes and the smallest generator for them: stand-ins for tests of stores and harness."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.specs import Codes, Generator, Guidance, Loss, Recon, Tokenizer


class ToyCodes(Tokenizer):
    """Each patch becomes one code per colour: its mean value in `vocab` levels of a learned grey ladder."""

    term_names = ()

    def __init__(self, image_size: int = 16, patch_size: int = 4, vocab: int = 16, branches: int = 3, salt: int = 0):
        super().__init__()
        self.image_size, self.patch = image_size, patch_size
        side = image_size // patch_size
        self.spec = Codes(side * side, branches, vocab, 1, (side, side), ("red", "green", "blue")[:branches])
        self.levels = nn.Parameter(torch.linspace(-1, 1, vocab) + 1e-3 * salt)

    def forward(self, images: Tensor, draws) -> Recon:
        return Recon(self.decode(self.encode(images)))

    def encode(self, images: Tensor, draws=None) -> Tensor:
        means = F.avg_pool2d(images[:, : self.spec.branches].float(), self.patch).flatten(2).transpose(1, 2)
        return (means[..., None] - self.levels).abs().argmin(-1)

    def decode(self, latents: Tensor, draws=None) -> Tensor:
        side = self.image_size // self.patch
        values = self.levels[latents].transpose(1, 2).reshape(len(latents), self.spec.branches, side, side)
        values = F.interpolate(values, scale_factor=self.patch)
        return values if self.spec.branches == 3 else values[:, :1].expand(-1, 3, -1, -1)

    def precompute(self, images: Tensor) -> Tensor:
        return self.encode(images)

    def from_stored(self, stored: Tensor, draws=None) -> Tensor:
        return stored.long()

    def embed(self, codes: Tensor) -> Tensor:
        return self.levels[codes][..., None].float()


class ToyCounts(Generator):
    """Logits per class, place and branch, with noise, so that draws matter."""

    models = Codes

    def __init__(self, length: int = 16, branches: int = 3, vocab: int = 16, num_classes: int = 4):
        super().__init__()
        self.shape = (length, branches)
        self.logits = nn.Parameter(torch.zeros(num_classes, length, branches, vocab))

    def fits(self, spec) -> list[str]:
        return [] if isinstance(spec, Codes) else ["takes codes"]

    def forward(self, latents: Tensor, labels: Tensor, draws, progress=None) -> Loss:
        logits = self.logits[labels].float() + 0.1 * draws.normal("noise", self.logits.shape[1:])
        loss = F.cross_entropy(logits.flatten(0, 2), latents.flatten())
        return Loss(loss, {"loss": loss.detach()})

    def sample(self, labels: Tensor, draws, guidance: Guidance = Guidance(), **options) -> Tensor:
        return self.logits[labels].argmax(-1)
