"""The one way to train, for every verb: resume, log, evaluate, keep, save, stop; on one rank or on many."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from dmjd.data.loader import ReadableSamples, train_batches
from dmjd.data.sampler import StepSampler
from dmjd.engine import checkpoint
from dmjd.engine.device import memory_errors
from dmjd.engine.distributed import ParallelModel
from dmjd.engine.loop import Objective, Plan, Step, train
from dmjd.engine.optim import learning_rate
from dmjd.engine.run import Run
from dmjd.engine.signals import stop_signals
from dmjd.engine.stopwatch import Stopwatch
from dmjd.errors import NonFiniteError

WAITING = 0.1  # share of the time that images may be waited for
PATIENCE = 60.0  # seconds of training before something is said about it


class Trainer:
    """Trains a network as a plan says and writes the run down.

    Args:
        run: Where.
        model: What.
        optimizer: Steps on the model's parameters.
        plan: How long, how large, how often.
        autocast: Context of the forward pass.
        checkpointed: What a checkpoint holds, if that is more than the model: anything with state.
    """

    def __init__(
        self,
        run: Run,
        model: ParallelModel,
        optimizer: Optimizer,
        plan: Plan,
        *,
        autocast: Callable[[], AbstractContextManager[None]],
        checkpointed: nn.Module | None = None,
    ):
        self.run, self.model, self.optimizer, self.plan = run, model, optimizer, plan
        self.autocast = autocast
        self.checkpointed = checkpointed or model.module
        self.ranks = model.ranks
        self.start = 0  # steps done before
        self.logged: tuple[int, float] | None = None  # step and time of the last line
        self.waiting = Stopwatch(self.ranks.device)
        self.waited = self.trained = 0.0  # seconds of this process: until images were there, and in all, logged so far

    def begin(self, config: str, *, resume: bool) -> None:
        """Start the run with these settings, or take it up at its newest checkpoint, if it has one.

        Raises:
            CheckpointError: If the run to resume is another one, or no checkpoint is whole.
        """
        newest = self.ranks.on_main(lambda: checkpoint.latest(self.run.checkpoints)) if resume else None
        if newest is None:
            self.run.begin(config)
            return
        state = checkpoint.read_state(newest)
        self.run.restore(state)
        checkpoint.load(newest, model=self.checkpointed, trained=self.model.module, optimizer=self.optimizer)
        self.start = int(state["step"])

    def fit(
        self,
        samples: ReadableSamples,
        collate: Callable[[list[Any]], Any] | None,
        objective: Objective,
        evaluate: Callable[[int], dict[str, float]],
        *,
        keep: Callable[[str], None] | None = None,
        after_step: Callable[[int], None] = lambda step: None,
        gauge: Callable[[float], dict[str, float]] = lambda seconds: {},
        untrained: bool = False,
    ) -> dict[str, float]:
        """Train to the end and return the last evaluation.

        Args:
            samples: What training sees, by (epoch, index).
            collate: Makes a micro-batch of samples; None where these come as one.
            objective: From the model and a micro-batch to scalars by name; `loss` is minimised.
            evaluate: Judges the network after a step; its first number tells the best one.
            keep: Writes the network under a name, best.safetensors or last.safetensors.
            after_step: Called with the number of every step done.
            gauge: Adds to a line of metrics.jsonl what it has seen in the seconds since the last one.
            untrained: Evaluate before the first step as well.

        Raises:
            ConfigError: If the device has not the memory.
            DataError: If too many files do not decode.
            NonFiniteError: If loss, gradient or weights are not finite.
            SystemExit: With code 143 after SIGTERM or SIGINT, when a checkpoint is written.
        """
        with memory_errors("give more --optim.accumulation or a smaller --batch_size"):
            if untrained and self.start == 0:
                self.run.summary["untrained"] = self.evaluate(0, evaluate)
            plan = self.plan
            evaluate_at = spaced(plan.steps, plan.evaluations + 1) - {plan.steps}
            save_at = spaced(plan.steps, plan.saves) | {plan.steps}
            bar = tqdm(total=plan.steps, initial=self.start, desc="training", unit="step", disable=None)
            with bar, stop_signals() as signals:
                for step in self.steps(samples, collate, objective):
                    after_step(step.number)
                    stop = self.look_around(step, bool(signals))
                    if step.number % plan.log_every == 0 or step.number in evaluate_at | {plan.steps}:
                        bar.set_postfix(self.log(step, gauge), refresh=False)
                    if step.number in evaluate_at:
                        self.evaluate_on_the_way(step.number, evaluate, keep)
                    if step.number in save_at or stop:
                        self.save(step)
                    bar.update()
                    if stop and step.number < plan.steps:
                        print(f"stopped at step {step.number}; {self.run.out}; go on with --resume", file=sys.stderr)
                        raise SystemExit(143)
            measured = self.evaluate(plan.steps, evaluate, keep)
            if keep is not None:
                keep("last.safetensors")
            return measured

    def steps(
        self, samples: ReadableSamples, collate: Callable[[list[Any]], Any] | None, objective: Objective
    ) -> Iterator[Step]:
        """Load this rank's share of every batch and train on it, step by step, to the end of the plan."""
        plan, ranks = self.plan, self.ranks
        sampler = StepSampler(
            len(samples.images),
            plan.batch_size,
            self.start,
            plan.steps,
            plan.seed,
            plan.accumulation,
            ranks.rank,
            ranks.world_size,
        )
        warmup = plan.warmup_epochs * len(samples.images) / plan.batch_size
        lr = learning_rate(plan.lr, warmup=warmup, steps=plan.steps, shape=plan.shape)
        on_gpu = ranks.device.type == "cuda"
        batches = train_batches(samples, sampler, collate, workers=plan.workers, pin_memory=on_gpu)
        self.model.module.train()
        return train(
            self.model,
            self.optimizer,
            self.waiting.timed(iter(batches)),
            objective,
            plan,
            start=self.start,
            lr=lr,
            autocast=self.autocast,
        )

    def look_around(self, step: Step, signalled: bool) -> bool:
        """Agree with the other ranks on whether to stop, and share what did not decode."""
        stop, broken = self.ranks.agree(signalled, not step.skipped.keys() <= self.run.skipped.keys())
        if broken:
            self.run.skip({name: reason for each in self.ranks.gather(step.skipped) for name, reason in each.items()})
        return stop

    def log(self, step: Step, gauge: Callable[[float], dict[str, float]]) -> dict[str, str]:
        """Write a step down; here the loop waits for the device. Returns what the bar shows.

        Raises:
            NonFiniteError: If loss or gradient are not finite.
        """
        losses = {name: float(value) for name, value in self.ranks.mean(step.losses).items()}
        grad_norm = float(step.grad_norm)
        now, since = time.perf_counter(), self.logged or (step.start, step.began)
        rate = (step.number - since[0]) * self.plan.batch_size / (now - since[1])
        waited = self.waiting.read() / (now - since[1])
        self.run.write(
            step.number,
            losses
            | {"lr": step.lr, "grad_norm": grad_norm, "data_share": round(waited, 4)}
            | {"images_per_second": round(rate, 2)}
            | gauge(now - since[1]),
        )
        self.logged = (step.number, now)
        self.warn_of_waiting(waited * (now - since[1]), now - since[1])
        if not torch.tensor([losses["loss"], grad_norm]).isfinite().all():
            raise NonFiniteError(
                f"the loss is {losses['loss']} and the gradient's norm {grad_norm} at step {step.number}; "
                f"{self.run.out}; checkpoints before are finite: start another run with a lower --optim.blr"
            )
        return {name.removeprefix("loss_"): f"{value:.4f}" for name, value in losses.items()} | {
            "images/s": f"{rate:.0f}",
            "waiting": f"{waited:.0%}",
        }

    def warn_of_waiting(self, waited: float, seconds: float) -> None:
        """Say what would help, once, where a tenth of a minute's work and more has gone into waiting for images."""
        before, (self.waited, self.trained) = self.trained, (self.waited + waited, self.trained + seconds)
        if before < PATIENCE <= self.trained and self.waited > WAITING * self.trained and self.ranks.is_main:
            print(
                f"warning: {self.waited / self.trained:.0%} of the time goes into waiting for images; "
                f"{self.run.address}; give more --workers where there are cores, or decode them once with dmjd prepare",
                file=sys.stderr,
            )

    def evaluate(
        self, step: int, evaluate: Callable[[int], dict[str, float]], keep: Callable[[str], None] | None = None
    ) -> dict[str, float]:
        """Measure what the network is worth after a step, write it down, and keep the network if it is the best."""
        measured = evaluate(step)
        if step not in self.run.evaluated:
            self.run.write(step, measured)
        if keep is not None:
            name, score = next(iter(measured.items()))
            if score > self.run.summary.get(f"best_{name}", -1.0):
                self.run.summary[f"best_{name}"] = score
                keep("best.safetensors")
        return measured

    def evaluate_on_the_way(
        self, step: int, evaluate: Callable[[int], dict[str, float]], keep: Callable[[str], None] | None
    ) -> None:
        """Evaluate between two steps, and count the seconds that this takes."""
        began = time.perf_counter()
        self.evaluate(step, evaluate, keep)
        taken = self.run.summary.get("monitor_seconds", 0.0) + time.perf_counter() - began
        self.run.summary["monitor_seconds"] = round(taken, 1)
        self.logged = (step, time.perf_counter())
        self.model.module.train()

    def save(self, step: Step) -> None:
        """Write a checkpoint.

        Raises:
            NonFiniteError: If a weight is not finite; then none is written.
        """
        (broken,) = self.ranks.agree(not checkpoint.is_finite(self.checkpointed))
        if broken:
            raise NonFiniteError(f"weights are not finite at step {step.number}; {self.run.out}; lower --optim.blr")
        tensors = checkpoint.collect(self.checkpointed, self.model.module, self.optimizer)
        state = self.run.state() | {"step": step.number}
        self.ranks.on_main(lambda: checkpoint.save(self.run.checkpoints, tensors, state))
        loss = float(self.ranks.mean(step.losses)["loss"])
        if not sys.stderr.isatty():
            print(f"step {step.number}: loss {loss:.4f}, saved", file=sys.stderr, flush=True)


def spaced(steps: int, parts: int) -> set[int]:
    """Cut a run into equal parts and return the steps where they end."""
    return {round(steps * part / parts) for part in range(1, parts + 1)} - {0}
