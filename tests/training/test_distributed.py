"""GradAug under DistributedDataParallel: two processes on half a batch each take the step of one on the whole batch."""

import gc
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradaug_kernels as gk
from gradaug_kernels.models.residual import ResidualBlock, ResidualStage

OPTIONS = {
    "default": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "unused, bucket views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "no broadcast": {"broadcast_buffers": False},
    "small buckets": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
}
ACCUMULATE = {"accumulate": True, "plain": False}


def model():
    torch.manual_seed(0)
    # Without batch norm, whose statistics are each process's own: the gradients are means over the batch.
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return gk.convert(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 4))).double()


class Block(ResidualBlock):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)

    def skip(self, x):
        return x


class Spare(nn.Sequential):
    """With a layer that is never called, and one that is called in every second full pass."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.spare, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls, self.alternates = 0, False

    def forward(self, x):
        for layer in list(self)[:-2]:
            x = layer(x)
        self.calls += 1
        return self.second(x) if not self.alternates or self.calls % 6 == 1 else x


def deep_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), ResidualStage(Block(), Block(), Block()), nn.AdaptiveAvgPool2d(1)]
    model = gk.convert(Spare(*layers, nn.Flatten(), nn.Linear(6, 4)), keep="5").double()
    model.calls, model.alternates = 0, True
    return model


def train(network, parameters, images, targets, **options):
    optimizer = torch.optim.SGD(parameters, 0.5, momentum=0.9, weight_decay=0.01)
    step = gk.GradAug(network, optimizer, num_subnets=2, min_width=0.5, resolutions=(10, 8), seed=3, **options)
    for _ in range(4):
        step(images, targets)


def train_depth(network, parameters, images, targets, accumulate):
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.1)
    sampler = gk.RandomDepth(0.2)
    step = gk.GradAug(network, optimizer, num_subnets=2, sampler=sampler, seed=3, accumulate=accumulate)
    for _ in range(4):
        step(images, targets)


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 10, 10, generator=generator, dtype=torch.double)
    return images, torch.randint(4, (8,), generator=generator)


def spoiled_step(rank, images, targets):
    """One process's batch has a NaN. Returns: whether the state is as it was, and whether the step was skipped."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    m = gk.convert(nn.Sequential(*layers)).double()
    optimizer = torch.optim.SGD(m.parameters(), 0.5, momentum=0.9)
    network = DistributedDataParallel(m)
    step = gk.GradAug(network, optimizer, num_subnets=1)
    step(images, targets)
    before = {name: value.clone() for name, value in m.state_dict().items()}
    if rank == 1:
        images = images.clone()
        images[0, 0, 0, 0] = float("nan")
    skipped = step(images, targets).skipped
    unchanged = all(torch.equal(value, before[name]) for name, value in m.state_dict().items())
    raising = gk.GradAug(network, optimizer, num_subnets=1, on_nonfinite="raise")
    try:
        raising(images, targets)
    except FloatingPointError as error:
        return unchanged, bool(skipped), str(error)
    return unchanged, bool(skipped), ""


def worker(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of broadcast_buffers and of unused parameters
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    images, targets = (part[rank::2] for part in batch())
    states = {}
    for (name, options), (mode, accumulate) in itertools.product(OPTIONS.items(), ACCUMULATE.items()):
        m = model()
        train(DistributedDataParallel(m, **options), m.parameters(), images, targets, accumulate=accumulate)
        states[name, mode] = m.state_dict()
        if options.get("find_unused_parameters"):
            m = deep_model()
            train_depth(DistributedDataParallel(m, **options), m.parameters(), images, targets, accumulate)
            states[name, mode, "depth"] = m.state_dict()
    states["spoiled"] = spoiled_step(rank, images, targets)
    m = model()
    try:
        train(DistributedDataParallel(m, static_graph=True), m.parameters(), images, targets)
    except ValueError as error:
        states["static graph"] = str(error)
    m = model()
    network = DistributedDataParallel(m)
    try:
        with network.no_sync():
            train(network, m.parameters(), images, targets)
    except RuntimeError as error:
        states["no sync"] = str(error)
    torch.save(states, f"{folder}/{rank}.pt")
    # A wrapped model that outlives its process group makes torch abort at exit now and then, without us too.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """What each of two processes ended with."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(state, expected):
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("options", OPTIONS)
def test_two_processes_take_the_step_of_one(states, options, accumulate):
    expected = model()
    train(expected, expected.parameters(), *batch(), accumulate=ACCUMULATE[accumulate])
    for state in states:
        assert_close(state[options, accumulate], expected)


@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("options", ["unused", "unused, bucket views"])
def test_blocks_that_are_left_out_and_layers_that_are_not_called(states, options, accumulate):
    expected = deep_model()
    train_depth(expected, expected.parameters(), *batch(), accumulate=False)
    for state in states:
        assert_close(state[options, accumulate, "depth"], expected)


def test_processes_skip_a_step_together(states):
    for state in states:
        unchanged, skipped, _ = state["spoiled"]
        assert unchanged
        assert skipped
    assert (
        "losses and gradients must be finite in every process" in states[0]["spoiled"][2]
        or "gradient must be" in (states[0]["spoiled"][2])
    )
    assert "loss must be finite, got nan as the loss of the full network" in states[1]["spoiled"][2]


def test_a_static_graph_is_refused(states):
    for state in states:
        assert state["static graph"] == "model must be in DistributedDataParallel without static_graph, got one with it"


def test_a_step_without_an_exchange_of_gradients_is_refused(states):
    for state in states:
        expected = "a step must exchange its gradients, got one inside DistributedDataParallel.no_sync"
        assert state["no sync"] == expected
