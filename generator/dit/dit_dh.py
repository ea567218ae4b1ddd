"""DiT^DH: a diffusion transformer with a shallow, wide head (RAE, Zheng et al. 2025; RecTok, arXiv 2512.13421).

A trunk of DiT blocks turns latents, time and class into one condition per token; a head of two 2048-wide blocks, which
sees the latent afresh, predicts from it the velocity of the flow. The head is wide because the latent has many
channels: a velocity network narrower than its data cannot fit it. Parameter names are those of the official
checkpoints.

Shape letters: B batch, N tokens, C latent channels, D trunk width, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from core import sizes
from core.errors import UserError, nearest
from core.limits import Count, Layers, Share, Width
from core.nn.attention import Attention
from core.nn.cuda_graph import Replayed, addresses, cuda_graphs_work, weak_method
from core.nn.embed import LabelEmbedding, TimeEmbedding, sincos_2d
from core.nn.linear import Linear
from core.nn.mlp import SwiGLU
from core.nn.norms import RMSNorm, modulate
from core.nn.precision import no_autocast
from core.nn.rope import Rope, axial_rope
from core.rng import Draws
from core.specs import Chart, Continuous, Guidance, Kept, LatentSpec, Loss, Progress
from core.train.parallel import compile_blocks
from core.weights.names import State
from generator.dit import flow
from generator.dit.flow import euler
from generator.engine import Sampled, Weights, mismatches
from generator.guidance import guide, is_guided

RECORDED_BATCH = 16  # from here on the kernels take longer than their launch


@dataclass(frozen=True)
class Size:
    """Shape of trunk and head."""

    trunk_width: Width
    trunk_depth: Layers
    trunk_heads: Width
    head_width: Width = 2048
    head_depth: Layers = 2
    head_heads: Width = 16


SIZES = {"s": Size(384, 12, 6), "b": Size(768, 12, 12), "l": Size(1024, 24, 16), "xl": Size(1152, 28, 16)}


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
        self.attn = Attention(width, heads, "rms" if qk_norm else "none")
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, rope: Rope) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)  # (B, N, width)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """(B, N, E) -> (B, N, C)."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiTDH(Sampled):
    """core.specs.Generator of continuous latents by flow matching.

    Args:
        size: a name in SIZES or {trunk_width, trunk_depth, trunk_heads}, optionally with head_width, head_depth and
            head_heads.
        channels, grid: of the latent; an int is the side of a square grid.
        label_drop: how often the class is hidden in training, for classifier-free guidance.
        qk_norm: normalise queries and keys. Off in the released models.
    """

    models = Continuous
    cast = (nn.Linear, nn.Conv2d)
    charts = (Chart("loss", ("flow",), live=True),)

    def __init__(
        self,
        *,
        size: str | Annotated[dict, Size] = "xl",
        channels: Width = 128,
        grid: Count | tuple[Count, Count] = 16,
        num_classes: Count = 1000,
        label_drop: Share = 0.1,
        qk_norm: bool = False,
    ):
        super().__init__()
        s = sizes.pick(size, Size, SIZES)
        self.channels, self.grid = channels, (grid, grid) if isinstance(grid, int) else tuple(grid)
        self.num_classes, self.label_drop = num_classes, label_drop
        self.time_shift = flow.time_shift(self.grid[0] * self.grid[1] * channels)
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
        self.s_projector = nn.Identity() if same_width else Linear(s.trunk_width, s.head_width)
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

    def class_rows(self) -> tuple[str, int]:
        return "y_embedder.embedding_table.weight", 0

    def resized(self, state: State, settings: Mapping[str, Any], spec: LatentSpec) -> State:
        """Positions are fixed tables, computed for the grid; the shift of time follows from its size."""
        same = state["pos_embed"].shape == self.pos_embed.shape
        return state if same else {**state, "pos_embed": self.pos_embed.detach()}

    def fits(self, spec: LatentSpec) -> list[str]:
        if not isinstance(spec, self.models):
            return [f"DiT^DH models continuous latents, the tokenizer gives {spec}"]
        return mismatches(self, spec, "channels", "grid")

    # -- the network --------------------------------------------------------------------------------------------------
    def network(self, x: Tensor, time_embedding: Tensor, class_embedding: Tensor) -> Tensor:
        """Velocity at x (B, C, h, w), for embedded times and classes (B, D)."""
        time = time_embedding[:, None]  # (B, 1, D)
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
        return self.network(x, self.t_embedder(t), self.y_embedder(labels))

    # -- training -----------------------------------------------------------------------------------------------------
    def training_point(self, latents: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, t, target velocity) for these latents, fp32."""
        latents = latents.float()
        noise = draws.normal("noise", latents.shape[1:])  # (B, C, h, w)
        t = flow.training_time(draws.uniform("time"), self.time_shift)  # (B,)
        return flow.mix(latents, noise, t), t, flow.target(latents, noise)

    def drop_labels(self, labels: Tensor, draws: Draws) -> Tensor:
        return self.y_embedder.drop(labels, draws.uniform("label_drop"), self.label_drop)

    def forward(self, latents: Tensor, labels: Tensor, draws: Draws, progress: Progress | None = None) -> Loss:
        x, t, wanted = self.training_point(latents, draws)
        predicted = self.velocity(x, t, self.drop_labels(labels, draws))  # (B, C, h, w)
        loss = (predicted.float() - wanted).square().mean()
        return Loss(loss, {"flow": loss.detach()})

    # -- sampling -----------------------------------------------------------------------------------------------------
    def guides(self, guidance: Guidance) -> str:
        if isinstance(guidance.scale, tuple):
            return f"has no codebooks: sample.scale is one number, not {list(guidance.scale)}"
        return (
            ""
            if guidance.schedule == "constant"
            else f"takes a constant scale, not sample.schedule: {guidance.schedule}"
        )

    def field(self, labels: Tensor, guidance: Guidance = Guidance()) -> Field:
        """The guided velocity of the classes `labels`, as a function of (x, t)."""
        field = Field([self, guidance.guide] if autoguided(guidance) else [self], guidance)
        field.begin(labels)
        return field

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        draws: Draws,
        guidance: Guidance = Guidance(),
        steps: int = 150,
        cuda_graph: bool | None = None,
        *,
        kept: Kept | None = None,
        on_latents: Callable[[Tensor, float], None] | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w), fp32. `steps` counts the points of the time grid, so there are steps - 1 updates.

        cuda_graph: record a step once and replay it, also in later calls with as many labels; it spares small batches the
            launch of their kernels. None: on a GPU, up to RECORDED_BATCH labels.
        kept: see core.specs.Kept. After every step these lie where their own path from the noise is by then, so that the
            others are drawn by all of them.
        on_latents: called after every step with the latents on their way and the share of steps that are done.
        """
        if guidance.kind not in ("cfg", "auto"):
            raise UserError(f'guidance kind "{guidance.kind}" is not known.{nearest(guidance.kind, ["cfg", "auto"])}')
        if guidance.active and guidance.kind == "auto" and not isinstance(guidance.guide, DiTDH):
            raise UserError('guidance kind "auto" needs a weaker generator to guide with, another DiT^DH')
        if steps < 2:
            raise UserError(f"sampling needs at least 2 steps, not {steps}")
        device, batch = labels.device, len(labels)
        noise = draws.normal("noise", (self.channels, *self.grid))  # (B, C, h, w)
        times = flow.sampling_times(steps, self.time_shift)
        if cuda_graph is None:
            cuda_graph = device.type == "cuda" and batch <= RECORDED_BATCH
        recorded = cuda_graph and cuda_graphs_work(device)
        models = [self, guidance.guide] if autoguided(guidance) else [self]
        weights = [model.weights(model.final_layer.linear.weight) for model in models]

        def make() -> Field:
            copies = [self._ready(model, part) for part, model in zip(weights, models)]
            return Field(copies, guidance, Replayed if recorded else None)

        key = batch, replace(guidance, guide=None), recorded, device, [addresses(model) for model in models[1:]]
        with no_autocast(labels):
            field = self.kept(key, make)
            field.begin(labels, times.tolist())
            after = None if kept is None else self._on_path(kept, noise, float(times[-1]))
            return euler(field, noise, times, after=after, watch=on_latents)

    @staticmethod
    def _on_path(kept: Kept, noise: Tensor, end: float) -> Callable[[Tensor, float], Tensor]:
        """What puts kept latents on the straight line from their noise (B, C, h, w) to themselves, where they are at `end`."""
        mask, values = kept.mask.to(noise.device), kept.values.to(noise.device).float()
        if values.shape[1:] != noise.shape[1:] or mask.shape[1:] != (1, *noise.shape[2:]):
            raise UserError(
                f"kept latents of shape {list(values.shape)} with a mask of shape {list(mask.shape)}: give (B or 1, "
                f"{', '.join(map(str, noise.shape[1:]))}) and (B or 1, 1, {noise.shape[2]}, {noise.shape[3]})."
            )

        def put(x: Tensor, time: float) -> Tensor:
            path = values if time == end else time * values + (1 - time) * noise
            return torch.where(mask, path, x)

        return put

    @staticmethod
    def _ready(model: DiTDH, weights: Weights) -> nn.Module:
        """The network in the precision of the products, compiled if it is so itself or if that is wanted."""
        network = model if weights.dtype == model.final_layer.linear.weight.dtype else weights.copy(model)
        if model.compiled or (network is not model and model.blocks[0]._compiled_call_impl is not None):
            compile_blocks(network)
        return network


