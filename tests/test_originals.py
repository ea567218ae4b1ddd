"""Every answer of scripts/originals.toml, given back to the program that it is for, is accepted and arrives there."""

from __future__ import annotations

import argparse
import functools
import importlib
import re

import pytest
from omegaconf import OmegaConf

import assemble
import flags
from core import config as config_module
from core.config import to_plain
from core.errors import UserError
from tests.conftest import ROOT

RECIPES = {"rectok": ("rectok/tokenizer", "rectok/ditdh_xl"), "fqgan": ("fqgan/dual_ds16", "fqgan/far_b_dual"),
           "rear": ("rear/vqgan_plus_tokenizer", "rear/rear_b"), "dar": ("dar/tokenizer", "dar/ar_l"),
           "imagefolder": ("imagefolder/ms_pq2_4096", "imagefolder/var_d17")}
SCRIPTS = {"run_sample.sh": "sample", "run_eval_generator.sh": "evaluate_generator", "run_eval_tokenizer.sh": "evaluate",
           "run_pretokenize.sh": "pretokenize", "run_make_reference.sh": "make_reference", "run_linear_probe.sh": "linear_probe"}
# What users write where a number will not do.
EXAMPLES = {
    "vit_enc_model_size": "large", "vit_dec_model_size": "large", "vit_sem_model_size": "small", "mask_ratio_min": "-0.1",
    "label_drop_prob": "0.2", "encoder_model": "vit_large_patch14_dinov2.lvd142m", "decoder_model": "small", "stats_key": "rectok",
    "v_patch_nums": ["1", "2", "4"], "beta1": "0.8", "beta2": "0.99", "gpt_ckpt": "a.pt", "num_sampling_steps": "50",
    "ema_rate": "0.99", "cfg_interval": "10", "crop_range": "1.05", "randomness_anneal_start": "1000",
    "randomness_anneal_end": "2000", "top_p": "0.5", "start_drop": "2", "aug_fade_steps": "10", "mask_ratio": "0.5",
    "clip_norm": "true", "compile": "true", "disc_adaptive_weight": "false", "use_checkpoint": "true", "enable_wandb": "true",
    "random_flip": "false", "query_low_rank": "false", "vq_enable": "false", "mlp_head": "true", "grad_checkpointing": "true",
    "class_label_dropout": "0.2", "dropout": "0.2", "dropout_p": "0.2", "token_dropout_p": "0.2", "drop_path_rate": "0.2",
    "attn_drop": "0.2", "foundation_model_type": "dinov2,siglip", "sche": "lin0.8", "pg": "0.8", "mid_reso": "1.125",
    "learning_rate": "0.5", "output_dir": "temp/rear_l", "cloud_save_path": "output/exp-xx", "load_from": "temp/a.pt",
    **dict.fromkeys(("data_path", "val_data_path", "entity", "project", "results_dir", "vq_ckpt", "sample_dir",
                     "load_tokenizer_from", "stats_cache_path", "cached_path", "load_auto_guidance_from", "fid_stats_path",
                     "code_path", "folder_name", "tokenizer_ckpt", "vae_ckpt", "infer_ckpt", "tokenizer_checkpoint",
                     "generator_checkpoint", "train_shards_path_or_url", "eval_shards_path_or_url", "pretokenization",
                     "config", "resume_from", "local_out_dir_path"), "some/place"),
    "exp_name": "mine", "name": "mine",
}


def entries():
    """(system, part, word, value as a user gives it, answer) of the whole file."""
    for system in (*flags.SYSTEMS, "launch"):
        for part, words in flags.DATA[system].items():
            if not isinstance(words, dict) or part == "defaults":
                continue
            for word, entry in words.items():
                name = word.split(".")[-1]
                example = EXAMPLES.get(name, "1")
                if isinstance(entry, str):
                    yield system, part, word, example, entry
                    continue
                for value, answer in entry.items():
                    yield system, part, word, (example if example not in entry else "7") if value == "*" else value, answer


ALL = list(entries())


def programs_of(part: str) -> list[str]:
    if part == "one_scale":
        return ["tokenizer"]
    return [name for name, program in flags.PROGRAMS.items() if part in (*program["parts"], "common")]


@functools.cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser that a program makes."""
    caught = []

    def catch(parser, *_):
        caught.append(parser)
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "parse", catch)
        with pytest.raises(StopIteration):
            importlib.import_module(program).main([])
    return caught[0]


@functools.cache
def recipe(name: str):
    return config_module._read_yaml(ROOT / "configs" / f"{name}.yaml")


def load(name: str, overrides: list[str]) -> dict:
    return to_plain(config_module.override(lambda: recipe(name), overrides, assemble.REGISTRIES, name))


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
    for key, value in flags.flatten(OmegaConf.to_container(OmegaConf.from_dotlist(settings))).items():
        if key.startswith("teachers."):  # false takes one of the recipe's away
            assert (key.removeprefix("teachers.") in plain["teachers"]) == (value is not False)
            continue
        place = plain
        for part in key.split("."):
            place = place[part] if place else place
        assert place == value or (key, value) == ("teachers", None) and not place, (key, place, value)


def check_option(program: str, option: str, values: list[str]) -> None:
    action = parser_of(program)._option_string_actions[option]
    wanted = action.nargs if isinstance(action.nargs, int) else 0 if action.nargs in ("?", 0) and not values else 1
    assert len(values) == wanted, (option, values)
    for value in values:
        value = (action.type or str)(value)
        assert action.choices is None or value in action.choices, (option, value)


def check_typed(words: list[str], system: str, program: str) -> None:
    """Words of one answer: a command, a file, or settings and options of `program`."""
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
    names = {**flags.DATA[system].get("defaults", {}), word.split(".")[-1]: value}
    programs = programs_of(part)
    assert programs or system == "rear" and part == "yaml", f"[{system}.{part}] is looked into by no program"
    for piece in flags.pieces(answer):
        typed = flags.fill(piece, value, names)
        if len(typed) == 1 and "=" not in typed[0] and not typed[0].endswith((".sh", ".py", ".yaml")):
            if not typed[0].startswith("--"):  # the name of a setting in a sentence
                typed = [f"{typed[0]}={shown(system, typed[0])}"]
        for program in programs:
            if program != "convert" or part != "common":
                check_typed(typed, system if system != "launch" else "rectok", program)


def shown(system: str, key: str):
    """Any value that a setting can have: the one of the recipe."""
    for name in RECIPES[system]:
        place = load(name, [])
        for part in key.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        if place is not None:
            return flags.shown_value(place)
    raise AssertionError(f"there is no setting {key}")
