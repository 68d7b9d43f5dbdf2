"""Assembly of one self-contained module from this package's sources: exactly the code that some of its classes need.

Top-level statements are copied unchanged, with their comments, in the order in which modules import each other. A name
that two modules give to different things is changed in one of them. Imports of this package are removed, other imports
are gathered at the top, and pydantic is replaced by `replacements.py`. Names that occur only in the annotations of
functions are left out, because nothing evaluates those.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = "regen_dist"
REPLACEMENTS = f"{PACKAGE}.inference.hub.replacements"
ALLOWED = {"PIL", "torch", "numpy", "diffusers", "safetensors", "transformers", "sentencepiece", "huggingface_hub"}
OPTIONAL = {"flash_attn", "sentencepiece", "huggingface_hub"}  # imported by functions, where they are needed
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Symbol(NamedTuple):
    """A top-level name of a module."""

    module: str
    name: str


class External(NamedTuple):
    """Import of another package: `import module` where `name` is None, else `from module import name`."""

    module: str
    name: str | None


@dataclass
class Source:
    """A module: its text as lines of bytes (positions in a syntax tree count bytes), and the meaning of its names."""

    name: str
    lines: list[bytes]
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, Symbol | External] = field(default_factory=dict)
    inside: dict[str, External] = field(default_factory=dict)  # imports of other packages inside functions

    @classmethod
    def of(cls, name: str) -> Source:
        """Read the source of a module of this package."""
        path = _path(name)
        text = path.read_text(encoding="utf-8")
        source = cls(name, text.encode().splitlines(keepends=True))
        tree = ast.parse(text, str(path))
        for statement in tree.body:
            source.defined |= dict.fromkeys(_defined_names(statement), statement)
            source.imported |= _imports(statement)
        for node in ast.walk(tree):
            for name, target in _imports(node).items():
                if name not in source.imported and isinstance(target, External):
                    source.inside[name] = target
                source.imported |= {name: target} if isinstance(target, Symbol) else {}
        return source


_source = cache(Source.of)


def inlined(roots: Sequence[Symbol], left_out: Mapping[Symbol, Sequence[str]], title: str) -> tuple[str, str]:
    """Assemble a module with these classes and functions.

    Args:
        roots: the classes and functions that users of the module need; these keep their names.
        left_out: methods of classes that the module omits.
        title: docstring of the module.

    Returns:
        The file's name, which contains a digest of the contents to distinguish versions, and its text.

    Raises:
        ValueError: a part of the package cannot be inlined; the message names it.
    """
    reached = Reached()
    reached.follow(roots, left_out)
    needed, names = reached.symbols, _unique_names(reached, roots)
    parts = [f'"""{title}\n"""\n\nfrom __future__ import annotations\n\n{_header(reached)}']
    for module in _order(needed):
        wanted = _statements(module, needed)
        parts.append(f"# {module}\n")
        parts += [_text(_source(module), statement, names, left_out) for statement in wanted]
    text = "\n\n".join(part.rstrip("\n") + "\n" for part in parts) + _KEEP_FIRST
    compile(text, "the exported module", "exec")
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return f"regen_{digest}.py", text


# diffusers shares one folder of modules among all models, and runs a file anew for each that it loads.
_KEEP_FIRST = """

# diffusers runs this file again for every model that it loads: the first definitions stay.
_FIRST = globals().setdefault("_FIRST", {})
for _name, _value in list(globals().items()):
    if not _name.startswith("__"):
        globals()[_name] = _FIRST.setdefault(_name, _value)
