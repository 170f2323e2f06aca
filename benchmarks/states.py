"""Model states of every stage of a 24-layer model, measured and planned, compared with vanilla training."""

from dataclasses import replace

from benchmarks.configs import Precision, run_config
from benchmarks.timing import Row
from megatron_step.config.model import ModelConfig
from megatron_step.config.run import RunConfig
from megatron_step.config.stages import AdapterConfig, StagesConfig
from megatron_step.engine.parallel import Parallel, parallel_layout, stop_world
from megatron_step.plan.resolved import resolve
from megatron_step.plan.stages import Stage, StagePlan
from megatron_step.plan.states import RECIPES, Recipe
from megatron_step.planner.costs.held import held_chunks
from megatron_step.planner.costs.memory import RankMemory, stage_memory
from megatron_step.planner.paper import paper_plan
from megatron_step.planner.plan import make_plan
from megatron_step.training.memory import measure_states
from megatron_step.training.state import build_state

MODEL = ModelConfig(
    num_layers=24, hidden_size=1024, ffn_hidden_size=2736, num_attention_heads=16, seq_length=1024, vocab_size=32000
)
"""A model of 368 million weights, a shape from work on low-rank pre-training (GaLore, Zhao et al., 2024)."""


def run(model: ModelConfig = MODEL, rank: int = 128, count: int = 3, precision: Precision = "bf16") -> list[Row]:
    """Return rows for vanilla training and for each of `count` stages, with layers chosen by the paper's program.

    The columns are measured and planned MiB of the model states, their share of vanilla's, and the share by the paper's
    16 bytes per trained weight and 2 bytes per frozen weight.
    """
    vanilla = replace(run_config(model, 1, precision), adapter=AdapterConfig(rank=rank, alpha=2 * rank))
    layers = paper_plan(resolve(vanilla, _vocab(vanilla)), count, with_embeddings=True).layers
    staged = replace(vanilla, stages=StagesConfig(steps=1, count=count, layers=list(layers)))
    try:
        with parallel_layout(vanilla.parallel, seed=1) as parallel:
            measured = [
                (config, plan, stage, _measured(config, plan, stage, parallel))
                for config in (vanilla, staged)
                for plan in [make_plan(resolve(config, _vocab(config)))]
                for stage in plan.stages
            ]
    finally:
        stop_world()
    whole = measured[0][3].model_state_bytes
    paper = [_by_recipe(config, stage, RECIPES["paper"]) for config, _, stage, _ in measured]
    return [
        {
            "benchmark": f"model states, {model.num_layers} layers, rank {rank}, {precision}",
            "stage": "vanilla" if number == 0 else str(stage.number),
            "layers": _layers(stage),
            "measured_mib": memory.model_state_bytes / 2**20,
            "planned_mib": stage_memory(resolve(config, _vocab(config)), stage)[0].model_state_bytes / 2**20,
            "share_of_vanilla": memory.model_state_bytes / whole,
            "share_by_paper_recipe": paper[number] / paper[0],
        }
        for number, (config, _, stage, memory) in enumerate(measured)
    ]


def _measured(config: RunConfig, plan: StagePlan, stage: Stage, parallel: Parallel) -> RankMemory:
    """Build a stage, and measure its model states."""
    state = build_state(config, plan, stage, stage.first_step, _vocab(config), parallel)
    memory = measure_states(state, activation_bytes=0)
    state.release()
    return memory


def _by_recipe(config: RunConfig, stage: Stage, recipe: Recipe) -> int:
    return recipe.state_bytes(held_chunks(resolve(config, _vocab(config)), stage)[0][0].parameters)


def _vocab(config: RunConfig) -> int:
    assert config.model.vocab_size is not None
    return config.model.vocab_size


def _layers(stage: Stage) -> str:
    new = stage.num_new_layers
    return str(new) if new == stage.num_layers else f"{stage.num_layers - new}+{new}"
