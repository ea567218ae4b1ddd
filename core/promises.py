"""Whether a tokenizer or a generator keeps what core/specs.py promises, in a sentence that names what to change.

declared            right after it was built: what every other part will ask it for
latents_as_promised, recon_as_promised, loss_as_promised    of what it returned, in every step; sizes alone, so nothing waits for the device
round_trip          all methods of a tokenizer on pictures, also on fake tensors: --check
values_kept, samples_kept    what only numbers tell; tests/run/test_mix.py asks them of every network at toy size
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.rng import Draws
from core.specs import NO_CODE, Codes, Continuous, Generator, Guidance, LatentSpec, Loss, MultiScale, Recon, Tokenizer

SPECS = (Continuous, Codes, MultiScale)


def shape_of(spec: LatentSpec) -> tuple[int, ...]:
    """Of one picture's latents."""
    return (spec.channels, *spec.grid) if isinstance(spec, Continuous) else (spec.length, spec.branches)


def declared(network: nn.Module) -> None:
    """UserError with all that a new network lacks of what others read from it."""
    problems: list[str] = []
    name = type(network).__name__
    if isinstance(network, Tokenizer):
        problems += _tokenizer_lacks(network)
    elif isinstance(network, Generator):
        if getattr(network, "models", None) not in SPECS:
            problems.append("`models` is the kind of latents that it learns: Continuous, Codes or MultiScale")
        options = list(inspect.signature(network.sample).parameters)
        if options[:3] != ["labels", "draws", "guidance"]:
            problems.append(f"`sample` takes labels, draws, guidance, then its options, not {', '.join(options)}")
    if problems:
        raise UserError(f"{name} does not keep what core/specs.py promises: {'; '.join(problems)}.")


def _tokenizer_lacks(tokenizer: Tokenizer) -> list[str]:
    problems = []
    spec, size = getattr(tokenizer, "spec", None), getattr(tokenizer, "image_size", None)
    if not isinstance(size, int) or size < 1:
        problems.append("`self.image_size` is the side of its pictures in pixels")
    if not isinstance(spec, SPECS):
        problems.append("`self.spec` says what its latents are: Continuous(...), Codes(...) or MultiScale(...)")
    elif isinstance(spec, Continuous):
        held = [getattr(tokenizer, f"latent_{part}", None) for part in ("mean", "std")]
        if any(not isinstance(h, Tensor) or h.shape != (spec.channels,) for h in held):
            problems.append(
                f"continuous latents need the buffers latent_mean and latent_std of {spec.channels} values: derive it from "
                "GaussianTokenizer (tokenizer/continuous/gaussian.py) and call keep_latent_stats() once `self.spec` is set"
            )
        if type(tokenizer).moments is Tokenizer.moments:
            problems.append("continuous latents need `moments`, on which their statistics are measured")
    elif type(tokenizer).embed is Tokenizer.embed:
        problems.append("codes need `embed`, the rows of the codebook behind them")
    return problems


def latents_as_promised(network: nn.Module, spec: LatentSpec, latents: Any, method: str) -> None:
    """UserError where what `method` returned is not as `spec` says."""
    wanted = shape_of(spec)
    if isinstance(latents, Tensor) and tuple(latents.shape[1:]) == wanted:
        if latents.is_floating_point() == isinstance(spec, Continuous):
            return
        found = str(latents.dtype).removeprefix("torch.")
        wrong = f"{found} numbers; {'real numbers' if isinstance(spec, Continuous) else 'codes are int64'}"
    else:
        found = f"shape {_shown(latents.shape)}" if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
        wrong = f"{found}; {_shown(('B', *wanted))}"
    raise UserError(f"{type(network).__name__}.{method} gives {wrong} would be the {spec} of the tokenizer's `spec`.")


def _shown(shape: Any) -> str:
    return f"({', '.join(map(str, shape))})"


def loss_as_promised(generator: Generator, loss: Any) -> None:
    """UserError where what `forward` returned cannot be minimised."""
    name = type(generator).__name__
    if not isinstance(loss, Loss):
        raise UserError(f"{name}.forward gives a {type(loss).__name__}, not a core.specs.Loss(total, logs).")
    if loss.total.numel() != 1:
        raise UserError(
            f"{name}.forward: the total of its Loss has shape {_shown(loss.total.shape)}; it is the mean over the batch."
        )


def recon_as_promised(tokenizer: Tokenizer, images: Tensor, recon: Any) -> None:
    """UserError where what `forward` returned cannot be held against `images`."""
    name = type(tokenizer).__name__
    if not isinstance(recon, Recon):
        raise UserError(f"{name}.forward gives a {type(recon).__name__}, not a core.specs.Recon(images, terms=...).")
    if recon.images.shape != images.shape:
        raise UserError(
            f"{name}.forward rebuilds pictures of shape {_shown(images.shape)} as {_shown(recon.images.shape)}."
        )
    if missing := [term for term in tokenizer.term_names if term not in recon.terms]:
        raise UserError(
            f"{name}.forward gives no {', '.join(missing)} in Recon.terms, and `term_names` promises "
            f"{', '.join(tokenizer.term_names)}."
        )
    for term, value in recon.terms.items():
        if value.numel() != 1:
            raise UserError(
                f"{name}.forward: the term {term} has shape {_shown(value.shape)}; it is the mean over the batch."
            )


