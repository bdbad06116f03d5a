"""CLIP's tokenizer, which all published models of Stable Diffusion use, as a folder that transformers reads.

Ref: Radford et al. 2021, arXiv:2103.00020; the merges are those of github.com/openai/CLIP (clip/LICENSE)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

MERGES = Path(__file__).parent / "clip" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 77  # the longest sequence


def write_tokenizer(folder: Path, pad: str) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json into `folder`. `pad`: the word that fills a sequence."""
    merges = gzip.decompress(MERGES.read_bytes()).decode()
    letters = list(_letters())
    joined = [line.replace(" ", "") for line in merges.rstrip("\n").split("\n")]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters), *joined, START, END]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
        "model_max_length": TOKENS,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    folder.mkdir(parents=True)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    ids = {word: number for number, word in enumerate(vocab)}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _letters() -> Iterator[str]:
    """The letter that stands for each byte: itself if it can be printed, else one after the 256th. Those come last.

    Ref: Radford et al. 2019, github.com/openai/gpt-2, bytes_to_unicode
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    yield from map(chr, printable)
    yield from (chr(256 + place) for place in range(256 - len(printable)))
