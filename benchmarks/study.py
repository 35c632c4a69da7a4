"""Studies: many short runs of `dmjd`, described in one YAML file, whose results are small JSON files.

    python benchmarks/study.py run benchmarks/studies/halves.yaml ... --data IMAGES [--jobs 2] [--minutes 60]
    python benchmarks/study.py time benchmarks/studies/halves.yaml --data IMAGES
    python benchmarks/study_tables.py

A study trains every **arm** (settings of `dmjd pretrain`) at several **budgets** (effective epochs: rows divided by
images of the set) and seeds. Every arm has the same number of rows (views of an image) per step, so equal budgets are
equal steps.
First the arm's peak learning rate is searched: among `rates.values`, and beyond them if the best is at the edge, at
`rates.budget` or the arm's own in `rates.budgets`, by a linear probe on images of the training part that are never
trained on. Only then come the runs that count, and only they see the test part. The arm `untrained` takes one step at
rate 0. The protocol is docs/results/protocol.md.

`run` computes what is missing below docs/results/NAME, one JSON file per run; a study that is `like` another reuses its
results of the same settings. An interrupted run resumes in --work, or starts again on another machine.
Everything runs with a copy of the program, made from the last commit when --work was new, so that development can go on
meanwhile.
A stored result with another rate or other settings than the file now asks for stops it with a line that names it.
IMAGES is a folder train/CLASS/IMAGE and test/CLASS/IMAGE.
"""

