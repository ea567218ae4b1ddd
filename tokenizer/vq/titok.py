"""TiTok: a picture as a short sequence of codes without places (Yu et al., arXiv 2406.07550).

Learned latent tokens attend to the patches in the encoder; the decoder paints patches from the quantised latents. The
first releases ("legacy") predict codes of MaskGIT-VQGAN, whose decoder paints; later ones paint pixels. The networks
work on pixels in [0, 1]; the tokenizer's interface is [-1, 1] like everywhere.

Shape letters: B batch, N latent tokens, P patches, W width, V codebook size, D width of a code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from core.config import parse_section
from core.errors import UserError
from core.images import to_unit_range
from core.limits import Count, Pixels, Whole, Width
from core.nn.embed import resize_rows
from core.nn.linear import Linear
from core.nn.transformer import Transformer
from core.nn.vit import ViTSize
from core.specs import Codes
from core.weights.names import State
from tokenizer.codes import CodesOfOneBranch
from tokenizer.vq.maskgit import ConvDecoder
from tokenizer.vq.quantizer import VectorQuantizer

SIZES = {"small": ViTSize(512, 8, 8), "base": ViTSize(768, 12, 12), "large": ViTSize(1024, 24, 16)}


class Half(Transformer):
    """Patch tokens behind a class token, then the latent tokens, through one transformer."""

    def __init__(self, size: ViTSize, patches: int, latents: int):
        super().__init__(size.width, size.layers, size.heads)
        width, scale = size.width, size.width**-0.5
        self.class_embedding = nn.Parameter(torch.randn(1, width) * scale)
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width) * scale)
        self.latent_token_positional_embedding = nn.Parameter(torch.randn(latents, width) * scale)

    def forward(self, patches: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, W) and (B, N, W) -> the same after the blocks."""
        classes = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat((classes, patches), dim=1) + self.positional_embedding
        x = super().forward(torch.cat((x, latents + self.latent_token_positional_embedding), dim=1))
        return x[:, 1 : 1 + patches.shape[1]], x[:, 1 + patches.shape[1] :]


class Encoder(Half):
    """Pictures in [0, 1] and latent tokens (N, W) -> vectors (B, N, D)."""

    def __init__(self, size: ViTSize, grid: int, patch_size: int, latents: int, code_dim: int, legacy: bool):
        super().__init__(size, grid * grid, latents)
        self.legacy = legacy
        self.patch_embed = nn.Conv2d(3, size.width, patch_size, stride=patch_size)
        self.conv_out = nn.Conv2d(size.width, code_dim, 1)

    def forward(self, pixels: Tensor, latents: Tensor) -> Tensor:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # (B, P, W)
        x = super().forward(patches, latents.to(patches.dtype).expand(len(patches), -1, -1))[1]  # (B, N, W)
        # parity: the first releases view (N, W) as (W, N), which mixes tokens; their weights learnt to live with it.
        x = x.reshape(len(x), x.shape[2], x.shape[1]) if self.legacy else x.transpose(1, 2)  # (B, W, N)
        return self.conv_out(x[..., None])[..., 0].transpose(1, 2)


class Decoder(Half):
    """Vectors (B, N, D) -> (B, out_channels, grid, grid)."""

    def __init__(self, size: ViTSize, grid: int, latents: int, code_dim: int, ffn: nn.Module):
        super().__init__(size, grid * grid, latents)
        self.grid = grid
        self.decoder_embed = Linear(code_dim, size.width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, size.width) * size.width**-0.5)
        self.ffn = ffn

    def forward(self, z: Tensor) -> Tensor:
        latents = self.decoder_embed(z)
        patches = self.mask_token.to(latents.dtype).expand(len(z), self.grid * self.grid, -1)
        x = super().forward(patches, latents)[0]
        return self.ffn(x.transpose(1, 2).unflatten(2, (self.grid, self.grid)))


@dataclass(frozen=True)
class Proxy:
    """Codebook and decoder of the MaskGIT-VQGAN whose codes the first releases predict; defaults are the released one."""

    vocab: Count = 1024
    code_dim: Width = 256
    channels: Width = 128
    channel_mult: tuple[Count, ...] = (1, 1, 2, 2, 4)
    res_blocks: Whole = 2
    groups: Count = 32


