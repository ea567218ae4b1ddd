"""What the original D-AR README promises: its commands, flags and addresses, on toy runs and local data."""

from __future__ import annotations

import importlib
import json
import re

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from run import translate
from scripts import reconstruct, sample
from tests.conftest import ROOT, finished_run
from tests.scripts.test_rectok_surface import shell
from tests.tools import torture

TOKENIZER, GENERATOR = (str(ROOT / "configs" / "toy" / f"dar_{kind}.yaml") for kind in ("tokenizer", "generator"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A run of the toy tokenizer; do not change it."""
    return finished_run(tmp_path_factory, TOKENIZER)


@pytest.fixture(scope="module")
def generator(tmp_path_factory, tokenizer):
    """A run of the toy generator; do not change it."""
    return finished_run(tmp_path_factory, GENERATOR, f"tokenizer.weights={tokenizer}")


@pytest.fixture
def draw(capsys, generator, tmp_path):
    """draw(name, *arguments) -> (folder of sample.py's pictures, what it printed)."""

    def call(name, *arguments):
        assert (
            sample.main([str(generator), "--labels", "0-3", "--out", str(tmp_path / name), *map(str, arguments)]) == 0
        )
        return tmp_path / name, capsys.readouterr().out

    return call


def pixels(folder):
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("0*.png")) if "stages" not in p.name}


# -- previews and layouts ---------------------------------------------------------------------------------------------
def test_previews_beside_the_same_pictures(draw):
    plain, _ = draw("plain", "--num", 5, "--batch", 5)
    shown, out = draw("shown", "--num", 5, "--batch", 5, "--preview", "gif")
    assert all((a == b).all() for a, b in zip(pixels(plain).values(), pixels(shown).values(), strict=True))
    ((line, share),) = re.findall(
        r"^5 pictures from number 0 on, seconds to each stage: (.*); the first after (\d+) % of "
        "the time$",
        out,
        re.M,
    )
    seconds = [float(word) for word in line.split()]
    assert len(seconds) == 4 and seconds == sorted(seconds) and 0 < int(share) < 100
    for name, final in pixels(shown).items():
        strip = np.asarray(Image.open(shown / name.replace(".png", "_stages.png")))
        assert strip.shape == (36, 4 * 34 + 2, 3) and (strip[2:34, 3 * 34 + 2 : -2] == final).all()
        for suffix in (".webp", ".gif"):
            with Image.open(shown / name.replace(".png", suffix)) as film:
                assert film.n_frames == 4
    assert Image.open(shown / "stages.png").height == 5 * 36
    (shown / "000001_1.webp").unlink()  # what is missing is made again, what is there stays
    assert "(1 new" in draw("shown", "--num", 5, "--preview")[1] and (shown / "000001_1.webp").is_file()
    assert "(0 new" in draw("shown", "--num", 5)[1]


def test_layout_of_a_picture_or_of_the_first_sample(draw, tokenizer, monkeypatch):
    import torch

    from core.images import to_model_range
    from data.transforms import to_tensor
    from run.load import load_tokenizer
    from tokenizer.vq.dar import DAR

    decode, codes = DAR.decode, []
    monkeypatch.setattr(
        DAR, "decode", lambda self, latents, *a, **k: codes.append(latents) or decode(self, latents, *a, **k)
    )

    def sampled(*arguments):
        codes.clear()
        folder, _ = draw(*arguments)
        return folder, torch.cat(codes)

    free_folder, free = sampled("free", "--num", 4)
    for batch in (2, 4):  # followed across batches
        _, shared = sampled(f"shared_{batch}", "--num", 4, "--batch", batch, "sample.shared=8")
        assert (shared[:, :8] == free[:1, :8]).all() and torch.equal(shared[0], free[0])
        assert len(shared.unique(dim=0)) == 4

    reference = free_folder / "000002_2.png"
    _, layout = sampled("layout", "--num", 3, "--layout", reference, "--layout-groups", 3)
    net, _ = load_tokenizer({"weights": str(tokenizer)})
    wanted = net.encode(to_model_range(to_tensor(Image.open(reference).convert("RGB"))[None]))
    assert (layout[:, :12] == wanted[:, :12]).all() and len(layout.unique(dim=0)) == 3
    with pytest.raises(UserError, match="pictures of other settings .*layout_fingerprint"):
        draw("layout", "--num", 3, "--layout", reference, "--layout-groups", 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--layout", "PICTURE", "--layout-groups", 9],
            "--layout-groups 9: this tokenizer has 4 groups of codes; give 1 to 4",
        ),
        (["--layout", "PICTURE", "sample.shared=4"], "give one of them"),
        (["--layout", "nowhere.png"], "nowhere.png"),
        (["sample.shared=17"], "sample.shared=17: a picture has 16 codes"),
    ],
)
def test_prefixes_that_do_not_fit(draw, tmp_path, arguments, message):
    Image.new("L", (50, 40)).save(tmp_path / "reference.png")  # of another size and mode
    with pytest.raises(UserError, match=message):
        draw("x", *[str(tmp_path / "reference.png") if a == "PICTURE" else a for a in arguments])
    assert not list((tmp_path / "x").glob("*.png"))


