"""The stand-ins for CUDA: only where there is none, and without a trace in what else the process does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(script: str) -> str:
    # Without what other tests of this process set when they prepared it.
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_with_cuda_nothing_is_replaced() -> None:
    assert (
        run(
            """
import functools, os, sys, torch
torch.cuda.is_available = lambda: True
from miles_megatron import cpu
def place(name): return functools.reduce(getattr, name.split("."), torch)
before = {name: place(name) for name in cpu._STAND_INS}
assert cpu.install() is False
assert all(place(name) is thing for name, thing in before.items())
assert cpu._KERNELS not in sys.modules and "TORCHDYNAMO_DISABLE" not in os.environ
from miles_megatron import start
patched = []
cpu.patch_megatron = lambda: patched.append(1)
start.prepare()
print(patched)
"""
        )
        == "[]"
    )


def test_transformers_that_is_imported_later_computes_the_same(tmp_path: object) -> None:
    script = """
import sys, torch, transformers
if sys.argv[1:] == ["prepared"] or {prepared}:
    from miles_megatron import start
    start.prepare()
    import megatron.core
config = transformers.Qwen3Config(vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=None, eos_token_id=0)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config)
model.save_pretrained({folder!r})
again = transformers.AutoModelForCausalLM.from_pretrained({folder!r}).eval()
print(again(torch.arange(9)[None]).logits.double().sum().item())
"""
    found = [run(script.format(prepared=prepared, folder=str(tmp_path))) for prepared in (False, True)]
    assert found[0].splitlines()[-1] == found[1].splitlines()[-1]


@pytest.mark.parametrize("name", ["zeros", "ones", "empty"])
def test_tensors_that_are_asked_for_on_cuda_are_made_on_the_cpu(name: str) -> None:
    out = run(
        f"from miles_megatron import cpu; cpu.install(); import torch; "
        f"print(torch.{name}(2, device='cuda').device, torch.{name}(2, device=torch.cuda.current_device()).device)"
    )
    assert out == "cpu cpu"
