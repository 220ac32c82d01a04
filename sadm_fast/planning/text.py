"""The plan as text of at most 120 columns. Above each table stands whether its numbers are counted or predicted."""

from collections.abc import Iterator
from typing import Any, get_args

from sadm_fast.planning.gpus import GPUS
from sadm_fast.planning.measured import FRACTION_OF_BANDWIDTH, FRACTION_OF_PEAK, SECONDS_A_LAUNCH, Measured
from sadm_fast.planning.memory import Kind

_GIB, _MIB = 2**30, 2**20
_COLUMNS = [kind for kind in get_args(Kind) if kind != "other"]  # of the memory table


def plan_text(plan: dict[str, Any]) -> str:
    """Print the dictionary of plan.make_plan."""
    gpu = plan["assumptions"]["gpu"]
    samples = plan["micro_batch"] * plan["grad_accumulation"]
    lines = [
        f"{plan['name']}: mode {plan['mode']} ({plan['implementation']}), scope {plan['scope']}, {plan['precision']},"
        f" ZeRO stage {plan['zero_stage']}, offload: {plan['offload']}",
        f"{plan['gpus']} x {gpu['name']}; {plan['micro_batch']} samples x {plan['grad_accumulation']} micro-batches a"
        f" rank, {samples * plan['gpus']} a step",
        "Counted: parameters, FLOPs, memory, bytes. Predicted, by a roofline: times and images/s, and marked so.",
    ]
    for section in (_parameters, _flops, _memory, _communication, _prediction, _scaling):
        lines += ["", *section(plan)]
    return "\n".join(lines)


def _parameters(plan: dict[str, Any]) -> Iterator[str]:
    yield "Parameters (counted)"
    for name, sizes in plan["parameters"].items():
        yield f"  {name:<10} {sizes['all']:>15,}   {sizes['trained']:>15,} of them can be trained"


def _flops(plan: dict[str, Any]) -> Iterator[str]:
    yield "One iteration of one rank (counted: matrix products and convolutions; 1 MAC = 2 FLOPs)"
    total = sum(plan["flops"].values())
    for what, flops in [*plan["flops"].items(), ("all", total)]:
        yield f"  {what:<46} {flops / 1e9:>14,.1f} GFLOP {flops / 2e9:>14,.1f} GMAC {flops / total:>7.1%}"
    again = plan["flops_added_by_checkpointing"]
    if plan["activation_checkpointing"]:
        yield "  with activation checkpointing: the backward computes the blocks of the denoiser anew"
    else:
        yield f"  activation checkpointing would add {again / 1e9:,.1f} GFLOP ({again / total:.1%})"


def _memory(plan: dict[str, Any]) -> Iterator[str]:
    yield f"Memory of one rank of {plan['gpus']} at its fullest moment, GiB (counted; * as configured)"
    yield (
        f"  {'ZeRO':<4} {'offload':<17}" + "".join(f"{name:>10}" for name in _COLUMNS)
        + f"{'peak':>9}{'ckpt':>8}{'host':>8}"
    )  # fmt: skip
    limit = plan["assumptions"]["gpu"]["memory"]
    for row in plan["memory"]:
        here = (row["zero_stage"], row["offload"]) == (plan["zero_stage"], plan["offload"])
        cells = "".join(f"{row['peak_by_kind'][kind] / _GIB:>10.2f}" for kind in _COLUMNS)
        mark = "!" if row["peak"] > limit else " "
        offload = row["offload"].replace(" and parameters", "+params")
        yield (
            f"{'*' if here else ' '} {row['zero_stage']:<4} {offload:<17}{cells}{row['peak'] / _GIB:>8.2f}{mark}"
            f"{row['peak_with_checkpointing'] / _GIB:>8.2f}{sum(row['host'].values()) / _GIB:>8.2f}"
        )
    yield f"  ! does not fit into {limit / 1e9:.0f} GB. ckpt: the peak with activation checkpointing of the denoiser's"
    yield "  blocks (train.activation_checkpointing). pictures: fp32 copies of models, autoencoder, judges on rank 0;"
    yield "  where drawing, decoding or judging samples takes most, what that takes as well."
    yield "  Not counted: CUDA and NCCL, workspaces, fragmentation, the batch."
    if plan["memory_left_out"] is not None:
        yield f"  Not counted either: {plan['memory_left_out']}"


def _communication(plan: dict[str, Any]) -> Iterator[str]:
    yield f"Communication of one rank of {plan['gpus']} in one iteration, MiB by ZeRO stage (counted)"
    stages = plan["communication"]
    purposes = list(dict.fromkeys(t["purpose"] for stage in stages for t in stage["transfers"]))
    if not purposes:
        yield "  none: one rank is alone"
        return
    yield f"  {'payload':<28}" + "".join(f"{'stage ' + str(s['zero_stage']):>22}" for s in stages)
    short = {"all-reduce": "reduce", "all-gather": "gather", "reduce-scatter": "scatter"}
    for purpose in purposes:
        cells = ""
        for stage in stages:
            found = [t for t in stage["transfers"] if t["purpose"] == purpose]
            cells += f"{_mib(found[0]['payload']) + ' ' + short[found[0]['operation']]:>22}" if found else f"{'-':>22}"
        yield f"  {purpose:<28}{cells}"
    wire = [sum(t["wire"] for t in stage["transfers"]) for stage in stages]
    yield f"  {'sent by a ring, all':<28}" + "".join(f"{_mib(size):>22}" for size in wire)
    yield "  payload: the whole tensor of a collective. A ring of n sends 2(n-1)/n of it for an all-reduce (reduce),"
    yield "  (n-1)/n for an all-gather (gather) or a reduce-scatter (scatter)."


