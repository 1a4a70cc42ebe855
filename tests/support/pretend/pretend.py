"""A pretend CUDA device for machines without one: crashes where CUDA would crash, counts what CUDA would wait for.

    import pretend                       # BEFORE torch: it registers the device with the C++ library while that is loaded
    import torch

    with pretend.cuda():                 # one pretend device, cuda:0, in this thread and in autograd's
        model.to("cuda"); batch.to("cuda"); ...
        with pretend.watch() as seen:    # syncs, copies, launches, CPU scalars, ops without a CUDA kernel, ops that are not deterministic
            step([batch], 0)
        print(seen.table())

How: a tensor "on cuda:0" is a wrapper subclass whose C++ device is cuda:0 (so autocast, autograd's device thread, `is_cuda` branches in C++
and most error messages are the real ones) around a CPU tensor that holds the values. A TorchDispatchMode sees every aten operator below
autograd and autocast, checks the devices of its arguments by the rules of the CUDA build, runs it on the CPU values and wraps the result.
A 60-line C++ file (a do-nothing device guard and hooks) is compiled with g++ once and cached.

What is faithful: devices of arguments, CPU scalars (0-D) only where TensorIterator takes them, index tensors, generators, `.numpy()`,
autocast's CUDA lists, cuDNN's GRU (types and the CPU batch_sizes), fused dropout with a generator of the device's own, `torch.save`,
safetensors, parameters that keep their identity under `.to`. What is not: numbers (CPU kernels), memory, time, streams, real NCCL, Triton,
which SDPA kernel is taken, launch errors (limits, alignment, dtype support of a kernel), more than one device.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <mutex>
#include <set>
namespace pretend {
using c10::Device; using c10::DeviceIndex; using c10::DeviceType; using c10::Stream;
inline DeviceIndex index_of(Device d) { return d.index() < 0 ? 0 : d.index(); }
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static thread_local DeviceIndex current;
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override { auto old = getDevice(); current = index_of(d); return old; }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device d) const override { current = index_of(d); }
  void uncheckedSetDevice(Device d) const noexcept override { current = index_of(d); }
  Stream getStream(Device d) const override { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, index_of(d))); }
  Stream getDefaultStream(Device d) const override { return getStream(d); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  Stream getNewStream(Device d, int) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override { *event = reinterpret_cast<void*>(1); }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
thread_local DeviceIndex Guard::current = 0;
// Page-locked memory: ordinary memory that remembers to be so.
std::mutex lock;
std::set<const void*> pinned;
struct Pinned final : c10::Allocator {
  static void release(void* p) { { std::lock_guard<std::mutex> held(lock); pinned.erase(p); } c10::GetCPUAllocator()->raw_deallocate(p); }
  c10::DataPtr allocate(size_t n) override {
    void* p = c10::GetCPUAllocator()->raw_allocate(n ? n : 1);
    { std::lock_guard<std::mutex> held(lock); pinned.insert(p); }
    return {p, p, &release, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return Guard::current; }
  DeviceIndex getCurrentDevice() const override { return Guard::current; }
  void setCurrentDevice(DeviceIndex d) const override { Guard::current = d; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { auto old = Guard::current; Guard::current = d; return old; }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(DeviceIndex) const override {}
  bool isPinnedPtr(const void* p) const override {
    std::lock_guard<std::mutex> held(lock);
    return pinned.count(p) != 0;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { static Pinned allocator; return &allocator; }
};
}
namespace { C10_REGISTER_GUARD_IMPL(CUDA, pretend::Guard) }
namespace at { C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", pretend::Hooks) }
"""


