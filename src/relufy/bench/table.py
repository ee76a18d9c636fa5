"""What the `relufy bench` commands show of a result: a table, and lines of what belongs beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """A titled table, and facts by name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    facts: Sequence[tuple[str, str]] = ()


def show(found: Found) -> Shown:
    """Return what to show of any benchmark's result."""
    return VIEWS[found["benchmark"]](found)


def show_decode(found: Found) -> Shown:
    """Return tokens/s, the ratio to own dense, MB a token, GB/s and its share of the probe, by contender."""
    machine = found["machine_gb_per_second"]

    def columns(speed: float, read: float | None) -> list[str]:
        if read is None:
            return ["-"] * 3
        gb_per_second = read * speed / 1e9
        share = f"{gb_per_second / machine:.0%}" if machine else "-"
        return [f"{read / 1e6:.1f}", f"{gb_per_second:.1f}", share]

    bound, reached = found["bound_vs_dense"], found["fraction_of_bound"]
    facts = [
        ("bound by bytes", f"{bound:.2f}x own dense, {reached:.3f} of it reached"),
        *_reuse(found),
        *_predictor(found),
        *_ratios(found),
        *_checks(found),
        ("peak memory / (file + keys and values)", _ratio(found["peak_resident_share"])),
        ("in huge pages", f"{found['huge_page_share']:.0%}"),
        ("cold start to first token", f"{found['cold_start_seconds']:.2f} s"),
        *_machine(found),
        ("fits in the cache", "yes, so this says nothing about memory" if found["fits_in_cache"] else "no"),
    ]
    title = ["", "tokens/s", "x own dense", "MB a token", "GB/s", "of the probe"]
    return Shown(f"decode: {found['label']}", title, _contenders(found, columns), facts)


def show_prefill(found: Found) -> Shown:
    """Return tokens/s, the ratio to own dense, and multiply-adds per second as if dense, by contender."""

    def columns(speed: float, read: float | None) -> list[str]:
        return [f"{speed * found['macs_per_token'] / 1e9:.0f}"]

    blas = found["blas_f32_gmacs_per_second"]
    facts = [
        *_ratios(found),
        ("numpy's product of float32 matrices", f"{blas:.0f} GMAC/s"),
        *_checks(found),
        *_machine(found),
    ]
    title = ["", "tokens/s", "x own dense", "GMAC/s, as if dense"]
    return Shown(f"prefill: {found['label']}", title, _contenders(found, columns), facts)


def show_batch(found: Found) -> Shown:
    """Return tokens/s of all sequences together and ratios, by number of sequences, and union densities."""
    by_batch = found["by_batch"]
    kinds = list(next(iter(by_batch.values()))["llama_cpp_tokens_per_second_by_type"])

    def row(size: str, f: Found) -> list[str]:
        others = (f["llama_cpp_tokens_per_second_by_type"][kind] for kind in kinds)
        speeds = [f["tokens_per_second"], f["dense_tokens_per_second"], *others]
        mark = " slower" if f["slower_than_dense"] else ""
        ratios = [f"{f['speedup_vs_dense']:.2f}{mark}", _ratio(f["speedup_vs_llama_cpp"])]
        return [size, *(f"{speed:.1f}" for speed in speeds), *ratios, f"{_share_read(f):.2f}"]

    names = ["batch", "sparse", "dense", *kinds]
    slower = ", ".join(map(str, found["slower_than_dense"])) or "at no number of sequences"
    facts = [
        ("slower than own dense by more than 3 %", slower),
        ("read", "bytes of weights that a step reads, of own dense's"),
        *((f"union density of {size}", _sites(f["union_density"])) for size, f in by_batch.items()),
        *_checks(found),
        *_machine(found),
    ]
    columns = [*names, "x dense", f"x {kinds[0]}" if kinds else "x llama.cpp", "read"]
    title = f"tokens/s of all sequences together: {found['label']}"
    return Shown(title, columns, [row(*item) for item in by_batch.items()], facts)


