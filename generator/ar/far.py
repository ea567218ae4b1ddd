"""FAR: autoregression over positions, then over the codebooks of each (FQGAN, arXiv 2411.16681).

A LlamaGen transformer reads one token per position, the sum of what its K codes say; a small second transformer writes
the K codes of the next position one after the other. One class for any K: 2 and 3 are the published models, with K = 1
and no head layers it is LlamaGen itself. Positions lie on a grid (2-D rotary embedding) or on a line (1-D).

Shape letters: B batch, T positions, K codebooks, V codebook size, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import sizes
from core.errors import UserError
from core.limits import Count, Layers, Positive, Rate, Share, Whole, Width
from core.nn.cuda_graph import weak_method
from core.nn.decode_attention import fuses
from core.nn.dropout import dropout
from core.nn.embed import LabelEmbedding
from core.nn.kvcache import KVCache
from core.nn.linear import Linear, linear
from core.nn.norms import RMSNorm
from core.nn.rope import Rope, axial_rope, line_rope, with_class_row
from core.rng import Draws, derive
from core.specs import Codes, Guidance, Kept, LatentSpec, Loss, Progress
from generator.ar import rear as rear_module
from generator.ar.decode import Recordings, decode, uncompiled
from generator.ar.llama import decode_blocks, ffn_width, init_weights, make_blocks, normed, run_blocks
from generator.ar.rear import Regularised
from generator.engine import Weights, mismatches, turning
from generator.sampling import USUAL_HEED, CodeSampler, filters, with_streams


@dataclass(frozen=True)
class Size:
    """Shape of trunk and head. `hidden` is the feed-forward width, by default 8/3 of `width` in steps of 256."""

    width: Width
    layers: Layers
    heads: Width
    head_layers: Whole = 3
    hidden: Width | None = None
    kv_heads: Width | None = None


SIZES = {"b": Size(1024, 24, 16, 3), "l": Size(1280, 36, 20, 4)}


class CrossEntropy(nn.Module):
    """Of the codes that a linear layer without bias predicts: features (B, T, D), weight (V, D), codes (B, T) -> ().

    A module, so that it is compiled as one: the logits of a large vocabulary are then read once, not once per operation.
    """

    compiled_whole = True

    def forward(self, features: Tensor, weight: Tensor, codes: Tensor) -> Tensor:
        return F.cross_entropy(linear(features, weight).float().flatten(0, 1), codes.flatten())


class FAR(Regularised):
    """core.specs.Generator of Codes, K per position.

    Args:
        size: a name in SIZES or {width, layers, heads}, optionally with head_layers, hidden and kv_heads.
        length, branches, vocab, grid: of the codes; grid null puts the positions on a line.
        label_drop: how often the class is hidden in training, for classifier-free guidance.
        token_dropout, residual_dropout, ffn_dropout, path_dropout: in training. path_dropout turns the two before it off.
        rotary: "auto" follows `grid`; "line" ignores it.
        rear: reAR's regularisers on the trunk, see generator.ar.rear.Settings; {} for the published ones, null for none.
        code_dim: width of a code vector, for rear.
    """

    models = Codes
    usual_heed = USUAL_HEED
    size_type, sizes = Size, SIZES

    def __init__(
        self,
        *,
        size: str | Annotated[dict, Size] = "b",
        length: Count = 256,
        branches: Count = 2,
        vocab: Count = 16384,
        grid: list[Count] | None = None,
        num_classes: Count = 1000,
        label_drop: Share = 0.1,
        token_dropout: Rate = 0.1,
        residual_dropout: Rate = 0.1,
        ffn_dropout: Rate = 0.1,
        path_dropout: Rate = 0.0,
        rope_theta: Positive = 10000.0,
        norm_eps: Positive = 1e-5,
        rotary: Literal["auto", "line"] = "auto",
        rear: Annotated[dict, rear_module.Settings] | None = None,
        code_dim: Width = 8,
    ):
        super().__init__()
        s = sizes.pick(size, self.size_type, self.sizes)
        self.size = {**asdict(s), "hidden": s.hidden or ffn_width(s.width), "kv_heads": s.kv_heads or s.heads}
        self.length, self.branches, self.vocab, self.num_classes = length, branches, vocab, num_classes
        self.grid = tuple(grid) if grid else None
        self.label_drop, self.token_dropout = label_drop, token_dropout
        self.drops = max(token_dropout, residual_dropout, ffn_dropout, path_dropout) > 0
        if s.head_layers < 1 and branches > 1:
            raise UserError(
                f"generator.size.head_layers is {s.head_layers}: {branches} codebooks need at least one layer "
                "to tell the second code about the position."
            )
        if self.grid and self.grid[0] * self.grid[1] != length:
            raise UserError(f"generator.grid {list(self.grid)} does not have generator.length={length} places.")

        self.rear = rear_module.settings(rear, s.layers)
        if self.rear and self.rear.noise == "mask":
            raise UserError('generator.rear.noise: "mask" needs a mask code, which FAR does not have. Use "switch".')

        self.cls_embedding = LabelEmbedding(num_classes, s.width)
        for k in range(branches):
            self.add_module(f"tok_embeddings_{k + 1}", nn.Embedding(vocab, s.width))
        self.aggregation_layer = Linear(branches * s.width, s.width) if branches > 1 else nn.Identity()
        shape = {
            "width": s.width,
            "heads": s.heads,
            "hidden": self.size["hidden"],
            "kv_heads": self.size["kv_heads"],
            "residual_dropout": residual_dropout,
            "ffn_dropout": ffn_dropout,
            "path_dropout": path_dropout,
            "norm_eps": norm_eps,
        }
        self.layers = make_blocks(s.layers, **shape)
        self.ar_head = make_blocks(s.head_layers, **shape)
        self.norm = RMSNorm(s.width, norm_eps)
        for k in range(branches):
            self.add_module(f"output_{k + 1}", Linear(s.width, vocab, bias=False))
        head_dim = s.width // s.heads
        on_grid = self.grid is not None and rotary == "auto"
        rows = max(length + 1, branches)  # one more than training needs, for all logits of a whole sequence
        table = (
            with_class_row(axial_rope(head_dim, self.grid, rope_theta))
            if on_grid
            else line_rope(head_dim, rows, rope_theta)
        )
        for name, part in zip(("cos", "sin"), table):
            self.register_buffer(f"rope_{name}", part, persistent=False)
        self.alignment = self.make_alignment(s.width, code_dim, branches)
        self.cross_entropy = CrossEntropy()
        init_weights(self)
        for k in range(branches):  # the first loss is ln V exactly
            nn.init.zeros_(self._module("output", k).weight)

    def _module(self, stem: str, branch: int) -> nn.Module:
        return getattr(self, f"{stem}_{branch + 1}")

    def _rope(self, count: int) -> Rope:
        return self.rope_cos[:count], self.rope_sin[:count]

    def class_rows(self) -> tuple[str, int]:
        return "cls_embedding.embedding_table.weight", 0

    def fits(self, spec: LatentSpec) -> list[str]:
        if not isinstance(spec, self.models):
            return [f"{type(self).__name__} models sequences of codes, the tokenizer gives {spec}"]
        problems = mismatches(self, spec, "branches", "vocab", "length")
        if self.grid and spec.grid and tuple(spec.grid) != self.grid:
            problems.append(f"generator.grid is {list(self.grid)}, the tokenizer has {list(spec.grid)}")
        return problems

    # -- the network --------------------------------------------------------------------------------------------------
    def _embed(self, codes: Tensor) -> list[Tensor]:
        """(..., K) codes -> K embeddings (..., D)."""
        return [self._module("tok_embeddings", k)(codes[..., k]) for k in range(self.branches)]

    def _aggregate(self, embedded: list[Tensor]) -> Tensor:
        """K embeddings (..., D) -> the trunk's input (..., D)."""
        return self.aggregation_layer(torch.cat(embedded, dim=-1))

    def trunk(
        self, codes: Tensor, labels: Tensor, keys: Tensor | None = None, taps: dict[int, Tensor] | None = None
    ) -> Tensor:
        """(B, t, K) codes -> (B, t + 1, D): at each place what is known before it. Label `num_classes` means no class."""
        x = torch.cat((self.cls_embedding(labels)[:, None], self._aggregate(self._embed(codes))), dim=1)
        x = dropout(x, self.token_dropout, keys, salt=0)
        return run_blocks(
            self.layers, x, self._rope(x.shape[1]), keys=derive(keys, 1) if keys is not None else None, taps=taps
        )

    def head(self, states: Tensor, embedded: list[Tensor], keys: Tensor | None = None) -> Tensor:
        """States (B, t, D) and the embeddings of the first k codes there -> normalised features (B, t, k + 1, D)."""
        x = torch.stack((states, *embedded), dim=2)  # (B, t, k + 1, D)
        flat = run_blocks(
            self.ar_head, x.flatten(0, 1), self._rope(x.shape[2]), keys=derive(keys, 2) if keys is not None else None
        )
        return self.norm(flat).view_as(x)

    def features(
        self, codes: Tensor, labels: Tensor, keys: Tensor | None = None, taps: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Teacher-forced (B, T, K, D): entry k is what output k + 1 turns into logits of code k."""
        states = self.trunk(codes[:, :-1], labels, keys, taps)  # (B, T, D)
        return self.head(
            states, [self._module("tok_embeddings", k)(codes[..., k]) for k in range(self.branches - 1)], keys
        )

    def logits(self, features: Tensor, branch: int) -> Tensor:
        """(..., D) features of one codebook -> (..., V) fp32."""
        return self._module("output", branch)(features).float()

    # -- training -----------------------------------------------------------------------------------------------------
    def drop_labels(self, labels: Tensor, draws: Draws) -> Tensor:
        return self.cls_embedding.drop(labels, draws.uniform("label_drop"), self.label_drop)

    def forward(self, latents: Tensor, labels: Tensor, draws: Draws, progress: Progress | None = None) -> Loss:
        """Mean over codebooks of the cross-entropy, every one logged, plus reAR's alignment if there is any."""
        context, selected = self.context(latents, draws, progress)
        keys = draws.keys("dropout") if self.training and self.drops else None
        taps = self.taps()
        features = self.features(context, self.drop_labels(labels, draws), keys, taps)
        losses = [
            self.cross_entropy(features[:, :, k], self._module("output", k).weight, latents[..., k])
            for k in range(self.branches)
        ]
        logs = {f"ce_{k + 1}": loss for k, loss in enumerate(losses)}
        # Slot 0 holds the class, slot 1 + i position i, of which the last is never read; slot i predicts position i.
        return self.training_loss(torch.stack(losses).mean(), logs, taps, 0, latents, selected)

    # -- sampling -----------------------------------------------------------------------------------------------------
    @uncompiled
    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        draws: Draws,
        guidance: Guidance = Guidance(),
        temperature: float | list[float] = 1.0,
        top_k: int | list[int] = 0,
        top_p: float | list[float] = 1.0,
        *,
        kept: Kept | None = None,
        prefix: Tensor | None = None,
        shared: int = 0,
        on_codes: Callable[[Tensor], None] | None = None,
        cached: bool = True,
        static: bool | None = None,
        trace: list | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Codes (B, T, K).

        Args:
            temperature, top_k, top_p: of every codebook, or one each; 1, 0 and 0 (or 1) do nothing, temperature 0 is greedy.
            kept: see core.specs.Kept. Positions come in their order: a code is drawn by those before it alone.
            prefix: (B or 1, n, K) codes that the sequences begin with, in place of what would be sampled there.
            shared: the first so many positions take the codes of the first sample, whatever the labels.
            on_codes: called with the codes so far, (B, t, K), when t of them are there; it may start work on the device.
            cached: False computes the whole sequence anew for every code, as a reference.
            static: fixed shapes, so that a step is one CUDA graph; default on a GPU.
            trace: see CodeSampler.
            length: stop after so many positions.
        """
        device, length = labels.device, length or self.length
        chosen = filters(self.branches, temperature, top_k, top_p)
        if not 0 <= shared <= length:
            raise UserError(f"{shared} shared positions in a sequence of {length}: give 0 to {length}.")
        batch, kept = len(labels), kept or self._begun(prefix, length)
        labels, draws, kept = with_streams(labels, draws, kept)
        sampler = CodeSampler(labels, length, chosen, draws, guidance, trace, kept, shared)
        both = sampler.labels(labels, self.cls_embedding.null(labels))
        codes = torch.zeros(len(labels), length, self.branches, dtype=torch.int64, device=device)

        if not cached:
            for index in range(length):
                t = torch.full((1,), index, device=device)
                states = self.trunk(sampler.double(codes[:, :index]), both)[:, -1:]  # (2B, 1, D)
                for k in range(self.branches):
                    known = [
                        self._module("tok_embeddings", j)(sampler.double(codes[:, index, j]))[:, None] for j in range(k)
                    ]
                    codes[:, index, k] = sampler(self.logits(self.head(states, known)[:, 0, k], k), t, k)
                if on_codes:
                    on_codes(codes[:, : index + 1])
            return sampler.mark(codes)[:batch]
        static = device.type == "cuda" if static is None else static
        weights = self.weights(self.norm.weight)
        key = (sampler.settings(), length, static, device)
        decoding = self.kept(key, lambda: Decoding(self, weights, sampler, length, static))
        decoding.begin(both, sampler)
        decode(decoding.step, 0, length, on_codes and (lambda done: on_codes(decoding.codes[:, 1 : done + 1])))
        return decoding.sampler.mark(decoding.codes[:, 1:])[:batch]

    def heeds(self) -> str:
        if self.grid is None:
            return "Codes are drawn one after another: a kept code is heeded by the later ones alone."
        return (
            "Codes are drawn row by row: what is kept below a masked place, or to the right of it in its row, is not yet "
            "seen when that place is drawn."
        )

    def _begun(self, prefix: Tensor | None, length: int) -> Kept | None:
        """A prefix as kept codes."""
        if prefix is None or prefix.shape[1] == 0:
            return None
        if prefix.ndim != 3 or prefix.shape[2] != self.branches or prefix.shape[1] > length:
            raise UserError(
                f"a prefix of shape {list(prefix.shape)} cannot begin sequences of {length} positions with "
                f"{self.branches} codebook(s): give (B or 1, up to {length}, {self.branches})."
            )
        known = prefix.shape[1]
        return Kept(F.pad(prefix, (0, 0, 0, length - known)), torch.arange(length, device=prefix.device)[None] < known)


class Decoding:
    """What FAR keeps between calls of `sample` with as many samples and the same settings.

    Args:
        weights: the network's, in the precision of the products. The stream has it too, as in the bf16 weights that the
            published figures were sampled with.
        sampler: whose tensors are refilled by `begin`; the rest as in FAR.sample.
    """

    def __init__(self, model: FAR, weights: Weights, sampler: CodeSampler, length: int, static: bool):
        self.sampler, self.branches, self.dtype = sampler, model.branches, weights.dtype
        part = {name: weights.copy(getattr(model, name)) for name in ("layers", "ar_head", "norm", "aggregation_layer")}
        self.layers, self.head, self.norm, self.aggregate = part.values()
        self.tables = [model._module("tok_embeddings", k).weight for k in range(self.branches)]
        self.outputs = [weights.copy(model._module("output", k)) for k in range(self.branches)]
        self.classes = model.cls_embedding
        self.rope = turning(model.rope_cos, model.rope_sin)  # (rows, 2, d)
        device, samples = sampler.noise.device, sampler.noise.shape[0]
        self.streams = 2 if sampler.guided else 1
        shape = {
            "batch": samples * self.streams,
            "heads": model.size["kv_heads"],
            "head_dim": model.size["width"] // model.size["heads"],
            "device": device,
            "dtype": weights.dtype,
        }
        self.cache = KVCache(len(self.layers), length=length, static=static, masked=not fuses(device), **shape)
        self.head_cache = KVCache(len(self.head), length=self.branches, **shape)
        self.ranks = torch.arange(self.branches, device=device)
        # column t + 1 holds position t
        self.codes = torch.zeros(samples, length + 1, self.branches, dtype=torch.int64, device=device)
        self.start = torch.zeros(self.streams, samples, model.size["width"], dtype=weights.dtype, device=device)
        self.step = Recordings(weak_method(self, Decoding._step), self.cache)

    def begin(self, labels: Tensor, sampler: CodeSampler) -> None:
        """The batch that the steps are about; labels (2B,) or (B,)."""
        self.start.copy_(self.classes(labels).view_as(self.start))
        if sampler is not self.sampler:
            self.sampler.refill(sampler)

    def _embed(self, codes: Tensor, k: int) -> Tensor:
        return F.embedding(codes, self.tables[k]).to(self.dtype)

    def _step(self) -> None:
        t = self.cache.position
        known = self.codes.index_select(1, t)[:, 0]  # (B, K), of the place before
        known = self.aggregate(torch.cat([self._embed(known[:, k], k) for k in range(self.branches)], dim=-1))  # (B, D)
        x = torch.where(t == 0, self.start, known).flatten(0, 1)  # (2B, D)
        x = decode_blocks(self.layers, x, self.rope.index_select(0, t)[0], self.cache.open())
        chosen: list[Tensor] = []
        for k in range(self.branches):
            self.head_cache.start, self.head_cache.position = k, self.ranks[k : k + 1]  # known here: nothing is written
            x = decode_blocks(self.head, x, self.rope[k], self.head_cache.open())
            logits = self.outputs[k](normed(x, self.norm)).float()
            chosen.append(self.sampler(logits, t, k))  # (B,)
            if k + 1 < self.branches:
                x = self._embed(chosen[-1], k).repeat(self.streams, 1)
        self.codes.index_copy_(1, t + 1, torch.stack(chosen, -1)[:, None])
