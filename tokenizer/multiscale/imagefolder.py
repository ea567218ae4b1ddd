"""ImageFolder: a ViT autoencoder whose latents are K aligned maps, each quantised over growing scales (Li et al.,
arXiv 2410.01756, ICLR 2025).

Branch 0 carries detail, the last branch meaning: in training its mean must agree with the class token of a frozen
DINOv2 (InfoNCE). Quantiser dropout makes some pictures do with the first scales. The files of XQ-GAN and RobustTok
(VP2, XQGAN-*, MSBR10P2) are settings of the same network: one scale of plain codes, or a binary codebook.
Parameter names are those of the official files, but for the quantiser's and adapters' (tokenizer/adapters/imagefolder.py).

B batch, K branches, C channels of a code, P = side of a latent map, L codes per branch, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from core.config import parse_section
from core.dist import group_size
from core.errors import UserError, check_choice, nearest
from core.limits import Count, Factor, Pixels, Rate, Share, Whole, Width
from core.nn.embed import resize_rows
from core.nn.linear import Linear
from core.nn.lora import TunedLayerNorm, adapt
from core.nn.precision import no_autocast
from core.nn.vit import VisionTransformer, ViTSize, dinov2_files, dinov2_weights
from core.rng import Draws
from core.specs import Chart, Codes, MultiScale, Progress, Recon
from core.weights.names import State
from core.weights.released import needs
from tokenizer.codes import CodeTokenizer
from tokenizer.losses.contrastive import info_nce
from tokenizer.multiscale.quantizer import MultiScaleQuantizer, QuantizedMaps, Tables
from tokenizer.multiscale.vit import Decoder, Encoder

RELEASED_SCALES = (1, 1, 2, 3, 3, 4, 5, 6, 8, 11)
TUNING = ("full", "lora", "frozen")


@dataclass(frozen=True)
class Semantic:
    """Which branches learn the meaning that a teacher sees.

    parity: features are compared as they are. With `normalise` (clip_norm) they get unit length, and the factor on the
    logits grows from `scale` to 100 within 200 epochs.
    """

    teachers: dict[str, Count]  # name -> width of its feature; one
    branches: str | tuple[Whole, ...] = "last"  # "last", "all" or numbers
    scale: Factor = 1.0
    normalise: bool = False

    @classmethod
    def parse(cls, value: dict[str, Any] | None) -> Semantic | None:
        if not value or not value.get("teachers"):
            return None
        semantic = parse_section("semantic", value, cls)
        if len(semantic.teachers) != 1:
            raise UserError(f"imagefolder learns from one teacher, not from {', '.join(semantic.teachers)}")
        return semantic

    def chosen(self, branches: int) -> list[int]:
        """Numbers of the branches."""
        named = {"last": [branches - 1], "all": list(range(branches))}
        chosen = named.get(self.branches) if isinstance(self.branches, str) else list(self.branches)
        if not chosen or any(not isinstance(b, int) or not 0 <= b < branches for b in chosen):
            raise UserError(
                f'semantic.branches is "last", "all" or numbers from 0 to {branches - 1}, got {self.branches!r}'
            )
        return chosen

    def factor(self, progress: Progress | None) -> float:
        if not self.normalise or progress is None:
            return self.scale
        return 100.0 if progress.epoch >= 200 else self.scale + (100.0 - self.scale) * progress.epoch / 200


@dataclass
class GrowingMap:
    """Where sampling scale by scale stands."""

    f_hat: Tensor  # (B, K, C, P, P), the sum of the scales so far
    tables: Tables  # made once for all scales


@needs(dinov2_files("encoder", "decoder"))
class ImageFolder(CodeTokenizer):
    """core.specs.Tokenizer with multi-scale codes. The defaults are the published imagenet-4096.

    Args:
        encoder, decoder: a name in core.nn.vit.VIT_SIZES (or timm's name of a DINOv2), or {width, layers, heads}.
        pretrained: start both trunks from DINOv2 (true), from a file of timm's, or from random weights (false). Only
            named sizes have weights.
        latent_grid: P, side of each latent map.
        scales: sides of the scales, the last one is P. With one scale the codes are an ordinary sequence.
        branches: K.
        vocab, code_dim: codes per branch and their width C.
        latent_width: width of all branches together, in place of code_dim.
        quantizer: "residual" (the published one), "plain" (unit vectors, one scale, no phi: VP2, XQGAN-*, RobustTok)
            or "binary" (sign patterns, vocab = 2^code_dim: MSBR10P2). "auto": plain for one scale, residual for several.
        cosine: nearest code by angle, else by Euclidean distance. Residual quantiser only.
        shared_phi: phi convolutions per branch; 0: one per scale.
        commitment: "mean" over scales, the convention of the seed release, or "sum", that of XQ-GAN, S times as much.
        codebook_drop: probability that a picture keeps only its first scales in training, a number drawn evenly from
            start_drop to S; such pictures are left out of the contrast term, which is all that it means for one scale.
            parity: the official code takes the first share of each rank's batch; drawing each picture makes the result
            independent of the number of ranks.
        semantic: {branches, scale, normalise}, see Semantic; the teacher comes from the config's `teachers`.
        enc_tuning, dec_tuning: "full" trains the trunk, "lora" adapters of the MLPs and the last norm, "frozen"
            nothing of it. Latent tokens, levels, heads, codebooks train in all three.
        lora_rank, lora_alpha: of the adapters.
        drop_path: stochastic depth of the last block while training.
        pixel_channels: values per pixel that two convolutions at the end of the decoder make a picture of; 0, as
            published: tokens paint their patches, whose seams show until training has been long.
    """

    reads_features = True  # forward takes the teachers' features
    charts = (Chart("codes in use, %", ("usage/*",)),)

    def __init__(
        self,
        *,
        image_size: Pixels = 256,
        patch_size: Pixels = 16,
        encoder: str | Annotated[dict, ViTSize] = "base",
        decoder: str | Annotated[dict, ViTSize] = "base",
        pretrained: bool | str = False,
        latent_grid: Count = 11,
        scales: list[Count] | tuple[Count, ...] = RELEASED_SCALES,
        branches: Count = 2,
        vocab: Count = 4096,
        code_dim: Width = 32,
        latent_width: Width | None = None,
        quantizer: str = "auto",
        cosine: bool = True,
        shared_phi: Whole = 4,
        commitment: str = "mean",
        codebook_drop: Share = 0.1,
        start_drop: Whole = 3,
        semantic: Annotated[dict, Semantic] | None = None,
        enc_tuning: str = "full",
        dec_tuning: str = "full",
        lora_rank: Whole = 8,
        lora_alpha: Factor = 8.0,
        drop_path: Rate = 0.1,
        pixel_channels: Whole = 0,
    ):
        super().__init__()
        scales = tuple(scales)
        code_dim = _checked(image_size, patch_size, latent_grid, scales, branches, code_dim, latent_width, start_drop)
        quantizer = _quantizer_kind(quantizer, scales)
        for setting, value, choices in (
            ("commitment", commitment, ("mean", "sum")),
            ("enc_tuning", enc_tuning, TUNING),
            ("dec_tuning", dec_tuning, TUNING),
        ):
            check_choice(setting, value, choices)
        if pixel_channels < 0:
            raise UserError(f"pixel_channels is {pixel_channels}: 0 paints patches as published, 24 hides their seams")
        self.image_size, self.patch_size, self.latent_grid = image_size, patch_size, latent_grid
        self.branches, self.code_dim = branches, code_dim
        self.commitment, self.codebook_drop, self.start_drop = commitment, codebook_drop, start_drop
        self.lora_scaling = lora_alpha / max(1, lora_rank)
        self.tuning, self.semantic = {"encoder": enc_tuning, "decoder": dec_tuning}, Semantic.parse(semantic)
        self.spec = (
            MultiScale(scales, branches, vocab, code_dim)
            if len(scales) > 1
            else Codes(latent_grid**2, branches, vocab, code_dim, (latent_grid, latent_grid))
        )

        grid = image_size // patch_size
        sizes = {"encoder": ViTSize.parse(encoder, "encoder"), "decoder": ViTSize.parse(decoder, "decoder")}
        self.encoder = Encoder(sizes["encoder"], grid, patch_size, latent_grid, branches, drop_path)
        self.decoder = Decoder(sizes["decoder"], grid, patch_size, latent_grid, drop_path, pixel_channels)
        self.quant_conv = nn.Conv2d(sizes["encoder"].width, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(branches * code_dim, sizes["decoder"].width, 1)
        self.quantizer = MultiScaleQuantizer(
            vocab,
            code_dim,
            scales,
            branches,
            shared_phi=None if quantizer == "plain" else shared_phi,
            cosine=cosine,
            normalise=quantizer != "residual",
            binary=quantizer == "binary",
        )
        self.term_names: tuple[str, ...] = ("codebook", "commitment")
        if self.semantic is not None:
            self.term_names += ("contrast",)
            self.semantic_branches = self.semantic.chosen(branches)
            width = next(iter(self.semantic.teachers.values()))
            # The official teacher is as wide as the encoder and goes straight into quant_conv; others are projected.
            self.sem_linear = (
                nn.Identity() if width == sizes["encoder"].width else Linear(width, sizes["encoder"].width)
            )
        for part, size in sizes.items():
            trunk = self.get_submodule(part).model
            if not self.quant_conv.weight.is_meta:
                _start_trunk(trunk, size, image_size, patch_size, pretrained)
            self._tune(trunk, self.tuning[part], lora_rank, lora_alpha)

    @staticmethod
    def _tune(trunk: VisionTransformer, method: str, rank: int, alpha: float) -> None:
        if method == "full":
            return
        trunk.requires_grad_(False)
        if method == "lora":
            adapt(trunk, ("mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3"), rank, alpha)
            trunk.norm = TunedLayerNorm(trunk.norm)

    def resized(self, state: State, settings: Mapping[str, Any]) -> State:
        """Positions of both trunks like pictures, and the latent tokens of each branch."""
        grid, side = self.image_size // self.patch_size, self.latent_grid
        state = dict(state)
        for name in ("encoder.model.pos_embed", "decoder.model.pos_embed"):
            state[name] = resize_rows(state[name], (grid, grid), 1)
        branches = state["encoder.latent_tokens"].chunk(settings.get("branches", 2), dim=1)
        state["encoder.latent_tokens"] = torch.cat([resize_rows(tokens, (side, side)) for tokens in branches], dim=1)
        return state

    # -- images and features --------------------------------------------------------------------------------------------
    def features(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """Maps before quantisation, (B, K, C, P, P)."""
        tokens = self.encoder(images, draws)  # (B, K P^2, D)
        return self.split_branches(self.quant_conv(tokens.transpose(1, 2)[..., None]))

    def split_branches(self, z: Tensor) -> Tensor:
        """(B, C, K P^2, 1) -> (B, K, C, P, P)."""
        return z.view(len(z), self.code_dim, self.branches, self.latent_grid, self.latent_grid).transpose(1, 2)

    def decode_features(self, f_hat: Tensor, draws: Draws | None = None) -> Tensor:
        """Quantised maps (B, K, C, P, P) -> pictures (B, 3, H, W), not clamped."""
        tokens = self.post_quant_conv(f_hat.flatten(1, 2)).flatten(2).transpose(1, 2)  # (B, P^2, D)
        return self.decoder(tokens, draws)

    # -- training -------------------------------------------------------------------------------------------------------
    def _draw_kept(self, draws: Draws) -> tuple[Tensor | None, Tensor | None]:
        """(how many scales each picture keeps, which pictures keep all of them), (B,) each; None without dropout."""
        total = len(self.quantizer.scales)
        if not self.codebook_drop:
            return None, None
        whole = draws.uniform("quantizer dropout") >= self.codebook_drop
        if total == 1:
            return None, whole
        count = self.start_drop + (draws.uniform("scales kept") * (total - self.start_drop + 1)).long()
        return torch.where(whole, total, count), whole

    def forward(
        self, images: Tensor, draws: Draws, features: dict[str, Tensor] | None = None, progress: Progress | None = None
    ) -> Recon:
        """`features`: teacher name -> (B, N, D'), needed when there is a `semantic` teacher."""
        kept, whole = self._draw_kept(draws)
        features_before = self.features(images, draws.fork("encoder"))
        quantized: QuantizedMaps = self.quantizer(features_before, kept, update_usage=self.training)
        scales = len(self.quantizer.scales)
        terms = {
            "codebook": quantized.codebook_loss,
            "commitment": quantized.commitment_sum / (scales if self.commitment == "mean" else 1),
        }
        if self.semantic is not None:
            terms["contrast"] = self._contrast(quantized.features, features, whole, progress)
        usage = self.quantizer.usage(group_size() * len(images))  # (K, S), in percent
        logs = {f"usage/branch{branch}": share for branch, share in enumerate(usage.mean(1))}
        return Recon(
            self.decode_features(quantized.features, draws.fork("decoder")),
            terms,
            logs=logs,
            last_layer=self.decoder.to_pixel.last_weight,
            details={"kept": kept, "quantized": quantized, "usage": usage},
        )

    def _contrast(
        self, f_hat: Tensor, features: dict[str, Tensor] | None, counted: Tensor | None, progress: Progress | None
    ) -> Tensor:
        name = next(iter(self.semantic.teachers))
        if not features or name not in features:
            raise UserError(
                f'imagefolder learns from the features of teacher "{name}", which is not configured.'
                + nearest(name, features or {})
            )
        seen = self.sem_linear(features[name].float().mean(1))  # (B, D)
        u = self.quant_conv(seen[..., None, None]).flatten(1)  # (B, C)
        with no_autocast(f_hat):
            u, v = u.float(), f_hat.float().mean((3, 4))  # (B, K, C)
            settings = {"scale": self.semantic.factor(progress), "normalise": self.semantic.normalise}
            return torch.stack(
                [info_nce(u, v[:, b], symmetric=True, counted=counted, **settings) for b in self.semantic_branches]
            ).mean()

    # -- use ------------------------------------------------------------------------------------------------------------
    def encode(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """(B, L, K) int64, coarse to fine."""
        return self.quantizer.encode(self.features(images))

    def decode(self, latents: Tensor, draws: Draws | None = None) -> Tensor:
        """Codes (B, L, K), or those of the first scales only -> pictures."""
        return self.decode_features(self.quantizer.partial_maps(latents)[-1])

    def previews(self, latents: Tensor, draws: Draws | None = None) -> list[Tensor]:
        """The picture after each scale, (B, 3, H, W) each."""
        return [self.decode_features(f_hat) for f_hat in self.quantizer.partial_maps(latents)]

    def embed(self, codes: Tensor) -> Tensor:
        """(B, L, K) -> (B, L, K, C) fp32."""
        return self.quantizer.embed(codes)

    def probe_features(self, images: Tensor) -> dict[str, Tensor]:
        """(B, N, F) features for linear probing: the quantised map of the "last" branch (the published choice, it seems),
        of "all" branches, and "pre", the last branch before quantisation."""
        before = self.features(images)  # (B, K, C, g, g)
        quantised = self.quantizer.partial_maps(self.quantizer.encode(before))[-1]
        maps = {"last": quantised[:, -1:], "all": quantised, "pre": before[:, -1:]}
        return {name: x.flatten(1, 2).flatten(2).transpose(1, 2) for name, x in maps.items()}

    # -- core.specs.ScaleOps --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def scale_inputs(self, codes: Tensor) -> Tensor:
        """What a generator sees before it predicts scale 1, 2, ...: (B, L - P_0^2, K C) fp32."""
        maps = self.quantizer.partial_maps(codes)
        parts = [self.quantizer.inputs(f_hat, s + 1) for s, f_hat in enumerate(maps[: len(self.quantizer.scales) - 1])]
        return torch.cat(parts, dim=1) if parts else self.embed(codes[:, :0]).flatten(2)

    @torch.no_grad()
    def next_scale(self, state: GrowingMap | None, codes: Tensor, scale: int) -> tuple[GrowingMap, Tensor]:
        """Add the codes (B, p p, K) of scale number `scale` to the map; returns it and the input for the next scale.

        After the last scale the second is the map itself, as tokens.
        """
        quantizer = self.quantizer
        with no_autocast(codes):
            tables = quantizer.tables() if state is None else state.tables
            added = quantizer.spread(codes, scale, tables)
            f_hat = added if state is None else state.f_hat + added
            return GrowingMap(f_hat, tables), quantizer.inputs(f_hat, scale + 1)


def _checked(
    image_size: int,
    patch_size: int,
    latent_grid: int,
    scales: tuple[int, ...],
    branches: int,
    code_dim: int,
    latent_width: int | None,
    start_drop: int,
) -> int:
    """UserError for sizes that do not fit each other; returns the width of a code."""
    if image_size % patch_size:
        raise UserError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    if branches < 1:
        raise UserError(f"branches is {branches}: there must be at least 1")
    if not scales or any(p < 1 for p in scales) or list(scales) != sorted(scales):
        raise UserError(f"scales {list(scales)} must be whole numbers from 1 on that do not shrink")
    if scales[-1] != latent_grid:
        raise UserError(
            f"scales {list(scales)} end at {scales[-1]} but the latent grid is {latent_grid}x{latent_grid}: "
            f"end them with {latent_grid}, or set latent_grid: {scales[-1]}"
        )
    if len(scales) > 1 and not 1 <= start_drop <= len(scales):
        raise UserError(f"start_drop is {start_drop}, but there are {len(scales)} scales: use 1 to {len(scales)}")
    if latent_width is None:
        return code_dim
    if latent_width % branches:
        raise UserError(f"{branches} branches do not divide latent_width {latent_width}: use a multiple of {branches}")
    return latent_width // branches


def _quantizer_kind(name: str, scales: tuple[int, ...]) -> str:
    """The quantizer of this name, which may be "auto"; UserError where it cannot have these scales."""
    if name == "auto":
        return "plain" if len(scales) == 1 else "residual"
    check_choice("quantizer", name, ("residual", "plain", "binary"))
    if name == "plain" and len(scales) > 1:
        raise UserError(
            f"the plain quantizer has one scale, not {list(scales)}: set scales: [{scales[-1]}], or quantizer: residual"
        )
    return name


def _start_trunk(
    trunk: VisionTransformer, size: ViTSize, image_size: int, patch_size: int, pretrained: bool | str
) -> None:
    """Weights to train from; `pretrained` as in ImageFolder."""
    if not pretrained:
        trunk.start_from_nothing()
        return
    state = dinov2_weights(size, image_size, patch_size, pretrained if isinstance(pretrained, str) else None)
    if not hasattr(trunk, "patch_embed"):
        state = {name: value for name, value in state.items() if not name.startswith("patch_embed.")}
    trunk.load_state_dict(state)
