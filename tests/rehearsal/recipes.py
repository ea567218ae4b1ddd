"""Every published recipe, the commands that document it, and the settings that make it small.

A recipe is any YAML in configs/ but the toys, quickstarts and tiny models. Only sizes, duration and hardware
are overridden; what a recipe says of losses, schedules, teachers, data and evaluation stays.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path

import yaml

from tests.rehearsal import frozen, released

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SYSTEMS = {
    "rectok": "rectok/ditdh_xl",
    "fqgan": "fqgan/far_b_dual",
    "rear": "rear/rear_b",
    "dar": "dar/ar_l",
    "imagefolder": "imagefolder/var_d17",
}  # the generator whose whole chain stands for its system

VIT = "{width: 64, layers: 1, heads: 2}"
_vit = "{" + ", ".join(f"{k}: {v}" for k, v in frozen.VIT.items()) + "}"
DIT = (
    "{"
    + ", ".join(
        f"{k}: {v}"
        for k, v in {
            "trunk_width": 64,
            "trunk_depth": 1,
            "trunk_heads": 2,
            "head_width": 96,
            "head_depth": 2,
            "head_heads": 2,
        }.items()
    )
    + "}"
)
CONVS = ["tokenizer.image_size=64", "tokenizer.channels=32", "tokenizer.vocab=64", "tokenizer.res_blocks=1"]

# What stands in a section `<key>: {name: ...}` -> its sizes.
TOKENIZERS = {
    "rectok": [f"tokenizer.encoder={VIT}", f"tokenizer.decoder={VIT}", f"tokenizer.channels={released.CHANNELS}"],
    "fqgan": [*CONVS, "tokenizer.z_channels=32", "tokenizer.adapter_layers=1"],
    "maskgit_vqgan": [*CONVS, "tokenizer.channel_mult=[1,1,1,1,2]", "tokenizer.code_dim=32"],
    "vqgan_plus": [*CONVS, "tokenizer.channel_mult=[1,1,1,1,2]", "tokenizer.code_dim=16"],
    "fsq": [*(s for s in CONVS if "vocab" not in s), "tokenizer.channel_mult=[1,1,1,1,2]"],
    "dar": [
        "tokenizer.encoder_width=64",
        "tokenizer.encoder_layers=1",
        "tokenizer.condition_width=64",
        "tokenizer.condition_layers=1",
        "tokenizer.vocab=64",
        "tokenizer.decoder={width: 64, depth: 2, feature_layer: 1}",
        "tokenizer.usage_window=512",
    ],
    "imagefolder": [
        f"tokenizer.encoder={_vit}",
        f"tokenizer.decoder={_vit}",
        "tokenizer.code_dim=8",
        "tokenizer.pretrained=pretrained_models/timm/vit_base_patch14_dinov2.lvd142m/model.safetensors",
    ],
}
GENERATORS = {
    "dit_dh": [f"generator.size={DIT}"],
    "far": ["generator.size={width: 64, layers: 1, heads: 1, head_layers: 1}"],
    "gpt": ["generator.size={width: 64, layers: 2, heads: 1}"],
    "rar": ["generator.size={width: 64, layers: 2, heads: 2, hidden: 256}"],
    "var": ["generator.depth=2"],
}
# What an exported file of such a size does not say, as convert.py --set is told it; published sizes need none of it.
UNTOLD = {
    "far": "size.heads=1",
    "gpt": "size.heads=1",
    "dar": "length=256 groups=8",
    "vqgan_plus": "normalise=false",
    "rectok": "encoder.heads=2 decoder.heads=2",
    "imagefolder": "encoder.heads=2 decoder.heads=2",
}
TEACHERS = {
    "dinov3": [
        "teachers.dinov3.hidden_size=32",
        "teachers.dinov3.intermediate_size=128",
        "teachers.dinov3.num_hidden_layers=1",
        "teachers.dinov3.num_attention_heads=2",
    ],
    "dinov2": [f"teachers.dinov2.size={_vit}"],
    "dinov2_class": [f"teachers.dinov2_class.size={_vit}"],
    "clip": [f"teachers.clip.size={_vit}"],
    "dinov2_patch16": [
        f"teachers.dinov2_patch16.model={_vit}",  # no published size: its file is named
        "teachers.dinov2_patch16.weights=pretrained_models/timm/vit_base_patch14_dinov2.lvd142m/model.safetensors",
    ],
}
DISCRIMINATORS = {
    "patchgan": ["discriminator.ndf=8"],
    "blur": ["discriminator.channels=8", "discriminator.stages=2", "discriminator.groups=4"],
    "dino": [f"discriminator.size={_vit}", "discriminator.depths=[0]"],
}
PERCEPTUAL = {
    "lpips": f"widths: {frozen.VGG_WIDTHS}",
    "convnext_s": f"blocks: {frozen.CONVNEXT}, classes: {frozen.CLASSES}".replace("None", "null"),
    "resnet50": f"layers: {frozen.RESNET_LAYERS}, classes: {frozen.CLASSES}",
}
COMMON = [
    "data.workers=0",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.compile=false",
    "train.preview_every=never",
    "train.log_every=1step",
    "train.checkpoint_every=1step",
]
# Runs that a recipe continues, by the name under which the documented command finds them.
RUNS = {
    "rectok_stage1": ("rectok/tokenizer", None),
    "rectok_stage1_decoder_finetune": ("rectok/decoder_finetune", None),
    "rectok512_stage1": ("rectok/tokenizer_512", None),
    "rectok512_stage1_decoder_finetune": (
        "rectok/decoder_finetune",
        "bash run_decoder_finetune_tokenizer.sh rectok512_stage1 tokenizer.image_size=512 train.micro_batch=16",
    ),
    "fsq": ("fsq/tokenizer", None),
}


@cache
def read(path: Path) -> dict:
    """A recipe with those it is based on."""
    given = yaml.safe_load(path.read_text())
    base = given.pop("base", None)

    def merged(under: object, over: object) -> object:
        if isinstance(under, dict) and isinstance(over, dict):
            return {**under, **{k: merged(under.get(k), v) for k, v in over.items()}}
        return over

    return merged(read((path.parent / base).resolve()), given) if base else given


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One published YAML."""

    name: str  # below configs/, without suffix

    @property
    def path(self) -> Path:
        return CONFIGS / f"{self.name}.yaml"

    @property
    def config(self) -> dict:
        return read(self.path)

    @property
    def is_generator(self) -> bool:
        return self.config["task"] == "generator"

    @property
    def command(self) -> str:
        """The command in the recipe's first comment."""
        found = re.search(
            r"^# (bash run_train_\w+\.sh|bash run_decoder_finetune_tokenizer\.sh)((?: [^\s(]+)*)",
            self.path.read_text(),
            re.M,
        )
        assert found, f"{self.path} does not say which command runs it"
        return f"{found[1]}{found[2]}"

    @property
    def words(self) -> list[str]:
        """What the command names besides the recipe: the run that it continues."""
        return [w for w in self.command.split()[2:] if not w.endswith(".yaml")]

    @property
    def needs(self) -> list[str]:
        """Runs of ours that must exist."""
        weights = [str(self.config["tokenizer"].get("weights") or ""), str(self.config["train"].get("init_from") or "")]
        named = [*self.words] if self.words else [Path(w).name for w in weights if w.startswith("work_dirs/")]
        return [name for name in named if name in RUNS]

    @property
    def network(self) -> str:
        """The class of what is trained."""
        return self.config[self.config["task"]]["name"]

    @property
    def run(self) -> str:
        """Name of the run that the command makes."""
        return f"{self.words[0]}_{self.path.stem}" if self.words else self.config["name"]

    @property
    def weights(self) -> str | None:
        """What of pretrained_models/ the recipe names."""
        given = str(self.config["tokenizer"].get("weights") or "")
        return given.removeprefix("pretrained_models/") if given.startswith("pretrained_models/") else None

    @property
    def has_official_layout(self) -> bool:
        """Not those that are ours alone: FSQ, and LlamaGen's GPT on several codebooks."""
        tokenizer = self.path.stem.split("__")[0] if self.is_generator else ""
        several = tokenizer in ("fqgan", "imagefolder") and self.config["generator"]["name"] == "gpt"
        return self.network != "fsq" and not several

    @property
    def untold(self) -> str:
        """What an official file of this size does not say, for convert.py --set."""
        scales = self.config["tokenizer"].get("scales") or []
        stated = [f"scales=[{','.join(map(str, scales))}]"] if len(scales) > 1 and not self.is_generator else []
        return " ".join([*UNTOLD.get(self.network, "").split(), *stated])

    @property
    def sizes(self) -> list[str]:
        """Settings that make it small."""
        config = self.config
        if self.is_generator:
            sizes = [*GENERATORS[config["generator"]["name"]]]
            if config["generator"].get("rear"):
                sizes += ["generator.rear.decode_layer=1", "generator.rear.projection=32"]
            return sizes
        sizes = [*TOKENIZERS[config["tokenizer"]["name"]]]
        if config["tokenizer"]["name"] == "fqgan":
            sizes.append("tokenizer.size=" + ("[1,1,1,2]" if config["tokenizer"]["size"] == "vq8" else "[1,1,1,1,2]"))
        for name in config.get("teachers") or {}:
            sizes += TEACHERS[name]
        for name, weight in (config["objective"].get("perceptual") or {}).items():
            sizes.append(f"objective.perceptual.{name}={{weight: {weight}, {PERCEPTUAL[name]}}}")
        if "contrast_group" in config["objective"]:
            sizes.append("objective.contrast_group=2")
        if config.get("discriminator"):
            sizes += DISCRIMINATORS[config["discriminator"]["name"]]
        return sizes

    def training(self, *more: str, command: str | None = None) -> str:
        """The documented command, small."""
        large = ["train.global_batch=2", "train.micro_batch=1"] if "512" in f"{self.name} {command}" else []
        quoted = [f"'{s}'" if re.search(r"[{\[ *]", s) else s for s in (*self.sizes, *COMMON, *large, *more)]
        return " ".join([command or self.command, *quoted])


def published() -> list[Recipe]:
    """All recipes, by what lies in configs/."""
    names = sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.yaml"))
    return [Recipe(name) for name in names if name.split("/")[0] not in ("toy", "quickstart", "tiny")]
