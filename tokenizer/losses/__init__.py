"""Objectives that tokenizers share: what an image autoencoder is trained on besides its own regularisers."""

from core.registry import Registry

PERCEPTUAL = Registry(
    "perceptual part",
    {
        "lpips": "tokenizer.losses.lpips:lpips_vgg",
        "lpips_squeeze": "tokenizer.losses.lpips:lpips_squeeze",
        "convnext_s": "tokenizer.losses.perceptual:ConvNeXtLogits",
    },
)

DISCRIMINATORS = Registry("discriminator", {"patchgan": "tokenizer.losses.discriminators:PatchGAN"})

OBJECTIVES = Registry("objective", {"image": "tokenizer.losses.objective:Objective"})
