"""The report of bench_train.py: the table, the JSON line, the picture."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpt2_jax.benchmark.chart import Bar, draw_bars
from gpt2_jax.benchmark.floor import Rates, floor_seconds, floor_seconds_on_cpu
from gpt2_jax.benchmark.gpu import Sample
from gpt2_jax.benchmark.machine import cpu_rates_lines, percent, ratio, spread
from gpt2_jax.benchmark.train_system import Result
from gpt2_jax.buffer.layout import ParameterLayout
from gpt2_jax.compute.flops import flops_per_token
from gpt2_jax.families.gpt2 import GPT2Config
from gpt2_jax.machine import gigabytes
from gpt2_jax.sharing import anonymous

# Short names of the ways to split float32, for units that do not multiply float32 itself.
_SPLITS = {"BF16_BF16_F32_X3": "X3", "BF16_BF16_F32_X6": "X6", "S8_S8_S32_X6": "S8"}


class System(NamedTuple):
    name: str
    matmul: str  # an implementation of gpt2_jax or 'auto'; '' for the others
    dtype: str
    setting: str = ""  # of --matmul-precision; '' is its default
    stage: str = ""  # of gpt2_jax on several devices: 'zero1' for --zero 1

    def __str__(self) -> str:
        return ":".join(part for part in self if part)


@dataclass(frozen=True)
class Workload:
    """What every system trains."""

    model_name: str
    config: GPT2Config
    batch_size: int
    sequence_length: int
    backend: str  # cpu, cuda or metal
    micro_batches: int = 1
    llmc_program: str = ""
    devices: int = 1  # that train together, each on batch_size sequences

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batches * self.devices * self.batch_size * self.sequence_length

    @property
    def layout(self) -> ParameterLayout:
        return self.config.layout


def nanogpt_flops_per_token(config: GPT2Config, sequence_length: int) -> int:
    """6 N + 12 L C T, as nanoGPT counts (model.py, estimate_mfu): N without the position table, attention in full."""
    layout = config.layout
    parameters = layout.num_parameters - layout["wpe"].size
    return 6 * parameters + 12 * config.num_layers * config.channels * sequence_length


@dataclass(frozen=True)
class Measured:
    """A system's steps, or why there are none."""

    system: System
    result: Result | None
    reason: str = ""
    failed: bool = False
    gpu: Sample | None = None  # medians while it had its turns
    group: int = 1  # the systems of one group were measured in turn

    @property
    def seconds_per_step(self) -> float:
        assert self.result is not None
        return statistics.median(self.result.seconds)


def progress(one: Measured, work: Workload) -> str:
    if one.result is None:
        return f"{one.system}: {one.reason}"
    rate = work.tokens / one.seconds_per_step
    steps = f"median of {len(one.result.seconds)}, which differ by {percent(spread(one.result.seconds))}"
    return f"{_name(one)}: {one.seconds_per_step:.3f} s a step, {rate:,.0f} tok/s, " + (
        "one step" if _made_one_step(one) else steps
    )


def _name(one: Measured) -> str:
    """The system's name, with the implementation that 'auto' chose."""
    matmul_name = one.result.matmul if one.result is not None and one.system.matmul else one.system.matmul
    return str(one.system._replace(matmul=matmul_name))


def title(work: Workload) -> str:
    sizes = f"{work.model_name} ({work.layout.num_parameters / 1e6:.1f}M parameters)"
    batches = f"{work.micro_batches} x " if work.micro_batches > 1 else ""
    return f"GPT-2 {sizes}, {batches}B={work.batch_size}, T={work.sequence_length}: {work.tokens:,} tokens a training step"


def record(
    measured: list[Measured],
    by_tokens: list[tuple[Workload, Measured]],
    work: Workload,
    peak: dict[str, Any],
    machine: dict[str, str | int],
    load: dict[str, Any],
) -> dict[str, Any]:
    """The JSON line."""
    floors = _floors(work, peak)
    return {
        "bench": "train",
        "model": work.model_name,
        "batch_size": work.batch_size,
        "sequence_length": work.sequence_length,
        "micro_batches": work.micro_batches,
        "systems": [
            {
                **_system_record(one, work),
                "times_speed_of": _times_speed_of(one, measured),
                "share_of_floor": _share(one, floors),
            }
            for one in measured
            if one.result is not None
        ],
        "refused": [{**one.system._asdict(), "reason": anonymous(one.reason)} for one in measured if one.result is None],
        "matmul_peak_gflops": peak["gflops"],
        "matmul_peak_rounds": peak["rounds"],
        "matmul_peak_spread": peak["spread"],
        "copy_gbytes_per_second": peak["copy"],
        "attention_seconds": peak["attention"],
        "cpu_rates": peak["rates"],
        "floor_seconds": floors,
        "scaling": [
            {
                "batch_size": grown.batch_size,
                "sequence_length": grown.sequence_length,
                **_system_record(one, grown),
                "estimated_bytes": one.result.estimated_bytes,
                "compiled_bytes": one.result.compiled_bytes,
            }
            for grown, one in by_tokens
            if one.result is not None
        ],
        "machine": machine,
        "load": load,
    }


