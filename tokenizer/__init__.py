"""Tokenizers: images to latents and back. Names here are what `tokenizer.name` in a YAML file may be."""

from core.registry import Registry

TOKENIZERS = Registry(
    "tokenizer",
    {
        "dar": "tokenizer.vq.dar:DAR",
        "fqgan": "tokenizer.vq.fqgan:FQGAN",
        "maskgit_vqgan": "tokenizer.vq.maskgit:MaskGITVQGAN",
        "fsq": "tokenizer.vq.fsq:FSQ",
        "vqgan_plus": "tokenizer.vq.maskgit:VQGANPlus",
        "titok": "tokenizer.vq.titok:TiTok",
        "imagefolder": "tokenizer.multiscale.imagefolder:ImageFolder",
        "rectok": "tokenizer.continuous.rectok:RecTok",
    },
    complete="core.promises:declared",
)
