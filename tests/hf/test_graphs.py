"""Decode steps by recordings: the logits and tokens of steps that are computed as ever."""

from __future__ import annotations

import contextlib
import copy
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.hf.models import build, prompt
from tests.hf.tape import Tape, TapeRecorder

from pagedkv import InvalidOperation, MissingExtra, PagedKvCache
from pagedkv.data import attention, gpu_plan, storage
from pagedkv.engine import LLM, SamplingParams
from pagedkv.hf import ModelRunner, graphs, load, load_runner
from pagedkv.hf.graphs import CudaRecorder, bucket_of
from pagedkv.hf.pool import ModelKvCache

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SMALL = {"num_blocks": 96, "block_size": 4, "batch_invariant": False}


class CountingCuda:
    """The real recorder, which counts like the tape."""

    def __init__(self):
        self.replays, self._record = 0, CudaRecorder(DEVICE)

    def __call__(self, run):
        again = self._record(run)

        def replay():
            self.replays += 1
            again()

        return replay


@pytest.fixture
def recorder(monkeypatch):
    """A recorder, for pools that Triton's kernels write; sequences of more than 4 blocks need a wider recording."""
    monkeypatch.setattr(graphs, "NARROWEST", 4)
    if ON_GPU:
        return CountingCuda()
    monkeypatch.setattr(storage, "uses_triton", lambda *_: True)
    return TapeRecorder(monkeypatch)


class Pair:
    """The same texts through two runners, the second of which has recordings."""

    def __init__(self, recorder, model=None, **options):
        model = copy.deepcopy(build("llama", layers=1) if model is None else model).to(DEVICE)
        self.runners = [load_runner(model, mode="ragged", **SMALL | options) for _ in range(2)]
        self.runners[1].record_decoding(recorder)

    @property
    def num_recordings(self):
        return self.runners[1].num_recordings

    def step(self, news, wanted=None, sinks_and_window=None):
        """Feed tokens to sequences, new ones too; check that both give the same logits and return them."""
        lengths = [len(new) for new in news.values()]
        rows = np.cumsum(lengths) - 1 if wanted is None else np.array(wanted, np.int64)
        found = []
        for runner in self.runners:
            cache = runner.cache
            for seq_id in news.keys() - set(cache.sequence_ids):
                cache.allocate(seq_id, 0)
            plan = cache.append_batch(list(news), counts=lengths)
            found.append(runner.forward(plan, np.concatenate(list(news.values())), rows))
            cache.commit(plan)
            if sinks_and_window is not None and cache.get_sequence(1).num_tokens > sum(sinks_and_window):
                cache.apply_streaming_llm(1, *sinks_and_window)
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        assert found[1].dtype == torch.float32 and found[1].shape == (len(rows), self.runners[1].vocab_size)
        return found[1]

    def decode(self, seq_ids, first=0):
        return self.step({seq_id: [first + i + 1] for i, seq_id in enumerate(seq_ids)})

    def free(self, seq_id):
        for runner in self.runners:
            runner.cache.free(seq_id)
            runner.release(seq_id)


# --- the same logits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, layers, kv_dtype", [("llama", 1, None), ("gemma2", 2, None), ("llama", 1, "int8")])
def test_batches_that_change(name, layers, kv_dtype, recorder):
    """A batch grows and shrinks, ids come and go, prompts come between, texts outgrow their recording."""
    pair = Pair(recorder, build(name, layers=layers), kv_dtype=kv_dtype)
    pair.step({1: list(range(5)), 2: list(range(9, 21))})
    for number in range(4):  # up to 16 tokens, 4 blocks
        pair.decode([1, 2], number)
    assert pair.num_recordings == 1 and recorder.replays == 2
    pair.decode([2, 1])  # a fifth block: another kind
    pair.step({3: [7, 8, 9], 2: [4]})
    pair.decode([3, 4])  # 4 is new and has one token
    assert recorder.replays == 3
    for seq_ids in ([1, 3, 4], [4, 3, 1], [3, 4, 1]):
        pair.decode(seq_ids, 30)
    assert pair.num_recordings == 2 and recorder.replays == 4
    pair.free(4)
    pair.step({4: [50, 51]})
    pair.decode([1, 3, 4])
    pair.decode([5, 3, 4, 1])
    assert pair.num_recordings == 2 and recorder.replays == 6
    for number in range(2):
        pair.decode([2, 1], number)
    assert pair.num_recordings == 3 and recorder.replays == 7


