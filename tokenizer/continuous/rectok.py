"""RecTok: a ViT autoencoder whose latents stay meaningful along the whole flow to noise (Shi et al., arXiv 2512.13421).

In training, patches are hidden from the encoder and the latent is moved towards noise; from that noisy latent a pixel
decoder restores the image and one small semantic decoder per frozen teacher restores the teacher's features. Losses
and teachers live elsewhere (tokenizer/losses, tokenizer/teachers.py). Parameter names are those of the official
checkpoints.

Shape letters: B batch, N tokens of the grid, K tokens the encoder sees (K = N without masking), D width, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from core.config import parse_section
from core.errors import UserError, check_choice
from core.limits import Factor, Limits, Pixels, Share, Width
from core.nn.attention import Attention
from core.nn.linear import Linear
from core.nn.mlp import SwiGLU
from core.nn.norms import RMSNorm
from core.nn.rope import Rope, rectok_rope
from core.nn.vit import ViTSize
from core.rng import Draws
from core.specs import Continuous, Recon
from tokenizer.continuous.gaussian import GaussianTokenizer, Posterior

SIZES = {
    "tiny": ViTSize(192, 3, 4),
    "small": ViTSize(512, 8, 8),
    "base": ViTSize(768, 12, 12),
    "large": ViTSize(1024, 24, 16),
    "xl": ViTSize(1152, 28, 16),
    "huge": ViTSize(1280, 32, 16),
}


@dataclass(frozen=True)
class Semantic:
    """The semantic decoders: one per teacher, predicting features of that teacher's width."""

    teachers: dict[str, Width]  # name -> feature width
    decoder: Literal["transformer", "mlp"] = "transformer"  # "mlp" sees one token at a time
    size: Any = "tiny"  # of the transformer
    input: Literal["noisy", "clean"] = "noisy"  # the latent as the pixel decoder sees it, or before the noise

    @classmethod
    def parse(cls, value: dict[str, Any] | None) -> Semantic | None:
        return parse_section("semantic", value, cls) if value and value.get("teachers") else None


