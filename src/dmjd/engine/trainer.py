"""The one trainer of all verbs: resumes, logs, evaluates, keeps the best network, saves and stops, on any ranks."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dmjd.data.loader import ReadableSamples, train_batches
from dmjd.data.sampler import StepSampler
from dmjd.data.source import join_skipped
from dmjd.engine import checkpoint
from dmjd.engine.device import choose_precision, computes_in_bf16, memory_errors
from dmjd.engine.distributed import ParallelModel
from dmjd.engine.loop import Objective, Plan, Step, train
from dmjd.engine.optim import learning_rate
from dmjd.engine.progress import Progress, two_digits
from dmjd.engine.run import Run
from dmjd.engine.signals import patiently, stopped, stopping
from dmjd.engine.stopwatch import Stopwatch
from dmjd.errors import CheckpointError, NonFiniteError, Stopped
from dmjd.random import mix

IN_A_ROW = 3  # steps without a finite gradient after which a run rolls back
ROLLBACKS = 2  # after which it ends
WAITING = 0.1  # share of the time spent waiting for images above which a warning is printed
PATIENCE = 60.0  # seconds of training before that warning
LESS_MEMORY = "give a smaller --batch_size, or compute it in more parts (accumulation) where the verb can"


class DivergedError(Exception):
    """The reason to roll a run back, as its message."""


class Trainer:
    """Trains a network by a plan and records the run.

    Args:
        run: Directory and records of the run.
        model: Model to train.
        optimizer: Updates the model's parameters.
        plan: Length and size of steps, and how often to log, evaluate and save.
        autocast: Context of the forward pass.
        checkpointed: Module that checkpoints save, if it is more than the model: anything with state.
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
        self.progress = Progress(plan.steps, silent=not self.ranks.is_main)
        self.done = 0  # steps done, including those of earlier processes
        self.last: Step | None = None
        self.saved = (0, 0.0)  # step and time of the last checkpoint, or of the start of training
        self.evaluate_at = spaced(plan.steps, plan.evals + 1) - {plan.steps}
        self.save_at = spaced(plan.steps, plan.saves) | {plan.steps}
        self.logged: tuple[int, float] | None = None  # step and time of the last line
        self.finite: list[Tensor] = []  # whether the gradient was, of every step since the last line
        self.in_a_row = 0  # steps without a finite gradient
        self.waiting = Stopwatch(self.ranks.device)
        self.data_seconds = self.trained = 0.0  # of this process, logged so far: waiting for images, and in total

    def begin(self, *, resume: bool) -> None:
        """Start the run, or resume it from its newest checkpoint, if it has one.

        Raises:
            CheckpointError: If settings or images of the run differ, or no checkpoint is intact.
        """
        newest = self.ranks.on_main(lambda: checkpoint.latest(self.run.checkpoints)) if resume else None
        if newest is None:
            self.run.begin()
        else:
            self.restore(newest)
        self.model.begin(self.plan.steps)

    def restore(self, path: Path) -> None:
        """Resume from a checkpoint, with a later end if the run is longer now.

        Raises:
            CheckpointError: If the run would end before the checkpoint, or its settings or images differ.
        """
        state, steps = checkpoint.read_state(path), self.plan.steps
        planned, done = state.get("planned", steps), state["step"]
        if done > steps:
            such = f"a run cannot get shorter than it is: steps {done} -> {steps}; {self.run.out}"
            raise CheckpointError(f"{such}; give as many --steps or --epochs as it has had, or more")
        self.run.restore(state, longer=steps > planned)
        if steps > planned and self.ranks.is_main:
            said = f"{steps} steps instead of {planned}: from step {done} the learning rate follows the longer schedule"
            print(f"{said}, to zero at the new end", file=sys.stderr)
        if self.run.settings.get("precision") == "auto":  # a choice stays with the run, wherever it resumes
            before = "fp32" if self.ranks.device.type == "cpu" else "auto"
            self.autocast = choose_precision(state.get("precision", before), self.ranks.device)
        checkpoint.load(path, model=self.checkpointed, trained=self.model.module, optimizer=self.optimizer)
        self.done, self.logged, self.in_a_row = done, None, 0
        self.finite.clear()

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
            samples: Training samples, by (epoch, index).
            collate: Makes a micro-batch from samples; None where these come as a batch.
            objective: From the model and a micro-batch to scalars by name; `loss` is minimised.
            evaluate: Evaluates the network after a step; the best network has the highest first number.
            keep: Saves the network under a name, best.safetensors or last.safetensors.
            after_step: Called after every step, with the number of steps done.
            gauge: Returns further numbers for a line of metrics.jsonl, given the seconds since the last line.
            untrained: Whether to evaluate before the first step as well.

        Raises:
            ConfigError: If the device runs out of memory.
            DataError: If too many files do not decode.
            NonFiniteError: If gradients or weights are not finite and rolling back did not help.
            Stopped: After a signal, once a checkpoint is written.
        """
        plan, unevaluated = self.plan, self.evaluate_at - self.run.evaluated
        self.introduce()
        with memory_errors(LESS_MEMORY), patiently(), self.run.logging(), self.progress.shown(self.done):
            if untrained and self.done == 0:
                self.run.summary["untrained"] = self.evaluate(0, evaluate)
            elif self.done in unevaluated:  # it was stopped there
                self.evaluate(self.done, evaluate, keep)
            while self.done < plan.steps:
                try:
                    self.saved = (self.done, time.perf_counter())
                    for step in self.steps(samples, collate, objective):
                        after_step(step.number)
                        stop, due = self.look_around(step)
                        if step.number % plan.log_every == 0 or step.number in self.evaluate_at | {plan.steps}:
                            self.progress.measure(self.log(step, gauge))
                        if step.number in self.evaluate_at and not stop:
                            stop = self.evaluate_on_the_way(step.number, evaluate, keep)
                        if step.number in self.save_at or due:
                            self.save()
                        self.progress.move(self.done)
                        if stop:
                            break
                    if self.done < plan.steps:
                        self.end_early()
                except DivergedError as diverged:
                    self.roll_back(str(diverged))
            measured = self.evaluate(plan.steps, evaluate, keep)
            if keep is not None:
                keep("last.safetensors")
            return measured

    def introduce(self) -> None:
        """Describe the training on stderr, unless the run is finished, and warn of a batch larger than the set."""
        run, plan, device = self.run, self.plan, self.ranks.device
        if not self.ranks.is_main or self.done == plan.steps:
            return
        if plan.batch_size > run.count:
            said = f"a step has {plan.batch_size} images, the set only {run.count}"
            print(f"warning: {said}; {run.address}; choose a smaller --batch_size", file=sys.stderr)
        if self.progress.has_bar:
            return
        precision = self.precision
        precision += " (see --precision)" if precision == "bf16" and device.type == "cpu" else ""
        precision += ", compiled" if self.model.compiled else ""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        parameters = sum(each.numel() for group in self.optimizer.param_groups for each in group["params"])
        for line in (
            f"{name}, {precision}, {self.ranks.world_size} process{'es' * (self.ranks.world_size > 1)}",
            f"{run.count} images of {run.address}, {run.held_out} held out",
            f"steps {self.done + 1} to {plan.steps}, {plan.batch_size} images each: "
            f"{plan.steps * plan.batch_size / run.count:.4g} epochs",
            f"{parameters / 1e6:.3g} M parameters are trained",
        ):
            print(f"training: {line}", file=sys.stderr, flush=True)

    @property
    def precision(self) -> str:
        """Precision of matrix products: bf16 or fp32."""
        return "bf16" if computes_in_bf16(self.autocast, self.ranks.device) else "fp32"

    def steps(
        self, samples: ReadableSamples, collate: Callable[[list[Any]], Any] | None, objective: Objective
    ) -> Iterator[Step]:
        """Load this rank's share of every batch and train on it, step by step, to the end of the plan."""
        # After a rollback the images come in another order, or the run would diverge again.
        rollbacks = self.run.summary.get("rollbacks", 0)
        plan = replace(self.plan, seed=mix(self.plan.seed, rollbacks)) if rollbacks else self.plan
        ranks = self.ranks
        sampler = StepSampler(
            len(samples.images),
            plan.batch_size,
            self.done,
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
            start=self.done,
            lr=lr,
            autocast=self.autocast,
        )

    def look_around(self, step: Step) -> tuple[bool, bool]:
        """Agree with the other ranks on whether to stop and to save, and share the files that did not decode."""
        self.last, self.done = step, step.number
        self.finite.append(step.finite)
        due = self.ranks.is_main and time.perf_counter() - self.saved[1] > 60 * self.plan.checkpoint_minutes
        new = not step.skipped.keys() <= self.run.skipped.keys()
        stop, broken, due = self.ranks.agree(stopping(), new, due)
        if broken:
            self.run.skip(join_skipped(self.ranks.gather(step.skipped)))
        return stop, due

    def count_skipped(self, number: int) -> None:
        """Count the steps up to `number` whose gradient was not finite; this synchronises with the device.

        Raises:
            DivergedError: If there are three in a row.
        """
        finite = torch.stack(self.finite).tolist() if self.finite else []
        self.finite.clear()
        for step, good in enumerate(finite, start=number - len(finite) + 1):
            self.in_a_row = 0 if good else self.in_a_row + 1
            if self.in_a_row == IN_A_ROW:
                raise DivergedError(f"{IN_A_ROW} gradients in a row are not finite at step {step}")
            if not good:
                self.run.summary["skipped_steps"] = self.run.summary.get("skipped_steps", 0) + 1
                if self.ranks.is_main:
                    print(f"warning: the gradient is not finite at step {step}; the step is skipped", file=sys.stderr)

    def roll_back(self, why: str) -> None:
        """Roll back to an intact checkpoint: the newest, or the second time the one before it, if there is one.

        Raises:
            NonFiniteError: If there is none, or the run was rolled back twice before.
        """
        before = self.run.summary.get("rollbacks", 0)
        good = self.ranks.on_main(lambda: checkpoint.whole_ones(self.run.checkpoints))
        if before == ROLLBACKS or not good:
            tried = f"after {before} rollbacks" if before else "and there is no checkpoint to go back to"
            raise NonFiniteError(f"{why}, {tried}; {self.run.out}; start another run with a lower blr")
        self.restore(good[min(before, len(good) - 1)])
        self.run.summary["rollbacks"] = before + 1
        if self.ranks.is_main:
            said = f"warning: {why}; back to step {self.done}, other images from there"
            print(f"{said} (rollback {before + 1} of {ROLLBACKS})", file=sys.stderr)

    def log(self, step: Step, gauge: Callable[[float], dict[str, float]]) -> dict[str, str]:
        """Log a step, which synchronises with the device; returns the numbers to show.

        Raises:
            DivergedError: If too many gradients were not finite.
        """
        self.count_skipped(step.number)
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
        return {name.removeprefix("loss_"): f"{value:.4f}" for name, value in losses.items()} | {
            "lr": f"{step.lr:.2g}",
            "images/s": two_digits(rate),
            "waiting": f"{waited:.0%}",
        }

    def warn_of_waiting(self, waited: float, seconds: float) -> None:
        """Warn once, after a minute of training, if more than a tenth of the time went into waiting for images."""
        before, (self.data_seconds, self.trained) = self.trained, (self.data_seconds + waited, self.trained + seconds)
        if before < PATIENCE <= self.trained and self.data_seconds > WAITING * self.trained and self.ranks.is_main:
            print(
                f"warning: {self.data_seconds / self.trained:.0%} of the time goes into waiting for images; "
                f"{self.run.address}; give more --workers where there are cores, or decode them once with dmjd prepare",
                file=sys.stderr,
            )

    def evaluate(
        self, step: int, evaluate: Callable[[int], dict[str, float]], keep: Callable[[str], None] | None = None
    ) -> dict[str, float]:
        """Evaluate the network after a step, record the result, and keep the network if it is the best."""
        with self.model.plainly():
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
    ) -> bool:
        """Evaluate between two steps and record the seconds; returns whether a signal interrupted it."""
        began = time.perf_counter()
        try:
            self.evaluate(step, evaluate, keep)
        except Stopped:
            return True
        taken = self.run.summary.get("monitor_seconds", 0.0) + time.perf_counter() - began
        self.run.summary["monitor_seconds"] = round(taken, 1)
        self.logged = (step, time.perf_counter())
        self.model.module.train()
        return False

    def end_early(self) -> None:
        """Stop after the last step, with a checkpoint of it.

        Raises:
            Stopped: Always.
        """
        if self.saved[0] < self.done:
            self.save()
        stop = stopped()
        stop.said += f" at step {self.done}"
        raise stop

    def save(self) -> None:
        """Write a checkpoint of the last step.

        Raises:
            DivergedError: If weights or optimizer states are not finite; no checkpoint is written then.
        """
        assert self.last
        step = self.last
        self.count_skipped(step.number)
        tensors = checkpoint.collect(self.checkpointed, self.model.module, self.optimizer, keep=self.ranks.is_main)
        if not self.ranks.on_main(lambda: checkpoint.is_finite(tensors)):
            raise DivergedError(f"weights are not finite at step {step.number}")
        state = self.run.state() | {"step": step.number, "planned": self.plan.steps, "precision": self.precision}
        self.ranks.on_main(lambda: checkpoint.save(self.run.checkpoints, tensors, state))
        self.saved = (step.number, time.perf_counter())
        self.progress.done = step.number
        self.progress.tell("saved")


def spaced(steps: int, parts: int) -> set[int]:
    """Divide a run into equal parts and return the steps where they end."""
    return {round(steps * part / parts) for part in range(1, parts + 1)} - {0}
