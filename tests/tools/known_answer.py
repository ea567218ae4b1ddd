#!/usr/bin/env python3
"""Check the whole evaluator against published numbers, with the real files (2.5 GB of samples, 2 GB of reference).

    python -m tests.tools.known_answer data/fid_stats/admnet_guided_upsampled_imagenet256.npz [VIRTUAL_imagenet256_labeled.npz]

guided-diffusion publishes these samples with the numbers that its TensorFlow evaluator gives them. Ours must agree
within the limits below (different convolution kernels move FID by about 1e-3; the published precision and recall are
in half precision, which moves them by up to 0.003). Exit code 0: all agree; 1: one does not. A few minutes on a GPU,
hours on a CPU.
"""

from pathlib import Path

from core import cli
from run.reproduce import rows

ROW = rows(["adm_known_answer"])[0]  # of configs/reproduce.toml, which run_reproduce.sh evaluation measures too
# metric -> (published, how far ours may be off)
PUBLISHED = {f"{metric}_50k": (float(value), ROW.limits[metric]) for metric, value in ROW.published.items()}


def compare(found: dict[str, float]) -> list[tuple[str, float, float, float, bool]]:
    """(metric, ours, published, limit, whether it agrees) per metric; a missing one does not."""
    rows = []
    for name, (published, limit) in PUBLISHED.items():
        ours = found.get(name, float("nan"))
        rows.append((name, ours, published, limit, abs(ours - published) <= limit))
    return rows


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2 or "--help" in arguments:
        print(__doc__)
        return 0 if "--help" in arguments else 2
    from core.files import read_json
    from scripts import evaluate_generator

    samples, reference = arguments[0], arguments[1] if len(arguments) == 2 else "VIRTUAL_imagenet256_labeled.npz"
    folder = Path("work_dirs/eval/known_answer")
    evaluate_generator.main(
        [samples, "eval.protocol=adm", "eval.network=inception", f"eval.reference={reference}", "--out", str(folder)]
    )
    rows = compare({k: v["value"] for k, v in read_json(folder / "metrics.json")["metrics"].items()})
    for name, ours, published, limit, agrees in rows:
        verdict = "ok" if agrees else "DIFFERS"
        print(f"{name:<14} ours {ours:10.5f}   published {published:10.5f}   limit {limit:.3f}   {verdict}")
    return 0 if all(row[4] for row in rows) else 1


if __name__ == "__main__":
    cli.run(main)
