"""Every answer of run/translate.toml, given back to the program that it is for, is accepted and arrives there."""

from __future__ import annotations

import argparse
import functools
import importlib
import re

import pytest
from omegaconf import OmegaConf

from core import config as config_module
from core.config import to_plain
from core.errors import UserError
from run import translate
from run.load import REGISTRIES
from scripts import command_line
from tests.conftest import ROOT

RECIPES = {
    "rectok": ("rectok/tokenizer", "rectok/ditdh_xl"),
    "fqgan": ("fqgan/dual_ds16", "fqgan/far_b_dual"),
    "rear": ("rear/vqgan_plus_tokenizer", "rear/rear_b"),
    "dar": ("dar/tokenizer", "dar/ar_l"),
    "imagefolder": ("imagefolder/ms_pq2_4096", "imagefolder/var_d17"),
}
SCRIPTS = {
    "run_sample.sh": "sample",
    "run_eval_generator.sh": "evaluate_generator",
    "run_eval_tokenizer.sh": "evaluate",
    "run_pretokenize.sh": "pretokenize",
    "run_make_reference.sh": "make_reference",
    "run_linear_probe.sh": "linear_probe",
}
# What users write where a number will not do.
EXAMPLES = {
    "vit_enc_model_size": "large",
    "vit_dec_model_size": "large",
    "vit_sem_model_size": "small",
    "mask_ratio_min": "-0.1",
    "label_drop_prob": "0.2",
    "encoder_model": "vit_large_patch14_dinov2.lvd142m",
    "decoder_model": "small",
    "stats_key": "rectok",
    "v_patch_nums": ["1", "2", "4"],
    "beta1": "0.8",
    "beta2": "0.99",
    "gpt_ckpt": "a.pt",
    "num_sampling_steps": "50",
    "ema_rate": "0.99",
    "cfg_interval": "10",
    "crop_range": "1.05",
    "randomness_anneal_start": "1000",
    "randomness_anneal_end": "2000",
    "top_p": "0.5",
    "start_drop": "2",
    "aug_fade_steps": "10",
    "mask_ratio": "0.5",
    "clip_norm": "true",
    "compile": "true",
    "disc_adaptive_weight": "false",
    "use_checkpoint": "true",
    "enable_wandb": "true",
    "random_flip": "false",
    "query_low_rank": "false",
    "vq_enable": "false",
    "mlp_head": "true",
    "grad_checkpointing": "true",
    "class_label_dropout": "0.2",
    "dropout": "0.2",
    "dropout_p": "0.2",
    "token_dropout_p": "0.2",
    "drop_path_rate": "0.2",
    "attn_drop": "0.2",
    "foundation_model_type": "dinov2,siglip",
    "sche": "lin0.8",
    "pg": "0.8",
    "mid_reso": "1.125",
    "learning_rate": "0.5",
    "output_dir": "temp/rear_l",
    "cloud_save_path": "output/exp-xx",
    "load_from": "temp/a.pt",
    **dict.fromkeys(
        (
            "data_path",
            "val_data_path",
            "entity",
            "project",
            "results_dir",
            "vq_ckpt",
            "sample_dir",
            "load_tokenizer_from",
            "stats_cache_path",
            "cached_path",
            "load_auto_guidance_from",
            "fid_stats_path",
            "code_path",
            "folder_name",
            "tokenizer_ckpt",
            "vae_ckpt",
            "infer_ckpt",
            "tokenizer_checkpoint",
            "generator_checkpoint",
            "train_shards_path_or_url",
            "eval_shards_path_or_url",
            "pretokenization",
            "config",
            "resume_from",
            "local_out_dir_path",
        ),
        "some/place",
    ),
    "exp_name": "mine",
    "name": "mine",
}


def entries():
    """(system, part, word, value as a user gives it, answer) of the whole file."""
    for system in (*translate.SYSTEMS, "launch"):
        for part, words in translate.DATA[system].items():
            if not isinstance(words, dict) or part == "defaults":
                continue
            for word, entry in words.items():
                name = word.split(".")[-1]
                example = EXAMPLES.get(name, "1")
                if isinstance(entry, str):
                    yield system, part, word, example, entry
                    continue
                for value, answer in entry.items():
                    yield (
                        system,
                        part,
                        word,
                        (example if example not in entry else "7") if value == "*" else value,
                        answer,
                    )


ALL = list(entries())


