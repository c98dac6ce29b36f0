"""Copy tensors between the CPU and an accelerator by way of page-locked memory.

A plain copy from or to ordinary memory is the work of one thread of the driver, new memory's page
faults included; here all threads of torch do that part, and the device copies at full speed.
"""

import torch
from torch import Tensor

# Bytes copied at a time, and of the buffer; smaller tensors than FEW are not worth it.
PART = 32 << 20
FEW = 1 << 20


def carry(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, byte for byte.

    Waits for the copy. The buffer stays in torch's cache of page-locked memory.

    Args:
        tensor: of any shape and dtype, on the CPU or on an accelerator.
        device: the other of the two.

    Returns:
        A copy; the tensor itself if it is there already.
    """
    if tensor.nbytes < FEW or tensor.device == device:
        return tensor.to(device)
    result = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    source, target = (t.reshape(-1).view(torch.uint8) for t in (tensor.detach(), result))
    buffer = torch.empty(min(PART, len(source)), dtype=torch.uint8, pin_memory=True)
    for come, go in zip(source.split(PART), target.split(PART), strict=True):
        locked = buffer[: len(come)]
        locked.copy_(come)
        go.copy_(locked)
    return result
