"""run/alter.py: changes to latents, as the command line writes them and as tokenizers take them."""

from __future__ import annotations

import pytest
import torch

from core.errors import UserError
from core.rng import Draws
from core.specs import Codes, Continuous
from run.alter import Changes, Parts, blank_codes, parse_branches, parse_put, parts_of
from tokenizer.vq.dar import DAR
from tokenizer.vq.titok import TiTok

SPEC = Codes(16, 2, 32, 4, (4, 4), ("vis", "sem"))


def test_words_of_the_command_line():
    assert parse_put("3=17, sem:5=2,1:0=31", SPEC) == ((0, 3, 17), (1, 5, 2), (1, 0, 31))
    assert parse_branches("sem,0", SPEC) == (1, 0)
    for wrong in ("3", "3=", "=3", "a=3", "3=-1", "0:1:2=3"):
        with pytest.raises(UserError, match="--put"):
            parse_put(wrong, SPEC)
    with pytest.raises(UserError, match='Did you mean "sem"'):
        parse_branches("sme", SPEC)
    with pytest.raises(UserError, match="no branches"):
        parse_branches("0", Continuous((2, 2), 4))


def test_tokens_that_are_not_kept_say_as_little_as_possible():
    torch.manual_seed(0)
    size = {"width": 32, "layers": 1, "heads": 2}
    tokenizer = TiTok(image_size=32, patch_size=8, encoder=size, decoder=size, latents=6, vocab=16, code_dim=8).eval()
    assert parts_of(tokenizer) == Parts(6, "token", 1)
    (blank,) = blank_codes(tokenizer).tolist()
    rows = tokenizer.embed(torch.arange(16)[None, :, None])[0, :, 0]
    assert blank == int((rows - rows.mean(0)).norm(dim=1).argmin())
    images, draws = torch.rand(2, 3, 32, 32) * 2 - 1, Draws(0, torch.arange(2))
    changes = Changes(kept=2, put=((0, 0, 5),))
    changes.check(tokenizer)
    latents = changes.latents(tokenizer, images, draws)
    assert torch.equal(latents[:, 1:], tokenizer.encode(images)[:, 1:]) and (latents[:, 0] == 5).all()
    expected = latents.clone()
    expected[:, 2:] = blank
    assert torch.equal(changes.decode(tokenizer, latents, draws), tokenizer.decode(expected))
    for wrong, said in ((Changes(kept=7), "6 tokens; give 1 to 6"), (Changes(branches=(0,)), "give --donor")):
        with pytest.raises(UserError, match=said):
            wrong.check(tokenizer)


@pytest.mark.parametrize(("window", "fewest"), [(4, 1), (12, 3)])
def test_groups_that_are_not_kept_are_not_looked_at(window, fewest):
    """Also where the windows of steps overlap, so that one group alone is no picture."""
    torch.manual_seed(0)
    decoder = {"width": 32, "depth": 1, "patch_size": 4}
    sizes = {"encoder_width": 32, "encoder_layers": 1, "condition_width": 32, "condition_layers": 1, "head_dim": 16}
    tokenizer = DAR(
        image_size=32,
        patch_size=8,
        **sizes,
        length=16,
        groups=4,
        steps=8,
        window=window,
        vocab=64,
        decoder=decoder,
        gate_init=1.0,
    )
    for parameter in tokenizer.parameters():  # a fresh one ends in zeros
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer.eval()
    assert parts_of(tokenizer) == Parts(4, "group", 4, fewest)
    codes, draws = torch.randint(64, (1, 16, 1)), Draws(0, torch.arange(1))
    for kept in range(fewest, 5):
        changes, others = Changes(kept=kept), codes.clone()
        changes.check(tokenizer)
        others[:, 4 * kept :] = (others[:, 4 * kept :] + 1) % 64
        picture = changes.decode(tokenizer, codes, draws)
        assert torch.equal(picture, changes.decode(tokenizer, others, draws))
        others[:, 4 * kept - 1] = (others[:, 4 * kept - 1] + 1) % 64
        assert not torch.equal(picture, changes.decode(tokenizer, others, draws))
    assert torch.equal(picture, tokenizer.decode(codes, draws))
    with pytest.raises(UserError, match=f"4 groups; give {fewest} to 4"):
        Changes(kept=fewest - 1).check(tokenizer)
