"""`tether doctor`: the environment; `tether doctor model NAME`: load a model, and check what training needs of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.before.environment import Finding
from tether.cli.run import AsJson, Debug
from tether.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tether.models.spec import ModelSpec

app = typer.Typer(
    help="Look at this machine, and at what a run is made of, before it runs.", invoke_without_command=True
)
_CHAT = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "It is."}]
_RANK = 16
_PAIR = ("The film was", " good, as far as I remember it.", " bad.")


@app.callback()
def _doctor(context: typer.Context, as_json: AsJson = False) -> None:
    """Without a command: the environment; see `tether.cli.before.environment`."""
    if context.invoked_subcommand is None:
        from tether.cli.before.environment import findings

        _end([], findings(), as_json)
    elif as_json:
        raise ConfigError("--json stands before the command. Write it behind: tether doctor model NAME --json.")


def _end(lines: list[str], found: list[Finding], as_json: bool) -> None:
    """Say what was found, and end with 1 for a problem."""
    if as_json:
        findings = [{"level": finding.level, "text": finding.text} for finding in found]
        typer.echo(json.dumps({"described": lines, "findings": findings}, indent=2, ensure_ascii=False))
    else:
        for line in (*lines, *(f"{finding.level}: {finding.text}" for finding in found)):
            typer.echo(line)
    if any(finding.level == "problem" for finding in found):
        raise typer.Exit(1)


@app.command("model", help="Load a model and say what it is, and what training needs of it.")
def model(
    name: Annotated[
        str,
        typer.Argument(help="Hub name, folder, adapter's folder or .gguf file.", metavar="MODEL", show_default=False),
    ],
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub name.")] = None,
    quantization: Annotated[str | None, typer.Option(help="4bit, 8bit or int8.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter on the model.")] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            help="Rank of a new adapter on all linear layers; 0 for none. Left out: 16 for a model without an adapter.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the model's repository.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Load, describe and check a model.

    Args:
        name: what to load.
        dtype: of the weights.
        revision: branch, tag or commit.
        quantization: what the weights are quantised to.
        adapter: folder of an adapter on the model; with `lora`, it is frozen beneath the new one.
        lora: rank of a new adapter; it is really put on, so that what would train is counted.
        trust_remote_code: run code that comes with it.
        as_json: for a script.
        debug: let the libraries speak.

    Raises:
        ConfigError: it cannot be loaded (exit code 2).
        typer.Exit: code 1 when a check found a problem.
    """
    from tether.cli.output import terminal_output
    from tether.models.spec import ModelSpec

    with terminal_output(debug):
        spec = ModelSpec(
            name,
            revision=revision,
            dtype=dtype,
            quantization=None if quantization == "none" else quantization,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
        )
        processing: Any = spec.load_processing()
        loaded = _with_adapters(spec, lora)
    _end(describe(loaded), examine(loaded, getattr(processing, "tokenizer", processing)), as_json)


def _with_adapters(spec: ModelSpec, lora: int | None) -> Any:
    """The model as a run would train it: its adapter continued, a new one on it, or a new one over a frozen one."""
    from peft import LoraConfig, PeftModel

    from tether.models.adapters import new_adapter, stack_adapter

    rank = lora if lora is not None else 0 if spec.brings_adapter else _RANK
    if not rank:
        return spec.load()
    base: Any = spec.load_base()
    if isinstance(base, PeftModel):
        raise ConfigError(
            f"--lora {rank} was given, and '{spec.source}' has an adapter already. Leave --lora out to look at how "
            "that is continued; for a new one over it, name its base and give the folder as --adapter."
        )
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)
    return new_adapter(base, config) if spec.adapter is None else stack_adapter(base, spec.adapter, config)