def show_kernels(found: Found) -> Shown:
    """Return each kernel's GB/s beside the probe's."""
    rows = [
        [
            f"{row['kernel']} {row['dtype']}",
            f"{row['density']:g}",
            f"{row['gb_per_second']:.1f}",
            f"{row['fraction_of_machine']:.0%}",
        ]
        for row in found["kernels"]
    ]
    title = f"kernels: {found['threads']} threads, probe {found['machine_gb_per_second']:.1f} GB/s"
    return Shown(title, ["kernel", "density", "GB/s", "of the probe"], rows)


def show_crossover(found: Found) -> Shown:
    """Return the share of rows above which all are read, by kernel, type and number of tokens."""
    rows = [
        [f"{kernel} {dtype}", *("never" if share >= 1 else f"{share:.0%}" for share in by_tokens.values())]
        for kernel, by_dtype in found["crossover"].items()
        for dtype, by_tokens in by_dtype.items()
    ]
    counts = list(found["crossover"]["dot"]["f32"])
    names = ["kernel", f"{counts[0]} token", *(f"{count} tokens" for count in counts[1:])]
    when = "measured now" if found["is_new"] else "measured before; --again repeats it"
    title = f"crossover, share of rows above which all are read: {found['threads']} threads"
    return Shown(title, names, rows, [("this was", when), ("machine", _machine_name(found["machine"]))])


def show_measure(found: Found) -> Shown:
    """Return tokens/s of plain forward passes and of those that are measured, and the time over plain."""
    plain, measured = found["plain_tokens_per_second"], found["tokens_per_second"]
    rows = [["plain forward, with losses", f"{plain:,.0f}", "1.00x"]]
    rows.append(["relufy measure's pass", f"{measured:,.0f}", f"{found['overhead']:.2f}x"])
    machine, options = found["machine"], found["options"]
    facts = [
        ("parameters", f"{found['parameters']:,}, stage {options['stage']}, on {options['device']}"),
        ("threads", str(found["threads"])),
        ("machine", f"{machine['processor']}, {machine['cores']} cores"),
        ("busy", "yes" if machine["was_busy"] else "no"),
    ]
    return Shown(f"measure: {found['label']}", ["", "tokens/s", "time over plain"], rows, facts)


def show_speculative(found: Found) -> Shown:
    """Return acceptance, union sparsity, tokens/s and gains beside theory's, by gamma."""

    def theory(f: Found, name: str) -> str:
        return _ratio(f["theory"] and f["theory"][name])

    def row(gamma: str, f: Found) -> list[str]:
        rates = [f"{f[name]:.2f}" for name in ("acceptance", "tokens_per_round")]
        names = ("speedup_vs_sparse", "speedup_vs_dense_speculation")
        gains = [said for name in names for said in (_ratio(f[name]), theory(f, name))]
        return [gamma, *rates, _ratio(f["union_sparsity"]), f"{f['tokens_per_second']:.0f}", *gains]

    best, by_gamma = found["best_gamma"], found["by_gamma"]

    def each(say: Callable[[Found], str]) -> str:
        return ", ".join(f"{gamma}: {say(f)}" for gamma, f in by_gamma.items())

    facts = [
        ("plain sparse decoding", f"{found['tokens_per_second']:.1f} tokens/s"),
        ("plain sparse x plain dense", _ratio(found["speedup_vs_dense"])),
        ("theory", "with this acceptance, draft cost and union, if reading were all the work"),
        ("the same over plain sparse, if tokens chose neurons independently", each(_at_random)),
        ("bound by bytes over plain sparse", each(lambda f: _ratio(f["bound_vs_sparse"]))),
        ("a drafted token, in dense tokens of time", each(lambda f: f"{f['draft_cost']:.3f}")),
        ("a drafted token, in dense tokens of bytes", each(lambda f: f"{f['draft_bytes']:.3f}")),
        ("a verification, in dense tokens of time", each(lambda f: f"{f['verify_cost']:.2f}")),
        ("best gamma by theory", f"{best['gamma']}, {best['speedup_vs_sparse']:.2f}x plain sparse"),
        ("no gamma and no alpha passes, at this cost of a draft", f"{_ratio(best['limit_vs_sparse'])}x"),
        ("texts equal to plain decoding's", each(lambda f: f"{f['same_texts']:.0%}")),
        ("density", _sites(found["density"])),
        ("bytes skipped by one token", f"{found['bytes_skipped']:.3f}"),
        *_machine(found),
        ("fits in the cache", "yes, so reading is not all the work" if found["fits_in_cache"] else "no"),
    ]
    columns = ["gamma", "alpha", "tokens/round", "s_agg", "tokens/s", "x sparse", "theory"]
    columns += ["x dense spec.", "theory"]
    return Shown(f"speculative: {found['label']}", columns, [row(*item) for item in by_gamma.items()], facts)


