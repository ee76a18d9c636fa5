"""Which modules compute on the output of which module, seen by running one token through the model.

Names and class hierarchies lie: OPT-350m calls its post-norms like its siblings' pre-norms, BLOOM can add the
norm's output to the residual. So the tensors themselves are followed, by object identity.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Dataflow:
    """Who read what. Modules go by their dotted names."""

    readers: dict[str, frozenset[str]]
    """Module -> the innermost modules outside it that computed with the very tensor that it returned."""
    first_names: dict[str, str] = field(default_factory=dict)
    """Other names of a module that hangs in several places (GPT-1's activation) -> the one used above."""

    def was_called(self, module: str) -> bool:
        return self._first_name(module) in self.readers

    def readers_within(self, producer: str, modules: Iterable[str]) -> set[str]:
        """Return those of `modules` that read the producer's output, themselves or in a child."""
        readers = self.readers.get(producer, frozenset())
        names = {module: self._first_name(module) for module in modules}
        return {module for module, name in names.items() if any(_is_within(r, name) for r in readers)}

    def is_read_only_by(self, producer: str, modules: Iterable[str]) -> bool:
        """Return whether every reader of the producer's output is one of `modules` or a child of one."""
        allowed = list(modules)
        readers = self.readers.get(producer, frozenset())
        return all(any(_is_within(reader, module) for module in allowed) for reader in readers)

    def _first_name(self, module: str) -> str:
        return self.first_names.get(module, module)


def record_dataflow(model: nn.Module) -> Dataflow:
    """Run one token through the model and return who read what.

    Works on any device; on the meta device only with a cache, since packed sequences are looked for without
    one. The model is unchanged afterwards, its training modes too.
    """
    device = next(model.parameters()).device
    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    recorder = _Recorder()
    with _evaluating(model), torch.no_grad(), recorder.following(model), recorder:
        model(input_ids=token, use_cache=True)
    first = {module: name for name, module in model.named_modules()}
    names = {name: first[module] for name, module in model.named_modules(remove_duplicate=False)}
    return Dataflow(recorder.readers_by_module(), {n: used for n, used in names.items() if n != used})


def _is_within(module: str, ancestor: str) -> bool:
    return module == ancestor or module.startswith(f"{ancestor}.")


_ANSWERS = {torch.Tensor.__bool__: False, torch.Tensor.__contains__: False, torch.Tensor.item: 0}
"""What a tensor without values says when asked for one: is this sequence longer than ..., is it padded?"""


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, int] = {}
        self.readers: defaultdict[int, set[str]] = defaultdict(set)
        self.running = [""]
        self.alive: list[torch.Tensor] = []
        """Every tensor met, so that an id stays the name of one tensor."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ANSWERS and args[0].is_meta:
            return _ANSWERS[func]
        result = func(*args, **(kwargs or {}))
        if next(_tensors(result), None) is not None:
            for tensor in _tensors((args, kwargs)):
                self.alive.append(tensor)
                self.readers[id(tensor)].add(self.running[-1])
        return result

    def readers_by_module(self) -> dict[str, frozenset[str]]:
        pairs = ((name, self.readers[key]) for name, key in self.outputs.items())
        return {name: frozenset(r for r in readers if not _is_within(r, name)) for name, readers in pairs}

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Know, while this context lasts, which module is running and what it returned."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                hooks.callback(module.register_forward_pre_hook(self._enter(name)).remove)
                hooks.callback(module.register_forward_hook(self._leave(name), always_call=True).remove)
            yield

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self.running.append(name)

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.running.pop()
            if isinstance(output, torch.Tensor):
                self.alive.append(output)
                self.outputs[name] = id(output)

        return leave


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; afterwards every module has the attributes that it had, and no other."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