def test_previews_of_who_has_none(generator_run, tokenizer_run, tmp_path):
    with pytest.raises(UserError, match="RecTok needs all codes for its first picture"):
        sample.main([str(generator_run), "--labels", "0", "--out", str(tmp_path), "--preview"])
    with pytest.raises(UserError, match="cannot continue codes"):
        sample.main([str(generator_run), "--labels", "0", "--out", str(tmp_path), "--layout", "x.png"])
    with pytest.raises(UserError, match="RecTok decodes all of its latents at once"):
        reconstruct.main(["--weights", str(tokenizer_run), "--url", "embedded://emoji64", "--stages"])


def test_what_each_group_of_codes_adds(tokenizer, tmp_path, capsys):
    """The seed's sample_tokenizer.py."""
    arguments = ["--weights", str(tokenizer), "--url", "embedded://emoji64", "--num", "2"]
    for name, extra in (("plain", []), ("stages", ["--stages"])):
        assert reconstruct.main([*arguments, "--out", str(tmp_path / name), *extra]) == 0
    plain = sorted((tmp_path / "plain").glob("0*_psnr*.png"))
    assert [p.read_bytes() for p in plain] == [(tmp_path / "stages" / p.name).read_bytes() for p in plain]
    for panel in plain:  # original | reconstruction | difference
        strip = np.asarray(Image.open(tmp_path / "stages" / re.sub("psnr.*", "stages.png", panel.name)))
        columns = [strip[2:34, i * 34 + 2 : i * 34 + 34] for i in range(5)]
        row = np.asarray(Image.open(panel))
        assert (columns[4] == row[:, :32]).all() and (columns[3] == row[:, 34:66]).all()
    assert "what each part of the codes adds" in capsys.readouterr().out


