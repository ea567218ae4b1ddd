"""Draw a part of a photo anew, as a picture of another class, with any generator: in- and outpainting, change of class.

The photo is encoded; codes or latents whose cells the mask does not touch are kept while the rest is sampled (core.specs.Kept);
after decoding, the photo's own pixels are put back outside the mask. How far what is kept tells the rest what to be
is a matter of the generator's order: `Generator.heeds`.

S is the side of the pictures that the tokenizer takes, B the number of pictures drawn.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core.errors import UserError
from core.files import replacing, write_json
from core.images import finite_uint8, grid, save_png, to_model_range
from core.nn.precision import bf16_products
from core.rng import Draws, hash64
from core.signals import finishing
from core.specs import Codes, Continuous, Generator, Kept, LatentSpec, MultiScale, Streams, Tokenizer
from data.transforms import center_crop, to_tensor
from generator.sampling import draw_latents
from run.reconstruct import read_files
from run.sample import parse_labels
from run.target import Sampler
from tokenizer.views import Sequence, Vectors

MOST = 1000  # pictures: all are drawn at once
WHITE = 128  # a grey value from here on marks a pixel that is to change


@dataclass(frozen=True)
class Rules:
    """Which codes are kept.

    Attributes:
        margin: the mask is widened by so many pixels for that: codes next to it tell of what was inside it.
        cover: a code is kept if no more than this share of its cell's pixels is masked; 0: none of them.
        first: of codes without places, the share that is kept, from the first on, in whole groups where there are groups.
        heed: core.specs.Kept.heed, how much what is kept tells the rest what to be; None: as the generator does it.
    """

    margin: int = 0
    cover: float = 0.0
    first: float = 0.5
    heed: float | None = None

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise UserError(f"--margin {self.margin}: give a number of pixels, 0 or more.")
        if not 0 <= self.cover < 1 or not 0 <= self.first <= 1:
            raise UserError(
                f"--cover {self.cover:g} and --first {self.first:g} are shares: from 0, below 1 for --cover."
            )
        if self.heed is not None and not 0 <= self.heed <= 1:
            raise UserError(f"--heed {self.heed:g}: give a number from 0, the label alone decides, to 1.")


@dataclass
class Canvas:
    """A photo as the model sees it: `photo` (3, S, S) uint8; `masked` (S, S) bool, what is to change."""

    photo: Tensor
    masked: Tensor
    notes: list[str] = field(default_factory=list)


@dataclass
class Edited:
    """Pictures of an edit, (B, 3, S, S) uint8: `drawn` as decoded, `pictures` with the photo put back; `facts` of each."""

    drawn: Tensor
    pictures: Tensor
    kept: str
    facts: list[dict[str, float]]


# ---------------------------------------------------------------------------------------------------------------------
# Photo and mask
# ---------------------------------------------------------------------------------------------------------------------
def binary(mask: Image.Image) -> Image.Image:
    """Grey, of 0 and 255 alone."""
    return Image.fromarray((np.asarray(mask.convert("L")) >= WHITE).astype(np.uint8) * 255)


def inpainting(photo: Image.Image, mask: Image.Image, size: int) -> Canvas:
    """The middle of a photo and of its mask, where white is what is to change.

    A mask has the photo's size, or its proportions and is then resized, or the size of what the model sees.
    """
    masked = binary(mask)
    notes: list[str] = []
    if mask.size != photo.size and mask.size != (size, size):
        (width, height), (w, h) = photo.size, mask.size
        if abs(w * height - h * width) > max(width, height):  # more than rounding to whole pixels explains
            raise UserError(
                f"the mask is {w} x {h}, the photo {width} x {height} pixels: give a mask of the photo's size, of its "
                f"proportions, or of {size} x {size} pixels for the middle of the photo, which is what the model sees."
            )
        notes.append(f"the mask of {w} x {h} was resized to the photo's {width} x {height}")
        masked = masked.resize(photo.size, Image.Resampling.NEAREST)
    if masked.size == photo.size:
        whole = to_tensor(masked.convert("RGB"))[0] > 0
        if not whole.any():
            raise UserError("the mask marks nothing: paint what is to change white; black stays as it is.")
        masked = center_crop(masked.convert("RGB"), size)
    seen = to_tensor(masked.convert("RGB"))[0] > 0  # whatever a marked pixel went into
    if not seen.any():
        raise UserError(
            "the mask marks nothing of the middle of the photo, which is what the model sees: paint what is to change "
            "white, or crop the photo around it."
        )
    return Canvas(to_tensor(center_crop(photo, size)), seen, notes)


def outpainting(photo: Image.Image, share: float, size: int) -> Canvas:
    """The whole photo in the middle of a picture; what is around it is to be drawn.

    Args:
        share: of a side of the picture that lies on either side of the photo's longer side.
    """
    if not 0 <= share < 0.5:
        raise UserError(
            f"--outpaint {share:g}: the share of the picture on either side of the photo, from 0, below 0.5."
        )
    scale = size * (1 - 2 * share) / max(photo.size)
    width, height = (max(1, round(side * scale)) for side in photo.size)
    if (width, height) == (size, size):
        raise UserError("the photo is square and --outpaint is 0: nothing is left to draw around it.")
    inner = to_tensor(photo.resize((width, height), Image.Resampling.LANCZOS))
    left, top = (size - width) // 2, (size - height) // 2
    around = (left, size - width - left, top, size - height - top)
    masked = F.pad(torch.zeros(height, width), around, value=1).bool()
    # The encoder looks across the edge: repeated pixels are less of an edge than a grey frame.
    return Canvas(F.pad(inner[None].float(), around, mode="replicate")[0].to(torch.uint8), masked)


# ---------------------------------------------------------------------------------------------------------------------
# From pixels to codes
# ---------------------------------------------------------------------------------------------------------------------
def kept_cells(tokenizer: Tokenizer, masked: Tensor, rules: Rules) -> tuple[Tensor, bool]:
    """Which latents are kept, as Kept.mask says, and whether they have places at all.

    A cell of a grid of h x w is what of the picture lies in its row and column, in part or whole; scales have their own grids.
    """
    spec = _places(tokenizer)
    share = masked[None, None].float()  # (1, 1, S, S)
    if margin := min(rules.margin, len(masked)):  # rows and columns by themselves: a wide one would take minutes
        share = F.max_pool2d(share, (2 * margin + 1, 1), 1, (margin, 0))
        share = F.max_pool2d(share, (1, 2 * margin + 1), 1, (0, margin))
    if isinstance(spec, MultiScale):
        grids: list[tuple[int, int]] = [(side, side) for side in spec.scales]
    elif spec.grid is not None:
        grids = [spec.grid]
    elif isinstance(spec, Codes) and spec.places:
        side = math.isqrt(spec.length)
        grids = [(side, side)]
    else:
        return _first_codes(tokenizer, spec.length, rules, share), False
    covered = [F.adaptive_max_pool2d(share, g) if not rules.cover else F.adaptive_avg_pool2d(share, g) for g in grids]
    kept = [part <= rules.cover for part in covered]  # (1, 1, h, w) each
    if isinstance(tokenizer.spec, Continuous):
        return kept[0], True
    cells = torch.cat([part.flatten(1) for part in kept], dim=1)
    return cells[:, list(spec.places)] if isinstance(spec, Codes) and spec.places else cells, True


def _places(tokenizer: Tokenizer) -> LatentSpec:
    """The spec that tells where latents lie, behind a view too."""
    if isinstance(tokenizer, Sequence):
        return tokenizer.tokenizer.spec
    return tokenizer.codes if isinstance(tokenizer, Vectors) else tokenizer.spec


def _first_codes(tokenizer: Tokenizer, length: int, rules: Rules, share: Tensor) -> Tensor:
    groups = tokenizer.groups if isinstance(tokenizer, Streams) else length
    known = 0 if share.min() > 0 else int(rules.first * groups) * length // groups
    kept = torch.arange(length) < known
    if isinstance(tokenizer.spec, Continuous):
        return kept.view(1, 1, *tokenizer.spec.grid)
    return kept[None]


# ---------------------------------------------------------------------------------------------------------------------
# The edit
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def edit(
    sampler: Sampler, canvas: Canvas, labels: list[int], rules: Rules, device: torch.device, seed: int = 0
) -> Edited:
    """One picture for each of `labels`; picture i depends on the seed, its label and i, not on the others.

    device: the sampler's.
    """
    tokenizer, task = sampler.tokenizer, sampler.task
    require_editing(sampler.generator)
    options = {name: value for name, value in task.sample_options.items() if name != "shared"}
    draws = Draws(hash64(seed, "samples"), torch.arange(len(labels), device=device))
    mask, placed = kept_cells(tokenizer, canvas.masked, rules)
    with bf16_products(device, sampler.bf16):
        photo = to_model_range(canvas.photo[None]).to(device)
        kept = Kept(tokenizer.encode(photo), mask.to(device), heed_of(sampler.generator, rules, mask))
        chosen = torch.tensor(labels, device=device)
        latents = draw_latents(sampler.generator, chosen, draws, task.guidance, kept=kept, **options)
        decoded = tokenizer.decode(latents, draws.fork("decode")).float()
    drawn = finite_uint8(decoded, "nearest", range(len(labels))).cpu()
    pictures = torch.where(canvas.masked, drawn, canvas.photo)
    what = "latents" if latents.is_floating_point() else "codes" if placed else "codes, the first ones"
    facts = [measure(canvas, *pair) for pair in zip(drawn, pictures)]
    return Edited(drawn, pictures, f"{int(mask.sum()):,} of {mask.numel():,} {what}", facts)


def require_editing(generator: Generator) -> None:
    """UserError for one whose `sample` cannot keep a part."""
    if "kept" not in inspect.signature(generator.sample).parameters:
        raise UserError(
            f"{type(generator).__name__} cannot edit: its `sample` does not take `kept`, the latents to leave as they are "
            "(core/specs.py: Kept)."
        )


def heed_of(generator: Generator, rules: Rules, mask: Tensor) -> float:
    """core.specs.Kept.heed of an edit; 1, the cheapest, where `mask` keeps nothing."""
    if rules.heed is not None and generator.usual_heed is None:
        raise UserError(
            f"--heed {rules.heed:g} is for generators that draw codes one after another, which {type(generator).__name__} "
            "does not: leave it out."
        )
    wanted = generator.usual_heed if rules.heed is None else rules.heed
    return 1.0 if wanted is None or not mask.any() else wanted


def measure(canvas: Canvas, drawn: Tensor, picture: Tensor) -> dict[str, float]:
    """Of one picture (3, S, S) uint8, as decoded and with the photo put back.

    outside_psnr: of what was decoded outside the mask, in dB; no limit. seam: mean absolute step between two neighbours of
    which the mask has one, in grey levels; inside: the same where it has both. Numbers without pixels are left out.
    """
    facts: dict[str, float] = {}
    outside = (drawn.double() - canvas.photo.double())[:, ~canvas.masked]
    if outside.numel():
        error = float((outside / 255).square().mean())
        facts["outside_psnr"] = float("inf") if error == 0 else -10 * float(torch.tensor(error).log10())
    values, masked = picture.double(), canvas.masked.int()
    steps = [(values[..., 1:] - values[..., :-1]).abs().mean(0), (values[:, 1:] - values[:, :-1]).abs().mean(0)]
    ends = [masked[:, 1:] + masked[:, :-1], masked[1:] + masked[:-1]]
    for name, count in (("seam", 1), ("inside", 2)):
        chosen = torch.cat([step[end == count] for step, end in zip(steps, ends)])
        if chosen.numel():
            facts[name] = float(chosen.mean())
    return facts


def remarks(sampler: Sampler, canvas: Canvas, edited: Edited, rules: Rules) -> list[str]:
    """Sentences about what was done with the mask, and what the model's order makes of it."""
    mask, placed = kept_cells(sampler.tokenizer, canvas.masked, rules)
    answer = list(canvas.notes)
    if canvas.masked.all():
        return [
            *answer,
            "The mask covers everything: this is a new picture of the class, nothing of the photo is kept.",
        ]
    if not placed:
        answer.append(
            "These codes have no places in the picture: the photo's first ones give the layout, and the mask alone says "
            "which pixels come from where (--first SHARE: how many)."
        )
    elif not mask.any():
        answer.append(
            "The mask touches every cell: the new part does not know the photo. A smaller mask would leave codes."
        )
    heeds = sampler.generator.heeds()
    return [*answer, heeds] if heeds and mask.any() else answer


