"""Tasks of our own for lm-evaluation-harness: files in a folder, no network."""

import json
from pathlib import Path
from typing import Any

import pytest

SENTENCES = [
    "The captain stood upon the deck and looked at the sea.",
    "She opened the letter with a trembling hand, and read it twice.",
    "It was a dark night; the wind was in the trees.",
    "He had never seen such a house in all his life.",
    "The old man smiled, and said nothing at all.",
    "They walked along the river until the sun went down.",
]
CHOICES = {"output_type": "multiple_choice", "doc_to_text": "context", "doc_to_target": "right"}
ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


def _docs() -> dict[str, list[dict[str, Any]]]:
    words = [sentence.split() for sentence in SENTENCES]
    endings = [
        {
            "context": " ".join(w[:-3]),
            "choices": [" ".join(w[-3:]), " ".join(w[-3:][::-1]), f"{w[-1]} of of"],
            "right": 0,
        }
        for w in words
    ]
    answers = [
        {"context": s, "choices": ["no", "yes"], "right": int(i != 2)} for i, s in enumerate(SENTENCES)
    ]
    return {
        "tiny_endings": endings,
        "tiny_answers": answers,
        "tiny_words": [{"context": " ".join(w[:4]), "word": w[4]} for w in words],
        "tiny_rolling": [{"text": " ".join(SENTENCES[i:]) * (1 + 30 * (i == 5))} for i in range(6)],
        "tiny_last": [{"context": " ".join(w[:-1]), "word": w[-1]} for w in words],
    }


def _config(name: str) -> dict[str, Any]:
    if name in ("tiny_endings", "tiny_answers"):
        both = [*ACCURACY, ACCURACY[0] | {"metric": "acc_norm"}] if name == "tiny_endings" else ACCURACY
        return CHOICES | {"doc_to_choice": "choices", "metric_list": both}
    if name == "tiny_rolling":
        names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
        metrics = [{"metric": metric} for metric in names]
        return {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": metrics,
        }
    texts = {"doc_to_text": "context", "doc_to_target": "word"}
    if name == "tiny_last":
        return texts | {
            "output_type": "loglikelihood",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                *ACCURACY,
            ],
        }
    return texts | {
        "output_type": "generate_until",
        "generation_kwargs": {"until": [".", ","], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


TASKS = tuple(_docs())


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with tasks of every kind; data sets are cached beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, docs in _docs().items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        files = {"data_files": {"test": str(data)}}
        shared = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps(shared | _config(name)))
    group = {"group": "tiny_group", "task": ["tiny_endings", "tiny_answers"]}
    (folder / "tiny_group.yaml").write_text(json.dumps(group))
    return folder
