"""Static check of the names of settings: every `cfg.SECTION.KEY` in code and every SECTION.KEY in text must exist.

yacs' CfgNode has no static type, so mypy accepts any attribute of it. Here, the names that hold a configuration or a
section are followed through assignments, arguments, returned values and attributes, over all files at once and
regardless of the order of statements. An upper-case attribute of anything else must belong to a module, a class or
`self`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from yacs.config import CfgNode

Section = tuple[str, ...]  # names from the root; () is the complete configuration
Holder = tuple[str, ...]  # a variable, attribute or returned value that may be a section

_UPPER = re.compile(r"[A-Z][A-Z0-9_]*")
_ROOT_NAMES = {"cfg", "_cfg", "config", "_config"}  # taken for the complete configuration
_KEY_IN_TEXT = re.compile(r"(?<![\w./-])[A-Z][A-Z0-9]*(?:\.[A-Z]\w*)+")


class Fault(NamedTuple):
    """A name that does not exist, or an upper-case attribute of something unknown."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


class Schema:
    """Sections and keys.

    Args:
        keys: Full keys, as "SOLVER.BASE_LR".
    """

    def __init__(self, keys: Collection[str]) -> None:
        self.keys = set(keys)
        self.sections: set[Section] = {()}
        for key in keys:
            parts = key.split(".")
            self.sections.update(tuple(parts[:depth]) for depth in range(len(parts)))
        self._last_names = {key.rpartition(".")[2] for key in keys if "." in key}

    def is_name_in(self, section: Section, name: str) -> bool:
        return (*section, name) in self.sections or ".".join((*section, name)) in self.keys

    def fault_of_chain(self, section: Section, names: list[str]) -> str | None:
        """Return what is wrong with `names`, upper-case attributes one after the other, of a section."""
        for name in names:
            if section not in self.sections:
                return f"{'.'.join(section)} is a setting, not a section, and has no {name}"
            if not self.is_name_in(section, name):
                return f"{'.'.join(section) or 'the configuration'} has no {name}"
            section = (*section, name)
        return None

    def fault_of_text(self, text: str) -> str | None:
        """Return the fault of a text like SECTION.KEY; None for a text that resembles no key."""
        first, last = text.split(".")[0], text.rpartition(".")[2]
        if (first,) not in self.sections and last not in self._last_names:
            return None
        is_beginning = text.endswith("_") and any(key.startswith(text) for key in self.keys)
        is_known = text in self.keys or tuple(text.split(".")) in self.sections or is_beginning
        return None if is_known else f"{text} is no setting"


def faults_in_text(file: str, text: str, schema: Schema) -> list[Fault]:
    """Return the names like SECTION.KEY in a text that are no settings."""
    faults = []
    for number, line in enumerate(text.splitlines(), 1):
        for match in _KEY_IN_TEXT.finditer(line):
            message = schema.fault_of_text(match[0])
            faults += [Fault(file, number, message)] if message else []
    return faults


def faults_in_code(sources: Mapping[str, str], schema: Schema) -> list[Fault]:
    """Return the attribute chains in Python files that are no settings.

    Args:
        sources: File name -> source code; sections are followed from one file to another.
        schema: Existing sections and keys.
    """
    flow = _Flow(schema)
    files = [_File(name, ast.parse(source), flow) for name, source in sources.items()]
    before = -1
    while before != flow.size():
        before = flow.size()
        for file in files:
            file.propagate()
    return [fault for file in files for fault in file.faults()]


