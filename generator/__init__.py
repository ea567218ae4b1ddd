"""Generators: models of latents. Names here are what `generator.name` in a YAML file may be."""

from core.registry import Registry

GENERATORS = Registry(
    "generator",
    {
        "dit_dh": "generator.dit.dit_dh:DiTDH",
        "far": "generator.ar.far:FAR",
        "gpt": "generator.ar.gpt:GPT",
        "rar": "generator.ar.rar:RAR",
        "var": "generator.var.var:VAR",
    },
    complete="core.promises:declared",
)
