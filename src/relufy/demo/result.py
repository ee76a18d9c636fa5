"""What the demo found, as data: the content of demo.json and all that the report is made from."""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

DEMO_VERSION = 1

TARGETS = {"stage 1": 0.9, "stage 2": 0.8}
"""The share of the bare swap's KL that a fine-tune has to close."""


VISIBLE_SHARE = 0.001
"""The mean share of zeros from which a site is worth a row."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, with its standard error over windows."""

    value: float
    standard_error: float
    tokens: int


@dataclass(frozen=True)
class Training:
    """One fine-tune: what it cost, and the loss of every step's batch in nats per token.

    `curve` is the KL to the dense model, or the cross-entropy on the user's text.
    """

    steps: int
    tokens: int
    seconds: float
    curve: tuple[float, ...]
    command: str


@dataclass(frozen=True)
class Cost:
    """What one generated token costs, averaged over the measured tokens."""

    macs_paper: float
    bytes_engine: float
    bytes_by_kind: dict[str, float] = field(default_factory=dict)


@dataclass
class Variant:
    """The dense model or one of its relufied forms, filled step by step."""

    name: str
    title: str
    checkpoint: str
    packed: str = ""
    kl_before: Estimate | None = None
    kl: Estimate | None = None
    kl_drop: Estimate | None = None
    """kl_before - kl, with the standard error of the difference paired by window."""
    perplexity_before: Estimate | None = None
    perplexity: Estimate | None = None
    control: Estimate | None = None
    """The perplexity of the dense model, fine-tuned on the same tokens by the same settings."""
    training: Training | None = None
    sparsity: dict[str, list[float]] = field(default_factory=dict)
    cost: Cost | None = None
    tokens_per_second: list[float] = field(default_factory=list)
    text: str = ""

    @property
    def kl_closed(self) -> float | None:
        """The share of the bare swap's KL that the fine-tune closed, where closing it was the aim."""
        if self.kl_drop is None or self.kl is None or self.kl_before is None or self.kl_before.value <= 0:
            return None
        return 1.0 - self.kl.value / self.kl_before.value

    @property
    def median_tokens_per_second(self) -> float | None:
        return median(self.tokens_per_second) if self.tokens_per_second else None

    def to_json(self) -> dict[str, Any]:
        derived = {"kl_closed": self.kl_closed, "median_tokens_per_second": self.median_tokens_per_second}
        return asdict(self) | derived


@dataclass(frozen=True)
class Texts:
    """Which text trained and which tested, and how their overlap was checked."""

    kind: str
    description: str
    window: int
    train_tokens: int
    test_tokens: int
    overlap: dict[str, Any]


@dataclass
class DemoResult:
    """The whole demo. `variants` are dense, stage 1, stage 2 in this order."""

    model: dict[str, Any]
    texts: Texts
    variants: list[Variant]
    prompt: str
    commands: list[tuple[str, str]]
    machine: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    fits_in_cache: bool = True
    """Whether the dense model's weights do: its tokens/s then say little about models that don't."""

    def bound(self, variant: Variant) -> float | None:
        """Return dense bytes / the variant's bytes: the speed-up if reading weights were all the work."""
        dense = self.variants[0].cost
        return dense.bytes_engine / variant.cost.bytes_engine if dense and variant.cost else None

    def sparse_sites(self) -> list[tuple[str, ...]]:
        """Return the sites where some variant has zeros; those with equal shares stand together."""
        groups: dict[str, list[str]] = {}
        for site in dict.fromkeys(site for variant in self.variants for site in variant.sparsity):
            shares = [variant.sparsity.get(site, []) for variant in self.variants]
            if any(sum(layers) > VISIBLE_SHARE * len(layers) for layers in shares):
                groups.setdefault(repr(shares), []).append(site)
        return [tuple(sites) for sites in groups.values()]

    def targets(self) -> list[dict[str, Any]]:
        """Return, for each relufied form, the share of KL to close and the share that was closed."""
        rows = [(v.name, TARGETS[v.name], v.kl_closed) for v in self.variants if v.kl_closed is not None]
        return [
            {"name": name, "target": target, "reached": reached, "met": reached >= target}
            for name, target, reached in rows
        ]

    def to_json(self) -> dict[str, Any]:
        variants = [v.to_json() | {"bound": self.bound(v)} for v in self.variants]
        derived = {"variants": variants, "targets": self.targets(), "sparse_sites": self.sparse_sites()}
        return {"version": DEMO_VERSION} | asdict(self) | derived