def _system_record(one: Measured, work: Workload) -> dict[str, Any]:
    assert one.result is not None
    return {
        "name": one.system.name,
        "matmul": one.result.matmul,
        "dtype": one.system.dtype,
        "setting": one.system.setting,
        "group": one.group,
        "precision": one.result.precision,
        "weight_gradient_precision": one.result.weight_gradient_precision,
        "seconds_per_step": one.seconds_per_step,
        "steps": len(one.result.seconds),
        "spread": spread(one.result.seconds),
        "seconds_p10_p90": percentiles(one.result.seconds),
        "gpu": None if one.gpu is None else one.gpu._asdict(),
        "tokens_per_second": work.tokens / one.seconds_per_step,
        "gflops": _gflops(one, work),
        "peak_memory_bytes": one.result.peak_memory_bytes,
        "compile_seconds": one.result.compile_seconds,
    }


def _matmul_name(result: Result) -> str:
    """The implementation and how it splits float32: 'amx X3', or 'amx S8 dw X3' if weights' gradients are split otherwise."""
    split, of_dw = (_SPLITS.get(each) for each in (result.precision, result.weight_gradient_precision))
    if split is None:
        return result.matmul
    return f"{result.matmul} {split}" + ("" if of_dw == split else f" dw {of_dw}")


def _dtype_name(one: Measured) -> str:
    """float32 with the setting of --matmul-precision where no matmul's name tells it."""
    assert one.result is not None
    told = one.result.precision in _SPLITS
    return one.system.dtype if told else f"{one.system.dtype} {one.system.setting}".strip()


def _gflops(one: Measured, work: Workload) -> float:
    """GFLOP/s by llm.c's formula."""
    return flops_per_token(work.config, work.sequence_length) * work.tokens / one.seconds_per_step / 1e9


def table(measured: list[Measured], by_tokens: list[tuple[Workload, Measured]], work: Workload, peak: dict[str, Any]) -> str:
    nanogpt = nanogpt_flops_per_token(work.config, work.sequence_length) / flops_per_token(work.config, work.sequence_length)
    pytorch = {(one.system.dtype, one.system.setting): one for one in measured if one.result and one.system.name == "pytorch"}
    lines = [
        "",
        f"{'':<47}{'':>9}{'steps':>10}{'':>9}{'time, of':>10}{'GFLOP/s by':^20}{'':>11}{'peak':>10}{'compile':>9}"
        f"{'loss after':>12}",
        f"{'system':<17}{'matmul':<14}{'dtype':<16}{'s/step':>9}{'differ by':>10}{'tok/s':>9}{'PyTorch':>10}{'llm.c':>10}"
        f"{'nanoGPT':>10}{'MFU':>11}{'memory':>10}{'s':>9}{'1 step':>12}",
    ]
    for one in measured:
        if one.result is None:
            continue
        seconds, gflops = one.seconds_per_step, _gflops(one, work)
        dtype, setting = one.system.dtype, one.system.setting
        of_pytorch = _ratio(one, pytorch.get((dtype, setting)) or pytorch.get((dtype, "")))
        loss = f"{one.result.losses[1]:.4f}" if len(one.result.losses) > 1 else "-"
        lines.append(
            f"{one.system.name:<17}{_matmul_name(one.result):<14}{_dtype_name(one):<16}{seconds:>9.3f}"
            f"{percent(spread(one.result.seconds)):>10}{work.tokens / seconds:>9,.0f}{of_pytorch:>10}{gflops:>10,.1f}"
            f"{gflops * nanogpt:>10,.1f}{_utilization(one, gflops, peak):>11}{gigabytes(one.result.peak_memory_bytes):>10}"
            f"{one.result.compile_seconds:>9.1f}{loss:>12}"
        )
    lines += [f"not {one.system}: {one.reason}" for one in measured if one.result is None]
    lines += [
        "",
        *_floor_lines(measured, work, peak),
        *_memory_lines(measured),
        *_scaling_lines(by_tokens),
        *_notes(measured, peak),
    ]
    return "\n".join(lines)


