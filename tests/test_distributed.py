"""GradAug under DistributedDataParallel: two processes on half a batch each take the step of one on the whole batch."""

import gc

import pytest
import torch
from torch import nn

import gradaug_kernels as gk


def model():
    torch.manual_seed(0)
    # Without batch norm, whose statistics are each process's own: the gradients are means over the batch.
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return gk.convert(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 4))).double()


def train(network, parameters, images, targets):
    optimizer = torch.optim.SGD(parameters, 0.5, momentum=0.9)
    step = gk.GradAug(network, optimizer, num_subnets=2, min_width=0.5, resolutions=(10, 8), seed=3)
    for _ in range(3):
        step(images, targets)


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 10, 10, generator=generator, dtype=torch.double)
    return images, torch.randint(4, (8,), generator=generator)


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    m = model()
    images, targets = batch()
    train(nn.parallel.DistributedDataParallel(m), m.parameters(), images[rank::2], targets[rank::2])
    torch.save(m.state_dict(), f"{folder}/{rank}.pt")
    # A wrapped model that outlives its process group makes torch abort at exit now and then, without us too.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_take_the_step_of_one(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    expected = model()
    train(expected, expected.parameters(), *batch())
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12, msg=name)
