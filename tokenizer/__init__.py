"""Tokenizers: images to latents and back. Names here are what `tokenizer.name` in a YAML file may be."""

from core.registry import Registry

TOKENIZERS = Registry("tokenizer", {
    "rectok": "tokenizer.continuous.rectok:RecTok",
})
