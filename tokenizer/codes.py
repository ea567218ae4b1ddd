"""What tokenizers of codes share."""

from __future__ import annotations

from torch import Tensor

from core.rng import Draws
from core.specs import Chart, Recon, Tokenizer
from tokenizer.vq.quantizer import Quantizer


class CodeTokenizer(Tokenizer):
    """Its latents are what is stored of them."""

    def precompute(self, images: Tensor) -> Tensor:
        return self.encode(images)

    def from_stored(self, stored: Tensor, draws: Draws | None = None) -> Tensor:
        return stored.long()


class CodesOfOneBranch(CodeTokenizer):
    """What tokenizers with one code per token share: everything between their `vectors` and their `paint`.

    Subclasses have `quantizer`, `last_layer`, vectors(images) -> (B, L, D) before quantisation, and
    paint((B, L, D)) -> images in [-1, 1].
    """

    quantizer: Quantizer
    last_layer: Tensor
    charts = (
        Chart("share of codes in use", ("usage",)),
        Chart("entropy of codes", ("per_sample_entropy", "batch_entropy")),
    )

    @property
    def term_names(self) -> tuple[str, ...]:
        return self.quantizer.term_names

    def forward(self, images: Tensor, draws: Draws) -> Recon:
        quantized = self.quantizer(self.vectors(images))
        logs = dict(quantized.logs)
        if self.training and self.quantizer.usage_window:
            logs["usage"] = self.quantizer.track(quantized.codes)
        return Recon(
            images=self.paint(quantized.values),
            terms=quantized.terms,
            details={"quantized": quantized},
            logs=logs,
            last_layer=self.last_layer,
        )

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed: vectors, and whatever embeds."""
        return {
            name
            for name, p in self.named_parameters()
            if p.ndim < 2 or any(word in name for word in ("embedding", "token"))
        }

    def encode(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> codes (B, L, 1) int64."""
        return self.quantizer.encode(self.vectors(images))[..., None]

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (B, L, 1) -> rows of the codebook (B, L, 1, D) fp32."""
        return self.quantizer.embed(codes)

    def decode(self, latents: Tensor, draws: Draws | None = None) -> Tensor:
        """Codes (B, L, 1) -> images in [-1, 1], not clamped."""
        return self.paint(self.quantizer.embed(latents[..., 0]))