class TiTok(CodesOfOneBranch):
    """core.specs.Tokenizer with N codes in a sequence. The defaults are the released bl128_vq8k.

    Args:
        encoder, decoder: a name in SIZES, or {width, layers, heads}.
        patch_size, decoder_patch_size: of the pictures that the encoder reads and of those that the decoder paints;
            None: the same. All released files have 16 for both.
        latents: N.
        vocab, code_dim, normalise: of the codebook; `normalise` brings vectors and codes to unit length, whatever
            `legacy` is.
        legacy: the first releases (l32, b64, s128): tokens mixed behind the encoder, pictures painted by the decoder of
            MaskGIT-VQGAN from the expectation of its codebook.
        proxy: of legacy, the codebook and decoder of that MaskGIT-VQGAN: settings of Proxy. False leaves them out:
            `decode` cannot paint then.
        usage_window: latest assignments whose distinct share is logged in training; 0: not at all.
    """

    def __init__(
        self,
        *,
        image_size: Pixels = 256,
        patch_size: Pixels = 16,
        decoder_patch_size: Pixels | None = None,
        encoder: str | Annotated[dict, ViTSize] = "base",
        decoder: str | Annotated[dict, ViTSize] = "large",
        latents: Count = 128,
        vocab: Count = 8192,
        code_dim: Width = 64,
        normalise: bool = False,
        legacy: bool = False,
        proxy: Annotated[dict, Proxy] | bool | None = None,
        usage_window: Whole = 0,
    ):
        super().__init__()
        painted = decoder_patch_size or patch_size
        for setting, size in (("patch_size", patch_size), ("decoder_patch_size", painted)):
            if image_size % size:
                raise UserError(f"image_size {image_size} is not a multiple of {setting} {size}")
        self.image_size, self.legacy, self.patch_size = image_size, legacy, painted
        self.spec = Codes(latents, 1, vocab, code_dim)
        sizes = ViTSize.parse(encoder, "encoder", SIZES), ViTSize.parse(decoder, "decoder", SIZES)
        self.latent_tokens = nn.Parameter(torch.randn(latents, sizes[0].width) * sizes[0].width ** -0.5)
        self.encoder = Encoder(sizes[0], image_size // patch_size, patch_size, latents, code_dim, legacy)
        self.quantizer = VectorQuantizer(vocab, code_dim, normalise=normalise, floor="clamp", usage_window=usage_window)
        width = sizes[1].width
        self.conv_out = self.pixel_codebook = self.pixel_decoder = None
        if legacy:
            shape = parse_section("proxy", proxy if isinstance(proxy, dict) else {}, Proxy)
            ffn = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.Tanh(), nn.Conv2d(2 * width, shape.vocab, 1))
            if proxy is not False:
                self.pixel_codebook = nn.Embedding(shape.vocab, shape.code_dim)
                self.pixel_decoder = ConvDecoder(
                    shape.channels, shape.channel_mult, shape.res_blocks, shape.code_dim, shape.groups
                )
        else:
            ffn = nn.Sequential(nn.Conv2d(width, 3 * painted**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        self.decoder = Decoder(sizes[1], image_size // painted, latents, code_dim, ffn)

    @property
    def last_layer(self) -> Tensor:
        return (self.conv_out or self.pixel_decoder.conv_out).weight

    def resized(self, state: State, settings: Mapping[str, Any]) -> State:
        """Positions of the patches like pictures; latents have no place, and their number cannot change."""
        grids = {"encoder": self.image_size // self.encoder.patch_embed.kernel_size[0], "decoder": self.decoder.grid}
        tables = {f"{half}.positional_embedding": (grid, grid) for half, grid in grids.items()}
        return {**state, **{name: resize_rows(state[name], grid, 1) for name, grid in tables.items()}}

    def vectors(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, N, D)."""
        return self.encoder(to_unit_range(images), self.latent_tokens)

    def paint(self, vectors: Tensor) -> Tensor:
        """(B, N, D) -> images (B, 3, H, W)."""
        x = self.decoder(vectors)
        if self.conv_out is not None:  # colour fastest, unlike PixelShuffle
            p = self.patch_size
            pixels = self.conv_out(rearrange(x, "b (p q c) h w -> b c (h p) (w q)", p=p, q=p))
        elif self.pixel_decoder is None:
            raise UserError("this TiTok was built without the decoder that paints its proxy codes (proxy: false)")
        else:
            expected = torch.einsum("bvhw,vd->bdhw", x.float().softmax(1), self.pixel_codebook.weight.float())
            pixels = self.pixel_decoder(expected.to(x.dtype))
        return pixels * 2 - 1
