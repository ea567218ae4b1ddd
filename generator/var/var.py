"""VAR over parallel branches: predict the codes of a whole scale at once, from all coarser scales (Tian et al. 2024,
arXiv 2404.02905), both branches of a position from one hidden state (ImageFolder, arXiv 2410.01756, section 3.3).

The sequence is one start token, the class, and then for every scale after the first what the coarser ones add up to,
shrunk to that scale; a position predicts the codes at its own place. Parameter names map to the official ones in
generator/adapters/var.py.

B batch, S scales, L = sum of squared scales, K branches, V codes, D width, C channels of a code.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import parse_section
from core.errors import UserError
from core.limits import Count, Layers, Positive, Rate, Share, Whole, Width
from core.nn.attention import Attention
from core.nn.blockcausal import prepare
from core.nn.cuda_graph import Replayed, cuda_graphs_work, weak_method
from core.nn.dropout import drop_path, path_factors
from core.nn.embed import LabelEmbedding, resize_rows
from core.nn.gated_norm import gated_norm
from core.nn.kvcache import KVCache, LayerCache
from core.nn.linear import Linear, linear
from core.nn.mlp import MLP
from core.nn.norms import modulate
from core.nn.precision import no_autocast
from core.rng import Draws
from core.specs import Chart, Guidance, Kept, LatentSpec, Loss, MultiScale, Progress, ScaleOps
from core.weights.names import State
from generator.ar.decode import uncompiled
from generator.engine import Sampled, Weights, fused_attention, gelu_product, mismatches
from generator.guidance import guide_logits
from generator.guidance import scales as guidance_scales
from generator.sampling import Filter, choose, filters, keep, mark

RECORDED_BATCH = 64  # from here on the kernels take longer than their launch, and recordings only cost memory


@dataclass(frozen=True)
class Progressive:
    """Begin with the coarse scales and add finer ones as training goes on. All but `first` are shares of the run."""

    until: Share  # from here on every scale is trained
    first: Whole = 4  # number of the finest scale at the start
    warmup: Share = 0.0  # `first` stays at least so long
    ramp: Share = 1 / 300  # over which the weight of a scale just added grows

    @classmethod
    def parse(cls, value: dict[str, Any] | None, scales: int) -> Progressive | None:
        if not value:
            return None
        settings = parse_section("generator.progressive", value, cls)
        if not settings.until:
            return None
        if not 0 <= settings.warmup < settings.until <= 1 or not 0 <= settings.first < scales:
            raise UserError(
                "progressive: 0 <= warmup < until <= 1 are shares of the run and first is the number of a "
                f"scale, 0 to {scales - 1}; got {value!r}"
            )
        return settings

    def stage(self, fraction: float, scales: int) -> tuple[int, float]:
        """(number of the finest scale, weight of that scale) when this share of the run is done."""
        steps = scales - 1 - self.first
        if fraction >= self.until or steps == 0:
            return scales - 1, 1.0
        done = max(0.0, (fraction - self.warmup) / (self.until - self.warmup))
        finest = self.first + round(done * steps)
        if finest in (self.first, scales - 1):
            return finest, 1.0
        added = self.warmup + (finest - self.first - 0.5) / steps * (self.until - self.warmup)
        ramp = (fraction - added) / self.ramp if self.ramp else 1.0
        return finest, min(1.0, max(0.01, ramp))


class AdaLN(nn.Sequential):
    """linear(silu(condition)): (B, D) -> (B, 1, parts, D). Names as in the official files, `ada_lin.1`."""

    def __init__(self, width: int, parts: int):
        super().__init__(nn.SiLU(), Linear(width, parts * width))
        self.parts = parts

    def forward(self, condition: Tensor) -> Tensor:
        return super().forward(condition).unflatten(-1, (self.parts, -1))[:, None]


class Block(nn.Module):
    """x += gamma1 attn(norm(x) (1 + scale1) + shift1), then the same with the MLP; all six from the class.

    Args:
        shared: the six come from one layer that all blocks share, plus a learned offset per block.
        drop: stochastic depth of either half, per sample.
    """

    def __init__(self, width: int, heads: int, hidden: int, l2_norm: bool, shared: bool, drop: float):
        super().__init__()
        # parity: without l2 norm the scores are a quarter of the usual ones.
        scale = None if l2_norm else 0.25 / math.sqrt(width // heads)
        self.attn = Attention(width, heads, "l2" if l2_norm else "none", bias="qv", scale=scale)
        self.ffn = MLP(width, hidden, "gelu_tanh")
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.drop = drop
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) * width**-0.5)
        else:
            self.ada_lin = AdaLN(width, 6)

    def modulation(self, condition: Tensor) -> Tensor:
        """(B, 1, 6, D) of the class embedding (B, D), or of what the shared layer made of it (B, 1, 6, D)."""
        return condition + self.ada_gss if hasattr(self, "ada_gss") else self.ada_lin(condition)

    def forward(self, x: Tensor, condition: Tensor, blocks: Any = None, drops: Tensor | None = None) -> Tensor:
        """x (B, N, D). `drops` (B, 2) uniform, or None."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.modulation(condition).unbind(2)  # (B, 1, D) each
        first, second = (None, None) if drops is None else drops.unbind(1)
        branch = gamma1 * self.attn(modulate(self.norm(x), shift1, scale1), blocks=blocks)
        x = x + drop_path(branch, path_factors(first, self.drop, branch.dtype))
        branch = gamma2 * self.ffn(modulate(self.norm(x), shift2, scale2))
        return x + drop_path(branch, path_factors(second, self.drop, branch.dtype))


