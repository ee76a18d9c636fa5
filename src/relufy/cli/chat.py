"""`relufy chat`: talk with a model in the terminal."""

from pathlib import Path
from typing import Annotated, Any

import typer

from relufy.cli.options import (
    Adaptive,
    Context,
    Dtype,
    FrequencyPenalty,
    Gamma,
    Keep,
    KvDtype,
    LogitBias,
    MinP,
    MinProbability,
    Mlock,
    ModelOrFile,
    NoMmap,
    Policy,
    PredictorMode,
    PresencePenalty,
    RepetitionPenalty,
    ReusePeriod,
    ReusePolicyName,
    ReuseWindow,
    Seed,
    Speculative,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    parse_logit_bias,
    parse_predictor,
    parse_reuse,
    parse_speculation,
)
from relufy.cli.output import note, note_ignored
from relufy.errors import UserError


def command(
    model: ModelOrFile,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    template: Annotated[
        Path | None, typer.Option(help="A chat template (Jinja) instead of the model's own.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="For base models: a dialogue in plain words, without a template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="End an answer after so many tokens.")] = 1024,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    context_policy: Policy = None,
    keep: Keep = None,
    reuse: ReusePeriod = None,
    reuse_window: ReuseWindow = None,
    reuse_policy: ReusePolicyName = None,
    predictor: PredictorMode = None,
    speculative: Speculative = None,
    gamma: Gamma = None,
    min_probability: MinProbability = None,
    adaptive: Adaptive = False,
    threads: Threads = None,
    context: Context = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    mlock: Mlock = False,
    no_mmap: NoMmap = False,
) -> None:
    """Talk with a model; /help shows the commands. It samples as generation_config.json says, unless told."""
    from relufy.cli.chat_commands import ChatCommands
    from relufy.cli.chat_terminal import ChatTerminal
    from relufy.engine import Engine
    from relufy.engine.conversation import Conversation

    source = _template(template, plain)
    speculation = parse_speculation(speculative, gamma, min_probability, adaptive)
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": parse_logit_bias(logit_bias),
        "seed": seed,
        "stop": stop,
        "context_policy": context_policy,
        "keep": keep,
        "speculation": speculation,
    }
    engine = Engine(
        model,
        threads=threads,
        context=context,
        kv_dtype=kv_dtype,
        load=no_mmap,
        dtype=dtype,
        mlock=mlock,
        reuse=parse_reuse(reuse, reuse_window, reuse_policy),
        for_reuse=speculation is not None and speculation.is_self,
        predictor=parse_predictor(predictor),
    )
    options: Any = engine.recommended_options() | {k: v for k, v in given.items() if v is not None}
    conversation = Conversation(engine, source, system, max_new_tokens, options)
    note_ignored(given | {"temperature": options.get("temperature")}, context, engine)
    note(_greeting(str(engine.header.metadata().get("model")), options))
    ChatTerminal(ChatCommands(conversation)).run()


def _template(file: Path | None, plain: bool) -> str | None:
    from relufy.engine.chat_template import PLAIN

    if file is not None and plain:
        raise UserError("--template and --plain exclude each other; choose one")
    if file is None:
        return PLAIN if plain else None
    text = file.read_text(encoding="utf-8", errors="replace")
    if "{" not in text:
        raise UserError(f"{file} holds no Jinja, so it is not a chat template")
    return text


def _greeting(name: str, options: dict[str, Any]) -> str:
    shown = {key: value for key, value in options.items() if key != "speculation"}
    settings = [f"{key} {value}" for key, value in shown.items() if value not in ({}, [])]
    how = ", ".join(settings) if options.get("temperature") else "the most likely token each time"
    return f"{name}: {how}. /help shows the commands, Ctrl-D leaves."
