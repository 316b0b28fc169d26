"""Liger: its SwiGLU kernels."""

from __future__ import annotations

import copy

import torch

from tutelx.bench.peers import Ways, need_cuda
from tutelx.bench.subject import Tensors, Way
from tutelx.bench.subjects.activation import ActivationBackwardInputs


def ways(device: torch.device) -> Ways:
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

    need_cuda(device)

    def backward(inputs: ActivationBackwardInputs) -> Tensors:
        return swiglu_backward(inputs.gate_RH, inputs.up_RH, inputs.grad_RH)

    return {
        "activation": Way(name="liger", call=lambda inputs: swiglu_forward(*inputs)[-1]),
        # It writes the gradients over its inputs, so it needs copies of its own.
        "activation_backward": Way(name="liger", call=backward, prepare=copy.deepcopy),
    }
