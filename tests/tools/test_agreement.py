"""tests/tools/agreement.py on few pictures."""

from __future__ import annotations

import pytest
import torch

from run.load import read_tokenizer
from tests.tools import agreement


def test_lines_say_how_far_numbers_differ(monkeypatch):
    monkeypatch.setattr(agreement, "PICTURES", 9)
    monkeypatch.setattr(agreement, "TRIALS", 20)
    tokenizer = read_tokenizer({"weights": "tiny/imagefolder"}).module
    a, b, codes = agreement.pictures(tokenizer)
    assert a.shape == b.shape == (9, 3, 32, 32) and 0 < float((a - b).abs().mean()) < 0.1
    ((name, _, found),) = agreement.of_codes(codes, tokenizer)
    assert name == "entropy_coded_bpp" and float(found.split()[0]) < 1e-12
    wrong = codes.clone()
    wrong[:, 0] = 0
    ((_, _, other),) = agreement.of_codes(wrong, tokenizer)
    assert other.split()[3] != found.split()[3]
    assert [float(line[2].partition("%")[0]) > 70 for line in agreement.coverage()] == [True, True]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "library", lambda _: None)
        assert not list(agreement.of_pictures(a, b))
    assert torch.equal(a, agreement.pictures(tokenizer)[0])