# ---------------------------------------------------------------------------------------------------------------------
# Transformers
# ---------------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, "rms" if qk_norm else "none")
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)  # (B, N, D)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Learned positions and blocks: what encoder, decoder and semantic decoder have in common."""

    def __init__(self, size: ViTSize, grid: tuple[int, int], qk_norm: bool):
        super().__init__()
        width = size.width
        self.positional_embedding = nn.Parameter(torch.randn(1, grid[0] * grid[1], width) * width**-0.5)
        self.ln_pre = RMSNorm(width)
        self.transformer = nn.ModuleList(Block(width, size.heads, qk_norm) for _ in range(size.layers))
        self.ln_post = RMSNorm(width)
        cos, sin = rectok_rope(width // size.heads, grid)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def blocks(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Norm, blocks, norm. `kept` (B, K): which token of the grid each of x (B, K, D) is; None: all, in order."""
        rope = (self.rope_cos, self.rope_sin)  # (N, d) each
        if kept is not None:
            rope = tuple(table[kept][:, None] for table in rope)  # (B, 1, K, d)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x, rope)
        return self.ln_post(x)


def unshuffle(tokens: Tensor, restore: Tensor | None, filler: Tensor) -> Tensor:
    """Put the visible tokens (B, K, D) back into place and `filler` (1, 1, D) where one was hidden: (B, N, D)."""
    if restore is None:
        return tokens
    batch, kept, width = tokens.shape
    # Also when nothing is hidden: the filler then gets a zero gradient, and DDP does not wait for it in vain.
    hidden = filler.to(tokens.dtype).expand(batch, restore.shape[1] - kept, -1)  # (B, N - K, D)
    tokens = torch.cat((tokens, hidden), dim=1)
    return tokens.gather(1, restore[..., None].expand(-1, -1, width))


class Encoder(Transformer):
    def __init__(self, size: ViTSize, grid: tuple[int, int], patch_size: int, channels: int, qk_norm: bool):
        super().__init__(size, grid, qk_norm)
        patches = nn.Conv2d(3, size.width, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(patches, Rearrange("b d h w -> b (h w) d"))
        self.latent_head = Linear(size.width, 2 * channels)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Moments of the posterior, mean then log variance, fp32: (B, K, 2C)."""
        x = self.patch_embed(images) + self.positional_embedding  # (B, N, D)
        if kept is not None:
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))  # (B, K, D)
        return self.latent_head(self.blocks(x, kept)).float()


class Decoder(Transformer):
    def __init__(self, size: ViTSize, grid: tuple[int, int], patch_size: int, channels: int, qk_norm: bool):
        super().__init__(size, grid, qk_norm)
        self.decoder_embed = Linear(channels, size.width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, size.width) * size.width**-0.5)
        self.ffn = nn.Sequential(
            Rearrange("b (h w) d -> b d h w", h=grid[0]),
            nn.Conv2d(size.width, 3 * patch_size**2, 1),
            Rearrange("b (p1 p2 c) h w -> b c (h p1) (w p2)", p1=patch_size, p2=patch_size),
        )
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, latents: Tensor, restore: Tensor | None = None) -> Tensor:
        """(B, K, C) -> images (B, 3, H, W)."""
        x = unshuffle(self.decoder_embed(latents), restore, self.mask_token)  # (B, N, D)
        x = self.blocks(x + self.positional_embedding)
        return self.conv_out(self.ffn(x))


class SemanticTransformer(Transformer):
    """Predicts a teacher's feature of every token, hidden ones included."""

    def __init__(self, size: ViTSize, grid: tuple[int, int], channels: int, features: int, qk_norm: bool):
        super().__init__(size, grid, qk_norm)
        self.token_embedding = Linear(channels, size.width)
        self.mask_embedding = nn.Parameter(torch.zeros(1, 1, size.width))
        self.out = Linear(size.width, features)

    def forward(self, latents: Tensor, restore: Tensor | None = None) -> Tensor:
        x = unshuffle(self.token_embedding(latents), restore, self.mask_embedding)  # (B, N, D)
        return self.out(self.blocks(x + self.positional_embedding))  # (B, N, features)


class SemanticMLP(nn.Module):
    """The same one token at a time: it can neither see nor restore hidden tokens."""

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(channels, 4 * channels), nn.GELU(), Linear(4 * channels, features))

    def forward(self, latents: Tensor, restore: Tensor | None = None) -> Tensor:
        return self.mlp(latents)  # (B, K, features)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------------------------------
class RecTok(GaussianTokenizer):
    """core.specs.Tokenizer with continuous latents. The defaults are the published stage-1 recipe.

    Args:
        encoder, decoder: a name in SIZES, or {width, layers, heads}.
        gamma: strength of the noise put on latents in training; 0 for none (stage 2).
        noise_schedule: how the noise level is drawn: "shift" (uniform, shifted for the latent's size), "lognorm"
            (sigmoid of a normal) or "uniform".
        mask_ratio: upper end of the share of patches hidden from the encoder; 0 switches masking (and the shuffling
            of tokens that goes with it) off.
        mask_ratio_min: lower end; negative draws count as 0.
        mask_ratio_type: "random" draws one share per step, "fix" always takes `mask_ratio`.
        semantic: {teachers: {name: feature width}, decoder: "transformer" | "mlp", size: "tiny", input: "noisy" |
            "clean"}, or None.
        train_decoder_only: stage 2; freezes the encoder. The decoder still sees samples of the posterior.
        qk_norm: normalise queries and keys. Off in the released models.
        init_std: of the weights of encoder and decoder before training. The published 0.02 suits width 768; narrow
            models start faster with more, 0.02 sqrt(768 / width) or so.
    """

    term_names = ("kl",)

    def __init__(
        self,
        *,
        image_size: Pixels = 256,
        patch_size: Pixels = 16,
        channels: Width = 128,
        encoder: str | Annotated[dict, ViTSize] = "base",
        decoder: str | Annotated[dict, ViTSize] = "base",
        gamma: Factor = 1.0,
        noise_schedule: str = "shift",
        mask_ratio: Share = 0.4,
        mask_ratio_min: Annotated[float, Limits(-1, 1)] = -0.1,
        mask_ratio_type: str = "random",
        semantic: Annotated[dict, Semantic] | None = None,
        train_decoder_only: bool = False,
        qk_norm: bool = False,
        init_std: Factor = 0.02,
    ):
        super().__init__()
        if image_size % patch_size:
            raise UserError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if not 0 <= mask_ratio < 1:
            raise UserError(f"mask_ratio {mask_ratio} is not in [0, 1)")
        self.image_size, self.channels, self.gamma = image_size, channels, gamma
        check_choice("noise_schedule", noise_schedule, ("shift", "lognorm", "uniform"))
        check_choice("mask_ratio_type", mask_ratio_type, ("random", "fix"))
        self.noise_schedule, self.mask_ratio_type = noise_schedule, mask_ratio_type
        self.mask_ratio, self.mask_ratio_min = mask_ratio, mask_ratio_min
        self.semantic = Semantic.parse(semantic)
        if self.semantic and self.semantic.decoder == "mlp" and mask_ratio:
            raise UserError(
                'semantic.decoder "mlp" cannot predict hidden patches: set mask_ratio: 0, '
                "or semantic.decoder: transformer"
            )

        side = image_size // patch_size
        grid = (side, side)
        self.spec = Continuous(grid, channels)
        self.time_shift = math.sqrt(self.spec.length * channels / 4096)
        self.encoder = Encoder(ViTSize.parse(encoder, "encoder", SIZES), grid, patch_size, channels, qk_norm)
        self.decoder = Decoder(ViTSize.parse(decoder, "decoder", SIZES), grid, patch_size, channels, qk_norm)
        self._init_weights(init_std)
        self.sem_decoders = nn.ModuleDict(self._semantic_decoders(grid, qk_norm))
        self.keep_latent_stats()

        self.encoder.requires_grad_(not train_decoder_only)
        if not mask_ratio:  # never used then; DDP would wait for their gradients
            for name, parameter in self.named_parameters():
                if name.endswith(("mask_token", "mask_embedding")):
                    parameter.requires_grad_(False)

    def _init_weights(self, std: float) -> None:
        """Encoder and decoder only: the semantic decoders keep PyTorch's defaults, as in the official code."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def _semantic_decoders(self, grid: tuple[int, int], qk_norm: bool) -> dict[str, nn.Module]:
        if self.semantic is None:
            return {}
        if self.semantic.decoder == "mlp":
            return {name: SemanticMLP(self.channels, width) for name, width in self.semantic.teachers.items()}
        size = ViTSize.parse(self.semantic.size, "semantic.size", SIZES)
        return {
            name: SemanticTransformer(size, grid, self.channels, width, qk_norm)
            for name, width in self.semantic.teachers.items()
        }

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed: vectors, and whatever embeds or normalises."""
        spared = ("ln", "bias", "embedding", "norm", "gamma", "embed", "token", "diffloss")
        return {name for name, p in self.named_parameters() if p.ndim < 2 or any(word in name for word in spared)}

    # -- training -----------------------------------------------------------------------------------------------------
    def _draw_mask(self, draws: Draws) -> tuple[Tensor | None, Tensor | None]:
        """(kept (B, K), restore (B, N)) token indices; (None, None) when masking is off."""
        if not self.mask_ratio:
            return None, None
        ratio = self.mask_ratio
        if self.mask_ratio_type == "random":
            ratio = max(0.0, draws.shared_uniform("mask_ratio", self.mask_ratio_min, self.mask_ratio))
        length = self.spec.length
        order = draws.uniform("mask", (length,)).argsort(dim=1)  # (B, N)
        return order[:, : math.ceil(length * (1 - ratio))], order.argsort(dim=1)

    def _draw_time(self, draws: Draws) -> Tensor:
        """Noise level of each image, (B,); 1 is pure noise. (In the generator 1 is data.)"""
        if self.noise_schedule == "lognorm":
            return torch.sigmoid(draws.normal("time"))
        u = draws.uniform("time")
        if self.noise_schedule == "uniform":
            return u
        # parity: applied also when time_shift is below 1; only the generator switches there.
        return self.time_shift * u / (1 + (self.time_shift - 1) * u)

    def forward(self, images: Tensor, draws: Draws) -> Recon:
        kept, restore = self._draw_mask(draws)
        posterior = Posterior(self.encoder(images, kept))
        shape = posterior.mean.shape[1:]  # (K, C): only visible tokens have a posterior
        clean = posterior.sample(draws.normal("posterior", shape))  # (B, K, C), in shuffled order
        latents = clean
        if self.gamma > 0:
            t = self._draw_time(draws)[:, None, None]  # (B, 1, 1)
            latents = (1 - t) * clean + t * self.gamma * draws.normal("noise", shape)
        semantic_input = clean if self.semantic and self.semantic.input == "clean" else latents

        kl = posterior.kl()  # (B,)
        return Recon(
            images=self.decoder(latents, restore),
            terms={"kl": kl.mean()},
            predictions={name: decoder(semantic_input, restore) for name, decoder in self.sem_decoders.items()},
            masked=None if kept is None else restore >= kept.shape[1],
            details={
                "posterior": posterior,
                "kl": kl,
                "latents": latents,
                "semantic_input": semantic_input,
                "kept": kept,
                "restore": restore,
            },
        )

    # -- use ----------------------------------------------------------------------------------------------------------
    def posterior_moments(self, images: Tensor) -> Tensor:
        """(B, N, 2C): nothing is hidden."""
        return self.encoder(images)

    def paint(self, z: Tensor) -> Tensor:
        return self.decoder(z)
