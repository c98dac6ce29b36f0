"""Calibrate and quantize a model block by block, in the memory of one block's statistics.

Only hidden states are kept between blocks. Each block is run with its full-precision weights, to
observe the inputs of its Linears, and then quantized, for the inputs of the next.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scalesweep_hf.calibration.blocks import Calls, replaced_blocks, run_block
from scalesweep_hf.calibration.collect import Observed, Statistics, collect
from scalesweep_hf.calibration.run import check_statistics, make_runner
from scalesweep_hf.calibration.states import collect_states
from scalesweep_hf.names import canonical_name


class _Stopped(Exception):  # noqa: N818 (no error)
    """Ends a forward pass once what was asked for has been seen."""


class BlockWalk:
    """Takes hidden states through the blocks of a model, one block at a time.

    For every index in order, inside `on_device`: observe, quantize the block, and `advance` after
    it (or before, for blocks that shall see full-precision inputs). Either `observe` all Linears at
    once; or learn from `probe` which of them read one input, and `observe_input` one input after
    the other, quantizing in between.

    Attributes:
        calls: of the blocks; the hidden states are those that enter the next block.
        exact: the same of the full-precision model; None unless it is run beside.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Calls,
        devices: Mapping[str, torch.device],
        observed: Observed,
        *,
        reference: bool = False,
    ) -> None:
        """Start before the first block.

        Args:
            model: in evaluation mode, without accelerate's hooks.
            calls: as `record_calls` recorded them.
            devices: where each block runs, by name.
            observed: what to observe of inputs.
            reference: whether to run the full-precision model beside the quantized one, so that
                `observe_input` sees the inputs of both.
        """
        self.calls = calls
        self.exact = list(calls.hidden) if reference else None
        self._model = model
        self._devices = devices
        self._observed = observed
        self._entry: Tensor | None = None  # hidden states of the first batch
        self._twin: nn.Module | None = None  # the full-precision block

    @contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        """Keep a block on the device where it runs; then return it to where it was."""
        block = self._block(index)
        home = next(block.parameters()).device
        block.to(self._device(index))
        self._entry = self.calls.hidden[0]
        if self.exact is not None:
            self._twin = copy.deepcopy(block)
        try:
            yield
        finally:
            self._entry = self._twin = None
            block.to(home)

    def observe(self, index: int, names: Iterable[str], attention: Iterable[str]) -> Statistics:
        """Run a block on all batches and observe it.

        Args:
            index: of the block.
            names: of the Linears inside it that are observed.
            attention: of the hooked attention modules inside it that are observed.

        Returns:
            Their statistics.

        Raises:
            ValueError: no text reached a Linear, or its input was not finite.
        """
        names = list(names)
        with (
            torch.no_grad(),
            collect_states(self._model, attention) as states,
            collect(self._model, names, self._observed) as statistics,
        ):
            for batch, hidden in enumerate(self.calls.hidden):
                self._run(index, batch, hidden)
        statistics.states = {canonical_name(self._model, name): states[name] for name in states}
        check_statistics(self._model, statistics, names)
        return statistics

    def probe(self, index: int, names: Sequence[str]) -> Statistics:
        """Run a block on the first batch only: the order of its Linears, and which share inputs.

        Raises:
            ValueError: a Linear did not run, or its input was not finite.
        """
        with torch.no_grad(), collect(self._model, names) as statistics:
            self._run(index, 0, self.calls.hidden[0])
        check_statistics(self._model, statistics, names)
        return statistics

    def observe_input(self, index: int, name: str) -> Statistics:
        """Run a block, up to one of its Linears, on all batches and observe that Linear's input.

        Args:
            index: of the block, some of whose Linears may be quantized already.
            name: of the Linear.

        Returns:
            Its statistics, with the inputs of the full-precision model where that is run beside.

        Raises:
            ValueError: its input was not finite.
        """
        module = self._model.get_submodule(name)
        exact: list[Tensor] = []
        observed = replace(self._observed, reference=exact.pop if self._twin is not None else None)
        with torch.no_grad(), ExitStack() as stack:
            statistics = stack.enter_context(collect(self._model, [name], observed))
            stack.callback(module.register_forward_pre_hook(_stop).remove)
            for batch, hidden in enumerate(self.calls.hidden):
                if self.exact is not None:
                    exact.append(self._exact_input(index, batch, name))
                self._run_until_stopped(index, batch, hidden)
        check_statistics(self._model, statistics, [name])
        return statistics

    def sample(self, index: int) -> Tensor:
        """Return what a block, as it is now, makes of the first batch that entered it."""
        assert self._entry is not None
        with torch.no_grad():
            return self._run(index, 0, self._entry)

    def advance(self, index: int) -> None:
        """Take the hidden states through a block as it is now; exact ones through what it was."""
        with torch.no_grad():
            for batch, hidden in enumerate(self.calls.hidden):
                self.calls.hidden[batch] = self._run(index, batch, hidden).to(hidden.device)
            for batch, hidden in enumerate(self.exact or ()):
                assert self.exact is not None
                after = self._run(index, batch, hidden, self._twin)
                self.exact[batch] = after.to(hidden.device)

    def _run(
        self, index: int, batch: int, hidden: Tensor, block: nn.Module | None = None
    ) -> Tensor:
        call = self.calls.arguments[batch][index]
        return run_block(block or self._block(index), hidden, call, self._device(index))

    def _run_until_stopped(
        self, index: int, batch: int, hidden: Tensor, block: nn.Module | None = None
    ) -> None:
        with suppress(_Stopped):
            self._run(index, batch, hidden, block)

    def _exact_input(self, index: int, batch: int, name: str) -> Tensor:
        """Return what enters a Linear of the full-precision block."""
        assert self.exact is not None
        assert self._twin is not None
        twin = self._twin.get_submodule(name.removeprefix(f"{self.calls.names[index]}."))
        inputs: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["input"])
            raise _Stopped

        handle = twin.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self._run_until_stopped(index, batch, self.exact[batch], self._twin)
        finally:
            handle.remove()
        return inputs.pop()

    def _block(self, index: int) -> nn.Module:
        return self._model.get_submodule(self.calls.names[index])

    def _device(self, index: int) -> torch.device:
        return self._devices[self.calls.names[index]]


def _stop(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise _Stopped


def observe_outside(
    model: nn.Module,
    calls: Calls,
    batches: Sequence[Tensor],
    names: Iterable[str],
    observed: Observed,
) -> Statistics:
    """Observe Linears before and after the blocks, once hidden states have left the last block.

    Args:
        model: in evaluation mode; its blocks do not run.
        calls: with the hidden states that left the last block.
        batches: the token ids [B, T] that they come from.
        names: of the Linears.
        observed: what to observe.

    Returns:
        Their statistics.

    Raises:
        ValueError: no text reached a Linear, or its input was not finite.
    """
    names = list(names)
    last = len(calls.names) - 1
    current = iter(calls.hidden)

    def replacement(index: int, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        return next(current).to(hidden.device) if index == last else hidden

    run = make_runner(model, names)
    with (
        torch.no_grad(),
        collect(model, names, observed) as statistics,
        replaced_blocks(model, calls.names, replacement),
    ):
        for batch in batches:
            run(batch)
    check_statistics(model, statistics, names)
    return statistics
