"""Files from elsewhere: what is used without asking, what is said at once when they cannot be had, helpers, zips."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.errors import UserError
from core.weights import hub, released
from core.weights.released import Released, helper, needed
from run import download
from scripts.download import main
from tests.conftest import ROOT, TOY_GENERATOR
from tests.fake_hub import serving

SYSTEMS = ("rectok", "fqgan", "rear", "dar", "imagefolder")
CONFIGS = sorted(path for system in SYSTEMS for path in (ROOT / "configs" / system).glob("*.yaml"))


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine on which nothing was ever downloaded."""
    monkeypatch.chdir(tmp_path)
    for variable in ("TESSERA_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "caches" / variable))
    monkeypatch.setattr(released, "ROOT", tmp_path)


@pytest.fixture
def fake(monkeypatch):
    with serving() as hub_here:
        monkeypatch.setenv("HF_ENDPOINT", hub_here.address)
        yield hub_here


@pytest.fixture
def no_second_try(monkeypatch):
    """Clients wait before they try again: not here."""

    def sleep(seconds):
        raise AssertionError(f"waits {seconds} s")

    monkeypatch.setattr("time.sleep", sleep)


# ---------------------------------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------------------------------
def test_a_file_of_the_hub_is_fetched_once(fake):
    fake.files["o/r/folder/m.pt"] = b"weights"
    for _ in range(2):
        path = hub.resolve("hf://o/r@v1/folder/m.pt")
        assert path == Path("pretrained_models/o/r@v1/folder/m.pt") and path.read_bytes() == b"weights"
    assert ("GET", "/o/r/resolve/v1/folder/m.pt") in fake.asked and len(fake.asked) == 3
    assert hub.resolve("hf://o/r/folder/m.pt", to=Path("data/x.bin")).read_bytes() == b"weights"
    assert Path("data/x.bin").is_file()


REFUSALS = [
    (
        (401, "GatedRepo"),
        r"licence must be accepted first \(401\): log in at https://huggingface.co/o/r and accept it, then run "
        r"`hf auth login`",
    ),
    ((403, "GatedRepo"), r"licence must be accepted first \(403\)"),
    (
        (401, "RepoNotFound"),
        r"no public repository o/r, or it does not let you in \(401\): check the name, log in with `hf auth",
    ),
    ((403, ""), r"does not let you in \(403\)"),
    ((404, "RepoNotFound"), r"no such repository \(404\)"),
    ((404, "RevisionNotFound"), "o/r has no revision main"),
    ((404, "EntryNotFound"), 'o/r has no file model.pt. Did you mean "model.bin"'),
    ((429, ""), r"too many requests came from here \(429\)"),
    ((503, ""), "the server answered 503: try again later"),
]


@pytest.mark.parametrize(("refusal", "sentence"), REFUSALS)
def test_a_refusal_of_the_hub_is_explained_at_once(fake, no_second_try, refusal, sentence):
    fake.files |= {"o/r/model.pt": refusal, "o/r/model.bin": b"1"}
    with pytest.raises(UserError, match=sentence) as told:
        hub.resolve("hf://o/r/model.pt")
    by_hand = "/o/r/resolve/main/model.pt by hand and copy it to pretrained_models/o/r/model.pt."
    assert f"download {fake.address}{by_hand}" in str(told.value)
    assert [method for method, _ in fake.asked] == ["HEAD"]  # asked once
    assert not list(Path("pretrained_models").rglob("*.pt"))


@pytest.mark.parametrize("reference", ["hf://o/r/m.pt", "https://127.0.0.1:9/m.pt"])
def test_without_a_network(monkeypatch, no_second_try, reference):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(
        UserError, match=r"downloaded: no answer, is there a network\? \(.*by hand and copy it to pretrained_m"
    ):
        hub.resolve(reference)


def in_cache(repository: str, file: str, content: bytes) -> Path:
    folder = Path(os.environ["HF_HOME"]) / "hub" / f"models--{repository.replace('/', '--')}"
    path = folder / "snapshots" / ("c" * 40) / file
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)
    return path


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TESSERA_OFFLINE", None])
def test_the_hubs_own_cache_is_used(monkeypatch, fake, variable):
    if variable:
        monkeypatch.setenv(variable, "1")
    cached = in_cache("o/r", "a/m.pt", b"cached")
    assert hub.resolve("hf://o/r/a/m.pt") == cached and not fake.asked
    assert hub.resolve("hf://o/r/a/m.pt", to=Path("m.pt")).read_bytes() == b"cached" and Path("m.pt").is_file()
    if variable:
        with pytest.raises(UserError, match="downloads are switched off"):
            hub.resolve("hf://o/r/b/m.pt")


