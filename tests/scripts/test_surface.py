"""What the READMEs of the original systems promise: their words in their places, on toy runs and local pictures.

Every single word of theirs is given back to our programs in tests/run/test_translate.py.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from run import translate
from run.load import load_config, tokenizer_layout
from run.recipes import CONTINUING, recipe_of
from scripts import convert, evaluate_generator, reconstruct, stages
from tests.conftest import ROOT, TOY_GENERATOR, TOY_TOKENIZER, finished_run, program, shell, toy
from tests.run.test_recipes import RECIPES
from tests.tools import torture

STAGE, DAR_TOKENIZER = "--stage=tokenizer", "configs/dar/tokenizer.yaml"
PAIRS = {
    "fqgan": ("fqgan_tokenizer", "far"),
    "rear": ("vqgan_plus_tokenizer", "rear"),
    "dar": ("dar_tokenizer", "dar_generator"),
}


@pytest.fixture(scope="module", params=list(PAIRS))
def runs(request, tmp_path_factory):
    """(system, run of its toy tokenizer, configuration of its generator); do not change the run."""
    tokenizer, generator = PAIRS[request.param]
    return request.param, finished_run(tmp_path_factory, toy(tokenizer)), toy(generator)


# -- words ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def work_dir(tmp_path):
    """A work folder with a run of ours and two in the layout of the original."""
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    for name, files in (("rectok", ["latest.pth"]), ("old", ["epoch_0099.pth", "epoch_0199.pth"])):
        folder = tmp_path / "tokenizer_training" / name / "checkpoints"
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
    return tmp_path


def test_experiments_are_found(work_dir):
    assert stages.find_run("mine", str(work_dir)) == str(work_dir / "mine")
    theirs = work_dir / "tokenizer_training"
    assert stages.find_run("rectok", str(work_dir)) == str(theirs / "rectok" / "checkpoints" / "latest.pth")
    assert stages.find_run("old", str(work_dir)) == str(theirs / "old" / "checkpoints" / "epoch_0199.pth")
    assert stages.find_run(str(work_dir / "mine"), "elsewhere") == str(work_dir / "mine")
    assert stages.find_run("hf://a/b/c.pth", str(work_dir)) == "hf://a/b/c.pth"
    with pytest.raises(UserError, match='no run "rektok".*Did you mean "rectok"'):
        stages.find_run("rektok", str(work_dir))


def test_runs_that_recipes_will_make():
    """Asked for before they are there, as the recipes' own commands do: --check says what makes them, --dry-run works."""
    for run, recipe, command in (
        ("rectok_stage1", "rectok/tokenizer", "bash run_train_tokenizer.sh configs/rectok/tokenizer.yaml"),
        ("rectok_stage2", "rectok/decoder_finetune", "bash run_decoder_finetune_tokenizer.sh configs/rectok/decoder_finetune.yaml"),
        ("rectok_stage1_decoder_finetune", "rectok/decoder_finetune", "bash run_decoder_finetune_tokenizer.sh rectok_stage1"),
        ("rectok512_stage1_decoder_finetune", "rectok/decoder_finetune", "bash run_decoder_finetune_tokenizer.sh "
         "rectok512_stage1 tokenizer.image_size=512 train.micro_batch=16"),
        ("toy_fqgan_tokenizer", "toy/fqgan_tokenizer", "bash run_train_tokenizer.sh configs/toy/fqgan_tokenizer.yaml"),
    ):  # fmt: skip
        assert recipe_of(f"work_dirs/{run}") == (f"configs/{recipe}.yaml", command)
        assert stages.find_run(run, "no/such/place") == f"no/such/place/{run}"
    assert recipe_of("work_dirs/mine") is None and recipe_of("elsewhere/rectok_stage1") is None
    for path in RECIPES:
        command = re.search(r"^# +(bash run_\w+\.sh\S*( [^\s(]+)*)", (ROOT / path).read_text(), re.MULTILINE)[1]
        script, *words = command.split()[1:]
        if script in CONTINUING:
            stage = {"run_train_var.sh": "var", "run_train_diffusion.sh": "diffusion"}.get(script, "decoder")
            config, overrides = stages.resolve(stage, words)
            name = load_config(config, overrides).name
            assert recipe_of(f"work_dirs/{name}") == (path, command if words else f"{command} {path}")


