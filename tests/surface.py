"""What our code uses of TensorRT and of CUDA's Python packages, found in its syntax tree and looked up in the real bindings.

The bindings import without a driver, so this tells a renamed, removed or misspelt name, and a call with arguments that a
function does not take, on any machine. Types are followed as far as they can be read: imports, `modules.trt` and the like,
constructors, and the return types that the bindings state. What only a person can place stands in two tables.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda.bindings.driver
import cuda.core
import cuda.core.graph
import tensorrt_lean_bindings as lean
import tensorrt_rtx as rtx
from signatures import return_type_of, signatures_of

PARAMETERS: dict[str, type] = {
    "buffer": cuda.core.Buffer,
    "builder": rtx.Builder,
    "config": rtx.IBuilderConfig,
    "context": rtx.IExecutionContext,
    "device": cuda.core.Device,
    "engine": rtx.ICudaEngine,
    "event": cuda.core.Event,
    "inspector": rtx.EngineInspector,
    "loaded": rtx.ICudaEngine,
    "network": rtx.INetworkDefinition,
    "parser": rtx.OnnxParser,
    "refitter": rtx.Refitter,
    "runtime": rtx.Runtime,
    "runtime_cache.config": rtx.IRuntimeConfig,
    "stream": cuda.core.Stream,
}
"""What a parameter of this name is, where it is annotated as `Any`; with the file in front where it is another thing there."""

POLYGRAPHY: dict[str, tuple[type, ...]] = {
    "NetworkFromOnnxPath": (rtx.Builder, rtx.INetworkDefinition, rtx.OnnxParser),
    "CreateConfig": (rtx.IBuilderConfig,),
    "CreateConfigRTX": (rtx.IBuilderConfig,),
}
"""Polygraphy's loaders -> what calling one gives."""

CALLBACKS = {(rtx.IStreamWriter, "write"): 1}
"""Arguments of what the libraries call back, where the docstring tells those of the C++ function: TensorRT-RTX 1.7 passes one
buffer, as the plans of tests/nitro_engines show."""

TELLING = {
    name
    for module in (rtx, cuda.core, cuda.core.graph)
    for kind in vars(module).values()
    if inspect.isclass(kind) and not issubclass(kind, BaseException | tuple | str)
    for name in vars(kind)
    if "_" in name.strip("_") and not name.startswith("_")
}
"""Members of these libraries' classes whose names are of several words: they tell where a type was lost sight of."""

NAMESPACES = (rtx, lean, cuda.core, cuda.core.graph)
"""Where the name of a return type is looked up."""


@dataclass(frozen=True)
class Token:
    """What an expression is: a `module`, a `class`, an `object` of a class, a `callable`, or a `tuple` of objects."""

    kind: str
    value: Any
    owner: Any = None
    """Of a callable: the class or module that it belongs to."""


@dataclass(frozen=True)
class Use:
    """One attribute of one of these modules or of their objects, in our code."""

    owner: Any
    """A module or a class."""
    name: str
    where: str

    def __str__(self) -> str:
        return f"{self.owner.__name__.replace('.cu13', '')}.{self.name}"


@dataclass
class Findings:
    """Of one or several files."""

    uses: list[Use] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    num_calls: int = 0
    """Calls whose arguments were compared with a signature."""
    unplaced: list[str] = field(default_factory=list)
    """Names that these libraries have and we do not, on something of which it could not be told what it is."""
    returns: dict[str, Token | None] = field(default_factory=dict)
    """What our own functions return, by name; None where functions of one name differ, or it cannot be told."""


