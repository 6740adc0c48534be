"""Two Ray nodes of one CPU each on this machine, for a test.

Prints their address; for each line it reads, waits until the application runs and prints nodes and replicas. A process
of its own, because Ray warns and leaves threads where it is imported.
"""

import sys
import time

import ray
from ray import serve
from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        print(cluster.address, flush=True)  # noqa: T201
        ray.init(address=cluster.address, log_to_driver=False)
        for _ in sys.stdin:
            while (application := serve.status().applications["net"]).status != "RUNNING":
                time.sleep(0.2)
            print(len(ray.nodes()), application.deployments["Model"].replica_states, flush=True)  # noqa: T201
        serve.shutdown()
        ray.shutdown()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