def into_photo(photo: Image.Image, mask: Image.Image, drawn: Tensor) -> Image.Image:
    """The photo in its own size with what was drawn, (3, S, S) uint8, where the mask is white, exactly itself elsewhere."""
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    patch = Image.fromarray(drawn.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
    white = binary(mask)
    if mask.size == tuple(drawn.shape[1:]) and mask.size != photo.size:
        white = white.resize((side, side), Image.Resampling.NEAREST)
    else:
        white = white.resize(photo.size, Image.Resampling.NEAREST).crop((left, top, left + side, top + side))
    whole = photo.copy()
    whole.paste(patch, (left, top), white)
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Request:
    """What to edit; the options of scripts/edit.py.

    Attributes:
        photo, mask: files; no mask with `outpaint`, see `outpainting`.
        label: "207" or "tree frog", or several: picture i shows label i modulo their number.
        out: a PNG.
        num: pictures; None: one per label.
        full: also the photo in its own size.
    """

    photo: str
    label: str
    out: str
    mask: str | None = None
    num: int | None = None
    outpaint: float | None = None
    full: bool = False

    @property
    def place(self) -> Path:
        return Path(self.out)

    def check(self) -> None:
        """What can be told without a model."""
        if (self.mask is None) == (self.outpaint is None):
            raise UserError(
                "say what is to change: --mask M.PNG (white), or --outpaint SHARE for what is around the photo."
            )
        if self.full and self.mask is None:
            raise UserError("--full puts the new part into the photo; with --outpaint it lies around it.")
        if self.num is not None and not 1 <= self.num <= MOST:
            raise UserError(f"--num {self.num}: give 1 or more, at most {MOST:,}.")
        if self.place.suffix.lower() != ".png":
            raise UserError(f"--out {self.out}: choose a name that ends in .png")
        if self.place.with_suffix(".json").exists() or self.place.exists():
            raise UserError(f"{self.place} is there already. Choose another --out, or remove it.")


def run(sampler: Sampler, request: Request, rules: Rules, device: torch.device) -> None:
    """Edit, write, say what was done."""
    named = [request.photo] if request.mask is None else [request.photo, request.mask]
    photo, *masks = (picture for _, picture in read_files(named, upright=True))
    size = sampler.image_size
    if request.outpaint is None:
        canvas = inpainting(photo, masks[0], size)
    else:
        canvas = outpainting(photo, request.outpaint, size)
    chosen = parse_labels(request.label, sampler.num_classes, sampler.class_names, "--label")
    labels = [chosen[i % len(chosen)] for i in range(request.num or len(chosen))]
    if len(labels) > MOST:
        raise UserError(f"--label names {len(labels):,} pictures, which are too many: at most {MOST:,}.")
    edited = edit(sampler, canvas, labels, rules, device, sampler.config.seed)
    about = {
        **sampler.facts,
        **{f"sample.{key}": value for key, value in sampler.config.sample.facts().items()},
        "seed": sampler.config.seed,
        "photo": request.photo,
        "mask": request.mask,
        "outpaint": request.outpaint,
        "rules": asdict(rules),
    }
    if request.full:
        for path, drawn in zip(places(request.place, labels), edited.drawn):
            with replacing(path.with_name(f"{path.stem}_full.png")) as temporary:
                into_photo(photo, masks[0], drawn).save(temporary, format="PNG")
    paths = write(canvas, edited, labels, about, request.place)
    share = 100 * float(canvas.masked.float().mean())
    print(
        f"{request.photo}, {photo.width} x {photo.height}, seen as {size} x {size}: {share:.0f} % of it is drawn anew, "
        f"{edited.kept} are kept"
    )
    for path, facts in zip(paths, edited.facts):
        print(f"{path}: {line(facts)}")
    for remark in remarks(sampler, canvas, edited, rules):
        print(remark)
    print(
        f"photo, mask, as decoded, with the photo put back: {request.place.with_name(request.place.stem + '_panel.png')}"
    )


def line(facts: dict[str, float]) -> str:
    """The measurements of a picture in words."""
    words = []
    if "outside_psnr" in facts:
        words.append(
            f"outside the mask {facts['outside_psnr']:.2f} dB before the photo is put back, equal to it afterwards"
        )
    if "seam" in facts:
        inside = f", {facts['inside']:.1f} inside" if "inside" in facts else ""
        words.append(f"step across the border {facts['seam']:.1f} grey levels{inside}")
    return "; ".join(words) or "nothing of the photo is left to compare with"


def panel(canvas: Canvas, edited: Edited) -> Tensor:
    """(3, H, W) uint8: a row for each picture: photo, photo with the mask in grey, as decoded, with the photo put back."""
    grey = canvas.photo.new_tensor(WHITE)
    hidden = torch.where(canvas.masked, grey, canvas.photo)
    rows = [part for pair in zip(edited.drawn, edited.pictures) for part in (canvas.photo, hidden, pair[0], pair[1])]
    return grid(torch.stack(rows), columns=4)


def places(out: Path, labels: list[int]) -> list[Path]:
    """Of the pictures: OUT itself, or OUT with the number and label of each."""
    if len(labels) == 1:
        return [out]
    return [out.with_name(f"{out.stem}_{i:03d}_{n}.png") for i, n in enumerate(labels)]


def write(canvas: Canvas, edited: Edited, labels: list[int], about: dict[str, Any], out: Path) -> list[Path]:
    """The pictures at their `places`; a panel and a JSON file beside them."""
    paths = places(out, labels)
    save_png(panel(canvas, edited), out.with_name(f"{out.stem}_panel.png"))
    for path, picture in zip(paths, edited.pictures):
        if path == paths[-1]:
            finishing()  # a picture that is there is not replaced
        save_png(picture, path)
    table = [{"file": path.name, "label": n, **facts} for path, n, facts in zip(paths, labels, edited.facts)]
    write_json(out.with_suffix(".json"), {**about, "kept": edited.kept, "pictures": table})
    return paths
