"""YAML files of the original programs: every key arrives in the run or is refused by name."""

from __future__ import annotations

import pytest
import torch

from core.errors import UserError
from run import translate
from run.load import TOKENIZERS, load_config, random_task
from tokenizer.adapters.imagefolder import ADAPTER

PLAIN_VQ = """vq_model: VQ-16
codebook_size: 4096
codebook_embed_dim: 32
product_quant: {branches}
v_patch_nums: [16]
num_latent_tokens: 256
semantic_guide: dinov2
codebook_drop: 0.1
start_drop: 3
commit_loss_beta: 0.5
share_quant_resi: 4
"""


def translated(tmp_path, text: str, *overrides: str, name: str = "theirs"):
    file = tmp_path / f"{name}.yaml"
    file.write_text(text)
    return load_config(*translate.translate(str(file), list(overrides)))


@pytest.mark.parametrize("branches, layout", [(2, "xqgan-VP2-4096"), (1, "XQGAN-4096")])
def test_one_scale_trains_the_plain_quantiser(tmp_path, branches, layout):
    """Whose tensors are those of the released files of that kind, and whose dropped pictures leave the contrast alone."""
    config = translated(tmp_path, PLAIN_VQ.format(branches=branches), name="VP2-4096")
    assert config.objective["weights"]["commitment"] == 0.5 and config.name == "VP2-4096"
    with torch.device("meta"):
        tokenizer = TOKENIZERS.build(
            {**config.tokenizer, "pretrained": False, "semantic": {"teachers": {"dinov2_patch16": 768}}}
        )
    assert (
        tokenizer.spec.length == 256 and tokenizer.spec.branches == branches and not tokenizer.quantizer.phi_weights()
    )
    names = {name for name in ADAPTER.restore(tokenizer) if name.startswith("quantize")}
    prefixes = ["quantize."] if branches == 1 else ["quantizes.0.", "quantizes.1."]
    assert names == {prefix + leaf for prefix in prefixes for leaf in ("embedding.weight", "ema_vocab_hit_SV")}


def test_keys_that_a_file_lacks_mean_what_they_mean_there(tmp_path, capsys):
    config = translated(tmp_path, "codebook_size: 8192\ncloud_save_path: .\n", name="mine")
    train = config.train
    assert (train.schedule.kind, train.schedule.warmup, train.ema) == ("constant", "0ep", [])
    assert (train.discriminator.schedule.kind, train.discriminator.schedule.warmup_from) == ("constant", "0ep")
    assert (config.work_dir, config.name) == (".", "mine")
    said = capsys.readouterr().out
    assert (
        "mine.yaml is a file of ImageFolder" in said
        and "not in it, so as in the recipe: " in said
        and "disc_type" in said
    )
    both = translated(
        tmp_path,
        "codebook_size: 8192\nlr_scheduler: cosine\nema: true\ndisc_epoch_start: 20\ncloud_save_path: out/exp\n",
    )
    assert (both.train.schedule.kind, both.train.ema, both.objective["gan_start"]) == ("cosine", [0.9999], "20ep")
    assert both.train.discriminator.schedule.warmup_from == both.train.discriminator.schedule.decay_start == "20ep"
    assert (both.work_dir, both.name) == ("out", "exp")


@pytest.mark.parametrize(
    "key, accepted",
    [
        ("aug_fade_steps: -1", ("augment", "fade", "never")),
        ("aug_fade_steps: 0", ("augment", "fade", "0step")),
        ("aug_fade_steps: 10", ("augment", "fade", "11step")),
        ("disc_weight: 0.3", ("weights", "gan", 0.3)),
        ("disc_loss: non-saturating", ("discriminator_loss", None, "vanilla")),
        ("lecam_loss_weight: 0.01", ("lecam", None, 0.01)),
        ("commit_loss_beta: 0.25", ("weights", "commitment", 0.25)),
        ("sem_loss_weight: 0.2", ("weights", "contrast", 0.2)),
    ],
)
def test_settings_of_the_objective_arrive(tmp_path, key, accepted):
    section, leaf, value = accepted
    objective = translated(tmp_path, f"codebook_size: 4096\n{key}\n").objective
    assert (objective[section] if leaf is None else objective[section][leaf]) == value