def _at_random(found: Found) -> str:
    return _ratio(found["random_theory"] and found["random_theory"]["speedup_vs_sparse"])


VIEWS: dict[str, Callable[[Found], Shown]] = {
    "decode": show_decode,
    "prefill": show_prefill,
    "batch": show_batch,
    "speculative": show_speculative,
    "kernels": show_kernels,
    "crossover": show_crossover,
    "measure": show_measure,
}


def _contenders(found: Found, columns: Callable[[float, float | None], list[str]]) -> list[list[str]]:
    """Return a row for each contender: its tokens/s, the ratio to own dense, and what `columns` says."""
    dense = found["dense_tokens_per_second"]
    others = found["llama_cpp_tokens_per_second_by_type"]
    speeds = [
        ("relufy, sparse", found["tokens_per_second"], found["bytes_per_token"]),
        *_exact(found),
        ("relufy, own dense", dense, found["dense_bytes_per_token"]),
        *((f"llama.cpp {kind}", speed, None) for kind, speed in others.items()),
    ]
    return [[name, f"{s:.2f}", f"{s / dense:.2f}", *columns(s, read)] for name, s, read in speeds]


def _exact(found: Found) -> list[tuple[str, float, float | None]]:
    if "reuse" not in found:
        return []
    return [("relufy, exact", found["exact_tokens_per_second"], found["exact_bytes_per_token"])]


def _ratios(found: Found) -> list[tuple[str, str]]:
    return [
        ("x llama.cpp", _ratio(found["speedup_vs_llama_cpp"])),
        ("own dense x llama.cpp", _ratio(found["dense_speedup_vs_llama_cpp"])),
        ("density", _sites(found["density"])),
    ]


def _predictor(found: Found) -> list[tuple[str, str]]:
    if "predictor" not in found:
        return []
    figures = found["predictor"]
    words = f"{figures['candidate_share']:.3f} of the neurons candidates, {figures['fired_share']:.3f} active"
    return [("predictor, not exact", words)]


def _reuse(found: Found) -> list[tuple[str, str]]:
    if "reuse" not in found:
        return []
    figures = found["reuse"]
    frozen, tokens = figures["frozen_tokens"], figures["frozen_tokens"] + figures["open_tokens"]
    words = (
        f"{frozen:g} of {tokens:g} tokens frozen, {figures['candidate_share']:.3f} of the neurons candidates"
    )
    return [("reuse, not exact", f"{words}, {figures['fired_share']:.3f} active")]


def _checks(found: Found) -> list[tuple[str, str]]:
    error, compared = found["logits_error"], found["logits_tokens_compared"]
    if error is None:
        words = "not compared: every token has a score within rounding of its cut"
    else:
        words = f"{error:.2g} over {compared} tokens"
        if moved := found["logits_cuts_moved_by"]:
            words += f", under equal masks: cuts moved by at most {moved:.1%}"
    return [
        ("logits, relative error to the naive path", words),
        ("bits per weight", f"{found['bits_per_weight']:.2f}"),
    ]


def _machine(found: Found) -> list[tuple[str, str]]:
    machine, probe = found["machine"], found["machine_gb_per_second"]
    return [
        ("probe", "-" if probe is None else f"{probe:.1f} GB/s"),
        ("machine", _machine_name(machine)),
        ("busy", "yes" if machine["was_busy"] else "no"),
    ]


def _machine_name(machine: Found) -> str:
    return f"{machine['processor']}, {machine['cores']} cores, {machine['isa']}"


def _share_read(found: Found) -> float:
    return found["weight_bytes_per_step"] / found["dense_weight_bytes_per_step"]


def _sites(density: Mapping[str, float]) -> str:
    return ", ".join(f"{site} {value:.3f}" for site, value in density.items()) or "all of 1"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