import argparse
import concurrent.futures
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
WARMUP = 0.05  # share of the steps
ROUNDS = 7  # of timing
STEPS = 6  # per arm and round, so that one, two or three crop sizes occur equally often
SHARED = ("data", "rows", "rates", "judges", "finetune", "common")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run of an arm: a budget, a seed and a peak learning rate, `searching` for that rate or one that counts."""

    arm: str
    budget: float
    seed: int
    rate: float
    searching: bool

    @property
    def name(self) -> str:
        """The path of its result below that of the study, without .json."""
        cell = f"{self.arm}@{self.budget:g}"
        return f"rates/{cell}-{self.rate:g}" if self.searching else f"{cell}-{self.seed}"


class Study:
    """The runs that a YAML file asks for, and their existing results.

    Args:
        path: The file.
        teacher: Backbone file that replaces TEACHER in it.
    """

    def __init__(self, path: Path, teacher: str = "TEACHER"):
        self.name, self.asked, self.teacher = path.stem, yaml.safe_load(path.read_text()), teacher
        self.folder = RESULTS / self.name
        self.folders = [self.folder]  # where results are
        if "like" in self.asked:  # another study: take all but runs, contrasts and, if given here, arms
            self.folders.append(RESULTS / self.asked["like"])
            like = yaml.safe_load(path.with_name(f"{self.asked['like']}.yaml").read_text())
            shared = SHARED if "arms" in self.asked else (*SHARED, "arms")
            self.asked = merge({key: like[key] for key in shared}, self.asked)

    @property
    def arms(self) -> list[str]:
        """The requested arms, in the order in which the runs name them, then those that only need a search."""
        named = [cell.rpartition("@")[0] for part in self.asked["runs"] for cell in part["cells"]]
        return list(dict.fromkeys([*named, *self.asked["rates"].get("also", ())]))

    @cached_property
    def num_images(self) -> int:
        """Images of a training part."""
        return int(self.asked["data"]["train"] * self.asked["data"]["classes"])

    def settings(self, job: Job) -> Settings:
        """All settings of `dmjd pretrain` for a job but the paths: what is common, the arm's, and what follows."""
        arm = dict(self.asked["arms"][job.arm])
        rows = arm.pop("rows", self.asked["rows"])
        merged = merge(self.asked["common"], arm)
        masking = merged["masking"]
        batch_size, rest = divmod(rows, masking["num_views"])
        assert not rest, f"{rows} rows are not whole images of {masking['num_views']} views"
        steps = max(round(job.budget * self.num_images / rows), 1)
        # The program's rule: lr = blr * images a step * (predict_ratio / mask_ratio) / 256.
        blr = job.rate * 256 / batch_size * masking["mask_ratio"] / masking["predict_ratio"]
        warmup = WARMUP * steps * batch_size / self.num_images
        derived = {"batch_size": batch_size, "steps": steps, "seed": job.seed}
        return merge(merged, derived | {"optim": {"blr": blr, "warmup_epochs": warmup}})

    def timed(self, arm: str) -> Settings:
        """All settings of the training step of an arm that is timed."""
        return self.settings(Job(arm, 1, 0, 1e-3, True))

    def config(self, settings: Settings) -> str:
        """Write settings as a file for `dmjd pretrain --config`."""
        return yaml.safe_dump(settings).replace("TEACHER", self.teacher)

    def result(self, job: Job) -> Settings | None:
        """Read the result of a job, if it exists: here, or as the same run of the study that this one is like.

        Raises:
            SystemExit: If the result stored here has another rate or other settings than the file now asks for.
        """
        for path in (folder / f"{job.name}.json" for folder in self.folders):
            if not path.is_file():
                continue
            found = read(path)
            asked, stored = {"rate": job.rate, **self.settings(job)}, {"rate": found["rate"], **found["settings"]}
            others = sorted(key for key in asked.keys() | stored.keys() if asked.get(key) != stored.get(key))
            if not others:
                return found
            if path.is_relative_to(self.folder):
                raise SystemExit(
                    f"error: what is stored is not what {self.name}.yaml asks for, but differs in {', '.join(others)}; "
                    f"{path}; move the file away, or take the change of the study back"
                )
        return None

    def rate_jobs(self, arm: str) -> list[Job]:
        """List the runs of an arm's search that are known to be needed: the best rate must not be at the edge."""
        search = self.asked["rates"]
        budget, seed = search.get("budgets", {}).get(arm, search["budget"]), search.get("seed", 100)
        values = sorted(search["values"])

        def jobs() -> list[Job]:
            return [Job(arm, budget, seed, float(f"{rate:.3g}"), True) for rate in values]

        while len(values) > 1 and all(self.result(job) for job in jobs()):
            best = self.best(jobs())
            if best == values[-1]:
                values.append(2 * best)
            elif best == values[0]:
                values.insert(0, best / 2)
            else:
                break
        return jobs()

    def best(self, jobs: list[Job]) -> float:
        """Choose the rate of the finished job with the best linear probe."""

        def score(job: Job) -> float:
            found = self.result(job)
            assert found
            return float(found["measures"]["linear"]["top1"])

        return max(jobs, key=score).rate

    def rate(self, arm: str) -> float | None:
        """Look up an arm's rate, or None during its search; an arm may use that of another."""
        if arm == "untrained":
            return 0.0
        named = self.asked["rates"].get("same", {}).get(arm)
        if named:
            return self.rate(named)
        jobs = self.rate_jobs(arm)
        if len(jobs) == 1:
            return jobs[0].rate
        return self.best(jobs) if all(self.result(job) for job in jobs) else None

    def cells(self) -> Iterator[tuple[str, float, int]]:
        """Iterate over arm, budget and seed of the runs that count, the most important first."""
        for part in self.asked["runs"]:
            for seed in range(part.get("from_seed", 0), part["seeds"]):
                for cell in part["cells"]:
                    arm, _, budget = cell.rpartition("@")
                    yield arm, float(budget), seed

    def missing(self) -> list[Job]:
        """List the jobs that can run now and have no result."""
        jobs = dict.fromkeys(job for arm in self.asked["rates"].get("also", ()) for job in self.rate_jobs(arm))
        for arm, budget, seed in self.cells():
            rate = self.rate(arm)
            if rate is None:
                source = self.asked["rates"].get("same", {}).get(arm, arm)
                jobs |= dict.fromkeys(self.rate_jobs(source))
            else:
                jobs[Job(arm, budget, seed, rate, False)] = None
        return [job for job in jobs if self.result(job) is None]


