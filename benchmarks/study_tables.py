"""Tables, intervals and figures of all studies, from their stored results: docs/results/NAME.md and .png.

    python benchmarks/study_tables.py [NAME ...]

Reports missing results. The protocol is docs/results/protocol.md.
"""

import argparse
import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from scipy.stats import t
from study import RESULTS, ROOT, Job, Settings, Study, read

STUDIES = ROOT / "benchmarks" / "studies"
NAMES = {"linear": "linear", "knn": "k-NN", "finetune-0.01": "fine-tuned, 1 %", "finetune-0.1": "fine-tuned, 10 %"}
Runs = dict[tuple[str, float], dict[int, Settings]]  # by arm and budget, then by seed


class Time(NamedTuple):
    """Measurements of an arm by `study.py time`: milliseconds per row in every round, and MFLOP per row."""

    rounds: list[float]
    mflop: float

    def minutes(self, rows: int) -> float:
        """Return the minutes of a run with so many rows, by the median of the rounds."""
        return rows * statistics.median(self.rounds) / 6e4


class Ratio(NamedTuple):
    """Ratio of the other side's time: median and quartiles over the rounds, in which both sides took turns."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        if self.median >= 1:
            return f"{self.median:.2f}x less ({self.low:.2f} .. {self.high:.2f})"
        return f"{1 / self.median:.2f}x more ({1 / self.high:.2f} .. {1 / self.low:.2f})"


def runs_of(study: Study) -> Runs:
    """Collect existing results, in the order of the study."""
    runs: Runs = {}
    for arm, budget, seed in study.cells():
        rate = study.rate(arm)
        found = study.result(Job(arm, budget, seed, math.nan if rate is None else rate, False))  # no rate is NaN
        if found:
            runs.setdefault((arm, budget), {})[seed] = found
    return dict(sorted(runs.items(), key=lambda item: item[0][1]))


def top1(run: Settings, judge: str) -> float:
    """Look up an accuracy in percent."""
    return 100 * float(run["measures"][judge]["top1"])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Write mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Compute the 95 % interval of a mean by Student's t."""
    mean = statistics.mean(differences)
    half = statistics.stdev(differences) / len(differences) ** 0.5 * float(t.ppf(0.975, len(differences) - 1))
    return mean - half, mean + half


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def times_of(study: Study) -> dict[str, Time]:
    """Read the measurements of `study.py time` for arms with their current settings."""
    path = study.folder / "times.json"
    stored = read(path)["arms"] if path.is_file() else {}
    return {
        arm: Time(stored[arm]["ms_per_row"], stored[arm]["mflop_per_row"])
        for arm in study.arms
        if stored.get(arm, {}).get("settings") == study.timed(arm)
    }


def table_of_runs(study: Study, runs: Runs) -> str:
    """Write the results of every arm at every budget."""
    judges, times = study.asked["judges"], times_of(study)
    head = ["arm", "effective epochs", "seeds", "peak rate", "steps", "images", "minutes", "TFLOP"]
    rows = []
    for (arm, budget), found in runs.items():
        one, time = next(iter(found.values())), times.get(arm)
        cost = ["", ""]
        if time:
            cost = [f"{time.minutes(one['rows']):.1f}", f"{one['rows'] * time.mflop / 1e6:.0f}"]
        scores = [spread([top1(run, judge) for run in found.values()]) for judge in judges]
        ranks = [spread([run["measures"]["knn"]["rankme"] for run in found.values()])] if "knn" in judges else []
        counts = [f"{one['steps']:,}", f"{one['images']:,}"]
        rows.append([arm, f"{budget:g}", len(found), f"{one['rate']:g}", *counts, *cost, *scores, *ranks])
    last = ["RankMe"] if "knn" in judges else []  # of the features that k-NN compared
    return markdown([*head, *(NAMES[judge] for judge in judges), *last], rows)