def _mib(size: float) -> str:
    return f"{size / _MIB:,.1f}" if size >= 0.05 * _MIB else f"{size / 1024:.2f} Ki"


def _prediction(plan: dict[str, Any]) -> Iterator[str]:
    a, gpu = plan["assumptions"], plan["assumptions"]["gpu"]
    row = next(row for row in plan["scaling"] if row["world_size"] == plan["gpus"])["predicted"]
    rate = f"{plan['precision']} {a['peak_flops'] / 1e12:,.0f} TFLOP/s"
    if plan["precision"] == "fp32":
        rate += f" (TF32 is off in PyTorch by default; it would be {gpu['tf32'] / 1e12:,.0f})"
    yield "PREDICTED time of a step (roofline; not measured)"
    peak, bandwidth, launch = (
        _origin(plan, number, a[field])
        for number, field in (
            (FRACTION_OF_PEAK, "fraction_of_peak"),
            (FRACTION_OF_BANDWIDTH, "fraction_of_bandwidth"),
            (SECONDS_A_LAUNCH, "seconds_a_launch"),
        )
    )
    yield f"  compute        {row['compute_s']:>10.4f} s  FLOPs / ({a['fraction_of_peak']:g} {peak} x {rate})"
    yield (
        f"  update         {row['update_s']:>10.4f} s  AdamW and EMA / ({a['fraction_of_bandwidth']:g} {bandwidth} x"
        f" memory {gpu['bandwidth'] / 1e9:,.0f} GB/s)"
    )
    yield (
        f"  communication  {row['communication_s']:>10.4f} s  ring bytes / ({a['fraction_of_bandwidth']:g} x links"
        f" {a['links'] / 1e9:,.0f} GB/s)"
    )
    yield (
        f"  host           {row['host_s']:>10.4f} s  about {plan['launches']:,} launches x"
        f" {1e6 * a['seconds_a_launch']:g} us {launch}, ahead of the device"
    )
    yield (
        f"  step           {row['step_s']:>10.4f} s  no overlap: {row['images_per_s']:,.0f} images/s; all overlapped:"
        f" {row['step_s_if_overlapped']:.4f} s, {row['images_per_s_if_overlapped']:,.0f} images/s"
    )
    yield f"  Rates: {gpu['source']}."
    yield f"  [m] measured: {FRACTION_OF_PEAK.where}"
    yield "  [a] assumed: given, or measured on another GPU, precision or network"
    yield (
        f"  Links, one direction: {gpu['link_name']} {gpu['link'] / 1e9:,.0f} GB/s for each GPU in a node of"
        f" {a['gpus_per_node']}, network {a['network_gbit']:g} Gbit/s for each GPU."
    )
    yield "  Left out: latency (it counts from some hundred ranks on), offloading, reading data, checkpoints, pictures."


def _origin(plan: dict[str, Any], number: Measured, used: float) -> str:
    """[m] if a number is the one that was measured on this GPU in this precision, else [a]."""
    here = (plan["assumptions"]["gpu"]["name"], plan["precision"]) == (GPUS[number.gpu].name, number.precision)
    return "[m]" if here and used == number.value else "[a]"


def _scaling(plan: dict[str, Any]) -> Iterator[str]:
    yield "Weak scaling as configured: memory and bytes counted, times PREDICTED (no overlap .. all overlapped)"
    yield (
        f"  {'ranks':>5} {'nodes':>5} {'global batch':>12} {'memory GiB':>11} {'sent MiB':>10} {'step s':>17}"
        f" {'images/s':>21} {'efficiency':>14}"
    )
    limit = plan["assumptions"]["gpu"]["memory"]
    for row in plan["scaling"]:
        p = row["predicted"]
        step = f"{p['step_s']:.4f} .. {p['step_s_if_overlapped']:.4f}"
        images = f"{p['images_per_s']:,.0f} .. {p['images_per_s_if_overlapped']:,.0f}"
        efficiency = f"{p['efficiency']:.2f} .. {p['efficiency_if_overlapped']:.2f}"
        yield (
            f"{'*' if row['world_size'] == plan['gpus'] else ' '} {row['world_size']:>5} {row['nodes']:>5}"
            f" {row['global_batch']:>12,} {row['memory_peak'] / _GIB:>10.2f}"
            f"{'!' if row['memory_peak'] > limit else ' '} {row['wire'] / _MIB:>10,.0f} {step:>17} {images:>21}"
            f" {efficiency:>14}"
        )
    yield "  Efficiency: images/s of n ranks over n times those of one; above 1 where ZeRO divides optimizer work."
