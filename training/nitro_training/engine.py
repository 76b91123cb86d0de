"""Where training runs: one process or several, by Hugging Face accelerate.

accelerate finds out how it was launched, joins the processes and wraps the student: `ddp` copies it to every process, `fsdp`
(FSDP2, `fully_shard`) spreads its weights, gradients and moments over them. The discriminator's heads are wrapped by neither:
every process draws the same ones, and `mean_gradients` averages what they learn. Sharded tensors are DTensors; `whole` and
`laid_out_like` of `nitro_training.sharding` take them to a checkpoint and back.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    fsdp2_prepare_model,
)
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from nitro_rt.errors import ConfigError, TrainingError
from nitro_training.loop import Losses
from nitro_training.sharding import skeleton, whole

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: as long as one of them may draw teacher samples or write a checkpoint alone."""
SHARDED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""What FSDP gathers at a time where the launch does not say: 87 blocks of SDXL's UNet, of at most 49 M of its 2,567 M
parameters; the 54 M outside them stay gathered from the forward to the end of the backward pass."""
_OTHERS_FAILED = ("gloo", "nccl", "connection", "timed out", "timeout", "peer", "socket")
_UNSUPPORTED = {
    "ACCELERATE_MIXED_PRECISION": (("no", ""), "the recipe's student.precision decides; launch with --mixed_precision no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1", ""), "the recipe's student.accumulation decides; leave the option out"),
    "ACCELERATE_DYNAMO_BACKEND": (("no", ""), "training is not compiled; launch with --dynamo_backend no"),
    "ACCELERATE_USE_DEEPSPEED": (("false", ""), "use DDP, or FSDP with --use_fsdp --fsdp_version 2"),
    "ACCELERATE_USE_MEGATRON_LM": (("false", ""), "use DDP, or FSDP with --use_fsdp --fsdp_version 2"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("false", ""), "use DDP, or FSDP with --use_fsdp --fsdp_version 2"),
    "FSDP_VERSION": (("2", ""), "only FSDP2 keeps this run's optimisers and checkpoints; launch with --fsdp_version 2"),
}


class Engine:
    """One process, or one of several that train together; `strategy` is `single`, `ddp` or `fsdp`.

    Methods marked *together* talk to the other processes: every process has to call them, in the same order.
    """

    def __init__(self) -> None:
        """Join the processes that were launched together.

        Raises: ConfigError if the launch asks for what this engine does not do; TrainingError if the processes do not meet.
        """
        _require_supported(os.environ)
        self._owns_state = not is_initialized()
        with _peers("to start"):
            self._accelerator = Accelerator(
                cpu=not torch.cuda.is_available(),
                mixed_precision="no",
                kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
            )
        self.device = self._accelerator.device
        self.rank, self.num_processes = self._accelerator.process_index, self._accelerator.num_processes
        self.is_main = self.rank == 0
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.num_processes:
            raise ConfigError(
                f"{launched} processes were launched, accelerate joined {self.num_processes}; "
                "launch with `accelerate launch --multi_gpu --num_processes N` (docs/scale-out.md)"
            )
        wants_shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        self.strategy = "single" if self.num_processes == 1 else "fsdp" if wants_shards else "ddp"
        if self.strategy == "fsdp":
            self._use_fsdp()
        self._skeletons: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._devices = self._gather(_device_name(self.device))

    def _use_fsdp(self) -> None:
        """accelerate reads FSDP's options on GPUs only: on a CPU it would train by DDP without a word. Its FSDP2 code itself
        runs there as it does on GPUs, so the state is told here what was asked for."""
        blocks = {} if os.environ.get("FSDP_AUTO_WRAP_POLICY") else {
            "auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": list(SHARDED_BLOCKS)
        }  # fmt: skip
        state = self._accelerator.state
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # where accelerate looks it up anew
        state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **blocks)

    def prepare(self, model: nn.Module, optimizer: torch.optim.AdamW) -> tuple[nn.Module, torch.optim.AdamW]:
        """The model and its optimiser as this engine runs them. Together.

        DDP returns a wrapper and leaves `model` what it is; FSDP shards `model` itself, and the optimiser then holds shards.
        """
        if self.strategy == "single":
            return model, optimizer
        if self.strategy == "fsdp":
            self._remember(model)
        with _peers("to share the model"):
            prepared, wrapped = self._accelerator.prepare(model, optimizer)
        wrapper = FSDPModule if self.strategy == "fsdp" else DistributedDataParallel
        assert issubclass(type(prepared), wrapper), type(prepared)
        self._accelerator.free_memory()  # accelerate's own references would keep a finished stage's model alive
        # accelerate's optimiser would skip steps by a gradient accumulation of its own; a stage counts for itself
        return prepared, wrapped.optimizer

    def prepare_average(self, model: nn.Module) -> nn.Module:
        """A frozen copy of a prepared model (its moving average), laid out as the model is: under FSDP in shards. Together.

        Args:
            model: a copy made before `prepare`.
        """
        if self.strategy == "fsdp":
            self._remember(model)
            with _peers("to share the average"):
                return fsdp2_prepare_model(self._accelerator, model)
        return model

    def _remember(self, model: nn.Module) -> None:
        self._skeletons[model] = skeleton(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP shards no other layout

    def whole(self, model: nn.Module) -> nn.Module:
        """The model with all its weights: itself, except under FSDP, where it is a copy on every process's host. Together."""
        if model not in self._skeletons:
            return model
        with _peers("to gather the weights"):
            weights = {key: whole(value).cpu() for key, value in model.state_dict().items()}
        copy = skeleton(self._skeletons[model])
        copy.load_state_dict(weights, assign=True)
        return copy

    @contextmanager
    def accumulate(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """A micro-batch; gradients are averaged over the processes in the last one only. Together."""
        with _peers("in a training step"):
            if last or self.strategy == "single":
                yield
            else:
                with self._accelerator.no_sync(model):
                    yield

    def backward(self, loss: Tensor) -> None:
        """Gradients of the prepared model; in the last micro-batch together."""
        with _peers("in the backward pass"):
            loss.backward()

    def mean_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Average gradients over the processes, for parameters that no wrapper looks after (the drawn heads). Together.

        All gradients travel as one flat tensor: some 30 heads of 6 parameters are drawn, and each message has its latency.
        """
        if self.strategy == "single":
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.mean_tensors(gradients)

    def mean_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors of one type over the processes, in place and in one message. Together."""
        tensors = list(tensors)
        if self.strategy == "single" or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(self.device)
        with _peers("to average"):
            distributed.all_reduce(flat)
        flat /= self.num_processes
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(mean.view(tensor.shape))

    def clip(self, model: nn.Module, limit: float) -> float:
        """Clip the gradient's norm, over all shards where there are any; returns what it was. Together."""
        with _peers("to clip the gradient"):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
            return float(whole(norm))

    def mean(self, values: Losses) -> Losses:
        """Averages of logged numbers over the processes, which all have the same keys. Together."""
        if self.strategy == "single":
            return values
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        self.mean_tensors([numbers])
        return dict(zip(values, numbers.tolist(), strict=True))

    def barrier(self) -> None:
        """Wait until every process is here. Together."""
        with _peers("at a barrier"):
            self._accelerator.wait_for_everyone()

    def decide(self, answer: bool) -> bool:
        """The main process's answer, for what a clock or a disk might answer differently elsewhere. Together."""
        return bool(self._gather(answer)[0])

    def require_same(self, what: str, value: object) -> None:
        """Together. Raises: ConfigError if the processes do not all have the same `value`, naming who has which."""
        values = self._gather(value)
        if any(other != values[0] for other in values):
            who = next(rank for rank, other in enumerate(values) if other != values[0])
            raise ConfigError(
                f"the processes differ in {what}: {values[0]!r} in process 0, {values[who]!r} in process {who}; they need the "
                "same recipe, library versions and --out folder (on several machines: a shared file system)"
            )

    def facts(self, batches: Mapping[str, int] | None = None) -> dict[str, Any]:
        """For run.json. A process draws what the samples from `first_sample` on are named after, so this is its seed.

        Args:
            batches: samples of a batch on each process, by stage.
        """
        return {
            "strategy": self.strategy,
            "num_processes": self.num_processes,
            "backend": str(self._accelerator.state.backend or "none"),
            "ranks": [
                {"rank": rank, "device": device, "first_sample": {name: rank * size for name, size in (batches or {}).items()}}
                for rank, device in enumerate(self._devices)
            ],
        }

    def close(self) -> None:
        """Leave the other processes; the engine is of no use afterwards."""
        if self._owns_state:
            self._accelerator.end_training()
            AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps it for the whole process otherwise

    def _gather(self, value: Any) -> list[Any]:
        values = [value] * self.num_processes
        if self.num_processes > 1:
            with _peers("to compare notes"):
                distributed.all_gather_object(values, value)
        return values


def _require_supported(environment: Mapping[str, str]) -> None:
    """Raises: ConfigError if `accelerate launch` was given an option that would be ignored, or would change the numbers."""
    for name, (accepted, advice) in _UNSUPPORTED.items():
        found = environment.get(name, "").lower()
        is_moot = name.startswith("FSDP") and environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true"
        if found not in accepted and not is_moot:
            raise ConfigError(f"the launch sets {name}={environment[name]}, which this engine does not do: {advice}")


@contextmanager
def _peers(when: str) -> Iterator[None]:
    """Turns a lost connection into a TrainingError; other errors pass."""
    try:
        yield
    except (RuntimeError, distributed.DistError) as exc:
        is_lost = isinstance(exc, distributed.DistError) or any(word in str(exc).lower() for word in _OTHERS_FAILED)
        if not is_lost:
            raise
        rank = os.environ.get("RANK", "0")
        raise TrainingError(
            f"process {rank} of {os.environ.get('WORLD_SIZE', '1')} lost the others {when} ({str(exc).splitlines()[0][:200]}); "
            "the first error of another process says why; launch again with --resume to go on from the last checkpoint"
        ) from exc


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {platform.machine()}"
