"""Where things are in a model's tree of modules: decoder layers, towers, and what its authors keep frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lisatune.errors import UserError

Stacks = nn.ModuleList | nn.Sequential
NAME_THEM = (
    "name them by hand with decoder_name=<dotted path of the nn.ModuleList>, for example decoder_name=model.layers"
)


def decoder_lists(model: nn.Module, embedding_name: str) -> list[str]:
    """Dotted paths of the lists of layers: one, or the encoder's and the decoder's.

    Raises: UserError if there are none, or the choice is not clear.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [_nearest_list(model, embedding_name)]
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for side in ("encoder", "decoder"):
        half = embedding_of(model, f"get_{side}")
        if half is None or half is model or id(half) not in names:
            raise UserError(f"{type(model).__name__} has an encoder and a decoder, but does not say which: {NAME_THEM}")
        own = embedding_of(half, "get_input_embeddings")
        inside = {id(module): name for name, module in half.named_modules()}
        name = _nearest_list(half, inside.get(id(own), ""), type(model).__name__, f"{names[id(half)]}.")
        found.append(f"{names[id(half)]}.{name}")
    return found


def embedding_of(model: nn.Module, getter: str) -> nn.Module | None:
    """What the method ``getter`` of a transformers model gives, if it is there and gives a module."""
    try:
        module = getattr(model, getter)()
    # transformers itself raises NotImplementedError where a model has no such module, as for models of sound
    except (AttributeError, NotImplementedError):
        return None
    return module if isinstance(module, nn.Module) else None


def _nearest_list(model: nn.Module, embedding_name: str, owner: str = "", prefix: str = "") -> str:
    """The list that shares the longest path with the embedding; of several the one that is least deep.

    Lists inside other lists do not count.
    """
    modules = model.named_modules()
    stacks: list[str] = [name for name, m in modules if isinstance(m, nn.ModuleList) and is_stack(m)]
    outer = [s for s in stacks if not any(s.startswith(other + ".") for other in stacks)]
    depth = {
        s: len(common_parent(embedding_name, s)) for s in outer
    }  # counted in characters, since all names begin alike
    nearest = [s for s in outer if depth[s] == max(depth.values())]
    levels = [s.count(".") for s in nearest]
    nearest = [s for s, level in zip(nearest, levels, strict=True) if level == min(levels)]
    owner = owner or type(model).__name__
    if not nearest:
        raise UserError(f"found no decoder layers in {owner}: {NAME_THEM}")
    if len(nearest) > 1:
        every = ",".join(f"{prefix}{name}" for name in nearest)
        raise UserError(
            f"found several lists of layers in {owner}: name those to sample, for example decoder_name={every}"
        )
    return nearest[0]


def is_stack(module: nn.Module) -> bool:
    """Whether ``module`` is a list of blocks, each with submodules and a weight matrix.

    A hybrid model's blocks may be of several classes. Those of one class are judged by the first.
    """
    if not isinstance(module, Stacks) or len(module) == 0:
        return False
    blocks = list(module)
    if all(type(block) is type(blocks[0]) for block in blocks):
        blocks = blocks[:1]
    return all(any(True for _ in b.children()) and any(p.ndim >= 2 for p in b.parameters()) for b in blocks)


def common_parent(*names: str) -> str:
    """The dotted path of the smallest module that holds all of them."""
    common = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def outside_modules(model: nn.Module, trunk: nn.Module, kept: list[nn.Module]) -> Iterator[nn.Module]:
    """The modules whose own parameters are not on the path of a text: towers, and what joins them to the text model.

    A tower is a module with a stack of its own, next to the text model or inside of it, that holds nothing of ``kept``
    (embedding, decoder layers, head). Above the text model, whatever stands next to a tower is outside too, as a
    projector is. What stands where there is no tower comes after the text model: a head, or a transform before it.
    """
    of_kept = {id(module) for item in kept for module in item.modules()}

    def walk(module: nn.Module, in_trunk: bool) -> Iterator[nn.Module]:
        in_trunk = in_trunk or module is trunk
        beside = [child for child in module.children() if not any(id(m) in of_kept for m in child.modules())]
        towers = [child for child in beside if any(is_stack(m) for m in child.modules())]
        if towers and not in_trunk:
            yield module
            towers = beside
        for tower in towers:
            yield from tower.modules()
        for child in module.children():
            if id(child) not in of_kept and child not in beside:
                yield from walk(child, in_trunk)

    return walk(model, in_trunk=False)


def fixed_by_authors(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The parameters that ask for no gradient in a model of this class just built: router biases, sinusoids.

    Each as its module and its name in it. The class is built again, on the meta device, only if something is frozen.
    """
    frozen = {name for name, p in model.named_parameters() if p.is_floating_point() and not p.requires_grad}
    if not frozen or not hasattr(model, "config"):
        return
    try:
        with torch.device("meta"):
            fresh = _class_of(model)(copy.deepcopy(model.config))
    except Exception:  # whatever a model's own code does that needs data: then nothing is known
        return
    for name, parameter in fresh.named_parameters():
        if name in frozen and not parameter.requires_grad:
            parent, _, last = name.rpartition(".")
            yield model.get_submodule(parent), last


def _class_of(model: nn.Module) -> Callable[[Any], nn.Module]:
    """The class that wrote the model; FSDP2 makes a subclass of it."""
    return next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))


def owner_of_forward(model: nn.Module, name: str) -> nn.Module:
    """The module at ``name``, or the smallest above it that is no mere list.

    OPT keeps its layers in ``model.decoder`` and a vision-language model in ``model.language_model``: for hidden states
    either will do, for the count of the text model's parameters the inner one is meant.
    """
    module = model.get_submodule(name)
    while name and isinstance(module, nn.ModuleList | nn.ModuleDict):
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
    return module
