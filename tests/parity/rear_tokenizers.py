"""The tokenizers of reAR: MaskGIT-VQGAN, VQGAN+ and TiTok. The look-up-free quantiser is in fqgan_quantizer.py."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from core.images import to_unit_range
from tests.parity import Case, kind
from tests.parity.fields import FieldError, only, reads
from tests.parity.fqgan_quantizer import ENTROPY, rear_entropy, rear_result, to_maps, to_tokens
from tokenizer.adapters import ADAPTERS
from tokenizer.adapters.titok import pixel_halves
from tokenizer.vq.maskgit import MaskGITVQGAN, VQGANPlus
from tokenizer.vq.titok import SIZES, TiTok


def loaded(case: Case, name: str, model: nn.Module) -> nn.Module:
    """`model` with the fixture's weights, in eval mode."""
    ADAPTERS[name].load(model, {key: t.float() if t.is_floating_point() else t for key, t in case.weights.items()})
    return model.eval()


CONV = reads("channel_mult num_resolutions hidden_channels num_res_blocks resolution") | only(
    dropout=0.0, num_channels=3
)
MASKGIT = CONV | reads("z_channels num_embeddings commitment_cost")


def levels(config) -> list[int]:
    """channel_mult, of as many levels as the fixture says."""
    if config.get("num_resolutions", len(config["channel_mult"])) != len(config["channel_mult"]):
        raise FieldError(f"{config['num_resolutions']} levels with channel_mult {config['channel_mult']}")
    return config["channel_mult"]


def build_maskgit(config) -> MaskGITVQGAN:
    return MaskGITVQGAN(
        image_size=config["resolution"],
        channels=config["hidden_channels"],
        channel_mult=levels(config),
        res_blocks=config["num_res_blocks"],
        vocab=config["num_embeddings"],
        code_dim=config["z_channels"],
    )


def as_signed(pixels: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]."""
    return pixels * 2 - 1


@kind("rear", "maskgit", MASKGIT | reads("soft_temp"))
def maskgit(case: Case) -> dict[str, Tensor]:
    config, pixels, codes = case.config, case.inputs["pixels"], case.inputs["codes"]
    tokenizer = loaded(case, "maskgit_vqgan", build_maskgit(config))
    quantizer = tokenizer.quantizer
    with torch.no_grad():
        z = tokenizer.encoder(pixels)
        found = tokenizer.encode(as_signed(pixels))[..., 0]
        grid = z.shape[-2:]  # of any shape, as that of the codes to decode, (B, N) of a square or (B, h, w)
        square = round(codes[0].numel() ** 0.5)
        codes = codes.view(len(codes), square, -1) if codes.ndim == 2 else codes
        maps = to_maps(quantizer.embed(codes))  # (B, D, h, w)
        out = {
            "encoder_z": z,
            "distances": quantizer.distances(to_tokens(z)).flatten(0, 2),
            "encode_indices": found,
            "get_code": found,
            "encode_quantized": quantizer.embed(found).transpose(1, 2).unflatten(2, grid),
            "soft_code": (-quantizer.distances(to_tokens(z)) / config["soft_temp"]).softmax(-1).flatten(1, 2),
            "quantized_states": tokenizer.embed(codes.flatten(1)[..., None])[:, :, 0],
            "decoder_raw": tokenizer.decoder(maps),
            "decode_tokens": to_unit_range(tokenizer.decode(codes[..., None]), clamp=True),
        }
    z = z.clone().requires_grad_()
    trained = quantizer(to_tokens(z))
    # Theirs has the factor on the other term.
    loss = trained.terms["commitment"] + config["commitment_cost"] * trained.terms["codebook"]
    straight = to_maps(trained.values)
    (loss + (straight * case.inputs["grad_probe"]).sum()).backward()
    return {
        **out,
        "train_loss": loss.reshape(1),
        "train_zq_st": straight,
        "grad_z": z.grad,
        "grad_codebook": quantizer.embedding.weight.grad,
    }


@kind(
    "rear",
    "vqplus",
    CONV
    | ENTROPY
    | reads(
        "quantizer_type codebook_size token_size num_res_blocks_decoder sample_with_conv"
        " use_l2_norm use_l2_normalisation train_mode"
    ),
)
@torch.no_grad()
def vqplus(case: Case) -> dict[str, Tensor]:
    config, pixels, codes = case.config, case.inputs["pixels"], case.inputs["codes"]
    free = config["quantizer_type"].replace("-", "_") == "lookup_free"
    entropy = {
        f"entropy_{name}": value for name, value in rear_entropy(config).items() if name in ("temperature", "gamma")
    }
    tokenizer = loaded(
        case,
        "vqgan_plus",
        VQGANPlus(
            image_size=config.get("resolution", pixels.shape[-1]),
            channels=config["hidden_channels"],
            channel_mult=levels(config),
            res_blocks=config["num_res_blocks"],
            decoder_res_blocks=config.get("num_res_blocks_decoder"),
            halving="conv" if config["sample_with_conv"] else "pool",
            quantizer="lookup_free" if free else "lookup",
            vocab=config["codebook_size"],
            code_dim=config["token_size"],
            normalise=config.get("use_l2_norm", config.get("use_l2_normalisation", False)),
            entropy_loss=config["entropy_loss_weight"] > 0,
            **entropy,
        ),
    )
    training = config.get("train_mode", False)
    tokenizer.train(training)
    recon = tokenizer(as_signed(pixels), None)
    found = recon.details["quantized"]
    grid = tokenizer.spec.grid
    decoded = tokenizer.decode(codes.flatten(1)[..., None])
    return {
        "encoder_z": tokenizer.encoder(pixels),
        "quantized": found.values.transpose(1, 2).unflatten(2, grid),
        "decode_tokens": to_unit_range(decoded),
        "forward_decoded": to_unit_range(recon.images),
        "result/min_encoding_indices": found.codes.unflatten(1, grid) if free else found.codes,
        **rear_result(config, found, training)[1],
    }


def proxy_settings(weights: dict[str, Tensor]) -> dict | bool:
    """The MaskGIT decoder of a legacy fixture; False where it has none."""
    if "pixel_quantize.embedding.weight" not in weights:
        return False
    vocab, dim = weights["pixel_quantize.embedding.weight"].shape
    return {**pixel_halves(weights), "vocab": vocab, "code_dim": dim}


def titok_size(case: Case, name: str) -> str | dict[str, int]:
    """Sizes beyond the released ones are described in the fixture's source note."""
    if name in SIZES:
        return name
    width, layers, heads = re.search(name + r" = width (\d+), (\d+) layers, (\d+) heads", case.meta["source"]).groups()
    return {"width": int(width), "layers": int(layers), "heads": int(heads)}