def _ratio(one: Measured, peer: Measured | None) -> str:
    """The time as a share of the peer's; "-" without a peer, and "one step" if one of the two made a single step."""
    if peer is None:
        return "-"
    if one.result is None or peer.result is None or _made_one_step(one) or _made_one_step(peer):
        return "one step"
    if one is peer:
        return "1.00"
    return ratio(one.seconds_per_step, peer.seconds_per_step, (one.result.seconds, peer.result.seconds))


def _made_one_step(one: Measured) -> bool:
    """True when there is one timed step, which may have been the first: no ratio is made of it."""
    return one.result is None or len(one.result.seconds) < 2


def _utilization(one: Measured, gflops: float, peak: dict[str, Any]) -> str:
    """MFU, or in two words why none is told."""
    if _made_one_step(one):
        return "one step"
    return "one round" if peak["doubtful"] else f"{gflops / peak['gflops']:.1%}"


def _floors(work: Workload, peak: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The parts of the least time that a step can take here, by dtype; of those whose rates are known."""
    sizes = (work.config, work.batch_size, work.sequence_length, work.micro_batches)
    if (rates := peak["rates"]) is not None:
        return {
            dtype: floor_seconds_on_cpu(*sizes, 1e9 * rates[precision], 1e9 * rates["memory"])
            for dtype, precision in (("float32", "F32_F32_F32"), ("bfloat16", "BF16_BF16_F32"))
        }
    if peak["copy"] is None or peak["attention"] is None:
        return {}
    return {"bfloat16": floor_seconds(*sizes, Rates(1e9 * peak["gflops"], 1e9 * peak["copy"], peak["attention"]))}


def _share(one: Measured, floors: dict[str, dict[str, float]]) -> float | None:
    """The floor's time over the system's. None where float32 is split: it has another floor."""
    split = one.result is not None and one.result.precision in _SPLITS
    floor = floors.get(one.system.dtype)
    return None if floor is None or split else sum(floor.values()) / one.seconds_per_step


def _times_speed_of(one: Measured, measured: list[Measured]) -> dict[str, float]:
    """How many times the tokens a second of the others that compute in the same precision; none of a single step."""
    if _made_one_step(one):
        return {}
    return {
        _name(other): other.seconds_per_step / one.seconds_per_step
        for other in measured
        if other is not one and other.system[2:] == one.system[2:] and not _made_one_step(other)
    }


def _floor_lines(measured: list[Measured], work: Workload, peak: dict[str, Any]) -> list[str]:
    """The floors and the shares of them; of systems on an NVIDIA GPU also what the card did meanwhile, and the speeds."""
    lines = []
    floors = _floors(work, peak)
    seen = [one for one in measured if one.gpu is not None and one.result is not None]
    for one in seen:
        assert one.gpu is not None
        assert one.result is not None
        p10, p90 = (1000 * seconds for seconds in percentiles(one.result.seconds))
        at = f"{one.gpu.clock:.0f} MHz, {one.gpu.power:.0f} W, {one.gpu.temperature:.0f} degrees Celsius"
        share = _share(one, floors)
        of_floor = "" if share is None else f", {share:.1%} of the floor's speed"
        lines.append(f"{_name(one)}: {1000 * one.seconds_per_step:.2f} ms (p10 {p10:.2f}, p90 {p90:.2f}) at {at}{of_floor}")
    for one in seen:
        if one.system.name == "gpt2_jax" and (speeds := _times_speed_of(one, measured)):
            groups = {_name(other): other.group for other in measured}
            told = (f"{x:.3f} x {name}{'' if groups[name] == one.group else ' (not in turn)'}" for name, x in speeds.items())
            lines.append(f"{_name(one)}, tokens a second: {', '.join(told)}")
    if peak["rates"] is not None:
        lines += [
            f"{_name(one)}: {share:.1%} of the floor's speed"
            for one in measured
            if one.result is not None and (share := _share(one, floors)) is not None
        ]
    for dtype, floor in floors.items():
        parts = ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in floor.items())
        total = sum(floor.values())
        lines.append(f"floor in {dtype}: {1000 * total:.1f} ms, {work.tokens / total:,.0f} tok/s ({parts})")
    if not floors and peak["copy"] is not None:
        lines.append(f"floor: not known, as attention alone was not measured: {anonymous(peak['no_attention'])}")
    return lines


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """The 10th and the 90th percentile."""
    return float(np.percentile(seconds, 10)), float(np.percentile(seconds, 90))


def _memory_lines(measured: list[Measured]) -> list[str]:
    return [
        f"memory of {_name(one)}: {gigabytes(one.result.estimated_bytes)} estimated, "
        f"{_of_estimate(one.result)} in the compiled step, {gigabytes(one.result.peak_memory_bytes)} at the peak"
        for one in measured
        if one.result is not None and one.result.estimated_bytes is not None
    ]


def _of_estimate(result: Result) -> str:
    if result.compiled_bytes is None or result.estimated_bytes is None:
        return "unknown"
    return f"{gigabytes(result.compiled_bytes)} ({result.compiled_bytes / result.estimated_bytes:.2f} times that)"


def _scaling_lines(by_tokens: list[tuple[Workload, Measured]]) -> list[str]:
    if not by_tokens:
        return []
    heading = f"{'gpt2_jax:auto':<14}{'tokens':>8}{'B x T':>12}{'s/step':>10}{'tok/s':>9}{'time a token, of the first':>28}"
    lines = [f"{heading}  compiled step"]
    first: dict[str, float] = {}
    for work, one in by_tokens:
        if one.result is None:
            lines.append(f"{one.system.dtype:<14}{work.tokens:>8}  {one.reason}")
            continue
        a_token = one.seconds_per_step / work.tokens
        relative = "one step"
        if not _made_one_step(one):
            relative = f"{a_token / first.setdefault(one.system.dtype, a_token):.2f}"
        lines.append(
            f"{one.system.dtype:<14}{work.tokens:>8}{f'{work.batch_size} x {work.sequence_length}':>12}"
            f"{one.seconds_per_step:>10.3f}{1 / a_token:>9,.0f}{relative:>28}  {_of_estimate(one.result)}"
        )
    return [*lines, ""]


def _notes(measured: list[Measured], peak: dict[str, Any]) -> list[str]:
    counts = {len(one.result.seconds) for one in measured if one.result is not None}
    steps = " to ".join(str(count) for count in sorted({min(counts, default=0), max(counts, default=0)}))
    return [
        f"time: medians of {steps} step(s) after the first (one alone may be the first), forward, backward, clipping, AdamW;",
        "  each system in a process of its own, with the same random weights and tokens; in turn, a third of the steps at a",
        "  time (all, if they are few) after one that is not timed, as many systems as memory holds. On an accelerator the",
        "  time of a step is the mean of up to five in a row.",
        "steps differ by: the longest less the shortest, of the median. one step: no ratio is told of a single step, which may",
        "  be the first. one round: nor of a peak that a single round of a part of the products was extrapolated to.",
        "~: the steps of the two overlap, so either may be the faster one.",
        "compile: one compilation, so by how much it varies is not known.",
        "GFLOP/s: llm.c counts 6 N + 6 L C T a token, N with the vocabulary's padding; nanoGPT 6 N + 12 L C T, N without",
        "  positions.",
        f"MFU: llm.c's count over the best rate of matrix products alone in this run, {peak['gflops']:,.1f} GFLOP/s by",
        f"  {peak['of']} in {peak['rounds']} round(s), which differ by {percent(peak['spread'])}.",
        *([] if peak["rates"] is None else cpu_rates_lines(peak["rates"])),
        *([] if peak["copy"] is None else [f"copy: {peak['copy']:,.0f} GB/s of the device's memory read and written."]),
        *([] if peak["attention"] is None else [f"attention: {1000 * peak['attention']:.3f} ms, one layer's by cuDNN alone."]),
        "memory: on the CPU the process's largest resident set, libraries included; on a GPU its allocator's peak,",
        "  of llm.c what the card has in use more than before it.",
        "loss: PyTorch and plain JAX have the vocabulary's padding in their softmax, which adds about 0.001.",
    ]


def plot_systems(measured: list[Measured], work: Workload, path: str, subtitle: str) -> None:
    bars = []
    for one in measured:
        if one.result is None:
            continue
        of_matmul = f" ({_matmul_name(one.result)})" if one.system.name == "gpt2_jax" else ""
        rate = work.tokens / one.seconds_per_step
        bars.append(
            Bar(
                label=f"{one.system.name}{of_matmul}",
                group=one.system.dtype,
                value=rate,
                text=f"{rate:,.0f} tok/s   {one.seconds_per_step:.3g} s/step   {_gflops(one, work):,.0f} GFLOP/s"
                + ("   one step" if _made_one_step(one) else ""),
                range=(work.tokens / max(one.result.seconds), work.tokens / min(one.result.seconds)),
            )
        )
    note = "medians of whole training steps; line: slowest to fastest step; GFLOP/s by llm.c's count, 6 N + 6 L C T a token"
    draw_bars(path, bars, title=title(work), subtitle=subtitle, axis="tokens a second (more is better)", note=note)
