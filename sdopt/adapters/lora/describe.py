"""What a LoRA file says of itself, without a model: for `sdopt inspect FILE`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sdopt.adapters.lora.algorithms import FactorsError, algorithm
from sdopt.adapters.lora.few_steps import few_steps
from sdopt.adapters.lora.file import LoraFile, algorithm_name, factors_of, made_for, stems
from sdopt.bundle.disk import parse_json

MAX_WORDS = 10


def describe(lora: LoraFile) -> dict[str, Any]:
    """Family, algorithms, ranks, alphas, words and hashes, ready for JSON."""
    algorithms, ranks, alphas = Counter[str](), Counter[int](), Counter[str]()
    by_stem = stems(lora)
    for stem, keys in by_stem.items():
        try:
            factors = factors_of(lora, stem, keys)
            row = algorithm(factors)
        except FactorsError as error:
            algorithms[f"unknown ({error})"] += 1
            continue
        algorithms[algorithm_name(factors)] += 1
        rank = row.rank(factors)
        if rank is not None:
            ranks[rank] += 1
            alphas["none" if factors.alpha is None else f"{factors.alpha:g}"] += 1
    known = {key for keys in by_stem.values() for key in keys.values()}
    suggestion = few_steps(lora)
    return {
        "path": str(lora.file.path),
        "made_for": made_for(lora) or None,
        "modules": len(by_stem),
        "algorithms": dict(algorithms.most_common()),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "alphas": dict(alphas.most_common()),
        "unknown_keys": [key for key in lora.weight_keys if key not in known],
        "words": trigger_words(lora.file.metadata),
        "embeddings": sorted(lora.embeddings),
        "few_steps": suggestion and suggestion.options,
        "few_steps_kind": suggestion and suggestion.kind,
        "sha256": lora.digest,
        "a1111_hash": lora.a1111_hash,
        "metadata": dict(lora.file.metadata),
    }


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The words that prompts use for what a file has learnt, most frequent first."""
    phrase = metadata.get("modelspec.trigger_phrase", "")
    if phrase:
        return [phrase]
    counts = Counter[str]()
    try:
        folders = parse_json(metadata.get("ss_tag_frequency", "{}"))
        for tags in folders.values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError):
        return []
    return [tag for tag, _ in counts.most_common(MAX_WORDS)]
