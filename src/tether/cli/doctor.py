"""`tether doctor model NAME`: load a model, say what it is, and check what preference training needs of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tether.cli.run import Debug

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(help="Look at what a run is made of, before it runs.", no_args_is_help=True)
_CHAT = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "It is."}]
_PAIR = ("The film was", " good, as far as I remember it.", " bad.")


@dataclass(frozen=True)
class Finding:
    """One line of the report: `ok`, `note` (worth knowing) or `problem` (training would be wrong or impossible)."""

    level: str
    text: str


@app.callback()
def _doctor() -> None:
    """Commands stand behind `doctor`."""


@app.command("model")
def model(
    name: Annotated[str, typer.Argument(help="Hub name, folder, adapter's folder or .gguf file.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="Type of the weights.")] = "auto",
    lora: Annotated[int, typer.Option(help="Rank of an adapter on all linear layers; 0 for full fine-tuning.")] = 16,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code of the model's repository.")] = False,
    debug: Debug = False,
) -> None:
    """Load, describe and check a model.

    Args:
        name: what to load.
        dtype: of the weights.
        lora: rank of the adapter for which parameters and memory are counted.
        trust_remote_code: run code that comes with it.
        debug: let the libraries speak.

    Raises:
        ConfigError: it cannot be loaded (exit code 2).
        typer.Exit: code 1 when a check found a problem.
    """
    from tether.cli.output import terminal_output
    from tether.models.spec import ModelSpec

    with terminal_output(debug):
        spec = ModelSpec(name, dtype=dtype, trust_remote_code=trust_remote_code)
        processing: Any = spec.load_processing()
        loaded = spec.load()
    for line in describe(loaded, lora):
        typer.echo(line)
    findings = examine(loaded, getattr(processing, "tokenizer", processing))
    for finding in findings:
        typer.echo(f"{finding.level}: {finding.text}")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def describe(loaded: Any, lora: int) -> list[str]:
    """Architecture, sizes and memory, a line each.

    Args:
        loaded: the model.
        lora: rank of an adapter on all linear layers; 0 for none.
    """
    from torch import nn

    from tether.models.structure import dtype_of, transformers_model

    base = transformers_model(loaded)
    count = sum(parameter.numel() for parameter in base.parameters())
    head = base.get_output_embeddings()
    layers = [m for m in base.modules() if isinstance(m, nn.Linear) and m is not head]
    trains = sum(lora * (m.in_features + m.out_features) for m in layers) if lora else count
    weights = sum(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    # Gradient and two moments of Adam in float32 for what trains.
    states = trains * (4 + 8)
    config: Any = base.config.get_text_config()
    kind = "encoder-decoder" if base.config.is_encoder_decoder else "decoder"
    kind = "vision-language" if getattr(base.config, "vision_config", None) is not None else kind
    return [
        f"model: {type(base).__name__} ({kind}), {getattr(config, 'num_hidden_layers', '?')} layers of "
        f"{config.hidden_size}, vocabulary {config.vocab_size}, {str(dtype_of(base)).removeprefix('torch.')}",
        f"parameters: {count:,}; trainable {'with LoRA of rank ' + str(lora) if lora else 'in full'}: {trains:,}",
        f"memory: weights {weights / 2**20:,.0f} MiB, gradients and Adam {states / 2**20:,.0f} MiB, and activations",
    ]


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
    return [*found, *_scores(loaded, tokenizer)]


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
    try:
        prompt = tokenizer.apply_chat_template(_CHAT[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(_CHAT, tokenize=False)
    except Exception as error:  # a template is a program written by others
        return [Finding("problem", f"the chat template refuses a plain conversation ({error})")]
    if not str(whole).startswith(str(prompt)):
        return [Finding("note", "the chat template writes a prompt alone otherwise than in a conversation")]
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
        line = choose_layout(loaded, examples).line
    except TetherError as error:
        return [Finding("problem", str(error))]
    uniform = -torch.log(torch.tensor(float(base.config.get_text_config().vocab_size))).item()
    figure = f"{logps.mean().item():.2f} nats a token of plain English (chance: {uniform:.2f})"
    level = "ok" if logps.mean().item() > uniform else "note"
    return [Finding(level, f"log-probabilities are finite: {figure}"), Finding("ok", line)]
