"""Save the training state: sharded, atomic, and either at once or while training goes on."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_step.checkpoint import directory
from megatron_step.checkpoint.manifest import Manifest, content_files, file_table
from megatron_step.checkpoint.sharding import in_pieces, sharded_optimizer_states
from megatron_step.checkpoint.writer import TensorWriter
from megatron_step.config.run import CheckpointConfig
from megatron_step.engine.agreement import current_ranks
from megatron_step.engine.compat.checkpoints import writer_class
from megatron_step.engine.host_memory import left_out_of_forks
from megatron_step.engine.parallel import Parallel, first_problem
from megatron_step.model.build import sharded_weights
from megatron_step.plan.states import Recipe

_SPARE_BYTES = 16 << 20  # room for the small files of a checkpoint


class SaveError(RuntimeError):
    """A checkpoint could not be written; earlier checkpoints are unchanged. Raised on every rank."""


class CheckpointSaver:
    """Writes checkpoints into one folder. Every method must be called on every rank."""

    def __init__(self, folder: Path, config: CheckpointConfig, parallel: Parallel) -> None:
        self._folder = folder
        self._config = config
        self._parallel = parallel
        self._queue = AsyncCallsQueue()
        self._pending: tuple[Path, dict[str, Any]] | None = None  # folder and manifest of an asynchronous save
        if parallel.is_main:
            directory.remove_partial(folder)
        torch.distributed.barrier()

    def save(
        self,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        recipe: Recipe,
        step: int,
        description: dict[str, Any],
    ) -> int:
        """Save weights and optimizer states after `step` steps, and return the bytes that this rank writes.

        `description` completes the manifest. An asynchronous save returns when the state is copied to the host and the
        writer has started; `poll` or `finish` publishes the checkpoint.

        Raises SaveError if there is no room or a file cannot be written.
        """
        self.finish()
        weights = sharded_weights(chunks, self._parallel)
        tensors = {**in_pieces(weights), **sharded_optimizer_states(optimizer, weights, recipe, saving=True)}
        partial = self._make_partial(step, tensors.values())
        manifest = {"step": step, **description}
        with writer_class(TensorWriter):
            request = dist_checkpointing.save(
                # One dictionary: megatron-core would reject an empty one, of a rank without optimizer states, as a
                # difference between ranks.
                {"tensors": tensors},
                str(partial),
                sharded_strategy=TorchDistSaveShardedStrategy("torch_dist", 1),
                async_sharded_save=True,
            )
        if self._config.asynchronous:
            # The next step zeroes the gradients, so the process that writes needs none of them.
            with left_out_of_forks(buffer.grad_data for chunk in chunks for buffer in chunk.buffers):
                self._queue.schedule_async_request(request)
            self._pending = (partial, manifest)
        else:
            # Leave out the function that copies all tensors to the host: each tensor is copied when it is written.
            at_once = AsyncRequest(request.async_fn, request.async_fn_args, request.finalize_fns)
            self._guard(at_once.execute_sync, step)
            self._publish(partial, manifest)
        return sum(map(_own_bytes, tensors.values()))

    def poll(self) -> None:
        """Publish a pending asynchronous checkpoint if every rank has written its part.

        Raises SaveError if the checkpoint could not be written.
        """
        self._collect(blocking=False)

    def finish(self) -> None:
        """Wait for a pending asynchronous checkpoint and publish it.

        Raises SaveError if the checkpoint could not be written.
        """
        self._collect(blocking=True)

    def _collect(self, blocking: bool) -> None:
        if self._pending is None:
            return
        partial, manifest = self._pending
        try:
            done = self._guard(lambda: self._queue.maybe_finalize_async_calls(blocking=blocking), manifest["step"])
        except SaveError:
            self._pending = None
            raise
        if done:
            self._pending = None
            self._publish(partial, manifest)

    def _make_partial(self, step: int, shards: Iterable[ShardedTensor]) -> Path:
        """Return the folder to write into, the same on every rank; raise SaveError if the disk lacks room."""
        own = torch.tensor(sum(map(_own_bytes, shards)), dtype=torch.int64, device=self._parallel.device)
        torch.distributed.all_reduce(own)
        needed = int(own) + _SPARE_BYTES

        def make() -> Path:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self._folder).free
                if free < needed:
                    raise OSError(f"it needs {needed / 2**20:,.0f} MiB, but only {free / 2**20:,.0f} MiB are free")
                return directory.make_partial(self._folder, step)
            except OSError as error:
                raise SaveError(f"cannot save the checkpoint of step {step} in {self._folder}: {error}") from error

        return current_ranks().from_main(make)

    def _guard(self, write: Callable[[], Any], step: int) -> Any:
        """Run a write, and report its failure as a SaveError on every rank."""
        try:
            return write()
        except CheckpointException as error:
            # Only the coordinating rank knows the causes.
            causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
            # torch reports a full disk as an unexpected file position, so the free room decides.
            free = shutil.disk_usage(self._folder).free / 2**20
            self._raise_together(f"{causes}; {free:,.0f} MiB are free" if causes else None, step)
            raise

    def _publish(self, partial: Path, manifest: dict[str, Any]) -> None:
        """Write the manifest, give the checkpoint its name, and remove checkpoints that are not kept."""
        rank, world_size, step = self._parallel.global_rank, self._parallel.world_size, manifest["step"]
        table: dict[str, tuple[int, int]] = {}
        problem = None
        try:
            table = file_table(partial, content_files(partial)[rank::world_size])
        except OSError as error:
            problem = str(error)
        self._raise_together(problem, step)
        tables: list[dict[str, tuple[int, int]]] = [{} for _ in range(world_size)]
        torch.distributed.all_gather_object(tables, table)
        if self._parallel.is_main:
            files = {name: entry for part in tables for name, entry in part.items()}
            try:
                Manifest(**manifest, files=dict(sorted(files.items()))).write(partial)
                directory.publish(partial, step)
                directory.prune(self._folder, step, self._config.keep, self._config.keep_every)
            except OSError as error:
                problem = str(error)
        self._raise_together(problem, step)

    def _raise_together(self, problem: str | None, step: int) -> None:
        """If a rank has a problem, remove the written files and raise SaveError on every rank."""
        problem = first_problem(problem)
        if problem is None:
            return
        if self._parallel.is_main:
            directory.remove_partial(self._folder)
        torch.distributed.barrier()
        raise SaveError(f"cannot save the checkpoint of step {step} in {self._folder}: {problem}")


def _own_bytes(shard: ShardedTensor) -> int:
    """Return the bytes that this rank writes of a tensor."""
    return shard.data.nbytes if is_main_replica(shard.replica_id) else 0
