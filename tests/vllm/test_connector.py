"""What vLLM calls: the connector over a stand-in for the few names of vLLM that it is built on."""

from __future__ import annotations

import enum
import importlib
import subprocess
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pagedkv import InvalidOperation, MissingExtra
from pagedkv.vllm.messages import Done

SIZE, BLOCKS = 4, 20


class Role(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class Full:
    block_size = SIZE


class Window(Full):
    pass


class Uniform:
    block_size = SIZE

    def __init__(self, *specs):
        self.kv_cache_specs = dict(enumerate(specs))


class Base:
    def __init__(self, vllm_config, role, kv_cache_config):
        self._kv_transfer_config, self._metadata = vllm_config.kv_transfer_config, None

    def bind_connector_metadata(self, metadata):
        self._metadata = metadata

    def _get_connector_metadata(self):
        return self._metadata


@pytest.fixture
def connector(monkeypatch):
    """The module, imported over the stand-in."""
    base = "vllm.distributed.kv_transfer.kv_connector.v1.base"
    names = {
        "vllm": {"__version__": "0"},
        base: {
            "KVConnectorBase_V1": Base,
            "KVConnectorRole": Role,
            **{f"KVConnector{name}Metadata": type(name, (), {}) for name in ("Handshake", "Worker")},
            "KVConnectorMetadata": type("Metadata", (), {}),
        },
        "vllm.distributed.parallel_state": {"get_tensor_model_parallel_rank": lambda: 0},
        "vllm.v1.kv_cache_interface": {
            "FullAttentionSpec": Full,
            "MLAAttentionSpec": type("Latent", (Full,), {}),
            "UniformTypeKVCacheSpecs": Uniform,
        },
        "vllm.v1.metrics.cache_hit_source": {
            "CacheHitSource": enum.Enum("CacheHitSource", "HOST DISK EXTERNAL_UNSPECIFIED")
        },
    }
    for name in list(names):
        while "." in (name := name.rpartition(".")[0]) or name:
            names.setdefault(name, {})
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "pagedkv.vllm.connector", raising=False)
    yield importlib.import_module("pagedkv.vllm.connector")
    sys.modules.pop("pagedkv.vllm.connector", None)


def config(folder, extra, role="kv_both", **parallel):
    """What vLLM hands over of itself."""
    model = SimpleNamespace(
        hf_config=SimpleNamespace(to_dict=lambda: {"_name_or_path": str(folder), "hidden_size": 8}),
        dtype=torch.float32,
        quantization=None,
        max_model_len=64,
        disable_sliding_window=False,
        model=str(folder),
        model_weights="",
        revision=None,
    )
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "data_parallel_index": 0}
    return SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(**(sizes | parallel)),
        load_config=SimpleNamespace(load_format="auto", download_dir=None),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={}),
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config=extra,
            kv_load_failure_policy="fail",
            is_kv_consumer=role != "kv_producer",
            is_kv_producer=role != "kv_consumer",
        ),
    )


def pool(groups=1, spec=None):
    layers = SimpleNamespace(layer_names=["a", "b"], kv_cache_spec=spec or Full())
    return SimpleNamespace(kv_cache_groups=[layers] * groups, num_blocks=BLOCKS)


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_bytes(b"{}")
    return folder


def pair(connector, setup):
    """Both halves, and the tensors of the worker's."""
    tensors = {name: torch.randn(BLOCKS, 2, SIZE, 6) for name in ("a", "b", "shared with a")}
    worker = connector.PagedKvConnector(setup, Role.WORKER, pool())
    worker.register_kv_caches(tensors)
    scheduler = connector.PagedKvConnector(setup, Role.SCHEDULER, pool())
    scheduler.set_xfer_handshake_metadata({0: worker.get_handshake_metadata()})
    return scheduler, worker, tensors


def request(name="one", length=17):
    return SimpleNamespace(
        request_id=name,
        num_tokens=length,
        num_computed_tokens=0,
        cache_salt=None,
        skip_reading_prefix_cache=False,
        all_token_ids=list(range(length)),
        lora_request=None,
        mm_features=[],
    )


def step(scheduler, worker, asked, blocks, count):
    """One step of vLLM's for one request."""
    output = SimpleNamespace(
        num_scheduled_tokens={asked.request_id: count},
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: (blocks,)),
    )
    worker.bind_connector_metadata(scheduler.build_connector_meta(output))
    worker.start_load_kv(None)
    worker.wait_for_layer_load("a")
    worker.save_kv_layer("a", None, None)
    worker.wait_for_save()
    assert worker.get_block_ids_with_load_errors() == set()
    scheduler.update_connector_output(SimpleNamespace(kv_connector_worker_meta=worker.build_connector_worker_meta()))


def found(scheduler, asked, computed=0):
    while (answer := scheduler.get_num_new_matched_tokens(asked, computed))[0] is None:
        pass
    return answer


