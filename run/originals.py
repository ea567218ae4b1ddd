"""The originals' side of `python -m scripts.benchmark --against DIR`, in a process of its own: their packages are called like
ours. It needs torch and what the checkout needs, nothing of this project.

Written from what the papers' repositories document of themselves, not from their code, which does not come with this project:
modules, constructor arguments and calls are those of the lists below. Where a checkout has others, the program says which
call failed; only this file has to follow.

Protocol: a line of JSON on stdin says what to build, and is answered by {"ready": true}, {"skipped": true} for what cannot be
compared, or {"error": text}; then every line "call" is answered by {"seconds": s}.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Asked = dict[
    str, Any
]  # "what", "batch", "device", "precision", "compile", and "tokenizer", "generator", "sample": settings


class NotComparable(Exception):
    """A system has no such thing to time. An exception of its own: what their code raises is a fault to report."""


def find(*places: str) -> Any:
    """The first of "module:name" that this checkout has."""
    failures = []
    for place in places:
        module, name = place.split(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            failures.append(f"{place} ({error})")
    raise ImportError("none of these is in the checkout: " + "; ".join(failures))


def tree(**settings: Any) -> Any:
    """Settings as those repositories read them, by attribute and by key."""
    from omegaconf import OmegaConf

    return OmegaConf.create(settings)


def labels(asked: Asked) -> Tensor:
    return torch.arange(asked["batch"], device=asked["device"]) % asked["generator"]["num_classes"]


def codes(asked: Asked, *shape: int, vocab: int) -> Tensor:
    return torch.randint(0, vocab, (asked["batch"], *shape), device=asked["device"])


def pictures(asked: Asked, low: float = -1.0) -> Tensor:
    side = asked["tokenizer"]["image_size"]
    return torch.rand(asked["batch"], 3, side, side, device=asked["device"]) * (1 - low) + low


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


class Original:
    """One system. Methods give networks and functions of no arguments; what one does not define cannot be compared."""

    def tokenizer(self, asked: Asked) -> Any:
        raise NotComparable

    def generator(self, asked: Asked) -> Any:
        raise NotComparable

    def encode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        raise NotComparable

    def decode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        raise NotComparable

    def generate(self, model: Any, asked: Asked) -> Callable[[], Any]:
        """Latents of a batch of classes, without decoding."""
        raise NotComparable

    def loss(self, model: Any, asked: Asked) -> Callable[[], Tensor]:
        """The loss of a training step on latents that are there."""
        raise NotComparable


class ReAR(Original):
    """reAR's repository, and 1d-tokenizer for RAR: modeling/rear.py or rar.py, built from one tree of settings."""

    def tokenizer(self, asked: Asked) -> Any:
        t = asked["tokenizer"]
        if t["name"] == "vqgan_plus":
            return find("modeling.vqplus:VQPlus")(
                tree(
                    quantizer_type="lookup",
                    codebook_size=t["vocab"],
                    token_size=t["code_dim"],
                    commitment_cost=0.25,
                    entropy_loss_weight=0.0,
                    entropy_loss_temperature=0.01,
                    entropy_gamma=1.0,
                    num_channels=3,
                    hidden_channels=t["channels"],
                    channel_mult=list(t["channel_mult"]),
                    num_resolutions=len(t["channel_mult"]),
                    num_res_blocks=t["res_blocks"],
                    sample_with_conv=True,
                )
            )
        if t["name"] != "maskgit_vqgan":
            raise NotComparable
        settings = tree(
            channel_mult=list(t["channel_mult"]),
            num_resolutions=len(t["channel_mult"]),
            dropout=0.0,
            hidden_channels=t["channels"],
            num_channels=3,
            num_res_blocks=t["res_blocks"],
            resolution=t["image_size"],
            z_channels=t["code_dim"],
        )
        module = "modeling.modules.maskgit_vqgan"
        return nn.ModuleDict(
            {
                "encoder": find(f"{module}:Encoder")(settings),
                "quantize": find(f"{module}:VectorQuantizer")(t["vocab"], t["code_dim"], 0.25),
                "decoder": find(f"{module}:Decoder")(settings),
            }
        )

    def encode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        x = pictures(asked, 0.0)
        return (
            (lambda: model["quantize"](model["encoder"](x)))
            if isinstance(model, nn.ModuleDict)
            else lambda: model.encode(x)
        )

    def decode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        t = asked["tokenizer"]
        side = t["image_size"] // 2 ** (len(t["channel_mult"]) - 1)
        if isinstance(model, nn.ModuleDict):
            z = torch.randn(asked["batch"], t["code_dim"], side, side, device=asked["device"])
            return lambda: model["decoder"](z)
        tokens = codes(asked, side * side, vocab=t["vocab"])
        return lambda: model.decode_tokens(tokens)

    def generator(self, asked: Asked) -> Any:
        g, size = asked["generator"], asked["generator"]["size"]
        settings = {
            "hidden_size": size["width"],
            "num_hidden_layers": size["layers"],
            "num_attention_heads": size["heads"],
            "intermediate_size": size["hidden"],
            "dropout": g["dropout"],
            "attn_drop": g["attention_dropout"],
            "class_label_dropout": g["label_drop"],
            "image_seq_len": g["length"],
            "condition_num_classes": g["num_classes"],
            "use_checkpoint": False,
        }
        places = ["modeling.rar:RAR"]
        if g.get("rear") is not None:
            rear = {
                "transition_alignment": False,
                "perturb_mode": "none",
                "projection_dim": 2048,
                "z_dim": g["code_dim"],
            }
            settings |= {**rear, "encode_align_layer_idx": 0, "decode_align_layer_idx": size["layers"] - 1}
            places = ["modeling.rear:reAR"]
        model = {"vq_model": {"codebook_size": g["vocab"], "num_latent_tokens": g["length"]}, "generator": settings}
        return find(*places)(tree(model=model))

    def generate(self, model: Any, asked: Asked) -> Callable[[], Any]:
        s, y = asked["sample"], labels(asked)
        scale = {
            "guidance_scale": s["scale"],
            "randomize_temperature": s["temperature"],
            "guidance_scale_pow": s["power"],
        }
        cache = (
            {"kv_cache": True} if asked["generator"].get("rear") is None else {}
        )  # the cache of reAR's own does not run
        return lambda: model.generate(y, **scale, **cache)

    def loss(self, model: Any, asked: Asked) -> Callable[[], Tensor]:
        g, y = asked["generator"], labels(asked)
        tokens = codes(asked, g["length"], vocab=g["vocab"])
        if hasattr(model, "set_random_ratio"):
            model.set_random_ratio(0.5)

        def loss() -> Tensor:
            logits, targets = model(tokens, model.preprocess_condition(y, g["label_drop"]), return_labels=True)[:2]
            return cross_entropy(logits, targets)

        return loss


