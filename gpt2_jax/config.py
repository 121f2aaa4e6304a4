"""Every setting of a training run: dataclasses, from which the command line is made, and TOML files of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import gpt2_jax
from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.files import FilePath, read_text_file, with_home
from gpt2_jax.names import nearest, nearest_path

_MAX_BYTES = 100_000  # of a file with settings

# 0 once several GPUs have been measured: all accelerators of the machine, or the one CPU.
DEFAULT_DEVICES = 1

# mps is PyTorch's name for metal, and nanoGPT's flag is --device.
BackendName = Annotated[Literal["auto", "cpu", "cuda", "metal", "mps"], tyro.conf.arg(aliases=("--device",))]


@dataclass(frozen=True)
class ModelSettings:
    init: FilePath = "d12"
    """Where the weights come from: a descriptor for random ones (d6 d12 d24 d36 d48 ..., gpt3:c768 ...), a llm.c model
    file (.bin), a run folder (its newest complete checkpoint), a Hugging Face GPT-2 folder (config.json, and
    model.safetensors or pytorch_model.bin), a model of the Hugging Face hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, or
    OWNER/NAME), or nanoGPT's ckpt.pt. All but a descriptor mean fine-tuning: their weights, a fresh optimizer."""
    num_layers: int | None = None
    """Other than the descriptor's; like the next four only with a descriptor."""
    num_heads: int | None = None
    """Attention heads; must divide the channels."""
    channels: int | None = None
    """Width of the residual stream."""
    max_sequence_length: int | None = None
    """Rows of the position table."""
    vocab_size: int | None = None
    """Token ids; the table is padded to a multiple of 128. Of more than GPT-2's 50257, samples never choose those that pad
    to a multiple of 64 (50304)."""


@dataclass(frozen=True)
class DataSettings:
    train: FilePath = "data/kjv_train.bin"
    """Training shards: a path or a glob; the default is the built-in text, once it is prepared."""
    validation: FilePath = ""
    """Validation shards; empty: those beside --train whose name says val instead of train (my_val.bin for my_train.bin)."""
    batch_size: int = 4
    """Sequences of one micro-batch, B."""
    sequence_length: int = 1024
    """Tokens of a sequence, T; at most the model's."""
    total_batch_size: int = 0
    """Tokens of one optimizer step, a multiple of B * T, of several devices of B * T * devices: more than that accumulates
    gradients; 0 means as many."""
    shuffle: bool = True
    """Permute shards and samples in llm.c's order (seed 42); off: one after another."""
    overfit_one_batch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """For debugging: train on nothing but the first batch of the validation data, in every step."""


@dataclass(frozen=True)
class OptimizerSettings:
    learning_rate: Annotated[float, tyro.conf.arg(aliases=("--lr",))] = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate falls after the warmup."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises."""
    final_learning_rate_fraction: float = 1.0
    """The schedule ends at this fraction of the peak."""
    weight_decay: float = 0.0
    """Decoupled decay of the matrices and embeddings."""
    beta1: float = 0.9
    """AdamW's decay of the first moment, the mean of gradients."""
    beta2: float = 0.95
    """AdamW's decay of the second moment, the mean of their squares."""
    epsilon: float = 1e-8
    """What AdamW adds to the root of the second moment."""
    gradient_clip: float = 1.0
    """Scale a gradient whose norm is larger down to this norm; 0: never."""
    dropout: float = 0.0
    """Probability with which a training step drops an element of the embedding, of the attention weights, and of what
    attention and MLP add to the residual stream; validation and samples drop nothing."""
    freeze: str = ""
    """Tensors that stay as they are, by llm.c's names or patterns of them, separated by commas: wte,wpe or 'ln*'. They get
    no update and no weight decay, and their gradients are not computed."""
    skip_loss_z: float = 0.0
    """Refuse an update whose loss lies more than so many standard deviations above the last 128 steps' mean; 0: never."""
    skip_gradient_z: float = 0.0
    """The same for the gradient's norm."""
    nonfinite: Literal["raise", "skip"] = "raise"
    """A loss or gradient that is not finite never reaches the parameters; then the run ends, or goes on with a warning."""
    master_weights: bool = True
    """Off: in bfloat16 the parameters hold only what bfloat16 can represent, rounded stochastically as llm.c does."""

    @property
    def frozen_patterns(self) -> tuple[str, ...]:
        """The patterns of `freeze`."""
        return tuple(pattern for each in self.freeze.split(",") if (pattern := each.strip()))