def _register_device() -> None:
    """Compile the guard (once a torch version), and load it between libtorch_cpu and Python's torch."""
    if "torch" in sys.modules:
        raise ImportError("import pretend before torch: the device must be registered while torch's libraries are loaded")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    if (root / "lib" / "libtorch_cuda.so").exists():
        raise ImportError("this torch is a CUDA build: pretend is for the CPU build (its registration would clash with the real one)")
    version = (root / "version.py").read_text()
    digest = hashlib.sha256((GUARD + version).encode()).hexdigest()[:12]
    library = Path(os.environ.get("PRETEND_CACHE", Path(tempfile.gettempdir()) / "pretend-cuda")) / f"guard-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        source, made = library.with_suffix(".cpp"), library.with_suffix(f".{os.getpid()}.tmp")
        source.write_text(GUARD)
        abi = [f"-D_GLIBCXX_USE_CXX11_ABI={1}"]
        links = [f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(
            [
                os.environ.get("CXX", "g++"),
                "-std=c++20",
                "-O1",
                "-shared",
                "-fPIC",
                *abi,
                f"-I{root}/include",
                str(source),
                *links,
                "-o",
                str(made),
            ],
            check=True,
        )
        os.replace(made, library)
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(root / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))


_register_device()

import torch
import torch._dynamo.device_interface  # it asks, once, whether CUDA is compiled in: before we say so
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
HERE = str(Path(__file__).resolve())
ROOTS: list[str] = ["itm", "pipelines"]
"""Folder names: the innermost frame below one of them is where an event is said to come from."""

_off = threading.local()

# --- what the CUDA build does --------------------------------------------------------------------------------------------------------

MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (when checking {})"
INDEX = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default, aten._copy_from.default}
# Their CUDA kernels read a number of the device on the host, or allocate a result whose size only the device knows.
SHAPES = {
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::_unique": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim_consecutive": "unique",
    "aten::bincount": "bincount",
    "aten::equal": "equal",
    "aten::multinomial": "multinomial",
    "aten::histc": "histc",
    "aten::linalg_svd": "svd",
    "aten::_linalg_eigh": "eigh",
    "aten::repeat_interleave": "repeat_interleave",
}
# torch.use_deterministic_algorithms' list, by operator, as CUDA runs them without it.
NOT_DETERMINISTIC = {
    "aten::scatter_add",
    "aten::scatter_add_",
    "aten::index_add",
    "aten::index_add_",
    "aten::cumsum",
    "aten::cudnn_convolution",
    "aten::convolution_backward",
    "aten::nll_loss2d_forward",
    "aten::nll_loss_forward",
    "aten::bincount",
    "aten::histc",
    "aten::put_",
    "aten::index_copy",
    "aten::scatter_reduce",
    "aten::_adaptive_avg_pool2d_backward",
    "aten::upsample_bilinear2d_backward",
    "aten::upsample_bicubic2d_backward",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
}
UNKNOWN = {"aten::resize_", "aten::set_", "aten::set_data"}
METADATA = {
    "aten::t_",
    "aten::transpose_",
    "aten::squeeze_",
    "aten::unsqueeze_",
    "aten::as_strided_",
    "aten::swapaxes_",
    "aten::swapdims_",
}
VIEWS = {
    "aten::view", "aten::_unsafe_view", "aten::t", "aten::transpose", "aten::permute", "aten::expand", "aten::slice", "aten::select",
    "aten::unsqueeze", "aten::squeeze", "aten::detach", "aten::alias", "aten::split", "aten::split_with_sizes", "aten::unbind",
    "aten::as_strided", "aten::diagonal", "aten::view_as", "aten::unflatten", "aten::_reshape_alias", "aten::lift_fresh", "aten::unfold",
    "aten::chunk", "aten::narrow", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided",
}  # fmt: skip