def test_layout_of_a_tokenizer_that_is_not_trained_yet():
    words = ["rectok_stage1_decoder_finetune", "configs/rectok/ditdh_s.yaml"]
    config, overrides = stages.resolve("diffusion", words)
    settings, note = tokenizer_layout(load_config(config, overrides).tokenizer)
    assert settings["name"] == "rectok" and settings["channels"] == 128
    assert note == (
        "work_dirs/rectok_stage1_decoder_finetune is not here; its sizes are those of configs/rectok/decoder_finetune.yaml"
    )


def test_words_become_arguments(work_dir):
    place = f"work_dir={work_dir}"
    assert stages.resolve("tokenizer", []) == ("configs/rectok/tokenizer.yaml", [])
    config, overrides = stages.resolve("decoder", ["mine", place, "train.micro_batch=8"])
    assert config == "configs/rectok/decoder_finetune.yaml"
    assert overrides == [
        f"train.init_from={work_dir / 'mine'}",
        "name=mine_decoder_finetune",
        place,
        "train.micro_batch=8",
    ]
    config, overrides = stages.resolve("diffusion", ["rectok", "configs/rectok/ditdh_s.yaml", place])
    assert config == "configs/rectok/ditdh_s.yaml" and "name=rectok_ditdh_s" in overrides
    assert overrides[0].startswith("tokenizer.weights=") and overrides[0].endswith("latest.pth")
    yaml = "configs/rectok/ditdh_xl.yaml"
    assert stages.resolve("diffusion", [yaml, "name=x"]) == (yaml, ["name=x"])  # a config first keeps working
    for stage, words in (("tokenizer", ["mine"]), ("decoder", ["mine", "rectok"]), ("diffusion", ["a.yaml", "b.yaml"])):
        with pytest.raises(UserError, match="one word too many"):
            stages.resolve(stage, words)


@pytest.mark.parametrize(
    "words, answer",
    [
        ([STAGE, "--gamma", "1.0"], "--gamma 1.0 is written tokenizer.gamma=1.0."),
        ([STAGE, "--gamma=1.0"], "tokenizer.gamma=1.0"),
        ([STAGE, "--sem_target", "rec+align"], "objective.semantic_target=all"),
        (
            [STAGE, "--milestone_interval", "50", "--enable_wandb"],
            "train.milestone_every=50ep; --enable_wandb is written log.wandb=true",
        ),
        ([STAGE, "--auto_resume"], "give the same command again"),
        ([STAGE, "--discriminator_weight", "0.5"], "objective.weights.gan=0.5"),
        ([STAGE, "--gama", "1"], 'there is no option --gama 1; settings are key=value. Did you mean "gamma"?'),
        ([DAR_TOKENIZER, "--global-batch-size=512"], "train.global_batch=512"),
        ([DAR_TOKENIZER, "--mixed-precision", "none"], "train.precision=fp32"),
        ([DAR_TOKENIZER, "--gpt-model", "GPT-XL"], "generator.size=xl"),
        ([DAR_TOKENIZER, "--dropout-p", "0.1"], "generator.residual_dropout=0.1 generator.ffn_dropout=0.1"),
        ([DAR_TOKENIZER, "--use-gan"], "no discriminator"),
        ([DAR_TOKENIZER, "--cloud-save-path", "x", "--epochs", "3"], "work_dir=x; --epochs 3 is written"),
        ([DAR_TOKENIZER, "--epoch", "3"], 'Did you mean "epochs"'),
        (["configs/fqgan/dual_ds16.yaml", "--vq-model", "VQ-8"], "--vq-model VQ-8 is written tokenizer.size=vq8."),
        (
            ["configs/fqgan/dual_ds16.yaml", "--disc-weight", "0.5"],
            "objective.weights.gan=0.5 objective.weights.discriminator=0.5",
        ),
        (
            ["configs/fqgan/dual_ds16.yaml", "--data-path", "DATA", "--with_clip_supervision"],
            "data.url=folder://DATA; --with_clip",
        ),
        (["configs/fqgan/far_b_dual.yaml", "--gpt-model", "FAR-L"], "generator.size=l"),
        (["configs/fqgan/far_b_dual.yaml", "--temperature", "0.9"], "sample.temperature=0.9"),
        (["configs/rear/rear_b.yaml", "--cached_path", "x.jsonl"], "--out x.jsonl"),
        (
            ["config=configs/rear_l.yaml", "experiment.output_dir=temp/rear_l"],
            "experiment.output_dir is written work_dir=temp name=rear_l",
        ),
        (
            ["configs/rear/rear_l.yaml", "training.max_train_steps=5"],
            "training.max_train_steps is written train.duration=5step.",
        ),
        (["configs/rear/rear_l.yaml", "model.generator.fnord=5"], "has no counterpart here."),
        ([toy("far"), "--zzzzz"], "error: there is no option --zzzzz; settings are key=value.\n"),
    ],
)
def test_old_words_are_translated(train_main, words, answer):
    code, _, err = train_main(*words)
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


