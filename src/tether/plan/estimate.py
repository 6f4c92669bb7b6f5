"""From a checked run file to what the run will take: parameters, reference, memory by part, tokens, steps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from tether.compute.memory import LOADING_ROOM, TRAINING_BYTES, bytes_per_token, machine_bytes, token_budget
from tether.errors import ScoringError
from tether.models.structure import transformers_model
from tether.plan.policy import Sketch, sketch
from tether.plan.replay import StepBytes, replay
from tether.plan.rows import Sample, largest_batch, sample_rows
from tether.reference.resolve import expected_method
from tether.scoring import score
from tether.scoring.reward import reward
from tether.scoring.score import require_tree
from tether.training import OnlineConfig, PreferenceConfig
from tether.training.algorithms.base import Needs
from tether.training.setup.policy import policy_spec, processing_of
from tether.training.setup.reference import declared_meaning
from tether.types import Example, ScoringBatch

# Moments of an optimizer for each number that trains: how many, and bytes of one (None: as the number's own type).
_OPTIMIZERS: dict[str, tuple[int, float | None]] = {
    "sgd": (0, None),
    "adafactor": (0, None),  # a row and a column for each matrix
    "adamw_bnb_8bit": (2, 1),
    "adamw_8bit": (2, 1),
    "paged_adamw_8bit": (2, 1),
}
_ADAM = (2, None)
# Tokens of prompts and completions that are sampled at once, see `tether.rollout.tree_engine`.
_SAMPLED = 2**16
# What a process on a CPU holds beside its model: Python, torch, transformers, their kernels.
_LIBRARY_BYTES = 640 * 2**20


@dataclass(frozen=True)
class Machine:
    """Where a run would compute.

    Args:
        memory: bytes of one device, or of this machine for a CPU.
        accelerator: whether it is one.
        devices: how many there are, one process each.
        sharded: weights, gradients and optimizer are cut over them (FSDP).
    """

    memory: int
    accelerator: bool = False
    devices: int = 1
    sharded: bool = False

    @classmethod
    def here(cls) -> Machine:
        """The machine that this process runs on."""
        if torch.cuda.is_available():
            return cls(torch.cuda.get_device_properties(0).total_memory, True, torch.cuda.device_count())
        return cls(machine_bytes())

    @property
    def words(self) -> str:
        """In words, for a line."""
        kind = "GPU" if self.accelerator else "CPU"
        several = f"{self.devices} {kind}s" if self.devices > 1 else kind
        return f"{several} with {self.memory / 2**30:.1f} GiB{' each, sharded' if self.sharded else ''}"


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        model: class, and how many numbers it has and trains.
        reference: meaning, method and why.
        memory: bytes of one device by part; the step and the proof by loading come after another.
        peak: bytes at the most.
        machine: where.
        rows: that are trained on, and tokens of an epoch with and without sharing of prompts.
        steps: optimizer steps.
        batch: rows of a step, of a device's batch, and tokens of the largest forward.
        notes: what the figures leave out.
    """

    model: dict[str, Any]
    reference: dict[str, str]
    memory: dict[str, int]
    peak: int
    machine: Machine
    rows: dict[str, Any]
    steps: int
    batch: dict[str, int]
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the machine's memory."""
        return self.peak <= self.machine.memory

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "fits": self.fits}