class CudaTensor(Tensor):
    """A tensor that says it lies on cuda:0; `host` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> CudaTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, layout=host.layout, device=CUDA
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CudaTensor({self.host!r}, device='cuda:0')"

    def record_stream(self, stream: Any) -> None:  # type: ignore[override]
        """There is no memory that another stream could take meanwhile."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> CudaTensor:
        return CudaTensor(inner["host"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaTensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol at the moment.")
        new = CudaTensor(self.host.detach().clone())
        new.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            new._is_param = True  # type: ignore[attr-defined]
        if self.grad is not None:
            new.grad = CudaTensor(self.grad.host.clone())  # type: ignore[attr-defined]
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As torch.save sees it: bytes of the host, with a note, since a file of CUDA tensors wants CUDA again without map_location."""
        _note("pickle", "a CUDA tensor is pickled: d2h, and it comes back on CUDA unless map_location says otherwise", _bytes(self.host))
        return self.host.detach().__reduce_ex__(protocol)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


# --- records --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Event:
    kind: str
    what: str
    where: str
    bytes: int = 0


WAITS = ("item", "d2h", "h2d", "shape", "index", "sync")
"""Kinds of events at which the host waits for the device (h2d: blocking copy out of pageable memory, which waits for the stream)."""


@dataclass
class Seen:
    """What happened inside `watch`."""

    events: list[Event] = field(default_factory=list)
    launches: int = 0
    operators: collections.Counter[str] = field(default_factory=collections.Counter)

    def of(self, *kinds: str) -> list[Event]:
        return [e for e in self.events if e.kind in kinds]

    @property
    def waits(self) -> int:
        return len(self.of(*WAITS))

    def counts(self) -> dict[str, int]:
        return dict(collections.Counter(e.kind for e in self.events))

    def by_place(self, *kinds: str) -> list[tuple[int, str, str, str, int]]:
        """(how many, kind, what, where, bytes), most first."""
        found: dict[tuple[str, str, str], list[int]] = {}
        for e in self.of(*(kinds or WAITS)):
            row = found.setdefault((e.kind, e.what, e.where), [0, 0])
            row[0] += 1
            row[1] += e.bytes
        return sorted(((n, *key, size) for key, (n, size) in found.items()), key=lambda row: -row[0])

    def table(self, *kinds: str) -> str:
        lines = [f"waits {self.waits}, launches about {self.launches}, {self.counts()}"]
        lines += [f"{n:>5} {kind:<6} {what:<28} {where}  {size} B" for n, kind, what, where, size in self.by_place(*kinds)]
        return "\n".join(lines)


_watchers: list[Seen] = []


@contextlib.contextmanager
def watch() -> Iterator[Seen]:
    seen = Seen()
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def _note(kind: str, what: str, size: int = 0) -> None:
    if _watchers:
        event = Event(kind, what, _place(), size)
        for seen in _watchers:
            seen.events.append(event)


def _place() -> str:
    """file:line of the innermost frame of the project, else of the innermost frame that is not ours."""
    frame, other = sys._getframe(2), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name != HERE:
            parts = name.split(os.sep)
            if "site-packages" not in parts:
                for root in ROOTS:
                    if root in parts:
                        return f"{'/'.join(parts[parts.index(root) :])}:{frame.f_lineno}"
            if not other and "/torch/_" not in name and "python_dispatch" not in name:
                short = name.split("site-packages/")[-1]
                other = f"{short}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    thread = "" if threading.current_thread() is threading.main_thread() else " (backward thread)"
    return (other or "C++") + thread


# --- one operator ---------------------------------------------------------------------------------------------------------------------

_generator = torch.Generator()  # the device's own; torch.manual_seed reaches it through torch.cuda.manual_seed_all
tf32 = False
"""Round operands of convolutions and GRUs (and of matmuls, where allowed) to TF32's 10 bits, as Ampere and later do by default."""


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check, run on the CPU values, wrap."""
    flat, spec = tree_flatten((args, kwargs))
    cuda = [x for x in flat if isinstance(x, CudaTensor)]
    asked = kwargs.get("device")
    name = func._schema.name
    if name.startswith("c10d::"):
        return _collective(func, args, kwargs, flat)
    if not cuda and not _is_cuda(asked):
        return func(*args, **kwargs)
    plain = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, CudaTensor)]
    _check_generator(flat, bool(cuda) or _is_cuda(asked))
    if name in UNKNOWN:
        raise NotImplementedError(f"pretend does not know {name} on a CUDA tensor")
    if func in COPIES:
        return _copy(func, args, kwargs)
    if func in OWN:
        _count(func, name, args, kwargs, plain)
        return OWN[func](*args, **kwargs)
    if plain:
        _check_devices(func, name, args, plain)
    _count(func, name, args, kwargs, plain)
    if func is aten._local_scalar_dense.default:
        _note("item", "item / bool / int / float")
        return func(args[0].host)
    if func is aten._fused_sdp_choice.default:
        return 0  # the mathematical form, which is made of operators that the CPU has
    hosts = [x.host if isinstance(x, CudaTensor) else x for x in flat]
    host_args, host_kwargs = tree_unflatten(hosts, spec)
    if "device" in host_kwargs and host_kwargs["device"] is not None:
        host_kwargs["device"] = CPU
    if host_kwargs.get("pin_memory"):
        host_kwargs["pin_memory"] = False
    host_args = _rounded(func, host_args)
    with _device_generator(func, host_kwargs):
        result = func(*host_args, **host_kwargs)
    if asked is not None and not _is_cuda(asked):
        return result  # a factory that was told to make a CPU tensor
    if name in METADATA:
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)  # the sizes that the wrapper tells
    mine = {id(x.host): x for x in cuda}  # what was changed in place comes back as itself

    def wrap(x: Tensor) -> Tensor:
        return x if isinstance(x, CudaTensor) else mine[id(x)] if id(x) in mine else CudaTensor(x)

    return tree_map_only(Tensor, wrap, result)


def _check_generator(flat: list[Any], on_cuda: bool) -> None:
    for x in flat:
        if isinstance(x, torch._C.Generator) and on_cuda:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _check_devices(func: Any, name: str, args: Any, plain: list[Tensor]) -> None:
    if func in INDEX:
        target, indices = args[0], args[1]
        if not isinstance(target, CudaTensor):
            if any(isinstance(i, CudaTensor) for i in indices if i is not None):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            raise RuntimeError(MIXED.format(f"values in {name}"))
        if len(args) > 2 and isinstance(args[2], Tensor) and not isinstance(args[2], CudaTensor) and args[2].dim() > 0:
            raise RuntimeError(MIXED.format(f"values in {name}"))
        return
    for x in plain:
        if x.dim() > 0:
            raise RuntimeError(MIXED.format(f"argument of {name}"))
    if not _takes_cpu_scalars(func):
        raise RuntimeError(MIXED.format(f"argument of {name} (a 0-D CPU tensor, which this operator does not take)"))
    if args and isinstance(args[0], Tensor) and not isinstance(args[0], CudaTensor) and func._schema.is_mutable:
        raise RuntimeError(f"{name}: output with device cpu does not match the common device cuda:0 of the arguments")
    _note("scalar", f"{name} takes a CPU scalar")


@functools.cache
def _takes_cpu_scalars(func: Any) -> bool:
    """The code generator checks that all arguments are on one device, 0-D ones too, unless the operator says NoCheck (TensorIterator)."""
    name, overload = func._schema.name.removeprefix("aten::"), func._schema.overload_name
    entry = natives().get(f"{name}.{overload}" if overload else name)
    if entry is None or not (entry.get("structured_delegate") or any("CUDA" in key for key in entry.get("dispatch", {}))):
        return torch.Tag.pointwise in func.tags  # made of other operators
    return entry.get("device_check") == "NoCheck"


def _copy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten._to_copy.default:
        source, device = args[0], kwargs.get("device")
        there = isinstance(source, CudaTensor) if device is None else _is_cuda(device)
        values = source.host if isinstance(source, CudaTensor) else source
        other = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
        moved = func(values, **other)
        _count_copy(source, there, bool(kwargs.get("non_blocking")), moved)
        return CudaTensor(moved) if there else moved
    target, source = args[0], args[1]
    to, frm = (x.host if isinstance(x, CudaTensor) else x for x in (target, source))
    non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    result = func(to, frm, non_blocking)
    _count_copy(source, isinstance(target, CudaTensor), non_blocking, frm)
    return target if func is aten.copy_.default else CudaTensor(result) if isinstance(target, CudaTensor) else result


def _count_copy(source: Tensor, there: bool, non_blocking: bool, moved: Tensor) -> None:
    here = not isinstance(source, CudaTensor)
    size = _bytes(moved)
    if here and there:
        with _quiet():
            pinned = source.untyped_storage().is_pinned("cuda")
        if non_blocking and pinned:
            _note("h2d-async", "copy from pinned memory", size)
        elif not non_blocking or not pinned:
            _note("h2d", "blocking copy" if not non_blocking else "non_blocking, but the memory is pageable", size)
    elif not here and not there:
        _note("d2h", "non_blocking: read it only after a synchronisation" if non_blocking else "copy to the host", size)
    elif there:
        for seen in _watchers:
            seen.launches += 1


def _count(func: Any, name: str, args: Any, kwargs: dict[str, Any], plain: list[Tensor]) -> None:
    if not _watchers:
        return
    for seen in _watchers:
        seen.operators[str(func)] += 1
        if name not in VIEWS:
            seen.launches += 1
    if name in SHAPES and not (name == "aten::repeat_interleave" and kwargs.get("output_size") is not None):
        _note("shape", SHAPES[name])
    if func in INDEX:
        for i in args[1]:
            if i is None:
                continue
            if i.dtype in (torch.bool, torch.uint8):
                _note("shape", "bool mask as index")
            elif not isinstance(i, CudaTensor):
                _note("index", "CPU index on a CUDA tensor", _bytes(i))
    if name in NOT_DETERMINISTIC and not (name == "aten::cumsum" and not args[0].is_floating_point()):
        _note("not-deterministic", name)


@contextlib.contextmanager
def _device_generator(func: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Random operators without a generator draw from the device's own."""
    if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
        yield
        return
    with _quiet():
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(_generator.get_state())
        try:
            yield
        finally:
            _generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)


def _rounded(func: Any, args: Any) -> Any:
    if not tf32:
        return args
    conv = func in (aten.convolution.default,) and torch.backends.cudnn.allow_tf32
    products = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default)
    if conv or (func in products and torch.backends.cuda.matmul.allow_tf32):
        return tuple(to_tf32(x) if isinstance(x, Tensor) and x.dtype == torch.float32 and x.dim() > 1 else x for x in args)
    return args


