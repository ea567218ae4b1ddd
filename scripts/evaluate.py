#!/usr/bin/env python3
"""Measure how well a tokenizer reconstructs: python scripts/evaluate.py WEIGHTS [URL] [--num N] [--out FOLDER]

WEIGHTS is a run folder, a checkpoint, a released file or hf://owner/repo/file; URL says which pictures (default
folder://data/imagenet/val). Prints PSNR, SSIM and a Frechet distance on the offline feature network, and writes
metrics.json and reconstructions.png to FOLDER (default work_dirs/eval_<name>).
"""

import _root  # noqa: F401
import argparse
from pathlib import Path

from core import cli


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("url", nargs="?", default="folder://data/imagenet/val")
    parser.add_argument("--num", type=int, default=0, help="pictures; 0: all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", default=None)
    parser.add_argument("--check", action="store_true", help="only look for mistakes")
    options = parser.parse_args(arguments)

    from core import hub
    from core.errors import UserError
    from data.sources import open_source

    if options.num < 0 or options.batch < 1:
        raise UserError(f"--num {options.num} and --batch {options.batch}: give --num 0 or more and --batch 1 or more")
    source = open_source(options.url, "val")
    path = hub.resolve(options.weights)
    if options.check:
        return 0

    import assemble
    import measure
    from core import dist, images as image_tools
    from core.config import EvalConfig
    from evaluation.metrics_json import write_metrics

    device = dist.pick_device("auto")
    tokenizer, fingerprint = assemble.load_tokenizer({"weights": str(path)})
    tokenizer.to(device)
    net = measure.feature_net(device)
    metrics = measure.reconstruction(tokenizer, source, tokenizer.image_size,
                                     EvalConfig(num_images=options.num, batch=options.batch), device, net)
    folder = Path(options.out or f"work_dirs/eval_{Path(options.weights.rstrip('/')).stem}")
    image_tools.save_png(measure.reconstruction_grid(tokenizer, source, device), folder / "reconstructions.png")
    write_metrics(folder / "metrics.json", metrics, {
        "count": metrics["num_pictures"], "net": net.name, "reference_fingerprint": source.fingerprint(), "seed": 0,
        "tokenizer_fingerprint": fingerprint, "weights": options.weights})
    for name, value in metrics.items():
        print(f"{name:<40} {value:.4f}" if isinstance(value, float) else f"{name:<40} {value}")
    print(f"written to {folder}")
    return 0


if __name__ == "__main__":
    cli.run(main)
