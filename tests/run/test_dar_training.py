"""D-AR in the trainer: its tokenizer survives kills and another number of ranks; its language model previews."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.specs import Guidance
from generator.task import GeneratorTask
from run import streaming
from run.load import OBJECTIVES, TOKENIZERS, build_teachers, load_config
from tests.conftest import ROOT
from tests.tokenizer.test_dar import draws, language_model, small
from tests.tools import torture

TOKENIZER = str(ROOT / "configs" / "toy" / "dar_tokenizer.yaml")


def test_two_ranks(tmp_path):
    """Two steps: later on, rounding puts a vector to another code, and from there on runs are different ones."""
    arena = torture.Arena(TOKENIZER, tmp_path, [*torture.PERIODS, "train.duration=2step", "tokenizer.usage_sample=0"])
    score = torture.compare_layouts(arena, [torture.LAYOUTS[0]])
    assert score.full, str(score)


def test_every_recipe_builds():
    for name in ("tokenizer", "ar_l", "ar_xl"):
        config = load_config(str(ROOT / "configs" / "dar" / f"{name}.yaml"), [])
        if name != "tokenizer":
            assert (config.sample.start, config.sample.scale, config.sample.schedule) == (1.2, 8.0, "linear")
            continue
        settings = dict(config.tokenizer)
        with torch.device("meta"):
            teachers = build_teachers(config, settings, pretrained=False)
            tokenizer = TOKENIZERS.build(settings)
        assert teachers["dinov2"].dim == 768 and teachers["dinov2"].grid == 16
        objective = OBJECTIVES.build({**config.objective, "perceptual": {"lpips": {"pretrained": False}}})
        objective.check_terms(tokenizer.term_names, True, False)


# -- previews ---------------------------------------------------------------------------------------------------------
def test_previews_come_while_codes_are_made(tmp_path):
    generator, tokenizer = language_model(), small()
    labels, seen = torch.tensor([0, 3]), []
    task = GeneratorTask(generator, tokenizer, 4, Guidance(2.0), {"top_k": 10})
    result = streaming.stream(task, labels, draws(2), show=lambda stage, pictures: seen.append((stage, pictures.shape)))
    assert seen == [(i, (2, 3, 32, 32)) for i in range(4)] and result.seconds == sorted(result.seconds)
    codes = generator.sample(labels, draws(2), Guidance(2.0), top_k=10)
    assert torch.equal(result.codes, codes)
    for clip, picture in enumerate(result.pictures, 1):
        assert torch.allclose(picture, tokenizer.decode(codes, draws(2).fork("decode"), clip=clip), atol=1e-5)
    streaming.write_filmstrip(result.pictures, tmp_path / "strip.png")
    assert Image.open(tmp_path / "strip.png").size == (4 * 34 + 2, 2 * 34 + 2)
    for suffix in ("webp", "gif"):
        streaming.write_animation(result.pictures, tmp_path / f"growth.{suffix}")
        with Image.open(tmp_path / f"growth.{suffix}") as image:
            assert image.n_frames == 4
    streaming.write_animation(result.pictures, tmp_path / "exact.webp")
    with Image.open(tmp_path / "exact.webp") as image:
        image.seek(3)
        assert image.convert("RGB").size == (2 * 34 + 2, 34 + 2)


def test_layout_of_a_reference_picture():
    generator, tokenizer = language_model(), small()
    reference = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    prefix = streaming.layout_prefix(tokenizer, reference, 2)
    assert torch.equal(prefix, tokenizer.encode(reference)[:, :8])
    codes = generator.sample(torch.tensor([0, 1, 2]), draws(3), prefix=prefix)
    assert torch.equal(codes[:, :8], prefix.expand(3, -1, -1)) and len(codes.unique(dim=0)) == 3
    with pytest.raises(UserError, match="has 4 groups of codes; give 1 to 4"):
        streaming.layout_prefix(tokenizer, reference, 5)


def test_who_cannot_preview_says_so():
    class Whole(torch.nn.Module):
        def sample(self, labels, draws, guidance=Guidance()):
            return labels

    with pytest.raises(UserError, match="Whole needs all codes for its first picture"):
        streaming.check(None, Whole())
    with pytest.raises(UserError, match="Whole does not report codes"):
        streaming.check(Whole(), small())