def to_tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, to nearest."""
    with _quiet():
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, operators on CPU tensors are not looked at."""
    with torch._C._DisableTorchDispatch():
        yield


# --- operators and functions of our own -------------------------------------------------------------------------------------------------


def _gru(*args: Any) -> Any:
    """torch._VF.gru as cuDNN runs it: types as autocast makes them, batch_sizes on the CPU, everything else on the device."""
    packed = isinstance(args[3], list | tuple)
    if packed:
        data, sizes, hx, weights, has_bias, layers, dropout, training, both = args
        batch_first = False
        if isinstance(sizes, CudaTensor):
            raise RuntimeError("batch_sizes tensor should be on CPU, but got on cuda:0")
    else:
        data, hx, weights, has_bias, layers, dropout, training, both, batch_first = args
        sizes = None
    for x in (data, hx, *weights):
        if not isinstance(x, CudaTensor):
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at cuda:0 and parameter tensor at cpu"
            )
    for seen in _watchers:
        seen.launches += 3
        seen.operators["aten::_cudnn_rnn"] += 1
    if torch.is_autocast_enabled("cuda"):
        low = torch.get_autocast_dtype("cuda")
        data, hx, weights = data.to(low), hx.to(low), [w.to(low) for w in weights]
    options = (has_bias, layers, dropout, training, both, batch_first)
    with torch.autocast("cuda", enabled=False):
        return _Gru.apply(sizes, options, data, hx, *weights)