class LlamaStyle(Original):
    """What FQGAN and D-AR have from LlamaGen: a Transformer of ModelArgs."""

    def arguments(self, asked: Asked) -> dict[str, Any]:
        g, size = asked["generator"], asked["generator"]["size"]
        return {
            "dim": size["width"],
            "n_layer": size["layers"],
            "n_head": size["heads"],
            "vocab_size": g["vocab"],
            "num_classes": g["num_classes"],
            "block_size": g["length"],
            "cls_token_num": 1,
            "class_dropout_prob": g["label_drop"],
            "token_dropout_p": g["token_dropout"],
            "resid_dropout_p": g["residual_dropout"],
            "ffn_dropout_p": g["ffn_dropout"],
        }


class FQGAN(LlamaStyle):
    """tokenizer/vq_model_{dual,triple}.py, autoregressive/models/{far,generate}_{dual,triple}.py."""

    @staticmethod
    def variant(settings: dict[str, Any]) -> str:
        return {2: "dual", 3: "triple"}[settings["branches"]]

    def tokenizer(self, asked: Asked) -> Any:
        t = asked["tokenizer"]
        module = f"tokenizer.vq_model_{self.variant(t)}"
        mult: Any = {"vq16": [1, 1, 2, 2, 4], "vq8": [1, 2, 2, 4]}.get(t["size"], t["size"])
        arguments = find(f"{module}:ModelArgs")(
            codebook_size=t["vocab"],
            codebook_embed_dim=t["code_dim"],
            encoder_ch_mult=list(mult),
            decoder_ch_mult=list(mult),
            z_channels=t["z_channels"],
        )
        return find(f"{module}:VQModel")(arguments)

    def encode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        x = pictures(asked)
        return lambda: model.encode(x)

    def decode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        t = asked["tokenizer"]
        levels = {"vq16": 5, "vq8": 4}.get(str(t["size"])) or len(t["size"])
        side = t["image_size"] // 2 ** (levels - 1)
        indices = [codes(asked, side * side, vocab=t["vocab"]).flatten() for _ in range(t["branches"])]
        shapes = [(asked["batch"], t["code_dim"], side, side)] * t["branches"]
        return lambda: model.decode_code(*indices, *shapes)

    def generator(self, asked: Asked) -> Any:
        module = f"autoregressive.models.far_{self.variant(asked['generator'])}"
        arguments = self.arguments(asked) | {"ar_n_layer": asked["generator"]["size"]["head_layers"]}
        return find(f"{module}:Transformer")(find(f"{module}:ModelArgs")(**arguments))

    def generate(self, model: Any, asked: Asked) -> Callable[[], Any]:
        g, s, y = asked["generator"], asked["sample"], labels(asked)
        generate = find(f"autoregressive.models.generate_{self.variant(g)}:generate_fq")
        each = {"cfg_scale": s["scale"], "temperature": s["temperature"], "top_k": s["top_k"], "top_p": s["top_p"]}
        lists = {name: value if isinstance(value, list) else [value] * g["branches"] for name, value in each.items()}
        return lambda: generate(model, y, g["length"], **lists)

    def loss(self, model: Any, asked: Asked) -> Callable[[], Tensor]:
        g, y = asked["generator"], labels(asked)
        names = [name for name in inspect.signature(model.forward).parameters if name.startswith(("idx", "targets"))]
        drawn = [codes(asked, g["length"], vocab=g["vocab"]) for _ in range(g["branches"])]
        inputs = {name: drawn[i % g["branches"]] for i, name in enumerate(sorted(names))}
        return lambda: scalar(model(**inputs, cond_idx=y))