def read(path: Path) -> Settings:
    """Read a result."""
    return dict(json.loads(path.read_text()))


def merge(below: Settings, above: Settings) -> Settings:
    """Override settings by others, section by section."""
    both = {
        key: merge(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], dict) and isinstance(above[key], dict)
    }
    return below | above | both


class Machine:
    """The environment of a study's jobs: a copy of the program, lists of the images, and a device."""

    def __init__(self, study: Study, images: Path, work: Path, device: str):
        self.study, self.images, self.device = study, images.resolve(), device
        self.work = work.resolve() / study.name
        self.site = work.resolve() / "site"
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = threading.Event()

    def prepare(self) -> None:
        """Install the last commit beside the work, and write the lists of images, unless they are there."""
        if not self.site.is_dir():
            wheels = self.site.with_name("wheel")
            commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
            source = wheels / "source"
            source.mkdir(parents=True)
            archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE)
            subprocess.run(["tar", "x", "-C", source], input=archive.stdout, check=True)
            pip = [sys.executable, "-m", "pip", "--quiet"]
            subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, source], check=True)
            made = self.site.with_name("site.part")
            subprocess.run([*pip, "install", "--no-deps", "--target", made, *wheels.glob("*.whl")], check=True)
            (made / "commit").write_text(commit)
            made.rename(self.site)
        self.work.mkdir(parents=True, exist_ok=True)
        self.commit = (self.site / "commit").read_text()
        data = self.study.asked["data"]
        train = {each.name: sorted(each.iterdir()) for each in sorted((self.images / "train").iterdir())}
        assert len(train) == data["classes"], f"{len(train)} classes"
        trained = [each for files in train.values() for each in files[: data["train"]]]
        tuned = [each for files in train.values() for each in files[data["train"] :][: data["tune"]]]
        tested = sorted((self.images / "test").glob("*/*"))
        for name, held_out in (("tune", tuned), ("final", tested)):
            with (self.work / f"{name}.csv").open("w", newline="") as file:
                table = csv.writer(file)
                table.writerow(["path", "label", "split"])
                table.writerows([each, each.parent.name, "train"] for each in trained)
                table.writerows([each, each.parent.name, "test"] for each in held_out)

    def dmjd(self, *words: object, run: Path, part: str) -> str:
        """Run a command; return the last line that it prints.

        Its cost is added up in the folder `run`, under the name `part`, even if it stops to be resumed later.

        Raises:
            InterruptedError: If it was told to stop.
            RuntimeError: If it fails; the message names its log.
        """
        environment = os.environ | {"PYTHONPATH": f"{self.site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        if self.device == "cpu":
            environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "dmjd.cli", *map(str, words), "--workers", "0", "--device", self.device]
        began, log = time.perf_counter(), run / "log.txt"
        with log.open("a") as errors:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        self.running.add(process)
        if self.stopped.is_set():
            process.send_signal(signal.SIGTERM)
        assert process.stdout
        with process.stdout:
            printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.running.discard(process)
        cost = {"seconds": time.perf_counter() - began, "cpu_seconds": usage.ru_utime + usage.ru_stime}
        add_cost(run / "spent.json", part, cost)
        if process.returncode and self.stopped.is_set():
            raise InterruptedError
        if process.returncode:
            raise RuntimeError(f"exit {process.returncode}: {' '.join(command[3:])}; see {log}")
        return printed.strip().rpartition("\n")[2]

    def do(self, job: Job) -> None:
        """Train, evaluate and store one job."""
        settings = self.study.settings(job)
        run = self.work / job.name
        run.mkdir(parents=True, exist_ok=True)
        config = run / "study.yaml"
        config.write_text(self.study.config(settings))
        tune, final = self.work / "tune.csv", self.work / "final.csv"
        words = ["--config", config, "--data", tune, "--out", run / "pretrain"]
        self.dmjd("pretrain", *words, *resumption(run / "pretrain"), run=run, part="pretrain")
        backbone = run / "pretrain" / "backbone.safetensors"
        measures: dict[str, Settings] = {}
        for judge in ["linear"] if job.searching else self.study.asked["judges"]:
            verb, _, fraction = judge.partition("-")
            words = [verb, "--backbone", backbone, "--data", tune if job.searching else final]
            if verb != "knn":
                words += ["--out", run / judge, *(["--fraction", fraction] if fraction else [])]
            if verb == "finetune":
                words += ["--seed", job.seed, *self.study.asked["finetune"][fraction].split()]
                words += resumption(run / judge)
            measures[judge] = json.loads(self.dmjd(*words, run=run, part=judge))
        summary, spent = read(run / "pretrain" / "summary.json"), read(run / "spent.json")
        views = settings["masking"]["num_views"]
        found = {
            "study": self.study.name,
            **vars(job),
            "steps": settings["steps"],
            "images": settings["steps"] * settings["batch_size"],
            "rows": settings["steps"] * settings["batch_size"] * views,
            "parameters": summary["parameters"],
            "measures": measures,
            "spent": spent,
            "device": device_name(self.device),
            "commit": self.commit,
            "versions": versions(),
            "settings": settings,
        }
        path = self.study.folder / f"{job.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(path)
        shutil.rmtree(run)
        print(
            f"{job.name}: linear {measures['linear']['top1']:.1%}, {spent['pretrain']['cpu_seconds']:.0f} s", flush=True
        )

    def stop(self) -> None:
        """Tell all commands to write a checkpoint and stop."""
        self.stopped.set()
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)


