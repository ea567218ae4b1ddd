"""What a launcher told this process: which rank it is, and from accelerate how to train. Only the standard library.

run_*.sh, torchrun and `accelerate launch` say it in the environment. An empty variable is one that is not set.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass

from core.errors import UserError

_MEETING = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; `local` counts those of one machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def is_one_of_several() -> bool:
    """Whether a launcher seems to have started more than this process. Never raises."""
    return _value("WORLD_SIZE") not in ("", "1")


def speaks() -> bool:
    """Whether messages for the user are this process's: rank 0, or one that is no rank at all."""
    return _value("RANK") in ("", "0") or not is_one_of_several()


def say(message: str) -> None:
    """Print a sentence for the user, once however many processes there are; nothing where it is ""."""
    if message and speaks():
        print(message, flush=True)


def tell_torchrun(message: str) -> None:
    """Leave the reason of this process's end where torchrun, if it started it, reads it for its report."""
    if (path := _value("TORCHELASTIC_ERROR_FILE")) and not os.path.exists(path):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": details}}, file)


def ranks() -> Ranks:
    """From RANK, WORLD_SIZE and LOCAL_RANK; UserError for what a launcher would not set, as leftovers of another one."""
    variables = {name: _value(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if variables["WORLD_SIZE"] in ("", "1") and variables["RANK"] in ("", "0") and variables["LOCAL_RANK"] in ("", "0"):
        return Ranks()
    missing = [name for name in ("RANK", "WORLD_SIZE", *_MEETING) if not _value(name)]
    numbers = {name: int(text) for name, text in variables.items() if text.isdecimal()}
    wrong = [name for name, text in variables.items() if text and name not in numbers]
    if not missing and not wrong and numbers["RANK"] < numbers["WORLD_SIZE"]:
        return Ranks(numbers["RANK"], numbers["WORLD_SIZE"], numbers.get("LOCAL_RANK", 0))
    shown = ", ".join(f"{name}={text}" for name, text in variables.items() if text)
    reason = f"{' and '.join(missing)} not set" if missing else "not a rank among that many"
    raise UserError(
        f"{shown} in the environment, but {reason}: leftovers of another launcher? For one process: unset "
        "RANK WORLD_SIZE LOCAL_RANK. For several, let run_*.sh, torchrun or accelerate launch start them."
    )


# What accelerate's config can ask for that is not done here: variable, values that ask for nothing, what to use instead.
_NOT_TAKEN = (
    ("ACCELERATE_USE_DEEPSPEED", ("false",), "DeepSpeed: use FSDP (distributed_type: FSDP, or train.parallel=fsdp)"),
    (
        "ACCELERATE_USE_MEGATRON_LM",
        ("false",),
        "Megatron-LM: use FSDP (distributed_type: FSDP, or train.parallel=fsdp)",
    ),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", ("false",), "tensor, context and sequence parallelism: use FSDP alone"),
    (
        "FSDP_OFFLOAD_PARAMS",
        ("false",),
        "FSDP's offloading to the CPU (fsdp_offload_params): use more GPUs, or train.activation_checkpointing=true",
    ),
    ("ACCELERATE_DYNAMO_BACKEND", ("no", "inductor"), "this dynamo_backend: inductor is the one (train.compile=true)"),
)
_PRECISIONS = {"no": "fp32", "fp32": "fp32", "bf16": "bf16"}
_SHARDINGS = {"1": "fsdp", "FULL_SHARD": "fsdp", "3": "ddp", "NO_SHARD": "ddp"}  # of FSDP 1; FSDP 2 has but one


def asked_by_accelerate() -> list[str]:
    """Settings that the config of `accelerate launch` amounts to, as key=value; UserError for what it cannot have here.

    Nothing where run_*.sh start the ranks, through whichever launcher: there the command line is all that counts.
    """
    if not _value("ACCELERATE_MIXED_PRECISION") or os.environ.get("TESSERA_EXIT_FILE"):
        return []

    def is_set(name: str) -> bool:
        return _value(name).lower() in ("true", "1", "yes")

    for variable, nothing, advice in _NOT_TAKEN:
        if _value(variable) and _value(variable).lower() not in nothing:
            raise UserError(f"accelerate's config asks for what is not taken from it, {advice}.")
    precision = _value("ACCELERATE_MIXED_PRECISION")
    if precision not in _PRECISIONS:
        raise UserError(
            f"accelerate's config asks for mixed_precision {precision}, which is not taken: use bf16 or no."
        )
    if _value("MASTER_ADDR") and not _value("WORLD_SIZE"):
        raise UserError(
            "accelerate was asked for several processes, but starts only one this way (CPUs without mpirun): "
            "use --multi_gpu with train.device=cpu, or NPROC=2 bash run_train_tokenizer.sh CONFIG."
        )
    settings = [f"train.precision={_PRECISIONS[precision]}"]
    if is_set("ACCELERATE_USE_FSDP"):
        sharding = "FULL_SHARD" if _value("FSDP_VERSION") == "2" else _value("FSDP_SHARDING_STRATEGY") or "FULL_SHARD"
        if sharding not in _SHARDINGS:
            raise UserError(
                f"accelerate's config asks for fsdp_sharding_strategy {sharding}, which is not taken: use FULL_SHARD."
            )
        settings.append(f"train.parallel={_SHARDINGS[sharding]}")
        if is_set("FSDP_ACTIVATION_CHECKPOINTING"):
            settings.append("train.activation_checkpointing=true")
    if _value("ACCELERATE_DYNAMO_BACKEND").lower() == "inductor":
        settings.append("train.compile=true")
    if is_set("ACCELERATE_USE_CPU"):
        settings.append("train.device=cpu")
    return settings


def _value(name: str) -> str:
    return os.environ.get(name, "").strip()