@kind(
    "rear",
    "titok",
    (
        reads(
            "codebook_size token_size use_l2_norm commitment_cost vit_enc_model_size vit_dec_model_size"
            " vit_enc_patch_size vit_dec_patch_size num_latent_tokens is_legacy finetune_decoder"
        )
        | only(quantize_mode="vq", model_type="titok")
    ).below("model.vq_model")
    | reads("dataset.preprocessing.crop_size"),
)
@torch.no_grad()
def titok(case: Case) -> dict[str, Tensor]:
    config, pixels, codes = case.config["model"]["vq_model"], case.inputs["pixels"], case.inputs["codes"]
    legacy = config.get("is_legacy", True)
    sizes = {half: titok_size(case, config[f"vit_{half[:3]}_model_size"]) for half in ("encoder", "decoder")}
    proxy, side = proxy_settings(case.weights), case.config["dataset"]["preprocessing"]["crop_size"]
    if config.get("finetune_decoder", False) and not proxy:
        raise FieldError("finetune_decoder paints pixels, but there are no weights of a pixel decoder")
    tokenizer = loaded(
        case,
        "titok",
        TiTok(
            image_size=side,
            patch_size=config["vit_enc_patch_size"],
            decoder_patch_size=config["vit_dec_patch_size"],
            latents=config["num_latent_tokens"],
            vocab=config["codebook_size"],
            code_dim=config["token_size"],
            normalise=config["use_l2_norm"],
            legacy=legacy,
            proxy=proxy,
            **sizes,
        ),
    )
    z = tokenizer.vectors(as_signed(pixels))
    found = tokenizer.quantizer(z)
    quantity = {**config, "entropy_loss_weight": 0.0, "entropy_gamma": 1.0}
    _, result = rear_result(quantity, found, training=False)

    def maps(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2)[:, :, None]  # (B, C, 1, N)

    def painted(vectors: Tensor) -> Tensor:
        if legacy and not proxy:
            return tokenizer.decoder(vectors)  # logits of proxy codes
        return to_unit_range(tokenizer.paint(vectors))

    return {
        "encoder_z": maps(z),
        "quantized": maps(found.values),
        "decode": painted(found.values),
        "decode_tokens": painted(tokenizer.quantizer.embed(codes[:, 0])),
        "result/min_encoding_indices": found.codes[:, None],
        **result,
    }
