"""What is put on a model from outside to save memory or to change a step.

``LEVERS`` is the list of levers, by the setting that puts them on. They are put on, and asked, in its order. A new one
is a file here and a line there. ``offload_frozen`` says where weights are kept, so it is in ``placement``;
``offload_optimizer`` is an option of the optimizer.
"""

from __future__ import annotations

from lisatune.levers.activation_offloading import ActivationOffloading
from lisatune.levers.base import Lever
from lisatune.levers.frozen_learning_rate import FrozenLearningRate
from lisatune.levers.gradient_checkpointing import GradientCheckpointing
from lisatune.levers.inverse_chance import InverseChance
from lisatune.levers.neftune import Neftune
from lisatune.levers.optimizer_in_backward import OptimizerInBackward
from lisatune.levers.torch_compile import TorchCompile
from lisatune.levers.vocabulary_blocks import VocabularyBlocks

LEVERS: dict[str, type[Lever]] = {
    "neftune_noise_alpha": Neftune,  # before whatever else looks at the embedding's output
    "torch_compile": TorchCompile,  # a checkpoint runs the compiled layer twice
    "gradient_checkpointing": GradientCheckpointing,
    "activation_offloading": ActivationOffloading,
    "vocabulary_blocks": VocabularyBlocks,
    "optimizer_in_backward": OptimizerInBackward,
    "frozen_learning_rate": FrozenLearningRate,
    "inverse_chance": InverseChance,  # after whatever else hooks into the optimizer's step
}