def test_the_cache_is_where_the_library_puts_it(fake):
    """By its own layout, not by our idea of it."""
    import huggingface_hub

    fake.files["o/r/a/m.pt"] = b"theirs"
    cache = str(Path(os.environ["HF_HOME"]) / "hub")
    huggingface_hub.hf_hub_download("o/r", "a/m.pt", endpoint=fake.address, cache_dir=cache)
    assert released.in_hub_cache("o/r", "a/m.pt").read_bytes() == b"theirs"


# ---------------------------------------------------------------------------------------------------------------------
# Helper networks
# ---------------------------------------------------------------------------------------------------------------------
def put_everywhere(file: Released, tmp_path: Path) -> list[Path]:
    """Every place where this helper may lie."""
    places = [tmp_path / "pretrained_models" / file.name, tmp_path / "offline_models" / "some" / file.name]
    if file.url:
        places.append(tmp_path / "caches" / "TORCH_HOME" / "hub" / "checkpoints" / Path(file.url).name)
    return places


@pytest.mark.parametrize("file", released.helpers(), ids=lambda f: f.name)
def test_where_a_helper_may_lie(file, tmp_path):
    from_package = file.found()
    assert (from_package is None) == (file.package is None)
    for place in put_everywhere(file, tmp_path):
        place.parent.mkdir(parents=True)
        place.write_bytes(b"1")
        assert file.found().resolve() == place or from_package
        place.unlink()
    if file.repo:
        cached = in_cache(file.repo, file.path, b"1")
        assert cached == file.found()
        cached.unlink()


def test_archives_that_keep_the_hubs_layout(tmp_path):
    """offline_models/ may hold a snapshot of the hub's cache, under the repository's mangled name."""
    name = "models--facebook--dinov3-vitl16-pretrain-lvd1689m/snapshots/abc/model.safetensors"
    place = tmp_path / "offline_models" / name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"1")
    assert helper("dinov3-vitl16-pretrain-lvd1689m/model.safetensors").found() == place


@pytest.mark.parametrize("file", released.helpers(), ids=lambda f: f.name)
def test_the_table_of_helpers(file):
    assert bool(file.repo) != bool(file.url) and file.about and file.licence and file.at_least and file.systems
    assert file.reference.startswith(("hf://", "https://")) and (not file.gated or "https://" in file.licence)


def test_every_recipe_names_its_helpers_in_the_table():
    """The systems that a helper is said to be for are those whose recipes ask for it."""
    from run.check import helpers_of
    from run.load import load_config

    asking: dict[str, set[str]] = {}
    for path in CONFIGS:
        for file in helpers_of(load_config(str(path), [])):
            asking.setdefault(file.name, set()).add(path.parent.name)
    assert len(asking) >= 8
    for name, systems in asking.items():
        assert systems <= set(helper(name).systems), f"{name}: for {sorted(systems)}"


def test_what_constructors_will_load():
    from tokenizer.losses import OBJECTIVES
    from tokenizer.multiscale.imagefolder import ImageFolder
    from tokenizer.teachers import TEACHERS

    def names(constructor, **settings):
        return [file.name.split("/")[-2 if "/" in file.name else 0] for file in needed(constructor, settings)]

    image = OBJECTIVES.get("image")
    parts = {"lpips": 1.0, "convnext_s": {"weight": 0.1, "pretrained": False}, "resnet50": 1.0}
    assert names(image, perceptual=parts, weights={"perceptual": 1.0}) == [
        "vgg16-397923af.pth",
        "vgg.pth",
        "resnet50-0676ba61.pth",
    ]
    assert names(image, perceptual=parts, weights={"perceptual": 0.0}) == names(image) == []
    assert names(image, perceptual={"lpips_squeeze": 1.0}, weights={"perceptual": 1.0}) == []
    assert names(ImageFolder, pretrained=True, encoder="small", decoder="base") == [
        "vit_small_patch14_dinov2.lvd142m",
        "vit_base_patch14_dinov2.lvd142m",
    ]
    assert names(ImageFolder) == names(ImageFolder, pretrained="mine.pth") == []
    assert names(TEACHERS.get("clip")) == ["vit_large_patch14_clip_224.openai"]
    assert names(TEACHERS.get("dinov3"), weights="mine") == names(TEACHERS.get("efficientnet_lite0")) == []
    # timm knows it, the table does not
    other = needed(TEACHERS.get("dinov2"), {"model": "vit_giant_patch14_dinov2.lvd142m"})[0]
    assert other.reference == "hf://timm/vit_giant_patch14_dinov2.lvd142m/model.safetensors"