# -- mistakes, through the command line -------------------------------------------------------------------------------
@pytest.fixture
def shards(tmp_path):
    """Six pictures of several modes in two shards."""
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
def test_mistakes_of_addresses_in_one_sentence(train_main, tmp_path, monkeypatch, overrides, message):
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "a.txt").write_text("no picture")
    with tarfile.open(tmp_path / "EMPTY" / "words.tar", "w") as tar:
        tar.add(tmp_path / "EMPTY" / "a.txt", "a.txt")
    given = [o.replace("EMPTY", f"{tmp_path}/EMPTY") for o in overrides]
    code, _, err = train_main(
        toy("dar_tokenizer"), *given, "train.device=cpu", f"work_dir={tmp_path}", f"data.cache_dir={tmp_path}/c"
    )
    assert code == 2 and re.search(message, err) and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    "what, message",
    [
        ("teacher", "teachers.dinov3.weights=nowhere.*no such file"),
        ("system", "tokenizer"),
        ("channels", "does not fit the latents"),
    ],
)
def test_mistakes_of_weights_in_one_sentence(
    train_main, tmp_path, monkeypatch, generator_run, tokenizer_run, what, message
):
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    common = ["train.device=cpu", f"work_dir={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache"]
    if what == "teacher":
        arguments = [
            TOY_TOKENIZER,
            "teachers.dinov3={weights: nowhere/model.safetensors}",
            "objective.weights.semantic=1",
        ]
    elif what == "system":
        (weights,) = generator_run.glob("checkpoints/step_00000020/generator.safetensors")
        arguments = [TOY_GENERATOR, f"tokenizer.weights={shutil.copy(weights, tmp_path / 'dit.safetensors')}"]
    else:
        arguments = [TOY_GENERATOR, f"tokenizer.weights={tokenizer_run}", "generator.channels=16"]
    code, _, err = train_main(*arguments, *common)
    assert code == 2 and re.search(message, err) and len(err.splitlines()) == 1, err


# -- wds:// and datasets://, killed and resumed -----------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "dataset"])
def test_any_address_survives_kills(request, tmp_path, kind):
    url = request.getfixturevalue(kind)
    (tmp_path / "runs").mkdir()
    arena = torture.Arena(
        toy("dar_tokenizer"),
        tmp_path / "runs",
        [*torture.PERIODS, f"data.url={url}", "data.val_url=null", "train.duration=12step"],
    )
    score = torture.survive_kills(arena, 1, seed=5)
    assert score.full and score.total == 1, str(score)


