"""RecTok: tokenizer, generator, sampler and latent statistics. Its losses and teacher are in rectok_losses.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.images import to_uint8, to_unit_range
from core.nn.embed import sincos_2d
from core.specs import Guidance, Progress
from generator.dit import flow
from generator.dit.dit_dh import DiTDH
from generator.dit.flow import euler
from tests.parity import Case, kind
from tests.parity.fields import notes, reads
from tests.parity.recorded_draws import RecordedDraws
from tests.parity.rectok_losses import TEACHER, build_teacher
from tests.parity.rectok_models import GENERATOR, TOKENIZER, below, build_generator, build_tokenizer, teacher_names
from tokenizer.continuous.gaussian import Posterior
from tokenizer.continuous.rectok import RecTok
from tokenizer.continuous.stats import StatsAccumulator
from tokenizer.losses.objective import Objective

# Recorded input -> our name of the draw.
TOKENIZER_DRAWS = {
    "mask_ratio_draw": "mask_ratio",
    "mask_noise": "mask",
    "eps_posterior": "posterior",
    "t_draw": "time",
    "eps_noise": "noise",
}
GENERATOR_DRAWS = {"x0_noise": "noise", "t_draw": "time", "label_drop_draw": "label_drop", "z": "noise"}


def replay(case: Case, names: dict[str, str]) -> RecordedDraws:
    return RecordedDraws({ours: case.inputs[theirs] for theirs, ours in names.items() if theirs in case.inputs})


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Every gradient, and the norm over all of them."""
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads.values()]))
    return {"grad_norm": norm, **{f"grad/{name}": grad for name, grad in grads.items()}}


# -- tokenizer --------------------------------------------------------------------------------------------------------
def rope_table(transformer: nn.Module) -> Tensor:
    return torch.cat((transformer.rope_cos, transformer.rope_sin), dim=-1)[None]  # (1, N, 2d)


@kind("rectok", "tok_eval", TOKENIZER)
@torch.no_grad()
def tok_eval(case: Case) -> dict[str, Tensor]:
    tokenizer, draws, images = build_tokenizer(case).eval(), replay(case, TOKENIZER_DRAWS), case.inputs["x"]
    moments = tokenizer.precompute(images)
    posterior = Posterior(moments)
    out = {
        "encoder_z": moments,
        "posterior_parameters": moments,
        "posterior_mean": posterior.mean,
        "posterior_logvar": posterior.logvar,
        "posterior_std": posterior.std,
        "posterior_var": posterior.var,
        "posterior_kl": posterior.kl(),
        "posterior_sample": posterior.sample(case.inputs["eps_posterior"]),
        "z_latents": posterior.mean,
        "decoder_out": tokenizer.decoder(posterior.mean),
        "encoder_rope": rope_table(tokenizer.encoder),
        "decoder_rope": rope_table(tokenizer.decoder),
    }

    def pictures(latents: Tensor) -> Tensor:
        return to_unit_range(tokenizer.decode(latents), clamp=True)

    out["tokens_default_stats"] = tokenizer.encode(images)
    out["recon_default_stats"] = pictures(out["tokens_default_stats"])
    tokenizer.set_latent_stats(case.inputs["stats_mean"], case.inputs["stats_std"])
    out["tokens"] = tokenizer.encode(images)
    out["tokens_sampled"] = tokenizer.encode(images, draws)
    out["from_moments"] = tokenizer.from_stored(moments, draws)
    out["recon"] = pictures(out["tokens"])
    decoded = tokenizer.decode(case.inputs["z_gen"])
    out["image_from_latent"] = to_unit_range(decoded, clamp=True)
    out["image_uint8"] = to_uint8(decoded).permute(0, 2, 3, 1)
    return out


@kind(
    "rectok",
    "tok_train",
    TOKENIZER | TEACHER | reads("kl_weight sem_weight sem_loss_type") | notes("the outputs tell", "grads"),
)
def tok_train(case: Case) -> dict[str, Tensor]:
    args, images = case.config["args"], case.inputs["x"]
    tokenizer = build_tokenizer(case).train()
    objective = Objective(
        weights={"kl": case.config["kl_weight"], "semantic": case.config["sem_weight"]},
        semantic_loss=case.config.get("sem_loss_type", "cosine"),
        semantic_target={"rec+align": "all", "reconstruction": "masked"}[args.get("sem_target", "rec+align")],
    )
    features = {"dinov3": build_teacher(case)(images)} if "dinov3" in teacher_names(args) else {}
    recon = tokenizer(images, replay(case, TOKENIZER_DRAWS))
    loss = objective.generator_loss(images, recon, features, None, Progress(0, 1, 1, 0))
    loss.total.backward()

    details = recon.details
    out = {
        "decoded": recon.images,
        "kl": details["kl"],
        "loss": loss.total,
        "rec_loss": loss.logs["reconstruction"],
        "posterior_mean": details["posterior"].mean,
        "posterior_logvar": details["posterior"].logvar,
        "z_latents": details["latents"],
        "sem_input": details["semantic_input"],
        **gradients(tokenizer),
    }
    if features:
        out["sem_loss"] = loss.logs["semantic"]
    if details["kept"] is not None:
        out["ids_keep"], out["ids_restore"] = details["kept"], details["restore"]
        out["ids_masked"] = details["restore"].argsort(dim=1)[:, details["kept"].shape[1] :]
    only_masked = args.get("sem_target", "rec+align") == "reconstruction" and "ids_masked" in out

    def compared(tokens: Tensor) -> Tensor:
        """(B, N, D) as the official loss gets them: where it looks at masked tokens alone they are gathered before."""
        if not only_masked:
            return tokens
        return tokens.gather(1, out["ids_masked"][..., None].expand(-1, -1, tokens.shape[-1]))

    for index, teacher in enumerate(features):
        out[f"sem_feature_{index}"] = compared(features[teacher])
        out[f"pred_sem_feature_{index}"] = compared(recon.predictions[teacher])
    return out


