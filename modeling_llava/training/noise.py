"""NEFTune in packs: noise on the embeddings of each sample as strong as if it stood alone (Jain et al. 2023, §2)."""

import torch
from torch import nn
from transformers import TrainerCallback

from .preparation import core_model


class NoiseBySample(TrainerCallback):
    """
    Adds uniform noise in ±`alpha` / √(L · hidden_size) to embeddings in training, L being the length of the sample.
    `Trainer` would take the length of the row, and a pack of nine samples would get a third of the noise.
    """

    def __init__(self, alpha: float):
        self.alpha = alpha
        self.lengths = None
        self.hooks = []

    def on_train_begin(self, args, state, control, model: nn.Module, **kwargs):
        self._remove_hooks()  # of a training that was broken off: noise would be added twice
        core = core_model(model)
        self.hooks = [
            # not on `core` itself, whose forward PEFT calls without its hooks
            core.model.register_forward_pre_hook(self._note_lengths, with_kwargs=True),
            core.get_input_embeddings().register_forward_hook(self._add_noise),
        ]

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hooks()

    def _remove_hooks(self):
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _note_lengths(self, module, args, kwargs):
        ends = kwargs.get("cu_seq_lens_q")
        self.lengths = None if ends is None else ends.diff()

    def _add_noise(self, module, args, embeddings):
        # embeddings [batch_size, sequence_length, hidden_size]
        if not module.training:
            return embeddings
        lengths = torch.tensor(embeddings.shape[1]) if self.lengths is None else self.lengths
        strength = self.alpha / (lengths * embeddings.shape[-1]).sqrt()
        if self.lengths is not None:
            strength = strength.repeat_interleave(self.lengths)[:, None]  # [sequence_length, 1]
        noise = torch.empty_like(embeddings).uniform_(-1, 1)
        return embeddings + noise * strength.to(embeddings.device, embeddings.dtype)


__all__ = ["NoiseBySample"]
