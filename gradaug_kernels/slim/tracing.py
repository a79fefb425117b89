"""torch.fx's tracer, one at a time: while it traces, nn.Module's call and attribute access are its own, for all.

A graph is what one run of the code did. `FaithfulTracer` makes one only of code that does the same in every run, or as
long as what it read stays as it was: it sees each attribute of a module that is read, each Python function that is
entered with the names that it loads, and each function written in C before that is called.
"""

import dis
import functools
import gc
import inspect
import math
import operator
import os
import sys
import threading
from collections.abc import Callable
from enum import Enum
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

_LOCK = threading.RLock()
_HERE = sys._getframe().f_code.co_filename
_TORCH = nn.Module.train.__code__.co_filename.removesuffix(os.path.join("nn", "modules", "module.py"))
_TRACERS = (os.path.join(_TORCH, "fx", ""), os.path.join(_TORCH, "overrides.py"), _HERE)  # code not of the module
# Code of PyTorch that a graph shows: functions of tensors, and what modules do with their children.
_SHOWN = tuple(
    os.path.join(_TORCH, *path.split("/"))
    for path in ("nn/functional.py", "nn/modules/", "functional.py", "_jit_internal.py")
)

_FUNCTIONS_OF_TENSORS = {f"torch._C.{name}" for name in ("_nn", "_special", "_linalg", "_fft")}
_PURE_MODULES = {math.__name__, operator.add.__module__, "itertools", "_functools"}
_PURE_BUILTINS = {
    *("abs", "all", "any", "divmod", "format", "getattr", "hasattr", "isinstance", "issubclass", "iter", "len", "max"),
    *("min", "next", "pow", "repr", "round", "sorted", "sum"),
}
_HARMLESS_IF_NOT_CALLED = {"print", "warn"}
_LOCAL_CONTAINERS = (list, dict, tuple, str, set, frozenset, int, float, range, slice, type(_ for _ in ()))
_CONSTANTS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.layout, Enum)
_UNSHOWN_INSTRUCTIONS = {
    "STORE_GLOBAL": "writes a global variable",
    "DELETE_GLOBAL": "deletes a global variable",
    "STORE_ATTR": "writes an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "IMPORT_NAME": "imports a module",
    "MATCH_CLASS": "asks for the class of a value",
}
_MISSING = inspect.Parameter.empty  # a class, which copies do not copy


class Tracer(fx.Tracer):
    """Traces one model at a time in a process; modules that other threads call meanwhile run as ever."""

    def trace(self, root, concrete_args=None):
        with _LOCK:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class Unfaithful(Exception):
    """The code does, or depends on, what its graph does not show."""


