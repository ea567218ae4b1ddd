#!/usr/bin/env python3
"""Time our evaluation beside torch-fidelity's: the same random pictures, the same network, one run.

    python -m tests.tools.benchmark_evaluation [--num 64] [--features 10000] [--batch 16] [--network FILE] [--markdown FILE]

Four rows: features of the Inception network; statistics of 2,048-wide features; the Frechet distance between two such
statistics; and from pictures in memory to the distance, where torch-fidelity reads PNGs that have to be written first.
Each side runs --repeats times and its best time counts. Without --network the weights are random (nothing here needs
their values); the results of both sides are compared all the same.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import cli


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """(least seconds of `repeats` runs, result); a GPU is waited for."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    seconds = []
    for _ in range(repeats):
        wait()
        begun = time.perf_counter()
        result = work()
        wait()
        seconds.append(time.perf_counter() - begun)
    return min(seconds), result


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmark_evaluation.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--num", type=int, default=64, help="pictures through the network (default 64)")
    parser.add_argument("--size", type=int, default=256, help="their side in pixels (default 256)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--features", type=int, default=10_000, help="rows of the Frechet comparison (default 10000)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the best one counts (default 3)")
    parser.add_argument("--network", help="Inception weights; default: random ones")
    parser.add_argument("--markdown", help="append the rows to this file")
    options = parser.parse_args(arguments)

    from core.errors import UserError

    if min(options.num, options.features) < 2 or min(options.batch, options.repeats) < 1:
        raise UserError("--num and --features take 2 or more, --batch and --repeats 1 or more.")
    rows = compare(options)
    print(table(rows))
    if options.markdown:
        with open(options.markdown, "a", encoding="utf-8") as file:
            file.write("\n" + table(rows) + "\n")
    return 0


def compare(options: argparse.Namespace) -> list[list[str]]:
    """Cells of the rows."""
    import torch

    from evaluation.distances import Moments, frechet_distance, frechet_from_moments
    from evaluation.networks import Inception, InceptionV3
    from run.benchmark import device_name

    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    except ImportError:
        from core.errors import UserError

        raise UserError("this comparison needs torch-fidelity: pip install torch-fidelity") from None

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    shape = (2, options.num, 3, options.size, options.size)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(options.network or Path(folder) / "weights.pth")
        if not options.network:
            torch.manual_seed(0)
            torch.save(InceptionV3().state_dict(), file)
        ours = Inception(file, taps=("pool",)).to(device)
        theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
        theirs = theirs.to(device).eval()
        parts = pictures[0].split(options.batch)
        ours(parts[0].to(device)), theirs(parts[0].to(device))  # both have allocated what they keep
        repeats = options.repeats
        our_seconds, our_features = timed(lambda: torch.cat([ours(p.to(device))["pool"] for p in parts]), repeats)
        their_seconds, their_features = timed(lambda: torch.cat([theirs(p.to(device))[0] for p in parts]), repeats)
        error = float((our_features - their_features).abs().max() / their_features.abs().max())
        rows = [row("features", options.num, our_seconds, their_seconds, f"{error:.1e}", options.num)]

        sets = [torch.randn(options.features, 2048, generator=generator).mul_(0.5 + i).relu_() for i in range(2)]
        our_seconds, our_moments = timed(
            lambda: [(m.mean, m.covariance) for m in (Moments.of(s.to(device)) for s in sets)], repeats
        )
        their_seconds, their_moments = timed(lambda: [fid_features_to_statistics(s) for s in sets], repeats)
        error = float((our_moments[0][1].cpu() - torch.from_numpy(their_moments[0]["sigma"])).abs().max())
        rows.append(
            row(
                "statistics of two sets, 2,048 wide",
                options.features,
                our_seconds,
                their_seconds,
                f"{error / float(abs(their_moments[0]['sigma']).max()):.1e}",
                None,
            )
        )

        our_seconds, our_value = timed(lambda: frechet_from_moments(*our_moments[0], *our_moments[1]), repeats)
        their_seconds, their_value = timed(lambda: fid_statistics_to_metric(*their_moments, False), repeats)
        their_value = float(their_value["frechet_inception_distance"])
        rows.append(
            row(
                "distance of two statistics, 2,048 wide",
                options.features,
                our_seconds,
                their_seconds,
                f"{abs(our_value - their_value) / abs(their_value):.1e}",
                None,
            )
        )

        def in_memory() -> float:
            moments = [Moments(2048, device=device) for _ in range(2)]
            for which, side in enumerate(pictures):
                for part in side.split(options.batch):
                    moments[which].update(ours(part.to(device))["pool"])
            return frechet_distance(*moments)

        def through_files() -> float:
            from core.images import save_png

            for which, side in enumerate(pictures):
                for i, picture in enumerate(side):
                    save_png(picture, Path(folder) / str(which) / f"{i:06d}.png")
            return torch_fidelity.calculate_metrics(
                input1=f"{folder}/0",
                input2=f"{folder}/1",
                fid=True,
                cuda=device.type == "cuda",
                verbose=False,
                batch_size=options.batch,
                cache=False,
                feature_extractor_weights_path=str(file),
                save_cpu_ram=False,
            )["frechet_inception_distance"]

        our_seconds, our_value = timed(in_memory, repeats)
        their_seconds, their_value = timed(through_files, repeats)
        rows.append(
            row(
                "pictures to distance, theirs through PNGs",
                2 * options.num,
                our_seconds,
                their_seconds,
                f"{abs(our_value - their_value) / max(abs(their_value), 1e-9):.1e}",
                2 * options.num,
            )
        )
    where = f"{device_name(device)}, torch {torch.__version__.split('+')[0]}, fp32"
    return [[*cells, where] for cells in rows]


def row(what: str, count: int, ours: float, theirs: float, difference: str, pictures: int | None) -> list[str]:
    speed = f" ({pictures / ours:.1f} img/s)" if pictures else ""
    return [what, f"{count:,}", f"{ours:.2f} s{speed}", f"{theirs:.2f} s", f"{theirs / ours:.1f}x", difference]


def table(rows: list[list[str]]) -> str:
    head = ["step", "count", "ours", "torch-fidelity", "ratio", "relative difference", "on"]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    cli.run(main)