def table_of_contrasts(study: Study, runs: Runs) -> str:
    """Write the paired differences, with their intervals and the time of each side."""
    times, rows = times_of(study), []
    for contrast in study.asked.get("contrasts", ()):
        sides = [contrast["of"], contrast["against"]]
        cells = [(arm, float(budget)) for arm, _, budget in (side.rpartition("@") for side in sides)]
        ours, theirs = (runs.get(cell, {}) for cell in cells)
        seeds = sorted(ours.keys() & theirs.keys())
        ratio = None
        if seeds and all(arm in times for arm, _ in cells):
            rows_of = (runs[cell][seeds[0]]["rows"] for cell in cells)
            ratio = ratio_of(*((times[arm], number) for (arm, _), number in zip(cells, rows_of, strict=True)))
        row = [contrast["says"], *sides, len(seeds), ratio or ""]
        for judge in study.asked["judges"]:
            differences = [top1(ours[seed], judge) - top1(theirs[seed], judge) for seed in seeds]
            cell = f"{statistics.mean(differences):+.1f}" if differences else ""
            if len(differences) > 1:
                low, high = interval(differences)
                cell += f" ({low:+.1f} .. {high:+.1f})"
                if judge == "linear":
                    verdict = verdict_of(low, high, contrast.get("margin"))
            if judge == "linear" and len(differences) < 2:
                verdict = ""
            row.append(cell)
        if verdict and "time" in contrast:
            verdict += f"; {contrast['time']:g}x less time: {time_verdict_of(ratio, contrast['time'])}"
        rows.append([*row, verdict])
    head = ["question", "arm", "against", "seeds", "time"]
    return markdown([*head, *(NAMES[judge] for judge in study.asked["judges"]), "verdict"], rows)


def ratio_of(ours: tuple[Time, int], other: tuple[Time, int]) -> Ratio:
    """Compare the times of two arms for their numbers of rows, round by round."""
    (time, rows), (other_time, other_rows) = ours, other
    rounds = zip(time.rounds, other_time.rounds, strict=True)
    return Ratio(*statistics.quantiles([other_rows * theirs / (rows * mine) for mine, theirs in rounds], n=4))


def time_verdict_of(ratio: Ratio | None, wanted: float) -> str:
    """Decide whether a side takes a given factor less time, by the quartile on either side."""
    if ratio is None:
        return "not measured"
    return "yes" if ratio.low >= wanted else "no" if ratio.high < wanted else "not shown"


def verdict_of(low: float, high: float, margin: float | None) -> str:
    """State what an interval of the difference in linear probing permits to conclude."""
    if low > 0:
        return "better"
    if high < 0:
        return "worse, within the margin" if margin is not None and low > -margin else "worse"
    return "as good" if margin is not None and low > -margin else "no difference shown"


def table_of_rates(study: Study) -> str:
    """Write the search for peak rates."""
    rows = []
    for arm in study.arms:
        jobs = study.rate_jobs(arm) if arm != "untrained" else []
        found = [(job, study.result(job)) for job in jobs]
        scores = [f"{job.rate:g}: {top1(result, 'linear'):.1f}" for job, result in found if result]
        if len(jobs) > 1 and scores:
            budget = jobs[0].budget
            named = arm if budget == study.asked["rates"]["budget"] else f"{arm}, at {budget:g}"
            rows.append([named, ", ".join(scores)])
    head = ["arm", f"linear probe at {study.asked['rates']['budget']:g} effective epochs, by peak rate"]
    return markdown(head, rows) if rows else "No rates were searched.\n"


