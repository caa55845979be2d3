"""Prefixes of models that keep a state of each text: steps end where a snapshot is worth keeping."""

from __future__ import annotations

import pytest
from tests.engine.fakes import RecurrentRunner, alone, engine, request, run, tokens_of

HEAD = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]  # three blocks of four and one token


def recurrent(num_blocks=64, num_states=12, **options):
    return engine(runner=RecurrentRunner(num_blocks, 4, num_states=num_states), **options)


def served(core, *requests):
    for each in requests:
        core.add(each)
    outputs = run(core)
    for each in requests:
        assert tokens_of(outputs[each.request_id]) == alone(each)
    return [outputs[each.request_id].num_cached_tokens for each in requests]


def test_the_same_prompt_is_computed_behind_its_last_block_boundary():
    core = recurrent()
    first = request("a", HEAD, max_tokens=2)
    again = request("b", HEAD, max_tokens=2)
    assert served(core, first) == [0]
    assert served(core, again) == [12]
    assert core.runner.batches[:2] == [[12], [1]]


def test_the_same_prompt_of_whole_blocks_is_computed_from_its_last_but_one_boundary_on():
    core = recurrent()
    assert served(core, request("a", HEAD[:12], max_tokens=1)) == [0]
    assert served(core, request("b", HEAD[:12], max_tokens=1)) == [8]


def test_the_next_turn_of_a_conversation_reuses_the_answer():
    core = recurrent()
    first = request("a", HEAD, max_tokens=9, ignore_eos=True)
    core.add(first)
    answer = tokens_of(run(core)["a"])[0]
    second = request("b", HEAD + list(answer) + [7, 7], max_tokens=2)
    assert served(core, second) == [20]  # of 21 tokens that have been computed


def test_prompts_that_come_together_share_what_they_begin_with():
    core = recurrent(max_batch_tokens=64)
    assert served(core, *(request(f"r{i}", HEAD + [i] * 9, max_tokens=3) for i in range(4))) == [0, 12, 12, 12]
    assert core.runner.batches[0] == [12]  # the first one stops where the others part from it


def test_a_prompt_is_cut_where_it_parts_from_an_earlier_one():
    core = recurrent(max_batch_tokens=64)
    texts = [HEAD + [i] * 9 for i in range(3)]
    assert served(core, request("a", texts[0], max_tokens=1)) == [0]
    # The blocks of the head are there, but no state behind them: this text leaves one.
    assert served(core, request("b", texts[1], max_tokens=1)) == [0]
    assert served(core, request("c", texts[2], max_tokens=1)) == [12]


def test_chunks_end_at_block_boundaries():
    core = recurrent(max_batch_tokens=6)
    served(core, request("a", HEAD, max_tokens=2))
    assert core.runner.batches[:3] == [[4], [4], [4]]


def test_chunks_shorter_than_a_block_still_come_to_its_end():
    core = recurrent(max_batch_tokens=3)
    served(core, request("a", HEAD, max_tokens=2))
    assert served(core, request("b", HEAD, max_tokens=2)) == [12]


def test_no_more_texts_run_than_have_a_slot():
    core = recurrent(num_states=3, max_num_seqs=100)
    assert core.sizes.max_num_seqs == 3
    served(core, *(request(f"r{i}", [i] * 5, max_tokens=6) for i in range(8)))
    core.runner.cache.check()


@pytest.mark.parametrize("extra", [{"n": 3, "temperature": 1.0}, {"beam_width": 3, "n": 3}])
def test_samples_and_beams_fork_the_state(extra):
    core = recurrent(num_states=3)
    served(core, request("a", HEAD, max_tokens=9, seed=4, **extra))
    assert core.runner.cache.used_state_count == 0


def test_drafts_are_not_made_as_states_cannot_be_taken_back():
    core = recurrent()
    served(core, request("a", [1, 2] * 8, max_tokens=12, prompt_lookup=4))
    assert core.stats().draft_tokens == 0


def test_a_text_that_streams_keeps_the_state_of_all_that_it_has_read():
    core = recurrent()
    core.add(request("a", HEAD, max_tokens=12, streaming=(2, 5)))
    run(core)