def plan_run(
    model: str,
    args: PreferenceConfig,
    adapter: PeftConfig | None,
    rows: tuple[Any, Any],
    ref_model: str | None = None,
    machine: Machine | None = None,
    *,
    whole: bool = True,
) -> Plan:
    """Estimate a run; configuration, tokenizer and rows are read, weights are not.

    Args:
        model: the policy's name.
        args: of its trainer.
        adapter: of a new adapter, or None.
        rows: what the trainer takes as training and as evaluation rows.
        ref_model: name of another model that is the reference.
        machine: where it would compute; None: here.
        whole: follow a step also where what lasts does not fit by itself; else such a plan has no parts of a step.

    Raises:
        TetherError: the same as of training, as far as it is found before weights load.
    """
    place = machine or Machine.here()
    tokenizer, new_tokens = processing_of(model, args)
    config = policy_spec(model, args).load_config()
    apart = bool(config.is_encoder_decoder)
    sample = sample_rows(*rows, tokenizer, args, apart=apart)
    policy = sketch(model, args, adapter, new_tokens, accelerator=place.accelerator)
    notes = [] if sample.complete else ["tokens and rows are estimated from a sample of them"]
    reference, reference_bytes = _reference(args, ref_model, policy)
    memory = {"libraries": 0 if place.accelerator else _LIBRARY_BYTES, "weights": policy.weights}
    memory |= {"reference": reference_bytes, "optimizer": _optimizer(args, policy), "gradients": 0}
    batch: dict[str, int] = {}
    if whole or sum(_spread(memory, policy, place).values()) <= place.memory:
        held, batch = _step(args, policy, _with_completions(sample, args, config), place, apart, notes)
        memory |= {"gradients": held.gradients, "activations": held.activations, "head chunk": held.head}
    if isinstance(args, OnlineConfig):
        memory["rollouts"] = _rollouts(args, sample, config, policy)
    memory = _spread(memory, policy, place)
    return Plan(
        model={
            "class": type(transformers_model(policy.model)).__name__,
            "parameters": policy.parameters,
            "trainable": policy.trainable,
        },
        reference=reference,
        memory=memory,
        peak=_peak(memory, place),
        machine=place,
        rows={
            **{"rows": sample.rows, "tokens": sample.shared, "tokens_unshared": sample.unshared},
            **{"kind": args.kind, "epochs": args.num_train_epochs},
        },
        steps=_steps(args, sample, place),
        batch=batch,
        notes=notes,
    )


def _reference(args: PreferenceConfig, ref_model: Any, policy: Sketch) -> tuple[dict[str, str], int]:
    """Meaning, method and why; and the bytes that it holds beside the policy."""
    meaning = declared_meaning(args, ref_model)
    method, why = expected_method(args.reference_spec(meaning), policy.model, at_zero=policy.at_zero)
    size = {"snapshot": policy.trained, "model": policy.weights}.get(method, 0)
    if method == "model" and isinstance(ref_model, str):
        size = sketch(ref_model, args, None, [], accelerator=False).weights
    return {"meaning": meaning, "method": method, "why": why}, size


def _step(
    args: PreferenceConfig, policy: Sketch, examples: list[Example], place: Machine, apart: bool, notes: list[str]
) -> tuple[StepBytes, dict[str, int]]:
    """What the largest micro-batch of a step holds, and how a step is split."""
    model = policy.model
    checkpointing = bool(args.gradient_checkpointing)
    device = torch.device("cuda" if place.accelerator else "cpu")
    room = place.memory - policy.weights - TRAINING_BYTES * policy.trainable
    tokens, _ = token_budget(args.max_tokens_per_forward, model, device, checkpointing=checkpointing, room=room)
    layout = "encoder_decoder" if apart else _layout(model)
    batch, parts = largest_batch(examples, args.per_device_train_batch_size, tokens)
    if checkpointing:
        inner = transformers_model(model)
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        if policy.trainable < policy.parameters:
            inner.enable_input_require_grads()
    model.train()
    outputs = Needs().policy

    def values(model: nn.Module, batch: ScoringBatch) -> Tensor:
        if args.algorithm == "reward":
            return reward(model, batch, layout=layout)  # type: ignore[arg-type]
        return score(model, batch, outputs=outputs, layout=layout, backend="blocked").token_logps  # type: ignore[arg-type]

    repeats = parts * args.gradient_accumulation_steps
    need = bytes_per_token(model, checkpointing=checkpointing)
    try:
        held = replay(model, batch, values, repeats)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, AttributeError) as error:
        # A model whose code asks for values; its shapes alone give an estimate from above.
        held = StepBytes(policy.trained, 0, need * batch.forest.length)
        notes.append(f"activations are estimated from the shapes of the weights ({type(error).__name__} in a replay)")
    if place.accelerator:
        notes.append("on a GPU kernels keep less of attention than is counted here; nothing was measured on one")
    if args.router_aux_loss_coef:
        notes.append("the load-balancing loss of experts is left out")
    return held, {
        "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * place.devices,
        "micro_batches": repeats,
        "tokens_per_forward": batch.forest.length,
    }


