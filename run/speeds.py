"""How fast tokenizers encode and decode beside each other, for run_compare.sh."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch

from core.devices import peak_memory
from core.files import read_json, write_json
from core.images import to_model_range
from core.rng import Draws
from core.specs import Tokenizer
from evaluation.report import NOTHING
from run.benchmark import Effort, device_name, timed

BATCHES = (1, 32)


def noted_speeds(path: Path, tokenizer: Tokenizer, device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Those of an earlier run of the same command on such a device, else measured now."""
    here = {"device": device_name(device), "seconds": options.seconds}
    before = {} if options.again else read_json(path, {})
    if before.get("measured") != here:
        before = {"measured": here, "speeds": speeds(tokenizer, device, options.seconds)}
        write_json(path, before)
    return dict(sorted(before["speeds"].items()))


@torch.no_grad()
def speeds(tokenizer: Tokenizer, device: torch.device, seconds: float) -> dict[str, Any]:
    """Pictures per second, latency in ms and memory in bytes (GPU only) of encoding and decoding, in fp32 and eager."""
    figures: dict[str, Any] = {}
    for batch in BATCHES if seconds else ():
        images = to_model_range(
            torch.full((batch, 3, tokenizer.image_size, tokenizer.image_size), 128, dtype=torch.uint8)
        )
        images = images.to(device)
        draws = Draws(0, torch.arange(batch, device=device))
        latents = tokenizer.encode(images)
        for what, call in (
            ("encode", functools.partial(tokenizer.encode, images)),
            ("decode", functools.partial(tokenizer.decode, latents, draws)),
        ):
            time = timed(call, Effort(device, 2, 10, seconds)).median
            figures[f"{what}_img_per_s_batch{batch}"] = batch / time
            figures[f"{what}_ms_batch{batch}"] = 1000 * time
            figures[f"{what}_memory_batch{batch}"] = float(peak_memory(device)) if device.type == "cuda" else None
    return figures


def speed_rows(of: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """A row per name, direction and batch; `of`: name -> speeds."""
    rows = []
    for name, figures in of.items():
        for batch in BATCHES if figures else ():
            for what in ("encode", "decode"):
                memory = figures[f"{what}_memory_batch{batch}"]
                rows.append(
                    [
                        name,
                        what,
                        batch,
                        f"{figures[f'{what}_img_per_s_batch{batch}']:.4g}",
                        f"{figures[f'{what}_ms_batch{batch}']:.4g}",
                        f"{memory / 1e9:.3g}" if memory else NOTHING,
                    ]
                )
    return rows