def work_off(machines: list[Machine], jobs: int, minutes: float) -> None:
    """Run the missing jobs of all studies, `jobs` at a time, until none is missing or the time is over.

    A later study begins as soon as an earlier one has nothing left to start, so that no slot is idle during the last
    runs of a study, or while its runs wait for a search for rates.
    """
    lock, taken = threading.Lock(), set[tuple[int, Job]]()

    def stop(*_: object) -> None:
        for machine in machines:
            machine.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

    def take() -> tuple[int, Job] | None:
        with lock:
            listed = ((place, job) for place, machine in enumerate(machines) for job in machine.study.missing())
            chosen = next((each for each in listed if each not in taken), None)
            taken.update({chosen} if chosen else set())
            return chosen

    def work() -> None:
        while not machines[0].stopped.is_set():
            chosen = take()
            if chosen:
                place, job = chosen
                machines[place].do(job)
            elif all(machines[place].study.result(job) for place, job in taken):
                return
            else:  # other jobs search for rates that the rest needs
                time.sleep(1)

    timer = threading.Timer(60 * minutes, stop)
    timer.daemon = True
    timer.start()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for done in concurrent.futures.as_completed([pool.submit(work) for _ in range(jobs)]):
            if isinstance(done.exception(), InterruptedError):
                continue
            if done.exception():
                stop()
            done.result()


def add_cost(path: Path, part: str, cost: dict[str, float]) -> None:
    """Add the cost of a command to that of earlier ones for the same part of a run."""
    spent = read(path) if path.is_file() else {}
    before = spent.get(part, {})
    spent[part] = {name: round(before.get(name, 0) + value, 1) for name, value in cost.items()}
    made = path.with_suffix(".part")
    made.write_text(json.dumps(spent))
    made.rename(path)


def resumption(out: Path) -> list[str]:
    """Return the flag that resumes a run, if there is one."""
    return ["--resume"] if out.exists() else []


