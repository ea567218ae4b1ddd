"""DiT^DH: a diffusion transformer with a shallow, wide head (RAE, Zheng et al. 2025; RecTok, arXiv 2512.13421).

A trunk of DiT blocks turns latents, time and class into one condition per token; a head of two 2048-wide blocks, which
sees the latent afresh, predicts from it the velocity of the flow. The head is wide because the latent has many
channels: a velocity network narrower than its data cannot fit it. Parameter names are those of the official
checkpoints.

Shape letters: B batch, N tokens, C latent channels, D trunk width, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Callable

import torch
from torch import Tensor, nn

from core.errors import UserError, nearest
from core.nn.attention import Attention
from core.nn.embed import LabelEmbedding, TimeEmbedding, sincos_2d
from core.nn.mlp import SwiGLU
from core.nn.norms import RMSNorm, modulate
from core.nn.rope import Rope, axial_rope
from core.specs import Continuous, Guidance, LatentSpec, Loss, Progress
from generator.dit import transport
from generator.dit.ode import euler
from generator.guidance import guide, in_interval


@dataclass(frozen=True)
class Size:
    """Shape of trunk and head."""

    trunk_width: int
    trunk_depth: int
    trunk_heads: int
    head_width: int = 2048
    head_depth: int = 2
    head_heads: int = 16


SIZES = {"s": Size(384, 12, 6), "b": Size(768, 12, 12), "l": Size(1024, 24, 16), "xl": Size(1152, 28, 16)}


def _size(value: str | dict[str, int]) -> Size:
    if isinstance(value, str):
        if value not in SIZES:
            raise UserError(f'generator size "{value}" is not known.{nearest(value, SIZES)}')
        return SIZES[value]
    known = [f.name for f in fields(Size)]
    unknown = [key for key in value if key not in known]
    missing = [key for key in known[:3] if key not in value]
    if unknown or missing:
        raise UserError(f'generator size has no setting "{unknown[0]}".{nearest(unknown[0], known)}' if unknown
                        else f"generator size lacks {', '.join(missing)}")
    return Size(**value)


class PointEmbedding(nn.Module):
    """1x1 convolution to tokens: (B, C, h, w) -> (B, N, width)."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """DiT block; the condition (B, 1 or N, width) sets shift, scale and gate of both branches."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, rope: Rope) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)  # (B, N, width)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """(B, N, E) -> (B, N, C)."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiTDH(nn.Module):
    """core.specs.Generator of continuous latents by flow matching.

    Args:
        size: a name in SIZES or {trunk_width, trunk_depth, trunk_heads}, optionally with head_width, head_depth and
            head_heads.
        channels, grid: of the latent; an int is the side of a square grid.
        label_drop: how often the class is hidden in training, for classifier-free guidance.
        qk_norm: normalise queries and keys. Off in the released models.
    """

    def __init__(
        self,
        *,
        size: str | dict = "xl",
        channels: int = 128,
        grid: int | tuple[int, int] = 16,
        num_classes: int = 1000,
        label_drop: float = 0.1,
        qk_norm: bool = False,
    ):
        super().__init__()
        s = _size(size)
        self.channels, self.grid = channels, (grid, grid) if isinstance(grid, int) else tuple(grid)
        self.num_classes, self.label_drop = num_classes, label_drop
        self.time_shift = transport.time_shift(self.grid[0] * self.grid[1] * channels)
        self.trunk_depth = s.trunk_depth

        self.t_embedder = TimeEmbedding(s.trunk_width)
        self.y_embedder = LabelEmbedding(num_classes, s.trunk_width)
        self.s_embedder = PointEmbedding(channels, s.trunk_width)
        self.x_embedder = PointEmbedding(channels, s.head_width)
        # Fixed, but a parameter in official checkpoints.
        self.pos_embed = nn.Parameter(sincos_2d(s.trunk_width, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(  # the trunk, then the head
            [Block(s.trunk_width, s.trunk_heads, qk_norm) for _ in range(s.trunk_depth)]
            + [Block(s.head_width, s.head_heads, qk_norm) for _ in range(s.head_depth)]
        )
        same_width = s.trunk_width == s.head_width
        self.s_projector = nn.Identity() if same_width else nn.Linear(s.trunk_width, s.head_width)
        self.final_layer = FinalLayer(s.head_width, channels)
        for part, head_dim in (("trunk", s.trunk_width // s.trunk_heads), ("head", s.head_width // s.head_heads)):
            cos, sin = axial_rope(head_dim, self.grid)
            self.register_buffer(f"{part}_cos", cos, persistent=False)
            self.register_buffer(f"{part}_sin", sin, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """PyTorch's defaults, except: embeddings small, and every block and the output start at zero."""
        for embedder in (self.s_embedder, self.x_embedder):
            nn.init.xavier_uniform_(embedder.proj.weight)
            nn.init.zeros_(embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        zeroed = [block.adaLN_modulation[1] for block in self.blocks]
        for layer in (*zeroed, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def fits(self, spec: LatentSpec) -> list[str]:
        if not isinstance(spec, Continuous):
            return [f"DiT^DH models continuous latents, the tokenizer gives {spec}"]
        problems = []
        if spec.channels != self.channels:
            problems.append(f"generator.channels is {self.channels}, the tokenizer has {spec.channels}")
        if tuple(spec.grid) != self.grid:
            problems.append(f"generator.grid is {list(self.grid)}, the tokenizer has {list(spec.grid)}")
        return problems

    # -- the network --------------------------------------------------------------------------------------------------
    def network(self, x: Tensor, t: Tensor, class_embedding: Tensor) -> Tensor:
        """Velocity at x (B, C, h, w), t (B,), for embedded classes (B, D)."""
        time = self.t_embedder(t)[:, None]  # (B, 1, D)
        # parity: SiLU here and again inside every block.
        condition = nn.functional.silu(time + class_embedding[:, None])  # (B, 1, D)
        tokens = self.s_embedder(x) + self.pos_embed  # (B, N, D)
        rope = (self.trunk_cos, self.trunk_sin)
        for block in self.blocks[: self.trunk_depth]:
            tokens = block(tokens, condition, rope)
        # parity: the head's condition gets the time once more, but not the class.
        condition = self.s_projector(nn.functional.silu(time + tokens))  # (B, N, E)

        h = self.x_embedder(x)  # (B, N, E)
        rope = (self.head_cos, self.head_sin)
        for block in self.blocks[self.trunk_depth :]:
            h = block(h, condition, rope)
        return self.final_layer(h, condition).transpose(1, 2).unflatten(2, self.grid)  # (B, C, h, w)

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Unguided velocity. Label `num_classes` means "no class"."""
        return self.network(x, t, self.y_embedder(labels))

    # -- training -----------------------------------------------------------------------------------------------------
    def training_point(self, latents: Tensor, draws) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, target velocity) for these latents, fp32."""
        latents = latents.float()
        noise = draws.normal("noise", latents.shape[1:])  # (B, C, h, w)
        t = transport.training_time(draws.uniform("time"), self.time_shift)  # (B,)
        return transport.mix(latents, noise, t), t, transport.target(latents, noise)

    def drop_labels(self, labels: Tensor, draws) -> Tensor:
        return self.y_embedder.drop(labels, draws.uniform("label_drop"), self.label_drop)

    def forward(self, latents: Tensor, labels: Tensor, draws, progress: Progress | None = None) -> Loss:
        x, t, wanted = self.training_point(latents, draws)
        predicted = self.velocity(x, t, self.drop_labels(labels, draws))  # (B, C, h, w)
        loss = (predicted.float() - wanted).square().mean()
        return Loss(loss, {"flow": loss.detach()})

    # -- sampling -----------------------------------------------------------------------------------------------------
    def field(self, labels: Tensor, guidance: Guidance = Guidance()) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided velocity as a function of (x, t); what does not depend on them is computed here, once.

        t is (B,), or 0-dim on the CPU for a whole batch at one time; then steps outside the guidance interval do not
        pay for guidance.
        """
        conditional = self.y_embedder(labels)  # (B, D)
        doubled = torch.cat((conditional, self.y_embedder(self.y_embedder.null(labels))))  # (2B, D)
        weaker = guidance.guide.field(labels) if guidance.active and guidance.kind == "auto" else None

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            plain = not guidance.active or (t.ndim == 0 and not bool(in_interval(t, guidance)))
            if t.ndim == 0:
                t = torch.full((x.shape[0],), t.item(), device=x.device)  # (B,); a fill, where .to() would synchronise
            if plain:
                return self.network(x, t, conditional)
            if weaker is not None:
                return guide(self.network(x, t, conditional), weaker(x, t), t, guidance)
            v, unconditional = self.network(torch.cat((x, x)), torch.cat((t, t)), doubled).chunk(2)
            return guide(v, unconditional, t, guidance)

        return velocity

    @torch.no_grad()
    def sample(self, labels: Tensor, draws, guidance: Guidance = Guidance(), steps: int = 150) -> Tensor:
        """Latents (B, C, h, w), fp32. `steps` counts the points of the time grid, so there are steps - 1 updates."""
        if guidance.kind not in ("cfg", "auto"):
            raise UserError(f'guidance kind "{guidance.kind}" is not known.{nearest(guidance.kind, ["cfg", "auto"])}')
        if guidance.active and guidance.kind == "auto" and guidance.guide is None:
            raise UserError('guidance kind "auto" needs a weaker generator to guide with')
        if steps < 2:
            raise UserError(f"sampling needs at least 2 steps, not {steps}")
        noise = draws.normal("noise", (self.channels, *self.grid))  # (B, C, h, w)
        return euler(self.field(labels, guidance), noise, transport.sampling_times(steps, self.time_shift))
