"""How several processes train one model: each holds all of it (DDP) or a part (FSDP2).

    lightning:
      strategy: {target: ldm.training.strategies.FSDP2, params: {timeout: 300, sharded_checkpoints: true}}

By default several devices or ranks use `DDP()`. Data, mathematics and checkpoints are the same with either and on one
device: a run may be resumed with another strategy and on another number of ranks.
"""

import secrets
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from ldm.checkpoints import sharded_state, shards
from ldm.checkpoints.store import is_untrained
from ldm.ranges import Positive
from ldm.runtime import distributed, fsdp
from ldm.training import lightning_internals
from ldm.training.callbacks.checkpoints import AtomicCheckpointIO

TIMEOUT = 300.0
"""Seconds that a rank waits for another before it considers it lost; Lightning's default is half an hour."""
START = 600.0
"""The least seconds that it waits for the others to connect: a rank may have to wait for its machine, and imports."""


class DDP(DDPStrategy):
    """Every rank holds the whole model, and gradients are averaged.

    Args:
        timeout: seconds that a rank waits for another before the run ends.
        backend: "gloo" or "nccl"; None: chosen by device.
    """

    def __init__(self, timeout: Positive = TIMEOUT, backend: str | None = None) -> None:
        super().__init__(timeout=timedelta(seconds=max(timeout, START)), process_group_backend=backend)
        self.timeout = timeout

    def setup_environment(self) -> None:
        super().setup_environment()
        distributed.set_timeout(self.timeout)


class FSDP2(ModelParallelStrategy):
    """Every rank holds its rows of each parameter of the denoiser and of its average; for stage 2.

    Args:
        timeout: seconds that a rank waits for another before the run ends.
        backend: "gloo" or "nccl"; None: chosen by device.
        sharded_checkpoints: every rank saves its own rows; otherwise rank 0 gathers them into one file, the same that
            DDP writes. Either can be resumed on any number of ranks and with any strategy.
    """

    def __init__(
        self, timeout: Positive = TIMEOUT, backend: str | None = None, sharded_checkpoints: bool = False
    ) -> None:
        waits = timedelta(seconds=max(timeout, START))
        super().__init__(tensor_parallel_size=1, timeout=waits, process_group_backend=backend)
        self.sharded_checkpoints = sharded_checkpoints
        self.timeout = timeout

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning's own class does it while it loads the file; here it is done by `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        lightning_internals.shard_over_all_ranks(self)
        super().setup_environment()
        distributed.set_timeout(self.timeout)  # for the groups of the mesh as well

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._saved(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._saved(inner.state_dict())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Hand the state to the writer: on rank 0, or each rank its own share."""
        if not self.sharded_checkpoints:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath)
            return
        # Only rank 0 knows the run folder; each save has shards of its own, so that it never touches the last one's.
        path, token = self.broadcast((str(filepath), secrets.token_hex(4)))
        folder = f"{Path(path).name}.{token}{shards.SUFFIX}"
        self.checkpoint_io.save_checkpoint(sharded_state.cut(checkpoint, folder, self.timeout), path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The state; of a sharded checkpoint only this rank's rows are read."""
        files = self.checkpoint_io
        assert isinstance(files, AtomicCheckpointIO), "ldm.training.trainer.make_trainer puts it there"
        return files.load(checkpoint_path, partial(sharded_state.rows, mesh=self.device_mesh["data_parallel"]))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        fsdp.load_weights(self.lightning_module, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if is_untrained(checkpoint):
            return
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            fsdp.load_optimizer(optimizer, state)

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()  # Lightning's class does not

    def _saved(self, state: Any) -> Any:
        return state if self.sharded_checkpoints else sharded_state.gathered(state)
