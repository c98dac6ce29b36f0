"""Quantize a loaded model block by block: the glue around `calibration.pipeline`."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from scalesweep_hf.calibration import Statistics
from scalesweep_hf.calibration.blocks import check_chain, find_blocks, record_calls
from scalesweep_hf.calibration.pipeline import BlockWalk, observe_outside
from scalesweep_hf.calibration.resume import ResumeFolder, model_digest
from scalesweep_hf.calibration.run import make_runner
from scalesweep_hf.config import ScaleSweepConfig
from scalesweep_hf.modules import attention
from scalesweep_hf.modules.linear import share_input_importance
from scalesweep_hf.names import canonical_name
from scalesweep_hf.packing import GroupPacker, without_hooks
from scalesweep_hf.states import fill_states, hooked, weigh_values
from scalesweep_hf.statistics import make_tokens, observed_by
from scalesweep_hf.targets import group_by_input, linears
from scalesweep_hf.version import __version__

# Elements of hidden states in one forward pass of a block, unless the user sets batch_size: 4,096
# tokens of a 1 B model. What a block computes inside is about ten times as much.
BATCH_ELEMENTS = 1 << 23
# Fields that change neither a checkpoint's tensors nor its recipe.
INCIDENTAL = ("backend", "packed_cache", "offload_hidden_states", "resume_dir", "pipeline")


def quantize_blockwise(
    model: PreTrainedModel, config: ScaleSweepConfig, packer: GroupPacker
) -> None:
    """Calibrate and quantize the blocks of a model in order.

    Afterwards ``packer.statistics`` has the provenance of the text, which modules share an input,
    and the statistics of what is outside the blocks, which is still to be quantized.

    Args:
        model: loaded, in full precision, with its Linears and attention modules swapped and hooked.
        config: the recipe.
        packer: quantizes the groups of a block.

    Raises:
        NotBlockwiseError: the model cannot be run block by block; nothing has been changed.
        ValueError: calibration did not reach a Linear, or a layer could not be quantized.
    """
    names = list(linears(model))
    blocks = find_blocks(model, names)
    run = make_runner(model, _inside(names, blocks))
    check_chain(model, blocks, run)
    resume = None
    if config.resume_dir is not None:
        resume = ResumeFolder(config.resume_dir, _describe(model, config))
    tokens, provenance = _tokens(model, config, resume)
    row = tokens.shape[1] * model.config.get_text_config().hidden_size
    batches = tokens.split(config.batch_size or max(BATCH_ELEMENTS // row, 1))
    store = torch.device("cpu") if config.offload_hidden_states else None
    calls = record_calls(model, blocks, batches, run, store=store)
    devices = {name: _execution_device(model.get_submodule(name)) for name in blocks}
    observed = observed_by(config)
    walk = BlockWalk(model, calls, devices, observed, reference=config.in_order)
    statistics = Statistics(provenance)
    with without_hooks(model):
        quantizer = BlockQuantizer(model, config, packer, walk)
        statistics.shared_inputs = _quantize_all(quantizer, resume)
    if outside := [name for name in names if name not in _inside(names, blocks)]:
        rest = observe_outside(model, calls, batches, outside, observed)
        statistics.update(rest)
        statistics.shared_inputs |= rest.shared_inputs
    packer.statistics = statistics


class BlockQuantizer:
    """Quantizes one block of a model after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: ScaleSweepConfig,
        packer: GroupPacker,
        walk: BlockWalk,
    ) -> None:
        """Keep what quantizing a block needs."""
        self.model, self.config, self.packer, self.walk = model, config, packer, walk

    def quantize(self, index: int) -> tuple[dict[str, Tensor], dict[str, int], float]:
        """Quantize a block and take the hidden states through it.

        Returns:
            Its packed tensors by name; which of its Linears share inputs; and the squared error of
            its output on the first batch, relative to the squared output.
        """
        block = [self.walk.calls.names[index]]
        names, states = _inside(linears(self.model), block), _inside(hooked(self.model), block)
        with self.walk.on_device(index):
            expected = self.walk.sample(index)
            if self.config.in_order:
                shared_inputs = self._quantize_in_order(index, names, states)
            else:
                shared_inputs = self._quantize_at_once(index, names, states)
            if self.config.propagate_quantized:
                self.walk.advance(index)
            error = (self.walk.sample(index) - expected).float().square().sum()
            loss = float(error / expected.float().square().sum())
            return _packed_tensors(self.model, [*names, *states]), shared_inputs, loss

    def _quantize_at_once(
        self, index: int, names: Sequence[str], states: Sequence[str]
    ) -> dict[str, int]:
        """Quantize a block from one run over the text."""
        statistics = self.walk.observe(index, names, states)
        if not self.config.propagate_quantized:
            self.walk.advance(index)
        shared_inputs = dict(statistics.shared_inputs)
        self.packer.statistics = statistics
        for group in self._group(names, shared_inputs):
            self.packer.pack(self.model, group)
        self._finish(statistics, states)
        return shared_inputs

    def _quantize_in_order(
        self, index: int, names: Sequence[str], states: Sequence[str]
    ) -> dict[str, int]:
        """Quantize a block group by group, each from the quantized output of those before it."""
        shared_inputs = dict(self.walk.probe(index, names).shared_inputs)
        for group in self._group(names, shared_inputs):
            self.packer.statistics = self.walk.observe_input(index, group[0])
            self.packer.pack(self.model, group)
            share_input_importance([self.model.get_submodule(name) for name in group])
        self._finish(self.walk.observe(index, [], states) if states else Statistics(), states)
        return shared_inputs

    def _group(self, names: Sequence[str], shared_inputs: dict[str, int]) -> list[list[str]]:
        """Group the Linears of a block by input, in the order in which they run."""
        full = {canonical_name(self.model, name): name for name in names}
        groups = group_by_input(shared_inputs, shared_inputs)
        self.packer.groups = [[full[name] for name in group] for group in groups]
        return self.packer.groups

    def _finish(self, statistics: Statistics, states: Sequence[str]) -> None:
        """Make the block compute as it will once it is reloaded."""
        self.packer.share_importance(self.model)
        fill_states(self.model, statistics)
        for name in states:
            weigh_values(self.model.get_submodule(name))


