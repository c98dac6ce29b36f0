"""Find a model's blocks and what each is called with, so that they can be run one at a time."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn

PROBE_TOKENS = 16
# Relative difference of hidden states, blocks one by one against the whole model.
TOLERANCE = 1e-3


class NotBlockwiseError(ValueError):
    """A model cannot be run block by block; the message says why."""


@dataclass
class Call:
    """The arguments of one block in one forward pass, hidden states aside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Calls:
    """What the blocks of a model are called with.

    Attributes:
        names: of the blocks, in order.
        hidden: per batch the hidden states [B, T, H] that enter the next block to run.
        arguments: per batch and block the other arguments; tensors that are equal are one.
    """

    names: list[str]
    hidden: list[Tensor] = field(default_factory=list)
    arguments: list[list[Call]] = field(default_factory=list)


def find_blocks(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Name the blocks of a model: the elements of the one ModuleList that holds these modules.

    Args:
        model: may be on the meta device.
        names: of modules of interest; those outside any ModuleList are left out of account.

    Returns:
        Names of all elements of the outermost ModuleList, in order.

    Raises:
        NotBlockwiseError: there is no such ModuleList, or more than one.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost: set[str] = set()
    for name in names:  # parents come before their children in the list
        outermost.update([entry for entry in lists if name.startswith(f"{entry}.")][:1])
    if not outermost:
        raise NotBlockwiseError("its Linears are in no torch.nn.ModuleList")
    if len(outermost) > 1:
        raise NotBlockwiseError(
            f"its Linears are in several ModuleLists: {', '.join(sorted(outermost))}"
        )
    (chosen,) = outermost
    return [f"{chosen}.{key}" for key, _ in model.get_submodule(chosen).named_children()]


def check_chain(model: nn.Module, names: Sequence[str], run: Callable[[Tensor], Any]) -> None:
    """Check that a model's blocks can be run one by one, on one short row of tokens.

    Args:
        model: not changed.
        names: of its blocks.
        run: runs token ids [B, T] through the model.

    Raises:
        NotBlockwiseError: the blocks do not form a chain of hidden states; says why.
        ValueError: hidden states are not finite.
    """
    tokens = torch.arange(PROBE_TOKENS)[None]  # [1, T]
    ran: list[str] = []
    outputs: list[Any] = []

    def observe(name: str, module: nn.Module, args: Any, output: Any) -> None:
        ran.append(name)
        outputs.append(output)

    with torch.no_grad(), ExitStack() as stack:
        for name in names:
            hook = functools.partial(observe, name)
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        run(tokens)
    if ran != list(names):
        raise NotBlockwiseError(
            f"its {len(names)} blocks do not run once each in order, but as {', '.join(ran)}"
        )
    if not all(isinstance(output, Tensor) for output in outputs):
        raise NotBlockwiseError(f"its blocks return more than hidden states ({names[0]})")
    calls = record_calls(model, names, [tokens], run)
    for _ in range(2):  # again, since a block may change what it is given
        hidden = calls.hidden[0]
        for name, call, expected in zip(names, calls.arguments[0], outputs, strict=True):
            with torch.no_grad():
                hidden = run_block(model.get_submodule(name), hidden, call, hidden.device)
            if not torch.isfinite(expected).all():
                raise ValueError(f"{name}: its output is not finite: check the model's weights")
            error = (hidden.to(expected.device) - expected).float().norm()
            if not error <= TOLERANCE * expected.float().norm():
                raise NotBlockwiseError(
                    f"its blocks alone give other hidden states than the whole model ({name}): "
                    "they read or change more than their arguments"
                )


def record_calls(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Tensor],
    run: Callable[[Tensor], Any],
    *,
    store: torch.device | None = None,
) -> Calls:
    """Record what every block is called with, running everything but the blocks.

    Args:
        model: not changed.
        names: of its blocks, which `check_chain` has accepted.
        batches: token ids [B, T] each.
        run: runs a batch through the model.
        store: where hidden states are kept; None keeps them where they are.

    Returns:
        The calls, with the hidden states that enter the first block.
    """
    calls = Calls(list(names))
    first: list[Tensor] = []  # hidden states of this batch
    kept: list[Tensor] = []  # other tensors of the first batch
    seen: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that its id stays taken

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in seen:
            alike = (k for k in kept if k.shape == tensor.shape and k.dtype == tensor.dtype)
            result = next((k for k in alike if k.equal(tensor.to(k.device))), None)
            if result is None:
                result = tensor.detach().clone()
                if not calls.hidden:
                    kept.append(result)
                elif store is not None:
                    result = result.to(store)
            seen[id(tensor)] = (tensor, result)
        return seen[id(tensor)][1]

    def replacement(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if index == 0:
            first.append(hidden.detach().to(store or hidden.device))
            calls.arguments.append([])
        calls.arguments[-1].append(Call(*recursively_apply(keep, (args, kwargs))))
        return hidden

    with torch.no_grad(), replaced_blocks(model, names, replacement):
        for batch in batches:
            run(batch)
            calls.hidden.append(first.pop())
            seen.clear()
    return calls


def run_block(block: nn.Module, hidden: Tensor, call: Call, device: torch.device) -> Tensor:
    """Run one block on hidden states [B, T, H]; return those that leave it, on its device."""
    args, kwargs = send_to_device((call.args, call.kwargs), device)
    output = block(hidden.to(device), *args, **kwargs)
    assert isinstance(output, Tensor)
    return output


@contextmanager
def replaced_blocks(
    model: nn.Module, names: Sequence[str], replacement: Callable[..., Tensor]
) -> Iterator[None]:
    """Let blocks return what ``replacement(index, hidden, *args, **kwargs)`` does, for a while."""
    with ExitStack() as stack:
        for index, name in enumerate(names):
            block = model.get_submodule(name)
            own = vars(block).get("forward")
            stack.callback(_restore_forward, block, own)
            block.forward = functools.partial(_stand_in, replacement, index)
        yield


def _restore_forward(block: nn.Module, own: Any) -> None:
    if own is None:
        vars(block).pop("forward", None)
    else:  # accelerate has put its own there
        block.forward = own


def _stand_in(replacement: Callable[..., Tensor], index: int, *args: Any, **kwargs: Any) -> Any:
    if args:
        return replacement(index, *args, **kwargs)
    return replacement(index, kwargs.pop("hidden_states"), **kwargs)
