"""Kinds of the evaluation fixtures that record nothing but what we compute.

The "frechet" kind also records how the reference implementations reacted to singular matrices; its distances are
compared in tests/test_evaluation_metrics.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.frechet import frechet_from_moments
from tests.parity import Case, kind


@kind("evaluation", "frechet_cached")
def frechet_cached(case: Case) -> dict[str, Tensor]:
    moments = (case.inputs[name] for name in ("mu1", "sigma1", "mu2", "sigma2"))
    distance = torch.tensor(frechet_from_moments(*moments), dtype=torch.float64)
    return {"fid_adm": distance, "fid_torch_fidelity": distance}
