"""Latent consistency models: what they change in the defaults of their family.

Ref: Luo et al. 2023, arXiv:2310.04378.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# an ordinary UNet with LCM's scheduler is distilled with LCM-LoRA, which is used without guidance.
# Ref: Luo et al. 2023, arXiv:2311.05556
SCHEDULERS: Mapping[str, Mapping[str, Any]] = {"LCMScheduler": {"num_inference_steps": 4, "guidance_scale": 1.0}}
# a UNet that takes the guidance scale as an input is distilled with it
GUIDANCE_EMBEDDING: Mapping[str, Any] = {"num_inference_steps": 4, "guidance_scale": 8.5}
# in image to image the pipeline keeps the number of steps and shortens the schedule that they are spread over
PIPELINE: Mapping[str, Any] = {"strength_cuts": "schedule"}
