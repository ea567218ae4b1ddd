"""Every command and code block of README.md and docs/*.md, in a house with tiny files."""

from __future__ import annotations

import json
import re
import shutil

import numpy
import pytest
from PIL import Image

from tests.rehearsal.documents import DOCUMENTS, PLACEHOLDERS, blocks, commands, placed, rule
from tests.rehearsal.recipes import Recipe

COMMANDS = {command.text: command for command in commands()}
RED: dict[str, str] = {}  # command -> why it fails today


def marks(text: str) -> list:
    found = rule(COMMANDS[text])
    red = [pytest.mark.xfail(strict=True, reason=RED[text])] if text in RED else []
    return red + ([pytest.mark.slow] if found and found.slow else [])


@pytest.fixture(scope="session")
def furnished(rehearsal):
    """What the documents' commands name and a new user would have made or downloaded before."""
    house, work = rehearsal.house, rehearsal.house.folder / "work_dirs"
    rehearsal.need("rectok_stage1_decoder_finetune")
    tokenizer, generator = Recipe("fqgan/dual_ds16"), Recipe("fqgan/far_b_dual")
    short = ["train.duration=1step", "train.eval_every=never"]
    house.run(tokenizer.training(*short, "name=tuned")).expect()
    house.run(
        tokenizer.training(
            *short,
            "name=mine",
            "tokenizer.branches=4",
            "tokenizer.semantic.branches.clip=sem_1",
            "tokenizer.image_size=256",
        )
    ).expect()
    house.run(generator.training(*short, "name=my_run")).expect()
    for command in COMMANDS:  # the chain on photographs, a step of each
        if "work_dir=work_dirs/photos" in command:
            one = [word for word in command.split() if not word.startswith(("train.duration=", "train.eval_every="))]
            house.run(" ".join([*one, *short, "train.micro_batch=1", "train.global_batch=1"])).expect()
    shutil.copytree(work / "tuned", work / "my_tokenizer", symlinks=True)
    shutil.copytree(work / "my_run", work / "my_generator", symlinks=True)
    draws = numpy.random.default_rng(0)
    photos = sorted((house.folder / "data" / "imagenet" / "val").rglob("*.JPEG"))
    for name, photo in zip(("cat.jpg", "dog.png"), photos):
        Image.open(photo).save(house.folder / name)
    mask = Image.new("L", Image.open(photos[0]).size)
    mask.paste(255, (mask.width // 3, mask.height // 3, mask.width // 2, mask.height // 2))
    mask.save(house.folder / "mask.png")
    (house.folder / "my").mkdir()
    shutil.copytree(house.folder / "data" / "imagenet" / "train", house.folder / "my" / "pictures")
    texts = {"file": "any.jpg", "texts": [{"box": [0, 0, 9, 9], "says": "STOP"}]}
    (house.folder / "my" / "texts.jsonl").write_text(json.dumps(texts))
    for folder in ("originals", "folder/of/pngs"):
        (house.folder / folder).mkdir(parents=True)
        for i, photo in enumerate(photos[:4]):
            Image.open(photo).resize((256, 256)).save(house.folder / folder / f"{i}.png")
    for name in ("samples.npz", "reconstructions.npz"):
        numpy.savez(house.folder / name, arr_0=draws.integers(0, 256, (4, 256, 256, 3), dtype=numpy.uint8))
    lines = [{"class_id": i % 4, "tokens": [int(t) for t in draws.integers(0, 64, 256)]} for i in range(240)]
    (house.folder / "maskgitvq.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    (house.folder / "layouts").mkdir()
    from tests.rehearsal import layouts

    recorded = {name: [list(shape), "float32"] for name, shape in layouts.maskgit().items()}
    (house.folder / "layouts" / "vqgan.json").write_text(json.dumps({"tensors": recorded}))
    (house.folder / "configs" / "tokenizer.yaml").write_text(ORIGINAL_YAML)
    store = f"bash run_pretokenize.sh {generator.path.relative_to(generator.path.parents[2])} --out data/tokens/imagenet data.workers=0"
    house.run(store).expect()
    house.run(store.replace(" data.workers=0", " --to official codes")).expect()
    return rehearsal


# A file for the original ImageFolder trainer, with the settings of its released one.
ORIGINAL_YAML = """
data_path: data/imagenet/train
codebook_size: 4096
codebook_embed_dim: 32
v_patch_nums: [1, 1, 2, 3, 3, 4, 5, 6, 8, 11]
product_quant: 2
enc_type: dinov2
dec_type: dinov2
encoder_model: vit_base_patch14_dinov2.lvd142m
decoder_model: vit_base_patch14_dinov2.lvd142m
semantic_guide: dinov2
num_latent_tokens: 121
epochs: 200
global_batch_size: 1024
lr: 0.0001
"""


def test_no_command_is_without_a_rule():
    unknown = [f"{c.document}: {c.text}" for c in COMMANDS.values() if rule(c) is None]
    assert len(COMMANDS) > 80 and not unknown, "\n".join(unknown)
    assert all(text in COMMANDS for text in RED)
    capitals = {w for c in COMMANDS.values() for w in re.findall(r"(?<![\w/.=-])[A-Z][A-Z_]{2,}(?![\w/.=])", c.text)}
    assert capitals <= PLACEHOLDERS.keys(), capitals - PLACEHOLDERS.keys()


@pytest.mark.parametrize("text", [pytest.param(t, id=t, marks=marks(t)) for t in COMMANDS])
def test_command(furnished, text):
    how = rule(COMMANDS[text])
    command = tiny_benchmark(placed(text)) if how.append == "tiny" else f"{placed(text)} {how.append}".strip()
    for made in ("panels", "samples", "cats"):  # several commands write there
        shutil.rmtree(furnished.house.folder / made, ignore_errors=True)
    if "&&" in command:  # both halves
        command = command.replace(" && ", f" {how.append} && ")
    if text.startswith("bash run_eval_diffusion.sh"):  # one command a scale
        command += " scales=1.29"
    done = furnished.run("documents", COMMANDS[text].document.removeprefix("docs/"), command, 2 if how.refused else 0)
    assert how.refused in done.output


def tiny_benchmark(text: str) -> str:
    """The same measurement of the recipes' tiny networks, once."""
    mode = "" if "--versus eager" in text else "mode|"  # what is compared with eager
    text = re.sub(rf"--({mode}precision|markdown|batch|repeats|warmup|device|decode-steps) \S+ ?", "", text)
    paths = re.findall(r"(--tokenizer-config )?configs/(\S+)\.yaml", text)
    sizes = [size for _, name in paths if not name.startswith("quickstart/") for size in Recipe(name).sizes]
    left_out = ["teachers", "objective", "discriminator"] if len(paths) > 1 else []
    left_out += ["generator.rear."] if "generator.rear=null" in text else []
    kept = dict.fromkeys(size for size in sizes if not size.startswith(tuple(left_out)))
    quoted = " ".join(f"'{s}'" for s in kept)
    return f"{text} {quoted} --batch 1 --repeats 1 --warmup 0 --device cpu --precision fp32"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")])
def test_python(furnished, document):
    """Snippets are whole programs."""
    for i, snippet in enumerate(blocks(document, "python")):
        path = furnished.house.folder / f"snippet_{i}.py"
        path.write_text(snippet)
        furnished.house.run(f"python {path.name}", PYTHONPATH=".").expect()
