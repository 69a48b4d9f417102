"""The launcher files that come with qfarm, against Ray's own schema and what it does not look at; the KubeRay file."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import packaging.requirements
import packaging.version
import pytest
import yaml

from tests.simulated_aws import simulated_aws

ROOT = Path(__file__).parents[1]
AWS, ON_PREMISES = ROOT / "cluster.yaml", ROOT / "docs" / "cluster_on_premises.yaml"
KUBERNETES = ROOT / "docs" / "cluster_kubernetes.yaml"
LAUNCHED = pytest.mark.parametrize("path", [AWS, ON_PREMISES], ids=lambda path: path.name)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def faults(config: dict[str, Any]) -> list[str]:
    """What keeps the launcher from doing as it is told: Ray's schema, and what that lets pass."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    found = []
    types = config.get("available_node_types", {})
    if "max_workers" not in config:
        found.append("no max_workers")
    if config["provider"]["type"] == "aws":
        found += [f"provider.{name}" for name in set(config["provider"]) - {"type", "region", "cache_stopped_nodes"}]
        found += ["no region"] if not config["provider"].get("region") else []
        found += [f"{name}: no ImageId" for name, kind in types.items() if "ImageId" not in kind["node_config"]]
    elif config["provider"]["type"] == "local":
        hosts = len(config["provider"]["worker_ips"])
        if not config.get("min_workers") == config.get("max_workers") == hosts:
            found.append(f"{hosts} worker_ips, but other min_workers or max_workers")
    for name, kind in types.items():
        if kind.get("min_workers", 0) > kind.get("max_workers", 0):
            found.append(f"{name}: min_workers over max_workers")
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except Exception as error:  # of several kinds, TypeError among them
        found.append(str(error).splitlines()[0])
    return found


@LAUNCHED
def test_ray_takes_the_file(path: Path) -> None:
    assert faults(read(path)) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda config: config.update(idle_timeout=5), "idle_timeout"),
        (lambda config: config["available_node_types"]["gpu"].update(min_worker=1), "min_worker"),
        (lambda config: config.update(head_node_type="main"), "head_node_type"),
        (lambda config: config.update(setup_commands="true"), "list"),
        (lambda config: config["available_node_types"]["gpu"].update(min_workers=9), "min_workers over max_workers"),
        (lambda config: config["provider"].pop("region"), "no region"),
        (lambda config: config["provider"].update(regions="x"), "provider.regions"),
        (lambda config: config.pop("max_workers"), "no max_workers"),
        (lambda config: config["available_node_types"]["head"]["node_config"].pop("ImageId"), "head: no ImageId"),
    ],
)
def test_a_fault_in_the_file_is_seen(change: Any, fault: str) -> None:
    config = read(AWS)
    change(config)
    assert any(fault in found for found in faults(config)), faults(config)


def test_the_head_is_on_demand_without_gpu_and_workers_are_on_spot() -> None:
    config = read(AWS)
    head, gpu = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert config["head_node_type"] == "head" and head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["min_workers"] == 0 < gpu["max_workers"] and gpu["resources"]["GPU"] == 1
    assert config["head_setup_commands"] == []


@LAUNCHED
def test_every_start_wants_a_token_reports_nothing_and_hides_gpus_from_those_who_asked_for_none(path: Path) -> None:
    config = read(path)
    [profile] = [command for command in config["setup_commands"] if "bashrc" in command]
    for setting in ("RAY_AUTH_MODE=token", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1", "PATH=~/qfarm-env/bin"):
        assert setting in profile
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert [start.count("--disable-usage-stats") for start in starts if "ray start" in start] == [1, 1]
    assert "~/.ray/auth_token" in config["file_mounts"]
    # The hub's token lies in memory, where the libraries look for it.
    [mount] = [there for there, here in config["file_mounts"].items() if here == "~/.cache/huggingface/token"]
    assert mount.startswith("/dev/shm/") and f"HF_TOKEN_PATH={mount}" in profile
    assert "--dashboard-host" not in str(starts)  # on loopback; qfarm comes through ssh


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"(torch|ray)(?:\[default\])?==([\d.]+)", text))


def required(name: str) -> packaging.requirements.Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [found] = [
        one for line in project["dependencies"] if (one := packaging.requirements.Requirement(line)).name == name
    ]
    return found


