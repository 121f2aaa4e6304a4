"""The table before a run: every setting, and its meaning on this machine."""

from __future__ import annotations

from pathlib import Path

from gpt2_jax.compute import parallel
from gpt2_jax.compute.memory import MemoryEstimate
from gpt2_jax.compute.plan import Plan
from gpt2_jax.config import RunConfig
from gpt2_jax.data.batches import RunData
from gpt2_jax.ops.recompute import saves_memory
from gpt2_jax.ops.table import SWITCHED_OFF

_MOST_ROWS = 10
Row = tuple[str, object]


def start_table(
    config: RunConfig, plan: Plan, device: str, data: RunData, steps: int, needed: MemoryEstimate, folder: Path
) -> list[Row]:
    """Names and values, for report.Display.table: with --verbose all, otherwise at most ten, of which the last says how
    many were left out. Warnings and refusals come first, then what is not as by default, then the rest."""
    rows = _all_rows(config, plan, device, data, steps, needed, folder)
    if config.run.verbose or len(rows) <= _MOST_ROWS:
        return [row for _, row in rows]
    shown = sorted(rows, key=lambda worth_and_row: worth_and_row[0])[: _MOST_ROWS - 1]
    # A warning is never left out: where there are many, they share a row.
    hidden = [row for worth_and_row in rows if worth_and_row not in shown for worth, row in (worth_and_row,) if worth == _WARNS]
    if hidden:
        shown[-1] = _WARNS, ("", "; ".join(str(value) for _, value in [shown[-1][1], *hidden]))
    return [*(row for _, row in shown), ("", f"and {len(rows) - len(shown)} rows more: --verbose")]


# How much a row is worth, the most first.
_WARNS, _IS_ASKED_FOR, _SAYS_WHAT, _SAYS_MORE = range(4)


def _all_rows(
    config: RunConfig, plan: Plan, device: str, data: RunData, steps: int, needed: MemoryEstimate, folder: Path
) -> list[tuple[int, Row]]:
    """All rows in their order, each with its worth."""
    model, optimizer, backend, default = plan.config, config.optimizer, plan.backend, RunConfig()
    sizes = (
        f"{model.num_layers} layers, {model.num_heads} heads, {model.channels} channels, "
        f"{model.vocab_size} tokens (padded to {model.padded_vocab_size}), {model.max_sequence_length} positions"
    )
    micro_batches = f"{config.num_micro_batches} x {config.data.batch_size} x {config.data.sequence_length}"
    if plan.devices > 1:
        micro_batches += f" on {plan.devices} devices"
    rate = (
        f"{optimizer.schedule}, peak {optimizer.learning_rate:g}, {optimizer.warmup_steps} warmup steps, "
        f"ends at {optimizer.final_learning_rate_fraction:g} of it; weight decay {optimizer.weight_decay:g}"
    )
    order = "shuffled" if config.data.shuffle else "in order"
    if data.overfits_one_batch:
        order = "of which the first batch is all"

    # A refusal by the kind of machine is no news. A fallback is "SEAM: not NAME: REASON".
    mendable = [SWITCHED_OFF, *(fallback.split(": ", 2)[-1] for fallback in plan.fallbacks())]

    def asked(*, by_default: bool) -> int:
        return _SAYS_MORE if by_default else _IS_ASKED_FOR

    rows: list[tuple[int, Row]] = [
        (_SAYS_WHAT, ("backend", f"{backend.name}: {backend.reason}")),
        (_SAYS_MORE, ("device", device)),
        *(
            (_SAYS_MORE, ("environment", f"{name}={value}, set for {backend.plugin or backend.name}"))
            for name, value in backend.environment
        ),
        *(
            (_WARNS if any(reason in value for reason in mendable) else _SAYS_MORE, (name, value))
            for name, value in plan.rows()
        ),
        *((_WARNS, ("fallback", reason)) for reason in ([backend.fallback] if backend.fallback else [])),
        (_SAYS_WHAT, ("weights", config.model.init if not config.run.resume else f"resumed from {folder}")),
        (_SAYS_WHAT, ("model", sizes)),
        (_SAYS_MORE, ("parameters", f"{plan.layout.num_parameters:,}, {plan.layout.num_true_parameters:,} without padding")),
        (_SAYS_WHAT, ("training data", f"{data.train.pattern}: {data.train.num_tokens:,} tokens, {order}")),
    ]
    if plan.devices > 1:
        rows.append((_IS_ASKED_FOR, ("devices", parallel.describe(plan, config.num_micro_batches))))
    if data.validation is not None:
        rows.append((_SAYS_WHAT, ("validation data", f"{data.validation.pattern}: {data.validation.num_tokens:,} tokens")))
    if shared := data.trained_validation_paths:
        what = f"validation data that are trained on too, so their loss says little: {', '.join(shared)}"
        rows.append((_WARNS, ("warning", what)))
    rows += [
        (_SAYS_WHAT, ("batch", f"{micro_batches} = {config.tokens_per_step:,} tokens a step")),
        (_SAYS_WHAT, ("memory", f"{needed} in a step")),
        (_SAYS_WHAT, ("steps", f"{steps} ({steps * config.tokens_per_step / data.train.num_tokens:.2f} epochs)")),
        (asked(by_default=optimizer == default.optimizer), ("learning rate", rate)),
        (asked(by_default=_update_rules(config) == _update_rules(default)), ("updates", _update_rules(config))),
    ]
    if plan.recompute != "none" and not saves_memory(plan):
        rows.append((_WARNS, ("", f"--recompute {plan.recompute}: {plan.saves_nothing()}")))
    return [
        *rows,
        (asked(by_default=_evaluations(config) == _evaluations(default)), ("evaluation", _evaluations(config))),
        (asked(by_default=_checkpoints(config) == _checkpoints(default)), ("checkpoints", _checkpoints(config))),
        (_SAYS_WHAT, ("run folder", folder)),
    ]


def _update_rules(config: RunConfig) -> str:
    optimizer, recompute = config.optimizer, config.compute.recompute
    outliers = [
        f"{name} above {threshold:g} z"
        for name, threshold in (("loss", optimizer.skip_loss_z), ("gradient norm", optimizer.skip_gradient_z))
        if threshold
    ]
    what_is_not_finite = "ends the run" if optimizer.nonfinite == "raise" else "is skipped"
    masters = "float32 parameters" if not config.rounds_parameters else "bfloat16 parameters, rounded stochastically"
    return (
        f"{masters}; outliers skipped: {', '.join(outliers) or 'none'}; what is not finite {what_is_not_finite}; "
        f"recomputed: {recompute}"
    )


def _evaluations(config: RunConfig) -> str:
    evaluation = config.evaluation
    parts = [
        f"{what} every {every} steps" if every else f"no {what}"
        for what, every in (("validation", evaluation.validate_every), ("sample", evaluation.sample_every))
    ]
    return ", ".join(parts + ([f"HellaSwag from {evaluation.hellaswag}"] if evaluation.hellaswag else []))


def _checkpoints(config: RunConfig) -> str:
    run = config.run
    every = f"every {run.checkpoint_every} steps and after the last" if run.checkpoint_every else "after the last step"
    if run.checkpoint_minutes:
        every += f", and every {run.checkpoint_minutes:g} minutes"
    major = f" and every {run.major_checkpoint_every}th step's" if run.major_checkpoint_every else ""
    return every + (f", of which the newest {run.keep_checkpoints}{major} are kept" if run.keep_checkpoints else "")