def describe(loaded: Any) -> list[str]:
    """Architecture, quantisation, adapters, sizes and memory, a line each.

    Args:
        loaded: the model, with the adapters that it would train with.
    """
    from tether.models.fingerprint import base_tensors
    from tether.models.structure import dtype_of, trainable_tensors, transformers_model

    base = transformers_model(loaded)
    names = {id(parameter) for parameter in base.parameters()}
    under = [tensor for tensor in base_tensors(loaded).values() if id(tensor) in names]
    count = base.num_parameters() - sum(p.numel() for p in base.parameters()) + sum(p.numel() for p in under)
    trains = sum(tensor.numel() for tensor in trainable_tensors(loaded).values())
    # Gradient and two moments of Adam in float32 for what trains.
    states = trains * (4 + 8)
    config: Any = base.config.get_text_config()
    kind = "encoder-decoder" if base.config.is_encoder_decoder else "decoder"
    kind = "vision-language" if getattr(base.config, "vision_config", None) is not None else kind
    weights = sum(map(_bytes, under)) / 2**20
    return [
        f"model: {type(base).__name__} ({kind}), {getattr(config, 'num_hidden_layers', '?')} layers of "
        f"{config.hidden_size}, vocabulary {config.vocab_size}, {str(dtype_of(base)).removeprefix('torch.')}",
        *_quantization(base, under),
        *_adapters(loaded),
        f"parameters: {count:,}; would train: {trains:,}",
        f"memory: weights {weights:,.0f} MiB, gradients and Adam {states / 2**20:,.0f} MiB, and activations",
    ]


def _quantization(base: PreTrainedModel, tensors: list[Any]) -> list[str]:
    from tether.models.quantized import is_quantized

    config: Any = getattr(base.config, "quantization_config", None)
    if config is None:
        return []
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    count = sum(map(is_quantized, tensors))
    return [f"quantization: {getattr(method, 'value', method)}, {count} of {len(tensors)} tensors; these never train"]


def _adapters(loaded: Any) -> list[str]:
    from peft import PeftModel

    from tether.models.structure import trainable_tensors

    if not isinstance(loaded, PeftModel):
        return ["adapter: none"]
    trained = [f".{name}." for name in trainable_tensors(loaded)]
    lines = []
    for name, config in loaded.peft_config.items():
        rank = f", r {vars(config)['r']}" if "r" in vars(config) else ""
        does = "trains" if any(f".{name}." in tensor for tensor in trained) else "frozen"
        effect = "" if name in loaded.active_adapters else ", not in effect"
        lines.append(f"adapter {name!r}: {getattr(config.peft_type, 'value', config.peft_type)}{rank}, {does}{effect}")
    return lines


def _bytes(tensor: Any) -> int:
    """What a tensor takes; torchao's are made of several."""
    from tether.compat.torch import inner_tensors

    return sum(map(_bytes, inner_tensors(tensor))) or tensor.numel() * tensor.element_size()