# -- the commands of the README ---------------------------------------------------------------------------------------
@pytest.mark.slow
def test_every_training_command_of_rectok(tmp_path, released_tokenizer):
    """Stage 1, stage 2 by the name of stage 1, generator by the name of stage 2, and from a released file (option B)."""
    common = [
        f"work_dir={tmp_path}",
        f"data.cache_dir={tmp_path}/cache",
        "train.device=cpu",
        "train.duration=2step",
        "data.url=embedded://emoji64",
        "data.split=val",
        "data.val_url=null",
    ]
    finetune = ["tokenizer.gamma=0.0", "tokenizer.mask_ratio=0.0", "tokenizer.train_decoder_only=true"]
    generator = ["generator.size.trunk_width=32"]
    commands = [
        ("run_train_tokenizer.sh", TOY_TOKENIZER, "name=stage1"),
        ("run_decoder_finetune_tokenizer.sh", "stage1", TOY_TOKENIZER, *finetune),
        ("run_train_diffusion.sh", "stage1_rectok_tokenizer", TOY_GENERATOR, *generator),
    ]
    for command in commands:
        done = shell(*command, *common)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    made = {p.name for p in tmp_path.iterdir() if (p / "checkpoints" / "latest").exists()}
    assert made == {"stage1", "stage1_rectok_tokenizer", "stage1_rectok_tokenizer_rectok_generator"}

    place = tmp_path / "tokenizer_training" / "rectok" / "checkpoints" / "latest.pth"  # mkdir and cp of the README
    place.parent.mkdir(parents=True)
    shutil.copy(released_tokenizer["weights"], place)
    done = shell("run_train_diffusion.sh", "rectok", TOY_GENERATOR, *common)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rectok_rectok_generator" / "checkpoints" / "latest").exists()


@pytest.mark.slow
def test_every_evaluation_command_of_rectok(tmp_path, tokenizer_run, generator_run):
    """WEIGHTS, and TOKENIZER GENERATOR AUTOGUIDANCE in their places; pictures are written, unguided and guided."""
    done = shell("run_eval_tokenizer.sh", tokenizer_run, "embedded://emoji64", "--num", 8, "--out", tmp_path / "eval")
    assert done.returncode == 0 and (tmp_path / "eval" / "metrics.json").is_file(), done.stderr
    done = shell(
        "run_eval_diffusion.sh",
        tokenizer_run,
        generator_run,
        generator_run,
        "--out",
        tmp_path / "dit",
        "sample.steps=4",
        "train.device=cpu",
        "--num",
        8,
        "--write",
        "npz",
    )
    assert done.returncode == 0, done.stderr
    made = {path.parent.name: np.load(path)["arr_0"] for path in (tmp_path / "dit").rglob("samples.npz")}
    assert set(made) == {"scale_1.29", "scale_1.0"} and all(a.shape == (8, 32, 32, 3) for a in made.values())


def test_the_default_recipes_need_no_argument(train_main):
    """`bash run_train_tokenizer.sh` and its kin name the published recipes; without ImageNet they say what is missing."""
    for stage in stages.STAGES:
        code, _, err = train_main(f"--stage={stage}", "--check", "train.device=cpu", "train.init_from=null")
        assert code == 2 and "data/imagenet/train" in err, err
    scripts = [ROOT / f"run_{name}.sh" for name in ("train_tokenizer", "decoder_finetune_tokenizer", "train_diffusion")]
    assert all(len(p.read_text().splitlines()) <= 15 and re.search(r"^exec ", p.read_text(), re.M) for p in scripts)


