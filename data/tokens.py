"""Stored tokens: what a frozen tokenizer makes of every view of every picture, to train generators without pictures.

A token store is a cache (data/cache.py) with one array: `codes.npy`, (samples, views, length, branches) uint16 (uint32
where the codebook is larger), or `latents.npy` for a tokenizer of real vectors. Its description also holds the kind of
latents, the fingerprint of the tokenizer's weights and the class names, so that a run from `tokens://DIR` is checked
against its tokenizer before it starts, and needs neither pictures nor an encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from core.errors import UserError, plainly
from core.files import expanded
from core.specs import Codes, Continuous, DataSource, LatentSpec, MultiScale, Sample
from data import cache
from data.cache import CHUNK, FeatureCache, Pass, Plan
from data.transforms import Transform

KIND = "tokens"
KINDS: dict[str, type] = {"continuous": Continuous, "codes": Codes, "multiscale": MultiScale}
CHECKED_AT_START = 1 << 22  # codes that `check_range` looks at: all of a small store, a sample of a large one


def spec_to_json(spec: LatentSpec) -> dict[str, Any]:
    """A latent spec as JSON."""
    kind = next(name for name, cls in KINDS.items() if type(spec) is cls)
    fields = {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(spec).items()
    }
    if not fields.get("places", True):  # stores of before there were any do not say so
        del fields["places"]
    return {"kind": kind, **fields}


def spec_from_json(data: dict[str, Any]) -> LatentSpec:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return KINDS[fields.pop("kind")](**fields)


def array_of(spec: LatentSpec) -> str:
    """Name of the array that holds such latents."""
    return "latents" if isinstance(spec, Continuous) else "codes"


def storage_of(spec: LatentSpec) -> dict[str, str]:
    """How to store such latents: the smallest integers that hold the codebook; real vectors as they come."""
    if isinstance(spec, Continuous):
        return {}
    return {"codes": "uint16" if spec.vocab <= 1 << 16 else "uint32"}


def shape_of(spec: Codes | MultiScale) -> tuple[int, int]:
    """(length, branches) of one view."""
    flat = spec.flatten() if isinstance(spec, MultiScale) else spec
    return flat.length, flat.branches


def check_codes(spec: Codes | MultiScale, codes: np.ndarray, place: str) -> None:
    """UserError unless `codes` (..., length, branches) have that shape and lie in [0, vocab)."""
    if codes.shape[-2:] != shape_of(spec):
        raise UserError(
            f"{place}: codes have shape {list(codes.shape[-2:])}, the tokenizer makes {spec} "
            f"({list(shape_of(spec))}). Use tokens of this tokenizer."
        )
    if codes.size and not (codes.min() >= 0 and codes.max() < spec.vocab):
        wrong = codes.min() if codes.min() < 0 else codes.max()
        raise UserError(
            f"{place}: code {wrong} does not exist, the codebook has {spec.vocab} entries (0 to "
            f"{spec.vocab - 1}). The tokens are damaged or of another tokenizer."
        )


def facts(spec: LatentSpec, class_names: Sequence[str]) -> dict[str, Any]:
    """What a store's description holds beyond that of any cache."""
    return {"kind": KIND, "spec": spec_to_json(spec), "classes": list(class_names)}


