"""A pickle machine that can build dicts of tensor descriptions, and nothing else.

The standard unpickler imports and calls what a file names. This one never imports and never
calls anything of the file's choosing: a global either is one of the few tensor constructors
below, implemented here, or is on the list of harmless bystanders (NumPy scalars, argparse
namespaces, dates: usual in training checkpoints) and becomes ``OPAQUE``, which swallows its
arguments and its state, or it is refused by name. The machine keeps its own stack, so nesting
costs no recursion; its memo is a dict, so a far index costs no memory.
"""

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from weights_convert.errors import WeightsError, shown
from weights_convert.tensors import MAX_RANK, STORED, Storage, Tensor, is_count

MAX_STEPS = 4_000_000  # about 100,000 tensors; bounds time and memory
MAX_INT_BITS = 1024
DAMAGED = "the file is damaged or cut short; get a fresh copy"
RESAVE = (
    "nothing was run; if you trust the file, load it with torch and save only the tensors: "
    "torch.save(model.state_dict(), path)"
)


class _Opaque:
    """Stands for every object that is not a tensor, a container or a plain value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<not a tensor>"


OPAQUE = _Opaque()


@dataclass(frozen=True, eq=False, slots=True)
class _DType:
    """``torch.float32`` and its like, and the dtype half of ``torch.FloatStorage``."""

    name: str
    is_storage: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class _Constructor:
    """One of the calls a weight file may contain; ``build`` is ours."""

    name: str
    build: Callable[["Machine", tuple], object]


def _ordered_dict(machine: "Machine", args: tuple) -> dict:
    """``OrderedDict()``, or ``OrderedDict([[key, value], ...])`` as Python 2 wrote it."""
    result: dict = {}
    if not args:
        return result
    (pairs,) = args
    if not isinstance(pairs, list):
        raise ValueError
    machine.spend(len(pairs))
    for key, value in (_pair(pair) for pair in pairs):
        _put(result, key, value)
    return result


def _pair(pair: object) -> tuple:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError
    return tuple(pair)


def _counts(values: object) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > MAX_RANK:
        raise ValueError
    if not all(map(is_count, values)):
        raise ValueError
    return tuple(values)


def _view(args: tuple, dtype: str) -> Tensor:
    storage, offset, size, stride = args
    shape, strides = _counts(size), _counts(stride)
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise ValueError
    (start,) = _counts([offset])
    return Tensor(storage, dtype, start, shape, strides)


def _rebuild_tensor(machine: "Machine", args: tuple) -> Tensor:
    """``_rebuild_tensor(storage, offset, size, stride)`` and v2, which adds grad, hooks, meta."""
    if len(args) not in (4, 6, 7) or not isinstance(args[0], Storage):
        raise ValueError
    _no_metadata(args[6:])
    return _view(args[:4], args[0].dtype)


def _rebuild_tensor_v3(machine: "Machine", args: tuple) -> Tensor:
    """v2 with a dtype before the metadata: for element types that have no typed storage."""
    if len(args) not in (7, 8) or not isinstance(args[6], _DType):
        raise ValueError
    _no_metadata(args[7:])
    return _view(args[:4], args[6].name)


def _no_metadata(rest: tuple) -> None:
    """Lazy conjugation and negation change the values: refuse rather than misread them."""
    if rest and rest[0]:
        raise WeightsError(f"it holds a lazily conjugated or negated tensor; {RESAVE}")


def _rebuild_parameter(machine: "Machine", args: tuple) -> object:
    """``_rebuild_parameter(data, requires_grad, hooks[, state])``: the data."""
    if len(args) not in (3, 4) or not isinstance(args[0], Tensor):
        raise ValueError
    return args[0]


def _rebuild_from_type(machine: "Machine", args: tuple) -> object:
    """``_rebuild_from_type_v2(function, type, args, state)``: what the function gives."""
    function, _, inner, _ = args
    if not isinstance(function, _Constructor) or function.build is _rebuild_from_type:
        raise ValueError
    return machine.call(function, inner)


def _put(target: dict, key: object, value: object) -> None:
    # Keys of other types never name a weight, and hashing them can be made very slow.
    if isinstance(key, str) or key is None or (type(key) is int and abs(key) < 2**60):
        target[key] = value


_CONSTRUCTORS = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_HARMLESS = {
    "argparse": {"Namespace"},
    "lightning.fabric.utilities.data": {"AttributeDict"},
    "lightning_fabric.utilities.data": {"AttributeDict"},
    "pytorch_lightning.utilities.parsing": {"AttributeDict"},
    "builtins": {"bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"}
    | {"object", "range", "set", "slice", "str", "tuple"},
    "_codecs": {"encode"},
    "collections": {"Counter", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "numpy": {"dtype", "ndarray", "bool_", "float32", "float64", "int32", "int64"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy._core.numeric": {"_frombuffer"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "torch": {"Size", "Tensor", "device"},
    "torch.nn.parameter": {"Buffer", "Parameter"},
    "types": {"SimpleNamespace"},
    "uuid": {"UUID"},
}
_OF_OTHER_TENSORS = {
    "_rebuild_qtensor": "quantised tensors; save the float network, or tensor.dequantize()",
    "_rebuild_sparse_tensor": "sparse tensors; save tensor.to_dense()",
    "_rebuild_sparse_csr_tensor": "sparse tensors; save tensor.to_dense()",
    "_rebuild_nested_tensor": "nested tensors; save plain ones",
    "ScriptObject": "packed parameters of a quantised network; save the float network",
}
_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def find(module: object, name: object) -> object:
    """Look a global up in the tables above. Nothing is imported."""
    if isinstance(module, str) and isinstance(name, str):
        module = _PYTHON2.get(module, module)
        if build := _CONSTRUCTORS.get((module, name)):
            return _Constructor(f"{module}.{name}", build)
        if name in _STORAGES and module in ("torch", "torch.cuda", "torch.storage"):
            return _DType(_STORAGES[name], is_storage=True)
        if module == "torch" and name in STORED:
            return _DType(name)
        if name in _HARMLESS.get(module, ()):
            return OPAQUE
        if name in _OF_OTHER_TENSORS and str(module).split(".")[0] in ("torch", "__torch__"):
            raise WeightsError(f"it holds {_OF_OTHER_TENSORS[name]} (it asks for {module}.{name})")
        if module == "torch" and name.startswith(("float8", "float4", "qint", "quint")):
            raise WeightsError(f"it holds tensors of type torch.{name}; save them as float32")
    named = f"{module}.{name}" if isinstance(name, str) else repr(name)
    raise WeightsError(f"it asks for {shown(named)}, which no weight file needs; {RESAVE}")


class Machine:
    """Runs one pickle from ``stream``, up to and including its STOP.

    Attributes:
        storages: the storages that its tensors view, by key.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below each open MARK
        self._memo: dict[int, object] = {}
        self._steps = 0

    def run(self, stream: IO[bytes]) -> Any:
        """Return the object that the pickle describes."""
        for name, argument in _opcodes(stream):
            self.spend(1)
            if name == "STOP":
                return self.pop()
            if name in _LITERALS:
                self._stack.append(_literal(argument))
            elif action := _ACTIONS.get(name):
                action(self, argument)
            else:
                raise WeightsError(f"its pickle uses {name}, which no weight file needs; {RESAVE}")
        raise WeightsError(DAMAGED)

    def spend(self, steps: int) -> None:
        """Count work; stop when it is more than any weight file asks for."""
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise WeightsError(f"its pickle takes more than {MAX_STEPS} steps; {RESAVE}")

    def push(self, value: object) -> None:
        """Push on the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Pop from the stack, never from below a MARK."""
        if not self._stack:
            raise WeightsError(DAMAGED)
        return self._stack.pop()

    def top(self) -> Any:
        """Return the top of the stack."""
        if not self._stack:
            raise WeightsError(DAMAGED)
        return self._stack[-1]

    def mark(self, _: object) -> None:
        """Open a MARK."""
        self._outer.append(self._stack)
        self._stack = []

    def pop_mark(self) -> list[Any]:
        """Return everything above the innermost MARK, and close it."""
        if not self._outer:
            raise WeightsError(DAMAGED)
        items, self._stack = self._stack, self._outer.pop()
        return items

    def discard(self, _: object) -> None:
        """POP, which also closes an empty MARK."""
        if self._stack:
            self._stack.pop()
        else:
            self.pop_mark()

    def memoize(self, index: int | None) -> None:
        """Remember the top of the stack."""
        self._memo[len(self._memo) if index is None else index] = self.top()

    def recall(self, index: int) -> None:
        """Push what was remembered."""
        if index not in self._memo:
            raise WeightsError(DAMAGED)
        self._stack.append(self._memo[index])

    def call(self, function: object, args: object) -> object:
        """Apply one of our constructors; OPAQUE gives OPAQUE and looks at nothing."""
        if function is OPAQUE:
            return OPAQUE
        if not isinstance(function, _Constructor) or not isinstance(args, tuple):
            raise WeightsError(f"its pickle calls what is no constructor; {RESAVE}")
        try:
            return function.build(self, args)
        except WeightsError:
            raise
        except ValueError:
            raise WeightsError(
                f"it calls {function.name} with arguments that make no sense; {RESAVE}"
            ) from None

    def extend(self, items: list[Any]) -> None:
        """APPENDS."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif target is not OPAQUE:
            raise WeightsError(DAMAGED)

    def update(self, items: list[Any]) -> None:
        """SETITEMS."""
        target = self.top()
        if isinstance(target, dict):
            _fill(target, items)
        elif target is not OPAQUE:
            raise WeightsError(DAMAGED)

    def build(self, _: object) -> None:
        """BUILD: attributes, such as a state_dict's ``_metadata``, are of no use here."""
        self.pop()
        if not isinstance(self.top(), dict | Tensor | _Opaque):
            raise WeightsError(f"its pickle sets attributes on what has none; {RESAVE}")

    def reference(self, _: object) -> None:
        """BINPERSID: ``('storage', type, key, device, numel[, view])``."""
        storage = _storage(self.pop())
        root = self.storages.setdefault(storage[0].key, storage[0])
        if (root.dtype, root.numel) != (storage[0].dtype, storage[0].numel):
            raise WeightsError(f"storage {shown(root.key)!r} has two sizes or types; {DAMAGED}")
        self.push(storage[1])


