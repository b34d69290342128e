"""A language model seen as embedding, decoder layers, norm and head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lisatune.errors import UserError
from lisatune.structure import (
    common_parent,
    decoder_lists,
    embedding_of,
    fixed_by_authors,
    outside_modules,
    owner_of_forward,
)

Trains = (
    bool | Literal["sampled"]
)  # embedding and head train in every interval, in none, or when they are drawn like a layer


@dataclass(frozen=True)
class Layers:
    """The parts of a language model, as modules (never as tensors, which wrappers may replace).

    Every parameter of the model belongs to exactly one part:

    - ``embedding``: the input embedding and the position embeddings. If the head is tied to it, it owns the tensor.
    - ``layers.0``, ...: the decoder layers, each with everything inside it (a mixture's experts too).
    - ``norm``: the rest of the text model, such as the final norm, projections, and transforms before the head.
    - ``head``: the output embedding. It is empty if tied. A model without one has here what follows the text model
      (``score``, ``qa_outputs``).
    - ``outside``: what does not belong to the text model (a vision tower and its projector).
    - ``fixed``: what the model's authors keep frozen (a router's bias, sinusoids). It exists only if there is any.

    LISA samples decoder layers and trains ``norm`` always. It trains embedding and head always, unless you say otherwise.
    It trains ``outside`` only if you say so, and ``fixed`` never. In an encoder-decoder, ``decoder`` holds the layers of
    both, the encoder's first.
    """

    model: nn.Module
    trunk_module: nn.Module
    embedding: nn.Module
    decoder: tuple[nn.Module, ...]
    decoder_name: str
    head: nn.Module | None
    outside: tuple[nn.Module, ...]
    fixed: tuple[tuple[nn.Module, str], ...]

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        of_embedding = {id(p) for p in self.embedding.parameters()}
        return self.head is not None and any(id(p) in of_embedding for p in self.head.parameters())

    @cached_property
    def first_position(self) -> int:
        """The position of a row's first token: RoBERTa and its like begin after the row that is kept for padding."""
        for name, module in self.trunk_module.named_modules():
            counts = isinstance(module, nn.Embedding) and "position" in name
            counts = counts or hasattr(module, "create_position_ids_from_input_ids")  # sinusoids (KOSMOS-2.5)
            if counts and isinstance(module.padding_idx, int):
                return module.padding_idx + 1
        return 0

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parts to their parameters by name; each tensor once, under the first name it has in the model."""
        prefixes = {id(self.embedding): "embedding"}
        prefixes |= {id(layer): f"layers.{i}" for i, layer in enumerate(self.decoder)}
        if self.head is not None:
            prefixes[id(self.head)] = "head"
        owner = {id(getattr(module, name)): "fixed" for module, name in self.fixed}
        for module in (self.embedding, *self.decoder, *([self.head] if self.head is not None else [])):
            for parameter in module.parameters():
                owner.setdefault(id(parameter), prefixes[id(module)])
        owner_of_rest = "norm" if self.head is not None else "head"  # what comes after the text model
        for module in self.outside:
            for parameter in module.parameters(recurse=False):
                owner.setdefault(id(parameter), "outside")
        for module in self.trunk_module.modules():
            part = "embedding" if isinstance(module, nn.Embedding) else "norm"
            for parameter in module.parameters(recurse=False):
                owner.setdefault(id(parameter), part)
        names = ["embedding", *(f"layers.{i}" for i in range(len(self.decoder))), "norm", "head", "outside"]
        names += ["fixed"] if self.fixed else []
        parts: dict[str, dict[str, nn.Parameter]] = {name: {} for name in names}
        for name, parameter in self.model.named_parameters():
            if hasattr(parameter, "cut"):  # a view of rows of another one, see ``slices``
                continue
            parts[owner.get(id(parameter), owner_of_rest)][name] = parameter
        return parts

    def num_parameters(self) -> dict[str, int]:
        """Parameters of each part, tied weights once."""
        return {part: sum(p.numel() for p in parameters.values()) for part, parameters in self.parts().items()}

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
        except Exception:  # whatever a model's own code does that needs data
            if not ids.is_meta:
                raise
            return False  # it cannot run there at all, which is for the forecast to say
        finally:
            self.model.train(training)
            for hook in hooks:
                hook.remove()

    def is_causal(self) -> bool:
        """Whether no token sees a later one, without which a next-token loss teaches nothing.

        Found by trying it: the first token's logits have no slope along the last token's embedding. Exact, since a
        masked attention weight is 0. Costs a forward and a backward pass of four tokens; not for the meta device.
        """
        ids = torch.tensor([[1, 2, 3, 4]], device=next(self.embedding.parameters()).device)
        made: list[Tensor] = []

        def watch(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            made.append(out.detach().requires_grad_())
            return made[-1]

        hook = self.embedding.register_forward_hook(watch)
        training = self.model.training
        self.model.eval()
        try:
            with torch.enable_grad():
                logits = self.model(input_ids=ids, use_cache=False).logits[0, 0].float()
                weights = torch.linspace(-1.0, 1.0, len(logits), device=logits.device)
                slope = torch.autograd.grad((logits * weights).sum(), made[0])[0]
        finally:
            self.model.train(training)
            hook.remove()
        return not slope[0, -1].any()

    def says_causal(self) -> bool:
        """Whether a decoder layer has a module that calls itself causal, as attentions of transformers do."""
        return any(getattr(module, "is_causal", False) for layer in self.decoder for module in layer.modules())

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
        for part, what in (("outside", "outside the text model"), ("fixed", "frozen by its authors")):
            text += f", {what} {counts[part]:,}: {self._modules_of(part)}" if counts.get(part) else ""
        return text

    def _modules_of(self, part: str) -> str:
        """The outermost modules that hold nothing but ``part``, and single parameters."""
        inside = [name for other, parameters in self.parts().items() if other != part for name in parameters]
        names = list[str]()
        for name in self.parts()[part]:
            steps = name.split(".")
            starts = (".".join(steps[:i]) for i in range(1, len(steps)))
            whole = next((s for s in starts if not any(n.startswith(s + ".") for n in inside)), name)
            if whole not in names:
                names.append(whole)
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def find_layers(model: nn.Module, decoder_name: str | None = None) -> Layers:
    """See a Hugging Face model as embedding, decoder layers, final norm and head.

    It goes by structure, not by class names: the input and output embeddings are what the model says they are, and the
    decoder layers are the one ``nn.ModuleList`` of parameter-holding blocks that is next to the input embedding in the
    smallest module holding both. A mixture's experts are deeper and a vision tower is elsewhere. Of an encoder-decoder
    both lists are found, the encoder's first.

    Args:
        model: A causal language model, one with another head, or an encoder-decoder; also inside ``peft``.
        decoder_name: Dotted path of the list of layers, for a model that is not recognised; several with commas.
    Returns: ``Layers``; costs one walk over the modules, and one class built on the meta device if something is frozen.
    Raises: UserError saying how to name the layers by hand, if there are none or the choice is not clear.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        ...                      num_attention_heads=2)
        >>> layers = find_layers(LlamaForCausalLM(config))
        >>> layers.decoder_name, len(layers.decoder), layers.num_parameters()["embedding"]
        ('model.layers', 3, 1024)
    """
    embedding = embedding_of(model, "get_input_embeddings")
    if embedding is None:
        raise UserError(
            f"{type(model).__name__} has no get_input_embeddings(): define it, so that LISA finds the embedding"
        )
    names = {id(module): name for name, module in model.named_modules()}
    if id(embedding) not in names:
        raise UserError(
            f"the input embedding of {type(model).__name__} is not one of its modules: let get_input_embeddings() return one"
        )
    lists = decoder_name.split(",") if decoder_name else decoder_lists(model, names[id(embedding)])
    modules, decoder = dict(model.named_modules()), list[nn.Module]()
    for name in lists:
        found = modules.get(name)
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            raise UserError(
                f"'{name}' is not a list of layers in {type(model).__name__}: give decoder_name=<its dotted path>"
            )
        decoder += found
    trunk_module = owner_of_forward(model, common_parent(names[id(embedding)], *lists))
    head = embedding_of(model, "get_output_embeddings")
    kept = [embedding, *decoder, *([head] if head is not None else [])]
    return Layers(
        model=model,
        trunk_module=trunk_module,
        embedding=embedding,
        decoder=tuple(decoder),
        decoder_name=",".join(lists),
        head=head,
        outside=tuple(outside_modules(model, trunk_module, kept)),
        fixed=tuple(fixed_by_authors(model)),
    )


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage() is b.untyped_storage()
