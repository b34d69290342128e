"""A language model seen as embedding, decoder layers, norm and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lisatune.errors import UserError

Trains = bool | Literal["sampled"]  # of embedding and head: in every interval, in none, or when drawn like a layer


@dataclass(frozen=True)
class Layers:
    """The parts of a causal language model, as modules (never as tensors, which wrappers may replace).

    Every parameter of the model belongs to exactly one part:

    ======================  ==================================================================================
    ``embedding``           the input embedding, and position embeddings beside it; of a tied pair it owns the tensor
    ``layers.0``, ...       the decoder layers, each with everything inside it (a mixture's experts too)
    ``norm``                the rest of the text model: final norm, projections
    ``head``                the output embedding; empty when tied
    ``outside``             what is not of the text model (a vision tower and its projector)
    ======================  ==================================================================================

    LISA trains the decoder layers by turns, ``norm`` always, embedding and head always unless told otherwise, and
    ``outside`` never.
    """

    model: nn.Module
    trunk_module: nn.Module
    embedding: nn.Module
    decoder: tuple[nn.Module, ...]
    decoder_name: str
    head: nn.Module | None

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        own = {id(p) for p in self.embedding.parameters()}
        return self.head is not None and any(id(p) in own for p in self.head.parameters())

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parts to their parameters by name; each tensor once, under the first name it has in the model."""
        prefixes = {id(self.embedding): "embedding"}
        prefixes |= {id(layer): f"layers.{i}" for i, layer in enumerate(self.decoder)}
        if self.head is not None:
            prefixes[id(self.head)] = "head"
        owner: dict[int, str] = {}
        for module in (self.embedding, *self.decoder, *([self.head] if self.head is not None else [])):
            for parameter in module.parameters():
                owner.setdefault(id(parameter), prefixes[id(module)])
        for module in self.trunk_module.modules():
            part = "embedding" if isinstance(module, nn.Embedding) else "norm"
            for parameter in module.parameters(recurse=False):
                owner.setdefault(id(parameter), part)
        names = ["embedding", *(f"layers.{i}" for i in range(len(self.decoder))), "norm", "head", "outside"]
        parts: dict[str, dict[str, nn.Parameter]] = {name: {} for name in names}
        for name, parameter in self.model.named_parameters():
            if hasattr(parameter, "cut"):  # a view of rows of another one, see ``slices``
                continue
            parts[owner.get(id(parameter), "outside")][name] = parameter
        return parts

    def num_parameters(self) -> dict[str, int]:
        """Parameters of each part, tied weights once."""
        return {part: sum(p.numel() for p in own.values()) for part, own in self.parts().items()}

    def pool(self, *, train_embedding: Trains = True, train_head: Trains = True) -> tuple[str, ...]:
        """The parts that LISA draws from: the decoder layers, then embedding and head where they are ``sampled``.

        A tied pair is drawn as one, the embedding. Index i of a draw is part i of the pool.
        """
        parts = [f"layers.{i}" for i in range(len(self.decoder))]
        parts += ["embedding"] if train_embedding == "sampled" else []
        return tuple(parts + (["head"] if train_head == "sampled" and not self.tied else []))

    def trained_parts(
        self, drawn: tuple[int, ...], *, train_embedding: Trains = True, train_head: Trains = True
    ) -> set[str]:
        """The parts that LISA trains while ``drawn``, indices of the pool, are active."""
        pool = self.pool(train_embedding=train_embedding, train_head=train_head)
        always = {"embedding": train_embedding is True, "norm": True, "head": train_head is True}
        return {part for part, trains in always.items() if trains} | {pool[i] for i in drawn}

    def num_trainable(
        self, drawn: tuple[int, ...], *, train_embedding: Trains = True, train_head: Trains = True
    ) -> int:
        """Parameters that LISA trains while ``drawn``, indices of the pool, are active."""
        counts = self.num_parameters()
        parts = self.trained_parts(drawn, train_embedding=train_embedding, train_head=train_head)
        return sum(counts[part] for part in parts)

    def trunk(self, **inputs: Tensor | None) -> Tensor:
        """Last hidden states, shape (B, T, D): the model without its head."""
        hidden: Tensor = self.trunk_module(**inputs, use_cache=False).last_hidden_state
        return hidden

    def head_is_linear(self) -> bool:
        """Whether the logits are just ``head(trunk(ids))``: some models scale or cap them afterwards.

        Found by trying it on two tokens, so that no table of model classes has to be kept. On the meta device, where
        logits have no values, it is found by whether they are the very tensor that the head made of the trunk's output.
        """
        if not isinstance(self.head, nn.Linear):
            return False
        ids = torch.ones(1, 2, dtype=torch.int64, device=next(self.embedding.parameters()).device)
        made: dict[str, Tensor] = {}
        hooks = [
            self.trunk_module.register_forward_hook(lambda _m, _a, out: made.update(hidden=out.last_hidden_state)),
            self.head.register_forward_hook(lambda _m, args, out: made.update(input=args[0], logits=out)),
        ]
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                logits = self.model(input_ids=ids, use_cache=False).logits
                if not ids.is_meta:
                    return torch.equal(logits, self.head(self.trunk(input_ids=ids)))
                return _share(made["input"], made["hidden"]) and _share(made["logits"], logits)
        except RuntimeError:
            if not ids.is_meta:
                raise
            return False  # it cannot run there at all, which is for the forecast to say
        finally:
            self.model.train(training)
            for hook in hooks:
                hook.remove()

    def describe(self) -> str:
        """What was found, in one line."""
        counts = self.num_parameters()
        per_layer = counts["layers.0"]
        text = (
            f"{type(self.model).__name__}: {len(self.decoder)} decoder layers at {self.decoder_name} "
            f"({per_layer:,} parameters in the first), embedding {counts['embedding']:,}, "
            + ("head tied to it" if self.tied else f"head {counts['head']:,}")
            + f", norm and the like {counts['norm']:,}"
        )
        return text + (f", outside the text model (never trained) {counts['outside']:,}" if counts["outside"] else "")


def find_layers(model: nn.Module, decoder_name: str | None = None) -> Layers:
    """See a Hugging Face causal model as embedding, decoder layers, final norm and head.

    It goes by structure, not by class names: the input and output embeddings are what the model says they are, and the
    decoder layers are the one ``nn.ModuleList`` of equal, parameter-holding blocks that lies beside the input embedding
    in the smallest module holding both. A mixture's experts lie deeper and a vision tower lies elsewhere.

    Args:
        model: A causal language model; also inside ``peft``.
        decoder_name: Dotted path of the list of decoder layers, for a model that is not recognised.
    Returns: ``Layers``; costs one walk over the modules.
    Raises: UserError saying how to name the layers by hand, if there are none or the choice is not clear.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        ...                      num_attention_heads=2)
        >>> layers = find_layers(LlamaForCausalLM(config))
        >>> layers.decoder_name, len(layers.decoder), layers.num_parameters()["embedding"]
        ('model.layers', 3, 1024)
    """
    embedding = _embedding_of(model, "get_input_embeddings")
    if embedding is None:
        raise UserError(f"{type(model).__name__} names no input embedding: LISA needs a causal language model")
    names = {id(module): name for name, module in model.named_modules()}
    if id(embedding) not in names:
        raise UserError(f"the input embedding of {type(model).__name__} is not a module of it: LISA cannot train it")
    if decoder_name is None:
        decoder_name = _decoder_list(model, names[id(embedding)])
    found = dict(model.named_modules()).get(decoder_name)
    if not isinstance(found, nn.ModuleList) or len(found) == 0:
        raise UserError(
            f"'{decoder_name}' is no list of layers in {type(model).__name__}: give decoder_name=<its dotted path>"
        )
    trunk_name = _common_parent(names[id(embedding)], decoder_name)
    return Layers(
        model=model,
        trunk_module=_owner_of_forward(model, trunk_name),
        embedding=embedding,
        decoder=tuple(found),
        decoder_name=decoder_name,
        head=_embedding_of(model, "get_output_embeddings"),
    )


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage() is b.untyped_storage()


def _embedding_of(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # how transformers says that a model has no such embedding
        return None
    return module if isinstance(module, nn.Module) else None


def _decoder_list(model: nn.Module, embedding_name: str) -> str:
    """The stack that shares the longest path with the embedding; the shallower, then the longer, of several."""
    stacks: list[str] = [name for name, module in model.named_modules() if _is_stack(module)]
    outer = [s for s in stacks if not any(s.startswith(other + ".") for other in stacks)]
    depth = {s: len(_common_parent(embedding_name, s)) for s in outer}  # in characters: all begin alike
    nearest = [s for s in outer if depth[s] == max(depth.values())]
    if len(nearest) != 1:
        what = "no decoder layers" if not nearest else f"several lists of layers ({', '.join(nearest)})"
        raise UserError(
            f"found {what} in {type(model).__name__}: name them by hand with "
            "decoder_name=<dotted path of the nn.ModuleList>, for example decoder_name=model.layers"
        )
    return nearest[0]


def _is_stack(module: nn.Module) -> bool:
    """A list of blocks of one class, each with weight matrices inside submodules of its own."""
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    blocks = list(module)
    alike = all(type(block) is type(blocks[0]) for block in blocks)
    return alike and any(True for _ in blocks[0].children()) and any(p.ndim >= 2 for p in blocks[0].parameters())


def _common_parent(a: str, b: str) -> str:
    common = []
    for left, right in zip(a.split(".")[:-1], b.split(".")[:-1], strict=False):
        if left != right:
            break
        common.append(left)
    return ".".join(common)


def _owner_of_forward(model: nn.Module, name: str) -> nn.Module:
    """The outermost module below ``model`` on the way to ``name`` that is a model without a head.

    OPT keeps its layers in ``model.decoder`` and a vision-language model in ``model.language_model``: for hidden states
    either will do, for the count of the text model's parameters the inner one is meant.
    """
    module = model.get_submodule(name)
    while name and isinstance(module, nn.ModuleList | nn.ModuleDict):
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
    return module
