"""The names of samplers, schedules and generators as types, so that an editor completes them.

A parameter is `SamplerName | str`: other spellings, such as "DPM++ 2M Karras", and variables are welcome too.
`tests/test_types.py` compares them with the tables.
"""

from __future__ import annotations

from typing import Literal

SamplerName = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_a", "heun", "dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde",
    "dpmpp_3m_sde", "dpmpp_2s", "dpmpp_3s", "unipc", "deis", "ipndm", "lcm", "tcd", "edm_euler", "edm_dpmpp_2m",
    "flow_euler", "flow_heun", "flow_dpmpp_2m", "flow_dpmpp_2m_sde",
]  # fmt: skip
ScheduleName = Literal[
    "karras", "exponential", "beta", "lu", "normal", "sgm_uniform", "simple", "leading", "linspace", "trailing"
]
RngName = Literal[
    "cpu", "numpy", "cuda", "cuda:t4", "cuda:rtx2070s", "cuda:v100", "cuda:a4000", "cuda:a10", "cuda:l4", "cuda:3060",
    "cuda:3080", "cuda:3090", "cuda:4070", "cuda:4080", "cuda:4090", "cuda:l40s", "cuda:a100", "cuda:h100",
    "cuda:h100-pcie", "cuda:h200",
]  # fmt: skip
