"""What a new tokenizer or generator gets wrong is said in a sentence that names what to change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core import promises
from core.errors import UserError, where
from core.registry import Registry
from core.rng import Draws
from core.specs import Codes, Continuous, Generator, Guidance, Loss, Recon, Tokenizer
from run import edit
from run.check import check
from run.load import load_config
from tokenizer import TOKENIZERS
from tokenizer.continuous.gaussian import GaussianTokenizer, Posterior

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def draws(count: int = 2) -> Draws:
    return Draws(3, torch.arange(count))


class Good(GaussianTokenizer):
    """A tokenizer of 8 x 8 patches; subclasses below break one promise each."""

    term_names = ("kl",)

    def __init__(self, *, width: int = 4):
        super().__init__()
        self.image_size, self.spec = 16, Continuous((2, 2), width)
        self.keep_latent_stats()
        self.down, self.up = nn.Conv2d(3, 2 * width, 8, 8), nn.ConvTranspose2d(width, 3, 8, 8)

    def posterior_moments(self, images):
        return self.down(images).flatten(2).transpose(1, 2)

    def paint(self, z):
        return self.up(z.transpose(1, 2).unflatten(2, self.spec.grid))

    def forward(self, images, draws):
        posterior = Posterior(self.posterior_moments(images))
        z = posterior.sample(draws.normal("posterior", (4, self.spec.channels)))
        return Recon(self.paint(z), {"kl": posterior.kl().mean()})


class OtherGrid(Good):
    def __init__(self):
        super().__init__()
        self.spec = Continuous((4, 4), 4)


class NoStatistics(Good):
    def keep_latent_stats(self):
        pass


class NoSpec(Good):
    def __init__(self):
        nn.Module.__init__(self)
        self.image_size = 16


class NoSize(Good):
    def __init__(self):
        super().__init__()
        del self.image_size


class Rows(Good):
    def from_stored(self, stored, draws=None):
        return super().from_stored(stored, draws).flatten(2)


class Whole(Good):
    def encode(self, images, draws=None):
        return super().encode(images, draws).long()


class Small(Good):
    def forward(self, images, draws):
        recon = super().forward(images, draws)
        return Recon(recon.images[..., ::2, ::2], recon.terms)


class Plain(Good):
    def forward(self, images, draws):
        return super().forward(images, draws).images


class NoTerm(Good):
    def forward(self, images, draws):
        return Recon(super().forward(images, draws).images)


class TermOfEach(Good):
    def forward(self, images, draws):
        return Recon(super().forward(images, draws).images, {"kl": torch.zeros(len(images))})


class OwnNoise(Good):
    def forward(self, images, draws):
        recon = super().forward(images, draws)
        return Recon(recon.images + torch.randn_like(recon.images), recon.terms)


class Other(Good):
    def encode(self, images, draws=None):
        return super().encode(images, draws) + 1


class OfTheBatch(Good):
    def posterior_moments(self, images):
        return super().posterior_moments(images - images.mean(0))


class AskingValues(Good):
    def paint(self, z):
        return super().paint(z * (1 if z.mean().item() > 0 else 2)) if not self.training else super().paint(z)


class Two(Good):
    def forward(self, images):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, value in list(globals().items()):
        if isinstance(value, type) and issubclass(value, Good):
            monkeypatch.setitem(TOKENIZERS.entries, name, f"{__name__}:{name}")


def test_one_that_keeps_them_all():
    tokenizer = TOKENIZERS.build({"name": "Good"}).eval()
    with torch.no_grad():
        promises.values_kept(tokenizer, IMAGES, draws())


@pytest.mark.parametrize(
    "name, says",
    [
        ("NoStatistics", r"latent_mean and latent_std of 4 values.*keep_latent_stats\(\)"),
        ("NoSpec", "`self.spec` says what its latents are"),
        ("NoSize", "`self.image_size` is the side"),
    ],
)
def test_what_is_lacking_is_told_when_it_is_built(name, says):
    with pytest.raises(UserError, match=f"{name} does not keep what core/specs.py promises.*{says}"):
        TOKENIZERS.build({"name": name})


@pytest.mark.parametrize(
    "name, says",
    [
        ("OtherGrid", r"OtherGrid.encode|unflatten"),
        (
            "Rows",
            r"Rows.encode gives shape \(2, 4, 4\); \(B, 4, 2, 2\) would be the continuous 4 channels on a 2x2 grid",
        ),
        ("Whole", "Whole.encode gives int64 numbers; real numbers would be"),
        ("Small", r"rebuilds pictures of shape \(2, 3, 16, 16\) as \(2, 3, 8, 8\)"),
        ("Plain", "Plain.forward gives a Tensor, not a core.specs.Recon"),
        ("NoTerm", "NoTerm.forward gives no kl in Recon.terms"),
        ("TermOfEach", r"the term kl has shape \(2\)"),
        ("OwnNoise", "draws from torch's own generator"),
        ("Other", r"from_stored\(precompute\(x\)\) is not encode\(x\)"),
        ("OfTheBatch", "depend on the others of its batch"),
    ],
)
def test_what_is_broken_is_told(name, says):
    tokenizer = TOKENIZERS.build({"name": name}).eval()
    with pytest.raises((UserError, RuntimeError), match=says), torch.no_grad():
        promises.values_kept(tokenizer, IMAGES, draws())


def config(tmp_path, name: str):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"name: mine\nwork_dir: {tmp_path}\ntask: tokenizer\ntokenizer: {{name: {name}}}\nobjective: {{weights: {{kl: 1}}}}\n"
        "data: {url: 'synthetic://?size=16&count=8'}\n"
        "train: {duration: 1step, global_batch: 2, optimizer: {lr: 1e-3}, device: cpu, precision: fp32}\n"
    )
    return load_config(str(path), [])


@pytest.mark.parametrize(
    "name, says",
    [
        ("OtherGrid", r"a step of mine would fail, at tokenizer/continuous/gaussian.py:\d+, RuntimeError: unflatten"),
        ("Rows", r"Rows.encode gives shape \(1, 4, 4\)"),
        ("Small", r"as \(1, 3, 8, 8\)"),
        ("Plain", "not a core.specs.Recon"),
        ("Two", r"a step of mine would fail, at core/estimate.py:\d+, TypeError: Two.forward\(\) takes 2 positional"),
    ],
)
def test_check_sends_a_picture_of_nothing_through_every_method(name, says, tmp_path):
    with pytest.raises(UserError, match=says):
        check(config(tmp_path, name))


@pytest.mark.parametrize("name", ["Good", "AskingValues"])
def test_check_accepts_what_keeps_them(name, tmp_path):
    assert "all that training needs is here" in check(config(tmp_path, name))


class Draw(Generator):
    """A generator of codes that draws by chance."""

    models = Codes

    def __init__(self, wrong: str = ""):
        super().__init__()
        self.wrong, self.weight = wrong, nn.Parameter(torch.zeros(()))

    def fits(self, spec):
        return []

    def forward(self, latents, labels, draws, progress=None):
        return Loss(self.weight * latents.float().mean((1, 2)))

    def sample(self, labels, draws, guidance=Guidance()):
        if self.wrong == "shape":
            return torch.zeros(len(labels), 6, dtype=torch.long)
        codes = (draws.uniform("codes", (6, 1)) * 8).long()
        if self.wrong == "noise":
            codes = torch.randint(8, codes.shape)
        return codes + 9 * (self.wrong == "vocab") + (labels.sum() if self.wrong == "batch" else 0)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ("shape", r"Draw.sample gives shape \(3, 6\); \(B, 6, 1\)"),
        ("vocab", "gives codes from"),
        ("batch", "depends on the others of its batch|gives codes from"),
        ("noise", "depends on the others|draws from torch's own generator"),
    ],
)
def test_samples(wrong, says):
    spec = Codes(6, 1, 8, 4)
    promises.samples_kept(Draw(), spec, draws(3), 3)
    with pytest.raises(UserError, match=says):
        promises.samples_kept(Draw(wrong), spec, draws(3), 3)


def test_a_generator_says_what_it_models_and_returns_a_loss():
    wordless = Draw()
    wordless.sample = lambda labels, guidance: labels  # pyright: ignore[reportAttributeAccessIssue]
    wordless.models = int
    with pytest.raises(UserError, match="`models` is the kind of latents.*`sample` takes labels, draws, guidance"):
        promises.declared(wordless)
    promises.declared(Draw())
    with pytest.raises(UserError, match=r"the total of its Loss has shape \(2\)"):
        promises.loss_as_promised(Draw(), Draw()(torch.zeros(2, 6, 1).long(), torch.zeros(2), draws()))
    with pytest.raises(UserError, match="Draw cannot edit: its `sample` does not take `kept`"):
        edit.require_editing(Draw())


class Unfinished(Tokenizer):
    """Lacks most methods."""


@pytest.mark.parametrize(
    "entry, says",
    [
        ("tests.core.test_promises.Good", 'is not written "package.module:Class"'),
        ("tests.core.test_promise:Good", "names a module that is not there"),
        ("test.core:Good", "names a module that is not there"),
        ("tests.core.test_promises:God", 'not in that module. Did you mean "Good"'),
        (
            "tests.core.test_promises:Unfinished",
            r"\(Unfinished\) lacks decode, encode, forward, from_stored, precompute",
        ),
    ],
)
def test_a_line_of_a_registry_that_leads_nowhere(entry, says):
    with pytest.raises(UserError, match=says):
        Registry("tokenizer", {"mine": entry}).signature("mine")


def test_the_place_of_an_error_is_in_our_own_code():
    try:
        Posterior(torch.zeros(2)).kl()
    except IndexError as error:
        assert where(error).startswith("tokenizer/continuous/gaussian.py:")