def round_trip(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) through all methods that others call, and what comes back; UserError where sizes are not as
    promised. Also for fake and meta tensors."""
    name = type(tokenizer).__name__
    stored = tokenizer.precompute(images)
    if not isinstance(stored, Tensor) or stored.shape[:1] != images.shape[:1]:
        raise UserError(f"{name}.precompute gives no tensor with a row for each picture.")
    for method, latents in (("encode", tokenizer.encode(images)), ("from_stored", tokenizer.from_stored(stored))):
        latents_as_promised(tokenizer, tokenizer.spec, latents, method)
    spec = tokenizer.spec
    if isinstance(spec, Continuous):
        _of_shape(tokenizer, "moments", tokenizer.moments(stored), (spec.length, 2 * spec.channels))
    else:
        _of_shape(tokenizer, "embed", tokenizer.embed(latents), (spec.length, spec.branches, spec.dim))
    rebuilt = tokenizer.decode(latents)
    _of_shape(tokenizer, "decode", rebuilt, images.shape[1:])
    return rebuilt


def _of_shape(network: nn.Module, method: str, value: Any, wanted: tuple[int, ...]) -> None:
    found = tuple(value.shape[1:]) if isinstance(value, Tensor) else None
    if found != tuple(wanted):
        shown = f"shape {_shown(('B', *found))}" if found is not None else f"a {type(value).__name__}"
        raise UserError(f"{type(network).__name__}.{method} gives {shown}, not {_shown(('B', *wanted))}.")


# ---------------------------------------------------------------------------------------------------------------------
# What only numbers tell
# ---------------------------------------------------------------------------------------------------------------------
def values_kept(tokenizer: Tokenizer, images: Tensor, draws: Draws) -> None:
    """UserError for a tokenizer in evaluation mode, with its latent statistics set, whose methods contradict each other, or
    that draws from torch's own generator: its runs could not be resumed. Of `images` more than one."""
    name = type(tokenizer).__name__
    round_trip(tokenizer, images)
    before = torch.get_rng_state()
    stored = tokenizer.precompute(images)
    for given in (None, draws):
        latents = tokenizer.encode(images, given)
        how = "with draws" if given else "without draws"
        if not torch.allclose(latents, tokenizer.from_stored(stored, given), atol=1e-5):
            raise UserError(f"{name}: from_stored(precompute(x)) is not encode(x), {how}.")
        if not isinstance(tokenizer.spec, Continuous) and not 0 <= int(latents.min()) <= int(latents.max()) < (
            tokenizer.spec.vocab
        ):
            raise UserError(
                f"{name}.encode gives codes from {int(latents.min())} to {int(latents.max())} of a vocabulary of "
                f"{tokenizer.spec.vocab}."
            )
    alone = tokenizer.encode(images[:1], Draws(draws.seed, draws.positions[:1], draws.step))
    if not torch.allclose(alone, tokenizer.encode(images, draws)[:1], atol=1e-3):
        raise UserError(f"{name}.encode: the latents of a picture depend on the others of its batch.")
    tokenizer.decode(tokenizer.encode(images), draws)
    recon_as_promised(tokenizer, images, tokenizer(images, draws))
    _own_draws_alone(tokenizer, before)


def samples_kept(generator: Generator, spec: LatentSpec, draws: Draws, num_classes: int, **options: Any) -> None:
    """UserError for a generator whose samples are not as `spec` says, or depend on anything but weights, label and draws.

    Args:
        draws: of more than one sample.
    """
    name, before = type(generator).__name__, torch.get_rng_state()
    labels = torch.arange(len(draws.positions)) % num_classes
    for guidance in (Guidance(), Guidance(2.0)):
        samples = generator.sample(labels, draws, guidance, **options)
        latents_as_promised(generator, spec, samples, "sample")
        if not isinstance(spec, Continuous) and not NO_CODE <= int(samples.min()) <= int(samples.max()) < spec.vocab:
            raise UserError(f"{name}.sample gives codes from {int(samples.min())} to {int(samples.max())}.")
        alone = generator.sample(labels[:1], Draws(draws.seed, draws.positions[:1], draws.step), guidance, **options)
        if not torch.allclose(alone, samples[:1], atol=1e-3):
            raise UserError(
                f"{name}.sample: a sample depends on the others of its batch, or is not drawn from `draws`."
            )
    _own_draws_alone(generator, before)


def _own_draws_alone(network: nn.Module, before: Tensor) -> None:
    if not torch.equal(before, torch.get_rng_state()):
        raise UserError(
            f"{type(network).__name__} draws from torch's own generator (torch.rand, randn_like, dropout in evaluation ...): "
            "take `draws.normal(name, shape)` or `draws.uniform(name, shape)`, or no run of it can be resumed."
        )