def _host_gru(sizes: Any, options: Any, data: Tensor, hx: Tensor, weights: Any) -> Any:
    has_bias, layers, dropout, training, both, batch_first = options
    if sizes is not None:
        return torch._VF.gru(data, sizes, hx, list(weights), has_bias, layers, dropout, training, both)
    return torch._VF.gru(data, hx, list(weights), has_bias, layers, dropout, training, both, batch_first)


class _Gru(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: Any, options: Any, *given: Any) -> Any:
        ctx.sizes, ctx.options = sizes, options
        ctx.save_for_backward(*given)
        hosts = [_gru_rounded(x.host) for x in given]
        with _quiet():
            out, hn = _host_gru(sizes, options, hosts[0], hosts[1], hosts[2:])
        return CudaTensor(out), CudaTensor(hn)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if not ctx.options[3]:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        given = ctx.saved_tensors
        with _quiet(), torch.enable_grad():
            hosts = [_gru_rounded(x.host).detach().requires_grad_() for x in given]
            out = _host_gru(ctx.sizes, ctx.options, hosts[0], hosts[1], hosts[2:])
            pairs = [(o, g.host) for o, g in zip(out, grads, strict=True) if g is not None]
            found = torch.autograd.grad([o for o, _ in pairs], hosts, [g.to(o.dtype) for o, g in pairs], allow_unused=True)
        return None, None, *(None if g is None else CudaTensor(g) for g in found)


