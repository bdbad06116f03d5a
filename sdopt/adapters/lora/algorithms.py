"""The arithmetic of each algorithm: from a module's tensors in a file to the change of its weight.

W is the module's weight in float32, [out, in] or [out, in, kh, kw]; m is the user's multiplier; r is the rank;
s = alpha / r, or 1 where the file has no alpha. `change(W, factors, m)` is W' - W.

| algorithm | W' |
|---|---|
| LoRA, LoCon | W + m s (up @ down), the kernel's axes joined with the inputs |
| LoCon, Tucker | W + m s sum over (a, b) of mid[a, b] up[:, a] down[b, :] |
| LoHa | W + m s (w1_a @ w1_b) * (w2_a @ w2_b) |
| LoKr | W + m s kron(w1, w2) |
| GLoRA | W + m s (W @ a1 @ a2 + b1 @ b2) |
| full, norm | W + m diff |
| (IA)^3 | W (1 + m w), along the outputs, or along the inputs |
| Diag-OFT | rescale * (I + m (R - I))^T W in blocks, with R = (I + Q)(I - Q)^-1 |
| DoRA | V = W + s up @ down; V (1 + m (dora_scale / norm(V) - 1)) |

Ref: Hu et al. 2021, arXiv:2106.09685 (LoRA); Yeh et al. 2023, arXiv:2309.14859 (LoCon, LoHa, LoKr, full, (IA)^3 in
LyCORIS); Chavan et al. 2023, arXiv:2306.07967 (GLoRA); Liu et al. 2022, arXiv:2205.05638 ((IA)^3); Qiu et al. 2023,
arXiv:2306.07280 (OFT); Liu et al. 2024, arXiv:2402.09353 (DoRA); Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from sdopt.bundle.specs import Float32, Scalar
from sdopt.dataclass import dataclass

EPS: Scalar = float(np.finfo(np.float32).eps)


class FactorsError(ValueError):
    """The tensors of a module do not belong together, or not to this weight; the message says why."""


@dataclass(frozen=True)
class Factors:
    """What a file holds for one module: its tensors by role, e.g. "up" and "down", and what scales them.

    `alpha`: None where the file has none. `rank_stabilized`: s = alpha / sqrt(r), as rsLoRA has it.
    """

    tensors: Mapping[str, Float32]
    alpha: float | None = None
    rank_stabilized: bool = False

    def __getitem__(self, role: str) -> Float32:
        return self.tensors[role]

    def __contains__(self, role: str) -> bool:
        return role in self.tensors

    def scale(self, rank: int) -> float:
        """s. An alpha of 0 counts as none, as in kohya's sd-scripts."""
        if not self.alpha:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


Rank = Callable[[Factors], "int | None"]
Change = Callable[[Float32, Factors], Float32]  # of the weight, for m = 1


@dataclass(frozen=True)
class Algorithm:
    """One algorithm: the roles that it needs, those that it may have, its rank, and its change for m = 1.

    `rank` gives None where the algorithm takes no alpha.
    """

    name: str
    needs: frozenset[str]
    may_have: frozenset[str]
    rank: Rank
    change: Change
    nonlinear: Callable[[Float32, Factors, Scalar], Float32] | None = None  # where the change is not m times that for 1


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _rows(array: Float32) -> Float32:
    """All axes but the first joined."""
    return array.reshape(array.shape[0], -1)


def _lora(weight: Float32, t: Factors) -> Float32:
    up, down = _rows(t["up"]), _rows(t["down"])
    return _shaped(up @ down, weight)


def _tucker(weight: Float32, t: Factors) -> Float32:
    return _shaped(np.einsum("ab...,ia,bj->ij...", t["mid"], _rows(t["up"]), _rows(t["down"]), optimize=True), weight)


def _rebuilt(core: Float32, a: Float32, b: Float32) -> Float32:
    """The tensor of a Tucker core [i, j, kh, kw] with a [i, out] and b [j, in]."""
    return np.einsum("ij...,ip,jr->pr...", core, a, b, optimize=True)


