"""Does the game pay off? Train the configurations of a plan, score them in several feature spaces, print the tables.

    python benchmarks/game_gain.py benchmarks/plans/digits.json                 train what is missing, then report
    python benchmarks/game_gain.py benchmarks/plans/digits.json --report        only the report of what is there
    python benchmarks/game_gain.py benchmarks/plans/digits.json --cost          time an iteration of each configuration

A finished run is one line of results.jsonl and is not repeated; one that was stopped goes on from its checkpoint. Runs
of one set and seed share data order, noise, starting noise of the samples, the judges and the first weights of Psi, so
their ratios are paired. Psi and the judge of fid_classifier learn from two halves of the images that share none.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gain_picture  # noqa: E402
from benchmarks.gain_plan import Job, Plan, overrides  # noqa: E402
from benchmarks.gain_report import Results, picture, score_lines, tables  # noqa: E402
from sadm_fast import cli  # noqa: E402
from sadm_fast.config import Config, load_config  # noqa: E402
from sadm_fast.errors import UserError  # noqa: E402
from sadm_fast.files import append_json, parse_json, write_json  # noqa: E402
from sadm_fast.ranks.stopping import StopRequest  # noqa: E402

Line = dict[str, Any]
RESULTS, COSTS, SCORES = "results.jsonl", "cost.json", "scores.csv"
_LAST = 0.2  # share of a run's log lines whose losses by noise level are averaged
_LABELS_OF_JUDGE = 0.5  # share of the images that the judge learns from, and Psi does not


def json_lines(path: Path) -> list[Line]:
    """The lines of a JSON-lines file; none if it is not there. A last line that was cut off does not count."""
    if not path.exists():
        return []
    lines: list[Line] = []
    for text in path.read_text().splitlines():
        try:
            lines.append(parse_json(text))
        except ValueError:
            continue
    return lines


def results(plan: Plan, out: Path) -> Results:
    """The finished runs of a plan as it stands now, by job; those of another state of it are left alone."""
    lines = {(line["set"], line["configuration"], line["seed"], line["digest"]): line for line in
             json_lines(out / RESULTS)}  # fmt: skip
    found = {job: lines.get((job.set, job.configuration, job.seed, plan.digests[job])) for job in plan.jobs}
    return {job: line for job, line in found.items() if line is not None}


def groups(jobs: Iterable[Job]) -> list[tuple[str, int]]:
    """The sets and seeds of jobs, each once: what one worker does, one job after the other."""
    return list(dict.fromkeys((job.set, job.seed) for job in jobs))


def supervise(plan_file: Path, plan: Plan, out: Path, jobs: int, threads: int) -> int:
    """Start a worker for each set and seed with unfinished runs, `jobs` at a time; return the worst exit code.

    Asked to stop, it asks its workers, and returns when they have.
    """
    done = results(plan, out)
    missing = groups(job for job in plan.jobs if job not in done)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    running: set[subprocess.Popen[bytes]] = set()

    def work(group: tuple[str, int]) -> int:
        name, seed = group
        command = [sys.executable, __file__, str(plan_file), "--out", str(out), "--work", f"{name}:{seed}"]
        running.add(worker := subprocess.Popen(command, env=environment))
        code = worker.wait()
        running.discard(worker)
        return code

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return max(pool.map(work, missing), default=0)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in list(running):
                worker.terminate()
            raise


def work(plan: Plan, out: Path, name: str, seed: int, request: StopRequest) -> int:
    """Train and score the unfinished runs of one set and seed; return 0, or that it was asked to stop."""
    from sadm_fast.console import Console
    from sadm_fast.data.source import split
    from sadm_fast.feed import open_data
    from sadm_fast.metrics.pretrained import pretrained_judge
    from sadm_fast.metrics.run_evaluation import RunEvaluation, chosen_judges
    from sadm_fast.metrics.tables import one_line
    from sadm_fast.precision import tf32
    from sadm_fast.pretrain import PSI_FILE, prepare_judge, prepare_psi
    from sadm_fast.ranks.launch import own_device
    from sadm_fast.run.facts import machine, program

    device, console, began = own_device(), Console(), program()
    done = results(plan, out)
    jobs = [job for job in plan.jobs if (job.set, job.seed) == (name, seed) and job not in done]
    folder = out / name / f"seed-{seed}"
    base = plan.config(jobs[0])
    images = open_data(base, console)
    for_psi, for_judge = split(images, _LABELS_OF_JUDGE, seed)
    with tf32(False):  # as evaluate.py
        judge, judge_facts = prepare_judge(base, for_judge, folder, device, console)
        judges = [*chosen_judges(base, judge), *(pretrained_judge(judge_name, None) for judge_name in plan.judges)]
        evaluation = RunEvaluation(base, images, judges, images.filled, device)
    for job in jobs:
        config, changes, digest = plan.config(job), plan.changes(job), plan.digests[job]
        psi_facts: dict[str, Any] = {}
        if config.game.mode != "plain" and config.structure_encoder.weights is None:
            kept = folder / f"psi-{_digest_of(config.structure_encoder.model_dump())}"
            _, psi_facts = prepare_psi(config, for_psi, kept, device, console)
            changes["structure_encoder.weights"] = str((kept / PSI_FILE).resolve())
        run = folder / f"{job.configuration}-{digest[:8]}"
        console.say(f"{name}, seed {seed}: {job.configuration}")
        finished, cpu_s = train(load_config(plan.config_file(job), overrides(changes)), run, request)
        if not finished:
            return cli.EXIT_STOPPED
        scores = []
        for step in plan.score_at:
            with tf32(False):
                scores.append(evaluation.score(averaged(run, step, device), step))
            console.say(f"  step {step}: {one_line(scores[-1])}")
        log = json_lines(run / "metrics.jsonl")
        append_json(
            out / RESULTS,
            {
                "set": name,
                "configuration": job.configuration,
                "seed": seed,
                "digest": digest,
                "scores": scores,
                "changes": changes,
                **began,
                "machine": machine(),
                "judge_accuracy": judge_facts.get("accuracy"),
                "psi_accuracy": psi_facts.get("accuracy"),
                "cpu_s": cpu_s,
                **facts_of_log(log, plan.score_at),
            },
        )
        forget_checkpoints(run)
    return 0


def train(config: Config, run: Path, request: StopRequest) -> tuple[bool, float]:
    """Run one training in this process; return whether it reached its end, and the CPU seconds of this call."""
    from sadm_fast import api

    before = time.process_time()
    finished = api.train(config, run_dir=run, request=request)
    return finished, time.process_time() - before


def averaged(run: Path, step: int, device: Any) -> Any:
    """The averaged denoiser of a run at a step that it has kept."""
    from sadm_fast.generation import load_trained

    return load_trained(run / "checkpoints" / f"step-{step:06d}", device, print).model


def facts_of_log(log: Sequence[Line], steps: Sequence[int]) -> Line:
    """Of a run's metrics.jsonl: seconds in the loop at each step, images/s, the last losses by quartile of noise."""
    last = log[-max(1, round(_LAST * len(log))) :]
    quartiles = [[line[f"loss_denoise_q{q}"] for line in last] for q in range(1, 5)]
    return {
        "seconds": [next((line["wall_s"] for line in log if line["step"] >= step), None) for step in steps],
        "images_per_s": statistics.median(line["samples_per_s"] for line in log),
        "loss_by_noise_quartile": [statistics.mean(q) if None not in q else None for q in quartiles],
        "structure_distance": last[-1]["structure_distance"],
    }


