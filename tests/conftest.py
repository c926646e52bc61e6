"""Triton kernels run on the GPU where there is one and in Triton's interpreter elsewhere: decided before any import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
