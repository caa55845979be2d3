"""Options: what each stands for, and errors that say which is wrong."""

from __future__ import annotations

import pytest

from pagedkv import InvalidOperation
from pagedkv.tiers import BlockFormat, DiskTier, HostTier, RespTier
from pagedkv.vllm import ConnectorOptions


def test_tiers_come_nearest_first(tmp_path):
    said = {"disk": str(tmp_path), "disk_size": "1MiB", "resp": "valkey://host:1/0", "host": "1MiB", "ttl": 60}
    tiers = ConnectorOptions.of(said).tiers("replica-3")
    assert [type(tier) for tier in tiers] == [HostTier, DiskTier, RespTier]
    assert tiers[1].directory == tmp_path / "replica-3"


def test_memory_of_the_host_is_none_of_the_device(monkeypatch):
    def refuse():
        raise AssertionError("the scheduler's process has to leave the device alone")

    monkeypatch.setattr("pagedkv.tiers.host.cuda_devices", refuse)
    with pytest.raises(AssertionError):
        HostTier(64).open(BlockFormat("model", 4, 8))
    (tier,) = ConnectorOptions.of({"host": 64}).tiers()
    with tier.open(BlockFormat("model", 4, 8)):
        assert tier.match([1, 2, 3, 4]).result() == 0


def test_one_of_them_is_enough():
    assert len(ConnectorOptions.of({"host": 1 << 20}).tiers()) == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, "disk, host or resp"),
        ({"disc": "/x"}, "expected an option of the connector: host, disk"),
        ({"disk": ""}, "disk: expected a path"),
        ({"disk": 3}, "disk: expected a path"),
        ({"disk": "/x", "disk_size": "much"}, "size"),
        ({"disk": "/x", "durable": "yes"}, "durable"),
        ({"host": "1GiB", "staging": 0}, "staging"),
        ({"host": "1GiB", "patience": 0}, "patience"),
        ({"host": "1GiB", "fingerprint": ""}, "fingerprint"),
        ({"resp": "http://host"}, "url"),
        ({"resp": "valkey://host", "ttl": 0}, "ttl"),
    ],
)
def test_what_is_wrong_is_said(said, words):
    with pytest.raises(InvalidOperation, match=words):
        ConnectorOptions.of(said)