def write_figure(study: Study, runs: Runs) -> bool:
    """Draw accuracy over minutes of one core, if times are measured, with effective epochs beside each point."""
    times = times_of(study)
    curves: dict[str, list[tuple[float, float, list[float]]]] = {}
    for (arm, budget), found in runs.items():
        if arm in times:
            minutes = times[arm].minutes(next(iter(found.values()))["rows"])
            curves.setdefault(arm, []).append((minutes, budget, [top1(run, "linear") for run in found.values()]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for _, _, scores in curves.pop("untrained", ()):
        axes.axhline(statistics.mean(scores), color="grey", linestyle="--", linewidth=1, label="untrained")
    if not curves:
        return False
    for arm, points in curves.items():
        x, y = [minutes for minutes, _, _ in points], [statistics.mean(scores) for _, _, scores in points]
        errors = [statistics.stdev(scores) if len(scores) > 1 else 0.0 for _, _, scores in points]
        line = axes.errorbar(x, y, errors, marker="o", capsize=2, label=arm)[0]
        for minutes, mean, (_, budget, _) in zip(x, y, points, strict=True):
            axes.annotate(f"{budget:g}", (minutes, mean), (5, -10), textcoords="offset points", color=line.get_color())
    axes.set(xlabel="minutes of one core", ylabel="linear probe, percent", title=study.asked["question"])
    axes.set_xlim(left=0)
    axes.title.set_fontsize(9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(study.folder.with_suffix(".png"), dpi=110)
    return True


def write(study: Study) -> None:
    """Write NAME.md and NAME.png, and report what is missing."""
    runs, missing = runs_of(study), study.missing()
    results = [read(path) for path in study.folder.rglob("*.json") if path.name != "times.json"]
    on_cpus = [result for result in results if not result["device"].startswith("NVIDIA")]
    hours = sum(spent["cpu_seconds"] for result in on_cpus for spent in result["spent"].values()) / 3600
    cpus, devices = (sorted({result["device"] for result in part}) for part in (on_cpus, results))
    others = [
        f"{sum(each['device'] == name for each in results)} ran on {name}" for name in devices if name not in cpus
    ]
    asked = len(set(study.cells()))
    done, searched = sum(map(len, runs.values())), sum(result["searching"] for result in results)
    taken = sum(run["study"] != study.name for found in runs.values() for run in found.values())
    shared = [f"{taken} of the runs that count are those of {study.asked['like']}.\n"] if taken else []
    lines = [
        f"# {study.name}\n",
        f"{study.asked['question']}\n",
        f"Written by `python benchmarks/study_tables.py` from the files of [{study.name}]({study.name}).",
        f"Arms: [{study.name}.yaml](../../benchmarks/studies/{study.name}.yaml); rules: [protocol.md](protocol.md).",
        f"{done} of {asked} runs that count are stored, and {searched} of the search for rates; together they took",
        f"{hours:.1f} hours of CPU on {', '.join(cpus) or 'nothing'}{''.join(f', and {other}' for other in others)}.\n",
        *shared,
        "Accuracies are percent on the test part: mean ± standard deviation over seeds.\n",
        table_of_runs(study, runs),
        "Paired differences, with 95 % intervals; the last column is about the linear probe.\n",
        table_of_contrasts(study, runs),
        table_of_rates(study),
    ]
    if write_figure(study, runs):
        lines.append(f"![accuracy over time; the numbers are effective epochs]({study.name}.png)\n")
    times = times_of(study)
    untimed = [arm for arm in dict.fromkeys(arm for arm, _, _ in study.cells()) if arm not in times]
    names = [job.name for job in missing] + [f"time of {arm}" for arm in untimed]
    waiting = ", ".join(names) or "nothing"
    lines.append(textwrap.fill(f"Missing now: {waiting}.", 118, break_long_words=False, break_on_hyphens=False) + "\n")
    study.folder.with_suffix(".md").write_text("\n".join(lines))
    print(f"{study.name}: {done} of {asked} runs; missing now: {waiting}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="default: all that have results")
    given = parser.parse_args()
    for path in sorted(STUDIES.glob("*.yaml")):
        if path.stem in given.names or (not given.names and (RESULTS / path.stem).is_dir()):
            write(Study(path))


if __name__ == "__main__":
    main()
