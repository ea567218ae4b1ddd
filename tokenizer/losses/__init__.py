"""Objectives that tokenizers share: what an image autoencoder is trained on besides its own regularisers."""

from core.registry import Registry

PERCEPTUAL = Registry(
    "perceptual part",
    {
        "lpips": "core.nn.lpips:lpips_vgg",
        "lpips_squeeze": "core.nn.lpips:lpips_squeeze",
        "convnext_s": "tokenizer.losses.perceptual:convnext_logits",
        "resnet50": "tokenizer.losses.perceptual:resnet_logits",
    },
)

DISCRIMINATORS = Registry(
    "discriminator",
    {
        "dino": "tokenizer.losses.dino_discriminator:DinoDiscriminator",
        "patchgan": "tokenizer.losses.discriminators:PatchGAN",
        "blur": "tokenizer.losses.discriminators:BlurDiscriminator",
        "stylegan": "tokenizer.losses.discriminators:StyleGANDiscriminator",
    },
)

OBJECTIVES = Registry("objective", {"image": "tokenizer.losses.objective:Objective"})
