"""`relufy generate`: text from the engine, streamed."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relufy.cli.options import (
    Adaptive,
    Context,
    Dtype,
    FrequencyPenalty,
    Gamma,
    Json,
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
from relufy.cli.output import note, note_ignored, print_json
from relufy.errors import UserError

if TYPE_CHECKING:
    from relufy.engine import Engine, Generation, GenerationStats


def command(
    model: ModelOrFile,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
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
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, help="With --json: each token's logprob, and the N most likely beside it."),
    ] = None,
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
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the text: no figures on stderr.")] = False,
    json: Json = False,
) -> None:
    """Continue a text on the CPU engine; a folder is packed into the cache on first use."""
    from relufy.engine import Engine

    if logprobs is not None and not json:
        raise UserError("--logprobs is told with --json only; add it")
    speculation = parse_speculation(speculative, gamma, min_probability, adaptive)
    options: dict[str, Any] = {
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
        "logprobs": logprobs,
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
    generation = engine.generate(prompt, max_new_tokens, **options)
    if not quiet:
        note_ignored(options, context, engine)
    for piece in generation:
        if not json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if json:
        document = {"prompt": prompt, **generation_document(generation, engine)}
        print_json(document | {"engine": engine_document(engine)})
        return
    sys.stdout.write("\n")
    if not quiet:
        note(stats_line(generation.stats, engine))


def generation_document(generation: "Generation", engine: "Engine") -> dict[str, Any]:
    """Return a finished generation as plain data; logprobs name each token as the vocabulary writes it."""
    stats = generation.stats
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second", "gb_per_second")
    figures = asdict(stats) | {name: getattr(stats, name) for name in rates}
    if stats.speculation:
        figures["speculation"] = stats.speculation.document()
    document = {"text": generation.text, "token_ids": list(generation.token_ids), "stats": figures}
    if generation.request.logprobs is not None:
        document["logprobs"] = [
            _named(engine, found.token, found.logprob)
            | {"top": [_named(engine, token, logprob) for token, logprob in found.top]}
            for found in generation.logprobs
        ]
    return document


def _named(engine: "Engine", token: int, logprob: float) -> dict[str, Any]:
    return {"token": token, "piece": engine.tokenizer.piece(token), "logprob": logprob}


def engine_document(engine: "Engine") -> dict[str, Any]:
    """Return how an engine stores and computes, as plain data."""
    return {
        "bits_per_weight": engine.header.bits_per_weight(),
        "kv_dtype": engine.kv_dtype,
        "threads": engine.threads,
        "isa": engine.isa,
        "huge_page_share": engine.huge_page_share,
    }


def stats_line(stats: "GenerationStats", engine: "Engine") -> str:
    """Return the speed and the bytes of a generation, in one line, and what of the text was forgotten."""
    forgotten = f"; {stats.dropped_tokens} tokens of the prompt did not fit" * (stats.dropped_tokens > 0)
    forgotten += f"; the context slid {stats.num_slides} times" * (stats.num_slides > 0)
    reused = f" ({stats.reused_tokens} of them still in the cache)" * (stats.reused_tokens > 0)
    limits = [found.summary() for found in (stats.reuse, stats.prediction) if found]
    limited = "".join(f"; {summary}" for summary in limits)
    speculated = f"; {stats.speculation.summary()}" if stats.speculation else ""
    return (
        f"prompt {stats.prompt_tokens} tokens{reused} at {stats.prefill_tokens_per_second:.0f} tokens/s, "
        f"then {stats.new_tokens} at {stats.decode_tokens_per_second:.0f} tokens/s; "
        f"{stats.weight_bytes_per_token / 1e6:.2f} MB of weights a token, {stats.gb_per_second:.1f} GB/s, "
        f"{engine.header.bits_per_weight():.2f} bits a weight{speculated}{limited}{forgotten}"
    )