def programs_of(part: str) -> list[str]:
    if part in ("one_scale", "pretokenized"):  # of YAML files
        return ["tokenizer"]
    return [name for name, program in translate.PROGRAMS.items() if part in (*program["parts"], "common")]


@functools.cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser that a program makes."""
    caught = []

    def catch(parser, *_):
        caught.append(parser)
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "parse", catch)
        with pytest.raises(StopIteration):
            importlib.import_module(f"scripts.{program}").main([])
    return caught[0]


@functools.cache
def recipe(name: str):
    return config_module._read_yaml(ROOT / "configs" / f"{name}.yaml")


def load(name: str, overrides: list[str]) -> dict:
    return to_plain(config_module.override(lambda: recipe(name), overrides, REGISTRIES, name))


def check_settings(settings: list[str], system: str, program: str) -> None:
    """They load together, and every value is in the configuration."""
    if program in ("evaluate", "reconstruct", "make_reference", "linear_probe"):
        assert all(word.startswith("eval.") for word in settings), settings
    tokenizer, generator = RECIPES[system]
    whole = generator if program not in ("tokenizer", "evaluate") or system == "rear" else tokenizer
    extra = []
    if any(word.startswith("generator.size.") for word in settings):  # the four of a size come together
        extra = ["generator.size={width: 64, layers: 2, heads: 2, hidden: 64}"]
    if any(word.startswith("generator.progressive.") for word in settings):
        extra = ["generator.progressive={}"]
    if "sample.guidance=auto" in settings:
        extra = ["sample.guide=x"]
    if any("train.schedule.kind=exponential" in word or "kind=bent" in word for word in settings):
        extra += ["train.schedule.min_lr=1e-6"]
    plain = load(whole, [*extra, *settings])
    for key, value in translate.flatten(OmegaConf.to_container(OmegaConf.from_dotlist(settings))).items():
        if key.startswith("teachers."):  # false takes one of the recipe's away
            assert (key.removeprefix("teachers.") in plain["teachers"]) == (value is not False)
            continue
        place = plain
        for part in key.split("."):
            place = place[part] if place else place
        assert place == value or ((key, value) == ("teachers", None) and not place), (key, place, value)


def check_option(program: str, option: str, values: list[str]) -> None:
    action = parser_of(program)._option_string_actions[option]
    wanted = action.nargs if isinstance(action.nargs, int) else 0 if action.nargs in ("?", 0) and not values else 1
    assert len(values) == wanted, (option, values)
    for value in values:
        value = (action.type or str)(value)
        assert action.choices is None or value in action.choices, (option, value)


def check_typed(words: list[str], system: str, program: str) -> None:
    """Words of one answer: a command, a file, or settings and options of `program`."""
    if words[:2] == ["python", "-m"]:
        words = [f"{words[2].replace('.', '/')}.py", *words[3:]]
    if words[0].endswith((".sh", ".py", ".yaml")):
        assert (ROOT / words[0]).is_file(), words[0]
        program = SCRIPTS.get(words[0], program)
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))
        first = next((i for i, word in enumerate(words) if word.startswith("--") or "=" in word), len(words))
        words = words[first:]
    settings, place = [], 0
    while place < len(words):
        values = []
        if words[place].startswith("--"):
            while place + 1 + len(values) < len(words) and not words[place + 1 + len(values)].startswith("--"):
                values.append(words[place + 1 + len(values)])
            check_option(program, words[place], values)
        else:
            assert re.match(r"[a-z_]+(\.\w+)*=", words[place]), f"{words[place]} cannot be typed"
            settings.append(words[place])
        place += 1 + len(values)
    if settings:
        check_settings(settings, system, program)


@pytest.mark.parametrize("system, part, word, value, answer", ALL, ids=["-".join(map(str, entry[:4])) for entry in ALL])
def test_every_answer_is_accepted(system, part, word, value, answer):
    names = {**translate.DATA[system].get("defaults", {}), word.split(".")[-1]: value}
    programs = programs_of(part)
    assert programs, f"[{system}.{part}] is looked into by no program"
    for piece in translate.pieces(answer):
        typed = translate.fill(piece, value, names)
        word = typed[0]
        typeable = "=" in word or word.startswith("--") or word.endswith((".sh", ".py", ".yaml"))
        if len(typed) == 1 and not typeable:  # the name of a setting in a sentence
            typed = [f"{word}={shown(system, word)}"]
        for program in programs:
            if program != "convert" or part != "common":
                check_typed(typed, system if system != "launch" else "rectok", program)


def test_files_are_ours():
    for theirs, ours in translate.FILES.items():
        assert (ROOT / ours).is_file() or ours in translate._released(), (theirs, ours)


def shown(system: str, key: str):
    """Any value that a setting can have: the one of the recipe."""
    for name in RECIPES[system]:
        place = load(name, [])
        for part in key.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        if place is not None:
            return translate.shown_value(place)
    raise AssertionError(f"there is no setting {key}")


# ---------------------------------------------------------------------------------------------------------------------
# The commands of the READMEs of the originals, with our program of the same purpose
# ---------------------------------------------------------------------------------------------------------------------
VIT, SCALES = "vit_base_patch14_dinov2.lvd142m", "1 1 2 3 3 4 5 6 8 11"
VAR_WORDS = (
    f"--encoder_model {VIT} --decoder_model {VIT} --product_quant 2 --semantic_guide dinov2 --num_latent_tokens 121 "
    f"--v_patch_nums {SCALES} --pn {SCALES.replace(' ', '_')} --patch_size 11 --sem_half True"
)
COMMANDS = [
    # FQGAN
    (
        "make_reference",
        "--data-path /DATA/ImageNet/val --image-size 256 --per-proc-batch-size 128",
        ["run_make_reference.sh folder:///DATA/ImageNet/val", "--size 256", "--batch 128"],
    ),
    (
        "evaluate",
        "--data-path /DATA/ImageNet/val --image-size 256 --vq-model VQ-16 --vq-ckpt results/fqgan_dual_ds16.pt "
        "--codebook-size 16384 --codebook-embed-dim 8 --per-proc-batch-size 128 --with_clip_supervision --folder-name FQGAN_Dual_DS16",
        [
            "run_eval_tokenizer.sh WEIGHTS folder:///DATA/ImageNet/val",
            "run_eval_tokenizer.sh results/fqgan_dual_ds16.pt",
            "--vq-model VQ-16: the weights know",
            "--codebook-size 16384: the weights",
            "--batch 128",
            "--with_clip_supervision: the weights know whether they have it",
            "is written --out FQGAN_Dual_DS16",
        ],
    ),
    (
        "evaluate_generator",
        "reconstructions/val_imagenet.npz reconstructions/FQGAN_Dual_DS16.npz",
        [
            "run_eval_tokenizer.sh --original reconstructions/val_imagenet.npz --reconstructed reconstructions/FQGAN_Dual_DS16.npz"
        ],
    ),
    (
        "evaluate",
        "reconstructions/val_imagenet.npz reconstructions/FQGAN_Dual_DS16.npz",
        ["--original reconstructions/val_imagenet.npz --reconstructed reconstructions/FQGAN_Dual_DS16.npz"],
    ),
    # reAR
    (
        "train",
        "--num_machines=1 --num_processes=8 --machine_rank=0 --main_process_ip=127.0.0.1 --main_process_port=9999 --same_network "
        "config=configs/rear_l.yaml experiment.entity=me experiment.output_dir=temp/rear_l",
        [
            "run_train_ar.sh configs/rear/rear_l.yaml",
            "log.wandb_entity=me",
            "work_dir=temp name=rear_l",
            "NPROC=N",
            "NNODES",
        ],
    ),
    (
        "sample",
        "--nnodes=1 --nproc_per_node=8 --rdzv-endpoint=localhost:19999 config=configs/training/generator/rear_l.yaml "
        "experiment.output_dir=rear_l experiment.generator_checkpoint=path/to/checkpoint",
        ["experiment.output_dir is written --out rear_l", "run_sample.sh path/to/checkpoint", "NPROC=N"],
    ),
    (
        "sample",
        "ckpt/rear_l.safetensors --tokenizer ckpt/maskgitvq.bin --labels 207 --out samples",
        ["there is no ckpt/rear_l.safetensors here", "bash run_download.sh reAR-L.safetensors fetches."],
    ),
    (
        "pretokenize",
        "configs/rear/rear_b.yaml --import dataset/pretokenized/maskgitvq.jsonl --out codes",
        ["bash run_download.sh maskgitvq.jsonl fetches."],
    ),
    (
        "evaluate_generator",
        "VIRTUAL_imagenet256_labeled.npz rear_l.npz",
        ["run_eval_generator.sh rear_l.npz eval.reference=VIRTUAL_imagenet256_labeled.npz"],
    ),
    # D-AR; the last is what sample_dar.sh does
    (
        "train",
        "--stage=tokenizer configs/dar/tokenizer.yaml --vq-ckpt temp/tokenizer_v1.pt",
        ["--vq-ckpt temp/tokenizer_v1.pt is written train.init_from=temp/tokenizer_v1.pt."],
    ),
    (
        "train",
        "--stage=tokenizer configs/dar/tokenizer.yaml --data-path wds://shards/a-{00..03}.tar",
        ["is written data.url=wds://shards/a-{00..03}.tar."],
    ),
    (
        "train",
        "--stage=tokenizer configs/tokenizer_v1.yaml",
        ["there is no configs/tokenizer_v1.yaml here", "configs/dar/tokenizer.yaml"],
    ),
    (
        "sample",
        "--gpt-model GPT-L --gpt-ckpt temp/D-AR-L-360K.pt --tokenizer-config configs/tokenizer_v1.yaml --tokenizer-ckpt "
        "temp/tokenizer_v1.pt --cfg-scale 4.0 --top-k 0 --seed 2 --preview 8 --label 207",
        [
            "run_sample.sh temp/D-AR-L-360K.pt",
            "tokenizer.weights=temp/tokenizer_v1.pt",
            "sample.scale=4.0",
            "sample.top_k=0",
            "--preview alone shows",
            "--labels 207",
        ],
    ),
    # ImageFolder
    ("train", "--stage=tokenizer --config configs/tokenizer.yaml", ["configs/imagefolder/ms_pq2_4096.yaml"]),
    (
        "train",
        "--stage=tokenizer configs/tokenizer.yaml",
        ["there is no configs/tokenizer.yaml", "configs/imagefolder/ms_pq2_4096.yaml"],
    ),
    (
        "linear_probe",
        "--config configs/tokenizer.yaml",
        ["run_linear_probe.sh imagenet-4096.pt folder://data/imagenet"],
    ),
    (
        "train",
        "--stage=var --bs=768 --alng=1e-4 --fp16=1 --alng=1e-4 --wpe=0.01 --tblr=8e-5 --data_path /ssd/ImageNet2012/ "
        f"{VAR_WORDS} --vae_ckpt ckpt.pt",
        [
            "train.global_batch=768",
            "generator.gamma_init=1e-4",
            "train.precision=bf16",
            "train.schedule.min_lr=2.4e-06",
            "train.optimizer.base_lr=8e-5",
            "data.url=folder:///ssd/ImageNet2012/",
            f"--v_patch_nums {SCALES}: the weights know",
            "--patch_size 11: it only names the logs",
            "tokenizer.weights=ckpt.pt",
            "--sem_half True: it had no effect",
        ],
    ),
    (
        "sample",
        f"--infer_ckpt ckpt.pt --data_path ImageNet {VAR_WORDS} --cfg 3.25 3.25 --top_k 750 --top_p 0.95",
        [
            "run_sample.sh ckpt.pt",
            "--cfg 3.25 3.25 is written sample.scale=[4.25,4.25] sample.schedule=linear sample.start=1",
            "sample.top_k=750",
            "sample.top_p=0.95",
            "--labels chooses classes",
        ],
    ),
    (
        "evaluate_generator",
        f"--infer_ckpt ckpt.pt --data_path ImageNet {VAR_WORDS} --cfg 3.25 3.25 --top_k 750 --top_p 0.95",
        ["run_eval_generator.sh ckpt.pt", "sample.scale=[4.25,4.25]", "eval.labels=val"],
    ),
]


OURS = ("--stage", "--seed", "--tokenizer", "--labels", "--out", "--import")


@pytest.mark.parametrize("program, words, answers", COMMANDS, ids=[f"{i}-{c[0]}" for i, c in enumerate(COMMANDS)])
def test_commands_of_the_readmes_are_answered(program, words, answers):
    """Every word of theirs in one sentence, and nothing of another system's."""
    with pytest.raises(UserError) as refused:
        importlib.import_module(f"scripts.{program}").main(words.split())
    said = str(refused.value)
    assert "\n" not in said and all(answer in said for answer in answers), said
    for word in re.findall(r"--[\w-]+", words):
        assert word in said or word in OURS, (word, said)
    assert "is a word of" not in said and "there is no option" not in said