class FaithfulTracer(Tracer):
    """Traces a module, its children as calls, called with tensors for its required arguments alone, `names`.

    Raises Unfaithful for code whose graph could differ from it where what was noted is unchanged. Noted are

        children: (owner, name, module) of the modules that were read,
        values: (owner, name, value) of the numbers, strings, functions, ... among modules' attributes that were read,
        required: (condition, module) of everything else.
    """

    proxy_buffer_attributes = True

    def __init__(self):
        super().__init__()
        self.names: tuple[str, ...] = ()
        self.children: dict[tuple, tuple] = {}
        self.values: dict[tuple, tuple] = {}
        self.required: dict[tuple, tuple] = {}
        self._unfaithful: str | None = None
        self._watch: _Watch | None = None

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def trace(self, root, concrete_args=None):
        graph = super().trace(root, concrete_args)
        if self._unfaithful is not None:  # and the code caught the exception
            raise Unfaithful(self._unfaithful)
        return graph

    def refuse(self, reason: str):
        self._unfaithful = reason
        raise Unfaithful(reason)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        _, *parameters = inspect.signature(root_fn).parameters.values()
        names = []
        for parameter in parameters:
            if parameter.default is not parameter.empty:
                if not is_constant(parameter.default):
                    self.refuse(f"'{parameter.name}' has a default that can change")
            elif parameter.kind is parameter.KEYWORD_ONLY:
                self.refuse(f"'{parameter.name}' can be given by its name alone")
            elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                names.append(parameter.name)
        self.names = tuple(names)
        arguments = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def run(*args):
            self._watch = _Watch(self)
            return self._watch.call(root_fn, args)

        return run, [self.root, *arguments]

    def proxy(self, node):
        return _Value(node, self)

    # ---- what is noted

    def note_child(self, owner: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None:
            self.note(("no child", id(owner), name), lambda module: module._modules.get(name) is None, owner)
        else:
            self.children[id(owner), name] = owner, name, child

    def note(self, key: tuple, condition: Callable[[nn.Module], bool], module: nn.Module) -> None:
        self.required[key] = condition, module

    def note_variable(self, namespace: Any, name: str, value: Any) -> None:
        """Of a Python module or a class; the condition is a function, which copies of a model share."""
        self.note(("variable", id(namespace), name), lambda _: same(namespace.get(name, _MISSING), value), self.root)


class _Value(fx.Proxy):
    """A value of a traced run, which the code cannot tell from a real one but by an exception."""

    @property
    def __class__(self):
        watch = self.tracer._watch
        if watch is None or watch.c_function is not isinstance:
            return type(self)
        if type(self) is not _Value or self.node.op != "placeholder":
            self.tracer.refuse("asks for the class of a value")
        return Tensor

    def __getattr__(self, k):
        watch = self.tracer._watch
        if (watch is not None and watch.c_function in (hasattr, getattr)) or k.startswith(("_", "grad")):
            self.tracer.refuse(f"asks a value for '{k}'")
        return _Attribute(self, k)

    def __setattr__(self, name, value):
        if name not in ("tracer", "node", "root", "attr", "_node"):
            self.tracer.refuse(f"sets '{name}' of a value")
        object.__setattr__(self, name, value)


class _Attribute(fx.proxy.Attribute, _Value):
    pass


# ---- what is constant


def is_constant(value: Any) -> bool:
    """Whether it can be compared with what is there later, and cannot be changed in place."""
    if isinstance(value, tuple):
        return all(is_constant(element) for element in value)
    return value is None or isinstance(value, _CONSTANTS) or is_function(value)


def is_function(value: Any) -> bool:
    """Whether it is one in Python, whose code is looked at where it runs, or one that does nothing but return."""
    if isinstance(value, MethodType):
        return isinstance(value.__self__, type) and isinstance(value.__func__, FunctionType)
    return isinstance(value, FunctionType) or _is_pure(value)


def same(now: Any, value: Any) -> bool:
    return now is value or (type(now) is type(value) and now == value)


def _is_pure(function: Any) -> bool:
    """Whether a function in C returns the same in every run, if its arguments are values of the run."""
    if isinstance(function, MethodDescriptorType):
        return function.__objclass__ in _LOCAL_CONTAINERS or issubclass(Tensor, function.__objclass__)
    if not isinstance(function, BuiltinFunctionType):
        return False
    owner, name = function.__self__, function.__name__
    if owner is None:
        return hasattr(torch._C._VariableFunctions, name)
    if isinstance(owner, ModuleType):
        if owner.__name__ == "builtins":
            return name in _PURE_BUILTINS
        return owner.__name__ in _FUNCTIONS_OF_TENSORS | _PURE_MODULES
    return isinstance(owner, _LOCAL_CONTAINERS)


# ---- what runs


class _Watch(TorchFunctionMode):
    """Sees what a module's code reads and calls, in one thread, from the entry of its forward to the end."""

    def __init__(self, tracer: FaithfulTracer):
        super().__init__()
        self.tracer = tracer
        self.c_function: Any = None  # that the module's code calls now
        self._thread = threading.get_ident()
        self._of_tracer = 0  # how many calls deep in code of the tracer

    def call(self, function: Callable, args: tuple) -> Any:
        writers = {name: vars(nn.Module)[name] for name in ("__setattr__", "__delattr__")}
        profiler, collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # finalizers and callbacks of weak references are no calls of the module
        nn.Module.__getattribute__, nn.Module.__setattr__, nn.Module.__delattr__ = self._accessors(**writers)
        try:
            with self:
                sys.setprofile(self._event)
                try:
                    return function(*args)
                finally:
                    sys.setprofile(None)
        finally:
            del nn.Module.__getattribute__
            nn.Module.__setattr__, nn.Module.__delattr__ = writers.values()
            self.c_function = None
            if collects:
                gc.enable()
            if hasattr(profiler, "enable"):  # cProfile's, which is no function
                profiler.enable()
            else:
                sys.setprofile(profiler)

    def _accessors(self, __setattr__, __delattr__):
        def read(module, name):
            if threading.get_ident() != self._thread or self._of_tracer != 1:
                return object.__getattribute__(module, name)
            return self._read(module, name)

        def write(module, name, value):
            if threading.get_ident() == self._thread:
                self.tracer.refuse(f"sets '{name}' of a module")
            __setattr__(module, name, value)

        def delete(module, name):
            if threading.get_ident() == self._thread:
                self.tracer.refuse(f"deletes '{name}' of a module")
            __delattr__(module, name)

        return read, write, delete

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not any(issubclass(kind, fx.Proxy) for kind in types):
            self.tracer.refuse(f"calls {getattr(func, '__name__', func)} of no value of the run")
        return func(*args, **(kwargs or {}))

    # ---- attributes

    def _read(self, module: nn.Module, name: str) -> Any:
        if name == "__class__":
            return object.__getattribute__(module, name)
        if name == "__dict__":
            self.tracer.refuse("reads all attributes of a module")
        attributes = object.__getattribute__(module, "__dict__")
        if name == "_modules":
            return self._read_children(module, attributes[name])
        depth, self._of_tracer = self._of_tracer, 0  # a property's code is of the module
        try:
            value = object.__getattribute__(module, name)
        except AttributeError:
            self._of_tracer = depth
            self._read_registered(module, attributes, name)
            raise
        self._of_tracer = depth
        if name not in attributes:
            self._read_of_class(module, name, value)
        elif name == "training" and module is self.tracer.root:
            pass  # which is traced in both modes
        elif is_constant(value):
            self.tracer.values[id(module), name] = module, name, value
        else:
            self.tracer.refuse(f"reads '{name}' of a module, of {type(value).__name__}")
        return value

    def _read_children(self, module, children):
        number = len(children)  # and each is noted by its name
        self.tracer.note(("number", id(module)), lambda module: len(module._modules) == number, module)
        for name, child in children.items():
            self.tracer.note_child(module, name, child)
        return children

    def _read_registered(self, module, attributes, name):
        registered = attributes["_parameters"] | attributes["_buffers"]
        if name in registered:
            is_none = registered[name] is None
            self.tracer.note(
                ("tensor", id(module), name), lambda module: (getattr(module, name, None) is None) == is_none, module
            )
        elif name in attributes["_modules"]:
            self.tracer.note_child(module, name, attributes["_modules"][name])
        else:
            self.tracer.note(("missing", id(module), name), lambda module: not hasattr(module, name), module)

    def _read_of_class(self, module, name, value):
        kind = type(module)
        of_class = inspect.getattr_static(kind, name)
        if not isinstance(of_class, property | classmethod | staticmethod | FunctionType) and not is_constant(of_class):
            self.tracer.refuse(f"reads '{name}' of a class, of {type(of_class).__name__}")
        if name[:2] != "__" and kind.__module__.partition(".")[0] != "torch":
            own = _own_class(kind)
            self.tracer.note(
                ("class", id(module), name),
                lambda module: name not in module.__dict__ and _of_class(own, name) is of_class,
                module,
            )

    # ---- calls

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if self._of_tracer:
            self._of_tracer += (event == "call") - (event == "return")
        elif event == "call":
            if frame.f_code.co_filename.startswith(_TRACERS):
                self._of_tracer = 1
            else:
                self._enter(frame)
        elif event == "c_call":
            is_of_module = not frame.f_code.co_filename.startswith((_TORCH, _HERE))
            self.c_function = arg if is_of_module else None
            if is_of_module and not _is_pure(arg):
                self.tracer.refuse(f"calls {getattr(arg, '__qualname__', arg)}")
        elif event != "return":
            self.c_function = None

    def _enter(self, frame):
        self.c_function, code = None, frame.f_code
        if code.co_filename.startswith(_TORCH):
            if not code.co_filename.startswith(_SHOWN):
                self.tracer.refuse(f"calls {code.co_qualname} of torch")
            return
        unshown, loads = _scan(code)
        if unshown is not None:
            self.tracer.refuse(unshown)
        for is_global, name, attributes in loads:
            if is_global:
                namespace = frame.f_globals if name in frame.f_globals else frame.f_builtins
                if name in namespace:
                    self._load(namespace, name, attributes)
            elif not _is_of_caller(frame, name):
                self._load({name: frame.f_locals.get(name)}, name, attributes, is_cell=True)

    def _load(self, namespace, name: str, attributes: tuple[str, ...], is_cell: bool = False) -> None:
        """A name of a function's surroundings is loaded, and attributes of it."""
        value = namespace[name]
        for attribute in attributes:
            if isinstance(value, ModuleType) and attribute in vars(value):
                namespace, name, value, is_cell = vars(value), attribute, vars(value)[attribute], False
            elif isinstance(value, type) and not isinstance(value, torch._C._TensorMeta):
                kind = next((kind for kind in value.__mro__ if attribute in vars(kind)), None)
                if kind is None:
                    break
                namespace, name, value, is_cell = vars(kind), attribute, getattr(value, attribute), False
                if not is_constant(namespace[name]) and not isinstance(value, Enum):
                    break
            else:
                break
        if isinstance(value, type):
            if value is type:
                self.tracer.refuse("asks for the class of a value")
        elif isinstance(value, BuiltinFunctionType) and value.__name__ in _HARMLESS_IF_NOT_CALLED:
            pass
        elif not is_constant(value) or (is_cell and not is_function(value)):
            self.tracer.refuse(f"loads '{name}', of {type(value).__name__}")
        elif not is_function(value):
            self.tracer.note_variable(namespace, name, value)


def _own_class(kind: type) -> type:
    """The class without what fusing makes of it."""
    return getattr(kind, "_original", kind)


def _of_class(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), _MISSING)


