"""Fixtures of D-AR's tokenizer: encoding, decoding with previews, training losses, quantiser, diffusion core."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from core.images import to_uint8
from core.nn.embed import sinusoidal
from core.specs import Progress
from tests.parity import Case, kind
from tests.parity.dar_models import CORE, FEATURES, SMALL, TOKENIZER, build_core, build_tokenizer
from tests.parity.fields import FieldError, notes, reads
from tests.parity.recorded_draws import RecordedDraws
from tokenizer.losses.objective import Objective
from tokenizer.vq.quantizer import VectorQuantizer


def channels_first(vectors: Tensor) -> Tensor:
    """(B, N, D) -> the official (B, D, 1, N)."""
    return vectors.transpose(1, 2)[:, :, None]


def painted_size(tokenizer, options, noise: Tensor) -> tuple[int, int]:
    """(H, W) that is painted where `options` ask for a size: at least the sampling resolution."""
    least = tokenizer.sampling_size
    drawn = zip(("height", "width"), noise.shape[-2:])
    size = tuple(max(least, options.get(name, side)) for name, side in drawn)
    if size != tuple(noise.shape[-2:]):
        raise FieldError(f"height and width make a picture of {size}, but the noise is {tuple(noise.shape[-2:])}")
    return size


def alike(image: Tensor, other: Tensor) -> bool:
    """But for rounding, which the solver's steps carry on and which is as large as the largest value lets it be."""
    return bool((image - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=0.1))