class TokenStore(FeatureCache, DataSource):
    """A finished store; also the data source of a run from `tokens://DIR`, without pictures.

    Args: as FeatureCache. Opening reads no tokens, so its size does not matter.
    """

    def __init__(
        self,
        path: str | Path,
        source: DataSource | None = None,
        transform: Transform | None = None,
        fingerprint: str | None = None,
        encoding: str | None = None,
    ):
        if not Path(path).is_dir():
            raise UserError(f"there is no token store {path}. Make it with run_pretokenize.sh.")
        super().__init__(path, source, transform, fingerprint, encoding)
        try:
            about = self.description["facts"]
            if about.get("kind") != KIND:
                raise UserError(
                    f"{path} holds {', '.join(self.arrays)}, not tokens. Give a folder made by run_pretokenize.sh."
                )
            self.spec, self.class_names = spec_from_json(about["spec"]), list(about["classes"])
            self.transform = Transform(**self.description["transform"])
            self.tokenizer: str = self.description["producer"]
            stored = self.arrays[array_of(self.spec)]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: its description is not complete ({plainly(error)}). Build it again.") from error
        self.num_classes = len(self.class_names)
        if self.views != self.transform.views:
            raise UserError(
                f"{path} holds {self.views} views of each picture, its transform has "
                f"{self.transform.views}. Build it again."
            )
        if not isinstance(self.spec, Continuous) and tuple(stored["shape"]) != shape_of(self.spec):
            raise UserError(
                f"{path} holds codes of shape {stored['shape']}, its description promises {self.spec}. Build it again."
            )

    @property
    def labels(self) -> np.ndarray:
        """(samples,) int32, mapped."""
        return self.rows("labels")

    def fingerprint(self) -> str:
        """Of the pictures that the tokens were made from."""
        return self.source_fingerprint

    def is_of(self, pictures: DataSource) -> bool:
        """Whether the tokens were made from these pictures, as far as the store tells."""
        same_list = self.fingerprint() == pictures.fingerprint()
        return same_list and (self.file_sizes() is None or self.file_sizes() == pictures.file_sizes())

    def file_sizes(self) -> str | None:
        """Of those pictures; None for stores that were imported or made before it was noted."""
        return self.description.get("sizes")

    def __getitem__(self, index: int) -> Sample:
        raise UserError(
            f"tokens://{self.path} holds tokens, not pictures. Set data.pictures to the pictures they were made from."
        )

    def tokens(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """(B, ...) what Tokenizer.precompute returned: codes as int64."""
        return self.get(indices, views)[array_of(self.spec)]

    def check_tokenizer(self, spec: LatentSpec, fingerprint: str, image_size: int, encoding: str | None = None) -> None:
        """UserError unless the tokens are those that this tokenizer would make. `fingerprint`, `encoding`: see FeatureCache."""
        here = f"tokens://{self.path}"
        mine, theirs = ({k: v for k, v in spec_to_json(s).items() if k != "names"} for s in (self.spec, spec))
        if mine != theirs:
            differing = [
                f"{k} {mine.get(k)}, not {theirs.get(k)}" for k in {**theirs, **mine} if mine.get(k) != theirs.get(k)
            ]
            raise UserError(
                f"{here} holds {self.spec}; the tokenizer makes {spec} ({'; '.join(differing)}). "
                "Use its own tokenizer, or make the tokens again."
            )
        if not self.is_made_by(fingerprint, encoding):
            noted = "" if "encoding" in self.description else ", and the store does not note which of them encode"
            raise UserError(
                f"{here} was made by another tokenizer (weights {self.tokenizer}, this one has "
                f"{fingerprint}{noted}). Set tokenizer.weights to that one, or make the tokens again."
            )
        if self.transform.image_size != image_size:
            raise UserError(
                f"{here} was made from pictures of {self.transform.image_size} pixels, the tokenizer works "
                f"on {image_size}. Make the tokens again."
            )
        self.check_range()

    def check_range(self) -> None:
        """UserError if a code lies outside the codebook, among a few million codes spread over the store.

        Writing checked every one of them; this finds files that were damaged or replaced since. `verify` reads all.
        """
        if isinstance(self.spec, Continuous):
            return
        codes = self.rows("codes")
        size = codes[0].size
        count = min(self.samples, max(64, CHECKED_AT_START // size))
        for index in range(0, self.samples, self.samples // count):
            # read, not mapped: touching a page of the map brings its neighbours along
            start = codes.offset + index * size * codes.itemsize
            row = np.fromfile(self.path / "codes.npy", codes.dtype, size, offset=start)
            check_codes(self.spec, row.reshape(codes.shape[1:]), f"tokens://{self.path}, sample {index}")

    def verify(self) -> None:
        """Read everything: digests and range."""
        super().verify()
        if not isinstance(self.spec, Continuous):
            for start in range(0, self.samples, 4096):
                check_codes(
                    self.spec,
                    self.rows("codes")[start : start + 4096],
                    f"tokens://{self.path}, samples {start} to {min(start + 4096, self.samples) - 1}",
                )


def open_tokens(path: str, split: str | None = None, options: dict[str, str] | None = None) -> TokenStore:
    """The opener of tokens://PATH."""
    return TokenStore(expanded(path))


def plan(
    samples: int,
    views: int,
    source: str,
    transform: Transform,
    spec: LatentSpec,
    fingerprint: str,
    class_names: Sequence[str],
    chunk: int = CHUNK,
    encoding: str | None = None,
) -> Plan:
    """Of a store whose tokens come from elsewhere (data/token_files.py); UserError if the views are others."""
    if transform.views != views:
        raise UserError(
            f'{views} views of each picture do not fit data.crop="{transform.crop}", which has '
            f"{transform.views or 'no fixed number'}."
        )
    about = facts(spec, class_names)
    return Plan(samples, views, source, transform.describe(), fingerprint, about, chunk, encoding=encoding)


def build(
    path: str | Path,
    source: DataSource,
    transform: Transform,
    spec: LatentSpec,
    precompute: Callable[[Tensor], Tensor],
    fingerprint: str,
    how: Pass | None = None,
    encoding: str | None = None,
) -> TokenStore:
    """Make a store, or open the one at `path` if it was made from the same things; a killed build goes on. Collective.

    Args:
        precompute: (B, 3, H, W) uint8 images on the CPU -> (B, ...) as Tokenizer.precompute.
        fingerprint, encoding: of the tokenizer, see FeatureCache.
        how: None: on one rank, as it stands.
    """
    name = array_of(spec)

    def producer(images: Tensor) -> dict[str, Tensor]:
        tokens = precompute(images)
        if name == "codes":
            check_codes(spec, tokens.cpu().numpy(), "the tokenizer")
        return {name: tokens}

    about = facts(spec, source.class_names)
    cache.build(path, source, transform, producer, fingerprint, how, storage_of(spec), about, encoding)
    return TokenStore(path, source, transform, fingerprint, encoding)


def rows_of(codes: np.ndarray, start: int, spec: Codes | MultiScale) -> dict[str, np.ndarray]:
    """(count, views, length, branches) integers, of the samples from `start` on, as a Builder takes them."""
    check_codes(spec, codes, f"samples {start} to {start + len(codes) - 1}")
    return {"codes": codes.astype(storage_of(spec)["codes"])}