def _storage(saved: object) -> tuple[Storage, Storage]:
    """Return the storage of a persistent id, whole and as viewed."""
    problem = WeightsError(f"it refers to a storage in a way torch does not; {DAMAGED}")
    if not isinstance(saved, tuple) or len(saved) not in (5, 6):
        raise problem
    tag, kind, key, _, numel, *rest = saved
    if tag != "storage" or not isinstance(kind, _DType) or not kind.is_storage:
        raise problem
    if not isinstance(key, str) or not is_count(numel):
        raise problem
    whole = Storage(key, kind.name, numel)
    if not rest or rest[0] is None:
        return whole, whole
    # Files of torch < 0.4: (key of the view, offset, numel) of a storage inside a storage.
    view = rest[0]
    if not isinstance(view, tuple) or len(view) != 3 or not all(map(is_count, view[1:])):
        raise problem
    if view[1] + view[2] > numel:
        raise problem
    return whole, Storage(key, kind.name, view[2], view[1])


def _opcodes(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Decode opcodes and arguments; `pickletools` only parses, it runs nothing."""
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            yield opcode.name, argument
    except WeightsError:
        raise
    except (ValueError, OverflowError, EOFError, Warning) as error:
        raise WeightsError(f"its pickle is broken ({shown(str(error))}); {DAMAGED}") from None


def _literal(value: object) -> object:
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise WeightsError(f"its pickle holds an integer of {value.bit_length()} bits; {DAMAGED}")
    return value


def _fill(target: dict, items: list[Any]) -> dict:
    if len(items) % 2:
        raise WeightsError(DAMAGED)
    for key, value in zip(items[::2], items[1::2], strict=True):
        _put(target, key, value)
    return target


def _tuple(count: int) -> Callable[[Machine, Any], None]:
    def action(machine: Machine, _: object) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(items)))

    return action


def _reduce(machine: Machine, _: object) -> None:
    args = machine.pop()
    machine.push(machine.call(machine.pop(), args))


def _new_with_keywords(machine: Machine, _: object) -> None:
    machine.pop()
    _reduce(machine, None)


def _global(machine: Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.push(find(module, name))


def _stack_global(machine: Machine, _: object) -> None:
    name = machine.pop()
    machine.push(find(machine.pop(), name))


def _add_items(machine: Machine, _: object) -> None:
    machine.pop_mark()
    if machine.top() is not OPAQUE:
        raise WeightsError(DAMAGED)


def _pop_mark(machine: Machine, _: object) -> None:
    machine.pop_mark()


def _frozenset(machine: Machine, _: object) -> None:
    machine.pop_mark()
    machine.push(OPAQUE)


_LITERALS = frozenset(
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "  # noqa: SIM905
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)
_ACTIONS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": Machine.mark,
    "POP": Machine.discard,
    "POP_MARK": _pop_mark,
    "DUP": lambda machine, _: machine.push(machine.top()),
    "PUT": Machine.memoize,
    "BINPUT": Machine.memoize,
    "LONG_BINPUT": Machine.memoize,
    "MEMOIZE": Machine.memoize,
    "GET": Machine.recall,
    "BINGET": Machine.recall,
    "LONG_BINGET": Machine.recall,
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_SET": lambda machine, _: machine.push(OPAQUE),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "LIST": lambda machine, _: machine.push(machine.pop_mark()),
    "DICT": lambda machine, _: machine.push(_fill({}, machine.pop_mark())),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.update([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_mark()),
    "ADDITEMS": _add_items,
    "FROZENSET": _frozenset,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_keywords,
    "BUILD": Machine.build,
    "BINPERSID": Machine.reference,
}
