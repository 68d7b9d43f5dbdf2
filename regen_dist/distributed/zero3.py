"""DeepSpeed ZeRO-3 behind the engine interface, and the registry of engines. Only this module and optimizer.py import
deepspeed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from regen_dist.config.identity import check_partition_size, micro_batch_size, num_readers
from regen_dist.config.run import CommonConfig
from regen_dist.distributed.engine import WEIGHTS, Engine, PlainEngine, StepResult, full_shape
from regen_dist.distributed.optimizer import build_optimizer, fresh_state, set_lr, set_num_updates
from regen_dist.distributed.ranks import Ranks, chunk
from regen_dist.distributed.sequence_parallel import join_rows
from regen_dist.models.sequence_parallel import share_rows
from regen_dist.registry import Entry, Registry, Site


class Zero3Engine(Engine):
    """DeepSpeed ZeRO-3: weights, gradients, masters, moments and EMA all sharded over the ranks."""

    def __init__(self, config: CommonConfig, ranks: Ranks, build: Callable[[], nn.Module]) -> None:
        super().__init__(config, ranks)
        deepspeed = _import_deepspeed(ranks)
        settings = deepspeed_settings(config, ranks.world_size)
        # Partitioned: sharded as it is built, in the working precision, so that the initial weights are rounded to it.
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=config.engine.partitioned_init):
            module = build()
        exact = {name: self._chunk_of(param).float().clone() for name, param in module.named_parameters()}
        optimizer = build_optimizer(config.optimizer, module.parameters(), ranks.device, engine="zero3")
        self._engine, self._zero, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.module = self._engine.module
        for part in self.module.modules():
            _trace_once(part)
        self._params: dict[str, Any] = dict(self.module.named_parameters())  # with the attributes that ZeRO-3 adds
        for name, master in self.named_masters():  # DeepSpeed makes the masters from the rounded working weights
            master.detach().copy_(exact.pop(name))  # freed before moments and EMA are allocated
        for group in self._zero.fp32_partitioned_groups_flat:
            self._zero.optimizer.state[group] = fresh_state(config.optimizer, group)
        self._start()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        # `_engine.step` clips and clears them: this is the only place between the last reduction and that.
        for name, param in self._params.items():
            low, high = chunk(param.ds_numel, self.ranks.world_size, self.ranks.rank)
            yield name, self._zero.get_local_fp32_grad_for_param(param)[: high - low]

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine, for measurements of what it does without us."""
        return self._engine

    def _own(self, name: str, moment: str | None) -> Tensor:
        param = self._params[name]
        low, high = chunk(param.ds_numel, self.ranks.world_size, self.ranks.rank)
        piece: Tensor = self._zero.get_local_fp32_param(param, moment)[: high - low]
        return piece

    def _chunk_of(self, param: Any) -> Tensor:
        """This rank's chunk of a parameter that DeepSpeed has not taken over yet, sharded or not."""
        whole = prod(full_shape(param))
        low, high = chunk(whole, self.ranks.world_size, self.ranks.rank)
        own: Tensor = (
            param.ds_tensor[: high - low] if hasattr(param, "ds_tensor") else param.detach().flatten()[low:high]
        )
        return own

    def _forward(self, *args: Any) -> Any:
        return self._engine(*args)

    def _update(self, lr: float) -> StepResult:
        set_lr(self._zero.optimizer, lr)
        self._engine.step()
        # DeepSpeed overwrites the gradients of the parameters that took part, and would use those of the others again
        # (the motion path in a step of images).
        self._zero.grad_partitions_flat_buffer.zero_()
        return StepResult(self._engine.was_step_applied(), float(self._engine.get_global_grad_norm() or 0.0))

    def _after_restore(self) -> None:
        """Write the working weights and the small weights anew: ZeRO-3 keeps the former apart from the masters, and the
        latter whole on every rank."""
        set_num_updates(self._zero.optimizer, self.num_updates)
        self._zero.invalidate_secondary_tensor()  # hpZ's copies
        whole = self._zero.persistent_parameters
        if whole:
            whole[0].partition(whole)
        for param in self._params.values():
            param.ds_tensor.data.copy_(self._zero.get_local_fp32_param(param).view_as(param.ds_tensor))
        if whole:
            whole[0].all_gather(whole)


ENGINES: Registry[Entry[Callable[[CommonConfig, Ranks, Callable[[], nn.Module]], Engine]]] = Registry(
    "engine.kind",
    {"zero3": Entry(Zero3Engine, WEIGHTS), "plain": Entry(PlainEngine, WEIGHTS)},
)


def build_engine(config: CommonConfig, ranks: Ranks, build: Callable[[], nn.Module]) -> Engine:
    """Build the engine that the config names, around the module that `build` makes (the same on every rank)."""
    engine = ENGINES.available(config.engine.kind, Site(num_ranks=ranks.world_size)).build(config, ranks, build)
    engine.rows = join_rows(ranks, config.engine.sequence_parallel)
    share_rows(engine.module, engine.rows)
    return engine


def deepspeed_settings(config: CommonConfig, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's own config; everything in it is derived from ours.

    Raises:
        ConfigError: the number of ranks does not fit.
    """
    train, zero = config.train, config.engine.zero
    check_partition_size(config, world_size)
    # DeepSpeed does not know that ranks share samples: it assumes that each has samples of its own.
    batch = train.batch_global * config.engine.sequence_parallel
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch_size(
            train.batch_global, train.accumulation, num_readers(config, world_size)
        ),
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": config.engine.reduces_in(world_size),
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": config.engine.persistence_threshold,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket,
            "sub_group_size": zero.sub_group,
            "zero_hpz_partition_size": zero.partition_size,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }


def _trace_once(module: nn.Module) -> None:
    """Let ZeRO-3 count one backward pass for each call of a module, however many tensors the call returns.

    DeepSpeed counts, in `applied_pre_backward_ref_cnt`, a pass for each tensor: for a clip, which travels as two, twice
    as many as for an image. So where they take turns no step would be as the one before, and no weights would be
    gathered ahead. The weights stay until the gradients of all inputs are there, so one of the tensors may be the
    first. A call whose graph is never gone through counts nothing: one without gradients, or one that recomputes
    within a backward pass.
    """
    count, passes_before = "applied_pre_backward_ref_cnt", dict[nn.Module, int]()

    def before(module: nn.Module, inputs: Any) -> None:
        passes_before[module] = getattr(module, count, 0)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        recomputes = torch._C._current_graph_task_id() != -1
        counts = torch.is_grad_enabled() and not recomputes
        setattr(module, count, passes_before[module] + counts)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _import_deepspeed(ranks: Ranks) -> Any:
    os.environ["DS_ACCELERATOR"] = ranks.device.type  # always our device, whatever the shell sets
    import deepspeed
    from deepspeed.runtime import compiler

    # It decorates the functions of an optimizer that is not used here, and to do so imports all of the compiler: a
    # second or more of every rank's start.
    compiler.compile = lambda: lambda function: function
    if ranks.device.type == "cpu":  # on a GPU nothing asks for it, and this import starts compilers
        from deepspeed.ops import __compatible_ops__ as compatible

        # Its shared-memory operator serves inference only; building it takes minutes, and a killed build hangs every
        # later run.
        compatible["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
    return deepspeed
