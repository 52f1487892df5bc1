"""A user's own module: FILE.py:factory, loaded so that neither side's modules get in the way.

A user's net.py imports its neighbours by their plain names, and a neighbour called `models` or
`utils` is the rule. Another package of that name may be loaded already: a second user's, or one
that the working folder happens to hold. So each user folder has a world of its own:

  - its modules are found in its folder before anywhere else, and kept in the world, not in
    `sys.modules`, which has them only while code of this world is imported or called;
  - every function of the folder carries an `__import__` that enters its world first, so an import
    inside `forward`, run hours later, still finds the right neighbour;
  - the folder stays at the end of `sys.path`, where it shadows nothing: importlib.import_module
    inside `forward` finds neighbours there.

No bytecode is written next to the user's files. This is isolation of names, not a sandbox.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from ..pipeline.errors import EdgestillError, ModelError

# A neighbour of such a name does not replace what is loaded and in use: no second torch.
PROTECTED = sys.stdlib_module_names | {"torch", "numpy", "edgestill", "safetensors"}

_lock = threading.RLock()


class UserFolder:
    """The world of one user file: its folder's modules, and the files they came from.

    `sources`: every file below the folder that was imported so far.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.folder = file.parent
        self.sources: set[Path] = set()
        self._modules: dict[str, ModuleType] = {}
        self._owned: dict[str, bool] = {}
        self._is_entered = False
        self._builtins = {**vars(builtins), "__import__": self._import}

    def load(self) -> ModuleType:
        """Run the file as a module of a private name and return it."""
        name = f"_edgestill_user_{hashlib.sha256(str(self.file).encode()).hexdigest()[:16]}"
        spec = importlib.util.spec_from_file_location(
            name, self.file, loader=_Loader(name, str(self.file), self)
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # dataclasses and type hints look their module up here; the name is nobody else's
        sys.modules[name] = module
        with self.entered():
            spec.loader.exec_module(module)
        if str(self.folder) not in sys.path:
            sys.path.append(str(self.folder))
        return module

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The folder's modules under their plain names inside, everybody else's afterwards."""
        with _lock:
            if self._is_entered:
                yield
                return
            hidden = {name: m for name, m in sys.modules.items() if self._owns(name)}
            for name in hidden:
                del sys.modules[name]
            sys.modules.update(self._modules)
            sys.path.insert(0, str(self.folder))
            sys.meta_path.insert(0, self)
            self._is_entered = True
            try:
                yield
            finally:
                self._is_entered = False
                sys.meta_path.remove(self)
                with suppress(ValueError):  # the user's code took it off the path itself
                    sys.path.remove(str(self.folder))
                self._modules = {n: m for n, m in sys.modules.items() if self._owns(n)}
                for name in self._modules:
                    del sys.modules[name]
                sys.modules.update(hidden)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The import system's question (importlib.abc.MetaPathFinder): where is `name`?"""
        if not self._owns(name):
            return None
        spec = PathFinder.find_spec(name, [str(self.folder)] if path is None else path, target)
        if spec is None:
            return None
        if spec.submodule_search_locations is not None:
            # a namespace package would otherwise go on to collect its namesakes on sys.path
            spec.submodule_search_locations = list(spec.submodule_search_locations)
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self)
        return spec

    def prepare(self, module: ModuleType, path: str) -> None:
        """Give a module about to run our `__import__`, and note its file."""
        module.__dict__["__builtins__"] = self._builtins
        self.sources.add(Path(path))

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level == 0 and not self._owns(name):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        with self.entered():
            return builtins.__import__(name, globals, locals, fromlist or (), level)

    def _owns(self, name: str) -> bool:
        """Whether the folder has a module or package of this top-level name."""
        top = name.partition(".")[0]
        if top not in self._owned:
            self._owned[top] = top not in PROTECTED and _has_module(self.folder, top)
        return self._owned[top]


def _has_module(folder: Path, name: str) -> bool:
    here = folder / name
    if (folder / f"{name}.py").is_file() or (here / "__init__.py").is_file():
        return True
    # a folder without __init__.py is a package if it holds code, else it is data
    return here.is_dir() and (any(here.glob("*.py")) or any(here.glob("*/__init__.py")))