@pytest.mark.parametrize(
    "key",
    [
        "abs_pos_embed: false",
        "detail_guide: sam",
        "guide_type_1: patch",
        "guide_type_2: patch",
        "norm_type: gn",
        "disc_reinit: 10",
        "commit_loss_beta: 1.0",
        "lr_scheduler: step",
        "entropy_loss_ratio: 0.1",
        "disc_cr_loss_weight: 4.0",
        "enc_type: cnn",
        "vq_model: VQ-8",
        "mixed_precision: fp16",
        "num_latent_tokens: 256",
        "disc_type: samdisc",
        "no_such_key: 1",
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, key):
    with pytest.raises(UserError, match=rf"ImageFolder that must be said in another way(.|\n)*- {key.split(':')[0]}: "):
        translated(tmp_path, f"codebook_size: 4096\nv_patch_nums: [1, 1, 2, 3, 3, 4, 5, 6, 8, 11]\n{key}\n")


def test_a_setting_of_the_user_stands_in_for_a_refused_key(tmp_path):
    config = translated(tmp_path, "codebook_size: 4096\ncommit_loss_beta: 1.0\n", "objective.weights.commitment=1.0")
    assert config.objective["weights"]["commitment"] == 1.0


DAR_V1 = """model: {encoder_patch_size: 16, num_encoder_layers: 8, num_decoder_layers: 8, query_low_rank: true, encoder_dim: 768,
  decoder_dim: 768, vq_dim: 8, vq_codebook_size: 16384, num_denoising_steps: 8, num_query_groups: 8, num_all_queries: 256,
  queries_per_step: 32, vq_enable: true, diff_decoder: {in_dim: 3, out_dim: 3, dim: 768, cond_dim: 768, patch_size: 8, depth: 12,
  data_std: 0.6, time_shift: 2, mlp_head: false, share_time_encoding: false}}
"""


META = torch.device("meta")


def test_a_file_of_dar_is_its_tokenizer(tmp_path):
    """The published one builds the tensors of the recipe; others arrive, and what does not fit is named."""
    shapes = [
        {name: value.shape for name, value in random_task(config, META).tokenizer.state_dict().items()}
        for config in (translated(tmp_path, DAR_V1), load_config("configs/dar/tokenizer.yaml", []))
    ]
    assert shapes[0] == shapes[1]
    other = translated(
        tmp_path, DAR_V1.replace("num_query_groups: 8", "num_query_groups: 16").replace("data_std: 0.6, ", "")
    )
    assert other.tokenizer["groups"] == 16 and other.tokenizer["decoder"]["data_std"] == 1.0  # its default
    with pytest.raises(UserError, match="cond_dim: 512 does not fit the other keys, by which it is 768"):
        translated(tmp_path, DAR_V1.replace("cond_dim: 768", "cond_dim: 512"))


REAR_L = """experiment: {project: rear, name: rear-b, output_dir: temp/rear_l, save_every: 50000}
model:
  vq_model: {model_type: maskgitvq, codebook_size: 1024}
  generator: {hidden_size: 1024, num_hidden_layers: 24, num_attention_heads: 16, intermediate_size: 4096, guidance_scale: 15.0,
    guidance_scale_pow: 2.5, perturb_mode: switch, randomness_anneal_start: 0, randomness_anneal_end: 187500,
    encode_align_layer_idx: 0, decode_align_layer_idx: 18}
dataset: {params: {pretokenization: codes.jsonl}, preprocessing: {random_crop: false, random_flip: true}}
optimizer: {params: {learning_rate: 4e-4, beta1: 0.9, beta2: 0.96, weight_decay: 0.03}}
lr_scheduler: {scheduler: cosine, params: {warmup_steps: 62500, end_lr: 1e-5}}
training: {gradient_accumulation_steps: 2, per_gpu_batch_size: 128, mixed_precision: "no", max_train_steps: 250000, use_ema: false}
"""


def test_a_file_of_rear_is_its_recipe(tmp_path):
    with pytest.raises(
        UserError, match="pretokenization: codes.jsonl: once run_pretokenize.sh .*data.url=tokens://DIR"
    ):
        translated(tmp_path, REAR_L)
    config = translated(tmp_path, REAR_L, "data.url=tokens://codes")
    recipe = load_config("configs/rear/rear_l.yaml", [])
    assert config.train.optimizer == recipe.train.optimizer and config.train.schedule == recipe.train.schedule
    assert (config.train.global_batch, config.train.duration) == (
        2048,
        "250000step",
    ) and config.train.precision == "fp32"
    assert config.sample == recipe.sample and config.data.crop == recipe.data.crop
    assert config.generator["size"] == {"width": 1024, "layers": 24, "heads": 16, "hidden": 4096}
    assert {key: config.generator["rear"][key] for key in recipe.generator["rear"]} == recipe.generator["rear"]
    assert (config.work_dir, config.name) == ("temp", "rear_l")
