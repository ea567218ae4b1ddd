"""The pixel decoder of D-AR: a flow-matching transformer that denoises an image step by step, each step under the
conditions of its own group of tokens (arXiv 2505.23660).

t = 0 is noise, t = 1 is data scaled by `data_std`. Parameter names are those of the official checkpoints, except that
query, key and value of an attention layer are one matrix.

Shape letters: B batch, L = (H / p) (W / p) patches of p x p pixels, D width, n condition vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from core.limits import Layers, Pixels, Positive, Whole, Width
from core.nn.attention import Attention, CrossAttention
from core.nn.conv import pixel_convs
from core.nn.embed import sinusoidal
from core.nn.linear import Linear
from core.nn.mlp import MLP
from core.nn.norms import modulate
from core.nn.rope import AxialRope, Rope


def plain_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


def shifted_time(u: Tensor, shift: float) -> Tensor:
    """Uniform time -> the time that the network sees; shift > 1 spends more steps near noise."""
    return u / (u + shift * (1 - u))


class TimeMLP(nn.Module):
    """Sinusoidal features of 1000 t, then an MLP: (B,) -> (B, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoidal(1000.0 * t.float(), self.width))


class Block(nn.Module):
    """DiT block whose modulation is per patch: what the patch reads from the conditions plus the time."""

    def __init__(self, width: int, heads: int, own_time: bool):
        super().__init__()
        self.attention = Attention(width, heads, qk_norm="layer")
        self.mlp = MLP(width, 4 * width, activation="silu")
        self.time_embed = TimeMLP(width) if own_time else nn.Identity()
        self.cond_embed = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.cross_attn = CrossAttention(width, heads, qk_norm="layer")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def forward(self, x: Tensor, conditions: Tensor, time: Tensor, rope: Rope) -> Tensor:
        """x (B, L, D), conditions (B, n, D), time (B or 1, D) embedded."""
        read = self.cross_attn(plain_norm(x), plain_norm(self.cond_embed(conditions)), rope)  # (B, L, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(time[:, None] + read).chunk(6, dim=-1)
        x = x + gate1 * self.attention(modulate(plain_norm(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(plain_norm(x), shift2, scale2))


class ModulatedOutput(nn.Module):
    """The optional output layer: patches modulated by the time, then a linear map."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))
        self.linear = Linear(width, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(plain_norm(x), shift, scale))


@dataclass(frozen=True)
class DecoderSettings:
    """The `decoder` section of a D-AR tokenizer.

    Attributes:
        width, depth: of the transformer.
        patch_size: pixels per patch and axis.
        data_std: what images are multiplied by before noise is added.
        time_shift: see `shifted_time`.
        own_time: every block embeds the time by itself; otherwise they share one embedding.
        modulated_output: parity: the official `mlp_head`; needs own_time: false.
        feature_layer: the features for representation alignment (REPA, Yu et al. 2024) are taken before this block.
        feature_hidden: hidden width of the alignment head.
        rope_theta: of the attention layers.
        pixel_channels: a patch paints so many values per pixel, not three, of which `core.nn.conv.pixel_convs` makes the
            velocity, beside the noisy pixels themselves and less them: near t = 0 the convolutions then paint the picture,
            not the noise. 0: as published.
    """

    width: Width = 768
    depth: Layers = 12
    patch_size: Pixels = 8
    data_std: Positive = 0.6
    time_shift: Positive = 2.0
    own_time: bool = True
    modulated_output: bool = False
    feature_layer: Whole = 8
    feature_hidden: Width = 2048
    rope_theta: Positive = 10000.0
    pixel_channels: Whole = 0


class DiffusionCore(nn.Module):
    """Velocity of noisy pixels under n condition vectors.

    Args:
        settings: see DecoderSettings.
        condition_width: of the condition vectors.
        image_size: whose rotary table is built at once; others are built when first met.
        feature_width: output width of the alignment head; None for no head.
        head_dim: of the attention layers.
        init_std: of linear maps when training starts.
        places: condition vectors belong to patches, where they are also added to what the blocks begin with.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        *,
        condition_width: int,
        image_size: int,
        channels: int = 3,
        feature_width: int | None = 768,
        head_dim: int = 64,
        init_std: float = 0.02,
        places: bool = False,
    ):
        super().__init__()
        width, patch_size, own_time = settings.width, settings.patch_size, settings.own_time
        if settings.modulated_output and own_time:
            raise UserError(
                "decoder: modulated_output needs own_time: false, since it is fed the shared time embedding."
            )
        if settings.modulated_output and settings.pixel_channels:
            raise UserError(
                "decoder: pixel_channels goes with the plain output layer, not with modulated_output: true."
            )
        if image_size % patch_size:
            raise UserError(f"decoder: patch_size {patch_size} does not divide image_size {image_size}.")
        self.patch_size, self.feature_layer = patch_size, settings.feature_layer
        heads = width // head_dim
        pixels = channels * patch_size**2
        self.cond_mlp = Linear(condition_width, width)
        self.conv_in = nn.Conv2d(pixels, width, 1)
        self.cond_place = Linear(width, width) if places else None
        self.blocks = nn.ModuleList(Block(width, heads, own_time) for _ in range(settings.depth))
        self.time_embed = None if own_time else TimeMLP(width)
        painted = (settings.pixel_channels or channels) * patch_size**2
        self.conv_out = None if settings.modulated_output else nn.Conv2d(width, painted, 1)
        self.pixel_convs = pixel_convs(settings.pixel_channels, seen=channels)
        self.linear_out = ModulatedOutput(width, pixels) if settings.modulated_output else None
        self.repa_out = None
        if feature_width is not None:
            hidden = settings.feature_hidden
            layers = (Linear(width, hidden), nn.SiLU(), Linear(hidden, hidden), nn.SiLU())
            self.repa_out = nn.Sequential(*layers, Linear(hidden, feature_width))
        self.rope = AxialRope(head_dim, (image_size // patch_size,) * 2, settings.rope_theta)
        self._init_weights(init_std)

    def _init_weights(self, std: float) -> None:
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=std)
                    nn.init.zeros_(module.bias)
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        last = self.last_layer
        if isinstance(last, nn.Conv2d):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    def last_layer(self) -> nn.Conv2d | nn.Linear:
        """That paints the velocity."""
        if len(self.pixel_convs):
            return self.pixel_convs[-1]
        return self.linear_out.linear if self.conv_out is None else self.conv_out

    def embed_time(self, t: Tensor) -> list[Tensor]:
        """The time embedding of every block for times (S,): depth tensors of (S, D)."""
        if self.time_embed is not None:
            return [self.time_embed(t)] * len(self.blocks)
        return [block.time_embed(t) for block in self.blocks]

    def forward(
        self, x: Tensor, time: list[Tensor], conditions: Tensor, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(velocity (B, 3, H, W), alignment features (B, 256, out) or None).

        Args:
            x: (B, 3, H, W) noisy pixels, H and W multiples of the patch size.
            time: what `embed_time` gave, one row per image or one for all.
            conditions: (B, n, condition_width).
            places: (B or 1, n) the patch of each, all different; for a network that was built with places.
        """
        patches = F.pixel_unshuffle(x, self.patch_size)  # (B, 3 p^2, h, w)
        grid = patches.shape[-2:]
        rope = self.rope(tuple(grid))
        conditions = plain_norm(self.cond_mlp(conditions))
        h = self.conv_in(patches).flatten(2).transpose(1, 2)  # (B, L, D)
        if self.cond_place is not None:
            added = self.cond_place(conditions)
            h = h + torch.zeros_like(h).scatter(1, places[..., None].expand_as(added), added.to(h.dtype))
        features = None
        for i, (block, now) in enumerate(zip(self.blocks, time)):
            if i == self.feature_layer and self.repa_out is not None and self.training:
                features = self._features(h, grid)
            h = block(h, conditions, now, rope)
        h = plain_norm(h)
        if self.linear_out is not None:
            out = self.linear_out(h, time[0]).transpose(1, 2).unflatten(2, grid)
        else:
            out = self.conv_out(h.transpose(1, 2).unflatten(2, grid))
        out = F.pixel_shuffle(out, self.patch_size)
        if len(self.pixel_convs):
            out = self.pixel_convs(torch.cat((out, x.to(out.dtype)), dim=1)).float() - x
        return out, features

    def _features(self, h: Tensor, grid: torch.Size) -> Tensor:
        """Patches pooled to 16 rows (and as much in width), through the alignment head."""
        pool = grid[0] // 16
        if pool == 0:
            raise UserError(f"decoder: alignment with a teacher needs at least 16 rows of patches, not {grid[0]}.")
        pooled = F.avg_pool2d(h.transpose(1, 2).unflatten(2, grid), pool)
        return self.repa_out(pooled.flatten(2).transpose(1, 2))


def solver_times(steps: int, shift: float) -> Tensor:
    """(steps + 1,) increasing fp64 times from 0 to 1, on the CPU."""
    return shifted_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu"), shift)


class Trajectory:
    """Solves the flow step by step: `step` takes the conditions of the next step and returns what would be the result
    if it were the last one, at no extra cost. Adams-Bashforth of order two with constant coefficients.

    Args:
        core: the network.
        noise: (B, 3, H, W) fp32 standard normal.
        steps: of the solver.
        shift: of the time.
        data_std: of the data that the network models.
        method: "adams2" or "euler".
    """

    def __init__(
        self, core: DiffusionCore, noise: Tensor, steps: int, shift: float, data_std: float, method: str = "adams2"
    ):
        if method not in ("adams2", "euler"):
            raise UserError(f'the solver is "adams2" or "euler", not "{method}"')
        self.core, self.x, self.steps, self.data_std, self.method = core, noise.float(), steps, data_std, method
        times = solver_times(steps, shift)
        self.times = times.tolist()
        self.embedded = core.embed_time(times[:-1].float().to(noise.device, non_blocking=True))  # all steps at once
        self.done, self.previous = 0, None

    def step(self, conditions: Tensor, places: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1], not clamped: the image if sampling ended here. Advances the state."""
        i = self.done
        time = [embedding[i : i + 1] for embedding in self.embedded]
        velocity = self.core(self.x, time, conditions, places)[0].float()
        slope = velocity
        if self.method == "adams2" and self.previous is not None:
            # parity: coefficients of equal steps, although the steps are not equal
            slope = 1.5 * velocity - 0.5 * self.previous
        result = (self.x + (1.0 - self.times[i]) * slope) / self.data_std
        self.x = self.x + (self.times[i + 1] - self.times[i]) * slope
        self.previous, self.done = velocity, i + 1
        return result
