"""tests/tools/edit_scores.py on one photo."""

import torch

from run.edit import Rules
from tests.tools import edit_scores


def test_what_is_kept_is_exact_and_scores_are_probabilities():
    row = edit_scores.measure("rear", 0.5, photos=1)
    assert row.equal and row.kept == 0.75
    assert all(0 < score < 1 for score in (row.plain, row.edited, row.plain_whole, row.edited_whole))
    assert edit_scores.square(64, 0.5).sum() == 32 * 32
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    white[..., 16:48, 16:48] = 7
    assert (edit_scores.inside(white, 0.5) == 7).all()


def test_heed_is_of_generators_that_take_it():
    row = edit_scores.measure("imagefolder", 0.5, photos=1, rules=Rules(heed=1.0))
    assert row.equal and row == edit_scores.measure("imagefolder", 0.5, photos=1)