def examine(loaded: Any, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    """Check a model with its tokenizer.

    Args:
        loaded: the model, on any device.
        tokenizer: its tokenizer.

    Returns:
        What was found, problems and all that is well.
    """
    from tether.models.structure import transformers_model

    found = [*_vocabulary(transformers_model(loaded), tokenizer), *_ends(tokenizer), *_template(tokenizer)]
    if any(finding.level == "problem" for finding in found):
        return found  # ids that the model does not have cannot be scored
    return [*found, *_trains(loaded), *_scores(loaded, tokenizer)]


def _trains(loaded: Any) -> list[Finding]:
    from tether.compat.transformers import is_quantized
    from tether.models.structure import trainable_tensors

    if is_quantized(loaded) and not hasattr(loaded, "peft_config"):
        return [Finding("problem", "the weights are quantised and there is no adapter, so nothing could train")]
    if not trainable_tensors(loaded):
        return [Finding("problem", "nothing would train: no parameter requires a gradient")]
    return []


def _vocabulary(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    rows = base.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        text = f"the tokenizer has ids up to {largest} and the model {rows} embeddings; it belongs to another model"
        return [Finding("problem", text)]
    head = base.get_output_embeddings()
    if head is None:
        return [Finding("problem", f"{type(base).__name__} has no language-model head")]
    tied = head.weight is base.get_input_embeddings().weight  # type: ignore[union-attr]
    said = bool(getattr(base.config.get_text_config(), "tie_word_embeddings", False))
    level = "ok" if tied == said else "problem"
    text = f"head {'tied to' if tied else 'apart from'} the embeddings"
    text += "" if tied == said else f", though its configuration says tie_word_embeddings={said}"
    return [Finding("ok", f"vocabulary: {largest + 1} ids in {rows} embeddings"), Finding(level, text)]


def _ends(tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    if tokenizer.eos_token_id is None:
        return [Finding("problem", "no end-of-sequence token: a model could not learn where a completion ends")]
    special = f"end {tokenizer.eos_token!r}, padding {tokenizer.pad_token!r}, beginning {tokenizer.bos_token!r}"
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return [Finding("note", f"{special}: padding is the end token; Tether masks by position, other tools may not")]
    return [Finding("ok", special)]


def _template(tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    if not tokenizer.chat_template:
        return [Finding("note", "no chat template: rows must be text, not conversations")]
    from tether.data.text.template_sandbox import ending_template

    try:
        with ending_template():
            prompt = tokenizer.apply_chat_template(_CHAT[:1], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(_CHAT, tokenize=False)
    except Exception as error:  # a template is a program written by others
        return [Finding("problem", f"the chat template refuses a plain conversation ({error})")]
    if not str(whole).startswith(str(prompt)):
        return [Finding("note", "the chat template writes a prompt alone differently than in a conversation")]
    ids = [tokenizer(str(text), add_special_tokens=False)["input_ids"] for text in (prompt, whole)]
    if ids[1][: len(ids[0])] != ids[0]:
        return [Finding("note", "tokens merge across the end of a templated prompt; such rows are split there")]
    return [Finding("ok", "chat template: ids of a prompt are a prefix of those of the conversation")]


def _scores(loaded: Any, tokenizer: PreTrainedTokenizerBase) -> list[Finding]:
    import torch

    from tether.data import example_from_row, prepare
    from tether.errors import TetherError
    from tether.models.structure import evaluation_mode, transformers_model
    from tether.scoring import choose_layout, pack, score_alone

    base = transformers_model(loaded)
    prompt, chosen, rejected = _PAIR
    rows = [{"prompt": prompt * repeat, "chosen": chosen, "rejected": rejected} for repeat in (1, 3)]
    try:
        prepared = prepare(rows, tokenizer, max_length=None, encoder_decoder=base.config.is_encoder_decoder)
        examples = [example_from_row(prepared.dataset[i]) for i in range(len(prepared.dataset))]
        with torch.no_grad(), evaluation_mode(loaded):
            logps = score_alone(loaded, pack(examples).to(next(loaded.parameters()).device))
        if not bool(torch.isfinite(logps).all()):
            return [Finding("problem", "log-probabilities of plain text are not finite; try --dtype float32")]
        choice = choose_layout(loaded, examples)
        reached = _reached(loaded, pack(examples[:1]).to(next(loaded.parameters()).device), choice.options)
    except TetherError as error:
        return [Finding("problem", str(error))]
    uniform = -torch.log(torch.tensor(float(base.config.get_text_config().vocab_size))).item()
    figure = f"{logps.mean().item():.2f} nats a token of plain English (chance: {uniform:.2f})"
    level = "ok" if logps.mean().item() > uniform else "note"
    return [Finding(level, f"log-probabilities are finite: {figure}"), Finding("ok", choice.line), *reached]


def _reached(loaded: Any, batch: Any, options: dict[str, Any]) -> list[Finding]:
    """Whether a gradient reaches an adapter after a pass in evaluation mode, which is what a reference pass is."""
    from peft import PeftModel

    from tether.models.structure import trainable_tensors
    from tether.scoring import score

    if not isinstance(loaded, PeftModel):
        return []
    total = score(loaded, batch, **options).token_logps.sum()
    if total.requires_grad:
        total.backward()
    tensors = trainable_tensors(loaded)
    moved = sum(tensor.grad is not None and bool(tensor.grad.any()) for tensor in tensors.values())
    loaded.zero_grad()
    text = f"after a pass in evaluation mode a gradient reaches {moved} of {len(tensors)} trainable tensors"
    return [Finding("ok" if moved else "problem", text)]