class _Where(NamedTuple):
    """Position of a node among the definitions."""

    scope: tuple[str, ...]  # file and functions, from the outermost to the innermost
    class_name: str = ""

    def inside(self, function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> _Where:
        name = f"{getattr(function, 'name', 'lambda')}@{function.lineno}:{function.col_offset}"
        return self._replace(scope=(*self.scope, name))


class _Parameters(NamedTuple):
    """Parameters of one function."""

    scope: tuple[str, ...]
    positional: list[str]  # without self
    takers: set[str]  # those that may be a section


@dataclass
class _Flow:
    """Holders of sections, over all files: variables, attributes, returned values."""

    schema: Schema
    holders: dict[Holder, set[Section]] = field(default_factory=dict)
    functions: dict[str, list[_Parameters]] = field(default_factory=dict)  # by the name that is called
    members: set[str] = field(default_factory=set)  # attributes of classes and their instances

    def add(self, holder: Holder, sections: set[Section]) -> None:
        if sections:
            self.holders.setdefault(holder, set()).update(sections)

    def of(self, *holder: str) -> set[Section]:
        return self.holders.get(holder, set())

    def size(self) -> int:
        return sum(map(len, self.holders.values()))


class _File:
    """A file with the definitions around each of its nodes."""

    def __init__(self, name: str, tree: ast.Module, flow: _Flow) -> None:
        self._name, self._flow = name, flow
        self._nodes: list[tuple[ast.AST, _Where]] = []
        self._bound: set[str] = set()  # names of modules and classes
        self._inner: set[ast.AST] = set()  # parts of longer chains
        self._visit(tree, _Where((name,)))
        for node, where in self._nodes:
            self._declare(node, where)

    def _visit(self, node: ast.AST, where: _Where) -> None:
        self._nodes.append((node, where))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            where = where.inside(node)
        elif isinstance(node, ast.ClassDef):
            where = where._replace(class_name=node.name)
        for child in ast.iter_child_nodes(node):
            self._visit(child, where)

    # ---- definitions ----

    def _declare(self, node: ast.AST, where: _Where) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            self._bound.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ClassDef):
            self._bound.add(node.name)
            targets = [target for part in node.body for target in _targets(part)]
            self._flow.members.update(target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self._declare_function(node, where)
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("importlib."):
            self._bound.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and _is_upper(node) and _is_upper(node.value):
            self._inner.add(node.value)
        for target in _targets(node):
            if isinstance(target, ast.Attribute) and _name_of(target.value) == "self":
                self._flow.members.add(target.attr)

    def _declare_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, where: _Where) -> None:
        positional = [*node.args.posonlyargs, *node.args.args]
        if positional and positional[0].arg in ("self", "cls"):
            del positional[0]
        # Functions of one name are not distinguished, but most of the others have another annotation here.
        takers = {arg.arg for arg in (*positional, *node.args.kwonlyargs) if _may_be_section(arg.annotation)}
        parameters = _Parameters(where.inside(node).scope, [arg.arg for arg in positional], takers)
        called = where.class_name if node.name == "__init__" else node.name
        self._flow.functions.setdefault(called, []).append(parameters)

    # ---- what flows where ----

    def propagate(self) -> None:
        for node, where in self._nodes:
            for target, value in _bindings(node):
                self._bind(target, value, where)
            if isinstance(node, ast.Call):
                self._pass_arguments(node, where)
            elif isinstance(node, ast.Return) and node.value is not None:
                function = where.scope[-1].partition("@")[0]
                self._flow.add(("returned by", function), self._sections(node.value, where))

    def _bind(self, target: ast.expr, value: ast.expr, where: _Where) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
                for part, of_part in zip(target.elts, value.elts, strict=True):
                    self._bind(part, of_part, where)
        elif isinstance(target, ast.Name):
            self._flow.add((*where.scope, target.id), self._sections(value, where))
        elif isinstance(target, ast.Attribute) and _name_of(target.value) == "self":
            self._flow.add(("attribute", self._name, where.class_name, target.attr), self._sections(value, where))

    def _pass_arguments(self, call: ast.Call, where: _Where) -> None:
        by_position = [*takewhile(lambda value: not isinstance(value, ast.Starred), call.args)]
        by_name = [(keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg is not None]
        for parameters in self._flow.functions.get(_name_of(call.func), ()):
            for name, value in [*zip(parameters.positional, by_position, strict=False), *by_name]:
                if name in parameters.takers:
                    self._flow.add((*parameters.scope, name), self._sections(value, where))

    def _sections(self, node: ast.expr, where: _Where) -> set[Section]:
        """Return the sections that an expression may be."""
        if isinstance(node, ast.Name):
            return self._sections_of_name(node.id, where)
        if isinstance(node, ast.Attribute):
            return self._sections_of_attribute(node, where)
        if isinstance(node, ast.Call):
            return self._sections_of_call(node, where)
        parts = []
        if isinstance(node, ast.NamedExpr):
            parts = [node.value]
        elif isinstance(node, ast.IfExp):
            parts = [node.body, node.orelse]
        elif isinstance(node, ast.BoolOp):
            parts = node.values
        return {section for part in parts for section in self._sections(part, where)}

    def _sections_of_name(self, name: str, where: _Where) -> set[Section]:
        for depth in range(len(where.scope), 0, -1):
            if sections := self._flow.of(*where.scope[:depth], name):
                return sections
        return {()} if name in _ROOT_NAMES and name not in self._bound else set()

    def _sections_of_attribute(self, node: ast.Attribute, where: _Where) -> set[Section]:
        if _is_upper(node):
            longer = {(*section, node.attr) for section in self._sections(node.value, where)}
            return (longer or {(node.attr,)}) & self._flow.schema.sections
        if _name_of(node.value) == "self" and (held := self._flow.of(*self._attribute(node, where))):
            return held
        return {()} if node.attr in _ROOT_NAMES else set()

    def _attribute(self, node: ast.Attribute, where: _Where) -> Holder:
        return "attribute", self._name, where.class_name, node.attr

    def _sections_of_call(self, node: ast.Call, where: _Where) -> set[Section]:
        name = _name_of(node.func)
        if name == "deepcopy":
            return self._sections(node.args[0], where)
        if name == "clone" and isinstance(node.func, ast.Attribute):
            return self._sections(node.func.value, where)
        return {()} if name in ("CfgNode", "load_config") else self._flow.of("returned by", name)

    # ---- faults ----

    def faults(self) -> Iterator[Fault]:
        for node, where in self._nodes:
            if isinstance(node, ast.Attribute) and node not in self._inner:
                message = self._fault(node, where) if _is_upper(node) else self._fault_of_other_case(node, where)
                if message:
                    yield Fault(self._name, node.lineno, f"{ast.unparse(node)}: {message}")

    def _fault(self, chain: ast.Attribute, where: _Where) -> str | None:
        names: list[str] = []
        receiver: ast.expr = chain
        while isinstance(receiver, ast.Attribute) and _is_upper(receiver):
            names.insert(0, receiver.attr)
            receiver = receiver.value
        schema = self._flow.schema
        by_its_name = (_name_of(receiver).lstrip("_").upper(),)  # as `solver`
        if sections := self._sections(receiver, where):
            return next(filter(None, (schema.fault_of_chain(section, names) for section in sorted(sections))), None)
        if _root_of(receiver) in self._bound or names[0] in self._flow.members:
            return None
        if by_its_name in schema.sections:
            return schema.fault_of_chain(by_its_name, names)
        if schema.is_name_in((), names[0]):
            return schema.fault_of_chain((), names)
        return f"{ast.unparse(receiver)} is known neither as a configuration nor as a module or class"

    def _fault_of_other_case(self, node: ast.Attribute, where: _Where) -> str | None:
        for section in self._sections(node.value, where):
            if self._flow.schema.is_name_in(section, node.attr.upper()) and not hasattr(CfgNode, node.attr):
                return self._flow.schema.fault_of_chain(section, [node.attr])
        return None


def _is_upper(node: ast.AST) -> bool:
    """Return whether it ends in an upper-case attribute; a tensor's T is no setting."""
    return isinstance(node, ast.Attribute) and len(node.attr) > 1 and _UPPER.fullmatch(node.attr) is not None


def _name_of(node: ast.expr) -> str:
    """Return the last part of a dotted name; empty for anything else."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return _name_of(node)


def _may_be_section(annotation: ast.expr | None) -> bool:
    return annotation is None or "CfgNode" in ast.unparse(annotation) or ast.unparse(annotation) == "Any"


def _targets(node: ast.AST) -> list[ast.expr]:
    return [node.target] if isinstance(node, ast.AnnAssign) else [target for target, _ in _bindings(node)]


def _bindings(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """Return the targets that a statement or expression binds, with their values."""
    if isinstance(node, ast.Assign):
        return [(target, node.value) for target in node.targets]
    if isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        return [(node.target, node.value)]
    if isinstance(node, ast.withitem) and node.optional_vars is not None:
        return [(node.optional_vars, node.context_expr)]
    if isinstance(node, ast.For | ast.comprehension) and isinstance(node.iter, ast.Tuple | ast.List):
        return [(node.target, value) for value in node.iter.elts]
    return []