class DAR(LlamaStyle):
    """tokenizer/tokenizer_image/vq_model.py, autoregressive/models/{gpt,generate}.py."""

    def tokenizer(self, asked: Asked) -> Any:
        t = asked["tokenizer"]
        core = {"width": 768, "depth": 12, "patch_size": 8, **(t.get("decoder") or {})}
        model = {
            "encoder_patch_size": t["patch_size"],
            "num_encoder_layers": t["encoder_layers"],
            "num_decoder_layers": t["condition_layers"],
            "query_low_rank": t["low_rank_queries"],
            "encoder_dim": t["encoder_width"],
            "decoder_dim": t["condition_width"],
            "vq_dim": t["code_dim"],
            "vq_codebook_size": t["vocab"],
            "num_denoising_steps": t["steps"],
            "num_query_groups": t["groups"],
            "num_all_queries": t["length"],
            "queries_per_step": t.get("window") or t["length"] // t["groups"],
            "vq_enable": True,
            "sampling_resolution": t["image_size"],
            "output_resolution": 0,
            "diff_decoder": {
                "in_dim": 3,
                "out_dim": 3,
                "dim": core["width"],
                "cond_dim": t["condition_width"],
                "patch_size": core["patch_size"],
                "depth": core["depth"],
                "data_std": 0.6,
                "time_shift": 2,
                "mlp_head": False,
                "share_time_encoding": False,
            },
        }
        return find("tokenizer.tokenizer_image.vq_model:VQModel")(tree(**model))

    def encode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        x = pictures(asked)
        return lambda: model.extract_code(x)

    def decode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        t = asked["tokenizer"]
        indices, side = codes(asked, t["length"], vocab=t["vocab"]), t["image_size"]
        return lambda: model.decode_code(indices, height=side, width=side)

    def generator(self, asked: Asked) -> Any:
        module = "autoregressive.models.gpt"
        return find(f"{module}:Transformer")(find(f"{module}:ModelArgs")(**self.arguments(asked)))

    def generate(self, model: Any, asked: Asked) -> Callable[[], Any]:
        s, y = asked["sample"], labels(asked)
        generate = find("autoregressive.models.generate:generate")
        scale = f"{s['start']},{s['scale']}" if s["schedule"] == "linear" else str(s["scale"])
        options = {"cfg_scale": scale, "temperature": s["temperature"], "top_k": s["top_k"], "top_p": s["top_p"]}
        return lambda: generate(model, y, asked["generator"]["length"], **options)

    def loss(self, model: Any, asked: Asked) -> Callable[[], Tensor]:
        g, y = asked["generator"], labels(asked)
        tokens = codes(asked, g["length"], vocab=g["vocab"])
        return lambda: scalar(model(idx=tokens[:, :-1], cond_idx=y, targets=tokens))


