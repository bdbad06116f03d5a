"""Samplers as tables of coefficients: `sampler_table(config, steps)` is all that a pipeline needs."""

from __future__ import annotations

from sdopt.samplers.registry import SAMPLERS, SCHEDULES, Sampler, find_sampler
from sdopt.samplers.resolve import resolve, sampler_table
from sdopt.samplers.table import SamplerTable

__all__ = ["SAMPLERS", "SCHEDULES", "Sampler", "SamplerTable", "find_sampler", "resolve", "sampler_table"]