def _quantize_all(quantizer: BlockQuantizer, resume: ResumeFolder | None) -> dict[str, int]:
    """Quantize all blocks that are not finished; return which Linears share inputs."""
    walk, shared_inputs = quantizer.walk, dict[str, int]()
    finished = 0
    if resume is not None:
        finished = resume.finished
        shared_inputs = _restore(quantizer.model, walk, resume)
    blocks = walk.calls.names
    with tqdm(
        total=len(blocks), initial=finished, desc="Blocks", unit="block", disable=None
    ) as bar:
        for index in range(finished, len(blocks)):
            tensors, shared, loss = quantizer.quantize(index)
            shared_inputs |= shared
            if resume is not None:
                hidden = [*walk.calls.hidden, *(walk.exact or ())]
                resume.save_block(index, tensors, shared, hidden)
            bar.set_postfix(block=blocks[index], loss=f"{loss:.1e}")
            bar.update()
    return shared_inputs


def _restore(model: PreTrainedModel, walk: BlockWalk, resume: ResumeFolder) -> dict[str, int]:
    """Install the blocks that an earlier start has finished; return which Linears share inputs."""
    shared_inputs: dict[str, int] = {}
    for index in range(resume.finished):
        tensors, shared = resume.load_block(index)
        _install(model, tensors)
        shared_inputs |= shared
    if resume.finished:
        saved, count = resume.load_hidden(), len(walk.calls.hidden)
        for batch, hidden in enumerate(walk.calls.hidden):
            walk.calls.hidden[batch] = saved[batch].to(hidden.device)
            if walk.exact is not None:
                walk.exact[batch] = saved[count + batch].to(hidden.device)
    return shared_inputs


def _packed_tensors(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Return what quantizing these Linears and attention modules has set, by parameter name."""
    modules = linears(model)
    tensors = {}
    for name in names:
        parts = modules[name].packed_layout() if name in modules else attention.PARAMETERS
        for part in parts:
            if (tensor := getattr(model.get_submodule(name), part)) is not None:
                tensors[f"{name}.{part}"] = tensor
    return tensors


def _install(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Set what `_packed_tensors` returned, each where its module is."""
    modules = linears(model)
    for full_name, tensor in tensors.items():
        name, _, part = full_name.rpartition(".")
        module = model.get_submodule(name)
        device = next(module.parameters()).device
        if name in modules:
            modules[name].set_packed({part: tensor.to(device)})
        else:
            attention.set_states(module, {part: tensor.to(device)})


def _inside(names: Iterable[str], blocks: Sequence[str]) -> list[str]:
    prefixes = tuple(f"{block}." for block in blocks)
    return [name for name in names if name.startswith(prefixes)]


def _execution_device(block: nn.Module) -> torch.device:
    """Return where accelerate runs a block, or where its parameters are."""
    for module in block.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(block.parameters()).device


def _tokens(
    model: PreTrainedModel, config: ScaleSweepConfig, resume: ResumeFolder | None
) -> tuple[Tensor, dict[str, Any]]:
    if resume is None:
        return make_tokens(model, config)
    written = isinstance(config.dataset, str) and config.dataset == "self"
    return resume.tokens(lambda: make_tokens(model, config), reuse=written)


def _describe(model: PreTrainedModel, config: ScaleSweepConfig) -> dict[str, Any]:
    """Return what decides the bytes of a quantized model, in JSON types."""
    recipe = {key: value for key, value in config.to_dict().items() if key not in INCIDENTAL}
    about = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "quantization_config", "transformers_version"):
        about.pop(name, None)
    return {
        "model": model_digest(model),
        "config": about,
        "attention": model.config._attn_implementation,
        "device": str(model.device),
        "recipe": recipe,
        "scalesweep_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