class ImageFolder(Original):
    """tokenizer/tokenizer_image/{xqgan_model,msvq_model}.py, models/var.py."""

    def tokenizer(self, asked: Asked) -> Any:
        t = asked["tokenizer"]
        names = {size: f"vit_{size}_patch14_dinov2.lvd142m" for size in ("small", "base", "large", "giant")}
        if t["encoder"] not in list(names) or t["decoder"] not in list(names):
            raise NotComparable
        factory = find(
            "tokenizer.tokenizer_image.xqgan_model:VQ_models", "tokenizer.tokenizer_image.msvq_model:VQ_models"
        )
        return factory["VQ-16"](
            codebook_size=t["vocab"],
            codebook_embed_dim=t["code_dim"],
            v_patch_nums=list(t["scales"]),
            enc_type="dinov2",
            dec_type="dinov2",
            semantic_guide="none",
            detail_guide="none",
            num_latent_tokens=t["latent_grid"] ** 2,
            encoder_model=names[t["encoder"]],
            decoder_model=names[t["decoder"]],
            abs_pos_embed=True,
            product_quant=t["branches"],
            codebook_drop=t["codebook_drop"],
            half_sem=True,
            start_drop=t["start_drop"],
            share_quant_resi=4,
        )

    def encode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        x = pictures(asked)
        return lambda: model.encode(x)

    def decode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        t = asked["tokenizer"]
        grid = (t["latent_grid"], t["latent_grid"])
        latent = torch.randn(asked["batch"], t["branches"] * t["code_dim"], *grid, device=asked["device"])
        return lambda: model.fhat_to_img(latent)

    def generator(self, asked: Asked) -> Any:
        g = asked["generator"]
        return find("models.var:VAR")(
            vae_local=self.tokenizer(asked).to(asked["device"]).eval().requires_grad_(False),
            num_classes=g["num_classes"],
            depth=g["depth"],
            embed_dim=g["width"] or 64 * g["depth"],
            num_heads=g["heads"] or g["depth"],
            attn_l2_norm=g["l2_norm"],
            patch_nums=tuple(g["scales"]),
            cond_drop_rate=g["label_drop"],
        )

    def generate(self, model: Any, asked: Asked) -> Callable[[], Any]:
        """Its sampler decodes by itself."""
        s, y = asked["sample"], labels(asked)
        options = {"cfg": s["scale"] - s["start"] if s["schedule"] == "linear" else s["scale"] - 1}
        options |= {"top_k": s["top_k"], "top_p": s["top_p"]}
        return lambda: model.autoregressive_infer_cfg(B=asked["batch"], label_B=y, **options)

    def loss(self, model: Any, asked: Asked) -> Callable[[], Tensor]:
        g, y = asked["generator"], labels(asked)
        length = sum(side * side for side in g["scales"])
        inputs = torch.randn(asked["batch"], length - 1, g["branches"] * g["code_dim"], device=asked["device"])
        targets = codes(asked, length, g["branches"], vocab=g["vocab"])
        return lambda: cross_entropy(model(y, inputs).unflatten(-1, (g["branches"], g["vocab"])), targets)


class RecTok(Original):
    """models/rectok.py, models/DDT.py; sampling is Euler's method with their guidance, around their network."""

    def tokenizer(self, asked: Asked) -> Any:
        t = asked["tokenizer"]
        return find("models.rectok:RecTok")(
            img_size=t["image_size"],
            patch_size=t["patch_size"],
            vit_enc_model_size=t["encoder"],
            vit_dec_model_size=t["decoder"],
            token_channels=t["channels"],
            gamma=0.0,
            mask_ratio=0.0,
        )

    def encode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        x = pictures(asked)
        return lambda: model.tokenize(x)

    def _latents(self, asked: Asked) -> Tensor:
        t = asked["tokenizer"]
        side = t["image_size"] // t["patch_size"]
        return torch.randn(asked["batch"], t["channels"], side, side, device=asked["device"])

    def decode(self, model: Any, asked: Asked) -> Callable[[], Any]:
        z = self._latents(asked)
        return lambda: model.detokenize(z)

    def generator(self, asked: Asked) -> Any:
        t, g, size = asked["tokenizer"], asked["generator"], asked["generator"]["size"]
        return find("models.DDT:DiTwDDTHead")(
            img_size=t["image_size"],
            patch_size=[1, 1],
            tokenizer_patch_size=t["patch_size"],
            token_channels=t["channels"],
            hidden_size=[size["trunk_width"], size["head_width"]],
            depth=[size["trunk_depth"], size["head_depth"]],
            num_heads=[size["trunk_heads"], size["head_heads"]],
            num_classes=g["num_classes"],
            num_sampling_steps=asked["sample"]["steps"],
        )

    def generate(self, model: Any, asked: Asked) -> Callable[[], Any]:
        s, y, noise = asked["sample"], labels(asked), self._latents(asked)
        times = torch.linspace(0, 1, s["steps"]).tolist()  # their spacing changes no shape
        nothing = torch.full_like(y, asked["generator"]["num_classes"])

        def generate() -> Tensor:
            z = noise
            for now, then in itertools.pairwise(times):
                t = torch.full((len(z),), now, device=z.device)
                if s["scale"] > 1:
                    both = model.net(torch.cat((z, z)), torch.cat((t, t)), torch.cat((y, nothing)))
                    with_class, without = both.chunk(2)
                    velocity = without + s["scale"] * (with_class - without)
                else:
                    velocity = model.net(z, t, y)
                z = z + (then - now) * velocity
            return z

        return generate

    def loss(self, model: Any, asked: Asked) -> Callable[[], Tensor]:
        y, z = labels(asked), self._latents(asked)
        return lambda: scalar(model(z, y))


