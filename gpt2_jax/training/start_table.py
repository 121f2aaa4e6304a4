"""The table before a run: every setting, and its meaning on this machine."""

from __future__ import annotations

from pathlib import Path

from gpt2_jax.compute.memory import MemoryEstimate
from gpt2_jax.compute.plan import Plan
from gpt2_jax.config import RunConfig
from gpt2_jax.data.batches import RunData
from gpt2_jax.ops.recompute import saves_memory


def start_table(
    config: RunConfig, plan: Plan, device: str, data: RunData, steps: int, needed: MemoryEstimate, folder: Path
) -> list[tuple[str, object]]:
    """Names and values, for report.Display.table."""
    model, optimizer, backend = plan.config, config.optimizer, plan.backend
    sizes = (
        f"{model.num_layers} layers, {model.num_heads} heads, {model.channels} channels, "
        f"{model.vocab_size} tokens (padded to {model.padded_vocab_size}), {model.max_sequence_length} positions"
    )
    micro_batches = f"{config.num_micro_batches} x {config.data.batch_size} x {config.data.sequence_length}"
    rate = (
        f"{optimizer.schedule}, peak {optimizer.learning_rate:g}, {optimizer.warmup_steps} warmup steps, "
        f"ends at {optimizer.final_learning_rate_fraction:g} of it; weight decay {optimizer.weight_decay:g}"
    )
    path, order = data.train.pattern, "shuffled" if config.data.shuffle else "in order"
    if data.overfits_one_batch:
        order = "of which the first batch is all"
    rows: list[tuple[str, object]] = [
        ("backend", f"{backend.name}: {backend.reason}"),
        ("device", device),
        *(("environment", f"{name}={value}, set for {backend.plugin or backend.name}") for name, value in backend.environment),
        *plan.rows(),
        ("weights", config.model.init if not config.run.resume else f"resumed from {folder}"),
        ("model", sizes),
        ("parameters", f"{plan.layout.num_parameters:,} with padding, {plan.layout.num_true_parameters:,} without"),
        ("training data", f"{path}: {data.train.num_tokens:,} tokens, {order}"),
    ]
    if data.validation is not None:
        rows.append(("validation data", f"{data.validation.pattern}: {data.validation.num_tokens:,} tokens"))
    if shared := data.trained_validation_paths:
        rows.append(("warning", f"validation data that are trained on too, so their loss says little: {', '.join(shared)}"))
    rows += [
        ("batch", f"{micro_batches} = {config.tokens_per_step:,} tokens a step"),
        ("memory", f"{needed} in a step"),
        ("steps", f"{steps} ({steps * config.tokens_per_step / data.train.num_tokens:.2f} epochs)"),
        ("learning rate", rate),
        ("updates", _update_rules(config)),
    ]
    if plan.recompute != "none" and not saves_memory(plan):
        rows.append(("", f"--recompute {plan.recompute}: {plan.saves_nothing()}"))
    return [
        *rows,
        ("evaluation", _evaluations(config)),
        ("checkpoints", _checkpoints(config)),
        ("run folder", folder),
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
    major = f" and every {run.major_checkpoint_every}th step's" if run.major_checkpoint_every else ""
    return every + (f", of which the newest {run.keep_checkpoints}{major} are kept" if run.keep_checkpoints else "")