@dataclass(frozen=True)
class EvaluationSettings:
    validate_every: int = 20
    """Validation loss before the first step, every so many steps, and after the last; 0: never."""
    validation_batches: int = 20
    """Batches of each validation; -1: all."""
    sample_every: int = 20
    """Show generated text before the first step, every so many steps, and after the last; 0: never."""
    sample_tokens: int = 64
    """Tokens of each sample."""
    hellaswag: FilePath = ""
    """llm.c's hellaswag_val.bin: score its questions whenever there is a validation, but for the first; empty: never."""
    patience: int = 0
    """End the run when so many validations in a row have not lowered the validation loss; the checkpoint of the lowest is
    kept, as with --keep-best. 0: never."""
    prompt: str = ""
    """Text that each sample continues; empty: the end-of-text token, as in llm.c. <|endoftext|> in it ends a document and
    begins the next, as in the texts of prepare."""


@dataclass(frozen=True)
class RunSettings:
    steps: Annotated[int, tyro.conf.arg(aliases=("--max-iters",))] = 0
    """Optimizer steps of the whole run, counted from 1 (a resumed run's earlier steps included); 0: one epoch."""
    seed: int = 42
    """Of the random weights and of the order of the training data; the default gives llm.c's."""
    out_dir: FilePath = ""
    """Run folder for checkpoints, log and plot; empty: runs/NAME-TIMESTAMP. One that holds a run needs --resume."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue from the newest complete checkpoint in --out-dir."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write nothing and train nothing: say what the run would need and how long it would take."""
    max_minutes: float = 0.0
    """Stop after so many minutes, with a checkpoint from which the run can go on; 0: no limit."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show all rows of the table at the start, rather than the ten that say most."""
    checkpoint_every: int = 0
    """Steps between checkpoints; one is always written after the last step. 0: only that one."""
    checkpoint_minutes: float = 10.0
    """Save also whenever so many minutes have passed without a checkpoint; of these only the newest is kept. 0: never."""
    keep_best: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep the checkpoint of the lowest validation loss after the start: saved then, and deleted by no other setting."""
    track: Literal["none", "trackio", "wandb", "tensorboard"] = "none"
    """Tell a tracker, too, what the log gets; each is an extra of the installation. trackio and tensorboard stay on this
    machine, as does wandb with WANDB_MODE=offline."""
    profile: str = ""
    """START:STOP: trace these steps, both included, and write profile.html, a table of the step's parts; empty: none."""
    keep_checkpoints: int = 0
    """Checkpoints to keep, older ones are deleted; 0: all."""
    major_checkpoint_every: int = 0
    """Checkpoints of multiples of so many steps are never deleted; 0: none is safe."""


