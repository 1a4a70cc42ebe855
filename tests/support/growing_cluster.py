"""A cluster of one machine that grows by itself: Ray's autoscaler over its fake provider, whose nodes are processes of this machine.

As `ray.cluster_utils.AutoscalingCluster`, which isn't used since its `start` ends every Ray of the machine; this ends what it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.support.ports import free_ports

# What the autoscaler wants to be named even where nothing is done by it.
LISTS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
REST = {f"{name}_commands": [] for name in LISTS} | {"file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": [], "rsync_filter": []}
PROVIDER = {"type": "fake_multinode", "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}


@contextlib.contextmanager
def growing_cluster(cpus: int, label: str = "", **group: float) -> Iterator[str]:
    """The address of a head with `cpus` and a node `label`, beside which the autoscaler starts nodes when they are asked for.

    group: resources of such a node, and `most`, how many of them there may be; with most=0 none will come, whatever the label says.
    """
    port, client_port = free_ports(2)
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # socket paths below it must stay short
    address, log = f"127.0.0.1:{port}", Path(folder) / "head.log"
    most = int(group.pop("most", 1))
    config = REST | {
        "cluster_name": "growing",
        "max_workers": most,
        "idle_timeout_minutes": 5,
        "provider": PROVIDER | {"gcs_address": address},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0},
            "group": {"resources": group | {"object_store_memory": 100 << 20}, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "file_mounts_sync_continuously": False,
        "auth": {},
    }
    (Path(folder) / "autoscaling.json").write_text(json.dumps(config))
    command = f"""{Path(sys.executable).parent}/ray start --head --block --disable-usage-stats --include-dashboard false --port {port}
        --node-ip-address 127.0.0.1 --temp-dir {folder} --ray-client-server-port {client_port} --include-log-monitor false
        --num-cpus {cpus} --num-gpus 0 --object-store-memory {100 << 20} --min-worker-port 0 --max-worker-port 0
        --autoscaling-config {folder}/autoscaling.json"""
    wanted = [*command.split(), *(["--labels", label] if label else [])]
    environment = os.environ | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with log.open("wb") as out:
        head = subprocess.Popen(wanted, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while "block forever" not in log.read_text():
            assert head.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)
        yield address
    finally:
        for process in psutil.process_iter():  # the nodes too are processes of its session
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) == head.pid:
                    process.kill()
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