def inspect_sources(paths: Iterable[Path]) -> Findings:
    """Look at every file."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    returns: dict[str, Token | None] = {}
    for _ in range(4):  # each time with what functions return, which may call each other
        findings = Findings()
        for path, tree in trees.items():
            _Reader(path, findings, returns).body(tree, {}, {})
        if findings.returns == returns:
            break
        returns = findings.returns
    ours = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    files = {use.where.partition(":")[0] for use in findings.uses}
    findings.unplaced = [
        where for where in findings.unplaced if where.partition(":")[0] in files and where.rpartition(".")[2] not in ours
    ]
    return findings


class _Reader:
    """One file. A name is one thing in a whole function, whatever the order of its lines, which suffices for our code."""

    def __init__(self, path: Path, findings: Findings, returns: dict[str, Token | None]) -> None:
        self._path, self._findings, self._returns = path, findings, returns
        self._fields: dict[str, dict[str, Token]] = {}

    def body(self, node: ast.AST, outer: dict[str, Token], fields: dict[str, Token]) -> None:
        """A module, class or function: bind its names until nothing new is known, then record what it uses."""
        names = dict(outer)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names |= self._parameters(node)
        if isinstance(node, ast.ClassDef):
            bases = [self._fields.get(base.id, {}) for base in node.bases if isinstance(base, ast.Name)]
            fields = self._fields[node.name] = {name: token for base in bases for name, token in base.items()}
            methods = [inner for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)]
            for _ in range(3):
                known = len(fields)
                for method in methods:
                    self._bind(method, names | self._parameters(method), fields)
                if len(fields) == known:
                    break
            self._check_overrides(node, names, fields)
        for _ in range(3):
            known = len(names) + len(fields)
            self._bind(node, names, fields)
            if len(names) + len(fields) == known:
                break
        if isinstance(node, ast.FunctionDef):
            self._note_return(node, names, fields)
        for inner in _within(node):
            self._record(inner, names, fields)
        for inner in _inner_scopes(node):
            self.body(inner, names, fields)

    def _note_return(self, function: ast.FunctionDef, names: dict[str, Token], fields: dict[str, Token]) -> None:
        returned = [inner.value for inner in _within(function) if isinstance(inner, ast.Return) and inner.value is not None]
        tokens = [self._infer(value, names, fields) for value in returned if not isinstance(value, ast.Constant)]
        if not tokens:
            return
        token = tokens[0] if all(other == tokens[0] for other in tokens) else None
        known = self._findings.returns.setdefault(function.name, token)
        if known != token:
            self._findings.returns[function.name] = None

    def _parameters(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Token]:
        arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        names = (a.arg for a in arguments if a.annotation is None or ast.unparse(a.annotation) == "Any")
        kinds = {name: PARAMETERS.get(f"{self._path.stem}.{name}") or PARAMETERS.get(name) for name in names}
        return {name: Token("object", kind) for name, kind in kinds.items() if kind is not None}

    def _bind(self, node: ast.AST, names: dict[str, Token], fields: dict[str, Token]) -> None:
        for inner in _within(node):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                names |= _imported(inner)
            elif isinstance(inner, ast.Assign):
                for target in inner.targets:
                    self._assign(target, self._infer(inner.value, names, fields), names, fields)
            elif isinstance(inner, ast.AnnAssign) and inner.value is not None:
                self._assign(inner.target, self._infer(inner.value, names, fields), names, fields)
            elif isinstance(inner, ast.withitem) and inner.optional_vars is not None:
                self._assign(inner.optional_vars, self._infer(inner.context_expr, names, fields), names, fields)
            elif isinstance(inner, ast.For | ast.comprehension):
                elements = self._infer(inner.iter, names, fields)
                if elements is not None and elements.kind == "tuple":
                    self._assign(inner.target, elements.value[0], names, fields)

    def _assign(self, target: ast.expr, token: Token | None, names: dict[str, Token], fields: dict[str, Token]) -> None:
        if token is None:
            return
        if isinstance(target, ast.Name):
            names[target.id] = token
        elif isinstance(target, ast.Attribute) and _is_self(target.value):
            fields[target.attr] = token
        elif isinstance(target, ast.Tuple) and token.kind == "tuple":
            for element, value in zip(target.elts, token.value, strict=False):
                self._assign(element, value, names, fields)

    def _infer(self, node: ast.expr, names: dict[str, Token], fields: dict[str, Token]) -> Token | None:
        if isinstance(node, ast.Name):
            return Token("module", rtx) if node.id == "trt" else names.get(node.id)
        if isinstance(node, ast.Attribute):
            return self._infer_attribute(node, names, fields)
        if isinstance(node, ast.Call):
            return self._infer_call(node, names, fields)
        if isinstance(node, ast.IfExp):
            return self._infer(node.body, names, fields) or self._infer(node.orelse, names, fields)
        if isinstance(node, ast.Tuple):
            tokens = [self._infer(element, names, fields) for element in node.elts]
            return Token("tuple", tuple(tokens)) if any(tokens) else None
        if isinstance(node, ast.GeneratorExp | ast.ListComp):
            element = self._infer(node.elt, names, fields)
            return Token("tuple", (element,)) if element is not None else None
        if isinstance(node, ast.Subscript):
            elements = self._infer(node.value, names, fields)
            return elements.value[0] if elements is not None and elements.kind == "tuple" else None
        return None

    def _infer_attribute(self, node: ast.Attribute, names: dict[str, Token], fields: dict[str, Token]) -> Token | None:
        if node.attr in ("trt", "_trt"):
            return Token("module", rtx)
        if _last_name(node.value).endswith("modules"):
            modules = {"cuda": cuda.core, "driver": cuda.bindings.driver}
            return Token("module", modules[node.attr]) if node.attr in modules else None
        if _is_self(node.value):
            return fields.get(node.attr)
        owner = self._infer(node.value, names, fields)
        return _member(owner, node.attr) if owner is not None else None

    def _infer_call(self, node: ast.Call, names: dict[str, Token], fields: dict[str, Token]) -> Token | None:
        if isinstance(node.func, ast.Call) and isinstance(node.func.func, ast.Name) and node.func.func.id in POLYGRAPHY:
            made = tuple(Token("object", kind) for kind in POLYGRAPHY[node.func.func.id])
            return made[0] if len(made) == 1 else Token("tuple", made)
        called = self._infer(node.func, names, fields)
        if called is None:  # perhaps a function of ours
            return self._returns.get(_last_name(node.func))
        if called.kind == "class":
            return Token("object", called.value)
        return _returned(called) if called.kind == "callable" else None

    def _record(self, node: ast.AST, names: dict[str, Token], fields: dict[str, Token]) -> None:
        where = f"{self._path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            owner = self._infer(node.value, names, fields)
            if owner is not None and owner.kind in ("module", "class", "object"):
                self._use(owner, node.attr, where)
            elif owner is None and node.attr in TELLING and not _is_self(node.value):
                self._findings.unplaced.append(f"{where}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            called = self._infer(node.func, names, fields)
            if called is not None and called.kind in ("class", "callable"):
                self._call(called, node, where)
            elif isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr") and len(node.args) > 1:
                owner, name = self._infer(node.args[0], names, fields), node.args[1]
                if owner is not None and isinstance(name, ast.Constant):
                    self._use(owner, str(name.value), where)

    def _use(self, owner: Token, name: str, where: str) -> None:
        use = Use(owner.value, name, where)
        self._findings.uses.append(use)
        if not _has(owner.value, name):
            self._findings.problems.append(f"{where}: {use} does not exist")

    def _call(self, called: Token, node: ast.Call, where: str) -> None:
        signatures = list(signatures_of(called.value))
        if not signatures or any(isinstance(argument, ast.Starred) for argument in node.args):
            return
        keywords = [keyword.arg for keyword in node.keywords]
        if None in keywords:
            return
        self._findings.num_calls += 1
        # `Base.__init__(self)` passes what a bound method has already.
        number = len(node.args) - (bool(node.args) and _is_self(node.args[0]) and called.kind == "callable")
        if not any(signature.takes(number, [str(name) for name in keywords]) for signature in signatures):
            name = getattr(called.value, "__name__", called.value)
            given = f"{len(node.args)} positional and {sorted(map(str, keywords))}"
            known = " or ".join(map(str, signatures))
            self._findings.problems.append(f"{where}: {name} is called with {given}, it takes {known}")

    def _check_overrides(self, node: ast.ClassDef, names: dict[str, Token], fields: dict[str, Token]) -> None:
        """A method that a library calls back must have the library's name and number of arguments."""
        for base in node.bases:
            token = self._infer(base, names, fields)
            if token is None or token.kind != "class":
                continue
            for method in node.body:
                if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
                    continue
                where = f"{self._path.name}:{method.lineno}"
                self._use(token, method.name, where)
                number, called_with = len(method.args.args) - 1, CALLBACKS.get((token.value, method.name))
                expected = {called_with} if called_with else _numbers(getattr(token.value, method.name, None))
                if expected and number not in expected:
                    given = f"{node.name}.{method.name} takes {number} arguments"
                    self._findings.problems.append(f"{where}: {given}, it is called back with {sorted(expected)}")