def device_name(device: str) -> str:
    """Name the device: the GPU, or the model of the CPU."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in known if line.startswith("model name")), "cpu")


def versions() -> dict[str, str]:
    """Look up the versions in use."""
    return {name: version(name) for name in ("torch", "timm")}


def measure_times(study: Study, images: Path, device: str) -> None:
    """Time and count a training step of every arm on data that is ready: in turns, on one thread.

    All rounds are stored, with their settings. Counted are the floating-point operations of matrix products, attention
    and convolutions, in the forward pass, the backward pass and the targets.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dmjd.planning.work import FORMULAS

    steps = {arm: training_step(study, arm, images, device) for arm in study.arms}
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    flops: dict[str, float] = {}
    for arm, step in steps.items():
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            for _ in range(STEPS):
                step()
        flops[arm] = counter.get_total_flops() / STEPS
    for turn in range(ROUNDS):
        for arm, step in steps.items():
            began = clock(device)
            for _ in range(STEPS):
                step()
            seconds[arm].append((clock(device) - began) / STEPS)
        print(f"round {turn + 1} of {ROUNDS}", file=sys.stderr)
    arms = {}
    for arm, times in seconds.items():
        rows = study.asked["arms"][arm].get("rows", study.asked["rows"])
        arms[arm] = {
            "ms_per_row": [round(1000 * each / rows, 3) for each in times],
            "mflop_per_row": round(flops[arm] / rows / 1e6, 2),
            "settings": study.timed(arm),
        }
    found = {"device": device_name(device), "versions": versions(), "arms": arms}
    study.folder.mkdir(parents=True, exist_ok=True)
    (study.folder / "times.json").write_text(json.dumps(found, indent=1) + "\n")


def clock(device: str) -> float:
    """Return seconds: CPU time of this thread, or wall-clock time once a GPU has finished."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def training_step(study: Study, arm: str, images: Path, device: str) -> Any:
    """Make a function that runs one training step of an arm, on the first images of the training part.

    With progressive crops, steps take their sizes in turn.
    """
    import torch
    from torch.nn.functional import interpolate

    from dmjd.cli import application, layers_of
    from dmjd.data.decode import Wanted
    from dmjd.data.source import open_source
    from dmjd.engine.optim import create_optimizer
    from dmjd.factory import masks_of
    from dmjd.tasks.pretrain import create

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        config.write(study.config(study.timed(arm)))
        config.flush()
        words = ["pretrain", "--data", str(images), "--config", config.name]
        _, bound, _ = application(layers_of(words)).parse_args(words)
    settings = bound.arguments["settings"]
    network = create(settings).to(device)
    optimizer = create_optimizer(network, lr=1e-4, **settings.optim.keywords)
    source = open_source(str(images), Wanted(3, settings.model.image_hw), seed=0).train
    pixels = torch.stack([source.read(index) for index in range(settings.run.batch_size)]).to(device)
    crops = [interpolate(pixels.float(), size=size).to(pixels.dtype) for size in settings.crop_sizes]
    draw = count()

    def step() -> None:
        number = next(draw)
        images, seeds = crops[number % len(crops)], torch.arange(len(pixels), device=device) + number * len(pixels)
        grid = tuple(side // settings.model.patch_size for side in images.shape[-2:])
        loss = network(images, masks_of(settings, seeds, grid)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        network.update_targets(0.5)

    step()
    return step


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "time"])
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="folder train/CLASS/IMAGE and test/CLASS/IMAGE")
    parser.add_argument("--teacher", default="TEACHER", help="file that TEACHER in a study stands for")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--minutes", type=float, default=1e6, help="then every run writes a checkpoint and stops")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "study", help="for what is not kept")
    given = parser.parse_args()
    named = [Study(path, given.teacher) for path in given.studies]
    if given.what == "time":
        for study in named:
            measure_times(study, given.data, given.device)
        return
    machines = [Machine(study, given.data, given.work, given.device) for study in named]
    for machine in machines:
        machine.prepare()
    work_off(machines, given.jobs, given.minutes)


if __name__ == "__main__":
    main()
