"""Is what an edit draws under the mask of the class asked for, and does everything else stay? Of the shipped tiny models.

    python -m tests.tools.edit_scores [SYSTEM ...] [--photos 9] [--mask 0.5 0.75] [--heed 0.3]

An unseen photo of each class in turn is changed into every other class through a centred square mask whose side is a share of
the picture's. Score: the mean probability that the tests' classifier (tests/run/tiny_classifier.safetensors) gives to the
class asked for. "inside": of what is under the mask alone, enlarged to a whole picture, of the edits and of as many plain
samples of the same labels. "whole": of the picture with the photo put back, of the edits and of plain samples put in.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evaluation import toy
from run import edit
from run.target import Sampler
from tests.tools import tiny


@dataclass
class Row:
    """Of one system and mask; probabilities of the class asked for."""

    plain: float  # inside
    edited: float
    plain_whole: float
    edited_whole: float
    before: float  # PSNR outside the mask before the photo is put back, dB
    kept: float  # share of codes or latents
    equal: bool  # kept ones reached the decoder bit for bit, and pixels outside the mask are the photo's


def probability(pictures: Tensor, labels: Tensor) -> float:
    """Mean probability of `labels` (N,) for (N, 3, H, W) uint8 pictures."""
    net = tiny.feature_network()
    features = torch.cat([net.taps(part)[toy.CLASS_TAP] for part in pictures.split(30)])
    return float(tiny.classifier().logits(features).softmax(1)[torch.arange(len(labels)), labels].mean())


def square(size: int, share: float) -> Tensor:
    """(S, S) bool, a centred square."""
    side = round(size * share)
    first = (size - side) // 2
    masked = torch.zeros(size, size, dtype=torch.bool)
    masked[first : first + side, first : first + side] = True
    return masked


def inside(pictures: Tensor, share: float) -> Tensor:
    """What is under the mask of (N, 3, S, S) uint8, as pictures of the size that the classifier learnt."""
    size = pictures.shape[-1]
    side = round(size * share)
    first = (size - side) // 2
    crop = pictures[..., first : first + side, first : first + side].float()
    grown = torch.nn.functional.interpolate(crop, (tiny.CLASSIFIED, tiny.CLASSIFIED), mode="bilinear", antialias=True)
    return grown.round().byte()


def edited_with_latents(
    sampler: Sampler, canvas: edit.Canvas, labels: list[int], rules: edit.Rules, seed: int
) -> tuple[edit.Edited, Tensor]:
    """The edit, and the latents that its decoder got."""
    seen: list[Tensor] = []
    tokenizer = sampler.tokenizer
    decode = tokenizer.decode
    tokenizer.decode = lambda latents, *draws: seen.append(latents) or decode(latents, *draws)
    try:
        made = edit.edit(sampler, canvas, labels, rules, torch.device("cpu"), seed)
    finally:
        del tokenizer.decode
    return made, seen[0]


@torch.no_grad()
def measure(
    system: str,
    share: float,
    photos: int,
    same: bool = False,
    scale: float | None = None,
    rules: edit.Rules | None = None,
) -> Row:
    generator, rules = tiny.model(system), rules or edit.Rules()
    sampler, size = generator.sampler, generator.tokenizer.image_size
    if sampler.generator.usual_heed is None:  # it asks the label alone
        rules = replace(rules, heed=None)
    masked, rows, labels, equal, before, put_in = square(size, share), [], [], True, [], []
    for i, photo in enumerate(tiny.unseen(size, photos)):
        own = int(tiny.unseen_labels(photos)[i])
        asked = [own] * 8 if same else [label for label in range(sampler.num_classes) if label != own]
        canvas = edit.Canvas(photo, masked)
        guided = sampler if scale is None else generator.tuned({"scale": scale})
        made, latents = edited_with_latents(guided, canvas, asked, rules, i)
        codes = sampler.tokenizer.encode(photo[None] / 127.5 - 1)
        kept = edit.kept_cells(sampler.tokenizer, masked, rules)[0]
        where = kept if codes.is_floating_point() else kept[..., None]
        equal &= torch.equal(torch.where(where, latents, 0), torch.where(where, codes, 0).expand_as(latents))
        equal &= torch.equal(made.pictures[..., ~masked], photo[:, ~masked].expand(len(asked), -1, -1))
        plain = torch.as_tensor(generator.sample(asked, seed=i, output="uint8"))
        put_in.append(torch.where(masked, plain, photo))
        rows.append((plain, made.pictures))
        before += [facts["outside_psnr"] for facts in made.facts if "outside_psnr" in facts]
        labels += asked
    wanted = torch.tensor(labels)
    plain, edited = (torch.cat(parts) for parts in zip(*rows))
    share_kept = float(kept.double().mean())
    views = (inside(plain, share), inside(edited, share), torch.cat(put_in), edited)
    scores = [probability(pictures, wanted) for pictures in views]
    return Row(*scores, sum(before) / len(before), share_kept, equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("systems", nargs="*", default=tiny.SYSTEMS)
    parser.add_argument("--photos", type=int, default=9)
    parser.add_argument("--mask", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument(
        "--same", action="store_true", help="draw the photo's own class: is it the rest of the photo that tells?"
    )
    parser.add_argument("--scale", type=float, help="guidance of the edits; plain samples keep the recipe's")
    parser.add_argument("--heed", type=float, help="of each edit, see run_edit.sh; of generators that take it")
    options = parser.parse_args()
    rules = edit.Rules(heed=options.heed)
    print(
        "| | side | kept | inside: plain | edited | ratio | whole: plain put in | edited | ratio | outside, before | exact |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for system in options.systems:
        for share in options.mask:
            row = measure(system, share, options.photos, options.same, options.scale, rules)
            print(
                f"| `tiny/{system}` | {share:.0%} | {row.kept:.0%} | {row.plain:.2f} | {row.edited:.2f} | {row.edited / row.plain:.0%} "
                f"| {row.plain_whole:.2f} | {row.edited_whole:.2f} | {row.edited_whole / row.plain_whole:.0%} "
                f"| {row.before:.1f} dB | {'yes' if row.equal else 'NO'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
