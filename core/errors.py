"""The one exception that means "the user can fix this": scripts print its sentence and exit with code 2."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Raised with one clear message: what was given, what was expected, what to change. Never shows a traceback."""

    exit_code = 2


def in_short(error: Exception, lines: int = 3) -> str:
    """A library's message on one line: its first lines, and how many more there were."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = f" (and {len(said) - lines} lines more)" if len(said) > lines else ""
    return " ".join(said[:lines]) + more


def first_line(error: BaseException) -> str:
    """Of a library's message."""
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def brief(error: BaseException) -> str:
    """ "ConnectionError: no route to host", of an error of a library's."""
    return f"{type(error).__name__}: {first_line(error)}"


def where(error: BaseException) -> str:
    """ "tokenizer/vq/mine.py:35, TypeError: ...", the last line of our own code that an error passed; for who writes it."""
    import traceback

    place, root = "", str(Path(__file__).resolve().parent.parent)
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(root) and "site-packages" not in frame.filename:
            place = f"{frame.filename[len(root) + 1 :]}:{frame.lineno}, "
    return f"{place}{brief(error)}"


def plainly(error: Exception) -> str:
    """What went wrong with something that was read, in words for who made it: Python's own speak of our code."""
    if isinstance(error, KeyError) and error.args:
        return f'"{error.args[0]}" is missing'
    if isinstance(error, TypeError | AttributeError):
        return "something in it is of the wrong kind"
    if isinstance(error, IndexError):
        return "something in it is missing"
    if isinstance(error, UnicodeError):
        return "it holds bytes that are not UTF-8 text"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if match := re.fullmatch(r"invalid literal for int\(\) with base \d+: (.*)", str(error)):
        return f"{match[1]} is not a whole number"
    if match := re.fullmatch(r"could not convert string to float: (.*)", str(error)):
        return f"{match[1]} is not a number"
    return in_short(error) or type(error).__name__


# What other codebases call our settings.
_SYNONYMS = """
vocab: codebook_size vocab_size num_codes n_codes n_embed num_embeddings n_e codebook_num
code_dim: codebook_dim codebook_embed_dim embed_dim e_dim embedding_dim token_size codebook_width cvae z_dim
layers: n_layer n_layers num_layers num_hidden_layers num_blocks depth n_blocks
depth: n_layer n_layers num_layers num_hidden_layers num_blocks layers n_blocks
heads: n_head n_heads num_heads nhead num_attention_heads attention_heads
width: dim hidden_dim hidden_size n_embd d_model model_dim embed_dim model_width
hidden: ffn_dim intermediate_size mlp_dim hidden_dim d_ff
channels: ch z_channels latent_dim latent_channels in_channels token_channels
image_size: resolution img_size crop_size input_size image_resolution size
length: seq_len block_size max_seq_len num_tokens sequence_length num_latent_tokens num_latents
latents: num_latent_tokens num_latents latent_tokens length
num_classes: n_classes class_num nb_classes classes condition_num_classes
label_drop: class_dropout_prob cond_drop_rate cfg_dropout uncond_prob class_drop class_dropout label_dropout
dropout: resid_pdrop drop_rate drop residual_dropout p_dropout
branches: num_codebooks n_codebooks product_quant codebooks num_branches
scales: patch_nums v_patch_nums patch_sizes
lr: learning_rate learning_rate_init peak_lr max_lr
base_lr: blr base_learning_rate
min_lr: lr_min end_lr final_lr min_learning_rate
warmup: warmup_steps warmup_epochs warm_up num_warmup_steps lr_warmup
weight_decay: wd decay l2
grad_clip: clip_grad max_grad_norm clip gradient_clip gradient_clip_val grad_norm
betas: beta1 beta2 adam_beta1 adam_beta2 adam_betas
global_batch: batch_size total_batch_size global_batch_size bs batch train_batch_size
micro_batch: per_gpu_batch_size batch_size_per_gpu micro_batch_size gradient_accumulation_steps accum_iter
duration: epochs num_epochs max_steps total_steps iterations max_epochs max_train_steps num_steps n_epochs
ema: ema_decay ema_rate use_ema
precision: mixed_precision dtype amp fp16 bf16
workers: num_workers n_workers nworkers
url: data_path data_dir root dataset path data_root
val_url: val_path val_dir val_data val_root
checkpoint_every: save_every ckpt_every save_interval checkpoint_interval save_freq
eval_every: eval_interval val_every eval_freq validate_every
log_every: log_interval print_freq log_freq
preview_every: sample_every vis_every image_every
init_from: resume pretrained from_pretrained checkpoint ckpt ckpt_path resume_from finetune_from
weights: ckpt ckpt_path checkpoint checkpoint_path vq_ckpt model_path pretrained_path file
work_dir: output_dir save_dir out_dir logdir results_dir exp_dir output
name: exp_name run_name experiment
seed: global_seed random_seed manual_seed
scale: cfg cfg_scale guidance_scale guidance guidance_weight
steps: num_steps sampling_steps num_sampling_steps num_inference_steps nfe
temperature: temp tau
num_images: num_samples num_fid_samples n_samples num
compile: torch_compile use_compile
activation_checkpointing: gradient_checkpointing grad_checkpoint grad_checkpointing use_checkpoint
flip: hflip random_flip horizontal_flip
crop: random_crop crop_mode
wandb: use_wandb report_to
"""


def _meant(word: str) -> list[str]:
    """Our names for what others call `word`."""
    word = word.lower().replace("-", "_")
    table = (line.split(":") for line in _SYNONYMS.strip().splitlines())
    return [ours for ours, theirs in table if word in theirs.split()]


def nearest(word: object, choices, beyond: Iterable[str] = ()) -> str:
    """' Did you mean "x"?' for the choice that others call so, else for the closest one, or the list of choices when none
    is close.

    Args:
        beyond: dotted names of other places, for a word that is right there, or that others call so.
    """
    import difflib

    choices, meant = sorted(choices), _meant(str(word))
    close = [name for name in meant if name in choices]
    close += sorted((n for n in beyond if n.rpartition(".")[2] in (word, *meant)), key=lambda n: (n.count("."), n))
    close += difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" Known: {', '.join(choices)}." if choices else ""


def check_choice(setting: str, value: object, choices) -> None:
    """UserError with the nearest choice unless `value` is one of them."""
    if value not in choices:
        raise UserError(f'{setting} "{value}" is not known.{nearest(value, choices)}')


def lost_worker(error: BaseException) -> UserError | None:
    """What torch means by its RuntimeError about a decoding process that is gone; None for any other error."""
    said = f"{error} {error.__cause__ or error.__context__}"  # the signal is named by one of them
    if "DataLoader worker" not in said:
        return None
    how = next((f" ({word})" for word in ("Killed", "Bus error", "Segmentation fault") if word in said), "")
    advice = {
        " (Killed)": "The memory of this machine, or of the job, most likely ran out: ask for more of it, or set fewer "
        "decoding processes (data.workers, --workers)",
        " (Bus error)": "/dev/shm most likely ran out: set workers=0 (data.workers, --workers), or give the container more "
        "(docker run --shm-size=8g)",
    }.get(how, "Set workers=0 (data.workers, --workers) to see why")
    return UserError(f"a process that decodes pictures was ended by the system{how}. {advice}; then start again.")
