"""Models from Python, in a line each: what notebooks and hubconf.py use.

    import run

    tokenizer = run.load_tokenizer("pretrained_models/fqgan_dual_ds16.pt")
    codes = tokenizer.encode(picture)                       # a PIL picture, uint8 arrays, tensors, or a list of them
    tokenizer.decode(codes)[0].save("rebuilt.png")
    generator = run.load_generator("work_dirs/my_run")
    generator.sample(labels=["tree frog", 207], seed=0)     # PIL pictures
    generator.edit("cat.jpg", 207, mask="mask.png")         # white in the mask is drawn anew

A reference is what every program takes: a run folder, a checkpoint, a file of weights, the name of a released one, or
hf://owner/repository/file. Picture i of `sample` is picture i that run_sample.sh draws with the same seed and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.dist import pick_device
from core.errors import UserError, check_choice
from core.images import finite_uint8, to_model_range
from core.rng import Draws, hash64
from core.specs import LatentSpec, Tokenizer
from data.decode import to_rgb
from data.transforms import center_crop, to_tensor
from evaluation.measure import alone
from run import edit
from run.load import read_tokenizer
from run.reconstruct import read_files
from run.sample import parse_labels
from run.target import Sampler, open_generator, read_target

Output = Literal["pil", "numpy", "uint8", "float"]
Pictures = list[Image.Image] | np.ndarray | Tensor
OUTPUTS = ("pil", "numpy", "uint8", "float")


def load_tokenizer(reference: str, device: str = "auto", **settings: Any) -> TokenizerModel:
    """A finished tokenizer.

    Args:
        reference: see above.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        settings: keys of a config's `tokenizer` section: what a released file does not tell, use_ema, latent_stats.

    Raises:
        UserError: in a sentence, where there are no such weights or they are of something else.
    """
    loaded = read_tokenizer({"weights": str(reference), **settings})
    return TokenizerModel(loaded.module.to(pick_device(device)))


def load_generator(
    reference: str, device: str = "auto", tokenizer: str | None = None, overrides: Sequence[str] = ()
) -> GeneratorModel:
    """A finished generator with the tokenizer that decodes its latents, guided as its run or its authors say.

    Args:
        reference: see above; a config stands for its run.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        tokenizer: other tokenizer weights than those it was trained with, or those of a file that does not name them.
        overrides: keys of the config, as on the command line: ["sample.scale=1.5"].

    Raises:
        UserError: in a sentence, where there are no such weights, they are of something else, or do not fit.
    """
    named = [] if tokenizer is None else [f"tokenizer.weights={tokenizer}"]
    target = read_target(str(reference), [*named, f"train.device={device}", *overrides])
    return GeneratorModel(open_generator(target, alone(pick_device(device))))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures in and out
# ---------------------------------------------------------------------------------------------------------------------
def to_images(pictures: Any, size: int) -> Tensor:
    """(B, 3, size, size) fp32 in [-1, 1].

    Args:
        pictures: a PIL picture, the path of a file; a uint8 array (H, W, 3) or (B, H, W, 3); a uint8 tensor (3, H, W) or (B, 3, H, W); or a list
            of these: their centre is cut out, as for every evaluation. A float tensor (B, 3, size, size) in [-1, 1] is
            taken as it is.
    """
    if isinstance(pictures, Tensor) and pictures.is_floating_point():
        if pictures.dim() != 4 or pictures.shape[1:] != (3, size, size):
            raise UserError(
                f"a float tensor of pictures is (B, 3, {size}, {size}) in [-1, 1] here, not {tuple(pictures.shape)}. "
                "Pictures of other sizes are taken as PIL or uint8."
            )
        return pictures.float()
    crops = [to_tensor(center_crop(picture, size)) for picture in _to_pil(pictures)]
    if not crops:
        raise UserError("no pictures were given.")
    return to_model_range(torch.stack(crops))


def _to_pil(pictures: Any) -> list[Image.Image]:
    if isinstance(pictures, Image.Image):
        return [to_rgb(pictures)]
    if isinstance(pictures, (str, Path)):
        return [picture for _, picture in read_files([str(pictures)])]
    if isinstance(pictures, (list, tuple)):
        return [one for picture in pictures for one in _to_pil(picture)]
    if isinstance(pictures, Tensor) and pictures.dtype == torch.uint8 and pictures.dim() in (3, 4):
        pictures = pictures.movedim(-3, -1).cpu().numpy()
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.uint8 or pictures.shape[-1:] != (3,):
        kind = f"{type(pictures).__name__} {getattr(pictures, 'dtype', '')} {tuple(getattr(pictures, 'shape', ()))}"
        raise UserError(
            f"pictures are PIL, names of files, uint8 arrays (H, W, 3) or (B, H, W, 3), uint8 tensors (3, H, W) or (B, 3, H, W), or float "
            f"tensors in [-1, 1], not {kind}."
        )
    if pictures.ndim == 4:
        return [Image.fromarray(picture) for picture in pictures]
    if pictures.ndim != 3:
        raise UserError(f"an array of pictures is (H, W, 3) or (B, H, W, 3), not {pictures.shape}.")
    return [Image.fromarray(pictures)]


def _one(picture: Any) -> Image.Image:
    """A single picture or mask."""
    if isinstance(picture, (str, Path)):
        return next(read_files([str(picture)], upright=True))[1]
    if isinstance(picture, (np.ndarray, Tensor)) and picture.ndim == 2:
        picture = np.asarray(picture).astype(bool).astype(np.uint8)[..., None].repeat(3, -1) * 255
    (one,) = _to_pil(picture)
    return one


def to_output(images: Tensor, output: Output) -> Pictures:
    """(B, 3, H, W) in [-1, 1] as "pil": a list; "numpy": (B, H, W, 3) uint8; "uint8": (B, 3, H, W); "float": as it is."""
    check_choice("output", output, OUTPUTS)
    if output == "float":
        return images
    pixels = finite_uint8(images.float(), "nearest", range(len(images)))
    if output == "uint8":
        return pixels
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return arrays if output == "numpy" else [Image.fromarray(array) for array in arrays]


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class TokenizerModel:
    """A tokenizer that takes pictures as people have them. `module` is the network itself, core.specs.Tokenizer."""

    module: Tokenizer

    def __repr__(self) -> str:  # a notebook shows it; the network's own would be hundreds of lines
        return f"{type(self.module).__name__}, pictures of {self.image_size} pixels, {self.spec}, on {self.device}"

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def image_size(self) -> int:
        return self.module.image_size

    @property
    def spec(self) -> LatentSpec:
        """What latents are: core.specs.Continuous, Codes or MultiScale."""
        return self.module.spec

    @torch.no_grad()
    def encode(self, pictures: Any, batch: int = 32) -> Tensor:
        """Latents or codes of pictures (see `to_images`), as `spec` says; the most likely ones where they are random."""
        images = to_images(pictures, self.image_size)
        return torch.cat([self.module.encode(part.to(self.device)) for part in images.split(batch)])

    @torch.no_grad()
    def decode(self, latents: Any, output: Output = "pil", seed: int = 0, batch: int = 32) -> Pictures:
        """Pictures of latents or codes, a tensor or array as `encode` gives them.

        Args:
            output: see `to_output`.
            seed: of decoders that draw; others do not depend on it.
            batch: pictures at once.
        """
        latents, images = torch.as_tensor(latents), []
        for part in torch.arange(len(latents)).split(batch):
            draws = Draws(hash64(seed, "decode"), part.to(self.device))
            images.append(self.module.decode(latents[part.to(latents.device)].to(self.device), draws).float())
        return to_output(torch.cat(images), output)

    def reconstruct(self, pictures: Any, output: Output = "pil", seed: int = 0, batch: int = 32) -> Pictures:
        """What is left of pictures after `encode` and `decode`."""
        return self.decode(self.encode(pictures, batch), output, seed, batch)


@dataclass
class GeneratorModel:
    """A generator that takes class names and gives pictures. `sampler` holds its networks and its config."""

    sampler: Sampler

    def __repr__(self) -> str:
        name = type(self.sampler.generator).__name__
        return f"{name} of {self.sampler.num_classes} classes, decoded by {self.tokenizer!r}"

    @property
    def tokenizer(self) -> TokenizerModel:
        return TokenizerModel(self.sampler.tokenizer)

    @property
    def class_names(self) -> list[str]:
        """Name of each class; [] where nothing tells them."""
        return self.sampler.class_names

    @torch.no_grad()
    def sample(
        self,
        labels: str | int | Sequence[str | int],
        num: int | None = None,
        seed: int = 0,
        output: Output = "pil",
        batch: int = 32,
        **settings: Any,
    ) -> Pictures:
        """Pictures of classes; picture i shows label i modulo their number and depends on seed, label and i alone.

        Args:
            labels: class names or numbers; one text as on the command line: "tree frog, 10-19".
            num: pictures in all; None: one per label.
            output: see `to_output`.
            batch: pictures at once.
            settings: keys of a config's `sample` section: scale, steps, temperature, top_k ...
        """
        chosen = self._numbers(labels)
        count = len(chosen) if num is None else num
        if count < 1:
            raise UserError(f"num={num}: give 1 or more.")
        device, sampler, images = self.tokenizer.device, self.tuned(settings), []
        for part in torch.arange(count, device=device).split(batch):
            asked = torch.tensor([chosen[i % len(chosen)] for i in part.tolist()], device=device)
            images.append(sampler.sample(asked, Draws(hash64(seed, "samples"), part)))
        return to_output(torch.cat(images), output)

    def edit(
        self,
        photo: Any,
        labels: str | int | Sequence[str | int],
        mask: Any = None,
        outpaint: float | None = None,
        num: int | None = None,
        seed: int = 0,
        output: Output = "pil",
        rules: edit.Rules | None = None,
        **settings: Any,
    ) -> Pictures:
        """A photo with a part drawn anew as pictures of classes, those of run_edit.sh with the same seed; the rest stays.

        Args:
            photo: a PIL picture, a uint8 array (H, W, 3) or tensor (3, H, W), or the name of a file, which is turned upright.
            labels, num, output, settings: as for `sample`; all pictures are made at once.
            mask: as `photo`, or an array or tensor of bool (H, W): white or True is what changes.
            outpaint: instead of a mask: the share of the picture on either side of the photo, see run.edit.outpainting.
            rules: which codes are kept; None: those that no masked pixel touches.
        """
        if (mask is None) == (outpaint is None):
            raise UserError(
                "say what is to change: mask=... (white or True), or outpaint=SHARE for what is around the photo."
            )
        chosen = self._numbers(labels)
        sampler = self.tuned(settings)
        size, image = self.tokenizer.image_size, _one(photo)
        if outpaint is not None:
            canvas = edit.outpainting(image, outpaint, size)
        else:
            canvas = edit.inpainting(image, _one(mask), size)
        asked = [chosen[i % len(chosen)] for i in range(len(chosen) if num is None else num)]
        drawn = edit.edit(sampler, canvas, asked, rules or edit.Rules(), self.tokenizer.device, seed)
        return to_output(to_model_range(drawn.pictures), output)

    def _numbers(self, labels: str | int | Sequence[str | int]) -> list[int]:
        words = [labels] if isinstance(labels, (str, int)) else labels
        return parse_labels(",".join(map(str, words)), self.sampler.num_classes, self.class_names, "labels")

    def tuned(self, settings: dict[str, Any]) -> Sampler:
        """The sampler with other settings, which are checked as those of a config are."""
        if not settings:
            return self.sampler
        if {"guide", "guidance"} & settings.keys():
            raise UserError('a weaker model is loaded with the generator: overrides=["sample.guide=FILE"].')
        return self.sampler.tuned([f"sample.{key}={value}" for key, value in settings.items()], "sample()")