def test_commands_of_the_documentation_exist():
    text = (ROOT / "docs" / "rectok.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    for line in block.strip().splitlines():
        words = [re.sub(r"^scripts\.(\w+)$", r"scripts/\1.py", word) for word in line.split("#")[0].split()]
        files = [word for word in words if re.search(r"\.(sh|py|yaml)$", word)]
        assert files and all((ROOT / file).is_file() for file in files), line
    for name in re.findall(r"`([a-z/_]+\.(?:py|yaml))`", text):
        assert (ROOT / name).is_file() or (ROOT / "configs" / "rectok" / name).is_file(), name


def common(folder) -> list[str]:
    """Settings that keep a training in `folder`, on the CPU."""
    return [f"work_dir={folder}", f"data.cache_dir={folder}/cache", "train.device=cpu"]


@pytest.mark.slow
def test_tokenizer_tokens_generator_samples_metrics(runs, tmp_path, monkeypatch):
    """The whole path of every system whose generator models codes, by the scripts of its README."""
    monkeypatch.setenv("TESSERA_OFFLINE", "1")
    system, tokenizer, config = runs
    pair, settings = [config, f"tokenizer.weights={tokenizer}"], common(tmp_path)
    foreign = ("jsonl", tmp_path / "tokens.jsonl") if system == "rear" else ("official", tmp_path / "npy")
    crops = [] if system == "dar" else ["data.crop=ten"]
    exchange = [
        ("run_pretokenize.sh", *pair, "--out", tmp_path / "codes", "--to", *foreign, *settings),
        ("run_pretokenize.sh", *pair, *crops, "--import", foreign[1], "--out", tmp_path / "again", *settings),
    ]
    stored = "codes" if system == "dar" else "again"
    measured = [tmp_path / "run", "data.pictures=synthetic://?size=32&classes=4&count=48", "--num", 8]
    commands = [
        ("run_pretokenize.sh", *pair, *crops, "--out", tmp_path / "codes", *settings),
        *([] if system == "dar" else exchange),
        (
            "run_train_ar.sh",
            *pair,
            "name=run",
            "train.duration=2step",
            f"data.url=tokens://{tmp_path}/{stored}",
            *settings,
        ),
        ("run_sample.sh", tmp_path / "run", "--labels", "0,2", "--num", 2, "--out", tmp_path / "samples"),
        ("run_eval_generator.sh", *measured, "--out", tmp_path / "scores", "train.device=cpu"),
        ("run_eval_tokenizer.sh", tokenizer, "embedded://emoji64", "--num", 8, "--out", tmp_path / "rebuilt"),
    ]
    for command in commands:
        assert program(*command) == 0, command
    if system != "dar":
        assert np.array_equal(np.load(tmp_path / "codes" / "codes.npy"), np.load(tmp_path / "again" / "codes.npy"))
    for folder in ("scores", "rebuilt"):
        assert json.loads((tmp_path / folder / "metrics.json").read_text())["metrics"]
    with pytest.raises(UserError, match="trained on stored tokens .*data.pictures=folder"):
        evaluate_generator.main([str(tmp_path / "run"), "--num", "8", "--out", str(tmp_path / "none")])
    panels = ["--url", "embedded://emoji64", "--num", "2", "--out", str(tmp_path / "panels")]
    assert reconstruct.main(["--weights", str(tokenizer), *panels]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("runs", ["dar"], indirect=True)
def test_what_only_the_readme_of_dar_does(runs, tmp_path, shards):
    """Shards, finetuning, pictures encoded on the fly, previews, arrays of samples; one command from the shell."""
    _, tokenizer, config = runs
    train = [*common(tmp_path), "train.duration=2step"]
    commands = [
        (
            "run_train_tokenizer.sh",
            toy("dar_tokenizer"),
            "name=scratch",
            f"data.url={shards}",
            "data.val_url=null",
            *train,
        ),
        ("run_train_tokenizer.sh", toy("dar_tokenizer"), "name=tuned", f"train.init_from={tokenizer}", *train),
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
    ]
    for command in commands:
        assert program(*command) == 0, command
    done = shell("run_train_ar.sh", config, f"tokenizer.weights={tokenizer}", "name=fly", *train)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    fly, out = tmp_path / "fly", tmp_path / "generated"
    assert program("run_sample.sh", fly, "--labels", "0,2", "--num", 2, "--preview", "--out", tmp_path / "samples") == 0
    measure = [fly, "eval.protocol=dar", "--num", 8, "--write", "npz", "--out", out, "train.device=cpu"]
    assert program("run_eval_generator.sh", *measure) == 0
    finished = {path.name for path in tmp_path.iterdir() if (path / "checkpoints" / "latest").exists()}
    assert finished >= {"scratch", "tuned", "fly"} and (tmp_path / "samples" / "000001_2.webp").is_file()
    (array,) = out.rglob("*.npz")
    assert np.load(array)["arr_0"].shape == (8, 32, 32, 3)
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text())["metrics"]


# -- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("runs", ["fqgan", "rear"], indirect=True)
def test_export_says_what_its_layout_does_not(runs, tmp_path, capsys):
    system, tokenizer, _ = runs
    assert convert.main([str(tokenizer), str(tmp_path / "out.bin"), "--to", "official"]) == 0
    said = capsys.readouterr().out
    assert "What its tensors do not tell" in said and "groups 4" in said
    if system == "rear":  # a bare file has room for one set
        assert ", averaged weights." in said and "lecam_means" in said
    assert convert.main(["--describe", str(tmp_path / "out.bin")]) == 0
    assert "not in the file: " not in (said := capsys.readouterr().out) and "groups 4" in said
