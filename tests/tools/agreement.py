"""Do the figures of run_compare.sh agree with other libraries, and do their intervals cover? Of a tiny tokenizer.

    pip install scikit-image torchmetrics lpips        # into the environment; what is missing is left out by name
    python -m tests.tools.agreement [TOKENIZER]        # default: those that come with the code

PSNR, SSIM and LPIPS of unseen emoji and their reconstructions beside scikit-image, torchmetrics and lpips (on the same random
VGG16, whose published weights may not be here); entropy-coded bits per pixel beside the entropy of counts made anew;
how often 95 % intervals and paired differences hold the truth, in a simulation.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.images import to_model_range, to_uint8
from core.nn.lpips import lpips_vgg
from core.rng import Draws
from core.specs import Tokenizer
from evaluation.comparison import entropy_coded_bits_per_pixel, interval_of, paired_difference
from evaluation.images import Codebooks, psnr, ssim
from run.load import read_tokenizer
from tests.tools import tiny

Line = tuple[str, str, str]  # what, compared with, what was found
PICTURES, TRIALS, DRAWN = 182, 400, 120


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@torch.no_grad()
def pictures(tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """(originals, reconstructions) (N, 3, S, S) in [0, 1], of 8 bits, and codes or latents."""
    originals = tiny.unseen(tokenizer.image_size, PICTURES)
    latents = tokenizer.encode(to_model_range(originals))
    parts = zip(latents.split(32), torch.arange(PICTURES).split(32))
    rebuilt = torch.cat([tokenizer.decode(part, Draws(0, places)) for part, places in parts])
    return originals / 255, to_uint8(rebuilt, "nearest") / 255, latents


def of_pictures(a: Tensor, b: Tensor) -> Iterator[Line]:
    if metrics := library("skimage.metrics"):
        pairs = list(zip(a.double().numpy(), b.double().numpy()))
        theirs = [metrics.peak_signal_noise_ratio(x, y, data_range=1) for x, y in pairs]
        yield "psnr", "scikit-image", f"{np.abs(psnr(a, b).numpy() - theirs).max():.1e} dB"
        theirs = [metrics.structural_similarity(x, y, channel_axis=0, data_range=1) for x, y in pairs]
        yield "ssim", "scikit-image", f"{np.abs(ssim(a, b).numpy() - theirs).max():.1e}"
    if image := library("torchmetrics.functional.image"):
        theirs = image.peak_signal_noise_ratio(b, a, data_range=1.0, reduction="none", dim=(1, 2, 3))
        yield "psnr", "torchmetrics", f"{float((psnr(a, b) - theirs).abs().max()):.1e} dB"
        theirs = image.structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
        yield (
            "ssim_torchmetrics",
            "torchmetrics",
            f"{float((ssim(a, b, 'ssim_torchmetrics') - theirs).abs().max()):.1e}",
        )
    if lpips := library("lpips"):
        theirs, ours = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval(), lpips_vgg(pretrained=False)
        layers = [m for i in range(1, 6) for m in getattr(theirs.net, f"slice{i}") if isinstance(m, torch.nn.Conv2d)]
        for mine, other in zip((m for m in ours.backbone if isinstance(m, torch.nn.Conv2d)), layers, strict=True):
            mine.load_state_dict(other.state_dict())
        for i, head in enumerate(ours.heads):
            head.weight.data.copy_(getattr(theirs, f"lin{i}").model[1].weight)
        with torch.no_grad():
            found = ours(a[:32], b[:32]), theirs(b[:32], a[:32], normalize=True).flatten()
        yield "lpips", "lpips", f"{float((found[0] / found[1] - 1).abs().max()):.1e} of it"


def of_codes(codes: Tensor, tokenizer: Tokenizer) -> Iterator[Line]:
    if (books := Codebooks.of(tokenizer.spec)) is None:
        return
    ours = entropy_coded_bits_per_pixel(books.count(codes), len(codes), tokenizer.image_size)
    bits = 0.0  # of the messages of all branches and scales, each coded by itself
    for scale in codes.split(books.scales or codes.shape[1], dim=1):
        for message in (branch.flatten().tolist() for branch in scale.unbind(2)):
            bits -= sum(n * math.log2(n / len(message)) for n in collections.Counter(message).values())
    theirs = bits / len(codes) / tokenizer.image_size**2
    yield "entropy_coded_bpp", "counts made anew", f"{abs(ours / theirs - 1):.1e} of it ({ours:.4f})"


def coverage() -> Iterator[Line]:
    """Of the mean of skewed values, and of the paired difference of two that are alike but for 0.05."""
    draws, held = np.random.default_rng(0), [0, 0]
    for _ in range(TRIALS):
        first = draws.gamma(2.0, 1.0, DRAWN)
        second = first + draws.normal(0.05, 0.2, DRAWN)
        low, high = interval_of(torch.from_numpy(first))
        pair = paired_difference(torch.from_numpy(second), torch.from_numpy(first))
        held[0] += low <= 2.0 <= high
        held[1] += pair.low <= 0.05 <= pair.high
    for name, count in zip(("interval of a mean", "paired difference"), held):
        yield name, f"{TRIALS} simulations of {DRAWN} pictures", f"{count / TRIALS:.1%} hold the truth"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tokenizers", nargs="*", default=[f"tiny/{system}" for system in tiny.SYSTEMS])
    options = parser.parse_args()
    print("| | | compared with | largest difference |\n|---|---|---|---|")
    for reference in options.tokenizers:
        tokenizer = read_tokenizer({"weights": reference}).module
        a, b, codes = pictures(tokenizer)
        for line in (*of_pictures(a, b), *of_codes(codes, tokenizer)):
            print(f"| `{reference}` | {' | '.join(line)} |", flush=True)
    for line in coverage():
        print(f"| | {' | '.join(line)} |")
    for name in ("skimage", "torchmetrics", "lpips"):
        if library(name) is None:
            print(f"left out: {name} is not installed")


if __name__ == "__main__":
    main()