@LAUNCHED
def test_pinned_versions_are_those_that_qfarm_wants(path: Path) -> None:
    found = pins(path.read_text())
    assert set(found) == {"torch", "ray"}
    for name, version in found.items():
        assert required(name).specifier.contains(version), name
    assert re.search(r"torch==\S+ --index-url https://download\.pytorch\.org/whl/cu\d+", path.read_text())
    assert found == pins(AWS.read_text())


def test_extras_that_are_installed_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path in (AWS, ON_PREMISES):
        for extras in re.findall(r"/qfarm\[([\w,]+)\]", path.read_text()):
            assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_the_ray_job_for_kubernetes() -> None:
    """Nothing here knows KubeRay's schema: names of fields are held against those of its documentation."""
    job = read(KUBERNETES)
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(spec) == {
        *("entrypoint", "runtimeEnvYAML", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
        *("activeDeadlineSeconds", "backoffLimit", "rayClusterSpec"),
    }
    assert set(cluster) == {
        *("rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"),
    }
    assert spec["backoffLimit"] == 0 and spec["shutdownAfterJobFinishes"] is True
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) == {"env_vars"}
    head, [workers] = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(workers) == {
        *("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    }
    assert workers["replicas"] == workers["minReplicas"] == 0 < workers["maxReplicas"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    values = [*head["rayStartParams"].values(), *workers["rayStartParams"].values()]
    assert all(isinstance(value, str) for value in values)
    [of_head], [of_worker] = (one["template"]["spec"]["containers"] for one in (head, workers))
    # Once per worker, and not again as a parameter of `ray start`.
    assert of_worker["resources"]["limits"]["nvidia.com/gpu"] == 1 and "num-gpus" not in workers["rayStartParams"]
    assert "nvidia.com/gpu" not in str(of_head["resources"])
    environment = {one["name"]: one.get("value") for one in of_worker["env"]}
    assert of_head["env"] == of_worker["env"] and environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN"] is environment["HF_TOKEN"] is None  # from secrets
    pinned = pins(AWS.read_text())
    assert cluster["rayVersion"] == pinned["ray"] and of_head["image"] == of_worker["image"]
    assert of_head["image"].partition(":")[2].startswith(pinned["ray"])


def test_the_entrypoint_for_kubernetes_is_a_command_of_qfarm() -> None:
    from qfarm import cli

    words = read(KUBERNETES)["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "qfarm"] and words[3] in cli.group.commands
    assert (ROOT / words[4]).is_file()


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """moto's AWS, with the instance profile of docs/cluster.md; a key pair goes into a home of our own."""
    import boto3

    monkeypatch.setenv("HOME", str(tmp_path))
    with simulated_aws("us-west-2"):
        boto3.client("iam").create_instance_profile(InstanceProfileName="qfarm")
        yield


@pytest.mark.slow
def test_rays_provider_makes_spot_nodes_with_our_profile_on_a_simulated_aws(
    aws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names in node_config, which Ray's schema does not know, are botocore's; the image's name is not resolved here."""
    import boto3
    import botocore.exceptions
    from ray.autoscaler._private import commands
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND

    monkeypatch.setattr("ray.autoscaler._private.aws.config.time.sleep", lambda seconds: None)
    image = boto3.client("ec2").describe_images()["Images"][0]["ImageId"]
    config = read(AWS)
    for kind in config["available_node_types"].values():
        kind["node_config"]["ImageId"] = image
    config = commands._bootstrap_config(config, no_config_cache=True)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for name, lifecycle in (("head", None), ("gpu", "spot")):
        node = config["available_node_types"][name]["node_config"]
        provider.create_node(node, {TAG_RAY_NODE_KIND: name}, 1)
        found = boto3.client("ec2").describe_instances(Filters=[{"Name": f"tag:{TAG_RAY_NODE_KIND}", "Values": [name]}])
        [instance] = [one for group in found["Reservations"] for one in group["Instances"]]
        assert instance.get("InstanceLifecycle") == lifecycle
        assert instance["InstanceType"] == read(AWS)["available_node_types"][name]["node_config"]["InstanceType"]
        assert instance["IamInstanceProfile"]["Arn"].endswith("instance-profile/qfarm")
    node = config["available_node_types"]["gpu"]["node_config"] | {"InstanceMarketOption": {}}
    with pytest.raises(botocore.exceptions.ParamValidationError, match="InstanceMarketOption"):
        provider.create_node(node, {TAG_RAY_NODE_KIND: "gpu"}, 1)
