"""Generation: greedy as plain transformers, sampling as the distribution, order and micro-batch without effect."""

from __future__ import annotations

import pytest
import torch
from dense_reference import greedy

from luthier.errors import Refused
from luthier.models.generate import GenerateOptions, generate
from luthier.models.stage import Stage

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "opt", "bloom")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20], [30, 31, 32, 33], [5, 6, 7]]


def _run(model, options, prompts=PROMPTS, micro_batch=2, stop_ids=(2,), **kwargs):
    return generate(
        model, prompts, options, pad_id=0, stop_ids=stop_ids, micro_batch=micro_batch, **kwargs
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_plain_transformers(family, tiny_model, capfd):
    """Padded micro-batches with a cache against one prompt at a time without one."""
    plain = tiny_model(family, attention="eager")
    expected = greedy(plain, PROMPTS, 12)
    capfd.readouterr()
    model = tiny_model(family)
    for options in (GenerateOptions(12), GenerateOptions(12, top_k=50, temperature=0)):
        assert _run(model, options, stop_ids=()) == expected
    assert capfd.readouterr() == ("", "")


def test_an_answer_ends_before_its_stop_token(tiny_model):
    model = tiny_model("llama")
    free = _run(model, GenerateOptions(12), stop_ids=())
    stops = (free[0][4], free[1][2])
    expected = []
    for answer in free:
        cut = next((i for i, token in enumerate(answer) if token in stops), len(answer))
        expected.append(answer[:cut])
    assert _run(model, GenerateOptions(12), stop_ids=stops) == expected
    assert len({len(answer) for answer in expected}) > 1


def test_sampling_depends_on_seed_and_prompt_alone(tiny_model):
    model = tiny_model("gpt2")
    options = GenerateOptions(10, top_k=0, top_p=0.95, temperature=1.5, seed=3)
    state = torch.get_rng_state()
    found = _run(model, options)
    assert torch.equal(state, torch.get_rng_state())
    assert found[0] != found[4]  # the same prompt twice is sampled twice
    for micro_batch in (1, 3, 5):
        assert _run(model, options, micro_batch=micro_batch) == found
    assert _run(model, GenerateOptions(10, top_k=0, top_p=0.95, temperature=1.5, seed=4)) != found


def test_sampling_is_from_the_distribution(tiny_model):
    """First tokens of 4,000 equal prompts against softmax(logits / T) among the k likeliest."""
    model = tiny_model("llama")
    options = GenerateOptions(1, top_k=5, temperature=0.7)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.7
    values, tokens = logits.topk(5)
    expected = values.softmax(0)
    answers = _run(model, options, prompts=[[5, 6, 7]] * 4000, micro_batch=4000)
    drawn = torch.tensor([answer[0] for answer in answers if answer])
    share = torch.stack([(drawn == token).float().mean() for token in tokens])
    assert abs(float(share.sum()) - 1) < 1e-6  # nothing outside the five
    # four standard deviations of a binomial share
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_top_p_keeps_the_smallest_set(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    values, tokens = logits.softmax(0).sort(descending=True)
    kept = int((values.cumsum(0) < 0.1).sum()) + 1
    answers = _run(
        model, GenerateOptions(1, top_k=0, top_p=0.1), prompts=[[5, 6, 7]] * 500, micro_batch=500
    )
    assert {token for answer in answers for token in answer} == set(tokens[:kept].tolist())


def test_the_checkpoint_has_no_say(tiny_model):
    """A generation_config.json with a repetition penalty and limits must not change the answers."""
    model = tiny_model("llama")
    expected = _run(model, GenerateOptions(12), stop_ids=())
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.max_length = 4
    model.generation_config.eos_token_id = expected[0][0]
    model.train()
    assert _run(model, GenerateOptions(12), stop_ids=()) == expected
    assert model.training and model.generation_config.repetition_penalty == 5.0


def test_compiled_layers_are_not_compiled_for_each_length(tiny_model, random_batch):
    """They run as they are while generating, and compiled again afterwards."""
    expected = _run(tiny_model("llama"), GenerateOptions(12))
    model, graphs = tiny_model("llama"), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=backend)
    assert _run(model, GenerateOptions(12)) == expected
    assert not graphs
    with torch.no_grad():
        Stage(model)(random_batch())
    assert graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_of_the_autocast_type(family, tiny_model):
    model, seen = tiny_model(family), set()
    for module in model.modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    _run(model, GenerateOptions(3))
    assert seen == {torch.float32}
    seen.clear()
    _run(model, GenerateOptions(3), autocast=torch.bfloat16)
    assert seen == {torch.bfloat16} and not torch.is_autocast_enabled("cpu")


def test_progress_counts_prompts(tiny_model):
    seen = []
    _run(tiny_model("llama"), GenerateOptions(2), progress=seen.append)
    assert sum(seen) == len(PROMPTS) and len(seen) == 3
    assert _run(tiny_model("llama"), GenerateOptions(2), prompts=[]) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_answers_end_where_positions_do(family, tiny_model):
    model = tiny_model(family)
    long = [3 + i % 300 for i in range(250)]
    answers = _run(model, GenerateOptions(12), prompts=[long, [5, 6, 7]], stop_ids=())
    assert [len(a) for a in answers] == [6, 12]
    assert answers[1] == _run(model, GenerateOptions(12), prompts=[[5, 6, 7]], stop_ids=())[0]


def test_prompts_without_room_or_tokens_are_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(
        Refused, match=r"prompt 1 was asked for.*256 tokens and the model 256 positions"
    ):
        _run(model, GenerateOptions(2), prompts=[[5], [5] * 256])
    with pytest.raises(Refused, match=r"prompt 0 .*0 tokens"):
        _run(model, GenerateOptions(2), prompts=[[]])