"""


@dataclass
class Reached:
    """Everything that the roots need: names of this package, imports of other packages by their local name, and classes
    of this package that occur only in annotations."""

    symbols: set[Symbol] = field(default_factory=set)
    external: dict[str, External] = field(default_factory=dict)
    annotation_only: set[str] = field(default_factory=set)

    def follow(self, roots: Sequence[Symbol], left_out: Mapping[Symbol, Sequence[str]]) -> None:
        """Add everything that is needed, starting from the roots."""
        for symbol in left_out:
            if symbol.name not in _source(symbol.module).defined:
                raise ValueError(f"{symbol.module} defines no {symbol.name}, of which methods are to be left out")
        waiting = [_resolved(root) for root in roots]
        while waiting:
            found = waiting.pop()
            if isinstance(found, External) or found in self.symbols:
                continue
            self.symbols.add(found)
            source = _source(found.module)
            for name, evaluated in _referenced(source.defined[found.name], left_out.get(found, ())):
                target = _target(source, name)
                if isinstance(target, External):
                    self._add_import(name, target, found)
                elif target is not None and (evaluated or _is_alias(target)):
                    waiting.append(target)
                elif target is not None:
                    self.annotation_only.add(target.name)
                elif name in source.inside:
                    self._check(source.inside[name], found)
        self.annotation_only -= {symbol.name for symbol in self.symbols}

    def _add_import(self, name: str, target: External, user: Symbol) -> None:
        self._check(target, user)
        if self.external.setdefault(name, target) != target:
            raise ValueError(f"{name} is imported from {target.module} and from {self.external[name].module}")

    def _check(self, target: External, user: Symbol) -> None:
        top = target.module.partition(".")[0]
        if top not in ALLOWED | OPTIONAL and top not in sys.stdlib_module_names:
            raise ValueError(f"{user.module}: {user.name} needs {top}, which users of diffusers may not have")
        if _is_optional(target):
            self.external["importlib"] = External("importlib", None)


def _is_alias(target: Symbol) -> bool:
    """Return whether a symbol is a type alias, and not a class."""
    return isinstance(_source(target.module).defined[target.name], ast.Assign)


def _target(source: Source, name: str) -> Symbol | External | None:
    """Resolve a name in a module; None for builtins and local variables."""
    if name in source.defined:
        return Symbol(source.name, name)
    found = source.imported.get(name)
    return None if found is None else _resolved(found)


def _resolved(found: Symbol | External) -> Symbol | External:
    """Find the definition of a name, through modules that only re-export it."""
    if isinstance(found, External):
        return Symbol(REPLACEMENTS, found.name) if found.module == "pydantic" and found.name else found
    source = _source(found.module)
    if found.name in source.defined:
        return _REPLACED.get(found, found)
    if found.name not in source.imported:
        raise ValueError(
            f"{found.module} defines no {found.name}: a whole module cannot be inlined, import names of it"
        )
    return _resolved(source.imported[found.name])


_REPLACED = {
    Symbol(f"{PACKAGE}.inference.hub.inlining", name): Symbol(REPLACEMENTS, "own_module")
    for name in ("own_module", "pipeline_module")
}


def _is_optional(target: External) -> bool:
    return target.module.partition(".")[0] in OPTIONAL


def _referenced(statement: ast.stmt, left_out: Sequence[str]) -> set[tuple[str, bool]]:
    """Names in a statement, and whether they are evaluated; the annotations of functions never are."""
    names: set[tuple[str, bool]] = set()
    waiting: list[tuple[ast.AST, bool, bool]] = [(statement, False, True)]
    while waiting:
        node, inside, evaluated = waiting.pop()
        if isinstance(node, ast.Name):
            names.add((node.id, evaluated))
        if isinstance(node, ast.FunctionDef) and node is not statement and node.name in left_out:
            continue
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for name, value in ast.iter_fields(node):
            is_annotation = name == "returns" or (name == "annotation" and (inside or isinstance(node, ast.arg)))
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    waiting.append((child, inside or function, evaluated and not is_annotation))
    return names


def _defined_names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def _imports(node: ast.AST) -> dict[str, Symbol | External]:
    """Names that an import defines."""
    if isinstance(node, ast.Import):
        return dict(map(_whole_module, node.names))
    if not isinstance(node, ast.ImportFrom) or node.module is None or node.module == "__future__":
        return {}
    own = node.module.partition(".")[0] == PACKAGE
    kind = Symbol if own else External
    return {each.asname or each.name: kind(node.module, each.name) for each in node.names}


def _whole_module(alias: ast.alias) -> tuple[str, External]:
    """Name that `import a.b` or `import a.b as c` defines. The latter is `from a import b as c`."""
    parent, _, last = alias.name.rpartition(".")
    if alias.asname is not None and parent:
        return alias.asname, External(parent, last)
    return alias.asname or alias.name.partition(".")[0], External(alias.name, None)


def _unique_names(reached: Reached, roots: Sequence[Symbol]) -> dict[Symbol, str]:
    """Name of each symbol in the new module: its own name or, where two share it, prefixed with that of its module."""
    taken = {*reached.external, *dir(builtins)}
    count: dict[str, int] = {}
    for symbol in reached.symbols:
        count[symbol.name] = count.get(symbol.name, 0) + 1
    names: dict[Symbol, str] = {}
    for symbol in reached.symbols:
        if symbol in roots or (count[symbol.name] == 1 and symbol.name not in taken):
            names[symbol] = symbol.name
        else:
            place = "_".join(symbol.module.split(".")[1:])
            names[symbol] = "_" * symbol.name.startswith("_") + f"{place}_{symbol.name.lstrip('_')}"
    return names


def _header(reached: Reached) -> str:
    """Write the imports, those of whole modules first, and the classes that occur only in annotations."""
    whole: list[str] = []
    parts: dict[str, list[str]] = {}
    for name, target in sorted(reached.external.items()):
        if _is_optional(target):
            continue
        if target.name is not None:
            parts.setdefault(target.module, []).append(_renaming(target.name, name))
        elif "." in target.module or name != target.module:
            whole.append(f"import {_renaming(target.module, name)}")
        else:
            whole.append(f"import {target.module}")
    lines = [*whole, *(f"from {module} import {', '.join(names)}" for module, names in sorted(parts.items()))]
    if reached.annotation_only:
        names = " = ".join(sorted(reached.annotation_only))
        lines += ["from typing import TYPE_CHECKING", "", "if TYPE_CHECKING:  # of regen-dist, and not in this file"]
        lines.append(f"    {names} = Any")
    return "".join(f"{line}\n" for line in lines)


def _renaming(name: str, called: str) -> str:
    return name if name == called else f"{name} as {called}"


def _order(needed: set[Symbol]) -> list[str]:
    """Order modules so that each follows those that it imports."""
    modules = {symbol.module for symbol in needed}
    placed: list[str] = []
    seen: set[str] = set()

    def place(module: str) -> None:
        if module in seen:
            return
        seen.add(module)
        for target in _source(module).imported.values():
            if isinstance(found := _resolved_or_none(target), Symbol) and found.module in modules:
                place(found.module)
        placed.append(module)

    for module in sorted(modules):
        place(module)
    return placed


def _resolved_or_none(target: Symbol | External) -> Symbol | External | None:
    try:
        return _resolved(target)
    except ValueError:  # a module as a whole, which no needed code uses
        return None


def _statements(module: str, needed: set[Symbol]) -> list[ast.stmt]:
    wanted = {symbol.name for symbol in needed if symbol.module == module}
    found = {id(each): each for name, each in _source(module).defined.items() if name in wanted}
    return sorted(found.values(), key=lambda each: each.lineno)


def _text(
    source: Source, statement: ast.stmt, names: Mapping[Symbol, str], left_out: Mapping[Symbol, Sequence[str]]
) -> str:
    """Text of a statement with the comments above it, with the names of the new module."""
    lines = list(source.lines)
    for place, name in _renamed(source, statement, names):
        row, column = place.lineno - 1, place.col_offset
        old = place.id if isinstance(place, ast.Name) else place.name
        column = column if isinstance(place, ast.Name) else lines[row].index(old.encode(), column)
        lines[row] = lines[row][:column] + name.encode() + lines[row][column + len(old) :]
    gone: set[int] = set()
    for node in ast.walk(statement):
        gone |= _rewritten_import(node, lines)
        if isinstance(node, ast.ClassDef):
            gone |= _rows_of(node, left_out.get(Symbol(source.name, node.name), ()), lines)
    first = _first_row(statement)
    while first and lines[first - 1].startswith(b"#"):
        first -= 1
    last = statement.end_lineno or 0
    return b"".join(lines[row] for row in range(first, last) if row not in gone).decode()


def _first_row(statement: ast.AST) -> int:
    decorators = getattr(statement, "decorator_list", [])
    return int(min([each.lineno for each in decorators] + [statement.lineno])) - 1  # type: ignore[attr-defined]


def _rows_of(node: ast.ClassDef, methods: Sequence[str], lines: list[bytes]) -> set[int]:
    """Line numbers of some methods of a class, with the blank lines after them."""
    rows: set[int] = set()
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name in methods:
            stop = each.end_lineno or 0
            while stop < len(lines) and not lines[stop].strip():
                stop += 1
            rows |= set(range(_first_row(each), stop))
    return rows


def _rewritten_import(node: ast.AST, lines: list[bytes]) -> set[int]:
    """Adapt an import inside a function to the new module; return the lines to remove.

    Imports of this package are in the module already. Optional packages are imported by a call, because diffusers
    requires the package of every import statement to be installed.
    """
    if not isinstance(node, ast.ImportFrom) or node.module is None:
        return set()
    rows = range(node.lineno - 1, node.end_lineno or 0)
    top = node.module.partition(".")[0]
    indent = lines[rows[0]][: node.col_offset].decode()
    if top == PACKAGE:
        return set(rows)
    if top in OPTIONAL:
        whole = [
            f'{each.asname or each.name} = importlib.import_module("{node.module}").{each.name}' for each in node.names
        ]
        lines[rows[0]] = "".join(f"{indent}{line}\n" for line in whole).encode()
        return set(rows[1:])
    return set()


def _renamed(
    source: Source, statement: ast.stmt, names: Mapping[Symbol, str]
) -> list[tuple[ast.Name | ast.ClassDef | ast.FunctionDef, str]]:
    """Occurrences in a statement of names that change in the new module, from the end to the beginning."""
    changed = {}
    for name in {*source.defined, *source.imported}:
        target = _resolved_or_none(Symbol(source.name, name))
        if isinstance(target, Symbol) and names.get(target, name) != name:
            changed[name] = names[target]
    found: list[tuple[ast.Name | ast.ClassDef | ast.FunctionDef, str]] = []
    for node, local in _in_scopes(statement, frozenset()):
        if isinstance(node, ast.Name) and node.id in changed and node.id not in local:
            if changed[node.id] in local:
                raise ValueError(f"{source.name}:{node.lineno}: a variable is called {changed[node.id]}; rename it")
            found.append((node, changed[node.id]))
    if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name in changed:
        found.append((statement, changed[statement.name]))
    return sorted(found, key=lambda each: (each[0].lineno, each[0].col_offset), reverse=True)


def _in_scopes(node: ast.AST, local: frozenset[str]) -> Iterator[tuple[ast.AST, frozenset[str]]]:
    """Yield every node with the local variables of its enclosing functions."""
    yield node, local
    inside = local | _bound(node) if isinstance(node, (*_FUNCTIONS, *_COMPREHENSIONS)) else local
    for name, value in ast.iter_fields(node):
        outer = name in ("decorator_list", "returns") or (name == "args" and isinstance(value, ast.arguments))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.arguments):
                for part in ast.walk(child):
                    yield part, local
            elif isinstance(child, ast.AST):
                yield from _in_scopes(child, local if outer else inside)


def _bound(function: ast.AST) -> frozenset[str]:
    """Local names of a function or comprehension; names imported inside it count as names of the module."""
    names: set[str] = set()
    if isinstance(function, _FUNCTIONS):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        names |= {each.arg for each in every if each is not None}
    waiting: list[ast.AST] = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if not isinstance(node, (ast.Lambda, *_COMPREHENSIONS)):
            waiting += ast.iter_child_nodes(node)
    return frozenset(names)


def _path(module: str) -> Path:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ValueError(f"there is no module {module}")
    return Path(found.origin)


# The modules of code that are exported beside the weights.


_HUB, _INFERENCE, _CONFIG = f"{PACKAGE}.inference.hub", f"{PACKAGE}.inference", f"{PACKAGE}.config.exported"
_EMBEDDER = (Symbol(f"{_HUB}.embedder", "VideoEmbedder"),)
_PIPELINE = tuple(
    Symbol(f"{_HUB}.pipeline", name) for name in ("TextToVideoPipeline", "TextToVideoTransformer", "PromptEncoder")
)
# Methods that read or write runs and exports of this package.
_LEFT_OUT = {
    Symbol(f"{_INFERENCE}.codec", "Codec"): ("load",),
    Symbol(f"{_INFERENCE}.sampler", "TextToVideoModel"): ("load", "facts"),
    Symbol(f"{_INFERENCE}.latent_space", "LatentSpace"): ("of", "to_json", "write"),
    Symbol(f"{_INFERENCE}.latent_space", "LatentStatistics"): ("to_text",),
    Symbol(_CONFIG, "CommonExportConfig"): ("to_yaml",),
    Symbol(_CONFIG, "ExportConfig"): ("of",),
    Symbol(_CONFIG, "T2VExportConfig"): ("of",),
}
_TITLE = """\
REGEN, {what} (arXiv 2503.08665), for diffusers. Apache-2.0.

Written by `regen checkpoint export` out of the sources of regen-dist: change those."""


@cache
def own_module() -> tuple[str, str]:
    """File name and text of the module that opens exported embedders."""
    return inlined(_EMBEDDER, _LEFT_OUT, _TITLE.format(what="a video embedder with a generative decoder"))


@cache
def pipeline_module() -> tuple[str, str]:
    """File name and text of the module that opens exported text-to-video models."""
    return inlined(_PIPELINE, _LEFT_OUT, _TITLE.format(what="text to video on the latents of its embedder"))