def forget_checkpoints(run: Path) -> None:
    """Keep the newest checkpoint of a run that has been scored: the others only take room."""
    import shutil

    for old in sorted((run / "checkpoints").glob("step-*"))[:-1]:
        shutil.rmtree(old)


def cost(plan: Plan, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Time an iteration of each configuration in turns: ms by set, configuration and "plain" or "game"."""
    import torch

    from benchmarks import measure
    from benchmarks.latent_game import made_up, made_up_players
    from sadm_fast.ranks.launch import distributed

    found: dict[str, dict[str, dict[str, float]]] = {}
    with distributed() as place:
        for name in plan.sets:
            calls: dict[str, measure.Call] = {}
            for configuration in plan.configurations:
                config = plan.config(Job(name, configuration, plan.seeds[0]))
                players, batch = made_up_players(config, place.device), made_up(config, 0)
                batch = batch._replace(**{k: v.to(place.device) for k, v in batch._asdict().items()})
                for phase, playing in (("plain", False), ("game", True)):
                    step = next((s for s in range(plan.score_at[-1]) if players.playing(s) == playing), None)
                    if step is not None:
                        calls[f"{configuration}:{phase}"] = partial(players.iteration, [batch], step)
            for call in calls.values():
                for _ in range(2):
                    call()
            times = measure.interleaved(calls, repeats, place.device.type)
            found[name] = {}
            for key, samples in times.items():
                configuration, _, phase = key.rpartition(":")
                found[name].setdefault(configuration, {})[phase] = 1e3 * torch.tensor(samples).median().item()
    return found


def _digest_of(tree: Any) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def report(plan: Plan, out: Path, against: str | None = None) -> Iterator[str]:
    """The tables, of ratios to `against` (None: to the plan's first); writes the scores and draws the pictures."""
    found = results(plan, out)
    if not found:
        raise UserError(f"{out}: no run of this plan has finished yet")
    costs = parse_json((out / COSTS).read_bytes()) if (out / COSTS).exists() else None
    yield from tables(plan if against is None else plan.against(against), found, costs)
    with (out / SCORES).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(score_lines(plan, found))
    yield f"scores: {out / SCORES}"
    gain_picture.draw(gain_picture.read([out / SCORES]), list(plan.configurations), ratios := out / "ratios.png")
    yield f"picture: {ratios}"
    for name in picture(plan, found, costs, out):
        yield f"picture: {name}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="benchmarks/plans/NAME.json")
    parser.add_argument("--out", type=Path, help="folder of runs and results (default: runs/evidence/NAME)")
    parser.add_argument("--jobs", type=int, help="workers at a time (default: a core for each, one on a GPU)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default %(default)s)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--against", metavar="NAME", help="report ratios to this one (default: the plan's first)")
    parser.add_argument("--cost", action="store_true", help="time an iteration of each configuration, train nothing")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of --cost (default %(default)s)")
    parser.add_argument("--work", metavar="SET:SEED", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda request: run(parse(argv), request), again="goes on")


def run(arguments: argparse.Namespace, request: StopRequest) -> int:
    plan = Plan.read(arguments.plan)
    out = arguments.out or Path("runs/evidence") / plan.name
    out.mkdir(parents=True, exist_ok=True)
    if arguments.work:
        name, _, seed = arguments.work.rpartition(":")
        return work(plan, out, name, int(seed), request)
    if arguments.cost:
        write_json(out / COSTS, cost(plan, arguments.repeats))
    elif not arguments.report:
        jobs = arguments.jobs or max(1, len(os.sched_getaffinity(0)) // arguments.threads)
        code = supervise(arguments.plan, plan, out, jobs, arguments.threads)
        if code:
            return code
    for line in report(plan, out, arguments.against):
        print(line)
    return 0


if __name__ == "__main__":
    cli.leave(main())