# -- flags ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, answer",
    [
        (
            ["--vq-ckpt", "temp/tokenizer_v1.pt"],
            "--vq-ckpt temp/tokenizer_v1.pt is written train.init_from=temp/tokenizer_v1.pt.",
        ),
        (["--data-path", "wds://a-{00..03}.tar"], "is written data.url=wds://a-{00..03}.tar."),
        (["--data-path", "my/pictures"], "is written data.url=folder://my/pictures."),
        (["--global-batch-size=512"], "train.global_batch=512"),
        (["--mixed-precision", "none"], "train.precision=fp32"),
        (["--gpt-model", "GPT-XL"], "generator.size=xl"),
        (["--dropout-p", "0.1"], "generator.residual_dropout=0.1 generator.ffn_dropout=0.1"),
        (["--use-gan"], "no discriminator"),
        (["--cloud-save-path", "x", "--epochs", "3"], "work_dir=x; --epochs 3 is written"),
        (["--epoch", "3"], 'Did you mean "epochs"'),
    ],
)
def test_old_flags_are_translated(train_main, words, answer):
    code, _, err = train_main("configs/dar/tokenizer.yaml", *words)
    assert code == 2 and answer in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    "words, programs, answer",
    [
        (["configs/dar/ar_l.yaml", "--gpt-model", "GPT-B"], ["generator"], "is written generator.size=b."),
        (["configs/toy/dar_generator.yaml", "--gpt-model", "GPT-B"], ["generator"], "is written generator.size=b."),
        (["configs/mix/dar__far.yaml", "--gpt-model", "FAR-L"], ["generator"], "(FQGAN) is written generator.size=l"),
        (
            ["configs/rectok/ditdh_xl.yaml", "--model", "DiTDDT_s"],
            ["generator"],
            "is written configs/rectok/ditdh_s.yaml.",
        ),
        (
            ["configs/dar/tokenizer.yaml", "--warmup-steps", "5"],
            ["tokenizer"],
            "is written train.schedule.warmup=5step.",
        ),
        (["configs/dar/tokenizer.yaml", "--gamma", "1"], ["tokenizer"], "--gamma 1 is a word of RecTok, not of D-AR."),
        (
            ["configs/dar/tokenizer.yaml", "--gpt-model", "GPT-B"],
            ["tokenizer"],
            "belongs to training a generator, run_sample.sh, run_eval_generator.sh, where it is written generator.size=b.",
        ),
        (
            ["configs/rectok/ditdh_xl.yaml", "--load_tokenizer_from", "...", "--cfg", "2"],
            ["generator"],
            "tokenizer.weights=...; --cfg",
        ),
        (
            ["--cfg", "1.5"],
            ["sample"],
            "--cfg 1.5 (RecTok) is written sample.scale=1.5; --cfg 1.5 (ImageFolder) is written "
            "sample.scale=2.5 sample.schedule=linear",
        ),
        (
            ["imagenet-var-4096.pt", "--cfg", "3.25", "3.25"],
            ["sample"],
            "--cfg 3.25 3.25 is written sample.scale=[4.25,4.25] ",
        ),
        (["work_dirs/x", "--cfg", "3"], ["sample"], "(RecTok)"),
        (
            ["--beta1", "0.8", "--beta2", "0.99", "--vq-model", "VQ-8"],
            ["tokenizer"],
            "train.optimizer.betas=[0.8,0.99]",
        ),
        (
            ["--data-path", "my pictures", "--vq-model", "VQ-8"],
            ["tokenizer"],
            'is written "data.url=folder://my pictures"; ',
        ),
        (
            ["configs/dar/tokenizer.yaml", "--perceptual-weight", "-0.5"],
            ["tokenizer"],
            "objective.weights.perceptual=0.5 tokenizer.perceptual_by_time=true.",
        ),  # its sign says how
        (
            ["--nproc_per_node=8", "--vq-model", "VQ-8"],
            ["tokenizer"],
            "--nproc_per_node 8: all visible GPUs are used; NPROC=N",
        ),
    ],
)
def test_whose_words_are_meant(words, programs, answer):
    """Systems are told by configs, released files and the words; where they cannot be told, the answer says both."""
    assert answer in translate.explain(words, programs)


def test_old_flags_of_sampling(generator, tmp_path):
    with pytest.raises(UserError, match=r"--cfg-scale 1.2,8.0 is written sample.scale=1.2,8.0; --top-p 1 is written"):
        sample.main([str(generator), "--labels", "0", "--out", str(tmp_path), "--cfg-scale", "1.2,8.0", "--top-p", "1"])


# -- mistakes, through the command line -------------------------------------------------------------------------------
@pytest.fixture
def shards(tmp_path):
    """Six pictures of several modes in two shards."""
    import io
    import tarfile

    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard:02d}.tar", "w") as tar:
            for i in range(3):
                data = io.BytesIO()
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).convert(
                    ("L", "RGBA", "P")[i]
                ).save(data, "PNG")
                for name, content in ((f"{shard}{i}.png", data.getvalue()), (f"{shard}{i}.cls", str(i).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"wds://{tmp_path}/train-{{00..01}}.tar"


@pytest.fixture
def dataset(tmp_path):
    """A folder as datasets.save_to_disk writes it; no labels."""
    datasets = pytest.importorskip("datasets")
    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)) for i in range(6)
    ]
    datasets.Dataset.from_dict(
        {"image": pictures}, features=datasets.Features({"image": datasets.Image()})
    ).save_to_disk(str(tmp_path / "dataset"))
    return f"datasets://{tmp_path}/dataset"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.url=wsd://x.tar"], 'Did you mean "wds'),
        (["data.url=wds://EMPTY/train-{00..03}.tar"], "no shard called"),
        (["data.url=wds://EMPTY/train-{0-3}.tar"], "neither a range"),
        (["data.url=datasets://EMPTY/none"], "none"),
        (["data.url=folder://EMPTY"], "EMPTY"),
        (["data.url=wds://EMPTY/words.tar"], "words.tar"),
        (["tokenizer.steps=3"], "steps 3 is less than groups 4"),
        (["tokenizer.groups=17"], r"groups 17 .* 1 and length 16"),
        (["tokenizer.window=17"], r"window 17 .* between 1 and length 16"),
        (["tokenizer.decoder={widht: 3}"], 'Did you mean "width"'),
    ],
)
def test_mistakes_in_one_sentence(train_main, tmp_path, monkeypatch, overrides, message):
    import tarfile

    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "a.txt").write_text("no picture")
    with tarfile.open(tmp_path / "EMPTY" / "words.tar", "w") as tar:
        tar.add(tmp_path / "EMPTY" / "a.txt", "a.txt")
    given = [o.replace("EMPTY", f"{tmp_path}/EMPTY") for o in overrides]
    code, _, err = train_main(
        TOKENIZER, *given, "train.device=cpu", f"work_dir={tmp_path}", f"data.cache_dir={tmp_path}/c"
    )
    assert code == 2 and re.search(message, err) and len(err.splitlines()) == 1, err