def _layout(model: nn.Module) -> str:
    try:
        require_tree(transformers_model(model))
    except ScoringError:
        return "padded"
    return "tree"


def _with_completions(sample: Sample, args: PreferenceConfig, config: Any) -> list[Example]:
    """The rows as they are trained on; sampled completions are as long as they may be."""
    if not isinstance(args, OnlineConfig):
        return sample.examples
    length = args.max_completion_length or 0
    # Of one group, completions with other first tokens, so that none shares a branch.
    answers = [[number % config.get_text_config().vocab_size] * length for number in range(args.num_generations)]
    prompts = [Example.of(one.prompt_ids.tolist(), answers, 0) for one in sample.examples]
    return [Example.of(one.prompt_ids.tolist(), [ids]) for one in prompts for ids in answers]


def _optimizer(args: PreferenceConfig, policy: Sketch) -> int:
    name = str(getattr(args.optim, "value", args.optim))
    count, size = _OPTIMIZERS.get(name, _ADAM)
    return int(count * (policy.trained if size is None else size * policy.trainable))


def _rollouts(args: OnlineConfig, sample: Sample, config: Any, policy: Sketch) -> int:
    """Keys and values while completions are sampled: of each prompt once, and of all its completions."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = next(policy.model.parameters()).element_size()
    prompt = max(len(one.prompt_ids) for one in sample.examples)
    prompts = max(1, args.per_device_train_batch_size // args.num_generations)
    tokens = prompts * (prompt + args.num_generations * (args.max_completion_length or 0))
    return min(tokens, _SAMPLED) * 2 * text.num_hidden_layers * heads * width * size


def _spread(memory: dict[str, int], policy: Sketch, place: Machine) -> dict[str, int]:
    """The parts on one of several devices."""
    if place.devices == 1:
        return memory
    if not place.sharded:
        # Gradients are summed in buckets, which hold them once more.
        return {**memory, "gradients": 2 * memory["gradients"]}
    layers = max(getattr(transformers_model(policy.model).config.get_text_config(), "num_hidden_layers", 1), 1)
    shards = {name: -(-memory[name] // place.devices) for name in ("weights", "optimizer", "gradients", "reference")}
    # Each device has all weights while it samples, see `tether.reference.methods.shards.gathered`.
    sampling = {"rollouts": memory["rollouts"] + policy.weights} if "rollouts" in memory else {}
    return {**memory, **shards, **sampling, "gathered layers": 2 * policy.weights // layers}


def _peak(memory: dict[str, int], place: Machine) -> int:
    """The most that is held at once: in a step, while sampling, or when the saved model is loaded beside the first."""
    lasting = sum(memory[name] for name in ("libraries", "weights", "reference", "optimizer"))
    step = sum(memory.get(name, 0) for name in ("gradients", "activations", "head chunk", "gathered layers"))
    # The proof by loading is left out where a second model does not fit, so that it never decides what fits.
    room = lasting + LOADING_ROOM * memory["weights"]
    again = memory["weights"] if room <= place.memory and not place.sharded else 0
    return lasting + max(step, memory.get("rollouts", 0), again)


def _steps(args: PreferenceConfig, sample: Sample, place: Machine) -> int:
    if args.max_steps > 0:
        return args.max_steps
    if isinstance(args, OnlineConfig):
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * place.devices
        return math.ceil(args.num_train_epochs * sample.rows * args.num_generations / per_step)
    batches = math.ceil(math.ceil(sample.rows / place.devices) / args.per_device_train_batch_size)
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))
