"""Two processes that train on kernels get the gradients of one process with both batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastden import ops
from fastden.nn import Bottleneck, ConcatConvBNReLU, ConvBNReLU, Upsample
from tests.helpers import relative_l2

# Each process trains on its own half of the batch, and the first writes down the gradients that both then have.
WORKER = """
import os
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from fastden import ops
from tests.kernels.test_distributed import batch, loss, network

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = DistributedDataParallel(network())
with ops.use_backend("triton"):
    loss(model, batch().chunk(2)[rank]).backward()
if rank == 0:
    torch.save({name: parameter.grad for name, parameter in model.module.named_parameters()}, sys.argv[1])
# Nobody leaves while the other is at work, or holds the group: a thread of gloo that outlives it ends the process.
torch.distributed.barrier()
del model
torch.distributed.destroy_process_group()
# All is done. Threads of gloo aborted one run under load while its interpreter ended ("terminate called without ...").
os._exit(0)
"""


class Network(nn.Module):
    """A U-shaped network of fastden's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.down = ConvBNReLU(3, 6, stride=2)
        self.block = Bottleneck(6, 4)
        self.up = Upsample(6, 5)
        self.last = ConcatConvBNReLU(3, 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x, self.up(self.block(self.down(x))))


def network() -> nn.Module:
    """The same network in each process. BN is frozen: batch statistics would be those of a process's own part."""
    torch.manual_seed(0)
    model = Network().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def batch() -> Tensor:
    return torch.rand(4, 3, 6, 8, generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.mean(1, keepdim=True)).square().mean()


def gradients(x: Tensor) -> dict[str, Tensor]:
    model = network()
    with ops.use_backend("triton"):
        loss(model, x).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.slow
def test_two_processes_equal_one(device: str, root: Path, tmp_path: Path) -> None:
    if device != "cpu":
        pytest.skip("on a GPU two processes would need two of them")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--no-python", sys.executable, "-c", WORKER, str(tmp_path / "gradients")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "gradients")
    one = gradients(batch())
    half = gradients(batch().chunk(2)[0])
    for name, value in one.items():
        assert relative_l2(found[name], value) < 1e-5, name
        assert relative_l2(half[name], value) > 0.05, name