# -- wds:// and datasets://, killed and resumed -----------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "dataset"])
def test_any_address_survives_kills(request, tmp_path, kind):
    url = request.getfixturevalue(kind)
    (tmp_path / "runs").mkdir()
    arena = torture.Arena(
        TOKENIZER,
        tmp_path / "runs",
        [*torture.PERIODS, f"data.url={url}", "data.val_url=null", "train.duration=12step"],
    )
    score = torture.survive_kills(arena, 1, seed=5)
    assert score.full and score.total == 1, str(score)


# -- the commands of the README ---------------------------------------------------------------------------------------
def program(script: str, *arguments: object) -> int:
    """What a run_*.sh starts, in this process: one import of torch is enough."""
    (line,) = re.findall(r'^exec bash scripts/launch.sh scripts/(\w+).py(.*) "\$@"$', (ROOT / script).read_text(), re.M)
    name, given = line
    return importlib.import_module(f"scripts.{name}").main([*given.split(), *map(str, arguments)])


@pytest.mark.slow
def test_every_command_of_the_readme(tmp_path, tokenizer, generator, shards):
    common = [f"work_dir={tmp_path}", f"data.cache_dir={tmp_path}/cache", "train.device=cpu"]
    train = [*common, "train.duration=2step"]
    toy = [GENERATOR, f"tokenizer.weights={tokenizer}"]
    commands = [
        ("run_train_tokenizer.sh", TOKENIZER, "name=scratch", f"data.url={shards}", "data.val_url=null", *train),
        ("run_train_tokenizer.sh", TOKENIZER, "name=finetuned", f"train.init_from={tokenizer}", *train),
        (
            "run_eval_tokenizer.sh",
            tokenizer,
            "embedded://emoji64",
            "--num",
            8,
            "eval.protocol=dar",
            "--out",
            tmp_path / "cut",
        ),
        ("run_eval_tokenizer.sh", tokenizer, "embedded://emoji64", "--num", 8, "--out", tmp_path / "exact"),
        ("run_train_ar.sh", *toy, "name=fly", *train),
        ("run_pretokenize.sh", *toy, "--out", tmp_path / "codes", *common),
        ("run_train_ar.sh", *toy, "name=stored", f"data.url=tokens://{tmp_path}/codes", *train),
        ("run_sample.sh", generator, "--labels", "0,2", "--num", 2, "--preview", "--out", tmp_path / "samples"),
        (
            "run_eval_generator.sh",
            generator,
            "eval.protocol=dar",
            "--num",
            8,
            "--write",
            "npz",
            "--out",
            tmp_path / "generated",
            "train.device=cpu",
        ),
    ]
    for command in commands:
        assert program(*command) == 0, command
    assert {"scratch", "finetuned", "fly", "stored"} <= {
        p.name for p in tmp_path.iterdir() if (p / "checkpoints" / "latest").exists()
    }
    assert (tmp_path / "samples" / "000001_2.webp").is_file()
    (stored,) = (tmp_path / "generated").rglob("*.npz")
    assert np.load(stored)["arr_0"].shape == (8, 32, 32, 3)
    done = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("cut", "exact")}
    assert set(done["cut"]["metrics"]) and set(done["exact"]["metrics"])


@pytest.mark.slow
def test_a_command_from_the_shell(tmp_path, tokenizer):
    done = shell(
        "run_train_ar.sh",
        GENERATOR,
        f"tokenizer.weights={tokenizer}",
        "train.duration=1step",
        f"work_dir={tmp_path}",
        f"data.cache_dir={tmp_path}/cache",
        "train.device=cpu",
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
