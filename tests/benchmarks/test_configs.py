from benchmarks.configs import MODEL, SMALL_MODEL, run_config


def test_a_step_is_one_micro_batch_and_nothing_is_saved_or_evaluated_on_the_way():
    config = run_config(MODEL, 4, "bf16", steps=7)
    assert config.training.global_batch_size == config.training.micro_batch_size == 4
    assert (config.stages.steps, config.evaluation.steps, config.checkpoint.interval) == (7, 0, 0)


def test_vocabularies_need_no_padding():
    for model in (MODEL, SMALL_MODEL):
        assert model.padded_vocab_size(model.vocab_size) == model.vocab_size
