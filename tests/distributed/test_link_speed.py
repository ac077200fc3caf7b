"""Groups of ranks that are measured together, and the figures of a link."""

import pytest
import torch

from reid.distributed.link_speed import Link, _between, _within, measure


@pytest.mark.parametrize(
    ("hosts", "within", "between"),
    [
        (["a"], {}, {}),
        (["a", "a"], {}, {}),  # the same as all ranks
        (["a", "b"], {}, {"a - b": [0, 1]}),
        (["a", "a", "b", "b"], {"within a": [0, 1], "within b": [2, 3]}, {"a - b": [0, 2]}),
        (["a", "b", "a", "b"], {"within a": [0, 2], "within b": [1, 3]}, {"a - b": [0, 1]}),
        (["a", "a", "b"], {"within a": [0, 1]}, {"a - b": [0, 2]}),
        (["a", "b", "c"], {}, {"a - b": [0, 1], "b - c": [1, 2], "c - a": [0, 2]}),
    ],
)
def test_nodes_and_their_neighbours(hosts, within, between):
    assert _within(hosts) == within
    assert _between(hosts) == between


def test_the_bandwidth_is_what_a_rank_sends_in_a_ring():
    assert Link("a - b", 2, 1e-3, 1.0).bandwidth == 2**25
    assert Link("all ranks", 4, 1e-3, 2.0).bandwidth == pytest.approx(1.5 * 2**25 / 2)


def test_one_rank_has_no_links():
    assert measure(torch.device("cpu")) == []
