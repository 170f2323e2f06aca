"""Validation is measured when it is due, over a fixed set, and changes nothing."""

import math

import pytest
import torch
from small_run import VOCAB_SIZE, made_up_batch, small_config

from megatron_step.engine.parallel import Parallel
from megatron_step.plan.resolved import resolve
from megatron_step.planner.plan import make_plan
from megatron_step.training.hooks.evaluation import evaluation_hook, validation_loss
from megatron_step.training.stage import StepContext
from megatron_step.training.state import initial_state
from megatron_step.training.step import evaluate_batch


def test_the_loss_is_the_mean_over_the_set(alone: Parallel) -> None:
    config = small_config(evaluation={"interval": 2, "steps": 3})
    state = initial_state(config, VOCAB_SIZE, alone)
    before = [param.clone() for param in state.chunks[0].parameters()]
    loss = validation_loss(state.chunks, lambda index: made_up_batch(config, index, alone), config, alone)
    each = [evaluate_batch(state.chunks, made_up_batch(config, index, alone), config, alone) for index in range(3)]
    assert loss == pytest.approx(sum(each) / 3)
    assert all(torch.equal(one, other) for one, other in zip(before, state.chunks[0].parameters()))
    assert state.chunks[0].training


@pytest.mark.parametrize(("interval", "expected"), [(4, [4, 8, 10]), (0, [10])])
def test_it_is_due_every_interval_and_at_the_end(alone: Parallel, interval: int, expected: list[int]) -> None:
    config = small_config(steps=10, evaluation={"interval": interval, "steps": 1})
    state = initial_state(config, VOCAB_SIZE, alone)
    hook = evaluation_hook(lambda index: made_up_batch(config, index, alone), config, alone)
    evaluated = []
    for step in range(1, 11):
        state.step = step
        metrics: dict = {}
        hook(StepContext(state, metrics, memory=None, is_last=step == 10))
        if metrics:
            assert metrics["validation_perplexity"] == pytest.approx(math.exp(metrics["validation_loss"]))
            evaluated.append(step)
    assert evaluated == expected


def test_every_stage_ends_with_an_evaluation(alone: Parallel) -> None:
    config = small_config(steps=8, stages={"count": 2, "layers": [3, 1]}, evaluation={"interval": 0, "steps": 1})
    state = initial_state(config, VOCAB_SIZE, alone)
    hook = evaluation_hook(lambda index: made_up_batch(config, index, alone), config, alone)
    plan, evaluated = make_plan(resolve(config, VOCAB_SIZE)), []
    for step in range(1, plan.num_steps + 1):
        state.step, state.stage = step, plan.stage_at(step - 1)
        metrics: dict = {}
        hook(StepContext(state, metrics, memory=None, is_last=False))
        evaluated += [step] if metrics else []
    assert evaluated == [6, 14], "three quarters of the first stage's steps, and all of the last one's"
