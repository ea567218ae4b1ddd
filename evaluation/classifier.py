"""Linear classifier on frozen features: tells whether a sample shows the class that was asked for.

Multinomial logistic regression on standardised features with an L2 penalty, fitted by full-batch L-BFGS in float64.
The problem is convex and starts at zero, so the fit is a function of the data alone: no seed, no schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import UserError


@dataclass
class LinearClassifier:
    """logits = (x - mean) / scale @ weight + bias, all float64 on the CPU."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)
    weight: Tensor  # (D, classes)
    bias: Tensor  # (classes,)

    @property
    def num_classes(self) -> int:
        return self.bias.numel()

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, classes) float64."""
        return (features.detach().cpu().double() - self.mean) / self.scale @ self.weight + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """(N, D) -> (N,) int64, the most likely class."""
        return self.logits(features).argmax(1)


def fit(
    features: Tensor, labels: Tensor, num_classes: int, penalty: float = 0.03, max_steps: int = 200
) -> LinearClassifier:
    """Fit to (N, D) features and (N,) labels.

    Args:
        penalty: L2 strength: mean cross-entropy + penalty / 2 * |weight|^2 is minimised. On emoji64 held-out accuracy
            is the same within one picture in a hundred from 0.01 to 0.1.
        max_steps: L-BFGS iterations; it stops earlier when the gradient vanishes.
    """
    x, labels = features.detach().cpu().double(), labels.cpu()
    if x.shape[0] != labels.shape[0] or x.shape[0] == 0:
        raise UserError(f"A classifier needs one label per picture: {x.shape[0]} pictures, {labels.shape[0]} labels.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"Labels are {int(labels.min())} to {int(labels.max())} but there are {num_classes} classes.")
    mean, scale = x.mean(0), x.std(0, unbiased=False)
    scale = torch.where(scale > 1e-6 * scale.max(), scale, torch.ones_like(scale))  # constant features stay at zero
    x = (x - mean) / scale
    weight = torch.zeros(x.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_steps, tolerance_grad=1e-5, history_size=20, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearClassifier(mean, scale, weight.detach(), bias.detach())


@dataclass
class Agreement:
    """How often predictions equal the labels."""

    confusion: Tensor  # (classes, classes) int64: row is the label, column the prediction

    @classmethod
    def of(cls, predictions: Tensor, labels: Tensor, num_classes: int) -> Agreement:
        pairs = labels.cpu() * num_classes + predictions.cpu()
        return cls(torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes))

    @property
    def accuracy(self) -> float:
        """Share of pictures predicted as labelled."""
        return int(self.confusion.diagonal().sum()) / int(self.confusion.sum())

    @property
    def per_class(self) -> list[float | None]:
        """Share of each class's pictures predicted as labelled; None for a class without pictures."""
        hits, totals = self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist()
        return [hit / total if total else None for hit, total in zip(hits, totals)]

    def table(self, class_names: list[str]) -> tuple[list[str], list[list[str]]]:
        """(headers, rows) for a report: pictures, accuracy and the most frequent wrong prediction of each class."""
        headers = ["class", "pictures", "accuracy", "most often mistaken for"]
        rows = []
        for index, (name, accuracy) in enumerate(zip(class_names, self.per_class)):
            wrong = self.confusion[index].clone()
            wrong[index] = 0
            mistaken = f"{class_names[int(wrong.argmax())]} ({int(wrong.max())})" if wrong.max() > 0 else ""
            share = "" if accuracy is None else f"{accuracy:.0%}"
            rows.append([name, str(int(self.confusion[index].sum())), share, mistaken])
        return headers, rows
