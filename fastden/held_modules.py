"""Modules and parameters that a function holds, and copies of such functions: what losses as functions need.

PyTorch registers what a module has as attributes. A function may hold modules too, and :class:`FunctionModule` makes a
module of it, so that they are trained, saved, moved and copied with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn


class FunctionModule(nn.Module):
    """A function as a module. Modules and parameters that the function holds are registered.

    They are found in bound methods, in the arguments of ``functools.partial``, in the variables that a closure
    captured, in default arguments, and in the attributes of a callable object.

    A module may come to hold this one: ``self.loss = JointLoss(weight, self.method)``. It registers its parameters
    itself. Were it registered here too, it would be its own descendant, and ``state_dict``, ``train`` and ``to`` would
    never end. So it is dropped before any of them looks.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        found = list(held(function, set()))
        modules = [value for value in found if isinstance(value, nn.Module)]
        self.owner = modules[0] if modules else None
        if modules[1:]:
            self.others = nn.ModuleList(modules[1:])
        parameters = [value for value in found if isinstance(value, nn.Parameter)]
        if parameters:
            self.own = nn.ParameterList(parameters)

    def forward(self, *arguments: Any) -> Any:
        # A frozen network that nobody put into evaluation mode would move its BN statistics. Here and not when this is
        # made: a module that comes to hold this one may hold nothing but frozen ones by then.
        with _evaluating([module for module in self._registered() if _is_frozen(module)]):
            return self.function(*arguments)

    def _registered(self) -> Iterator[nn.Module]:
        """The modules that the function holds."""
        for name, child in self.named_children():
            if name == "owner":
                yield child
            else:  # lists of this module's own
                yield from child.children()

    def train(self, mode: bool = True) -> FunctionModule:
        """Set the mode, but put no frozen module into training mode: that would move its BN statistics."""
        self.training = mode
        for name, child in self.named_children():
            if name != "owner":  # a list of this module's own
                child.training = mode
        for module in self._registered():
            if not (mode and _is_frozen(module)):
                module.train(mode)
        return self

    def _drop_holders(self) -> None:
        """Unregister modules that hold this one. None does when it is made; it is stored in one afterwards."""
        if isinstance(self.owner, nn.Module) and _holds(self.owner, self):
            self.owner = None
        others = self._modules.get("others")
        if others is not None and any(_holds(module, self) for module in others.children()):
            self.others = nn.ModuleList(module for module in others.children() if not _holds(module, self))

    # All ways in which PyTorch walks from a module to those below it begin with one of these.

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        self._drop_holders()
        return super().named_children()

    def named_modules(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        self._drop_holders()
        return super().named_modules(*arguments, **options)

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._drop_holders()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._drop_holders()
        super()._load_from_state_dict(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionModule:
        result = FunctionModule.__new__(FunctionModule)
        memo[id(self)] = result
        state = {name: value for name, value in self.__dict__.items() if name != "function"}
        result.__dict__ = {**deepcopy(state, memo), "function": copied(self.function, memo)}
        return result

    def extra_repr(self) -> str:
        self._drop_holders()
        return str(getattr(self.function, "__qualname__", self.function))


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context with modules in evaluation mode; each part has its own mode again behind it.

    A discriminator is frozen in the generator's turn alone. Its statistics and dropout must go on in its own.
    """
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters or statistics, and none of them is to be trained."""
    parameters = list(module.parameters())
    has_state = len(parameters) > 0 or any(True for _ in module.buffers())
    return has_state and not any(parameter.requires_grad for parameter in parameters)


def _holds(module: nn.Module, sought: nn.Module) -> bool:
    """Whether ``sought`` is below ``module``."""
    seen: set[int] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current is sought:
            return True
        if id(current) not in seen:
            seen.add(id(current))
            waiting.extend(child for child in current._modules.values() if child is not None)
    return False


#: Kinds of values in which modules and parameters are looked for.
_FOLLOWED = (nn.Module, nn.Parameter, FunctionType, MethodType, partial, list, tuple, dict)
#: Kinds of values that a copied closure gets a copy of. What cannot be copied, such as an open file, stays shared.
_COPIED = (*_FOLLOWED, Tensor)


def copied(function: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of a function. A closure that holds modules or parameters gets copies of them.

    ``copy.deepcopy`` takes a function for the same function, so that the copy would train the original's parameters.
    """
    if id(function) in memo:
        return memo[id(function)]
    if isinstance(function, partial):
        arguments = [copied(value, memo) for value in function.args]
        named = {name: copied(value, memo) for name, value in function.keywords.items()}
        return partial(copied(function.func, memo), *arguments, **named)
    if isinstance(function, MethodType):
        return MethodType(function.__func__, copied(function.__self__, memo))
    if type(function) is list:
        values: list[Any] = []
        memo[id(function)] = values  # it may hold itself
        values.extend(copied(value, memo) for value in function)
        return values
    if type(function) is dict:
        mapping: dict[Any, Any] = {}
        memo[id(function)] = mapping
        mapping.update((key, copied(value, memo)) for key, value in function.items())
        return mapping
    make = tuple if type(function) is tuple else getattr(type(function), "_make", None)
    if isinstance(function, tuple) and make is not None:  # a named tuple too
        fixed = make([copied(value, memo) for value in function])
        return memo.setdefault(id(function), fixed)
    if isinstance(function, FunctionType):
        return _copied_function(function, memo)
    if _is_plain_object(function):
        result = copy(function)
        memo[id(function)] = result  # its attributes may be methods of its own
        vars(result).update((name, copied(value, memo)) for name, value in vars(function).items())
        return result
    return deepcopy(function, memo)


def _copied_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    if not any(True for _ in held(function, set())):
        return function
    captured = function.__closure__ or ()
    cells = tuple(CellType() for _ in captured)
    result = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    memo[id(function)] = result  # it may have captured itself

    def own(value: Any) -> Any:
        return copied(value, memo) if isinstance(value, _COPIED) else value

    for cell, source in zip(cells, captured, strict=True):
        for value in _contents(source):
            cell.cell_contents = own(value)
    if function.__defaults__ is not None:
        result.__defaults__ = tuple(map(own, function.__defaults__))
    if function.__kwdefaults__ is not None:
        result.__kwdefaults__ = {name: own(value) for name, value in function.__kwdefaults__.items()}
    result.__dict__.update(function.__dict__)
    result.__qualname__, result.__doc__ = function.__qualname__, function.__doc__
    return result


def _is_plain_object(value: Any) -> bool:
    """Whether a value has attributes and nothing else, and its class does not say how it is copied."""
    kind = type(value)
    others = (nn.Module, Tensor, type, list, tuple, dict)  # copy() of a container shares what is in it
    if isinstance(value, others) or hasattr(kind, "__slots__") or not hasattr(value, "__dict__"):
        return False
    methods = ("__reduce_ex__", "__reduce__", "__getstate__")
    own = any(getattr(kind, name, None) is not getattr(object, name, None) for name in methods)
    return not own and not hasattr(kind, "__deepcopy__")


def held(function: Any, seen: set[int]) -> Iterator[nn.Module | nn.Parameter]:
    """The modules and parameters that a function carries with it, each once; ``seen`` holds the ids of what was met."""
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, nn.Module | nn.Parameter):
        yield function
        return
    values: Iterable[Any]
    if isinstance(function, partial):
        values = (function.func, *function.args, *function.keywords.values())
    elif isinstance(function, MethodType):
        values = (function.__self__,)
    elif isinstance(function, FunctionType):
        captured = (value for cell in function.__closure__ or () for value in _contents(cell))
        values = (*captured, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    elif isinstance(function, list | tuple):
        values = function
    elif isinstance(function, dict):
        values = function.values()
    else:
        values = getattr(function, "__dict__", {}).values()
    for value in values:
        # Of other objects only the attributes of the function itself or of its method's object are looked at.
        if isinstance(value, _FOLLOWED) or isinstance(function, MethodType):
            yield from held(value, seen)


def _contents(cell: CellType) -> tuple[Any, ...]:
    """What a cell of a closure holds; nothing where the variable is not assigned yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()