class VAR(Sampled):
    """core.specs.Generator of multi-scale codes. The defaults are the published recipe but for `depth`: 17 is released.

    Args:
        depth: layers; width 64 x depth and as many heads follow, unless given.
        scales, branches, vocab, code_dim: of the tokenizer's codes.
        label_drop: how often the class is hidden, for guidance. parity: in every teacher-forced pass, also of
            evaluations.
        drop_path: stochastic depth of the last block; default 0.1 depth / 24.
        l2_norm: queries and keys of unit length with a learned temperature.
        shared_adaln: one layer for all blocks makes the modulation.
        gamma_init, adaln_init, head_init: factors on the initial weights of the residual gates, of scale and shift,
            and of the head.
        label_smoothing: of the cross-entropy.
        progressive: {until, first, warmup, ramp}, see Progressive; None trains all scales from the start.
    """

    models = MultiScale
    charts = (
        Chart("loss", ("loss_mean", "loss_tail"), live=True),
        Chart("codes that were likeliest, %", ("acc_mean", "acc_tail")),
    )

    def __init__(
        self,
        *,
        depth: Layers = 17,
        width: Width | None = None,
        heads: Width | None = None,
        mlp_ratio: Positive = 4.0,
        scales: list[Count] | tuple[Count, ...] = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11),
        branches: Count = 2,
        vocab: Count = 4096,
        code_dim: Width = 32,
        num_classes: Count = 1000,
        label_drop: Share = 0.1,
        drop_path: Rate | None = None,
        l2_norm: bool = True,
        shared_adaln: bool = False,
        gamma_init: float = 1e-4,
        adaln_init: float = 0.5,
        head_init: float = 0.02,
        label_smoothing: Share = 0.0,
        progressive: Annotated[dict, Progressive] | None = None,
    ):
        super().__init__()
        width, heads = width or 64 * depth, heads or depth
        self.scales, self.branches, self.vocab, self.code_dim = tuple(scales), branches, vocab, code_dim
        self.num_classes, self.label_drop, self.label_smoothing = num_classes, label_drop, label_smoothing
        self.depth, self.heads, self.width = depth, heads, width
        self.progressive = Progressive.parse(progressive, len(self.scales))
        self.ends = tuple(accumulate(p * p for p in self.scales))
        length = self.ends[-1]

        self.word_embed = Linear(branches * code_dim, width)
        self.class_emb = LabelEmbedding(num_classes, width)
        self.pos_start = nn.Parameter(torch.empty(1, self.ends[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, length, width))
        self.lvl_embed = nn.Embedding(len(self.scales), width)
        sizes = torch.tensor([p * p for p in self.scales], device="cpu")
        level = torch.arange(len(self.scales), device="cpu").repeat_interleave(sizes)
        self.register_buffer("lvl_1L", level[None], persistent=False)
        last = 0.1 * depth / 24 if drop_path is None else drop_path
        self.shared_ada_lin = AdaLN(width, 6) if shared_adaln else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, heads, int(width * mlp_ratio), l2_norm, shared_adaln, last * i / max(1, depth - 1))
            for i in range(depth)
        )
        self.head_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_ada_lin = AdaLN(width, 2)  # scale, shift
        self.head = Linear(width, branches * vocab)
        self._ops: tuple[ScaleOps, ...] = ()  # in a tuple, since a tokenizer in an attribute would become a submodule
        self._init_weights(gamma_init, adaln_init, head_init)

    @torch.no_grad()
    def _init_weights(self, gamma: float, adaln: float, head: float) -> None:
        std = math.sqrt(1 / self.width / 3)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=std)
        self.head.weight.mul_(head)
        self.head_ada_lin[1].weight.mul_(adaln)
        for block in self.blocks:
            block.attn.proj.weight.div_(math.sqrt(2 * self.depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * self.depth))
            if hasattr(block, "ada_gss"):
                block.ada_gss[:, :, :2].mul_(gamma)
                block.ada_gss[:, :, 2:].mul_(adaln)
            else:
                block.ada_lin[1].weight[: 2 * self.width].mul_(gamma)
                block.ada_lin[1].weight[2 * self.width :].mul_(adaln)

    def no_weight_decay(self) -> set[str]:
        """Biases and vectors, positions, levels, temperatures and shared offsets. parity: classes are decayed."""
        spared = ("pos_1LC", "pos_start", "lvl_embed", "ada_gss", "scale_mul")
        return {
            name
            for name, p in self.named_parameters()
            if p.ndim == 1 or name.endswith("bias") or any(word in name for word in spared)
        }

    # -- the tokenizer ----------------------------------------------------------------------------------------------------
    def class_rows(self) -> tuple[str, int]:
        return "class_emb.embedding_table.weight", 0

    def resized(self, state: State, settings: Mapping[str, Any], spec: LatentSpec) -> State:
        """The positions of each scale like a picture; a level keeps its embedding."""
        known = tuple(settings.get("scales") or type(self).__init__.__kwdefaults__["scales"])
        if known == self.scales:
            return state
        if len(known) != len(self.scales) or known[0] != self.scales[0]:
            raise UserError(
                f"VAR learnt {len(known)} scales from {known[0]} x {known[0]} on and the tokenizer has {len(self.scales)} from "
                f"{self.scales[0]} x {self.scales[0]} on: sizes of scales can change, their number and the first one cannot."
            )
        parts = state["pos_1LC"].split([side * side for side in known], dim=1)
        resized = [resize_rows(part, (side, side)) for part, side in zip(parts, self.scales, strict=True)]
        return {**state, "pos_1LC": torch.cat(resized, dim=1)}

    def fits(self, spec: LatentSpec) -> list[str]:
        if not isinstance(spec, self.models):
            return [f"VAR models codes at several scales, the tokenizer gives {spec}"]
        return mismatches(self, spec, "scales", "branches", "vocab", "code_dim")

    def bind(self, tokenizer: ScaleOps) -> None:
        self._ops = (tokenizer,)

    @property
    def ops(self) -> ScaleOps:
        if not self._ops:
            raise UserError("VAR needs its tokenizer for the inputs of each scale: call bind(tokenizer) first")
        return self._ops[0]

    # -- the network ------------------------------------------------------------------------------------------------------
    def embed(self, inputs: Tensor, condition: Tensor, start: int) -> Tensor:
        """Tokens of positions `start` on: (B, n, D) fp32. `inputs` (B, m, K C) of scales after the first; the first
        scale, if it is among them, has the class embedding `condition` (B, D)."""
        stop = start + inputs.shape[1] + (self.ends[0] if start == 0 else 0)
        with no_autocast(inputs):
            x = self.word_embed(inputs.float())
            if start == 0:
                x = torch.cat((condition[:, None] + self.pos_start, x), dim=1)
            return x + self.lvl_embed(self.lvl_1L[:, start:stop]) + self.pos_1LC[:, start:stop]

    def classify(self, x: Tensor, modulation: Tensor) -> Tensor:
        """(B, N, D) -> logits (B, N, K, V) fp32. `modulation` (B, 1, 2, D)."""
        scale, shift = modulation.unbind(2)
        logits = self.head(modulate(self.head_norm(x.float()), shift, scale))
        return logits.float().unflatten(-1, (self.branches, self.vocab))

    def logits(self, inputs: Tensor, labels: Tensor, draws: Draws | None = None) -> Tensor:
        """Teacher-forced logits (B, N, K, V) from inputs (B, N - P_0^2, K C); label `num_classes` means "no class".

        N may end with any scale. `draws` switch stochastic depth on.
        """
        length = inputs.shape[1] + self.ends[0]
        ends = tuple(end for end in self.ends if end <= length)
        if not ends or ends[-1] != length:
            raise ValueError(f"{length} positions end with no scale of {list(self.scales)}")
        condition = self.class_emb(labels)  # (B, D)
        x = self.embed(inputs, condition, 0)
        shared, blocks = self.shared_ada_lin(condition), prepare(ends, x.device)
        for index, block in enumerate(self.blocks):
            drops = draws.uniform(f"drop path {index}", (2,)) if draws is not None and block.drop > 0 else None
            x = block(x, shared, blocks=blocks, drops=drops)
        return self.classify(x, self.head_ada_lin(condition))

    # -- training -----------------------------------------------------------------------------------------------------------
    def drop_labels(self, labels: Tensor, draws: Draws) -> Tensor:
        return self.class_emb.drop(labels, draws.uniform("label_drop"), self.label_drop)

    def forward(self, latents: Tensor, labels: Tensor, draws: Draws, progress: Progress | None = None) -> Loss:
        finest, ramp = len(self.scales) - 1, 1.0
        if self.progressive is not None and progress is not None:
            finest, ramp = self.progressive.stage(progress.fraction, len(self.scales))
        begin, length = (0, *self.ends)[finest], self.ends[finest]
        targets = latents[:, :length]  # (B, N, K)
        inputs = self.ops.scale_inputs(targets)[:, : length - self.ends[0]]
        logits = self.logits(inputs, self.drop_labels(labels, draws), draws if self.training else None)

        def cross_entropy(smoothing: float) -> Tensor:
            """(N,)"""
            losses = F.cross_entropy(
                logits.flatten(0, 2), targets.flatten(), reduction="none", label_smoothing=smoothing
            )
            return losses.view(targets.shape).mean((0, 2))

        per_position = cross_entropy(self.label_smoothing)
        # parity: also while only coarse scales are trained, a position counts 1 / (number of all positions).
        loss = (per_position[:begin].sum() + ramp * per_position[begin:].sum()) / self.ends[-1]
        with torch.no_grad():
            right = (logits.argmax(-1) == targets).float().mean((0, 2)) * 100
            plain = cross_entropy(0.0) if self.label_smoothing else per_position  # parity: what is reported
            logs = {
                "loss_mean": plain.mean(),
                "loss_tail": plain[begin:].mean(),
                "acc_mean": right.mean(),
                "acc_tail": right[begin:].mean(),
            }
        return Loss(loss, {name: value.detach() for name, value in logs.items()})

    # -- sampling -----------------------------------------------------------------------------------------------------------
    @uncompiled
    @torch.no_grad()
    def generate(
        self, labels: Tensor, guidance: Guidance, pick: Callable[[int, Tensor], Tensor], cuda_graph: bool | None = None
    ) -> tuple[Tensor, Any]:
        """Scale by scale with cached keys and values.

        Args:
            pick: called as pick(scale, guided logits (B, p p, K, V)) -> codes (B, p p, K).
            cuda_graph: see `sample`; the logits are then overwritten by the next call of `generate`.

        Returns:
            codes (B, L, K), and the tokenizer's state after the last scale.
        """
        batch, device = len(labels), labels.device
        guidance = guidance.mixing()
        table = guidance_scales(guidance, len(self.scales), self.branches).to(device, non_blocking=True)  # (S, K)
        if cuda_graph is None:
            cuda_graph = device.type == "cuda" and batch <= RECORDED_BATCH
        guided, weights = guidance.active, self.weights(self.word_embed.weight)
        with no_autocast(labels):
            if cuda_graph and cuda_graphs_work(device):
                passes = self.kept(
                    (batch, guided, device),
                    lambda: Passes(
                        self, weights, batch, guided, functools.partial(Replayed, pool=torch.cuda.graph_pool_handle())
                    ),
                )
            else:
                passes = Passes(self, weights, batch, guided)
            passes.begin(labels)
            inputs = labels.new_zeros(batch, 0, self.branches * self.code_dim, dtype=torch.float32)
            codes, state = [], None
            for scale, run in enumerate(passes.scales):
                codes.append(pick(scale, run(inputs, table[scale])))
                state, inputs = self.ops.next_scale(state, codes[-1], scale)
            return torch.cat(codes, dim=1), state

    def sample(
        self,
        labels: Tensor,
        draws: Draws,
        guidance: Guidance = Guidance(),
        temperature: float | list[float] = 1.0,
        top_k: int | list[int] = 0,
        top_p: float | list[float] = 1.0,
        cuda_graph: bool | None = None,
        *,
        kept: Kept | None = None,
        on_codes: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Codes (B, L, K).

        Args:
            temperature, top_k, top_p: one number, or one per branch.
            cuda_graph: record the pass of every scale once and replay it, also in later calls with as many labels;
                it spares small batches the launch of their kernels. None: on a GPU, up to RECORDED_BATCH labels.
            kept: see core.specs.Kept. A code is drawn by all codes of coarser scales.
            on_codes: called with the codes so far, (B, t, K), when another scale is there.

        parity: the published guidance grows linearly from nothing at the first scale; in its own count cfg = 3.25 at
        the last. Here that is scale 4.25, schedule "linear", start 1.
        """
        if guidance.kind != "cfg":
            raise UserError(f'VAR can be guided against no class (sample.guidance: cfg), not by "{guidance.kind}"')
        chosen = filters(self.branches, temperature, top_k, top_p)
        noise, so_far = draws.categorical("codes", (self.ends[-1], self.branches)), []  # (B, L, K), its parts
        seen = torch.zeros(len(labels), device=labels.device)
        forced = None
        if kept is not None:
            forced = kept.codes(len(labels), self.ends[-1], self.branches).to(labels.device)

        def draw(filter: Filter, logits: Tensor, numbers: Tensor) -> Tensor:
            p = filter(logits)  # (B, p p, ..., V)
            seen.add_(p[..., 0].flatten(1).sum(1))
            return choose(p.flatten(0, -2), numbers.flatten())

        def pick(scale: int, logits: Tensor) -> Tensor:
            span = slice((0, *self.ends)[scale], self.ends[scale])
            numbers = noise[:, span]  # (B, p p, K)
            if len(set(chosen)) == 1:  # all branches at once
                codes = draw(chosen[0], logits, numbers)
            else:
                codes = [draw(chosen[k], logits[:, :, k], numbers[:, :, k]) for k in range(self.branches)]
                codes = torch.stack(codes, dim=-1)
            codes = codes.view_as(numbers)
            codes = codes if forced is None else keep(codes, forced[:, span])
            if on_codes:
                so_far.append(codes)
                on_codes(torch.cat(so_far, dim=1))
            return codes

        return mark(self.generate(labels, guidance, pick, cuda_graph)[0], seen)

    def heeds(self) -> str:
        return (
            "A scale is drawn at once, by the coarser ones: cells of coarse scales that the mask touches are drawn anew for "
            "the whole of their area, and kept codes of finer scales then refine other values than in the photo."
        )


class Passes:
    """The network's share of sampling one batch after another: `begin` with its labels, then `scales[s]` in order.

    Everything that a pass reads beside its arguments lies where it lay the last time; so a recorded pass serves every
    batch of this size. The stream is in the precision of the products, as the published sampler's.

    Args:
        weights: the network's, in the precision of the products.
        guided: pairs every row with one of no class.
        wrap: of the functions of tensors alone, for instance core.nn.cuda_graph.Replayed.
    """

    def __init__(
        self, model: VAR, weights: Weights, batch: int, guided: bool, wrap: Callable[[Callable], Callable] | None = None
    ):
        self.model, self.guided, self.dtype = model, guided, weights.dtype
        self.streams = 1 + guided
        rows, width, device = batch * self.streams, model.width, model.head.weight.device
        self.blocks, self.head = weights.copy(model.blocks), weights.copy(model.head)
        self.shared, self.head_ada_lin = weights.copy(model.shared_ada_lin), weights.copy(model.head_ada_lin)
        self.heads = [Heads(block.attn, weights, index) for index, block in enumerate(model.blocks)]
        self.places = weights.derive("places", lambda: Passes._places(model))
        self.cache = KVCache(
            model.depth, rows, model.heads, model.ends[-1], width // model.heads, device=device, dtype=weights.dtype
        )
        self.condition = torch.zeros(rows, width, device=device)
        # gamma, gamma, 1 + scale, 1 + scale, shift, shift of every block
        self.modulations = torch.zeros(model.depth, rows, 1, 6, width, device=device, dtype=weights.dtype)
        self.last = torch.zeros(rows, 1, 2, width, device=device, dtype=weights.dtype)
        self.plus_one = torch.zeros(6, 1, device=device)
        self.plus_one[2:4] = 1
        wrap = wrap or (lambda function: function)
        self.begin = wrap(weak_method(self, Passes._begin))
        self.scales = [
            wrap(weak_method(self, Passes._scale, start, end)) for start, end in zip((0, *model.ends), model.ends)
        ]

    @staticmethod
    def _places(model: VAR) -> Tensor:
        """(L, D): level and position of every token, and what only the first scale has."""
        return F.pad(model.pos_start[0], (0, 0, 0, model.ends[-1] - model.ends[0])) + (
            model.lvl_embed(model.lvl_1L[0]) + model.pos_1LC[0]
        )

    def _begin(self, labels: Tensor) -> Tensor:
        """The batch (B,) that the passes are about: what depends on the class alone is computed once, not once per scale:
        its embedding, the modulation of every block and that of the head."""
        if self.guided:
            labels = torch.cat((labels, self.model.class_emb.null(labels)))
        self.condition.copy_(self.model.class_emb(labels))
        condition = self.condition.to(self.dtype)
        shared = self.shared(condition)
        for block, six in zip(self.blocks, self.modulations):
            torch.add(block.modulation(shared), self.plus_one, out=six)
        torch.add(self.head_ada_lin(condition), self.plus_one[2:6:2], out=self.last)  # scale, shift
        return self.condition

    def _scale(self, start: int, end: int, inputs: Tensor, scale: Tensor) -> Tensor:
        """Guided logits (B, end - start, K, V) of the positions of one scale from its inputs (B, n, K C); guidance
        `scale` (K,)."""
        model, rows = self.model, len(self.condition)
        if start == 0:
            x = self.condition.view(self.streams, -1, 1, model.width)
        else:  # the same in both streams; in fp32
            x = model.word_embed(inputs).expand(self.streams, -1, -1, -1)
        tokens = torch.empty(
            self.streams, rows // self.streams, end - start, model.width, dtype=self.dtype, device=x.device
        )
        x = torch.add(x, self.places[start:end], out=tokens).flatten(0, 1)
        self.cache.seek(start)
        layers = self.cache.open(end - start, causal=False)
        modulations = [six.unbind(2) for six in self.modulations]
        last, norms = self.last.unbind(2), [block.norm for block in self.blocks]
        after = [*((shift1, factor1) for _, _, factor1, _, shift1, _ in modulations[1:]), (last[1], last[0])]
        h = gated_norm(x, modulations[0][4], modulations[0][2], norms[0])
        for block, heads, six, layer, (shift, factor), norm in zip(
            self.blocks, self.heads, modulations, layers, after, [*norms[1:], model.head_norm]
        ):
            gamma1, gamma2, _, factor2, _, shift2 = six
            h = gated_norm(x, shift2, factor2, block.norm, gamma1, block.attn.proj(heads(h, layer)))
            h = gated_norm(x, shift, factor, norm, gamma2, block.ffn.fc2(gelu_product(h, block.ffn.fc1)))
        logits = self.head(h)
        logits = logits.float().unflatten(-1, (model.branches, model.vocab))
        return guide_logits(*logits.chunk(2), scale[:, None]) if self.guided else logits


class Heads:
    """Attention of one block up to its last product, in few kernels; as core.nn.attention with "l2" or "none"."""

    def __init__(self, attention: Attention, weights: Weights, index: int):
        self.qkv, self.scale, self.count = weights.copy(attention.qkv), attention.scale, attention.heads
        self.dim, self.normed = attention.head_dim, attention.qk_norm == "l2"
        parts, dtype = (attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias), weights.dtype
        self.bias = weights.derive(f"bias {index}", lambda: torch.cat(parts).to(dtype))
        self.factor = weights.derive(f"factor {index}", lambda: Heads._factor(attention)) if self.normed else None

    @staticmethod
    def _factor(attention: Attention) -> Tensor:
        """(2 heads, 1): from a root mean square of 1 to unit length, and the temperature of the queries."""
        temperature = attention.scale_mul.float().clamp_max(math.log(100.0)).exp().flatten()
        return torch.cat((temperature, torch.ones_like(temperature)))[:, None] * attention.head_dim**-0.5

    def __call__(self, x: Tensor, layer: LayerCache) -> Tensor:
        """(R, n, D) of the new positions -> (R, n, D)."""
        heads = linear(x, self.qkv.weight, self.bias).unflatten(-1, (-1, self.dim))  # (R, n, 3 heads, d)
        if self.normed:  # the values with them, unused: it saves a copy
            turned = heads[:, :, : 2 * self.count]
            unit = F.rms_norm(heads, (self.dim,), eps=1e-24)[:, :, : 2 * self.count]
            torch.mul(unit, self.factor, out=turned)
        q, new = heads.transpose(1, 2).split((self.count, 2 * self.count), dim=1)
        k, v = layer.update(new)
        return fused_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
