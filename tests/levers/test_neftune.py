"""NEFTune: the noise of transformers, in training alone, the same for the same seed and step."""

import math

import torch

from lisatune.assemble import make_learner
from lisatune.layers import find_layers
from lisatune.run.schedule import seed_step
from lisatune.settings import build_config
from tiny import VOCABULARY, make_llama


def test_noise_is_of_the_seed_and_the_step_and_of_training_alone():
    needed = {"model": "-", "data": "-", "output": "-", "dtype": "float32"}
    model = make_llama()
    make_learner(build_config(needed | {"neftune_noise_alpha": 5}), model, torch.device("cpu"))
    embedding, ids = find_layers(model).embedding, torch.randint(3, VOCABULARY, (2, 12))
    model.eval()
    plain = embedding(ids)
    assert torch.equal(plain, embedding.weight[ids])
    model.train()

    def noise(seed, step):
        seed_step(seed, step)
        return embedding(ids) - plain

    bound = 5 / math.sqrt(12 * 32)
    assert 0.9 * bound < noise(0, 3).abs().max() <= bound * (1 + 1e-5), "rounded in float32"
    assert torch.equal(noise(0, 3), noise(0, 3))
    assert not torch.equal(noise(0, 3), noise(0, 4))
    assert not torch.equal(noise(0, 3), noise(1, 3))