ORIGINALS: dict[str, Original] = {  # by the name of our tokenizer or generator
    **dict.fromkeys(("rar", "maskgit_vqgan", "vqgan_plus"), ReAR()),
    **dict.fromkeys(("far", "fqgan"), FQGAN()),
    **dict.fromkeys(("gpt", "dar"), DAR()),
    **dict.fromkeys(("var", "imagefolder"), ImageFolder()),
    **dict.fromkeys(("dit_dh", "rectok"), RecTok()),
}
DECODES_ITSELF = (ImageFolder,)


def scalar(result: Any) -> Tensor:
    """The loss among what a forward returns: a tensor, the last of a tuple, or "loss" of a dictionary."""
    if isinstance(result, dict):
        result = result["loss"]
    return (result[-1] if isinstance(result, tuple) else result).float().mean()


# ---------------------------------------------------------------------------------------------------------------------
# The calls
# ---------------------------------------------------------------------------------------------------------------------
def build(asked: Asked) -> Callable[[], Any]:
    """A function that does once what is asked for, as their programs do it."""
    what, device = asked["what"], torch.device(asked["device"])
    kind = "generator" if what in ("generate", "sample", "train") else "tokenizer"
    original = ORIGINALS[asked[kind]["name"]]

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=asked["precision"] == "bf16")

    def frozen(work: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad(), autocast():
                return work()

        return call

    def ready(name: str) -> Any:
        return getattr(original, name)(asked).to(device).eval().requires_grad_(False)

    if kind == "tokenizer":
        return frozen(getattr(original, what)(ready("tokenizer"), asked))
    if what != "train":
        generate = frozen(original.generate(ready("generator"), asked))
        if what == "generate" or isinstance(original, DECODES_ITSELF):
            return generate
        decode = frozen(original.decode(ready("tokenizer"), asked))
        return lambda: (generate(), decode())
    model = original.generator(asked).to(device).train()
    encode = None if asked["stored"] else frozen(original.encode(ready("tokenizer"), asked))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    loss = original.loss(model, asked)
    if asked["compile"]:
        loss = torch.compile(loss)

    def step() -> None:
        if encode:
            encode()
        with autocast():
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main(checkout: str) -> None:
    """Serve one parent until it closes the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the checkout prints
    # Our packages have the names of theirs; an environment that belongs to another checkout of ours knows that one, too.
    sys.path[:] = [checkout, *(p for p in sys.path if p and not os.path.isfile(os.path.join(p, "run", "originals.py")))]
    os.chdir(checkout)

    def answer(**said: Any) -> None:
        print(json.dumps(said), file=answers, flush=True)

    call, synchronize = None, lambda: None
    for line in sys.stdin:
        message = json.loads(line)
        if message == "call":
            assert call is not None
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            answer(seconds=time.perf_counter() - started)
            continue
        call = None  # gives the last one's memory back
        if message["device"].startswith("cuda"):
            synchronize = torch.cuda.synchronize
            torch.cuda.empty_cache()
        try:
            call = build(message)
            call()
            answer(ready=True)
        except NotComparable:
            answer(skipped=True)
        except Exception as error:  # of code that is not ours: the parent says it
            answer(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


if __name__ == "__main__":
    main(sys.argv[1])