def autoguided(guidance: Guidance) -> bool:
    return guidance.active and guidance.kind == "auto"


class Field:
    """The guided velocity as a function of a state and its time, for one batch after another: `begin` comes first.

    What a step reads beside its arguments lies where it lay the last time; so a recorded step serves every batch of its
    size.

    Args:
        models: the network and, where it is guided by a weaker one, that.
        wrap: of the functions of tensors alone that a step calls, for instance core.nn.cuda_graph.Replayed.
    """

    def __init__(self, models: Sequence[Any], guidance: Guidance, wrap: Callable[[Callable], Callable] | None = None):
        self.models, self.guidance = models, guidance
        self.plain, self.guided = (
            wrap(f) if wrap else f for f in (weak_method(self, Field._plain), weak_method(self, Field._guided))
        )
        self.classes: list[Tensor] = []  # (B, D) each, D of the model; with no class behind it where that guides
        self.known: list[dict[float, Tensor]] = [{} for _ in models]  # time -> (D,)

    def begin(self, labels: Tensor, times: Sequence[float] = ()) -> None:
        """What does not depend on the state: the classes (B,) and all times that will be asked for, embedded in one go."""
        classes = [model.y_embedder(labels) for model in self.models]
        if self.guidance.active and len(self.models) == 1:
            embedder = self.models[0].y_embedder
            classes[0] = torch.cat((classes[0], embedder(embedder.null(labels))))  # (2B, D)
        if self.classes:
            for held, fresh in zip(self.classes, classes):
                held.copy_(fresh)
        else:
            self.classes = classes
        if times:
            at = torch.tensor(times, dtype=torch.float32, device="cpu").to(labels.device, non_blocking=True)
            self.known = [dict(zip(times, model.t_embedder(at))) for model in self.models]

    def _plain(self, x: Tensor, time: Tensor) -> Tensor:
        return self.models[0].network(x, time, self.classes[0][: len(x)])

    def _pair(self, x: Tensor, *time: Tensor) -> Sequence[Tensor]:
        """The velocity and the worse one. Both classes go through one network together."""
        if len(self.models) == 2:
            return [model.network(x, *embedded) for model, *embedded in zip(self.models, time, self.classes)]
        return self.models[0].network(torch.cat((x, x)), torch.cat((time[0], time[0])), self.classes[0]).chunk(2)

    def _guided(self, x: Tensor, *time: Tensor) -> Tensor:
        return guide(*self._pair(x, *time), None, self.guidance)

    def __call__(self, x: Tensor, t: Tensor | float) -> Tensor:
        """(B, C, h, w) at x (B, C, h, w) and the time of every sample, (B,), or of all, a number: then steps outside the
        guidance interval pay for the network alone."""
        if isinstance(t, Tensor):
            time = [model.t_embedder(t) for model in self.models]
            return guide(*self._pair(x, *time), t, self.guidance) if self.guidance.active else self._plain(x, time[0])

        def embedded(model: Any, rows: dict[float, Tensor]) -> Tensor:
            row = rows[t] if t in rows else model.t_embedder(torch.full((1,), t, device=x.device))[0]
            return row.expand(len(x), -1)

        if self.guidance.active and is_guided(t, self.guidance):
            return self.guided(x, *map(embedded, self.models, self.known))
        return self.plain(x, embedded(self.models[0], self.known[0]))
