#!/usr/bin/env python3
"""What the training loop costs beside the network: python -m tests.tools.benchmark_loop [--steps 300] [--tensors 300]

A task that computes next to nothing goes through the trainer, logging every step to its files. The same network is trained by
the shortest loop there is (forward, backward, clipping, AdamW) in turn with it; what the trainer needs beyond that
is the harness: draws, schedules, guards, averages, log, signals. Medians count; on a CPU, of the
process's own time.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core import cli

TOY = Path(__file__).resolve().parents[2] / "configs" / "toy" / "rectok_tokenizer.yaml"
STEP = 0.5  # seconds that a step of a published recipe may take


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.tools.benchmark_loop", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tensors", type=int, default=300, help="parameters of the network (default 300)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    ours, bare = measure(options.steps, options.tensors, options.device)
    harness = ours - bare
    print(
        f"{options.tensors} tensors, every step logged: {1000 * ours:.2f} ms a step, {1000 * bare:.2f} ms of it forward, "
        f"backward, clipping and AdamW; the harness takes {1000 * harness:.2f} ms, {100 * harness / STEP:.2f} % of a step of {STEP} s"
    )
    return 0


def measure(steps: int, tensors: int, device_name: str) -> tuple[float, float]:
    """Median seconds of a step of the trainer, and of the shortest loop."""
    import torch
    from torch import nn

    from core import dist
    from core.specs import Batch, Loss, Phase
    from core.train.optim import make_adamw
    from core.train.run import RunFolder
    from core.train.trainer import Trainer
    from data.loader import split
    from run.floors import synchronize
    from run.load import load_config

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.ParameterList(nn.Parameter(torch.randn(16, 16)) for _ in range(tensors))

    def loss_of(parameters: Any) -> torch.Tensor:
        return torch.stack([p.square().mean() for p in parameters]).mean()

    class Idle:
        """A task (core.specs.Task) whose networks cost nothing."""

        primary = "tokenizer"

        def __init__(self):
            self.network = network()

        def networks(self) -> dict[str, nn.Module]:
            return {"tokenizer": self.network}

        def frozen(self) -> dict[str, nn.Module]:
            return {}

        def constants(self) -> dict[str, torch.Tensor]:
            return {}

        def looks_at_batches(self) -> bool:
            return False

        def charts(self) -> list:
            return []

        def phases(self, nets: Any, batch: Batch, draws: Any, progress: Any) -> Iterator[Phase]:
            loss = loss_of(nets["tokenizer"])
            yield Phase("tokenizer", Loss(loss, {name: loss.detach() for name in ("total", "a", "b", "c")}))

    device = dist.pick_device(device_name)
    plain = network().to(device)
    # on a CPU the time that this process computes: other programs may use the machine too
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}

    def shortest() -> None:
        loss_of(plain).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def batches(seen: int) -> Iterator[Batch]:
        """One picture per step; between the steps, the other loop."""
        places = torch.zeros(1, dtype=torch.int64)
        batch = Batch(places, places, images=torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
        while True:
            synchronize(device)
            started = clock()
            shortest()
            synchronize(device)
            middle = clock()
            yield batch
            synchronize(device)
            seconds["bare"].append(middle - started)
            seconds["ours"].append(clock() - middle)

    with tempfile.TemporaryDirectory() as folder:
        settings = [f"work_dir={folder}", f"train.duration={steps + 1}step", "train.global_batch=1", "train.ema=[]"]
        settings += ["train.log_every=1step", "train.preview_every=never", "train.checkpoint_every=never"]
        settings += ["train.optimizer.grad_clip=1.0", f"train.device={device.type}"]
        config = load_config(str(TOY), settings)
        optimizer = make_adamw(plain, config.train.optimizer)
        run = RunFolder(config, True)
        run.open({})
        task: Any = Idle()
        trainer = Trainer(
            task,
            config,
            batches=batches,
            split=split,
            images_per_epoch=1000,
            data_fingerprint="none",
            run=run,
            world=dist.World(0, 1, 0, device),
        )
        try:
            trainer.fit()
        finally:
            run.close()
    ours, bare = (statistics.median(values[len(values) // 10 :]) for values in seconds.values())  # not the first ones
    return ours, bare


if __name__ == "__main__":
    cli.run(main)
