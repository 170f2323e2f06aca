"""Enter a stage: with initial weights, from a checkpoint of the stage, or by growth from the stage before.

Each way is the same four lines: build the model, fill in its weights, make it trainable, fill in its optimizer states.
"""

from dataclasses import replace
from pathlib import Path

from megatron_step.checkpoint.directory import checkpoint_name
from megatron_step.checkpoint.load import FoundCheckpoint, find_at, load_weights
from megatron_step.checkpoint.manifest import read_manifest, saved_config, saved_recipe
from megatron_step.checkpoint.states import load_states
from megatron_step.config.counts import counted
from megatron_step.config.run import RunConfig
from megatron_step.data.tokenizer import Tokenizer, load_tokenizer
from megatron_step.engine.parallel import Parallel
from megatron_step.growth.moments import grow_moments
from megatron_step.growth.weights import grow_weights, growth_source, saved_stage
from megatron_step.model.build import sharded_weights
from megatron_step.plan.old_layers import policy_of
from megatron_step.plan.stages import Stage, StagePlan
from megatron_step.plan.states import training_recipe
from megatron_step.training.memory import measure_peak
from megatron_step.training.state import TrainState, build_stage_model, build_state, make_trainable


def first_state(
    config: RunConfig,
    plan: StagePlan,
    found: FoundCheckpoint | None,
    tokenizer: Tokenizer,
    vocab_size: int,
    parallel: Parallel,
) -> TrainState:
    """Return the first state of a process: from the checkpoint `found`, grown if the checkpoint ends its stage.

    Without a checkpoint of the run, the state is the first stage with initial weights, or with those of
    `stages.start_from`.

    Raises ValueError, FileNotFoundError or DamagedCheckpointError if the checkpoint cannot be used.
    """
    step = found.manifest.step if found is not None else 0
    stage = plan.stage_at(step)
    if found is None and config.stages.start_from is None:
        return build_state(config, plan, stage, step, vocab_size, parallel)
    if found is None:
        started = _start_checkpoint(config, plan, tokenizer, vocab_size, parallel)
        return _grow(config, plan, stage, step, started, vocab_size, parallel, own=False)
    if stage.index > found.manifest.stage_index:
        return _grow(config, plan, stage, step, found, vocab_size, parallel)
    return _load(config, plan, stage, found, vocab_size, parallel)


def next_stage(
    state: TrainState, config: RunConfig, plan: StagePlan, vocab_size: int, parallel: Parallel
) -> TrainState:
    """Grow the checkpoint that ended this stage into the next stage. `state` is released first."""
    step, stage = state.step, plan.stages[state.stage.index + 1]
    state.release()
    path = Path(config.output_dir) / "checkpoints" / checkpoint_name(step)
    found = FoundCheckpoint(path, read_manifest(path), [])
    return _grow(config, plan, stage, step, found, vocab_size, parallel)


def _load(
    config: RunConfig, plan: StagePlan, stage: Stage, found: FoundCheckpoint, vocab_size: int, parallel: Parallel
) -> TrainState:
    """Load the state of `stage` from a checkpoint in the middle of it."""
    chunks = build_stage_model(config, stage, found.manifest.step, vocab_size, parallel)
    load_weights(found.path, chunks, parallel)
    state = make_trainable(chunks, config, plan, stage, found.manifest.step, parallel)
    assert state.optimizer is not None
    weights, recipes = sharded_weights(state.chunks, parallel), (saved_recipe(found.manifest), training_recipe(config))
    load_states(found.path, state.optimizer, weights, *recipes, parallel)
    return replace(state, kept_settings=found.manifest.kept_settings)


def _grow(
    config: RunConfig,
    plan: StagePlan,
    stage: Stage,
    step: int,
    found: FoundCheckpoint,
    vocab_size: int,
    parallel: Parallel,
    own: bool = True,
) -> TrainState:
    """Grow a checkpoint into `stage`. Of another run's checkpoint (not `own`), take only the weights."""
    source = growth_source(found)
    keeps = own and policy_of(config).keeps_adapters(config)

    def grow() -> TrainState:
        chunks = build_stage_model(config, stage, step, vocab_size, parallel)
        grow_weights(chunks, source, stage, config.growth, keeps, parallel)
        state = make_trainable(chunks, config, plan, stage, step, parallel)
        assert state.optimizer is not None
        if own:
            recipes = saved_recipe(found.manifest), training_recipe(config)
            grow_moments(found.path, state.chunks, state.optimizer, stage, *recipes, parallel)
        return state

    state, peak_bytes = measure_peak(grow)
    return replace(state, growth_peak_bytes=peak_bytes, kept_settings=found.manifest.kept_settings)


def _start_checkpoint(
    config: RunConfig, plan: StagePlan, tokenizer: Tokenizer, vocab_size: int, parallel: Parallel
) -> FoundCheckpoint:
    """Return the checkpoint of `stages.start_from`; raises ValueError if its model is not that of the first stage."""
    path = config.stages.start_from
    assert path is not None
    found = find_at(Path(path), parallel)
    manifest = found.manifest
    layers = saved_stage(manifest).num_layers
    if layers != plan.stages[0].num_layers:
        raise ValueError(
            f"stages.start_from {path} has {counted(layers, 'layer')}, but the first stage has "
            f"{plan.stages[0].num_layers}: set stages.layers to begin with {layers}"
        )
    if manifest.vocab_size != vocab_size:
        raise ValueError(
            f"stages.start_from {path} was trained with a vocabulary of {counted(manifest.vocab_size, 'token')}, not "
            f"the {vocab_size} of {config.data.tokenizer}: use the tokenizer that it was trained with"
        )
    trained_with = manifest.data_fingerprint.get("tokenizer")
    own_end = None if config.data.end_of_document is None else load_tokenizer(config.data.tokenizer).fingerprint
    if trained_with not in (tokenizer.fingerprint, own_end):  # this run may end documents with another token
        raise ValueError(
            f"stages.start_from {path} was trained with another tokenizer than {config.data.tokenizer}: use that one"
        )
    trained = saved_config(manifest).model
    pairs = {key: (getattr(trained, name), getattr(config.model, name)) for key, name in _SHAPE.items()}
    different = [f"model.{key} {old} -> {new}" for key, (old, new) in pairs.items() if old != new]
    if different:
        raise ValueError(
            f"stages.start_from {path} has a model with other settings: {', '.join(different)}. Make them equal, or "
            "choose another checkpoint"
        )
    return found


_SHAPE = {
    **{name: name for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads")},
    "num_query_groups": "query_groups",
    "head_size": "attention_head_size",
    **{name: name for name in ("tie_embeddings", "mlp", "qkv_bias", "qk_norm")},
    **{name: name for name in ("norm_epsilon", "rope_theta", "rope_scaling")},
}
"""Keys of the model's config that must equal those of a start checkpoint, and the attributes with their values."""