def _loha(weight: Float32, t: Factors) -> Float32:
    if "hada_t1" in t or "hada_t2" in t:
        first = _rebuilt(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"])
        second = _rebuilt(t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"])
    else:
        first, second = (t[f"hada_w{n}_a"] @ _rows(t[f"hada_w{n}_b"]) for n in (1, 2))
    return _shaped(first * second, weight)


def _lokr(weight: Float32, t: Factors) -> Float32:
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        second = t["lokr_w2"]
    elif "lokr_t2" in t:
        second = _rebuilt(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        b = t["lokr_w2_b"]
        second = (t["lokr_w2_a"] @ _rows(b)).reshape(-1, *b.shape[1:])
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return _shaped(np.kron(first, second), weight)


def _lokr_rank(t: Factors) -> int | None:
    """The rank of the half that is split. Where both halves are whole, s = 1 whatever alpha says."""
    if "lokr_w2_b" in t:
        return t["lokr_w2_b"].shape[0]
    return t["lokr_w1_b"].shape[0] if "lokr_w1_b" in t else None


def _glora(weight: Float32, t: Factors) -> Float32:
    if "bm" in t:
        added = np.einsum("ab...,ia,bj->ij...", t["bm"], _rows(t["b1"]), _rows(t["b2"]), optimize=True)
    else:
        added = _rows(t["b1"]) @ _rows(t["b2"])
    turned = np.einsum("oi...,ij,jk->ok...", weight, _rows(t["a1"]), _rows(t["a2"]), optimize=True)
    return _shaped(added, weight) + _shaped(turned, weight)


def _full(weight: Float32, t: Factors) -> Float32:
    return _shaped(t["diff"], weight)


def _ia3(weight: Float32, t: Factors) -> Float32:
    along = 1 if t["on_input"].any() else 0
    w = t["ia3"].reshape(-1)
    if weight.ndim < 2 or w.size != weight.shape[along]:
        raise FactorsError(f"{w.size} numbers for {weight.shape[along]} {'inputs' if along else 'outputs'}")
    return weight * w.reshape([-1 if axis == along else 1 for axis in range(weight.ndim)])


def _oft(weight: Float32, t: Factors, m: Scalar) -> Float32:
    blocks = t["oft_blocks"]
    if blocks.ndim != 3:
        raise FactorsError("this is BOFT, whose blocks have four axes; Diag-OFT has three")
    count, size, other = blocks.shape
    if size != other or count * size != weight.shape[0]:
        raise FactorsError(f"blocks {list(blocks.shape)} for {weight.shape[0]} outputs")
    skew = blocks - np.transpose(blocks, (0, 2, 1))
    constraint = (t.alpha or 0.0) * weight.shape[0]
    norm = float(np.linalg.norm(skew)) + 1e-8
    if 0 < constraint < norm:
        shrink: Scalar = constraint / norm
        skew = skew * shrink
    identity: Float32 = np.eye(size, dtype=np.float32)
    rotation = (identity + skew) @ _inverse(identity - skew)
    turned = identity + m * (rotation - identity)
    result = np.transpose(turned, (0, 2, 1)) @ np.reshape(weight, (count, size, -1))
    if "rescale" in t:
        result = result * np.reshape(t["rescale"], (count, size, 1))
    return np.reshape(result, weight.shape) - weight


def _inverse(matrices: Float32) -> Float32:
    return np.linalg.inv(matrices).astype(np.float32, copy=False)


def _shaped(delta: Float32, weight: Float32) -> Float32:
    """The change in the weight's own shape; a 1x1 convolution and a linear are the same numbers."""
    if delta.shape[0] != weight.shape[0] or delta.size != weight.size:
        raise FactorsError(f"they make {list(delta.shape)}; the weight is {list(weight.shape)}")
    return np.reshape(delta, weight.shape)


def _first(role: str) -> Rank:
    return lambda t: t[role].shape[0]


def _no_rank(_: Factors) -> None:
    return None


ALGORITHMS = (
    Algorithm("LoRA", _words("up down"), _words("bias"), _first("down"), _lora),
    Algorithm("LoCon (Tucker)", _words("up down mid"), _words("bias"), _first("down"), _tucker),
    Algorithm("LoHa", _words("hada_w1_a hada_w1_b hada_w2_a hada_w2_b"), _words("hada_t1 hada_t2"),
              _first("hada_w1_b"), _loha),
    *(
        Algorithm("LoKr", _words(f"{first} {second}"), frozenset(), _lokr_rank, _lokr)
        for first in ("lokr_w1", "lokr_w1_a lokr_w1_b")
        for second in ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2")
    ),
    Algorithm("GLoRA", _words("a1 a2 b1 b2"), _words("bm"), _first("a2"), _glora),
    Algorithm("full", _words("diff"), _words("bias"), _no_rank, _full),
    Algorithm("full", _words("bias"), frozenset(), _no_rank, _full),
    Algorithm("(IA)^3", _words("ia3 on_input"), frozenset(), _no_rank, _ia3),
    Algorithm("Diag-OFT", _words("oft_blocks"), _words("rescale"), _no_rank, partial(_oft, m=1.0), _oft),
)  # fmt: skip
DORA = ("dora_scale", "magnitude")  # of LyCORIS, of PEFT


def algorithm(t: Factors) -> Algorithm:
    """The algorithm whose tensors these are.

    Raises: FactorsError where they are no algorithm's, e.g. where one half is missing.
    """
    roles = set(t.tensors) - {*DORA}
    for row in ALGORITHMS:
        if row.needs <= roles <= row.needs | row.may_have:
            return row
    nearest = min(ALGORITHMS, key=lambda row: len(row.needs ^ roles))
    missing, more = sorted(nearest.needs - roles), sorted(roles - nearest.needs - nearest.may_have)
    parts = [f"{', '.join(missing)} missing"] if missing else []
    parts += [f"{', '.join(more)} not known beside {', '.join(sorted(roles & nearest.needs)) or 'it'}"] if more else []
    raise FactorsError(" and ".join(parts))


def change(weight: Float32, t: Factors, m: Scalar) -> Float32:
    """W' - W for the multiplier `m`, in the weight's shape.

    Raises: FactorsError where the tensors do not fit each other or the weight.
    """
    row = algorithm(t)
    try:
        if row.nonlinear is not None:
            return row.nonlinear(weight, t, m)
        rank = row.rank(t)
        s: Scalar = 1.0 if rank is None else t.scale(rank)
        if not any(role in t for role in DORA):
            return row.change(weight, t) * (s * m)
        return _dora(weight, row.change(weight, t), t, s, m)
    except FactorsError:
        raise
    except (ValueError, IndexError, KeyError) as error:  # NumPy: shapes that do not go together
        raise FactorsError(f"their shapes do not fit: {error}") from error


def check(shape: tuple[int, ...], t: Factors) -> None:
    """Raises: FactorsError where the tensors do not fit each other or a weight of this shape."""
    row = algorithm(t)
    if row.name != "LoRA" or any(role in t for role in DORA):
        change(np.ones(shape, np.float32), t, 1.0)
        return
    up, down = _rows(t["up"]), _rows(t["down"])
    fits = len(shape) > 1 and (len(up), down.shape[1]) == (shape[0], math.prod(shape[1:]))
    if up.shape[1] != len(down):
        raise FactorsError(f"the ranks of up {list(t['up'].shape)} and down {list(t['down'].shape)} differ")
    if not fits:
        made = [len(up), down.shape[1]]
        raise FactorsError(f"up {list(t['up'].shape)} and down {list(t['down'].shape)} make {made}; the weight is "
                           f"{list(shape)}")  # fmt: skip


def _dora(weight: Float32, delta: Float32, t: Factors, s: Scalar, m: Scalar) -> Float32:
    """Weight-decomposed: the file has the norm of each output row, or of each input column.

    LyCORIS applies the multiplier to the quotient of norms, PEFT to the change before it. At m = 1 both are equal.
    """
    if "magnitude" in t:
        moved = weight + delta * (s * m)
        norm = _norm(moved, axis=0)
        return moved * (np.reshape(t["magnitude"], norm.shape) / norm) - weight
    moved = weight + delta * s
    dora_scale = t["dora_scale"]
    by_input = dora_scale.ndim > 1 and dora_scale.shape[0] == 1 and weight.shape[0] != 1
    norm = _norm(moved, axis=1 if by_input else 0) + EPS
    quotient = np.reshape(dora_scale, norm.shape) / norm
    return moved * (1 + m * (quotient - 1)) - weight


BY_OUTPUT = ("up", "diff", "bias", "hada_w1_a", "hada_w2_a")  # roles whose first axis is the outputs
WHOLE = ("down", "hada_w1_b", "hada_w2_b")


def split(t: Factors, outputs: Sequence[int]) -> list[Factors]:
    """The factors of several modules whose outputs stand one after another, from those of all of them as one.

    Raises: FactorsError for another number of outputs, and for what cannot be split so.
    """
    roles = set(t.tensors)
    if not roles <= {*BY_OUTPUT, *WHOLE}:
        name = algorithm(t).name
        raise FactorsError(f"{name} cannot be split along the outputs; LoRA, LoHa and full differences can")
    total = sum(outputs)
    for role in roles & {*BY_OUTPUT}:
        if len(t[role]) != total:
            raise FactorsError(f"{role} is {list(t[role].shape)}; its modules have {total} outputs")
    ends = np.cumsum(outputs)
    made: list[Factors] = []
    for count, end in zip(outputs, ends.tolist(), strict=True):
        own = {role: array[end - count : end] if role in BY_OUTPUT else array for role, array in t.tensors.items()}
        made.append(replace(t, tensors=own))
    return made


def _norm(weight: Float32, axis: int) -> Float32:
    """The norm of each slice along `axis`, in a shape that broadcasts."""
    others = tuple(a for a in range(weight.ndim) if a != axis)
    return np.sqrt(np.sum(np.square(weight), axis=others, keepdims=True, dtype=np.float32))
