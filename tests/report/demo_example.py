"""A demo's result with made-up numbers, for tests of what is made from it."""

from relufy.demo.result import Cost, DemoResult, Estimate, Texts, Training, Variant

PROMPT = "It was a dark night, and"


def variant(name: str, title: str, bytes_engine: float, share: float) -> Variant:
    """Return a variant that costs `bytes_engine` and has this share of zeros."""
    made = Variant(name=name, title=title, checkpoint=name, packed=f"{name}.relufy")
    kinds = {"head": 3.15e6, "q k v": 2.5e6, "o": 1.0e6, "up and down": bytes_engine - 6.7e6, "keys": 0.05e6}
    made.cost = Cost(macs_paper=bytes_engine / 4, bytes_engine=bytes_engine, bytes_by_kind=kinds)
    made.sparsity = {
        site: [share + 0.02 * layer for layer in range(6)] for site in ("neuron", "down", "q", "gate")
    }
    made.tokens_per_second = [1000.0, 1010.0, 990.0]
    made.text = " the rain fell on the <roof> & the old man slept."
    if name != "dense":
        made.kl_before = Estimate(0.21 if name == "stage 1" else 1.4, 0.01, 16320)
        made.kl_drop = Estimate(0.2 if name == "stage 1" else 1.2, 0.009, 16320)
        made.kl = Estimate(0.012 if name == "stage 1" else 0.2, 0.001, 16320)
        curve = tuple(0.5 / step for step in range(1, 151))
        made.training = Training(
            steps=150, tokens=614400, seconds=70.0, curve=curve, command="relufy finetune"
        )
    return made


def demo_result() -> DemoResult:
    """Return a whole demo: dense, stage 1, stage 2."""
    variants = [
        variant("dense", "dense", 13.77e6, 0.0),
        variant("stage 1", "stage 1: ReLU in the MLP", 10.9e6, 0.6),
        variant("stage 2", "stage 2: and after the norms", 8.8e6, 0.5),
    ]
    texts = Texts("self", "The model wrote both texts itself.", 256, 614400, 16320, {"windows": 0.0})
    model = {"name": "llama-prose-3m", "description": "A small Llama.", "parameters": 3443136, "layers": 6}
    return DemoResult(model, texts, variants, PROMPT, [("stage 1", "relufy finetune bundled")], seconds=200.0)