def _gru_rounded(x: Tensor) -> Tensor:
    return to_tf32(x) if tf32 and torch.backends.cudnn.allow_tf32 and x.dtype == torch.float32 and x.dim() > 1 else x


def _tolist(self: CudaTensor) -> Any:
    _note("item" if self.dim() == 0 else "d2h", "tolist", _bytes(self.host))
    return self.host.tolist()


def _numpy(self: CudaTensor, *args: Any, **kwargs: Any) -> Any:
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")


def _pin(self: Tensor, *args: Any) -> Any:
    raise RuntimeError(f"cannot pin 'torch.cuda.{str(self.dtype).split('.')[-1].title()}Tensor' only dense CPU tensors can be pinned")


def _backward(
    tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, create_graph: bool = False, *_: Any, inputs: Any = None
) -> None:
    """torch.autograd.backward, not below DisableTorchFunctionSubclass: a checkpoint's second pass runs inside."""
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    grads = torch.autograd._make_grads(
        tensors, torch.autograd._tensor_or_tensors_to_tuple(grad_tensors, len(tensors)), is_grads_batched=False
    )
    keep = create_graph if retain_graph is None else retain_graph
    torch.autograd.graph._engine_run_backward(
        tensors, grads, keep, create_graph, tuple(inputs or ()), allow_unreachable=True, accumulate_grad=True
    )


FUNCTIONS: dict[Any, Any] = {
    torch.Tensor.backward: lambda self, gradient=None, *rest, **named: _backward(self, gradient, *rest, **named),
    torch.autograd.backward: _backward,
    torch._C._VariableFunctions.gru: _gru,
    torch.Tensor.tolist: _tolist,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.__deepcopy__: CudaTensor.__deepcopy__,
    torch.Tensor.__reduce_ex__: CudaTensor.__reduce_ex__,
    torch.Tensor.__repr__: lambda self, **_: CudaTensor.__repr__(self),
    torch.Tensor.data_ptr: lambda self: self.host.data_ptr(),
    torch.Tensor.untyped_storage: lambda self: self.host.untyped_storage(),
    torch.Tensor.pin_memory: _pin,
    torch.Tensor.is_pinned: lambda self, *_: False,
    torch.Tensor.is_shared: lambda self: True,
}


def _pack(data: Tensor, lengths: Tensor, batch_first: bool) -> Any:
    if isinstance(lengths, CudaTensor):
        raise RuntimeError("'lengths' argument should be a 1D CPU int64 tensor, but got 1D cuda:0 Long tensor")
    if not isinstance(data, CudaTensor):
        raise RuntimeError(MIXED.format("data in _pack_padded_sequence"))
    packed, sizes = aten._pack_padded_sequence.default(data.host, lengths, batch_first)
    return CudaTensor(packed), sizes


def _unpack(grad: Tensor, size: Any, sizes: Tensor, batch_first: bool) -> Any:
    return CudaTensor(aten._pack_padded_sequence_backward.default(grad.host, size, sizes, batch_first))  # type: ignore[attr-defined]


def _softmax_of(func: Any) -> Any:
    """CUDA has a kernel that reads the short format and writes float32; the CPU has not."""

    def run_it(x: CudaTensor, dim: int, half_to_float: bool) -> CudaTensor:
        return CudaTensor(func(x.host.float() if half_to_float else x.host, dim, False))

    return run_it


def _softmax_backward_of(func: Any) -> Any:
    def run_it(grad: CudaTensor, output: CudaTensor, dim: int, dtype: torch.dtype) -> CudaTensor:
        return CudaTensor(func(grad.host, output.host, dim, grad.dtype).to(dtype))

    return run_it


