"""A sweep on a real Ray cluster of two nodes gives what local processes give."""

from __future__ import annotations

import pytest

from moesim.errors import SweepError
from moesim.plan.processes import Processes
from moesim.plan.ray_cluster import RayCluster
from moesim.plan.results import REFUSED, read_rows, schema
from moesim.plan.sweep import sweep


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)
    yield cluster.address
    cluster.shutdown()


def test_two_nodes_answer_what_two_processes_answer(address, points, tmp_path):
    tally = sweep(points, tmp_path / "ray", RayCluster(address))
    assert (tally.points, tally.refused, tally.failed) == (12, 3, 0)
    sweep(points, tmp_path / "here", Processes(2))
    rows = read_rows(tmp_path / "ray", schema().names)
    assert rows == read_rows(tmp_path / "here", schema().names)
    assert sum(row["status"] == REFUSED for row in rows) == 3
    assert sweep(points, tmp_path / "ray", RayCluster("nowhere:1")).before == 12, "nothing to do, nobody to ask"


def test_no_cluster_is_said_in_one_line(points, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(SweepError, match=r"no Ray cluster at 127\.0\.0\.1:1 .*ray start --head"):
        sweep(points, tmp_path / "none", RayCluster("127.0.0.1:1"))