@dataclass(frozen=True)
class ComputeSettings:
    backend: BackendName = "auto"
    """auto takes the accelerator that is there and says why; the others are an order, never replaced silently."""
    metal_plugin: Literal["auto", "jax-mps", "metaljax", "jax-graft", "jax-metal"] = "auto"
    """Which jax plugin for the Apple GPU; auto takes the first of these that is installed and fits the installed jax."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of products and activations. Parameters, gradients and moments are float32 in either."""
    matmul: Literal["auto", "xla", "naive", "blocked", "simd", "threaded", "amx", "accelerate", "openblas"] = "auto"
    """Implementation of the matrix products: xla, or on the CPU one of this project's own custom calls."""
    recompute: Literal["none", "gelu", "layernorm", "block"] = "none"
    """Parts that the backward pass recomputes to save memory: GELU; LayerNorms too; all of a block but its input."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Of float32 products: default lets NVIDIA GPUs, and MLX on an M5, use TF32, and amx multiply integers of three
    bytes, weights' gradients as high: three bfloat16 products, error 1e-5; highest is full float32 (for comparing)."""
    deterministic: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The same bits in every run on the same machine. The CPU's always are; on NVIDIA GPUs it costs some speed, which the
    start table tells."""
    devices: int = DEFAULT_DEVICES
    """Devices of each process that train together, each on its own --batch-size; 0: all accelerators, or the one CPU."""
    zero: Literal[0, 1, 2, 3] = 1
    """What several devices divide (ZeRO's stages): 0 nothing, 1 parameters and moments, of which each keeps its part; 2 also
    gradients, scattered in each micro-batch; 3 also the weights at work, gathered op by op, forward and backward."""
    coordinator: str = ""
    """HOST:PORT at which process 0 of several answers; the same command on each, with its own --process-id."""
    processes: int = 0
    """How many processes train together, each on --devices of its own; 0: as many as --hosts, SLURM or Open MPI say, else 1."""
    process_id: int = -1
    """Which of them this one is, from 0; -1: as --hosts, SLURM or Open MPI say."""
    hosts: str = ""
    """a,b,c: one process on each of these hosts, the same command on all; process 0 is the first's."""
    distributed: Literal["auto", "slurm", "mpi", "none"] = "auto"
    """What starts the processes; auto: Open MPI or SLURM, if it started several, else nobody."""
    strict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make every announced fallback an error: a library that was not built, a jax that lacks what is needed."""


# Of ComputeSettings: how this process was started, which may be other on each and in each part of a run.
LAUNCH_SETTINGS = ("coordinator", "processes", "process_id", "hosts", "distributed")


@dataclass(frozen=True)
class RunConfig:
    """All settings; the sections are the tables of the TOML file and the groups of --help."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    run: RunSettings = field(default_factory=RunSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    def validate(self) -> None:
        """Raise Gpt2JaxError for everything that can be refused without looking at a file."""
        for section, name, lowest in (
            (self.data, "batch_size", 1),
            (self.data, "sequence_length", 1),
            (self.data, "total_batch_size", 0),
            (self.optimizer, "warmup_steps", 0),
            (self.evaluation, "validate_every", 0),
            (self.evaluation, "validation_batches", -1),
            (self.evaluation, "sample_every", 0),
            (self.evaluation, "sample_tokens", 1),
            (self.evaluation, "patience", 0),
            (self.compute, "devices", 0),
            (self.compute, "processes", 0),
            (self.compute, "process_id", -1),
            (self.run, "steps", 0),
            (self.run, "seed", 0),
            (self.run, "checkpoint_every", 0),
            (self.run, "keep_checkpoints", 0),
            (self.run, "major_checkpoint_every", 0),
        ):
            if getattr(section, name) < lowest:
                raise Gpt2JaxError(f"{_flag(name)}: expected at least {lowest}, found {getattr(section, name)}")
        if self.evaluation.validation_batches == 0:
            raise Gpt2JaxError(
                "--validation-batches: expected at least 1, or -1 for all, found 0", "--validate-every 0 turns it off"
            )
        for flag, given in (("--keep-best", self.run.keep_best), ("--patience", self.evaluation.patience)):
            if given and self.evaluation.validate_every == 0:
                raise Gpt2JaxError(
                    f"{flag}: expected a run that validates, found --validate-every 0",
                    f"--validate-every 20   (or without {flag})",
                )
        for section in (self.optimizer, self.run):
            for name, value in dataclasses.asdict(section).items():
                if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
                    raise Gpt2JaxError(f"{_flag(name)}: expected a finite number of at least 0, found {value}")
        for name in ("beta1", "beta2", "dropout"):
            if getattr(self.optimizer, name) >= 1:
                raise Gpt2JaxError(f"--{name}: expected a number below 1, found {getattr(self.optimizer, name)}")
        if self.optimizer.epsilon == 0:
            raise Gpt2JaxError("--epsilon: expected a number above 0, found 0.0")
        if self.run.seed >= 2**32:
            raise Gpt2JaxError(f"--seed: expected less than 2^32, found {self.run.seed}")
        micro_batch = self.data.batch_size * self.data.sequence_length * self.num_devices
        # A resumed run keeps the tokens of a step; what then does not fit is the number of devices.
        if not self.run.resume and self.data.total_batch_size % micro_batch:
            below = self.data.total_batch_size // micro_batch * micro_batch
            raise Gpt2JaxError(
                f"--total-batch-size: expected a multiple of batch size x sequence length"
                f"{f' x {self.num_devices} devices' if self.num_devices > 1 else ''} = {micro_batch} tokens, "
                f"found {self.data.total_batch_size}",
                f"--total-batch-size {max(below, micro_batch)}",
            )
        if self.run.resume and not self.run.out_dir:
            folder = shlex.quote(newest_run("runs") or "runs/NAME")
            raise Gpt2JaxError("--resume: expected the run's folder, found no --out-dir", f"--resume --out-dir {folder}")

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of each device whose gradients one step sums."""
        micro_batch = self.data.batch_size * self.data.sequence_length * self.num_devices
        return max(1, self.data.total_batch_size // micro_batch)

    @property
    def num_devices(self) -> int:
        """Devices of all processes together; 1 a process until a run that leaves their number open has looked for them."""
        return max(1, self.compute.devices) * max(1, self.compute.processes)

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """(A, D * B, T): the micro-batches of one step, their sequences on all devices, and the tokens of each."""
        return self.num_micro_batches, self.num_devices * self.data.batch_size, self.data.sequence_length

    @property
    def tokens_per_step(self) -> int:
        return self.num_micro_batches * self.num_devices * self.data.batch_size * self.data.sequence_length

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint of the lowest validation loss is kept."""
        return self.run.keep_best or self.evaluation.patience > 0

    @property
    def rounds_parameters(self) -> bool:
        """Whether the parameters hold only bfloat16's values, rounded stochastically at each update."""
        return self.compute.dtype == "bfloat16" and not self.optimizer.master_weights


def saved_config_path(out_dir: str | Path) -> Path:
    """Where a run keeps its resolved settings."""
    return Path(out_dir) / "config.toml"


def newest_run(folder: str | Path) -> str | None:
    """Of the runs in a folder the one that was started or resumed last; None where there is none."""
    runs = [path.parent for path in Path(folder).glob("*/config.toml") if not path.parent.is_symlink()]
    return str(max(runs, key=lambda run: saved_config_path(run).stat().st_mtime_ns)) if runs else None


def find_config(name: str) -> Path:
    """The file of --config: a path, or the name of a preset. Gpt2JaxError, listing the presets, for neither."""
    path = Path(name)
    if os.path.isfile(path) or path.suffix == ".toml" or len(path.parts) != 1:
        return path
    # A wheel has the presets inside the package, a source checkout beside it; those of the checkout are the newer ones.
    roots = [Path(root) for root in gpt2_jax.__path__]
    checkouts = [root.parent for root in roots if (root.parent / "pyproject.toml").exists()]
    folders = [parent / "configs" for parent in (*roots, *checkouts)]
    presets = {preset.stem: preset for folder in folders for preset in folder.glob("*.toml")}
    if name not in presets:
        close = nearest(name, presets)
        raise Gpt2JaxError(
            f"--config: expected a TOML file or one of {', '.join(sorted(presets))}, found {name!r}",
            f"--config {close[0] if close else 'demo'}",
        )
    return presets[name]


def load_saved_config(out_dir: str | Path) -> RunConfig | None:
    """The settings of the run in a folder; None where there is none, or one that llm.c wrote."""
    path = saved_config_path(out_dir)
    return load_config(path) if os.path.lexists(path) else None


def load_config(path: str | Path) -> RunConfig:
    """Settings of a TOML file over the defaults; Gpt2JaxError for an unknown section or key, or a value of a wrong type."""
    meant = nearest_path(path)
    is_near = meant is not None and meant.suffix == ".toml" and meant.is_file()
    text = read_text_file(
        path,
        "a TOML file with settings",
        f"--config {shlex.quote(str(meant))}" if is_near else "--config demo   (a preset, by its name)",
        max_bytes=_MAX_BYTES,
        errors="surrogatepass",
    )
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of an integer or a nesting that Python has no room for
        raise Gpt2JaxError(f"{path}: expected TOML, found: {error}") from None
    return config_from_tables(tables, str(path))


def config_from_tables(tables: Mapping[str, Any], where: str) -> RunConfig:
    """Settings over the defaults, from tables as TOML has them; `where` names them in the Gpt2JaxErrors of `load_config`."""
    sections = {section.name: section for section in dataclasses.fields(RunConfig)}
    settings: dict[str, Any] = {}
    for section_name, table in tables.items():
        if section_name not in sections or not isinstance(table, Mapping):
            raise Gpt2JaxError(
                f"{where}: expected only the tables {', '.join(f'[{name}]' for name in sections)}, found {section_name!r}"
                + _suggestion(section_name, list(sections))
            )
        section_type = typing.get_type_hints(RunConfig)[section_name]
        types_by_key = typing.get_type_hints(section_type)
        values = {}
        for key, value in table.items():
            if key not in types_by_key:
                raise Gpt2JaxError(
                    f"{where}: expected a setting of [{section_name}], found {key!r}" + _suggestion(key, list(types_by_key))
                )
            values[key] = _checked(f"{where}: {section_name}.{key}", value, types_by_key[key])
        settings[section_name] = section_type(**values)
    return with_home(RunConfig(**settings))


def format_config(config: RunConfig) -> str:
    """The settings as TOML; load_config of it gives `config` back."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        for key, value in dataclasses.asdict(getattr(config, section.name)).items():
            if value is not None:
                text = json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else repr(value)
                text = text.replace("\x7f", "\\u007f")  # the one character that TOML has escaped and JSON has not
                lines.append(f"{key} = {text}")
        lines.append("")
    return "\n".join(lines)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _suggestion(found: str, known: list[str]) -> str:
    close = nearest(found, known)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _checked(where: str, value: Any, expected: Any) -> Any:
    """A TOML value as the setting's type: an integer may stand for a float, nothing else is converted."""
    if typing.get_origin(expected) is Literal:
        if value not in typing.get_args(expected):
            known = [str(choice) for choice in typing.get_args(expected)]
            close = f"; did you mean {names[0]!r}?" if (names := nearest(str(value), known)) else ""
            raise Gpt2JaxError(f"{where}: expected one of {', '.join(known)}, found {value!r}{close}")
        return value
    if isinstance(expected, types.UnionType):  # int | None: TOML has no null, a key left out means None
        expected = typing.get_args(expected)[0]
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise Gpt2JaxError(f"{where}: expected {expected.__name__}, found {value!r}")
    return value