# Operators that take or give CPU tensors beside those of the device.
OWN: dict[Any, Any] = {
    aten._pack_padded_sequence.default: _pack,
    aten._pack_padded_sequence_backward.default: _unpack,
    aten._softmax.default: _softmax_of(aten._softmax.default),
    aten._log_softmax.default: _softmax_of(aten._log_softmax.default),
    aten._softmax_backward_data.default: _softmax_backward_of(aten._softmax_backward_data.default),
    aten._log_softmax_backward_data.default: _softmax_backward_of(aten._log_softmax_backward_data.default),
}


def _collective(func: Any, args: Any, kwargs: Any, flat: list[Any]) -> Any:
    """c10d operators over a pretend NCCL group of `world` ranks that all hold the same: only tensors of the device are taken."""
    from torch._C._distributed_c10d import Work, _create_work_from_future

    tensors = [x for x in flat if isinstance(x, Tensor)]
    wrong = [x for x in tensors if not isinstance(x, CudaTensor)]
    if wrong:
        raise RuntimeError(f"No backend type associated with device type cpu (NCCL, {func._schema.name}, tensor {tuple(wrong[0].shape)})")
    future: Any = torch.futures.Future()
    future.set_result([x for x in args[0] if isinstance(x, Tensor)] if isinstance(args[0], list) else args[0])
    work = Work.boxed(_create_work_from_future(future))
    name = func._schema.name.removeprefix("c10d::")
    ranks = _world[0]
    _note("collective", name, sum(_bytes(x.host) for x in tensors))
    if name == "allreduce_":
        for x in args[0]:
            if int(args[2].op()) == 0:  # SUM; mean, least and largest of equal values are those
                x.host.mul_(ranks)
        return args[0], work
    if name == "allgather_":
        for outputs, x in zip(args[0], args[1], strict=True):
            for out in outputs:
                out.host.copy_(x.host)
        return args[0], work
    if name == "broadcast_":
        return args[0], work
    if name == "_allgather_base_":
        out, x = args[0], args[1]
        out.host.copy_(x.host.repeat(ranks, *[1] * (x.dim() - 1)).view_as(out.host))
        return out, work
    if name == "_reduce_scatter_base_":
        out, x = args[0], args[1]
        out.host.copy_(x.host.chunk(ranks)[0] * ranks)
        return out, work
    if name == "barrier":
        return work
    raise NotImplementedError(f"pretend: collective {name}")


_world = [2]


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