def _returned(called: Token) -> Token | None:
    """What calling gives, as far as the binding says."""
    text = return_type_of(called.value)
    kinds = [kind for word in re.findall(r"\w+", text) if (kind := _class_named(word)) is not None]
    if text.startswith("Self"):
        return Token("object", called.owner)
    if not kinds:
        return None
    made = Token("object", kinds[0])
    return Token("tuple", (made,)) if text.startswith(("tuple[", "list[")) else made


def _class_named(name: str) -> type | None:
    for namespace in NAMESPACES:
        found = getattr(namespace, name, None)
        if inspect.isclass(found):
            return found
    return None


def _member(owner: Token, name: str) -> Token | None:
    """What an attribute is."""
    if owner.kind not in ("module", "class", "object"):
        return None
    found = _get(owner.value, name)
    if found is None:
        return None
    if isinstance(found, ModuleType):
        return Token("module", found)
    if inspect.isclass(found):
        return Token("class", found)
    if owner.kind == "class" and isinstance(found, owner.value):  # a member of an enumeration
        return Token("object", owner.value)
    if callable(found):
        return Token("callable", found, owner.value)
    return Token("object", type(found)) if owner.kind == "module" else None


def _get(owner: Any, name: str) -> Any:
    """From the real thing; what is TensorRT-RTX's is also looked up in TensorRT's runtime."""
    if hasattr(owner, name):
        return getattr(owner, name)
    twin = lean if owner is rtx else getattr(lean, owner.__name__, None) if inspect.isclass(owner) else None
    return getattr(twin, name, None)