def _is_of_caller(frame: FrameType, name: str) -> bool:
    """Whether a name of the function around is a variable of a call that still runs."""
    value, caller = frame.f_locals.get(name), frame.f_back
    while caller is not None and caller.f_code.co_filename != _HERE:
        if name in caller.f_code.co_cellvars and caller.f_locals.get(name) is value:
            return True
        caller = caller.f_back
    return False


@functools.lru_cache(maxsize=1024)
def _scan(code: CodeType) -> tuple[str | None, tuple[tuple[bool, str, tuple[str, ...]], ...]]:
    """What no graph shows of a function, and the names that it loads: whether global, with the attributes after it."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    unshown, loads = None, []
    for i, instruction in enumerate(instructions):
        name, argument = instruction.opname, instruction.argval
        if name in _UNSHOWN_INSTRUCTIONS and not (name == "STORE_ATTR" and code.co_name == "__init__"):
            unshown = _UNSHOWN_INSTRUCTIONS[name]
        elif name == "STORE_DEREF" and argument in code.co_freevars:
            unshown = "writes a variable of the function around"
        elif name == "IS_OP" and (instructions[i - 1].opname, instructions[i - 1].argval) != ("LOAD_CONST", None):
            unshown = "asks whether values are the same object"
        elif name == "PUSH_EXC_INFO" and instructions[i + 1].opname != "WITH_EXCEPT_START":
            unshown = "catches exceptions"
        elif name == "LOAD_GLOBAL" or (name == "LOAD_DEREF" and argument in code.co_freevars):
            attributes = []
            for following in instructions[i + 1 :]:
                if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                attributes.append(following.argval)
            loads.append((name == "LOAD_GLOBAL", argument, tuple(attributes)))
    return unshown, tuple(loads)
