"""The sequential diffusion tokenizer of D-AR (arXiv 2505.23660): an image becomes an ordered sequence of codes, whose
groups condition, one after another, the denoising steps of a pixel-space diffusion decoder.

Encoder queries, condition layers and the mapping from groups to steps are all causal, so the first k groups suffice
for the first k steps: a prefix of the codes is already a picture (`previews`, `Stream`).

Parameter names are those of the official checkpoints, except that query, key and value are one matrix.

Shape letters: B batch, P patches, N codes, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import parse_section
from core.errors import UserError
from core.limits import Count, Factor, Layers, Pixels, Positive, Whole, Width
from core.nn.attention import Attention
from core.nn.kvcache import KVCache
from core.nn.linear import Linear
from core.nn.mlp import MLP
from core.nn.rope import AxialRope, Rope
from core.rng import Draws
from core.specs import Chart, Codes, Recon
from tokenizer.codes import CodeTokenizer
from tokenizer.vq.diffusion_decoder import DecoderSettings, DiffusionCore, Trajectory, plain_norm, shifted_time
from tokenizer.vq.quantizer import VectorQuantizer


def dispersed_places(side: int) -> Tensor:
    """(side^2,) patches of a grid, row-major, in the order of a dispersed-dot threshold matrix (Bayer 1973): the first
    4^k are a coarser grid of the whole picture, and every prefix is spread evenly. The side must be a power of two."""
    if side < 1 or side & (side - 1):
        raise UserError(f"places: true needs a grid of patches whose side is a power of two, not {side}.")
    order = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    while len(order) < side:
        finer = 4 * order
        order = torch.cat((torch.cat((finer, finer + 2), 1), torch.cat((finer + 3, finer + 1), 1)))
    return order.flatten().argsort()


class Block(nn.Module):
    """Pre-norm transformer block with learned gates."""

    def __init__(self, width: int, heads: int, causal: bool = False, gate: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, qk_norm="layer", causal=causal)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width, activation="silu")
        self.gate1 = nn.Parameter(torch.full((width,), gate))
        self.gate2 = nn.Parameter(torch.full((width,), gate))

    def forward(self, x: Tensor, rope: Rope | None = None, **attention: Any) -> Tensor:
        x = x + self.gate1 * self.attention(self.norm1(x), rope, **attention)
        return x + self.gate2 * self.mlp(self.norm2(x))


class DAR(CodeTokenizer):
    """core.specs.Tokenizer: N ordered codes, decoded by S denoising steps.

    Args:
        image_size: of the images that it is trained on and decodes to; both sides must be multiples of patch_size.
        patch_size: of the encoder.
        encoder_width, encoder_layers, condition_width, condition_layers: transformers before and after the codes.
        length: number of codes N.
        groups: G; group g of N / G codes belongs to the times around g / G.
        window: codes that condition one step (N / G if None); more than N / G make windows overlap.
        steps: S of the solver; may differ from G, also at sampling time.
        vocab, code_dim: of the codebook; codes are compared on the unit sphere.
        quantize: False leaves the normalised vectors as they are (then there are no codes to model).
        low_rank_queries: encoder queries as code_dim-wide rows and a linear map, or full-width rows.
        table_rows: of the tables of queries and positions, at least N; 1024 in the released files.
        solver: of the flow, "adams2" as published or "euler", which keeps closer to what the first step saw.
        decoder: settings of the diffusion decoder, see tokenizer.vq.diffusion_decoder.DecoderSettings.
        output_size: images larger than this are resized to it after decoding; 0 for no resizing.
        semantic: {"teachers": {name: width}}: one frozen teacher whose features the decoder is aligned with (REPA).
        entropy: report the codebook's entropy term; parity: its weight is 0 in the released recipe.
        places: every code belongs to a patch, see `dispersed_places`: its query starts as that patch and turns with it, and
            the decoder adds its condition there. Not published: which code tells of which part of the picture need not be
            found out, which takes a small data set longer than it has. For one code per patch, patches of the decoder
            as large, and the picture size of training.
        usage_window, usage_sample: codebook usage is the share of distinct codes among so many latest assignments, of
            which every step adds a sample; usage_window 0 does not count. parity: 65536 and 512.
        perceptual_by_time: weigh each picture's perceptual loss by 2 t. parity: the official code does so where its
            weight is negative; the released recipe does not.
        head_dim, rope_theta: of all attention layers.
        init_std, gate_init: of linear maps and of the gates of the layers before and after the codes, when training
            starts. Published: 0.02 and 0, so that all pictures have the same codes for the first thousand steps.
    """

    charts = (Chart("share of codes in use, and of positions with one code", ("usage", "dead_positions")),)

    def __init__(
        self,
        *,
        image_size: Pixels = 256,
        patch_size: Pixels = 16,
        encoder_width: Width = 768,
        encoder_layers: Layers = 8,
        condition_width: Width = 768,
        condition_layers: Layers = 8,
        length: Count = 256,
        groups: Count = 8,
        window: Count | None = None,
        steps: Count = 8,
        vocab: Count = 16384,
        code_dim: Width = 8,
        quantize: bool = True,
        low_rank_queries: bool = True,
        table_rows: Count = 1024,
        solver: Literal["adams2", "euler"] = "adams2",
        decoder: Annotated[dict, DecoderSettings] | None = None,
        output_size: Whole = 0,
        semantic: dict[str, Any] | None = None,
        entropy: bool = False,
        places: bool = False,
        usage_window: Whole = 65536,
        usage_sample: Whole = 512,
        perceptual_by_time: bool = False,
        head_dim: Width = 64,
        rope_theta: Positive = 10000.0,
        init_std: Factor = 0.02,
        gate_init: float = 0.0,
    ):
        super().__init__()
        settings = parse_section("decoder", decoder or {}, DecoderSettings)
        self.image_size, self.patch_size, self.length, self.groups = image_size, patch_size, length, groups
        self.window, self.steps, self.output_size = window or length // max(1, groups), steps, output_size
        widths = {"encoder_width": encoder_width, "condition_width": condition_width, "decoder.width": settings.width}
        self._check_sizes(widths, head_dim, table_rows)
        teachers = (semantic or {}).get("teachers") or {}
        if len(teachers) > 1:
            raise UserError(f"D-AR is aligned with one teacher, not with {len(teachers)}: {', '.join(teachers)}.")
        self.teacher = next(iter(teachers), None)

        self.solver, self.usage_sample, self.perceptual_by_time = solver, usage_sample, perceptual_by_time
        self.data_std, self.time_shift = settings.data_std, settings.time_shift
        self.quantized = quantize

        self.patchify = nn.Conv2d(3, encoder_width, patch_size, patch_size)
        self.query_embedding = nn.Embedding(table_rows, code_dim if low_rank_queries else encoder_width)
        self.query_linear = Linear(code_dim, encoder_width) if low_rank_queries else nn.Identity()
        self.encoder_layers = nn.ModuleList(
            Block(encoder_width, encoder_width // head_dim, gate=gate_init) for _ in range(encoder_layers)
        )
        self.quant_in_conv = nn.Conv2d(encoder_width, code_dim, 1, bias=False)
        self.quantize = (
            VectorQuantizer(vocab, code_dim, entropy=entropy, usage_window=usage_window) if quantize else None
        )
        self.term_names = (*(self.quantize.term_names if quantize else ()), "flow")
        self.quant_out_conv = nn.Conv2d(code_dim, condition_width, 1, bias=False)
        self.decoder_embedding = nn.Embedding(table_rows, condition_width)
        self.decoder_layers = nn.ModuleList(
            Block(condition_width, condition_width // head_dim, causal=True, gate=gate_init)
            for _ in range(condition_layers)
        )
        self.diff_decoder = nn.Module()
        self.diff_decoder.net = DiffusionCore(
            settings,
            condition_width=condition_width,
            image_size=image_size,
            feature_width=teachers[self.teacher] if self.teacher else None,
            head_dim=head_dim,
            init_std=init_std,
            places=places,
        )
        grid = image_size // patch_size
        self.register_buffer("places", self._dispersed_places(grid) if places else None, persistent=False)
        self.spec = Codes(length, 1, vocab, code_dim, places=() if self.places is None else tuple(self.places.tolist()))
        self.rope = AxialRope(head_dim, (grid, grid), rope_theta, extra=length, places=self.places)
        self._init_weights(low_rank_queries, init_std)

    def _check_sizes(self, widths: dict[str, int], head_dim: int, table_rows: int) -> None:
        for name, width in widths.items():
            if width % head_dim:
                raise UserError(f"{name} {width} must be a multiple of head_dim {head_dim}.")
        if self.image_size % self.patch_size:
            raise UserError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}.")
        if self.length > table_rows:
            raise UserError(f"length {self.length} exceeds the {table_rows} rows of the tables (table_rows).")
        if not 1 <= self.groups <= self.length:
            raise UserError(f"groups {self.groups} must lie between 1 and length {self.length}.")
        if not 1 <= self.window <= self.length:
            raise UserError(f"window {self.window} (codes per step) must lie between 1 and length {self.length}.")
        if self.steps < self.groups:
            raise UserError(
                f"steps {self.steps} is less than groups {self.groups}: some groups of codes would never be looked at."
            )

    def _dispersed_places(self, grid: int) -> Tensor:
        decoded = self.diff_decoder.net.patch_size
        if self.length != grid**2 or decoded != self.patch_size:
            raise UserError(
                f"places: true needs one code per patch and patches of one size: length {grid**2} instead of {self.length}, "
                f"and decoder.patch_size {self.patch_size} instead of {decoded}."
            )
        return dispersed_places(grid)

    def _init_weights(self, low_rank_queries: bool, std: float) -> None:
        for layers in (self.encoder_layers, self.decoder_layers):
            for module in layers.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=std)
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.query_embedding.weight, std=1.0 if low_rank_queries else 0.02)
        nn.init.trunc_normal_(self.decoder_embedding.weight, std=0.02)

    # -- codes --------------------------------------------------------------------------------------------------------
    def _project(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, code_dim), before quantisation."""
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise UserError(
                f"D-AR encodes images whose sides are multiples of {self.patch_size}, not "
                f"{images.shape[-2]}x{images.shape[-1]}."
            )
        patches = self.patchify(images)
        self._check_places(tuple(images.shape[-2:]))
        rope = self.rope(tuple(patches.shape[-2:]))
        patches = plain_norm(patches.flatten(2).transpose(1, 2))  # (B, P, D)
        queries = self.query_linear(self.query_embedding.weight[: self.length]).expand(len(images), -1, -1)
        if self.places is not None:
            queries = queries + patches[:, self.places]
        x = torch.cat((patches, queries.to(patches.dtype)), dim=1)
        for block in self.encoder_layers:  # patches see all patches, a query all patches and the queries before it
            x = block(x, rope, prefix=patches.shape[1])
        x = plain_norm(x[:, -self.length :])
        return self.quant_in_conv(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)

    def _check_places(self, size: tuple[int, ...]) -> None:
        """UserError for pictures of another height or width than those in which the codes have places."""
        if self.places is not None and size != (self.image_size,) * 2:
            raise UserError(
                f"the codes of this D-AR tokenizer have places in pictures of {self.image_size}x{self.image_size} pixels, "
                f"not of {size[0]}x{size[1]}."
            )

    def encode(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Codes (B, N, 1)."""
        self._needs_codes()
        return self.quantize.encode(self._project(images))[..., None]

    def embed(self, codes: Tensor) -> Tensor:
        """Codebook rows on the unit sphere, (B, n, 1, code_dim)."""
        self._needs_codes()
        return self.quantize.embed(codes)

    def _needs_codes(self) -> None:
        if not self.quantized:
            raise UserError("this D-AR tokenizer was built with quantize: false, so it has no codes.")

    # -- conditions ---------------------------------------------------------------------------------------------------
    def conditions(self, vectors: Tensor, start: int = 0, cache: KVCache | None = None) -> Tensor:
        """Condition vectors (B, n, D) of the code vectors (B, n, code_dim) at positions start ... start + n - 1.

        With a cache, what came before `start` is in it, and the new positions are added.
        """
        x = self.quant_out_conv(vectors.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)
        x = x + self.decoder_embedding.weight[start : start + vectors.shape[1]]
        layers = [None] * len(self.decoder_layers)
        if cache is not None:
            cache.seek(start)
            layers = cache.open(vectors.shape[1])
        for block, layer in zip(self.decoder_layers, layers):
            x = block(x, cache=layer)
        return plain_norm(x)

    def window_start(self, step: int, steps: int) -> int:
        """First code of the window that conditions a step of a solver with so many steps."""
        group = (2 * step * self.groups + steps) // (2 * steps)  # the nearest of G times, in whole numbers
        return min(group * self.length // self.groups, self.length - self.window)

    # -- training -----------------------------------------------------------------------------------------------------
    def forward(self, images: Tensor, draws: Draws) -> Recon:
        u = draws.uniform("time")  # (B,)
        noise = draws.normal("noise", images.shape[1:])
        group = torch.floor(u * self.groups + 0.5).long()
        start = (group * self.length // self.groups).clamp(max=self.length - self.window)  # (B,)
        z = self._project(images)
        if self.quantized:
            seen = torch.arange(self.length, device=u.device) < (start + self.window)[:, None]  # (B, N)
            quantized = self.quantize(z, seen)
            vectors, terms, codes = quantized.values, quantized.terms, quantized.codes
        else:
            vectors = F.normalize(z.float(), dim=-1)
            terms, codes = {}, None
        conditions = self.conditions(vectors)
        columns = start[:, None] + torch.arange(self.window, device=u.device)  # (B, Q)
        window = conditions.gather(1, columns[..., None].expand(-1, -1, conditions.shape[-1]))

        t = shifted_time(u, self.time_shift)
        wide = t.view(-1, 1, 1, 1)
        data = self.data_std * images.float()
        noisy = wide * data + (1 - wide) * noise
        core = self.diff_decoder.net
        places = None if self.places is None else self.places[columns]
        velocity, features = core(noisy, core.embed_time(t), window, places)
        velocity = velocity.float()
        terms["flow"] = (velocity - (data - noise)).square().mean() / self.data_std**2
        return Recon(
            images=(noisy + (1 - wide) * velocity) / self.data_std,
            terms=terms,
            predictions={self.teacher: features} if features is not None else {},
            perceptual_weights=2 * t if self.perceptual_by_time else None,
            logs={} if codes is None else self._code_logs(codes, draws),
            last_layer=core.last_layer.weight,
            details={"t": t, "velocity": velocity, "window": window, "features": features, "codes": codes},
        )

    @torch.no_grad()
    def _code_logs(self, codes: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Codebook usage, and the share of positions at which the whole batch has the same code."""
        logs = {"dead_positions": (codes == codes[:1]).all(0).float().mean()} if len(codes) > 1 else {}
        if self.training and self.quantize.usage_window:
            logs["usage"] = self.quantize.track(codes, self.usage_sample, draws)
        return logs

    # -- decoding -----------------------------------------------------------------------------------------------------
    def stream(
        self,
        batch: int,
        draws: Draws | None = None,
        *,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        method: str | None = None,
    ) -> Stream:
        """Decoding while the codes arrive. Without draws every image starts from the same noise."""
        size = size or (self.image_size,) * 2
        self._check_places(size)
        device = self.decoder_embedding.weight.device
        draws = draws or Draws(0, torch.zeros(batch, dtype=torch.int64, device=device))
        return Stream(self, draws.normal("noise", (3, *size)), steps or self.steps, method or self.solver)

    def decode(
        self,
        latents: Tensor,
        draws: Draws | None = None,
        *,
        steps: int | None = None,
        clip: int | None = None,
        size: tuple[int, int] | None = None,
        method: str | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) of codes (B, n, 1); n may be a prefix that ends with a whole window.

        Args:
            steps: of the solver, `self.steps` unless told.
            clip: stop after so many steps; the default is as many as the codes allow.
            size: height and width, multiples of the decoder's patch size.
        """
        stream = self.stream(len(latents), draws, steps=steps, size=size, method=method)
        images = None
        for picture in itertools.islice(stream.feed(latents), clip):
            images = picture
        if images is None:
            raise UserError(f"{latents.shape[1]} codes are too few for a first picture: it needs {self.window}.")
        return images

    def previews(self, latents: Tensor, draws: Draws | None = None) -> list[Tensor]:
        """The picture after each step: S tensors (B, 3, H, W); the last is what `decode` gives."""
        return list(self.stream(len(latents), draws).feed(latents))


class Stream:
    """One trajectory of the diffusion decoder that is driven by codes as they come; nothing is computed twice."""

    def __init__(self, tokenizer: DAR, noise: Tensor, steps: int, method: str):
        if steps < 1:
            raise UserError(f"decoding needs at least 1 step, not {steps}.")
        self.tokenizer, self.steps = tokenizer, steps
        self.trajectory = Trajectory(
            tokenizer.diff_decoder.net, noise, steps, tokenizer.time_shift, tokenizer.data_std, method
        )
        attention = tokenizer.decoder_layers[0].attention if len(tokenizer.decoder_layers) else None
        self.cache = (
            None
            if attention is None
            else KVCache(
                len(tokenizer.decoder_layers),
                len(noise),
                attention.heads,
                tokenizer.length,
                attention.head_dim,
                dtype=tokenizer.decoder_embedding.weight.dtype,
                device=noise.device,
            )
        )
        self.conditions: Tensor | None = None  # (B, codes so far, D)

    @property
    def needed(self) -> int:
        """Codes that must be there before the next picture comes."""
        return self.tokenizer.window_start(self.trajectory.done, self.steps) + self.tokenizer.window

    @torch.no_grad()
    def feed(self, codes: Tensor) -> Iterator[Tensor]:
        """Take the next codes (B, n, 1) and yield the pictures (B, 3, H, W) that they make possible."""
        tokenizer = self.tokenizer
        start = 0 if self.conditions is None else self.conditions.shape[1]
        if start + codes.shape[1] > tokenizer.length:
            raise UserError(f"{start + codes.shape[1]} codes were given, the tokenizer has {tokenizer.length}.")
        new = tokenizer.conditions(tokenizer.embed(codes)[:, :, 0], start, self.cache)
        self.conditions = new if self.conditions is None else torch.cat((self.conditions, new), dim=1)
        while self.trajectory.done < self.steps and self.needed <= self.conditions.shape[1]:
            begin = self.needed - tokenizer.window
            window = slice(begin, begin + tokenizer.window)
            places = None if tokenizer.places is None else tokenizer.places[None, window]
            image = self.trajectory.step(self.conditions[:, window], places)
            yield self._resized(image)

    def _resized(self, image: Tensor) -> Tensor:
        side = self.tokenizer.output_size
        if side and (side < image.shape[-2] or side < image.shape[-1]):
            return F.interpolate(image, (side, side), mode="bicubic", align_corners=False)
        return image