@kind("rectok", "stats", TOKENIZER)
@torch.no_grad()
def stats(case: Case) -> dict[str, Tensor]:
    tokenizer: RecTok = build_tokenizer(case).eval()
    batches = [case.inputs[name] for name in sorted(case.inputs, key=lambda n: int(n.removeprefix("batch")))]
    collected = []
    for images in batches:  # one accumulator each, then merged, as ranks do
        accumulator = StatsAccumulator(tokenizer.channels)
        accumulator.update(tokenizer.precompute(images))
        collected.append(accumulator)
    for accumulator in collected[1:]:
        collected[0].merge(accumulator)
    result = collected[0].compute()
    tokenizer.set_latent_stats(result.mean, result.std)
    return {
        "channel_mean": result.channel_mean,
        "channel_std": result.channel_std,
        "single_mean": result.single_mean,
        "single_std": result.single_std,
        "tokens": tokenizer.encode(batches[0]),
    }


# -- generator --------------------------------------------------------------------------------------------------------
def pair_of_generators(case: Case) -> tuple[DiTDH, DiTDH | None]:
    """The model and the weaker one that guides it, if the fixture has one."""
    own = {name: tensor for name, tensor in case.weights.items() if not name.startswith("guide/")}
    guide = None
    if "guide_args" in case.config:
        guide = build_generator(case.config["guide_args"], below(case.weights, "guide/")).eval()
    return build_generator(case.config["args"], own).eval(), guide


@kind("rectok", "ddt_forward", GENERATOR | reads("cfg_scale cfg_interval"))
@torch.no_grad()
def ddt_forward(case: Case) -> dict[str, Tensor]:
    model, guide = pair_of_generators(case)
    x, t, y = (case.inputs[name] for name in ("x", "t", "y"))
    out = {
        "velocity": model.velocity(x, t, y),
        "velocity_uncond": model.velocity(x, t, model.y_embedder.null(y)),
        "t_emb": model.t_embedder(t),
        "y_emb": model.y_embedder(y),
        "pos_embed": sincos_2d(model.pos_embed.shape[-1], model.grid),  # built, where the model's is loaded
        "enc_rope_cos": model.trunk_cos,
        "enc_rope_sin": model.trunk_sin,
        "dec_rope_cos": model.head_cos,
        "dec_rope_sin": model.head_sin,
    }
    if guide is not None:
        out["guide_velocity"] = guide.velocity(x, t, y)
    scale = case.config.get("cfg_scale", 1.0)
    for suffix, interval in (("", (0.0, 1.0)), ("_interval", tuple(case.config.get("cfg_interval", (0.0, 1.0))))):
        guided = model.field(y, Guidance(scale, "cfg", interval))(x, t)
        out[f"cfg_out{suffix}"] = torch.cat((guided, guided))
        if guide is not None:
            out[f"autoguidance_out{suffix}"] = model.field(y, Guidance(scale, "auto", interval, guide))(x, t)
    return out


@kind("rectok", "ddt_train", GENERATOR | notes("the outputs tell", "grads"))
def ddt_train(case: Case) -> dict[str, Tensor]:
    model, _ = pair_of_generators(case)
    model.train()
    draws, latents, labels = replay(case, GENERATOR_DRAWS), case.inputs["x1"], case.inputs["y"]
    loss = model(latents, labels, draws).total
    loss.backward()
    with torch.no_grad():
        xt, t, ut = model.training_point(latents, draws)
        pred = model.velocity(xt, t, model.drop_labels(labels, draws))
    per_sample = (pred - ut).square().flatten(1).mean(1)
    return {"loss": loss, "loss_per_sample": per_sample, "t": t, "xt": xt, "ut": ut, "pred": pred, **gradients(model)}


@kind("rectok", "ddt_sample", GENERATOR | reads("cfg_list autoguidance_list cfg_interval"))
@torch.no_grad()
def ddt_sample(case: Case) -> dict[str, Tensor]:
    model, guide = pair_of_generators(case)
    draws, labels, steps = replay(case, GENERATOR_DRAWS), case.inputs["y"], case.config["args"]["num_sampling_steps"]
    times = flow.sampling_times(steps, model.time_shift)
    trajectory: list[Tensor] = []
    euler(model.field(labels[:1]), case.inputs["z"][:1], times, trajectory)
    out = {"time_grid": times, "trajectory_no_guidance": torch.stack(trajectory)}
    interval = tuple(case.config.get("cfg_interval", (0.0, 1.0)))
    runs = [("cfg", None, scale) for scale in case.config.get("cfg_list", [])]
    runs += [("auto", guide, scale) for scale in case.config.get("autoguidance_list", [])]
    for name, weaker, scale in runs:
        title = f"samples_{'autoguidance' if name == 'auto' else 'cfg'}{scale}"
        both = f"{title}_interval" in case.outputs  # recorded twice: on the whole range, then on the interval
        for suffix, where in (("", (0.0, 1.0) if both else interval), ("_interval", interval)):
            out[title + suffix] = model.sample(labels, draws, Guidance(scale, name, where, weaker), steps=steps)
    return out
