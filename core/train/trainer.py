"""The training loop, for tokenizers and generators alike: the only place with backward() and step().

Order of one step:  batch -> phases of the task (forward under autocast, backward) for each micro-batch -> per network:
clip, non-finite guard, AdamW -> EMA -> log / preview / evaluate / checkpoint when their period is crossed.

Everything a step computes is a function of (weights, seed, images_seen), so the state of a run is its weights, moments,
averages and one counter. Nothing in the loop waits for the GPU: schedules are host arithmetic, the guard decides on the
device, numbers are read one interval late, and ranks agree on stopping over the CPU.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core import images as image_tools
from core.config import to_plain
from core.devices import peak_flops, peak_memory, set_tf32
from core.dist import AgreedFlag, World
from core.errors import UserError, first_line, nearest
from core.rng import Draws, hash64
from core.schema import RunConfig
from core.signals import GO_ON, REQUEUE_EXIT_CODE, Stopped, StopRequest
from core.specs import Batch, Progress, Task
from core.train import parallel
from core.train.checkpoint import Checkpoint, CheckpointStore
from core.train.ema import Ema
from core.train.guards import StepGuard
from core.train.log import Averages, RunLog, Sink
from core.train.optim import Schedule, make_adamw, weight_decay_at
from core.train.optimizer_state import flatten_optimizer, restore_optimizer
from core.train.run import RunFolder

PREVIEW_IMAGES, PREVIEW_COLUMNS = 16, 8


class Trainer:
    """Trains the networks of `task`.

    Args:
        task: what a step computes.
        config: the whole run; `config.train` rules the loop.
        batches: images_seen -> this rank's batches from there on, forever.
        split: (batch, n) -> n micro-batches.
        images_per_epoch: size of the training set.
        data_fingerprint: of the training set; a checkpoint made on other data is refused.
        run: the run folder.
        world: this rank.
        evaluate: called as evaluate(task, network) on every rank under averaged weights; returns metrics on the main one.
            If it fails on one rank it must fail on all.
        rising: whether a metric of this name is better when it is larger (train.keep_best).
        initial_ema: averaged weights to start from (full state of the primary network), when they differ from it.
        provenance: JSON facts stored in every checkpoint (fingerprints of weights the run depends on).
        sinks: take numbers and previews besides those that `config.log` names.
        flops: of one picture, all networks forward and backward, where the share of the GPU's peak is to be logged.
    """

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        *,
        batches: Callable[[int], Iterator[Batch]],
        split: Callable[[Batch, int], list[Batch]],
        images_per_epoch: int,
        data_fingerprint: str,
        run: RunFolder,
        world: World,
        evaluate: Callable[[Task, nn.Module], dict[str, float]] | None = None,
        rising: Callable[[str], bool] = lambda name: False,
        initial_ema: dict[str, Tensor] | None = None,
        provenance: dict[str, Any] | None = None,
        sinks: Sequence[Sink] = (),
        flops: float | None = None,
    ):
        self.task, self.config, self.settings = task, config, config.train
        self.batches, self.split, self.run, self.world, self.evaluate = batches, split, run, world, evaluate
        self.rising = rising
        self.images_per_epoch, self.data_fingerprint = images_per_epoch, data_fingerprint
        self.provenance, self.sinks, self.flops = provenance or {}, sinks, flops
        self.peak = (peak_flops(world.device, config.train.precision) or 0.0) * world.size
        self.evaluation_due = False  # a signal came while online metrics were computed
        train = self.settings
        parallel.set_determinism(train.deterministic)
        set_tf32(train.tf32)

        if train.global_batch % world.size:
            raise UserError(
                f"train.global_batch={train.global_batch} cannot be shared by {world.size} ranks evenly; "
                "pick a multiple of the rank count."
            )
        self.accumulation = parallel.accumulation(train.global_batch // world.size, train.micro_batch)
        self.total_images = train.duration.images(images_per_epoch, train.global_batch)
        if self.total_images <= 0:
            raise UserError(f"train.duration={train.duration} is less than one step of {train.global_batch} pictures.")
        self.total_steps = self.total_images // train.global_batch

        self.networks = task.networks()
        for network in self.networks.values():
            network.to(world.device).train()
        for network in task.frozen().values():
            network.to(world.device).eval().requires_grad_(False)
        self._wrap()
        self.ema = Ema(self.networks[task.primary], train.ema)
        if initial_ema is not None:
            for decay, average in self.ema.averages.items():
                self.ema.load(decay, {name: initial_ema[name].to(world.device) for name in average})
        special = {"discriminator": train.discriminator} if train.discriminator is not None else {}
        # Each with `optimizer` and `schedule`.
        self.recipes = {name: special.get(name, train) for name in self.networks}
        self.optimizers = {
            name: make_adamw(net, self.recipes[name].optimizer, self.settings.trunk_lr, self.settings.lora)
            for name, net in self.networks.items()
        }
        self.guards = {}
        for name, network in self.networks.items():
            trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
            self.guards[name] = StepGuard(list(trained), list(trained.values()), self.recipes[name].optimizer.grad_clip)
        self.schedules = {
            name: Schedule.from_config(
                recipe.optimizer,
                recipe.schedule,
                global_batch=train.global_batch,
                images_per_epoch=images_per_epoch,
                total_images=self.total_images,
            )
            for name, recipe in self.recipes.items()
        }
        self.averages = Averages()
        self.step = 0  # optimiser steps done
        self._guard_copies: tuple[dict[str, Tensor], Any] | None = None  # host copies on their way, and their event
        self._skips_reported = dict.fromkeys(self.networks, 0)
        self._replaced: set[str] = set()  # keys of unreadable pictures
        self._left_said = False
        self.store = self._open_store()

    def _open_store(self) -> CheckpointStore:
        folder, keep = self.run.path / "checkpoints", self.settings.keep_checkpoints
        if self.skeleton is None:
            return CheckpointStore(folder, keep, self.run.log)
        from core.train.sharded import ShardedStore

        return ShardedStore(folder, keep, self.run.log, world=self.world)

    def _wrap(self) -> None:
        """Checkpoint, compile and distribute the networks: before optimisers and averages, which follow their shards."""
        train = self.settings
        if train.activation_checkpointing:  # of what is large; a discriminator's blocks may change buffers
            parallel.checkpoint_activations(self.networks[self.task.primary])
        self.skeleton = None  # of the primary network, where its weights are in parts
        if train.parallel == "fsdp" and self.world.size > 1:
            self.skeleton = parallel.skeleton(self.networks[self.task.primary], list(self.task.frozen().values()))
        if train.compile:
            for network in [*self.networks.values(), *self.task.frozen().values()]:
                parallel.compile_blocks(network)
        if self.skeleton is not None:
            for network in self.networks.values():
                parallel.shard(network, self.world)
            self.wrapped = dict(self.networks)
        else:
            self.wrapped = {name: parallel.replicate(net, self.world) for name, net in self.networks.items()}

    # ------------------------------------------------------------------------------------------------------------------
    # State
    # ------------------------------------------------------------------------------------------------------------------
    @property
    def images_seen(self) -> int:
        return self.step * self.settings.global_batch

    @property
    def seen_at_once(self) -> int:
        """Pictures over which terms of a whole batch are computed: of one forward pass, on all ranks where these share them."""
        on_a_rank = self.settings.global_batch // self.world.size // self.accumulation
        return on_a_rank * (self.world.size if self.settings.sync_batch_norm else 1)

    def _every(self, duration, step: int) -> bool:
        """Whether a period ends with `step` (counted in steps from the start of the run)."""
        period = duration.images(self.images_per_epoch, self.settings.global_batch) // self.settings.global_batch
        if duration != "never" and period == 0:
            period = 1
        return period > 0 and step % period == 0

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint holds, file by file. Every weight file is complete on its own."""
        files = {name: dict(net.state_dict()) for name, net in self.networks.items()}
        primary = files[self.task.primary]
        for decay in self.ema.averages:
            files[f"{self.task.primary}.ema_{decay}"] = {**primary, **self.ema.state(decay)}
        trainer = {f"guard.{name}": guard.record for name, guard in self.guards.items()}
        if self.averages.sums:
            device = self.world.device
            means = self.world.mean(torch.stack([v.to(device) for v in self.averages.sums.values()]))
            trainer |= {f"average.{name}": value for name, value in zip(self.averages.sums, means.unbind())}
        files["trainer"] = trainer
        if self.task.constants():
            files["constants"] = self.task.constants()
        return files

    def save(self, wait: bool = False) -> None:
        """Checkpoint the run as it stands. Collective: every rank calls it; the main rank writes, and with it those that
        have parts of the weights."""
        tensors = self._tensors()
        optimizer_state = {}
        for name, optimizer in self.optimizers.items():
            tensors[f"{name}.optim"], optimizer_state[name] = flatten_optimizer(optimizer)
        if not self.world.is_main and self.skeleton is None:
            return
        state = {
            "step": self.step,
            "images_seen": self.images_seen,
            "global_batch": self.settings.global_batch,
            "seed": self.config.seed,
            "primary": self.task.primary,
            "ema": list(self.ema.averages),
            "data_fingerprint": self.data_fingerprint,
            "optimizers": optimizer_state,
            "averages": {"order": list(self.averages.sums), "counts": self.averages.counts},
            "provenance": self.provenance,
            "seen_at_once": self.seen_at_once,
            "config": to_plain(self.config),
            **({"evaluation_due": True} if self.evaluation_due else {}),
        }
        self.run.require_there()
        milestone = self._every(self.settings.milestone_every, self.step)
        self.store.save(self.step, tensors, state, milestone=milestone, wait=wait)

    def _refuse_other_data(self, checkpoint: Checkpoint) -> None:
        """UserError where a checkpoint was trained on other data, or on the latents of another tokenizer.

        What one of the two does not tell is not compared: older checkpoints say less.
        """
        state = checkpoint.state
        if state["data_fingerprint"] != self.data_fingerprint:
            raise UserError(
                f"{checkpoint.path} was trained on other data (fingerprint {state['data_fingerprint']}, now "
                f"{self.data_fingerprint}). Restore the data set, or start a new run with name=..."
            )
        places = [config["data"]["url"].rstrip("/") for config in (state["config"], to_plain(self.config))]
        before, now = state["provenance"], self.provenance
        if places[0] != places[1] and before.get("data_contents") != now.get("data_contents"):
            raise UserError(
                f"{checkpoint.path} was trained on the pictures of {places[0]}, and those of {places[1]} have the same names "
                "but are others. Restore data.url, or start a new run with name=..."
            )

        def differs(fact: str) -> bool:
            return None not in (before.get(fact), now.get(fact)) and before[fact] != now[fact]

        if differs("data_sizes"):
            raise UserError(
                f"{checkpoint.path} was trained on pictures of {places[1]} with the same names but other sizes: some of the "
                "files were replaced since. Restore them, or start a new run with name=..."
            )
        known = "tokenizer_encoding"  # in checkpoints since decoders alone can be trained
        if differs(known if before.get(known) and now.get(known) else "tokenizer_fingerprint"):
            raise UserError(
                f"{checkpoint.path} was trained on the latents of another tokenizer (weights "
                f"{before['tokenizer_fingerprint']}, now {now['tokenizer_fingerprint']}). Restore tokenizer.weights, or "
                "start a new run with name=..."
            )

    def restore(self) -> bool:
        """Continue from the newest valid checkpoint of the run folder. False when there is none.

        The main rank alone verifies; no rank uses anything before it has.
        """
        if not self.world.is_main:
            self.store.read_ahead()
        checkpoint = self.world.on_main(self.store.latest)
        if checkpoint is None:
            self.run.rewind_metrics(0)  # a run killed before its first checkpoint begins again
            return False
        self._refuse_other_data(checkpoint)
        state = checkpoint.state
        device = self.world.device
        for name, network in self.networks.items():
            current = network.state_dict()
            saved = checkpoint.tensors(name, like=current.get)
            network.load_state_dict({n: parallel.place(value, current.get(n, value)) for n, value in saved.items()})
            moments = checkpoint.tensors(f"{name}.optim", like=lambda key, of=current: of.get(key.split("/", 1)[1]))
            restore_optimizer(self.optimizers[name], moments, state["optimizers"][name])
        for decay, average in self.ema.averages.items():
            saved = checkpoint.tensors(f"{self.task.primary}.ema_{decay}", like=average.get)
            self.ema.load(decay, {name: saved[name] for name in average})
        trainer = checkpoint.tensors("trainer")
        for name, guard in self.guards.items():
            guard.record = trainer[f"guard.{name}"].to(device)
        self.averages.sums = {n: trainer[f"average.{n}"].to(device) for n in state["averages"]["order"]}
        self.averages.counts = dict(state["averages"]["counts"])
        for name, constant in self.task.constants().items():
            constant.copy_(checkpoint.tensors("constants")[name])
        self.step = state["images_seen"] // self.settings.global_batch
        self.evaluation_due = bool(self.evaluate and state.get("evaluation_due"))
        self.run.rewind_metrics(self.step)
        self.run.log(f"continuing from {checkpoint.path} (step {self.step}, {self.images_seen:,} images seen)")
        before = state.get("seen_at_once", self.seen_at_once)  # earlier versions did not tell
        if before != self.seen_at_once and self.task.looks_at_batches():
            self.run.log(
                f"warning: {self.seen_at_once} pictures are seen at once from here on, {before} were before: terms that look at "
                "a whole batch (batch statistics, the adaptive weight, entropies) change with them. train.micro_batch and the "
                "number of ranks decide"
            )
        return True

    # ------------------------------------------------------------------------------------------------------------------
    # One step
    # ------------------------------------------------------------------------------------------------------------------
    def _autocast(self):
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def train_step(self, batch: Batch) -> dict[str, Tensor | float]:
        """Update all networks once on this rank's part of a global batch; returns device scalars to log."""
        progress = Progress(
            self.images_seen, self.total_images, self.images_per_epoch, self.step, self.settings.global_batch
        )
        parts = self.split(batch.to(self.world.device), self.accumulation)
        for i, part in enumerate(parts):
            draws = Draws(self.config.seed, part.positions, self.step)
            phases = self.task.phases(self.wrapped, part, draws, progress)
            # gradients travel between ranks with the last micro-batch only
            with parallel.unsynced(list(self.wrapped.values()) if i < len(parts) - 1 else []):
                while True:
                    with self._autocast():
                        phase = next(phases, None)
                    if phase is None:
                        break
                    (phase.loss.total / len(parts)).backward()
                    self.averages.add(phase.loss.logs)
        rates = {name: schedule(self.images_seen) for name, schedule in self.schedules.items()}
        extra: dict[str, Tensor | float] = {"lr": rates[self.task.primary]}
        done = self.images_seen / max(1, self.total_images - self.settings.global_batch)  # 1 at the last step
        for name, optimizer in self.optimizers.items():
            if name != self.task.primary and self.recipes[name] is not self.settings:
                extra[f"lr/{name}"] = rates[name]
            weight_decay = weight_decay_at(self.recipes[name].optimizer, done)
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * group.get("factor", 1.0)
                if group["decayed"]:
                    group["weight_decay"] = weight_decay
            extra[f"grad_norm/{name}"] = self.guards[name].before_step(optimizer, self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step if self.settings.ema_warmup else None)
        self.step += 1
        return extra

    # ------------------------------------------------------------------------------------------------------------------
    # The loop
    # ------------------------------------------------------------------------------------------------------------------
    def fit(self) -> int:
        """Train to the end or until asked to stop. Returns the exit code: 0 or REQUEUE_EXIT_CODE."""
        self.restore()
        live = [chart.names[0] for chart in self.task.charts() if chart.live]
        settings = (self.run, self.config.log, self.world, self.total_images, to_plain(self.config))
        log = RunLog(*settings, step=self.step, live=live, sinks=self.sinks)
        try:
            return self._fit(log)
        except Exception as error:
            if self.skeleton is None:  # else other ranks, which may be gone, write with this one
                self.store.wait()  # Python starts no thread for what is still to be written when the program is ending
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            each = self.settings.global_batch // self.world.size // self.accumulation
            raise UserError(
                f"the GPU's memory does not hold {each} picture(s) at once. Set train.micro_batch={max(1, each // 2)} "
                f"({'terms of a whole batch change' if self.task.looks_at_batches() else 'the results stay the same'}), or train.activation_checkpointing=true."
            ) from None
        finally:
            log.close()  # after an error too: the live line holds the terminal's cursor

    def _fit(self, log: RunLog) -> int:
        train = self.settings
        if log.line:
            log.line.restart(self.images_seen)
        agreed = AgreedFlag(self.world)
        steady_since, steady_step = time.perf_counter(), self.step
        with StopRequest(train.time_limit_minutes or None) as request:
            if self.evaluation_due:
                if not self._evaluate(log):
                    return self._leave(agreed, log, request.requested())
                if self.step == self.total_steps:
                    self.save(wait=True)
            batches = self.batches(self.images_seen)
            while self.step < self.total_steps:
                batch = next(batches)
                self._report_replaced(batch)
                extra = self.train_step(batch)
                last = self.step == self.total_steps
                if self._every(train.log_every, self.step) or last:
                    now = time.perf_counter()
                    speed = (self.step - steady_step) * train.global_batch / max(now - steady_since, 1e-9)
                    steady_since, steady_step = now, self.step
                    self._log_step(log, extra, speed)
                log.show(self.images_seen, self.step)
                paused = time.perf_counter()
                if self._every(train.preview_every, self.step) or (last and train.preview_every != "never"):
                    log.picture(self.preview(), self.step)
                    self.world.barrier()
                if self.evaluate and (
                    self._every(train.eval_every, self.step) or (last and train.eval_every != "never")
                ):
                    self._evaluate(log)
                if self.evaluation_due:
                    return self._leave(agreed, log, request.requested())
                stop = agreed.exchange(1 if request.requested() else 0)
                if stop and not last:
                    return self._leave(agreed, log, request.requested())
                if (
                    last
                    or self._every(train.checkpoint_every, self.step)
                    or self._every(train.milestone_every, self.step)
                ):
                    log.flush()  # a checkpoint must not be ahead of metrics.jsonl
                    self.save(wait=last)
                    self.world.barrier()  # which waits for the main rank's disk
                steady_since += time.perf_counter() - paused  # img/s counts training, not pictures and checkpoints
            agreed.drain()
        self.run.log(f"finished: {self.step} steps, {self.images_seen:,} images")
        return 0

    def _leave(self, agreed: AgreedFlag, log: RunLog, reason: str | None) -> int:
        """Save and say so. Collective; returns the exit code."""
        agreed.drain()
        log.flush()
        self.save(wait=True)
        self.world.barrier()  # ranks leave together: a launcher kills the others when one is gone
        self.run.log(f"stopped at step {self.step} ({reason or 'another rank was asked to stop'}); {GO_ON}")
        return REQUEUE_EXIT_CODE

    def _log_step(self, log: RunLog, extra: dict[str, Tensor | float], speed: float) -> None:
        self._check_guards()
        record = {
            "step": self.step,
            "images_seen": self.images_seen,
            "epoch": round(self.images_seen / self.images_per_epoch, 4),
            "images_per_second": round(speed, 2),
        }
        if self.flops and self.peak:
            record["mfu"] = round(100 * speed * self.flops / self.peak, 2)
        record["peak_memory_gib"] = round(peak_memory(self.world.device) / 2**30, 3)
        log.submit(record, self.averages, extra)
        if not self._left_said and self.step < self.total_steps and log.line:
            self._left_said = True
            left = (self.total_images - self.images_seen) / max(speed, 1e-9)
            amount = f"{left / 3600:.2g} hours" if left >= 3600 else f"{math.ceil(left / 60)} min"
            self.run.log(
                f"step {self.step:,} of {self.total_steps:,}: about {amount} left at the {speed:,.3g} img/s so far, without "
                "previews, evaluations and checkpoints"
            )

    def _report_replaced(self, batch: Batch) -> None:
        """Name pictures that could not be read, once each, on whichever rank met them."""
        for key, reason in batch.replaced.items():
            if key not in self._replaced:
                self._replaced.add(key)
                count = len(self._replaced)
                message = f"warning: {key} cannot be read and is replaced; {count} such pictures so far ({reason})"
                self.run.log(message) if self.world.is_main else print(f"rank {self.world.rank}: {message}", flush=True)

    def _check_guards(self) -> None:
        """Report skipped steps and give up after too many in a row. Reads copies requested one interval ago."""
        if self._guard_copies is not None:
            copies, copied = self._guard_copies
            if copied is not None:
                copied.synchronize()  # recorded an interval ago: already done
            for name, copy in copies.items():
                record = copy.tolist()
                message = f"{name}: {self.guards[name].describe(record)}"
                if record[0] > self._skips_reported[name]:
                    self._skips_reported[name] = record[0]
                    self.run.log(f"warning: {message}")
                if record[1] >= self.settings.max_nonfinite_steps:
                    raise UserError(
                        f"{message}. Giving up (train.max_nonfinite_steps={self.settings.max_nonfinite_steps})."
                        " The last checkpoint is intact: try a lower learning rate or train.precision=fp32."
                    )
        cuda = self.world.device.type == "cuda"
        copies = {
            name: torch.empty(guard.record.shape, dtype=torch.int64, pin_memory=cuda)
            for name, guard in self.guards.items()
        }
        for name, guard in self.guards.items():
            copies[name].copy_(guard.record, non_blocking=True)
        event = None
        if cuda:
            event = torch.cuda.Event()
            event.record()
        self._guard_copies = (copies, event)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The primary network in eval mode with averaged weights. Collective where the weights are in parts: then it is
        a copy with whole weights, since a sampler calls more than `forward`."""
        network = self.networks[self.task.primary]
        if self.skeleton is not None:
            average = next(iter(self.ema.averages.values()), {})
            weights = {n: parallel.whole(t.detach()) for n, t in {**network.state_dict(), **average}.items()}
            with torch.no_grad(), self._autocast():
                yield parallel.flesh_out(self.skeleton, weights).eval()
            self.skeleton = parallel.skeleton(self.skeleton, list(self.task.frozen().values()))  # free the weights
            return
        network.eval()
        try:
            with self.ema.applied(), torch.no_grad(), self._autocast():
                yield network
        finally:
            network.train()

    def preview(self) -> Tensor | None:
        """Write samples/step_<n>.png on the main rank, and return it, (3, H, W) uint8. Whatever goes wrong with a picture is
        said and ends no run."""
        if not self.world.is_main and self.skeleton is None:
            return None
        with self.averaged() as network:
            if not self.world.is_main:
                return None
            try:
                return self._write_preview(network)
            except (UserError, torch.OutOfMemoryError) as error:
                with contextlib.suppress(UserError):  # the disk that has no room for the picture has none for log.txt
                    self.run.log(f"warning: no preview of step {self.step}: {first_line(error)}")
        return None

    def _write_preview(self, network: nn.Module) -> Tensor:
        positions = torch.arange(PREVIEW_IMAGES, device=self.world.device)
        pictures = self.task.preview(network, Draws(hash64(self.config.seed, "preview"), positions), PREVIEW_IMAGES)
        pictures = image_tools.finite_uint8(pictures.float(), "truncate", range(len(pictures)))
        grid = image_tools.grid(pictures.cpu(), columns=PREVIEW_COLUMNS)
        self.run.require_there()
        image_tools.save_png(grid, self.run.path / "samples" / f"step_{self.step:08d}.png")
        return grid

    def _evaluate(self, log: RunLog) -> bool:
        """Online metrics. Collective: all ranks share the pictures, the main rank has the numbers.

        Returns: whether it came to its end. Where a signal stopped it, it is what a resumed run begins with.
        """
        assert self.evaluate is not None
        self.evaluation_due = True
        try:
            with self.averaged() as network:
                metrics = self.evaluate(self.task, network)
        except Stopped:
            return False
        self.evaluation_due = False
        self.world.barrier()  # the main rank alone computes distances
        if self.world.is_main:
            self._write_metrics(log, metrics)
        if self.settings.keep_best is not None:
            self._keep_best(self.settings.keep_best, metrics)
        return True

    def _write_metrics(self, log: RunLog, metrics: dict[str, float]) -> None:
        log.flush()
        log.write(
            {
                "step": self.step,
                "images_seen": self.images_seen,
                **{f"eval/{name}": value for name, value in metrics.items()},
            }
        )
        shown = {
            name: value for name, value in metrics.items() if not re.search(r"_scale\d+$", name)
        }  # sixty at ten scales
        more = (
            f"  ({len(metrics) - len(shown)} of single scales in metrics.jsonl)"
            if shown.keys() < metrics.keys()
            else ""
        )
        self.run.log(f"evaluation at step {self.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in shown.items()) + more)

    def _keep_best(self, wanted: str, metrics: dict[str, float]) -> None:
        """Save and pin this step if the wanted metric was never better. Collective: the main rank decides."""
        better = False
        name = next((n for n in sorted(metrics) if n.startswith(wanted)), wanted)  # names end with network and count
        if self.world.is_main:
            if name not in metrics:
                self.run.log(f"warning: train.keep_best={wanted} is not measured.{nearest(wanted, metrics)}")
            before = self.store.best()
            same = before.get("metric") == name and before["step"] <= self.step  # a later one is from before a rewind
            sign = -1 if self.rising(name) else 1
            better = name in metrics and not (same and sign * before["value"] <= sign * metrics[name])
        if self.world.any(better):
            self.save(wait=True)
            if self.world.is_main:
                self.store.pin(self.step, name, metrics[name])
                self.run.log(f"best so far: {name} {metrics[name]:.4g}, kept as {self.store.folder / 'best'}")
            self.world.barrier()