def test_what_vllm_calls_stores_and_brings_back(connector, weights, tmp_path):
    setup = config(weights, {"disk": str(tmp_path / "kept"), "disk_size": "1MiB"})
    scheduler, worker, tensors = pair(connector, setup)
    assert setup.kv_transfer_config.kv_load_failure_policy == "recompute" and not scheduler.requires_kv_delivery
    asked = request()
    scheduler.on_new_request(asked)
    assert found(scheduler, asked) == (0, False)
    scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: ([1, 2, 3, 4, 5],)), 0)
    step(scheduler, worker, asked, [1, 2, 3, 4, 5], 17)
    assert scheduler.request_finished(asked, [1, 2, 3, 4, 5]) == (False, None)
    kept = {name: tensors[name][1:5].clone() for name in ("a", "b")}
    scheduler.shutdown()
    scheduler.shutdown()

    scheduler, worker, tensors = pair(connector, setup)
    asked = request("two")
    scheduler.on_new_request(asked)
    assert found(scheduler, asked, 4) == (12, False)
    scheduler.update_state_after_alloc(asked, SimpleNamespace(get_block_ids=lambda: ([9, 8, 7, 6, 5],)), 12)
    (source,) = scheduler.get_external_cache_hit_sources(asked, 12).items()
    assert (source[0].name, source[1]) == ("DISK", 12)
    asked.num_computed_tokens = 16
    step(scheduler, worker, asked, [9, 8, 7, 6, 5], 1)
    for name in ("a", "b"):
        assert torch.equal(tensors[name][[8, 7, 6]], kept[name][1:])
    assert scheduler.reset_cache()
    scheduler.request_finished(asked, [])
    asked = request("three")
    scheduler.on_new_request(asked)
    assert found(scheduler, asked) == (0, False)
    scheduler.shutdown()


def test_other_weights_settings_or_layouts_are_another_model(connector, weights, tmp_path):
    prints = set()

    def note(setup, layout="x"):
        half = connector.PagedKvConnector(setup, Role.SCHEDULER, pool())
        prints.add(half._fingerprint([connector.WorkerFacts(8, layout, "here")]))
        return len(prints)

    extra = {"host": "1MiB"}
    assert note(config(weights, extra)) == note(config(weights, extra)) == 1
    assert note(config(weights, extra), "y") == 2
    other = config(weights, extra)
    other.cache_config.cache_dtype = "fp8"
    assert note(other) == 3
    moved = weights.rename(tmp_path / "moved")
    assert note(config(moved, extra)) == 3
    (moved / "model.safetensors").write_bytes(b"Weights")
    assert note(config(moved, extra)) == 4
    assert note(config(moved, extra | {"fingerprint": "mine"})) == 5
    (moved / "model.safetensors").unlink()
    assert note(config(moved, extra | {"fingerprint": "mine"})) == 5
    with pytest.raises(InvalidOperation, match="model: expected a folder with weights"):
        note(config(moved, extra))
    dummy = config(moved, extra)
    dummy.load_config.load_format = "dummy"
    with pytest.raises(InvalidOperation, match="load_format"):
        note(dummy)


def test_what_is_not_supported_is_said_at_the_start(connector, weights):
    extra = {"host": "1MiB"}
    with pytest.raises(InvalidOperation, match="one group of layers, got 2"):
        connector.PagedKvConnector(config(weights, extra), Role.WORKER, pool(2))
    with pytest.raises(InvalidOperation, match="attend to all tokens, got Window"):
        connector.PagedKvConnector(config(weights, extra), Role.WORKER, pool(spec=Window()))
    with pytest.raises(InvalidOperation, match="attend to all tokens, got Window"):
        connector.PagedKvConnector(config(weights, extra), Role.WORKER, pool(spec=Uniform(Full(), Window())))
    connector.PagedKvConnector(config(weights, extra), Role.WORKER, pool(spec=Uniform(Full(), Full())))
    with pytest.raises(InvalidOperation, match="pipeline_parallel_size"):
        connector.PagedKvConnector(config(weights, extra, pipeline_parallel_size=2), Role.WORKER, pool())
    with pytest.raises(InvalidOperation, match="disk, host or resp"):
        connector.PagedKvConnector(config(weights, {}), Role.WORKER, pool())
    half = connector.PagedKvConnector(config(weights, extra, tensor_parallel_size=2), Role.SCHEDULER, pool())
    facts = [connector.WorkerFacts(8, "x", host) for host in ("here", "there")]
    with pytest.raises(InvalidOperation, match="alike on one machine"):
        half.set_xfer_handshake_metadata({rank: connector.Handshake(each) for rank, each in enumerate(facts)})


def test_what_several_workers_did_is_added_up(connector):
    one, other = (connector.StepDone(Done(Counter({1: 1}), Counter({2: count}))) for count in (1, 0))
    both = one.aggregate(other).done
    assert both.copied == {1: 2} and both.failed == {2: 1}


def test_without_vllm_the_import_says_so():
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    import pagedkv.vllm

    with pytest.raises(MissingExtra, match="vllm is not installed"):
        pagedkv.vllm.PagedKvConnector  # noqa: B018
    with pytest.raises(AttributeError):
        pagedkv.vllm.Connector  # noqa: B018
    done = subprocess.run(
        [sys.executable, "-c", "from pagedkv.vllm import PagedKvConnector"], capture_output=True, text=True, timeout=120
    )
    assert "MissingExtra: vllm is not installed; install it with: pip install 'pagedkv[vllm]'" in done.stderr
