"""A pretend CUDA device, and what is checked on it: by tests/test_on_pretend_device.py, in a process of its own.

pretend.py       the device; to be imported before torch
check_device.py  is the device itself to be trusted? known good, known bad, counting
check_steps.py   every matcher under every method takes its steps there, with the numbers of the CPU and few waits
check_second_pass.py  activations that are made again have the gradient of the first pass, dropout included
check_use.py     scoring, validation, teaching, search, verify and the registered model there
gpu_day.py       the first command where a real GPU is at hand; `--pretend` rehearses it

What it cannot tell: numbers of CUDA kernels, memory, time, streams, real NCCL, Triton, which attention kernel is taken, several devices,
FSDP2 and torch.compile. `docs/results/gpu.md` lists these with the command that will show each.
"""
