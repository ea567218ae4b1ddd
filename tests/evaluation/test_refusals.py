"""Bad input of the evaluation commands: one sentence, nothing half-written, and the corrected command works there."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from core.weights import released
from evaluation import chunks, measure, protocols, references
from evaluation.distances import Moments
from evaluation.networks import WEIGHTS_FILE
from evaluation.references import Facts, Statistics
from run import measurement
from scripts import evaluate, evaluate_generator, make_reference
from tests.evaluation.conftest import SmallInception, metrics
from tests.evaluation.test_commands import save_folder

BAD_PICTURES = {
    "empty": "holds no pictures|is empty",
    "absent": "no such file or folder",
    "absent.npz": "no such file or folder",
    "one": "1 picture",
    "one.npz": "1 picture",
    "unequal": "039.png is 40x40, the first picture is 24x24",
    "torn": r"033.png cannot be read \(OSError: image file is truncated\)",
    "torn.npz": "not a whole .npz file",
    "text.npz": "not a whole .npz file",
    "no_arr_0.npz": 'an array "arr_0" was expected, it holds x',
    "float.npz": "must be uint8 .* these are float64",
    "grey.npz": "an array of N x H x W x 3, this one is 40 x 24 x 24",
    "none.npz": "holds no pictures",
    "objects.npz": "holds Python objects",
}


@pytest.fixture(scope="module")
def bad_pictures(tmp_path_factory):
    """A folder with all of BAD_PICTURES, and "good", "good.npz" and "reference.npz" beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    good = np.random.default_rng(0).integers(0, 256, (40, 24, 24, 3), dtype=np.uint8)
    (folder / "empty").mkdir()
    for name, images in {"good": good, "one": good[:1], "torn": good, "unequal": good}.items():
        save_folder(folder / name, images)
    Image.new("RGB", (40, 40)).save(folder / "unequal" / "039.png")
    whole = (folder / "torn" / "033.png").read_bytes()
    (folder / "torn" / "033.png").write_bytes(whole[: len(whole) // 2])
    arrays = {
        "good": good,
        "one": good[:1],
        "float": good / 255,
        "grey": good[..., 0],
        "none": good[:0],
        "objects": np.array([{}], dtype=object),
    }
    for name, array in arrays.items():
        np.savez(folder / f"{name}.npz", arr_0=array)
    np.savez(folder / "no_arr_0.npz", x=good)
    (folder / "torn.npz").write_bytes((folder / "good.npz").read_bytes()[:9000])
    (folder / "text.npz").write_text("these are no pictures")
    features = SmallInception()(torch.from_numpy(good).permute(0, 3, 1, 2))
    moments = {tap: Moments.of(features[tap]) for tap in ("pool", "spatial")}
    made = Statistics({tap: (m.mean, m.covariance) for tap, m in moments.items()}, Facts(), "")
    references.save(folder / "reference.npz", made)
    return folder


def commands(folder, samples: str, out, reference: str = "reference.npz"):
    """name -> the command that meets the pictures `samples`, writing to `out`."""
    files, network = str(folder / samples), f"eval.reference={folder / reference}"
    return {
        "generator": lambda: evaluate_generator.main([files, network, "--write", "png", "--out", str(out)]),
        "reconstruction": lambda: evaluate.main(
            ["--original", files, "--reconstructed", files, "--workers", "0", "--out", str(out)]
        ),
        "cropped": lambda: evaluate.main(
            ["--original", files, "--reconstructed", files, "--size", "24", "--workers", "0", "--out", str(out)]
        ),
        "reference": lambda: make_reference.main([files, f"{out}/made.npz"]),
    }


@pytest.mark.parametrize("name", BAD_PICTURES)
@pytest.mark.parametrize("command", ["generator", "reconstruction", "cropped", "reference"])
def test_bad_pictures_leave_nothing_behind(bad_pictures, tmp_path, small_net, name, command):
    """One sentence, an untouched --out, and the corrected command works there."""
    out = tmp_path / "out"
    if (command, name) == ("cropped", "unequal"):
        assert commands(bad_pictures, name, out)[command]() == 0  # that is what --size is for
        return
    with pytest.raises(UserError, match=BAD_PICTURES[name]) as refused:
        commands(bad_pictures, name, out)[command]()
    assert "\n" not in str(refused.value) and not list(tmp_path.rglob("*"))
    assert commands(bad_pictures, "good", out)[command]() == 0
    assert (out / ("made.npz" if command == "reference" else "metrics.json")).is_file()
    assert not list(out.rglob("*work*")) and not list(out.rglob("*partial*"))


UNUSABLE = {
    "eval.network={}/text.npz": "archive|not",
    "eval.network={}/absent.pth": "no such file",
    "eval.reference={}/text.npz": "not a whole .npz",
    "eval.reference={}/no_arr_0.npz": "neither statistics",
    "eval.reference={}/negative.npz": "no covariance",
    "eval.protocol=none": "unknown protocol",
}


@pytest.mark.parametrize("setting", UNUSABLE)
def test_check_opens_what_an_evaluation_will_open(bad_pictures, generator_run, tokenizer_run, tmp_path, setting):
    np.savez(bad_pictures / "negative.npz", mu=np.zeros(2048), sigma=-np.eye(2048))
    good, network = str(bad_pictures / "good"), ["eval.network=lite0"] * ("network" not in setting)
    words = [*network, setting.format(bad_pictures), "--check", "--out", str(tmp_path / "out")]
    programs = {
        "samples": lambda: evaluate_generator.main([good, *words]),
        "generator": lambda: evaluate_generator.main([str(generator_run), "--num", "4", *words]),
        "tokenizer": lambda: evaluate.main([str(tokenizer_run), good, "--workers", "0", *words]),
        "pairs": lambda: evaluate.main(["--original", good, "--reconstructed", good, "--workers", "0", *words]),
    }
    for program in programs.values():
        with pytest.raises(UserError, match=UNUSABLE[setting]):
            program()
    if "network" in setting:
        with pytest.raises(UserError, match=UNUSABLE[setting]):
            make_reference.main([good, str(tmp_path / "r.npz"), "--network", words[0].partition("=")[2], "--check"])
    assert not list(tmp_path.iterdir())


def test_a_reference_without_fids_network_offers_the_stand_in(bad_pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(released.Released, "found", lambda self: None)
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    command = [str(bad_pictures / "good"), str(tmp_path / "r.npz"), "--workers", "0"]
    for words in ([], ["--check"]):
        with pytest.raises(UserError, match=r"is not here: .* --network lite0 takes the stand-in"):
            make_reference.main([*command, *words])
    monkeypatch.setenv("TESSERA_OFFLINE", "0")
    assert make_reference.main([*command, "--check"]) == 0 and "--network lite0 takes" in capsys.readouterr().out
    assert make_reference.main([*command, "--network", "lite0"]) == 0


def test_check_tells_what_is_not_here(tokenizer_run, generator_run, bad_pictures, tmp_path, capsys, monkeypatch):
    """Networks and references that would be downloaded later, or done without, with the command that brings each."""
    monkeypatch.setattr(released.Released, "found", lambda self: None)
    monkeypatch.setenv("TESSERA_OFFLINE", "0")
    good = str(bad_pictures / "good")
    told = {
        (): "until it is here, evaluation uses a stand-in and calls nothing FID",
        ("eval.network=inception",): "evaluation will download it",
    }
    for words, sentence in told.items():
        for program, target in (
            (evaluate, [str(tokenizer_run), good, "--workers", "0"]),
            (evaluate_generator, [str(generator_run), "--num", "4"]),
        ):
            measurement._tell.cache_clear()
            assert program.main([*target, *words, "--check", "--out", str(tmp_path / "out")]) == 0
            out = capsys.readouterr().out
            assert f"(bash run_download.sh {WEIGHTS_FILE}); {sentence}" in out
            assert ("run_download.sh vgg16-397923af.pth" in out) == (program is evaluate)
    with pytest.raises(UserError, match="adm_in256_stats.npz, .*: bash run_download.sh adm_in256_stats.npz fetches it"):
        evaluate_generator.main([good, "eval.network=lite0", "eval.reference=adm_in256_stats.npz", "--check"])


def test_a_published_reference_that_is_not_here(monkeypatch, tmp_path):
    """Also where Inception has yet to be downloaded."""
    monkeypatch.chdir(tmp_path)
    protocol = protocols.get("adm", "generation")
    with pytest.raises(UserError, match="compares with VIRTUAL.*: bash run_download.sh VIRTUAL.* fetches it"):
        references.choose_reference(None, protocol, None, 256, "generation", True)


def test_pictures_that_nobody_named(tmp_path, monkeypatch):
    """What is taken where none are named and the weights tell nothing is ImageNet's, which few have at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run.evaluate.training_data", lambda *_: {})
    with pytest.raises(UserError, match="no pictures were named.* folder://data/imagenet/val.* name them, "):
        evaluate.main(["tiny/fqgan", "--check"])


def test_pictures_by_the_key_of_a_recipe(tmp_path):
    """Whoever trained with data.val_url= evaluates with it; the sentence says how pictures are named here."""
    with pytest.raises(UserError, match="named without a key: WEIGHTS embedded://photos256."):
        evaluate.main(["tiny/fqgan", "data.val_url=embedded://photos256", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_check_of_labels(generator_run, tmp_path):
    (tmp_path / "labels.txt").write_text("0\n1\n2\n9\n")
    for words, message in (
        (["eval.labels=" + str(tmp_path / "labels.txt")], "labels.txt"),
        (["eval.labels=x"], "neither"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_generator.main([str(generator_run), "--num", "4", "eval.network=lite0", *words, "--check"])
    assert evaluate_generator.main([str(generator_run), "--num", "4", "eval.network=lite0", "--check"]) == 0


@pytest.mark.parametrize("command", ["generator", "reconstruction", "reference"])
def test_features_that_are_not_finite_leave_nothing_behind(bad_pictures, tmp_path, small_net, monkeypatch, command):
    whole = SmallInception.taps

    def broken(self, pixels):  # of the last chunks
        return {tap: torch.where(pixels[0, 0, 0, 0] == last, torch.nan, x) for tap, x in whole(self, pixels).items()}

    good = np.load(bad_pictures / "good.npz")["arr_0"]
    last = float(good[39, 0, 0, 0])
    monkeypatch.setattr(SmallInception, "taps", broken)

    def one_by_one(net, images, batch):
        return {tap: torch.cat([net(x[None])[tap] for x in images]) for tap in net.dims}

    for module in (measure, references):
        monkeypatch.setattr(module, "features_of", one_by_one)
    with pytest.raises(UserError, match="(pictures 32 to 39|pictures 0 to 39|.*) (is|was|are) not finite|hold NaN"):
        commands(bad_pictures, "good.npz", tmp_path / "out")[command]()
    assert not list(tmp_path.rglob("*"))


def test_references_that_do_not_fit_leave_nothing_behind(bad_pictures, tmp_path, small_net):
    fits = references.load(bad_pictures / "reference.npz")
    mean, covariance = fits.moments["pool"]
    for name, facts, moments, message in (
        ("input", dict(preprocess="pytorch_fid"), fits.moments, "distances would mix the two"),
        ("network", dict(network="lite0_128px"), fits.moments, "choose the network of the file"),
        ("size", dict(image_size=512), fits.moments, "512 px, these have 24 px"),
        ("purpose", dict(purpose="reconstruction"), fits.moments, "reference for reconstruction"),
        ("nan", {}, {"pool": (mean * torch.nan, covariance)}, "mu or sigma is not finite"),
        ("width", {}, {"pool": (mean[:5], covariance[:5, :5])}, "another feature network"),
    ):
        made = bad_pictures / f"reference_{name}.npz"
        references.save(made, Statistics(moments, Facts(**facts), ""))
        with pytest.raises(UserError, match=message):
            commands(bad_pictures, "good", tmp_path / "out", made.name)["generator"]()
        assert not list(tmp_path.rglob("*")), name
    for name, message in (
        ("one.npz", "1 picture and no statistics"),
        ("no_arr_0.npz", "it holds x"),
        ("float.npz", "must be uint8"),
        ("torn.npz", "not a whole .npz"),
    ):
        with pytest.raises(UserError, match=message):
            commands(bad_pictures, "good", tmp_path / "out", name)["generator"]()
        assert not list(tmp_path.rglob("*")), name
    assert commands(bad_pictures, "good", tmp_path / "out")["generator"]() == 0


def test_grey_cmyk_and_sixteen_bits_are_converted(bad_pictures, tmp_path, small_net):
    """As data/decode.py says; what they mean is measured, not the bytes."""
    grey = np.random.default_rng(1).integers(0, 256, (8, 24, 24), dtype=np.uint8)
    save_folder(tmp_path / "real", grey[..., None].repeat(3, -1))
    save_folder(tmp_path / "mixed", grey)
    Image.fromarray(grey[3].astype(np.uint16) * 257).save(tmp_path / "mixed" / "003.png")
    Image.fromarray(grey[4]).convert("CMYK").save(tmp_path / "mixed" / "004.tif")
    (tmp_path / "mixed" / "004.png").unlink()
    both = ["--original", str(tmp_path / "real"), "--reconstructed", str(tmp_path / "mixed"), "--workers", "0"]
    assert evaluate.main([*both, "--out", str(tmp_path / "out")]) == 0
    assert metrics(tmp_path / "out")["psnr"] == 100.0  # not one level differs


def test_a_full_disk_is_no_refusal(bad_pictures, tmp_path, small_net, monkeypatch):
    """What was measured stays, and the same command goes on."""
    whole, written = chunks.write_atomic, []

    def full(path, data):
        written.append(path)
        if len(written) == 2:
            raise UserError(f"{path}: the disk is full.") from OSError(errno.ENOSPC, "no space")
        whole(path, data)

    monkeypatch.setattr(chunks, "write_atomic", full)
    command = commands(bad_pictures, "good.npz", tmp_path / "out")["generator"]
    with pytest.raises(UserError, match="disk is full"):
        command()
    assert written[0].is_file()
    assert command() == 0 and len(written) == 4  # three chunks, the second one twice


def test_other_samples_of_the_same_names_are_measured_anew(tmp_path, small_net, bad_pictures):
    images = np.random.default_rng(2).integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
    save_folder(tmp_path / "samples", images)
    reference = f"eval.reference={bad_pictures / 'reference.npz'}"
    command = [str(tmp_path / "samples"), reference, "--out", str(tmp_path / "a")]
    assert evaluate_generator.main(command) == 0
    Image.fromarray(images[0] // 8).save(tmp_path / "samples" / "000.png")
    with pytest.raises(UserError, match="another evaluation .different: pictures"):
        evaluate_generator.main(command)


@pytest.mark.parametrize("given", ["{}", "folder://{}"])
def test_a_reference_that_is_pictures_is_not_called_absent(tmp_path, given):
    from evaluation import protocols
    from evaluation.references import choose_reference

    given = given.format(tmp_path)
    with pytest.raises(UserError, match=f"run_make_reference.sh {given} FILE.npz"):
        choose_reference(given, protocols.get("adm", "generation"), None, 256, "generation", False)
