"""The OpenMP runtime that PyTorch computes with."""

import ctypes
import functools
from typing import Any

import torch


@functools.cache
def gomp_parallel() -> Any:
    """GOMP_parallel(function, data, threads, flags) as a C function, or None where PyTorch has loaded none.

    It is there on Linux, from libgomp or from Intel's and LLVM's runtimes, which have it too.
    """
    if not torch.backends.openmp.is_available():
        return None
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return function
