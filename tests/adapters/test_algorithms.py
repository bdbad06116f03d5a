"""The arithmetic equals LyCORIS' own forward passes, kohya's formula, and PEFT's DoRA."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from sdopt.adapters.lora.algorithms import Factors, FactorsError, algorithm, change, check
from sdopt.adapters.lora.file import ENDS

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


LYCORIS: list[tuple[str, str, dict[str, Any]]] = [
    ("locon", "LoConModule", {}),
    ("locon", "LoConModule", {"use_tucker": True}),
    ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": True}),
    ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    ("loha", "LohaModule", {}),
    ("loha", "LohaModule", {"use_tucker": True}),
    ("loha", "LohaModule", {"weight_decompose": True, "wd_on_out": True}),
    ("lokr", "LokrModule", {"factor": 4, "lora_dim": 2}),
    ("lokr", "LokrModule", {"factor": 4, "lora_dim": 2, "decompose_both": True}),
    ("lokr", "LokrModule", {"factor": 4, "lora_dim": 2, "use_tucker": True}),
    ("lokr", "LokrModule", {"factor": 4, "lora_dim": 10000, "full_matrix": True}),
    ("lokr", "LokrModule", {"factor": 4, "lora_dim": 2, "weight_decompose": True, "wd_on_out": True}),
    ("glora", "GLoRAModule", {}),
    ("ia3", "IA3Module", {"alpha": None, "lora_dim": None}),
    ("ia3", "IA3Module", {"alpha": None, "lora_dim": None, "train_on_input": True}),
    ("diag_oft", "DiagOFTModule", {"lora_dim": 8, "constraint": 0, "alpha": None}),
    ("diag_oft", "DiagOFTModule", {"lora_dim": 8, "constraint": 1e-3, "alpha": None}),
    ("diag_oft", "DiagOFTModule", {"lora_dim": 8, "constraint": 1e-3, "rescaled": True, "alpha": None}),
]


@pytest.mark.parametrize("layer", ["linear", "conv", "pointwise"])
@pytest.mark.parametrize("m", [1.0, 0.7])
@pytest.mark.parametrize(("module", "name", "options"), LYCORIS)
def test_lycoris_forward_passes(module: str, name: str, options: dict[str, Any], m: float, layer: str) -> None:
    torch = pytest.importorskip("torch")
    made = getattr(pytest.importorskip(f"lycoris.modules.{module}"), name)
    torch.manual_seed(0)
    nn, functional = torch.nn, torch.nn.functional
    original = {
        "linear": lambda: nn.Linear(24, 32),
        "conv": lambda: nn.Conv2d(24, 32, 3, padding=1),
        "pointwise": lambda: nn.Conv2d(24, 32, 1),
    }[layer]()
    wanted = {key: value for key, value in {"lora_dim": 4, "alpha": 2, **options}.items() if value is not None}
    adapter = made("adapter", original, multiplier=m, **wanted)
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            noise = torch.randn_like(parameter)
            near = parameter + 0.05 * noise if key in ("dora_scale", "rescale") else 0.3 * noise
            parameter.copy_(near)
    state = getattr(adapter, "custom_state_dict", dict)() or adapter.state_dict()
    tensors = {ENDS[f".{key}"]: value.detach().float().numpy() for key, value in state.items()}
    alpha = tensors.pop("alpha", None)
    factors = Factors(tensors, None if alpha is None else float(alpha))
    weight, bias = (p.detach().clone() for p in (original.weight, original.bias))
    delta = change(weight.numpy(), factors, m)
    x = torch.randn(2, 24) if layer == "linear" else torch.randn(2, 24, 5, 5)
    with torch.no_grad():
        adapter.eval().apply_to()
        expected = original(x)
        merged = weight + torch.from_numpy(delta)
        own = (
            functional.linear(x, merged, bias)
            if layer == "linear"
            else functional.conv2d(x, merged, bias, padding=int(layer == "conv"))
        )
    assert (own - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_kohya_scales_each_module_by_its_own_alpha() -> None:
    weight, up, down = normal(6, 5), normal(6, 2), normal(2, 5)
    for alpha, s in ((1.0, 0.5), (2.0, 1.0), (0.0, 1.0), (None, 1.0)):
        expected = 0.8 * s * (up.astype(np.float64) @ down)
        np.testing.assert_allclose(change(weight, Factors({"up": up, "down": down}, alpha), 0.8), expected, atol=1e-6)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    weight, up, down = normal(6, 5), normal(6, 4), normal(4, 5)
    delta = change(weight, Factors({"up": up, "down": down}, 3.0, rank_stabilized=True), 1.0)
    np.testing.assert_allclose(delta, 1.5 * up @ down, atol=1e-6)


@pytest.mark.parametrize("m", [1.0, 0.7])
def test_peft_dora(m: float) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10))
    weight = model[0].weight.detach().numpy().copy()
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    layer = wrapped.base_model.model[0]
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.1)
    layer.set_scale("default", m)
    tensors = {
        "down": layer.lora_A["default"].weight, "up": layer.lora_B["default"].weight,
        "magnitude": layer.lora_magnitude_vector["default"].weight,
    }  # fmt: skip
    factors = Factors({role: tensor.detach().numpy() for role, tensor in tensors.items()}, 2.0)
    x = torch.randn(4, 12)
    with torch.no_grad():
        expected = wrapped(x).numpy()
    own = x.numpy() @ (weight + change(weight, factors, m)).T + layer.base_layer.bias.detach().numpy()
    np.testing.assert_allclose(own, expected, atol=1e-5)


def test_linears_and_pointwise_convolutions_are_the_same_numbers() -> None:
    up, down = normal(6, 2), normal(2, 5)
    linear = change(normal(6, 5), Factors({"up": up, "down": down}), 1.0)
    as_conv = Factors({"up": up.reshape(6, 2, 1, 1), "down": down.reshape(2, 5, 1, 1)})
    np.testing.assert_array_equal(linear, change(normal(6, 5), as_conv, 1.0))
    assert change(normal(6, 5, 1, 1), Factors({"up": up, "down": down}), 1.0).shape == (6, 5, 1, 1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"up": (6, 2)}, "down missing"),
        ({"up": (6, 2), "down": (3, 5)}, "ranks of up"),
        ({"up": (7, 2), "down": (2, 5)}, r"make \[7, 5\]; the weight is \[6, 5\]"),
        ({"up": (6, 2), "down": (2, 4)}, r"make \[6, 4\]"),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 5)}, "hada_w2_a, hada_w2_b missing"),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (3, 5)}, "shapes do not fit"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2)}, r"make \[4, 4\]"),
        ({"diff": (5, 6)}, r"make \[5, 6\]"),
        ({"ia3": (5,), "on_input": ()}, "5 numbers for 6 outputs"),
        ({"oft_blocks": (2, 2, 2)}, r"blocks \[2, 2, 2\] for 6 outputs"),
        ({"oft_blocks": (2, 3, 2, 2)}, "BOFT"),
        ({"up": (6, 2), "down": (2, 5), "diff": (6, 5)}, "diff not known beside down, up"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tensors: dict[str, Any], message: str) -> None:
    factors = Factors({role: np.zeros(shape, np.float32) for role, shape in tensors.items()})
    with pytest.raises(FactorsError, match=message):
        check((6, 5), factors)


def test_every_algorithm_is_told_by_its_tensors() -> None:
    assert algorithm(Factors({"up": normal(2, 1), "down": normal(1, 2)})).name == "LoRA"
    assert algorithm(Factors({"up": normal(2, 1), "down": normal(1, 2), "dora_scale": normal(2, 1)})).name == "LoRA"
    assert algorithm(Factors({"bias": normal(2)})).name == "full"
    assert importlib.import_module("sdopt.adapters.lora").__doc__