class _Loader(SourceFileLoader):
    """Compiles from the source each time: a file rewritten within a second is read anew."""

    def __init__(self, name: str, path: str, world: UserFolder) -> None:
        super().__init__(name, path)
        self._world = world

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        self._world.prepare(module, self.path)
        super().exec_module(module)


class blaming(AbstractContextManager[None]):
    """Turns whatever the user's code raises into a ModelError that names their file and line."""

    def __init__(self, world: UserFolder, what: str) -> None:
        self._world = world
        self._what = what

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, EdgestillError) or not isinstance(error, Exception | SystemExit):
            return
        line = _line(error, trace, self._world)
        said = " ".join(_message(error).split()) or "no message"
        hint = (
            "; the file is loaded on its own, so import its neighbours by their plain names"
            if "no known parent package" in said
            else ""
        )
        raise ModelError(
            f"{self._what}: {line}{type(error).__name__}: {said[:600]}{hint}"
        ) from error


def open_factory(file: Path, name: str) -> tuple[Callable[..., Any], UserFolder]:
    """The callable `name` of `file`, and the world it must be called in.

    Raises:
        ModelError: no such file or callable (those it has are listed), or an error in the file.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such file; the model is written FILE.py:factory")
    if not name.isidentifier():
        raise ModelError(
            f"{file}: which function builds the network? Write {file.name}:NAME, with one of "
            + (", ".join(callables_in(file)) or "its functions (it defines none)")
        )
    importlib.invalidate_caches()  # a neighbour written a moment ago is found too
    world = UserFolder(file)
    with blaming(world, str(file)):
        module = world.load()
    factory = vars(module).get(name)
    if not callable(factory):
        found = callables_in(file)
        near = difflib.get_close_matches(name, found, n=1)
        raise ModelError(
            f"{file}: {'is not callable' if factory is not None else 'has no'} {name!r}"
            + (f" (did you mean {near[0]}?)" if near else "")
            + f"; it defines {', '.join(found) or 'no function or class'}"
        )
    return factory, world


def callables_in(file: Path) -> list[str]:
    """Names of the functions and classes that the file defines, without running it."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in body if isinstance(node, kinds) and node.name[0] != "_"]


def call_factory(
    factory: Callable[..., Any], args: Mapping[str, Any], *, offered: Mapping[str, Any], where: str
) -> Any:
    """`factory(**args)`, with each of `offered` that its signature names and `args` leaves out.

    `classes` and `num_classes` are one offer: if `args` has either, neither is added.

    Raises:
        ModelError: an argument that it does not take, or one that it needs and nobody gave.
    """
    signature = _signature(factory)
    given = dict(args)
    if signature is not None:
        aliases = {"classes", "num_classes"}
        taken = set(args) | (aliases if aliases & set(args) else set())
        given |= {k: v for k, v in offered.items() if k in signature.parameters and k not in taken}
        _check_arguments(signature, given, args, where)
    return factory(**given)


def _check_arguments(
    signature: inspect.Signature, given: Mapping[str, Any], args: Mapping[str, Any], where: str
) -> None:
    parameters = signature.parameters
    takes = f"it takes ({', '.join(parameters)}), and `args` gives {sorted(args) or 'nothing'}"
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [] if is_open else [name for name in args if name not in parameters]
    if unknown:
        near = difflib.get_close_matches(unknown[0], parameters, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ModelError(f"{where}: no argument {unknown[0]!r}{meant}; {takes}")
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ModelError(f"{where}: {error}; {takes}") from None


def _signature(factory: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError):  # some builtins have none
        return None


def _message(error: BaseException) -> str:
    return error.msg if isinstance(error, SyntaxError) else str(error)


def _line(error: BaseException, trace: TracebackType | None, world: UserFolder) -> str:
    """ "net.py:12 in forward: ", the innermost line of the user's own; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_relative(Path(error.filename), world)}:{error.lineno}: "
    found = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if Path(code.co_filename) in world.sources:
            called = "" if code.co_name == "<module>" else f" in {code.co_name}"
            found = f"{_relative(Path(code.co_filename), world)}:{trace.tb_lineno}{called}: "
        trace = trace.tb_next
    return found


def _relative(file: Path, world: UserFolder) -> Path:
    return file.relative_to(world.folder) if world.folder in file.parents else file