def _has(owner: Any, name: str) -> bool:
    return hasattr(owner, name) or _get(owner, name) is not None


def _imported(node: ast.Import | ast.ImportFrom) -> dict[str, Token]:
    """Names that an import binds to one of these modules."""
    known: dict[str, ModuleType] = {
        "cuda.core": cuda.core,
        "cuda.core.graph": cuda.core.graph,
        "cuda.bindings.driver": cuda.bindings.driver,
        "tensorrt": rtx,
        "tensorrt_rtx": rtx,
        "tensorrt_lean": lean,
    }
    names: dict[str, Token] = {}
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name in known and (alias.asname or "." not in alias.name):
                names[alias.asname or alias.name] = Token("module", known[alias.name])
            elif alias.name in known:
                names["cuda"] = Token("module", cuda)
        return names
    for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        if whole in known:
            names[alias.asname or alias.name] = Token("module", known[whole])
        elif node.module in known:
            member = _member(Token("module", known[node.module]), alias.name)
            if member is not None:
                names[alias.asname or alias.name] = member
    return names


@functools.cache
def _within(node: ast.AST) -> tuple[ast.AST, ...]:
    """Every node of a scope, inner functions and classes left out."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found += (child, *_within(child))
    return tuple(found)


@functools.cache
def _inner_scopes(node: ast.AST) -> tuple[ast.AST, ...]:
    """Functions and classes of a scope."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        is_scope = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        found += (child,) if is_scope else _inner_scopes(child)
    return tuple(found)


def _numbers(called: Any) -> set[int]:
    """Of arguments, by the documented signatures."""
    return {len(signature.positional) for signature in signatures_of(called)}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