# --- torch.cuda -------------------------------------------------------------------------------------------------------------------------


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _note("sync", "event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class _Stream(_Event):
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, other: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...


def _synchronize(*_: Any) -> None:
    _note("sync", "torch.cuda.synchronize")


class _Properties:
    name, total_memory, major, minor, multi_processor_count = "Pretend H100", 80 << 30, 9, 0, 132


class _Generator(torch._C.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        if _is_cuda(device):
            raise NotImplementedError("pretend has no CUDA generator but the default one")
        return torch._C.Generator.__new__(torch._C.Generator)


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


_apply = torch.nn.Module._apply


def _apply_by_swapping(self: Any, fn: Any, recurse: bool = True) -> Any:
    """Parameters keep their identity under .to, .cuda and .cpu, as they do on CUDA."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _apply(self, fn, recurse)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


torch.nn.Module._apply = _apply_by_swapping  # for good: a module may come back from the device after `cuda()` has ended


def _enter_no_grad(self: Any) -> None:
    """inference_mode as no_grad: below it, composite operators would come whole, and wrappers cannot be inference tensors."""
    self._before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(self._before and not self.mode)


def _exit_no_grad(self: Any, *_: Any) -> None:
    torch._C._set_grad_enabled(self._before)


def _patches() -> list[tuple[Any, str, Any]]:
    cuda = torch.cuda
    state = lambda device="cuda": _generator.get_state()
    optimizers = __import__("torch.optim.optimizer", fromlist=["x"])
    foreach = __import__("torch.utils._foreach_utils", fromlist=["x"])
    return [
        (cuda, "is_available", lambda: True),
        (cuda, "is_initialized", lambda: True),
        (cuda, "_initialized", True),
        (cuda, "_lazy_init", lambda: None),
        (cuda, "init", lambda: None),
        (cuda, "_is_compiled", lambda: True),
        (cuda, "device_count", lambda: 1),
        (cuda, "current_device", lambda: 0),
        (cuda, "set_device", lambda device: None),
        (cuda, "device", _nothing),
        (cuda, "device_of", _nothing),
        (cuda, "get_device_name", lambda device=None: _Properties.name),
        (cuda, "get_device_capability", lambda device=None: (9, 0)),
        (cuda, "get_device_properties", lambda device=None: _Properties()),
        (cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (cuda, "synchronize", _synchronize),
        (cuda, "empty_cache", lambda: None),
        (cuda, "max_memory_allocated", lambda device=None: 0),
        (cuda, "memory_allocated", lambda device=None: 0),
        (cuda, "reset_peak_memory_stats", lambda device=None: None),
        (cuda, "Event", _Event),
        (cuda, "Stream", _Stream),
        (cuda, "stream", _nothing),
        (cuda, "current_stream", lambda device=None: _Stream()),
        (cuda, "default_stream", lambda device=None: _Stream()),
        (cuda, "manual_seed", lambda seed: _generator.manual_seed(int(seed) & 0xFFFFFFFFFFFFFFFF) and None),
        (cuda, "manual_seed_all", lambda seed: _generator.manual_seed(int(seed) & 0xFFFFFFFFFFFFFFFF) and None),
        (cuda, "get_rng_state", state),
        (cuda, "get_rng_state_all", lambda: [state()]),
        (cuda, "set_rng_state", lambda new, device="cuda": _generator.set_state(new)),
        (cuda, "set_rng_state_all", lambda new: _generator.set_state(new[0])),
        (torch.inference_mode, "__enter__", _enter_no_grad),
        (torch.inference_mode, "__exit__", _exit_no_grad),
        (torch, "Generator", _Generator),
        # The optimisers' fast paths are for plain tensors and parameters.
        (optimizers, "_foreach_supported_types", [*optimizers._foreach_supported_types, CudaTensor]),
        (foreach, "_foreach_supported_types", [*foreach._foreach_supported_types, CudaTensor]),
    ]


@contextlib.contextmanager
def cuda() -> Iterator[None]:
    """Inside, this thread (and autograd's) has a pretend cuda:0."""
    undo = []
    for owner, name, value in _patches():
        undo.append((owner, name, getattr(owner, name, None), name in vars(owner)))
        setattr(owner, name, value)
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") moves where it can be seen
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        for owner, name, value, own in reversed(undo):
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


# --- static: has CUDA a kernel for it? --------------------------------------------------------------------------------------------------


@functools.cache
def natives() -> dict[str, dict[str, Any]]:
    """What native_functions.yaml, which comes with torch, says of each operator (name.overload)."""
    import yaml

    root = Path(importlib.util.find_spec("torchgen").submodule_search_locations[0])  # type: ignore[union-attr,index,arg-type]
    entries = yaml.load((root / "packaged/ATen/native/native_functions.yaml").read_text(), yaml.CSafeLoader)
    return {re.match(r"[\w.]+", entry["func"]).group(): entry for entry in entries}  # type: ignore[union-attr]


def kernels() -> dict[str, set[str]]:
    """Operator (name.overload) -> backends with a kernel for it; empty = composite."""
    found: dict[str, set[str]] = {}
    for name, entry in natives().items():
        keys = {k.strip() for key in entry.get("dispatch", {}) for k in key.split(",")}
        if entry.get("structured_delegate"):
            keys.add("delegate")
        found[name] = keys
    return found


def without_cuda_kernel(operators: Any) -> list[str]:
    """Of operators as `Seen.operators` names them ("aten.mm.default"), those that only another backend has."""
    table, missing = kernels(), []
    for operator in operators:
        if not operator.startswith("aten."):
            continue
        _, name, overload = operator.split(".", 2)
        keys = table.get(name if overload == "default" else f"{name}.{overload}")
        if keys and not any("CUDA" in k or k.startswith("Composite") or k == "delegate" for k in keys):
            missing.append(operator)
    return missing
