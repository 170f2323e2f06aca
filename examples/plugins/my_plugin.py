"""A plugin: a growth operator that repeats every layer in place, a policy that trains every second old layer, and a
tracker that posts metrics over HTTP.

A config names it, and every process of the run imports it:

    plugins: [my_plugin]
    growth: {operator: repeat, init: identity}
    old_layers: {policy: every_second}

The tracker posts to the address in METRICS_URL; without one there is no tracker.
"""

import json
import os
from collections.abc import Sequence
from urllib.request import Request, urlopen

from megatron_step.config.run import RunConfig
from megatron_step.config.stages import GrowthConfig
from megatron_step.plan import old_layers, operators
from megatron_step.plan.names import is_norm, layer_of
from megatron_step.plan.old_layers import Policy, Treatment
from megatron_step.plan.operators import New, Old, Operator
from megatron_step.plan.stages import Stage
from megatron_step.training.trackers.tracker import Metrics, TrackedRun

TIMEOUT_SECONDS = 5.0  # training waits for an answer as long as this


class Repeat(Operator):
    """Each layer again right above itself: 0 1 2 becomes 0 0 1 1 2 2."""

    name = "repeat"
    inits = ("copy", "identity")
    adds = "whole repetitions of every layer"

    def can_add(self, num_layers: int, num_new: int) -> bool:
        """Whether every layer gets as many copies as any other."""
        return num_new % num_layers == 0

    def places(self, num_layers: int, num_new: int, growth: GrowthConfig, seed: int) -> Sequence[Old | New]:
        """Each old layer, and its copies above it."""
        copies = num_new // num_layers
        return [place for layer in range(num_layers) for place in (Old(layer), *[New(layer)] * copies)]


class EverySecond(Policy):
    """Trains every second old layer in full and freezes the others, except for their norms."""

    name = "every_second"

    def period(self, config: RunConfig) -> int:
        """Two layers in a row stand for all."""
        return 2

    def treatment(self, key: str, turn: int, stage: Stage, config: RunConfig) -> Treatment:
        """Layer 0 is trained, layer 1 is frozen, and so on."""
        layer = layer_of(key)
        if is_norm(key):
            return Treatment(True, "base", since=stage.layers[layer].born)
        # Growth moves layers, so a trained one may have been frozen before: its optimizer states begin in this stage.
        return Treatment(layer % 2 == 0, "base", since=stage.index)


class PostedLines:
    """Posts each shown step as a line of JSON."""

    def __init__(self, run: TrackedRun) -> None:
        self._url = os.environ["METRICS_URL"]
        self._run = run.config.output_dir

    def write(self, metrics: Metrics, shown: bool) -> None:
        """Post the line; an error is said once by the run, which trains on."""
        if shown:
            line = json.dumps({"run": self._run, **metrics}) + "\n"
            request = Request(self._url, line.encode(), {"Content-Type": "application/x-ndjson"})
            urlopen(request, timeout=TIMEOUT_SECONDS).close()

    def close(self) -> None:
        """Nothing is left to post."""


operators.register(Repeat())
old_layers.register(EverySecond())
trackers = [PostedLines] if "METRICS_URL" in os.environ else []
