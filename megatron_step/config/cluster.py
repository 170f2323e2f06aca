"""The machines that a run is planned for."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from megatron_step.config.numbers import check_finite
from megatron_step.config.paths import expand_path


@dataclass(frozen=True)
class NodeGroup:
    """A group of identical nodes."""

    count: int
    """Number of nodes."""
    gpus_per_node: int
    """GPUs of a node; tensor-parallel ranks share a node."""
    memory_gib: float
    """Memory of a GPU that a run may fill, in GiB, without the memory that the framework and NCCL take."""
    relative_speed: float = 1.0
    """Speed of a GPU as a multiple of `Cluster.teraflops`."""
    bandwidth_inside: float = 450.0
    """GB/s that a GPU sends to the other GPUs of its node."""
    bandwidth_between: float = 50.0
    """GB/s that a GPU sends to other nodes."""

    def __post_init__(self) -> None:
        for name in ("count", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"nodes.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("memory_gib", "relative_speed", "bandwidth_inside", "bandwidth_between"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"nodes.{name} must be a positive number, not {getattr(self, name)}")


@dataclass(frozen=True)
class Cluster:
    """Node groups, in the order in which the launcher numbers their nodes."""

    nodes: list[NodeGroup]
    """The node groups."""
    teraflops: float = 400.0
    """TFLOP/s that a GPU of relative speed 1 sustains in the dense matrix products of training."""

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError("nodes is empty: name at least one group of nodes")
        if not 0 < self.teraflops < inf:
            raise ValueError(f"teraflops must be a positive number, not {self.teraflops}")

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(group.count * group.gpus_per_node for group in self.nodes)


@dataclass(frozen=True)
class PlannerConfig:
    """The planner's objective and its machines."""

    objective: Literal["memory", "time", "memory_then_time"] = "memory"
    """Quantity to minimise. memory: the largest share of a rank's memory over all stages; among equal plans, the one
    that is deep early wins. time: seconds of the whole run, within the cluster's memory. memory_then_time: the fastest
    plan among those with the smallest share."""
    cluster: str | None = None
    """YAML file with the machines; null for equal ranks with unlimited memory."""
    plan: str | None = None
    """File of a plan that megatron-step plan wrote, whose layers and layouts the run takes; null to make a new plan."""
    attention: Literal["sdpa", "unfused"] = "sdpa"
    """Core attention whose bytes are counted. Training always uses sdpa (scaled_dot_product_attention). unfused is for
    plans only: attention that keeps every score, as in megatron-core's local spec."""
    recipe: Literal["paper", "adam8bit", "int8_base", "adam8bit_int8_base"] | None = None
    """Bytes per value of weights, gradients and optimizer states (plan/states.py); null takes those of
    training.precision, as training does. The others are for plans only: the paper's, 8-bit moments, an 8-bit frozen
    base."""
    time_limit: float = 60.0
    """Seconds after which the planner returns its best plan so far and says how far from the optimum it may be."""

    def __post_init__(self) -> None:
        check_finite("planner", self)
        for name in ("cluster", "plan"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, expand_path(getattr(self, name)))
        if self.objective == "time" and self.cluster is None:
            raise ValueError(
                "planner.objective time needs the memory of the machines: set planner.cluster to a cluster file"
            )
        if not self.time_limit > 0:
            raise ValueError(f"planner.time_limit must be positive, not {self.time_limit}")

    @property
    def plan_only_keys(self) -> str:
        """Keys and values that make a plan count features that training does not have; empty if there are none."""
        keys = {"attention": self.attention != "sdpa", "recipe": self.recipe is not None}
        return ", ".join(f"planner.{key} {getattr(self, key)}" for key, differs in keys.items() if differs)