def test_chosen_rows_are_a_copy(recorder):
    pair = Pair(recorder)
    pair.step({1: [1, 2, 3], 2: [4, 5], 3: [6]})
    for _ in range(2):
        pair.decode([1, 2, 3])
    for wanted in ([2], [2, 0], [], [1, 1, 1, 1, 1, 1]):
        logits = pair.step({1: [9], 2: [8], 3: [7]}, wanted)
        kept = logits.clone()
        pair.decode([3, 2, 1], 20)
        assert logits.equal(kept)
    assert recorder.replays == 8


def test_a_stream_beside_others(recorder):
    """Its positions start again and its hole moves."""
    pair = Pair(recorder)
    pair.step({1: [7, 8, 9], 2: [3, 4]})
    for number in range(20):
        pair.step({1: [number], 2: [number + 1]}, None, (2, 4))
    assert pair.runners[1].cache.get_sequence(1).num_dropped_tokens > 12
    assert recorder.replays > 12


def test_in_inference_mode_and_out_of_it(recorder):
    pair = Pair(recorder)
    with torch.inference_mode():
        pair.step({1: [1, 2, 3]})
        for number in range(3):
            pair.decode([1], number)
    pair.decode([1])
    with torch.inference_mode():
        pair.decode([1])
    assert recorder.replays == 3


def test_larger_batches_are_not_recorded(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_SEQUENCES", 1)
    pair = Pair(recorder)
    for _ in range(4):
        pair.decode([1, 2])
    assert pair.num_recordings == 0


def test_kinds_of_steps():
    def kind(count, width, query_tokens=None):
        counts = np.ones(count, np.int32) if query_tokens is None else np.array(query_tokens, np.int32)
        tables = np.zeros((count, width), np.int32)
        plan = SimpleNamespace(block_tables=tables, num_query_tokens=counts, total_tokens=int(counts.sum()))
        return bucket_of(plan)

    batches = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 8: 8, 9: 16, 17: 24, 33: 40, 249: 256, 256: 256, 257: 0, 0: 0}
    assert {count: kind(count, 3)[0] for count in batches} == batches
    assert [kind(2, width)[1] for width in (1, 64, 65, 256, 257)] == [64, 64, 256, 256, 1024]
    assert kind(2, 3, [1, 2]) == kind(2, 3, [2, 0]) == kind(2, 3, [0, 1]) == (0, 0)


# --- the engine --------------------------------------------------------------------------------------------------


def test_the_engine_writes_the_same_tokens(recorder):
    pair = Pair(recorder)
    prompts = [prompt(1, 3 + 4 * i, seed=i)[0].tolist() for i in range(3)]
    params = [SamplingParams(max_tokens=5 + 3 * i, temperature=0.0) for i in range(3)]
    written = []
    for runner in pair.runners:
        outputs = LLM(runner, max_batch_tokens=8).generate(prompts, params)
        written.append([output.outputs[0].token_ids for output in outputs])
    assert written[0] == written[1] and [len(ids) for ids in written[0]] == [5, 8, 11]
    assert recorder.replays >= 3 and pair.num_recordings >= 2


def test_the_option_reaches_the_runner(recorder, monkeypatch):
    asked = []
    monkeypatch.setattr(load, "_require_graphs", lambda *_: None)
    monkeypatch.setattr(load, "CudaRecorder", lambda device: asked.append(device) or recorder)
    model = copy.deepcopy(build("llama", layers=1)).to(DEVICE)
    runner = LLM(model, num_blocks=8, block_size=4, cuda_graphs=False).core.runner
    assert not asked and runner.num_recordings == 0
    runner = LLM(model, num_blocks=8, block_size=4, cuda_graphs=True).core.runner
    assert [device.type for device in asked] == [DEVICE.type] and runner._graphs._record is recorder
    assert runner.mode == "ragged"