def test_a_gated_helper_that_cannot_be_had(fake, no_second_try):
    from tokenizer.teachers import TEACHERS

    fake.files["facebook/dinov3-vitl16-pretrain-lvd1689m/model.safetensors"] = (401, "GatedRepo")
    with pytest.raises(
        UserError, match="licence must be accepted first .*hf auth.*run_download.sh dinov3.*efficientnet_lite0"
    ):
        TEACHERS.build({"name": "dinov3"})


def test_a_timm_teacher_comes_from_the_hubs_cache(monkeypatch):
    import timm

    from tokenizer.teachers import create_timm

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    model = "vit_tiny_patch16_224.augreg_in21k"
    network = timm.create_model(model, pretrained=False, num_classes=21843)
    save_file(network.state_dict(), in_cache(f"timm/{model}", "model.safetensors", b""))
    assert torch.equal(create_timm("toy", model, None, True).cls_token, network.cls_token)
    with pytest.raises(
        UserError, match='teacher "toy": .*downloads are switched off.*bash run_download.sh timm/vit_small'
    ):
        create_timm("toy", "vit_small_patch14_dinov2.lvd142m", None, True)


@pytest.mark.parametrize("make", ["lpips_vgg", "convnext_s", "resnet50", "dino", "inception"])
def test_switched_off_means_no_download(make, monkeypatch):
    from evaluation.networks import Inception
    from tokenizer.losses import DISCRIMINATORS, PERCEPTUAL

    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    build = {"dino": lambda: DISCRIMINATORS.build({"name": "dino"}), "inception": Inception}.get(
        make, lambda: PERCEPTUAL.build({"name": {"lpips_vgg": "lpips"}.get(make, make)})
    )
    with pytest.raises(
        UserError, match="downloads are switched off.*copy it to pretrained_models/.*bash run_download.sh"
    ):
        build()


# ---------------------------------------------------------------------------------------------------------------------
# --check
# ---------------------------------------------------------------------------------------------------------------------
RECTOK_HELPERS = (
    "vgg16-397923af.pth",
    "convnext_small-0c510722.pth",
    "dinov3-vitl16-pretrain-lvd1689m/model.safetensors",
)


@pytest.mark.parametrize("mode", ["--check", "--dry-run"])
def test_check_lists_all_that_is_missing(train_main, monkeypatch, tmp_path, mode):
    """Together, each with the command that fetches it, and before anything is built."""
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    arguments = [ROOT / "configs" / "rectok" / "tokenizer.yaml", "train.init_from=pretrained_models/RecTok.pth", mode]
    code, out, err = train_main(*arguments)
    said = err if mode == "--check" else out
    assert code == (2 if mode == "--check" else 0)
    assert re.findall(r"fetch it with bash run_download.sh (\S+)", said) == ["RecTok.pth", *RECTOK_HELPERS]
    assert "accept it at https://huggingface.co/facebook/dinov3" in said
    assert (": folder://data/imagenet/train" in said) and "Traceback" not in err
    if mode == "--dry-run":
        assert "bash run_download.sh val_fid_statistics_file_256.npz" in out and "weights-inception" in out


