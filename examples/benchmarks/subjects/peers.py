"""Ways of other packages to quantize a tensor to NVFP4; each raises where it is not installed.

All get their tensor-wide magnitude beforehand where they let themselves be given it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Way = Callable[[Tensor], object]


def torchao(amax: Tensor) -> Way:
    """Return torchao's AbsMax, which is plain torch operations."""
    from torchao.prototype.mx_formats import nvfp4_tensor as peer

    scale = peer.per_tensor_amax_to_scale(amax)
    return lambda x: peer.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)


def torchao_compiled(amax: Tensor) -> Way:
    """Return torchao's AbsMax through torch.compile."""
    from torchao.prototype.mx_formats import nvfp4_tensor as peer

    scale = peer.per_tensor_amax_to_scale(amax)
    compiled: Any = torch.compile(peer.nvfp4_quantize, dynamic=False)
    return lambda x: compiled(x, 16, scale)


def fouroversix(amax: Tensor, rule: str, backend: str = "triton") -> Way:
    """Return fouroversix with a rule: "static_6" is AbsMax, "mse" its 4/6."""
    from fouroversix import QuantizationConfig, quantize_to_fp4

    known = {"x_amax": amax.float()} if backend == "triton" else {}
    config = QuantizationConfig(backend=backend, scale_rule=rule, kwargs=known)
    return lambda x: quantize_to_fp4(x, config)


def modelopt_sweep(amax: Tensor) -> Way:
    """Return Model-Optimizer's sweep of all 126 scales: scales only; needs CUDA."""
    from modelopt.torch.kernels.quantization.gemm import nvfp4_fp8_scale_sweep

    return lambda x: nvfp4_fp8_scale_sweep(x, amax.float(), block_size=16)


def modelopt_sweep_cpu(amax: Tensor) -> Way:
    """Return Model-Optimizer's sweep of all 126 scales on a CPU: scales only.

    Its loop over scales, its E2M1 rounding and its table of values; what joins them is ours, since
    its own needs CUDA.
    """
    from modelopt.torch.quantization.calib.mse import NVFP4MSECalibrator
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def fake(x: Tensor, block_amax: Tensor) -> Tensor:
        scale = block_amax.reshape(-1, 1) / 6
        codes = NVFP4QTensor._cast_fp4(x / scale)
        values: Tensor = NVFP4QTensor.get_e2m1_values(x.device)[codes.long()]
        return values * scale

    def sweep(x: Tensor) -> object:
        blocks = x.reshape(-1, 16)
        start = blocks.abs().amax(-1)
        calibrator = NVFP4MSECalibrator(start, amax, axis=0, quant_func=fake)
        calibrator.collect(blocks)
        return calibrator.compute_amax()

    return sweep


def llm_compressor(name: str = "nvfp4_expanded_mse") -> Way:
    """Return an observer of llm-compressor: scales only."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.observers import Observer

    settings: dict[str, Any] = {"num_bits": 4, "type": "float", "strategy": "tensor_group"}
    settings |= {"group_size": 16, "symmetric": True, "scale_dtype": torch.float8_e4m3fn}

    def observe(x: Tensor) -> object:
        args = QuantizationArgs(**settings)
        observer = Observer.load_from_registry(name, base_name="weight", args=args)
        observer(x)
        return observer.get_qparams()

    return observe