def test_a_model_on_a_device_is_recorded_by_default(recorder, monkeypatch):
    asked = []
    monkeypatch.setattr(load, "CudaRecorder", lambda device: asked.append(device) or recorder)
    for name, mode, on_device in [("llama", "ragged", True), ("llama", "ragged", False), ("lfm2", "auto", True)]:
        monkeypatch.setattr(load, "_has_graphs", lambda model, answer=on_device: answer)
        model = copy.deepcopy(build(name, layers=1) if name == "llama" else build(name)).to(DEVICE)
        runner = load_runner(model, num_blocks=16, block_size=4, mode=mode)
        assert (runner._graphs is not None) == bool(asked) == (runner.mode == "ragged" and on_device)
        asked.clear()


# --- models that cannot be recorded ------------------------------------------------------------------------------


def test_a_model_that_waits_for_the_device_runs_without(recorder, caplog):
    model = copy.deepcopy(build("llama", layers=1))
    model.model.norm.register_forward_hook(lambda module, args, out: out * float(out.abs().max() > 0))
    pair = Pair(recorder, model)
    pair.step({1: [1, 2, 3], 2: [4]})
    with caplog.at_level(logging.WARNING, "pagedkv"):
        for _ in range(5):
            pair.decode([1, 2])
            pair.decode([1])
    assert pair.num_recordings == recorder.replays == 0
    (told,) = [text for text in caplog.messages if "CUDA graphs" in text]
    assert told.startswith("LlamaForCausalLM runs without CUDA graphs, as it could not be recorded: ")


def test_a_recording_that_fails_later_ends_all(recorder, caplog):
    """The step that was to be recorded has its logits, and so have all others."""
    made = []

    def record(run):
        if made:
            run()
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        made.append(run)
        return recorder(run)

    pair = Pair(record)
    pair.step({1: [1, 2, 3], 2: [4]})
    for _ in range(3):
        pair.decode([1])
    assert pair.num_recordings == 1
    for _ in range(3):
        pair.decode([1, 2])
    assert pair.num_recordings == 0 and recorder.replays == 1
    pair.decode([1])
    (told,) = [text for text in caplog.messages if "CUDA graphs" in text]
    assert told.endswith("recorded: RuntimeError: operation not permitted when stream is capturing")


def test_gather_mode_is_never_recorded(recorder, monkeypatch, caplog):
    monkeypatch.setattr(load, "_require_graphs", lambda *_: None)
    runner = load_runner(copy.deepcopy(build("lfm2")).to(DEVICE), num_blocks=16, block_size=4, cuda_graphs=True)
    assert caplog.messages[-1] == "Lfm2ForCausalLM runs without CUDA graphs, as it runs in gather mode"
    runner.record_decoding(recorder)
    runner.cache.allocate(1, 3)
    runner.forward(runner.cache.plan([1]), [1, 2, 3], [])
    for _ in range(3):
        runner.cache.commit(1)
        assert runner.forward(runner.cache.append_batch([1], [1]), [5], [0]).shape == (1, runner.vocab_size)
    assert runner.num_recordings == recorder.replays == 0


# --- refusals ----------------------------------------------------------------------------------------------------


def test_refusals(monkeypatch):
    model = build("llama", layers=1)
    with pytest.raises(InvalidOperation, match="cuda_graphs: expected a model on a CUDA device, got one on cpu"):
        load_runner(model, num_blocks=8, cuda_graphs=True)
    with pytest.raises(InvalidOperation, match="cuda_graphs: expected a model on a CUDA device, got one on cpu"):
        LLM(model, num_blocks=8, cuda_graphs=True)
    for mode in ("gather", "compiled"):
        with pytest.raises(InvalidOperation, match=f"cuda_graphs: expected False in mode '{mode}', got True"):
            load_runner(model, num_blocks=8, mode=mode, cuda_graphs=True)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(load, "has_triton", lambda: False)
    with pytest.raises(MissingExtra, match="triton is not installed"):
        load_runner(model, num_blocks=8, cuda_graphs=True)