def images_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H, W, 3) as the official script writes them."""
    return to_uint8(images, "plus128").permute(0, 2, 3, 1)


@kind("dar", "tok_encode", TOKENIZER | notes("of decoding", "model.sampling_resolution model.output_resolution"))
def tok_encode(case: Case) -> dict[str, Tensor]:
    images = case.inputs["image"]
    tokenizer = build_tokenizer(case.config, case.weights, images.shape[-1]).eval()
    seen = {}
    tokenizer.patchify.register_forward_hook(lambda *a: seen.__setitem__("patches", a[2]))
    if len(tokenizer.encoder_layers):
        tokenizer.encoder_layers[0].register_forward_hook(lambda *a: seen.__setitem__("encoder_layer0", a[2]))
    with torch.no_grad():
        z = tokenizer._project(images)
        if tokenizer.quantized:
            quantized = tokenizer.quantize(z)
            seen |= {"code": tokenizer.encode(images)[..., 0], "indices": quantized.codes}
            vectors = quantized.values
        else:
            vectors = F.normalize(z, dim=-1)
        condition = tokenizer.conditions(vectors)
    return {**seen, "z_before_quant": channels_first(z), "quantized": channels_first(vectors), "cond": condition}


@kind("dar", "tok_decode", TOKENIZER | reads("height width clip_steps euler").below("options"))
def tok_decode(case: Case) -> dict[str, Tensor]:
    options, codes, noise = case.options, case.inputs["code"], case.inputs["noise"]
    tokenizer = build_tokenizer(case.config, case.weights, max(noise.shape[-2:])).eval()
    size = painted_size(tokenizer, options, noise)
    draws = RecordedDraws({"noise": noise})
    vectors = tokenizer.embed(codes[..., None])[:, :, 0]
    result = {"codebook_entry": channels_first(vectors)}
    with torch.no_grad():
        condition = result["cond"] = tokenizer.conditions(vectors)
        for clip in options["clip_steps"]:
            name = "image_full" if clip is None else f"image_clip{clip}"
            result[name] = tokenizer.decode(codes[..., None], draws, clip=clip, size=size)
        if options.get("euler"):
            result["image_euler"] = tokenizer.decode(codes[..., None], draws, size=size, method="euler")
        # a prefix of the codes gives the same previews as the whole sequence does
        for clip in [c for c in options["clip_steps"] if c]:
            needed = tokenizer.window_start(clip - 1, tokenizer.steps) + tokenizer.window
            prefix = tokenizer.decode(codes[:, :needed, None], draws, clip=clip, size=size)
            assert alike(prefix, result[f"image_clip{clip}"])
    if "probe_xt" in case.inputs:
        core = tokenizer.diff_decoder.net.train()  # features are made in training; nothing else differs
        time = core.embed_time(case.inputs["probe_t"])
        velocity, features = core(case.inputs["probe_xt"], time, condition[:, : tokenizer.window])
        result |= {"probe_velocity": velocity, "probe_h_repa": features}
    return result


@kind("dar", "tok_recon", TOKENIZER | reads("steps height width").below("options"))
def tok_recon(case: Case) -> dict[str, Tensor]:
    images, steps = case.inputs["image"], case.options["steps"]
    tokenizer = build_tokenizer(case.config, case.weights, images.shape[-1]).eval()
    draws = RecordedDraws({"noise": case.inputs["noise"]})
    with torch.no_grad():
        codes = tokenizer.encode(images)
        size = painted_size(tokenizer, case.options, case.inputs["noise"])
        rebuilt = {count: tokenizer.decode(codes, draws, steps=count, size=size) for count in steps}
    return {
        "code": codes[..., 0],
        "uint8": images_uint8(rebuilt[steps[0]]),
        **{f"recon_steps{count}": image for count, image in rebuilt.items()},
    }


@kind("dar", "tok_train", TOKENIZER | reads("perceptual_weight dino_weight grad_keys").below("options"))
def tok_train(case: Case) -> dict[str, Tensor]:
    options, images = case.options, case.inputs["image"]
    tokenizer = build_tokenizer(case.config, case.weights, images.shape[-1]).train()
    draws = RecordedDraws({"time": case.inputs["t_uniform"], "noise": case.inputs["noise"]})
    recon = tokenizer(images, draws)
    weights = {"reconstruction": 0.0, "semantic": options["dino_weight"] if recon.predictions else 0.0, "flow": 1.0}
    if tokenizer.quantized:
        weights |= {"codebook": 1.0, "commitment": 0.25}
    features = {FEATURES: case.inputs["dino_features"]} if recon.predictions else {}
    loss = Objective(weights=weights, semantic_loss="cosine").generator_loss(
        images, recon, features, None, Progress(0, 1, 1, 0)
    )
    # the perceptual network of the fixture is a stub: the squared error of each picture
    stub = (images - recon.images).square().mean(dim=(1, 2, 3))
    weight = options["perceptual_weight"]
    stub = (stub * 2 * recon.details["t"] if weight < 0 else stub).mean()
    total = loss.total + abs(weight) * stub
    total.backward()
    gradients = official_gradients(tokenizer)
    return {
        "loss": total,
        "fm_loss": recon.terms["flow"],
        "vq_loss": recon.terms.get("codebook", torch.zeros(())),
        "commit_loss": 0.25 * recon.terms.get("commitment", torch.zeros(())),
        "entropy_loss": torch.zeros(()),
        "perceptual_stub": stub,
        "repa_loss": loss.logs.get("semantic", torch.zeros(())),
        "h_repa": recon.details["features"],
        "net_cond": recon.details["window"],
        "predicted_image": recon.images,
        "t_shifted": recon.details["t"],
        "velocity": recon.details["velocity"],
        "codebook_usage": torch.zeros(()),
        "dead_code_rate": dead_code_rate(recon.details["codes"]) if tokenizer.quantized else torch.zeros(()),
        **{f"grad/{name}": gradients[name] for name in options["grad_keys"]},
    }


def official_gradients(tokenizer) -> dict[str, Tensor]:
    """Gradients under the official names, by way of a copy whose weights are the gradients."""
    import copy

    from tokenizer.adapters import ADAPTERS

    gradients = copy.deepcopy(tokenizer)
    with torch.no_grad():
        for (_, target), source in zip(gradients.named_parameters(), tokenizer.parameters()):
            target.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    return ADAPTERS["dar"].restore(gradients)


def dead_code_rate(codes: Tensor) -> Tensor:
    """Share of token positions whose code is the same in the whole batch."""
    return (codes.float().std(0) < 1e-5).float().mean()


@kind(
    "dar",
    "quantizer",
    reads("n_e e_dim beta entropy_loss_ratio l2_norm show_usage") | reads("with_entropy").below("options"),
)
def quantizer(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    ratio = config.get("entropy_loss_ratio", 0.0)
    if not case.options.get("with_entropy", True):
        ratio = 0.0
    ours = VectorQuantizer(
        config["n_e"], config["e_dim"], normalise=config.get("l2_norm", True), entropy=bool(ratio), usage_window=65536
    )
    ours.load_state_dict(
        {
            "embedding.weight": case.weights["embedding.weight"],
            "codebook_used": case.weights.get("codebook_used", torch.zeros(65536)),
        }
    )
    z = inputs["z"][:, :, 0].transpose(1, 2).clone().requires_grad_(True)  # (B, N, D)
    last = inputs["query_ids"][:, -1]
    seen = torch.arange(z.shape[1]) <= last[:, None]
    result = ours(z, seen)
    commitment = config.get("beta", 0.25) * result.terms["commitment"]
    entropy = ratio * result.terms["entropy"] if ratio else torch.zeros(())
    (channels_first(result.values) * inputs["cotangent"]).sum().add(
        result.terms["codebook"] + commitment + entropy
    ).backward()
    usage = torch.zeros(())
    if config.get("show_usage", True):
        usage = ours.track(result.codes.flatten()[inputs["perm"][:512]])
    with torch.no_grad():
        plain = ours.embed(ours.encode(z))
    tail = case.outputs["codebook_used_after"].numel() if "codebook_used_after" in case.outputs else 600
    return {
        "vq_loss": result.terms["codebook"],
        "commit_loss": commitment,
        "entropy_loss": entropy,
        "quantized": channels_first(result.values),
        "indices": result.codes.flatten(),
        "codebook_usage": usage,
        "codebook_used_after": ours.codebook_used[-tail:],
        "dead_code_rate": dead_code_rate(result.codes),
        "grad_z": channels_first(z.grad),
        "grad_embedding": ours.embedding.weight.grad,
        "eval_quantized": channels_first(plain),
        "eval_indices": ours.encode(z).flatten(),
        "entry": channels_first(ours.embed(inputs["code"])),
    }


@kind("dar", "diff_core", CORE.below("core") | SMALL.below("fixture_only"))
def diff_core(case: Case) -> dict[str, Tensor]:
    inputs, config = case.inputs, case.config
    core = build_core(config["core"], config.get("fixture_only", {}), case.weights, inputs["xt"].shape[-1]).train()
    seen = {}
    core.blocks[0].register_forward_hook(lambda *a: seen.__setitem__("block0", a[2]))
    core.blocks[0].cross_attn.register_forward_hook(lambda *a: seen.__setitem__("block0_cross_attn", a[2]))
    velocity, features = core(inputs["xt"], core.embed_time(inputs["t"]), inputs["cond"])
    width = config["core"]["dim"]
    return {
        **seen,
        "velocity": velocity,
        "h_repa": features,
        "t_embed": sinusoidal(1000 * inputs["t"], width),
        "patched": F.pixel_unshuffle(inputs["xt"], config["core"]["patch_size"]),
    }
