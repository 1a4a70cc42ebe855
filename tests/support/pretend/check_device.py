"""Is pretend to be trusted? What works on CUDA must work on it with the CPU's numbers, what CUDA refuses must be refused."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

from tests.support.pretend import pretend  # before torch
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

DEVICE_ERROR = "same device|indices should be|does not match the common device"


@pytest.fixture(autouse=True)
def device():
    with pretend.cuda():
        yield


def cuda(*shape, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to("cuda", **options)


# --- known good -----------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Embedding(9, 6), nn.GRU(6, 5, batch_first=True, bidirectional=True)
        self.conv, self.norm, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.LayerNorm(10), nn.BatchNorm2d(4)
        self.last = nn.Linear(14, 3)

    def forward(self, ids, lengths, pixels):
        packed = pack_padded_sequence(self.embed(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        words, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=ids.shape[1])
        q = self.norm(words).view(len(ids), -1, 2, 5).transpose(1, 2)
        words = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2).amax(1)
        return self.last(torch.cat([words, self.bn(self.conv(pixels)).relu().mean((2, 3))], 1))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "SGD"])
def test_three_training_steps_are_those_of_the_cpu(name):
    torch.manual_seed(0)
    here = Net()
    there = copy.deepcopy(here)
    weights = dict(there.named_parameters())
    there.to("cuda")
    assert all(weights[n] is p for n, p in there.named_parameters()), "on CUDA parameters keep their identity"
    ids, lengths, pixels = torch.randint(0, 9, (4, 7)), torch.tensor([3, 7, 5, 1]), torch.randn(4, 3, 8, 8)
    found = []
    for net, device in ((here, "cpu"), (there, "cuda")):
        optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.05)
        batch = [x.to(device) for x in (ids, lengths, pixels)]
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(*batch), torch.tensor([0, 1, 2, 0]).to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        found.append([p.detach().cpu() for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_indexing_views_and_writes():
    here, there = torch.arange(24.0).view(4, 6), torch.arange(24.0).view(4, 6).to("cuda")
    rows, mask = torch.tensor([2, 0]), torch.tensor([True, False, True, False])
    for x, device in ((here, "cpu"), (there, "cuda")):
        x[1:3, ::2] += 1
        x[rows] = x[rows.to(device)] * 2  # an index may lie on the CPU
        x[mask.to(device)] = 0.0
        x.T[0].mul_(3)
        x[rows.to(device)[:, None], torch.tensor([1, 3])] = torch.tensor(7.0)  # a CPU scalar as value
        x.masked_fill_(x > 20, torch.tensor(-1.0))
    assert torch.equal(here, there.cpu())


def test_cpu_scalars_are_taken_by_pointwise_operators():
    x = cuda(3)
    assert (x * torch.tensor(2.0)).device.type == "cuda"
    assert torch.where(x > torch.tensor(0.0), x, torch.tensor(1.0)).device.type == "cuda"
    assert torch.maximum(x, torch.tensor(0.0)).device.type == "cuda"
    assert (torch.tensor(1.0) - x.sum()).device.type == "cuda"


def test_shapes_changed_in_place():
    x = cuda(1, 3)
    y = x.clone().squeeze_(0).unsqueeze_(1).t_()
    assert y.shape == (1, 3) and torch.equal(y.cpu(), x.cpu()) and (torch.ones(3, device="cuda") @ cuda(3, 2)).shape == (2,)


def test_inference_mode():
    linear = nn.Linear(3, 2).to("cuda")
    with torch.inference_mode():
        y = linear(torch.ones(2, 3).to("cuda"))
        assert y.is_cuda and not y.requires_grad and y.cpu().numpy().shape == (2, 2)


def test_factories():
    x = cuda(2, 3)
    for made in (
        torch.zeros(2, device="cuda"), torch.full((2,), 3, device=x.device), torch.arange(4, device="cuda"), torch.eye(3, device="cuda"),
        torch.tensor([1.0], device="cuda"), torch.as_tensor([1], device="cuda"), x.new_zeros(3), x.new_tensor([1, 2]), torch.ones_like(x),
        torch.rand(2, device="cuda"), torch.randn_like(x), torch.linspace(0, 1, 3, device="cuda"), torch.empty(2, device="cuda:0"),
    ):  # fmt: skip
        assert isinstance(made, pretend.CudaTensor) and made.device == torch.device("cuda:0")
    assert not isinstance(torch.zeros(2), pretend.CudaTensor)
    assert not isinstance(torch.zeros_like(x, device="cpu"), pretend.CudaTensor)
    assert not isinstance(x.cpu(), pretend.CudaTensor)


def test_autocast_is_that_of_cuda():
    linear, x = nn.Linear(3, 4).to("cuda"), cuda(2, 3)
    with torch.autocast("cuda", torch.bfloat16):
        y = linear(x)
        assert y.dtype == torch.bfloat16 and (y @ y.T).dtype == torch.bfloat16
        assert y.softmax(-1).dtype == y.sum().dtype == y.exp().dtype == y.norm().dtype == torch.float32
        gru = nn.GRU(3, 4, batch_first=True).to("cuda")
        assert gru(x[None])[0].dtype == torch.bfloat16, "cuDNN's GRU is in autocast's list, the CPU's is not"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.float32, "autocast of another device"


def test_dropout_has_a_generator_of_the_device():
    x = torch.ones(64, device="cuda")
    torch.manual_seed(1)
    a = F.dropout(x)
    torch.manual_seed(1)
    torch.rand(5)  # the CPU's generator moves, the device's does not
    b = F.dropout(x)
    assert torch.equal(a.cpu(), b.cpu())
    assert not torch.equal(b.cpu(), F.dropout(x).cpu())


def test_copies_pickles_and_checkpoints_of_modules(tmp_path):
    net = Net().to("cuda")
    twin = copy.deepcopy(net)
    assert all(isinstance(p, nn.Parameter) and p.is_cuda and p is not q for p, q in zip(twin.parameters(), net.parameters(), strict=True))
    save_model(net, str(tmp_path / "w"))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    load_model(twin, str(tmp_path / "w"))
    optimizer = torch.optim.Adam(net.parameters())
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again = torch.optim.Adam(twin.parameters())
    again.load_state_dict(torch.load(buffer, weights_only=True, map_location="cpu"))
    assert all(s["exp_avg"].is_cuda for s in again.state.values())
    assert not any(p.is_cuda for p in net.cpu().parameters())


def test_backward_runs_in_the_thread_of_the_device():
    import threading

    threads = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            threads.append(threading.get_ident())
            return grad * 2

    Look.apply(cuda(3).requires_grad_()).sum().backward()
    assert threads != [threading.get_ident()]


# --- known bad ------------------------------------------------------------------------------------------------------------------------

BAD = {
    "sum": lambda: cuda(3) + torch.ones(3),
    "matmul": lambda: cuda(3, 3) @ torch.ones(3, 3),
    "one element is no scalar": lambda: cuda(3) + torch.ones(1),
    "cat": lambda: torch.cat([cuda(3), torch.ones(3)]),
    "stack of scalars": lambda: torch.stack([cuda(3).sum(), torch.tensor(1.0)]),
    "clamp by a CPU scalar": lambda: cuda(3).clamp(min=torch.tensor(0.0)),
    "cat of a CPU scalar, by the code generator's rule": lambda: torch.hstack([cuda(3).sum(), torch.tensor(1.0)]),
    "module on the CPU": lambda: nn.Linear(3, 3)(cuda(2, 3)),
    "input on the CPU": lambda: nn.Linear(3, 3).to("cuda")(torch.ones(2, 3)),
    "ids on the CPU": lambda: nn.Embedding(3, 3).to("cuda")(torch.tensor([1])),
    "CUDA index on a CPU tensor": lambda: torch.ones(3)[torch.tensor([1], device="cuda")],
    "CUDA mask on a CPU tensor": lambda: torch.ones(3)[cuda(3) > 0],
    "CPU values": lambda: cuda(3).index_put_((torch.tensor([1]),), torch.ones(1)),
    "CPU values by assignment to a CUDA index": lambda: cuda(3).__setitem__(torch.tensor([1, 2], device="cuda"), torch.ones(2)),
    "CUDA values into a CPU tensor": lambda: torch.ones(3).index_put_((torch.tensor([1]),), cuda(1)),
    "mask": lambda: cuda(3).masked_fill(torch.tensor([True, False, True]), 0.0),
    "where": lambda: torch.where(cuda(3) > 0, torch.ones(3), 0.0),
    "gather": lambda: cuda(3).gather(0, torch.tensor([1])),
    "in place on a CPU scalar": lambda: torch.tensor(1.0).add_(cuda(3).sum()),
    "loss": lambda: F.cross_entropy(cuda(2, 3), torch.tensor([0, 1])),
    "searchsorted": lambda: torch.searchsorted(cuda(3), torch.ones(2)),
    "lerp": lambda: cuda(3).lerp_(torch.ones(3), 0.5),
}


@pytest.mark.parametrize("name", BAD)
def test_mixed_devices_are_refused(name):
    with pytest.raises(RuntimeError, match=DEVICE_ERROR):
        BAD[name]()


def test_in_backward_too():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones(3)

    with pytest.raises(RuntimeError, match=DEVICE_ERROR):
        Wrong.apply(cuda(3).requires_grad_()).sum().backward()


def test_numpy_generators_pinning_and_rnn_sizes_are_refused():
    x = cuda(3)
    for ask in (x.numpy, lambda: __import__("numpy").asarray(x)):
        with pytest.raises(TypeError, match="Use Tensor.cpu"):
            ask()
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.rand(3, generator=torch.Generator(), device="cuda")
    with pytest.raises(RuntimeError, match="cannot pin"):
        x.pin_memory()
    with pytest.raises(RuntimeError, match=r"same device|CPU"):
        pack_padded_sequence(cuda(2, 3, 4), torch.tensor([3, 2], device="cuda"), batch_first=True)


def test_nccl_takes_no_cpu_tensor():
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        x = torch.ones(3, device="cuda")
        dist.all_reduce(x)
        assert x.tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="NCCL"):
            dist.all_reduce(torch.ones(3))
    finally:
        dist.destroy_process_group()


# --- counting -------------------------------------------------------------------------------------------------------------------------

WAITS = {
    "item": (lambda x: x.sum().item(), 1),
    "bool": (lambda x: bool((x > 0).all()), 1),
    "int": (lambda x: int(x.argmax()), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "nonzero": (lambda x: (x > 0).nonzero(), 1),
    "mask": (lambda x: x[x > 0], 1),
    "unique": (lambda x: torch.unique(x), 1),
    "repeat_interleave": (lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long, device="cuda")), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "h2d": (lambda x: torch.ones(3).to("cuda"), 1),
    "h2d pageable, non_blocking": (lambda x: torch.ones(3).to("cuda", non_blocking=True), 1),
    "h2d pinned, non_blocking": (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), 0),
    "h2d pinned": (lambda x: torch.ones(3).pin_memory().to("cuda"), 1),
    "tensor": (lambda x: torch.tensor([1.0], device="cuda"), 1),
    "new_tensor": (lambda x: x.new_tensor(1.0), 1),
    "zeros": (lambda x: torch.zeros(3, device="cuda"), 0),
    "arange": (lambda x: torch.arange(3, device="cuda"), 0),
    "arithmetic": (lambda x: (x * 2 + 1).softmax(0).sum(), 0),
    "CPU index": (lambda x: x[torch.tensor([0, 1])], 1),
    "CUDA index": (lambda x: x[x.argsort()], 0),
    "scalar index": (lambda x: x[x.argmax()], 1),
    "dropout": (lambda x: F.dropout(x), 0),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted(name):
    work, waits = WAITS[name]
    x = cuda(3)
    with pretend.watch() as seen:
        work(x)
    assert seen.waits == waits, seen.table()


# --- torch.utils.checkpoint on a device ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    x: torch.Tensor


@pytest.mark.parametrize(("wrapped", "same"), [(False, True), (True, False)])
def test_checkpoint_restores_the_generator_only_for_tensors_that_it_sees(wrapped, same):
    """The known trap: with a dataclass as argument the second pass drops other units. On the CPU it does not show."""
    masks = []

    def run(rows):
        x = rows.x if wrapped else rows
        y = F.dropout(x)
        masks.append(y.detach() != 0)
        return y * x

    x = torch.ones(256, device="cuda", requires_grad=True)
    torch.manual_seed(0)
    checkpoint(run, Rows(x) if wrapped else x, use_reentrant=False).sum().backward()
    assert torch.equal(masks[0].cpu(), masks[1].cpu()) == same


def test_static_tables():
    table = pretend.kernels()
    assert "CUDA" in " ".join(table["_cudnn_rnn"]) and "CPU" in " ".join(table["add.Tensor"] | {"CPU"})
    assert pretend.without_cuda_kernel(["aten.mm.default", "aten.mkldnn_linear.default"]) == ["aten.mkldnn_linear.default"]