# --- what a capture needs ----------------------------------------------------------------------------------------


@pytest.mark.skipif(ON_GPU, reason="kernels are left out in the interpreter only")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma4", "gpt2"])
def test_the_forward_pass_never_asks_the_device(name, monkeypatch):
    """Tensors of the meta device have no numbers: who wants to see one gets an error. Kernels are left out."""
    from triton.runtime.interpreter import GridExecutor

    launched = []
    monkeypatch.setattr(storage, "uses_triton", lambda *_: True)
    monkeypatch.setattr(attention, "require_runnable", lambda *_: None)
    monkeypatch.setattr(GridExecutor, "__call__", lambda grid, *args, **options: launched.append(grid.fn.__name__))
    runner = ModelRunner(copy.deepcopy(build(name)).to("meta"), ModelKvCache(16, 4, num_layers=0), "ragged")
    runner.cache.settle(torch.float32, "meta")
    plan, one = runner.cache.device_plan(4, 8, 4, 1), torch.ones(4, dtype=torch.int64, device="meta")
    with torch.no_grad():
        logits = runner._ragged_logits(plan, one, plan.positions, one)
    assert logits.device.type == "meta" and logits.shape == (4, runner.vocab_size)
    assert len(launched) >= 2 * len(runner.table.numbers) > 0
    with pytest.raises((RuntimeError, NotImplementedError)), torch.no_grad():
        float(logits[0, 0])


def test_debug_mode_does_not_read_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(storage, "uses_triton", lambda *_: True)
    monkeypatch.setenv("PAGEDKV_DEBUG", "1")
    plan = PagedKvCache(4, 4, dtype="float32").device_plan(2, 2, 2)
    plan.batch.seq_lens.fill_(99)
    with pytest.raises(InvalidOperation, match="plan on cpu"):
        gpu_plan.require_plan_of(plan, 4, 4, plan.device)
    monkeypatch.setattr(gpu_plan, "is_capturing", lambda device: True)
    gpu_plan.require_plan_of(plan, 4, 4, plan.device)


def test_the_recorder_on_a_device(monkeypatch):
    """Without one: the calls and their order. Warm-up and capture are on one stream, and the caller's stream waits."""
    log = []

    class Stream:
        def __init__(self, name="aside"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            log.append("replay")

    class Capture(torch.cuda.graph):
        def __enter__(self):
            log.append(f"capture on {self.capture_stream.name} into {self.pool} {self.capture_error_mode}")

        def __exit__(self, *error):
            log.append("end")

    @contextlib.contextmanager
    def on(stream):
        log.append(f"to {stream.name}")
        yield
        log.append(f"from {stream.name}")

    fakes = dict(Stream=Stream, CUDAGraph=Graph, graph=Capture, stream=on, graph_pool_handle=lambda: "a pool")
    fakes |= dict(current_stream=lambda: Stream("here"), device=contextlib.nullcontext)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    record = CudaRecorder(torch.device("cuda"))
    expected = ["aside waits for here", "to aside", "run", "here waits for aside"]
    expected += ["capture on aside into ('a pool',) thread_local", "run", "end", "from aside"]
    for _ in range(2):
        replay = record(lambda: log.append("run"))
        assert log == expected
        log.clear()
    replay()
    assert log == ["replay"]


def test_the_tape_forgets_the_host_as_a_graph_does():
    source, target = torch.zeros(3), torch.zeros(3)
    host = [1.0]
    with Tape() as tape:
        target.copy_((source * 2 + host[0]).view(3, 1)[:, 0])
    source.fill_(5)
    host[0] = 100.0
    for step in tape.steps:
        step()
    assert target.tolist() == [11.0] * 3
    with Tape(), pytest.raises(RuntimeError, match="not permitted"):
        bool(source.sum() > 0)
    del source
    with pytest.raises(AssertionError, match="freed memory"):
        tape.steps[0]()