def test_check_is_content_with_what_is_here(train_main, tmp_path):
    for name in RECTOK_HELPERS:
        (tmp_path / "pretrained_models" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pretrained_models" / name).write_bytes(b"1")
    code, out, err = train_main(
        ROOT / "configs" / "rectok" / "tokenizer.yaml",
        "data.url=embedded://emoji64",
        "data.val_url=null",
        "train.device=cpu",
        "--check",
    )
    assert code == 0, err
    assert "all that training needs is here" in out and "for evaluation Inception network of FID" in out


@pytest.mark.parametrize(
    "recipe, command",
    [
        ("toy/rear", "tokenizer.weights=work_dirs/toy_vqgan_plus_tokenizer: no such run yet. Train it: bash "
         "run_train_tokenizer.sh configs/toy/vqgan_plus_tokenizer.yaml"),
        ("rectok/decoder_finetune", "bash run_train_tokenizer.sh configs/rectok/tokenizer.yaml"),
    ],
)  # fmt: skip
def test_a_run_that_is_not_here_is_named_by_its_recipe(train_main, recipe, command):
    code, _, err = train_main(ROOT / "configs" / f"{recipe}.yaml", "train.device=cpu", "--check")
    assert code == 2 and command in err, err
    assert Path(ROOT, command.split()[-1]).is_file()
    code, _, err = train_main(TOY_GENERATOR, "tokenizer.weights=work_dirs/toy_nothing", "train.device=cpu", "--check")
    assert code == 2 and "no such file or folder" in err and "Train it" not in err


def test_online_evaluation_needs_its_files(train_main, tmp_path):
    toy = ROOT / "configs" / "toy" / "rectok_tokenizer.yaml"
    code, _, err = train_main(
        toy,
        "train.eval_every=1ep",
        "eval.network=inception",
        "eval.reference=adm_in256_stats.npz",
        "train.device=cpu",
        "--check",
    )
    assert code == 2 and "weights-inception" in err
    assert "eval.reference=adm_in256_stats.npz: bash run_download.sh adm_in256" in err
    assert train_main(toy, "train.device=cpu", "--check")[0] == 0
    kept = train_main(toy, "train.device=cpu", "train.eval_every=1ep", "train.keep_best=rfid", "--check")
    assert kept[0] == 0 and "train.keep_best=rfid: no checkpoint is kept as the best before" in kept[1]


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
def test_auxiliary_files_go_where_the_code_looks(fake, monkeypatch, capsys):
    served = [
        Released(
            "auxiliary", f.name, f.about, repo="o/r", path=f.name, at_least=3, systems=f.systems, default=f.default
        )
        for f in released.helpers()
    ]
    monkeypatch.setattr(released, "helpers", lambda: tuple(served))
    fake.files |= {f"o/r/{f.name}": b"fine" for f in served}
    fake.files["o/r/dinov3-vitl16-pretrain-lvd1689m/model.safetensors"] = (401, "GatedRepo")
    with pytest.raises(UserError, match=f"1 of {sum(f.default for f in served)} files could not be had"):
        main(["auxiliary"])
    said = capsys.readouterr().out
    assert "fetched  pretrained_models/vgg16-397923af.pth" in said and "licence must be accepted first" in said
    for f in served:
        assert bool(f.found()) == (f.default and "dinov3" not in f.name), f.name
    assert {f.name for f in download.choose(["evaluation"], False)} >= {
        "weights-inception-2015-12-05-6726825d.pth",
        "vgg16-397923af.pth",
        "VIRTUAL_imagenet256_labeled.npz",
    }


def archive(path: Path, members: dict[str, bytes], **external: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = external.get("attr", 0o644) << 16
            file.writestr(entry, content)
    return path


@pytest.mark.parametrize("folder", ["offline_models/", ""])
def test_offline_models_are_unpacked_where_they_are_looked_for(fake, monkeypatch, capsys, folder):
    members = {
        f"{folder}dinov3-vitl16-pretrain-lvd1689m/model.safetensors": b"d",
        f"{folder}lpips/vgg16-397923af.pth": b"v",
        "__MACOSX/._x": b"",
    }
    fake.files["QingyuShi/RecTok/offline_models.zip"] = archive(Path("there.zip"), members).read_bytes()
    table = released.table()
    small = [Released(f.system, f.name, f.about, repo=f.repo, unpack=f.unpack) for f in table if f.unpack]
    monkeypatch.setattr(download, "table", lambda: small)
    assert main(["offline_models.zip"]) == 0
    assert "unpacked offline_models/ (2 files)" in capsys.readouterr().out
    for name in ("dinov3-vitl16-pretrain-lvd1689m/model.safetensors", "vgg16-397923af.pth"):
        assert helper(name).found().is_relative_to(Path("offline_models").resolve())
    asked = len(fake.asked)
    assert main(["offline_models.zip"]) == 0 and len(fake.asked) == asked
    assert not Path("pretrained_models/offline_models.zip").exists()


@pytest.mark.parametrize(
    "name", ["../evil", "offline_models/../../evil", "/evil", "a/../../evil", "C:/evil", "..\\evil"]
)
def test_archives_do_not_write_elsewhere(tmp_path, name):
    bad = archive(tmp_path / "x" / "bad.zip", {"fine": b"1", name: b"2"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="would be written outside of offline_models; nothing was unpacked"):
        download.unpack(bad, Path("offline_models"))
    assert sorted(tmp_path.rglob("*")) == before


def test_archives_that_are_damaged_or_hold_links(tmp_path):
    link = archive(tmp_path / "link.zip", {"x": b"/etc/passwd"}, attr=stat.S_IFLNK | 0o777)
    with pytest.raises(UserError, match="outside of"):
        download.unpack(link, Path("offline_models"))
    good = archive(tmp_path / "good.zip", {"a": b"1" * 1000, "b": b"2" * 1000}).read_bytes()
    for damaged in (good[:500], good.replace(b"1" * 1000, b"1" * 999 + b"3"), b"<html>"):
        (tmp_path / "bad.zip").write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole zip archive"):
            download.unpack(tmp_path / "bad.zip", Path("offline_models"))
        assert not Path("offline_models").exists() and not list(Path().glob(".offline_models*"))


@pytest.mark.parametrize(
    "command",
    [
        ["scripts.evaluate", "pretrained_models/RecTok_decft.pth"],
        ["scripts.reconstruct", "--weights", "imagenet-4096.pt", "cat.jpg"],
        ["scripts.convert", "rar_b.bin", "mine.safetensors"],
        ["scripts.sample", "reAR-L.safetensors", "--labels", "1", "--out", "samples"],
        ["scripts.evaluate_generator", "D-AR-L-360K.pt"],
        ["scripts.linear_probe", "pretrained_models/fqgan_dual_ds16.pt"],
    ],
    ids=lambda command: command[0],
)
def test_a_released_file_that_is_missing_comes_with_its_command(command):
    """Whatever program is given it."""
    name = next(Path(word).name for word in command[1:] if word.endswith((".pt", ".pth", ".bin", "L.safetensors")))
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"is not here. Fetch it: bash run_download.sh {name}" in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Systems
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def small(monkeypatch):
    """The table with sizes that fit into a test."""
    whole = released.table()
    monkeypatch.setattr(
        download, "table", lambda: [replace(f, bytes=4 if f.bytes else None, at_least=3) for f in whole]
    )


def said(capsys, *arguments: str) -> str:
    """What download.py prints when all is well."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_every_released_file_is_in_the_table():
    files = released.table()
    assert len({f.name for f in files}) == len(files)
    assert {"rectok", "fqgan", "rear", "dar", "imagefolder", "evaluation", "auxiliary"} == {f.system for f in files}
    for file in files:
        assert bool(file.repo) != bool(file.url) and file.to in ("pretrained_models", "data/fid_stats", "data/tokens")
        assert file.bytes or file.at_least > 0
        assert file.reference.startswith(("hf://", "https://"))


def test_a_system_is_fetched_checked_and_kept(fake, small, capsys, tmp_path):
    fake.files["fun-research/TiTok/maskgit-vqgan-imagenet-f16-256.bin"] = b"four"
    for size in "SBL":
        fake.files[f"qyoo/reAR/reAR-{size}.safetensors"] = b"enough"
    fake.files["yucornetto/RAR/rar_b.bin"] = fake.files["yucornetto/RAR/rar_l.bin"] = b"five."  # not what is published
    with pytest.raises(UserError, match="2 of 6 files could not be had"):
        main(["rear"])
    assert hub.resolve("maskgit-vqgan-imagenet-f16-256.bin").read_bytes() == b"four"
    assert not (tmp_path / "pretrained_models" / "rar_b.bin").exists()
    fake.files.clear()
    assert "here     pretrained_models/reAR-S.safetensors" in said(capsys, "reAR-S.safetensors")
    (tmp_path / "pretrained_models" / "reAR-S.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1"):
        main(["reAR-S.safetensors"])


def test_statistics_go_where_evaluation_looks(fake, small, capsys, tmp_path):
    fake.files["QingyuShi/RecTok/data/fid_stats/adm_in256_stats.npz"] = b"stats"
    assert "fetched  data/fid_stats/adm_in256_stats.npz" in said(capsys, "adm_in256_stats.npz")
    assert (tmp_path / "data" / "fid_stats" / "adm_in256_stats.npz").read_bytes() == b"stats"


def test_what_cannot_be_fetched_is_explained(fake, monkeypatch, capsys):
    with pytest.raises(UserError, match='neither a system nor a released file. Did you mean "rectok"'):
        main(["rektok"])
    with pytest.raises(UserError, match="name a system"):
        main([])
    out = said(capsys, "rectok", "--dry-run")
    assert "would fetch  hf://QingyuShi/RecTok/RecTok.pth -> pretrained_models/RecTok.pth" in out
    assert "offline_models" not in out and "offline_models" in said(capsys, "rectok", "--all", "--dry-run")
    assert "optional" in said(capsys, "--list", "rear")
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    with pytest.raises(UserError):
        main(["RecTok.pth"])
    out = capsys.readouterr().out
    assert "downloads are switched off" in out
    assert "/QingyuShi/RecTok/resolve/main/RecTok.pth and copy it to pretrained_models/RecTok.pth" in out
